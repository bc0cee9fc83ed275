// checks.cpp: races, stray accesses, and reads of what was not written or has not arrived.
//
// Two accesses are ordered if one thread made both, if a __syncthreads of their block lies between them, if a chain of
// __syncwarp leads from one lane to the other (a vector clock a lane), or if one thread made the first known by a fence and
// an atomic access, and the other came to an atomic access later. Shuffles and votes order nothing (CUDA programming
// guide, "Warp Shuffle Functions": they "do not imply a memory barrier"). What is not ordered is a race, whatever order the
// threads happened to run in here.

#include "checks.hpp"
#include <algorithm>
#include <cstdio>
#include <cstring>

namespace emulated {

static const char* verb(int touch)
{
    return touch & ATOMIC ? "atomically changes" : touch & WRITE ? "writes" : "reads";
}

#define WHO "thread (%u, %u, %u) of block (%u, %u, %u)"
#define ME threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z

Checks::Checks(Worker& worker, const std::vector<Region>& of_library)
    : w(worker), arrays(w.launch.regions, w.launch.regions + w.launch.num_regions), segments(of_library), stamps(1)
{
    shared.resize((std::size_t)(w.shared_end - w.shared_begin));
    clocks.assign(w.warps.size(), std::vector<std::uint32_t>(32 * 32));
}

void Checks::begin_block()
{
    stamp_of.assign(w.threads.size(), 0);
    fenced.assign(w.threads.size(), {NO_FENCE, 0});
    for (auto& warp : clocks) std::fill(warp.begin(), warp.end(), 0);
    for (auto& warp : clocks)
        for (int lane = 0; lane < 32; ++lane) warp[lane * 33] = 1;
    acquires.clear();
    in_flight.clear();
}

std::uint32_t Checks::stamp()
{
    std::uint32_t& mine = stamp_of[w.current];
    if (!mine) {
        mine = (std::uint32_t)stamps.size();
        stamps.push_back({w.block, w.current, barriers, clocks[w.current / 32][w.current % 32 * 33]});
    }
    return mine;
}

// Whether the running thread knows of what happened then.
bool Checks::ordered(std::uint32_t earlier) const
{
    const Stamp& then = stamps[earlier];
    if (then.block == w.block) {
        if (then.barriers < barriers) return true;
        if (then.thread / 32 == w.current / 32
            && clocks[w.current / 32][w.current % 32 * 32 + then.thread % 32] >= then.clock)
            return true;
    }
    for (const Release& release : releases) {
        const bool own = then.thread == release.thread;
        if (release.block != then.block || earlier >= (own ? release.own_stamps : release.stamps)) continue;
        if (release.fence != OF_DEVICE && then.block != w.block) continue;
        if (then.barriers >= release.barriers && !own) continue;
        for (const Acquire& acquire : acquires)
            if (acquire.time > release.time && (acquire.barriers < barriers || acquire.thread == w.current)) return true;
    }
    return false;
}

void Checks::sync_warp(unsigned warp, unsigned lanes)
{
    auto& known = clocks[warp];
    std::uint32_t all[32] = {};
    for (unsigned left = lanes; left; left &= left - 1) {
        const std::uint32_t* row = &known[__builtin_ctz(left) * 32];
        for (int i = 0; i < 32; ++i) all[i] = std::max(all[i], row[i]);
    }
    for (unsigned left = lanes; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        std::copy(all, all + 32, &known[lane * 32]);
        ++known[lane * 33];
        stamp_of[warp * 32 + lane] = 0;
    }
}

void Checks::sync_block()
{
    ++barriers;
    std::fill(stamp_of.begin(), stamp_of.end(), 0);
}

void Checks::fence(Fence fence)
{
    fenced[w.current] = {std::max(fenced[w.current].fence, fence), (std::uint32_t)stamps.size()};
    stamp_of[w.current] = 0;
}

void Checks::synchronise_atomic()
{
    acquires.push_back({++time, w.current, barriers});
    const Fenced& mine = fenced[w.current];
    if (mine.fence == NO_FENCE) return;
    releases.push_back({w.block, ++time, w.current, barriers, (std::uint32_t)stamps.size(), mine.stamps, mine.fence});
    stamp_of[w.current] = 0;
}

Checks::Space Checks::space_of(std::uintptr_t address, std::size_t size, int touch, const void* place)
{
    const Thread& thread = w.thread();
    if (thread.stack.holds(address, size)) return OWN;
    if (w.in_shared(address, size)) return SHARED;
    const auto inside = [&](const Region& r) { return address >= r.begin && address + size <= r.end; };
    for (const Region& array : arrays)
        if (inside(array)) return GLOBAL;
    if (w.in_arguments(address, size)) return OWN;  // structs that came by value
    for (const auto* index : {&threadIdx, &blockIdx, &blockDim, &gridDim})
        if (address >= (std::uintptr_t)index && address + size <= (std::uintptr_t)(index + 1)) return OWN;
    for (const Region& segment : segments)
        if (inside(segment)) return GLOBAL;  // `__device__` and `__constant__` variables
    char where[160] = "outside every array of the launch, shared memory and the thread's own variables";
    if (!w.dynamic && address < (std::uintptr_t)w.shared_end + 1024 && address + size > (std::uintptr_t)w.shared_end)
        std::snprintf(where, sizeof where, "past the end of the shared memory of the block");
    else if (address < (std::uintptr_t)w.shared_end && address + size > (std::uintptr_t)w.shared_begin)
        std::snprintf(where, sizeof where, "past the %zu bytes of dynamic shared memory of the launch", w.launch.shared_bytes);
    else {
        std::size_t least = 1 << 20;
        for (const Region& array : arrays) {
            const bool behind = address >= array.begin;
            const std::size_t distance = behind ? address + size - array.end : array.begin - address;
            if (distance >= least) continue;
            least = distance;
            std::snprintf(where, sizeof where, "%zu bytes %s of an array of the launch (%zu bytes)", distance,
                          behind ? "past the end" : "before the beginning", (std::size_t)(array.end - array.begin));
        }
        for (unsigned i = 0; i < w.threads.size(); ++i)
            if (w.threads[i].stack.low && w.threads[i].stack.low != thread.stack.low
                && w.threads[i].stack.holds(address, size))
                std::snprintf(where, sizeof where, "in a variable of another thread (%u)", i);
    }
    fail(place, nullptr, "{0}: " WHO " %s %zu bytes at address 0x%zx, %s", ME, verb(touch), size, (std::size_t)address,
         where);
}

Cell& Checks::cell(std::uintptr_t address, Space space)
{
    if (space == SHARED) return shared[address - (std::uintptr_t)w.shared_begin];
    if (address / PAGE != last_page) {
        auto& cells = pages[address / PAGE];
        if (!cells) cells.reset(new Cell[PAGE]());
        last_cells = cells.get();
        last_page = address / PAGE;
    }
    return last_cells[address % PAGE];
}

void Checks::race(std::uintptr_t address, std::size_t size, int touch, const void* place, std::uint32_t other,
                  std::uint32_t other_place, bool other_wrote)
{
    const Stamp& then = stamps[other];
    const unsigned t = then.thread, x = blockDim.x, y = blockDim.y;
    fail(place, (const void*)(w.code + (other_place & PLACE)),
         "{0}: race: " WHO " %s %zu bytes at address 0x%zx, which thread (%u, %u, %u) of block (%u, %u, %u) %s at {1}, "
         "and nothing orders the two", ME, verb(touch), size, (std::size_t)address, t % x, t / x % y, t / (x * y),
         (unsigned)(then.block % gridDim.x), (unsigned)(then.block / gridDim.x % gridDim.y),
         (unsigned)(then.block / ((std::uint64_t)gridDim.x * gridDim.y)),
         other_place & ATOMIC_PLACE ? "changed atomically" : other_wrote ? "wrote" : "read");
}

void Checks::touch(std::uintptr_t address, std::size_t size, int touch, const void* place)
{
    const Space space = space_of(address, size, touch, place);
    if (space == OWN) return;
    const bool atomic = touch & ATOMIC, writes = touch & (WRITE | ATOMIC);
    if (writes && space == GLOBAL)
        for (const Copy& copy : in_flight)
            if (address < (std::uintptr_t)copy.from + copy.from_source && address + size > (std::uintptr_t)copy.from)
                fail(place, copy.place, "{0}: " WHO " writes %zu bytes at address 0x%zx, which an asynchronous copy reads "
                     "that began at {1} and has not been waited for", ME, size, (std::size_t)address);
    const std::uint32_t now = stamp();
    const std::uint32_t here = (std::uint32_t)((std::uintptr_t)place - w.code) & PLACE;
    const std::uint32_t mine = here | (atomic ? ATOMIC_PLACE : 0) | (touch & ASYNC ? ASYNC_PLACE : 0);
    for (std::size_t i = 0; i < size; ++i) {
        Cell& c = cell(address + i, space);
        if (space == SHARED && stamps[std::max({c.write, c.read[0], c.read[1]})].block != w.block) c = {};
        if (c.write_place & ASYNC_PLACE)
            fail(place, (const void*)(w.code + (c.write_place & PLACE)),
                 "{0}: " WHO " %s %zu bytes at address 0x%zx, where an asynchronous copy is to arrive that began at {1} and "
                 "has not been waited for", ME, verb(touch), size, (std::size_t)address);
        // The first byte of a struct is never padding, which nobody writes; others may be.
        if (i == 0 && space == SHARED && !(touch & WRITE) && !c.write)
            fail(place, nullptr, "{0}: " WHO " %s %zu bytes of shared memory at address 0x%zx, which no thread of the block "
                 "has written", ME, verb(touch), size, (std::size_t)address);
        if (c.write && !(atomic && c.write_place & ATOMIC_PLACE) && !ordered(c.write))
            race(address, size, touch, place, c.write, c.write_place, true);
        if (writes) {
            for (int k = 0; k < 2; ++k)
                if (c.read[k] && !ordered(c.read[k]))
                    race(address, size, touch, place, c.read[k], c.read_place[k], false);
            c = {now, mine, {0, 0}, {0, 0}};
            continue;
        }
        int free = -1;
        for (int k = 0; k < 2; ++k)
            if (!c.read[k] || ordered(c.read[k])) free = k;
        if (free < 0) {
            // Whoever writes later races with one of two readers of different warps, and with one of different blocks.
            const Stamp &a = stamps[c.read[0]], &b = stamps[c.read[1]];
            if (a.block != b.block || (a.block == w.block && a.thread / 32 != b.thread / 32)) continue;
            free = 1;
        }
        c.read[free] = now;
        c.read_place[free] = here;
    }
    if (atomic) synchronise_atomic();
}

void Checks::copy_began(const Copy& copy)
{
    if (copy.from_source) in_flight.push_back(copy);
}

// The target becomes a write of the thread that waited.
void Checks::copy_arrived(const Copy& copy)
{
    for (std::size_t i = 0; i < in_flight.size(); ++i)
        if (in_flight[i].to == copy.to) {
            in_flight[i] = in_flight.back();
            in_flight.pop_back();
            break;
        }
    const std::uint32_t now = stamp(), here = (std::uint32_t)((std::uintptr_t)copy.place - w.code) & PLACE;
    for (std::size_t i = 0; i < copy.size; ++i) cell((std::uintptr_t)copy.to + i, SHARED) = {now, here, {0, 0}, {0, 0}};
}

}  // namespace emulated

