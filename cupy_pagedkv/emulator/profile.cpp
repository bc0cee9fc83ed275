// profile.cpp: the accesses of a warp's lanes at the same place in the same pass are one request; what it costs follows from
// its addresses. Global memory moves in sectors of 32 bytes. Shared memory has 32 banks of 4 bytes; 8-byte accesses go by
// half warps, 16-byte accesses by quarter warps, and ldmatrix by the eight rows of a matrix.

#include "profile.hpp"
#include <algorithm>
#include <tuple>

namespace emulated {

constexpr long SHARED_MEMORY = -1, DEVICE_VARIABLE = -2, NOT_COUNTED = -3;

void Profile::begin_block()
{
    events.resize(w.warps.size());
    for (auto& of_warp : events) of_warp.clear();
    passes.resize(w.threads.size());
    for (auto& of_thread : passes) of_thread.clear();
    in_flight.assign(w.threads.size(), {});
}

long Profile::array_of(std::uintptr_t address) const
{
    if (w.in_shared(address, 1)) return SHARED_MEMORY;
    const Region* regions = w.launch.regions;
    for (std::size_t i = 0; i < w.launch.num_regions; ++i)
        if (address >= regions[i].view_begin && address < regions[i].view_end) return (long)i;
    for (std::size_t i = 0; i < w.launch.num_regions; ++i)
        if (address >= regions[i].begin && address < regions[i].end) return (long)i;
    for (const auto* index : {&threadIdx, &blockIdx, &blockDim, &gridDim})
        if (address >= (std::uintptr_t)index && address < (std::uintptr_t)(index + 1)) return NOT_COUNTED;
    if (w.in_arguments(address, 1)) return NOT_COUNTED;
    return DEVICE_VARIABLE;
}

void Profile::touch(std::uintptr_t address, std::size_t size, int touch, const void* place)
{
    if (w.thread().stack.holds(address, size)) return;
    // An instruction moves 1, 2, 4, 8 or 16 bytes of a thread, from a multiple of as many: a struct may take several.
    const std::size_t all = size | address | 16, width = all & ~(all - 1);
    if (size > width && !(touch & ASYNC)) {
        for (std::size_t i = 0; i < size; i += width) this->touch(address + i, width, touch, place);
        return;
    }
    const long array = array_of(address);
    if (array == NOT_COUNTED) return;
    const std::uint32_t here = (std::uint32_t)((std::uintptr_t)place - w.code);
    // The source and the target of an asynchronous copy have one place and are two requests.
    const std::uint32_t key = here * 2 + (touch & WRITE ? 1 : 0);
    const std::uint32_t pass = passes[w.current][key]++;
    events[w.current / 32].push_back({here, pass, address, (std::uint32_t)size, (std::int16_t)array,
                                      (std::uint8_t)(w.current % 32), (std::uint8_t)touch});
    InFlight& flying = in_flight[w.current];
    if (touch & (WRITE | ATOMIC) && !(touch & ASYNC)) used();
    if (array == SHARED_MEMORY || touch & (WRITE | ATOMIC)) return;
    (touch & ASYNC ? flying.copying : flying.loaded) += size;
    flying.most = std::max(flying.most, flying.loaded + flying.copying);
}

void Profile::used() { in_flight[w.current].loaded = 0; }

void Profile::arrived(const Copy& copy) { in_flight[w.current].copying -= copy.from_source; }

static std::uint64_t distinct(std::vector<std::uintptr_t>& values)
{
    std::sort(values.begin(), values.end());
    return (std::uint64_t)(std::unique(values.begin(), values.end()) - values.begin());
}

void Profile::request(const Event* begin, const Event* end)
{
    const long array = begin->array;
    const bool writes = begin->touch & (WRITE | ATOMIC);
    const std::uint64_t key = ((std::uint64_t)begin->place << 16) | ((std::uint64_t)(array + 4) << 6) | begin->touch;
    const auto [found, isnew] = index.try_emplace(key, rows.size());
    if (isnew) rows.push_back({begin->place, array, begin->touch, 0, 0, 0, 0, 0});
    Row& row = rows[found->second];
    ++row.requests;

    if (array == SHARED_MEMORY) {
        // A wavefront brings a word from each bank, to all lanes that want it, whatever their access's width: an H100 counts
        // as many. An event of ldmatrix is a row of 16 bytes: eight, of eight lanes, are a matrix, which comes on its own.
        const unsigned together = begin->touch & MATRIX ? 8 : 32;  // lanes
        std::vector<std::uintptr_t> words;
        for (unsigned first = 0; first < 32; first += together) {
            words.clear();
            for (const Event* e = begin; e != end; ++e)
                if (e->lane >= first && e->lane < first + together)
                    for (std::uintptr_t word = e->address / 4; word <= (e->address + e->size - 1) / 4; ++word)
                        words.push_back(word);
            if (words.empty()) continue;
            words.resize(distinct(words));
            unsigned banks[32] = {}, most = 0;
            for (const std::uintptr_t word : words) most = std::max(most, ++banks[word % 32]);
            row.wavefronts += most;
            row.least += (words.size() + 31) / 32;
        }
        return;
    }
    // An array lies where malloc put it; on a GPU it begins at a multiple of 256 (`cudaMalloc`, and CuPy's memory pool).
    const std::uintptr_t base = array >= 0 ? w.launch.regions[array].begin : 0;
    std::vector<std::pair<std::uintptr_t, std::uintptr_t>> spans;
    std::vector<std::uintptr_t> sectors;
    for (const Event* e = begin; e != end; ++e) {
        spans.emplace_back(e->address, e->address + e->size);
        for (std::uintptr_t s = (e->address - base) / 32; s <= (e->address - base + e->size - 1) / 32; ++s)
            sectors.push_back(s);
    }
    row.sectors += distinct(sectors);
    std::sort(spans.begin(), spans.end());
    std::uintptr_t past = 0;
    for (const auto& [from, to] : spans) {
        for (std::uintptr_t address = std::max(from, past); address < to; ++address) {
            auto& page = pages[address / PAGE];
            if (!page) page.reset(new Counts());
            std::uint16_t& times = page->times[writes][address % PAGE];
            times = (std::uint16_t)std::min(65535, times + 1);
            ++row.bytes;
        }
        past = std::max(past, to);
    }
}

void Profile::end_block()
{
    for (auto& of_warp : events) {
        std::stable_sort(of_warp.begin(), of_warp.end(), [](const Event& a, const Event& b) {
            return std::tuple(a.place, a.touch, a.pass, a.array) < std::tuple(b.place, b.touch, b.pass, b.array);
        });
        for (std::size_t i = 0, j; i < of_warp.size(); i = j) {
            for (j = i + 1; j < of_warp.size(); ++j)
                if (of_warp[j].place != of_warp[i].place || of_warp[j].pass != of_warp[i].pass
                    || of_warp[j].touch != of_warp[i].touch || of_warp[j].array != of_warp[i].array)
                    break;
            request(&of_warp[i], &of_warp[i] + (j - i));
        }
    }
    std::uint64_t flying = 0;
    for (const InFlight& thread : in_flight) flying += thread.most;
    most_in_flight = std::max(most_in_flight, flying);
    for (const Thread& thread : w.threads) {
        collectives += thread.collectives;
        barriers += thread.barriers;
    }
}

void Profile::report(Report& report)
{
    static thread_local std::vector<Row> kept_rows;  // until the next launch of this host thread
    static thread_local std::vector<Bytes> kept_bytes;
    for (const auto& [page, counts] : pages)
        for (std::uint64_t writes = 0; writes < 2; ++writes)
            for (std::size_t i = 0; i < PAGE; ++i) {
                const std::uint64_t times = counts->times[writes][i];
                if (!times) continue;
                const long array = array_of(page * PAGE + i);
                auto found = std::find_if(bytes.begin(), bytes.end(), [&](const Bytes& b) {
                    return b.array == array && b.touch == writes;
                });
                if (found == bytes.end()) found = bytes.insert(found, {array, writes, 0, 0, 0});
                ++(times == 1 ? found->once : found->more);
                found->most = std::max(found->most, times);
            }
    kept_rows = rows;
    kept_bytes = bytes;
    report = {kept_rows.size(), kept_bytes.size(), kept_rows.data(), kept_bytes.data(), collectives, barriers,
              most_in_flight};
}

}  // namespace emulated