using emulated::READ;
using emulated::WRITE;

// What -fsanitize=thread makes a compiler call at each access. libtsan is not linked: these are all of it.
#define HOOK(name, size, touch)                                                                 \
    __attribute__((visibility("default"))) void name(void* address)                            \
    {                                                                                          \
        emulated_touch(address, size, touch, __builtin_return_address(0));                     \
    }
#define HOOKS(size)                                       \
    HOOK(__tsan_read##size, size, READ)                   \
    HOOK(__tsan_write##size, size, WRITE)                 \
    HOOK(__tsan_unaligned_read##size, size, READ)         \
    HOOK(__tsan_unaligned_write##size, size, WRITE)

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* address, std::size_t size)
{
    emulated_touch(address, size, READ, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t size)
{
    emulated_touch(address, size, WRITE, __builtin_return_address(0));
}
// Of Clang from 15 on.
void* __tsan_memcpy(void* to, const void* from, std::size_t size)
{
    return emulated_memmove(to, from, size, __builtin_return_address(0));
}
void* __tsan_memmove(void* to, const void* from, std::size_t size)
{
    return emulated_memmove(to, from, size, __builtin_return_address(0));
}
void* __tsan_memset(void* to, int value, std::size_t size)
{
    return emulated_memset(to, value, size, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
