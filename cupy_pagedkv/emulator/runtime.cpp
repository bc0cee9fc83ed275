// runtime.cpp: thread blocks on host threads, threads of a block as fibers.
//
// A fiber runs until it comes to a barrier or a collective that others are missing from, and then hands over to the next
// that can go on; who comes last just goes on. A thread that never waits needs no stack of its own: the next one begins on
// the stack that it leaves. Blocks are spread over the machine's cores where nothing asks for an order of them.

#include "worker.hpp"
#include "checks.hpp"
#include "profile.hpp"
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <random>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

__thread Worker* worker;

}  // namespace emulated

// emulated_switch(from, to) keeps what a function must keep on the stack, puts the stack pointer in *from, and goes on where
// `to` was put. It needs a few instructions where swapcontext makes two system calls.
#if defined(__x86_64__) && !defined(EMULATED_UCONTEXT)
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, . - emulated_switch
)");
extern "C" void emulated_switch(void** from, void* to);

static void* prepare_stack(char* low, std::size_t size, void (*entry)())
{
    void** top = (void**)(low + size);  // a multiple of 16; a function begins 8 bytes below one
    std::memset(top - 8, 0, 8 * sizeof *top);
    top[-2] = (void*)entry;
    return top - 8;
}

#elif defined(__aarch64__) && !defined(EMULATED_UCONTEXT)
asm(R"(
.text
.type emulated_switch, %function
emulated_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulated_switch, . - emulated_switch
)");
extern "C" void emulated_switch(void** from, void* to);

static void* prepare_stack(char* low, std::size_t size, void (*entry)())
{
    void** bottom = (void**)(low + size - 160);
    std::memset(bottom, 0, 160);
    bottom[11] = (void*)entry;  // x30, where it returns to
    return bottom;
}

#else
#include <ucontext.h>

static void emulated_switch(void** from, void* to)
{
    ucontext_t here;
    *from = &here;
    swapcontext(&here, (ucontext_t*)to);
}

static void* prepare_stack(char* low, std::size_t size, void (*entry)())
{
    ucontext_t* context = (ucontext_t*)(low + size - sizeof(ucontext_t) - 64);
    getcontext(context);
    context->uc_stack.ss_sp = low;
    context->uc_stack.ss_size = (char*)context - low;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

namespace emulated {

// Stacks are kept for the next launch: a page of each is touched by almost every kernel, and most take no more.
static std::mutex stacks_mutex;
static std::vector<Stack> stacks;

static Stack take_stack()
{
    {
        const std::lock_guard<std::mutex> lock(stacks_mutex);
        if (!stacks.empty()) {
            const Stack stack = stacks.back();
            stacks.pop_back();
            return stack;
        }
    }
    void* memory = mmap(nullptr, Stack::GUARD + Stack::SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return {};
    Stack stack;
    stack.low = (char*)memory + Stack::GUARD;
    if (mprotect(stack.low, Stack::SIZE, PROT_READ | PROT_WRITE)) return {};
    return stack;
}

static void switch_to(void** from, void* to, const char* low, std::size_t size)
{
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, low, size);
    emulated_switch(from, to);
    const void* bottom;
    std::size_t bottom_size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &bottom_size);
#else
    (void)low, (void)size;
    emulated_switch(from, to);
#endif
}

static void fiber_main()
{
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    std::size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!worker->host_stack) worker->host_stack = (void*)bottom, worker->host_stack_size = size;
#endif
    for (;;) {
        Worker& w = *worker;
        w.launch.kernel->call(w.launch.arguments);
        w.returned();
        const Stack stack = w.thread().stack;
        const unsigned to = w.alive ? w.next() : 0;
        if (w.alive && !w.threads[to].sp) {
            w.threads[to].stack = stack;
            w.become(to);
            continue;
        }
        w.free_stacks.push_back(stack);  // nobody begins on it before it has been left
        void* nowhere;
        if (!w.alive) switch_to(&nowhere, w.host, (char*)w.host_stack, w.host_stack_size);
        w.become(to);
        switch_to(&nowhere, w.thread().sp, w.thread().stack.low, Stack::SIZE);
    }
}

static std::uint64_t mixed(std::uint64_t x)  // splitmix64
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

struct Found {
    std::uintptr_t code;  // an address in the library that is looked for
    char *shared_begin, *shared_end;
    std::uintptr_t base, end;
    std::vector<Region>* segments;
};

static int find_library(dl_phdr_info* info, std::size_t, void* wanted)
{
    Found& found = *(Found*)wanted;
    bool here = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        const std::uintptr_t begin = info->dlpi_addr + part.p_vaddr;
        here |= part.p_type == PT_LOAD && found.code >= begin && found.code < begin + part.p_memsz;
    }
    if (!here) return 0;
    found.base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type == PT_TLS) {
            found.shared_begin = (char*)info->dlpi_tls_data;
            found.shared_end = found.shared_begin + part.p_memsz;
        }
        const std::uintptr_t begin = info->dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD) found.end = std::max<std::uintptr_t>(found.end, begin + part.p_memsz);
        if (part.p_type == PT_LOAD && found.segments) found.segments->push_back({begin, begin + part.p_memsz, 0, 0});
    }
    return 1;
}

Worker::Worker(Launch& launch) : launch(launch)
{
    const unsigned n = launch.block[0] * launch.block[1] * launch.block[2];
    threads.resize(n);
    warps.resize((n + 31) / 32);
    order.resize(n);
    rank.resize(n);
    ready.resize((n + 63) / 64);
    blockDim = {launch.block[0], launch.block[1], launch.block[2]};
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    launch.kernel->shared();  // so that this thread has it
    dynamic = launch.kernel->dynamic();
    Found found{(std::uintptr_t)launch.kernel->call, nullptr, nullptr, 0, 0, nullptr};
    dl_iterate_phdr(find_library, &found);
    shared_begin = found.shared_begin;
    shared_end = found.shared_end;
    code = found.base;
    code_end = found.end;
    watch_faults();
}

Worker::~Worker()
{
    // A block that was abandoned has left stacks behind.
    for (Thread& thread : threads)
        if (thread.sp && !thread.done) free_stacks.push_back(thread.stack);
    const std::lock_guard<std::mutex> lock(stacks_mutex);
    stacks.insert(stacks.end(), free_stacks.begin(), free_stacks.end());
}

bool Worker::in_shared(std::uintptr_t address, std::size_t size) const
{
    if (address < (std::uintptr_t)shared_begin || address + size > (std::uintptr_t)shared_end) return false;
    const std::uintptr_t past = (std::uintptr_t)dynamic + launch.shared_bytes;  // of what this launch asked for
    return !dynamic || address + size <= past || address >= (std::uintptr_t)dynamic + DYNAMIC_SHARED;
}

bool Worker::in_arguments(std::uintptr_t address, std::size_t size) const
{
    for (std::size_t i = 0; i < launch.kernel->count; ++i) {
        const std::uintptr_t begin = (std::uintptr_t)launch.arguments[i];
        if (address >= begin && address + size <= begin + launch.kernel->sizes[i]) return true;
    }
    return false;
}

void Worker::become(unsigned thread)
{
    current = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

// The next thread in the order, behind the current one, that can go on; ~0u if none can.
unsigned Worker::take_ready()
{
    const unsigned words = (unsigned)ready.size(), here = rank[current];
    for (unsigned i = 0; i <= words; ++i) {
        const unsigned word = (here / 64 + i) % words;
        std::uint64_t bits = ready[word];
        if (i == 0) bits &= ~(~0ull >> (63 - here % 64));  // those behind it
        if (!bits) continue;
        const unsigned found = word * 64 + __builtin_ctzll(bits);
        ready[word] &= ~(1ull << found % 64);
        return order[found];
    }
    return ~0u;
}

// The thread to go on with. There is one, or the block is stuck.
unsigned Worker::next()
{
    unsigned to = take_ready();
    if (to == ~0u && release_activemask()) to = take_ready();
    if (to != ~0u) return to;
    unsigned stuck = 0;
    while (threads[stuck].waiting == NOT) ++stuck;
    become(stuck);
    fail(threads[stuck].place, nullptr,
         "{0}: thread %u of block (%u, %u, %u) waits at a barrier or collective that others never reach", stuck,
         blockIdx.x, blockIdx.y, blockIdx.z);
}

void Worker::go(unsigned to)
{
    Thread& self = thread();
    if (to == current) return;
    become(to);
    Thread& other = thread();
    if (!other.sp) {
        if (free_stacks.empty()) free_stacks.push_back(take_stack());
        other.stack = free_stacks.back();
        if (!other.stack.low) fail(nullptr, nullptr, "there is no memory for the stack of thread %u", to);
        free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(other.stack.low, Stack::SIZE);
#endif
        other.sp = prepare_stack(other.stack.low, Stack::SIZE, fiber_main);
    }
    switch_to(&self.sp, other.sp, other.stack.low, Stack::SIZE);
}

void Worker::suspend(Waiting waiting, const void* place)
{
    Thread& self = thread();
    self.waiting = waiting;
    self.place = place;
    go(next());
    self.waiting = NOT;
}

void Worker::run_block(std::uint64_t linear)
{
    block = linear;
    const std::uint64_t plane = (std::uint64_t)gridDim.x * gridDim.y;
    blockIdx = {(unsigned)(linear % gridDim.x), (unsigned)(linear / gridDim.x % gridDim.y), (unsigned)(linear / plane)};
    const unsigned n = (unsigned)threads.size();
    for (unsigned i = 0; i < n; ++i) order[i] = launch.order == BACKWARD ? n - 1 - i : i;
    if (launch.order == SHUFFLED) {
        std::uint64_t state = mixed(launch.seed ^ mixed(linear));
        for (unsigned i = n; i > 1; --i) std::swap(order[i - 1], order[(state = mixed(state)) % i]);
    }
    std::fill(ready.begin(), ready.end(), 0);
    for (Warp& warp : warps) warp.alive = 0;
    for (unsigned i = 0; i < n; ++i) {
        rank[order[i]] = i;
        ready[i / 64] |= 1ull << i % 64;
        warps[i / 32].alive |= 1u << i % 32;
        Thread& thread = threads[i];
        thread.sp = nullptr;
        thread.done = false;
        thread.barriers = thread.collectives = 0;
        thread.copies.clear();
        thread.groups.clear();
    }
    alive = n;
    // Shared memory holds what nobody can take for data: signalling NaNs in float32 and bfloat16, a NaN in float16, and
    // indices that are far away.
    const auto spoil = [](char* begin, char* end) {
        const std::uint32_t garbage = 0x7fa17fa1;
        for (; begin + 4 <= end; begin += 4) std::memcpy(begin, &garbage, 4);
    };
    spoil(shared_begin, dynamic ? dynamic : shared_end);
    if (dynamic) {
        spoil(dynamic, dynamic + launch.shared_bytes);
        spoil(dynamic + DYNAMIC_SHARED, shared_end);
    }
    if (checks) checks->begin_block();
    if (profile) profile->begin_block();
    current = order[n - 1];  // behind which the first comes
    const unsigned first = take_ready();
    if (free_stacks.empty()) free_stacks.push_back(take_stack());
    become(first);
    Thread& thread = this->thread();
    thread.stack = free_stacks.back();
    free_stacks.pop_back();
    thread.sp = prepare_stack(thread.stack.low, Stack::SIZE, fiber_main);
    switch_to(&host, thread.sp, thread.stack.low, Stack::SIZE);
    if (profile) profile->end_block();
}

// Lets the lanes of a collective go on, if all have come.
bool Worker::complete(Warp& warp, Meeting* meeting)
{
    if (meeting->mask & warp.alive & ~meeting->present) return false;
    for (Meeting*& pending : warp.pending)
        if (pending == meeting) {
            std::swap(pending, warp.pending.back());
            warp.pending.pop_back();
            break;
        }
    meeting->waiting = meeting->present;
    const unsigned first = (unsigned)(&warp - warps.data()) * 32;
    for (unsigned lanes = meeting->present; lanes; lanes &= lanes - 1) {
        const unsigned thread = first + __builtin_ctz(lanes);
        if (thread != current) set_ready(thread);
    }
    if (checks && meeting->kind == SYNC) checks->sync_warp(first / 32, meeting->present);
    return true;
}

bool Worker::complete_barrier()
{
    if (at_barrier < alive) return false;
    vote_result = vote == AND ? votes == at_barrier : vote == OR ? votes != 0 : votes;
    at_barrier = votes = 0;
    for (unsigned i = 0; i < threads.size(); ++i)
        if (threads[i].waiting == AT_BARRIER) set_ready(i);
    if (checks) checks->sync_block();
    return true;
}

// When nobody else can go on, lanes that wait at one __activemask are the active ones there.
bool Worker::release_activemask()
{
    bool any = false;
    for (unsigned i = 0; i < threads.size(); ++i) {
        if (threads[i].waiting != AT_ACTIVEMASK) continue;
        any = true;
        threads[i].active = 0;
        for (unsigned j = i / 32 * 32; j < threads.size() && j < i / 32 * 32 + 32; ++j)
            if (threads[j].waiting == AT_ACTIVEMASK && threads[j].place == threads[i].place)
                threads[i].active |= 1u << j % 32;
    }
    for (unsigned i = 0; i < threads.size(); ++i)
        if (threads[i].waiting == AT_ACTIVEMASK) set_ready(i);
    return any;
}

void Worker::leave(Thread& thread, unsigned lane)
{
    if (!thread.held) return;
    thread.held->waiting &= ~(1u << lane);
    if (!thread.held->waiting) free_meetings.push_back(thread.held);
    thread.held = nullptr;
}

void Worker::returned()
{
    Thread& self = thread();
    self.done = true;
    warp().alive &= ~(1u << current % 32);
    --alive;
    for (std::size_t i = 0; i < warp().pending.size();) i += complete(warp(), warp().pending[i]) ? 0 : 1;
    complete_barrier();
}

void Worker::abandon()
{
    void* nowhere;
    switch_to(&nowhere, host, (char*)host_stack, host_stack_size);
    std::abort();
}

static std::mutex fault_mutex;

void fail(const void* place, const void* other, const char* format, ...)
{
    Worker& w = *worker;
    {
        const std::lock_guard<std::mutex> lock(fault_mutex);
        if (!w.launch.error[0]) {
            va_list arguments;
            va_start(arguments, format);
            std::vsnprintf(w.launch.error, sizeof w.launch.error, format, arguments);
            va_end(arguments);
            const void* both[] = {place, other};
            for (int i = 0; i < 2; ++i) w.launch.places[i] = both[i] ? (std::uintptr_t)both[i] - w.code : 0;
        }
    }
    w.abandon();
}

// Number i of `count` in the order of the launch. Shuffled: a one-to-one map of the next power of two, walked until it
// leads inside.
static std::uint64_t in_order(const Launch& launch, std::uint64_t i, std::uint64_t count)
{
    if (launch.order == BACKWARD) return count - 1 - i;
    if (launch.order != SHUFFLED) return i;
    std::uint64_t mask = 1;
    while (mask < count) mask *= 2;
    --mask;
    const int half = (__builtin_popcountll(mask) + 1) / 2;
    do {
        for (std::uint64_t round = 1; round < 4; ++round) {
            const std::uint64_t key = mixed(launch.seed + round);
            i = (i * (key | 1) + (key >> 32)) & mask;
            i ^= i >> half;
        }
    } while (i >= count);
    return i;
}

static void run_share(Launch& launch, std::atomic<std::uint64_t>& next, std::uint64_t count, Worker& w, bool may_call_help)
{
    using clock = std::chrono::steady_clock;
    const auto begun = clock::now();
    std::vector<std::thread> helpers;
    std::mutex mutex;
    std::condition_variable finished;
    std::size_t num_finished = 0;
    worker = &w;
    for (std::uint64_t done = 0, i; (i = next++) < count && !launch.error[0];) {
        w.run_block(in_order(launch, i, count));
        ++done;
        if (!may_call_help || i + 1 >= count) continue;
        const double seconds = std::chrono::duration<double>(clock::now() - begun).count();
        if (seconds < 1e-4 || seconds / (double)done * (double)(count - i - 1) < 5e-4) continue;  // it would not pay
        may_call_help = false;
        for (unsigned n = 1; n < launch.host_threads && i + n < count; ++n)
            helpers.emplace_back([&] {
                Worker help(launch);
                run_share(launch, next, count, help, false);
                const std::lock_guard<std::mutex> lock(mutex);
                ++num_finished;
                finished.notify_one();
            });
    }
    worker = nullptr;
    {
        std::unique_lock<std::mutex> lock(mutex);
        while (!finished.wait_for(lock, std::chrono::milliseconds(50), [&] { return num_finished == helpers.size(); }))
            if (launch.error[0])
                for (std::thread& helper : helpers) Interruptible::interrupt(launch, helper);
    }
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace emulated

using namespace emulated;

extern "C" {

// Runs the grid. What went wrong stands in launch->error.
__attribute__((visibility("default"))) void emulated_launch(Launch* launch, Report* report)
{
    const std::uint64_t count = (std::uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
    Worker w(*launch);
    std::vector<Region> segments;
    Found found{(std::uintptr_t)launch->kernel->call, nullptr, nullptr, 0, 0, &segments};
    dl_iterate_phdr(find_library, &found);
    const Interruptible interruptible(*launch);
    std::unique_ptr<Checks> checks(launch->checks ? new Checks(w, segments) : nullptr);
    std::unique_ptr<Profile> profile(launch->profiles ? new Profile(w) : nullptr);
    w.checks = checks.get();
    w.profile = profile.get();
    std::atomic<std::uint64_t> next{0};
    run_share(*launch, next, count, w, launch->order == ANY && !checks && !profile && launch->host_threads > 1);
    if (profile) profile->report(*report);
}

int emulated_barrier(Vote vote, int predicate, unsigned line)
{
    const void* place = __builtin_return_address(0);
    Worker& w = *worker;
    w.stop_if_failed();
    ++w.thread().barriers;
    if (w.profile) w.profile->used();
    if (!w.at_barrier)
        w.barrier_line = line, w.barrier_place = place, w.vote = vote;
    else if (w.vote != vote || (w.checks && w.barrier_line != line))
        fail(place, w.barrier_place,
             "{0}: thread (%u, %u, %u) of block (%u, %u, %u) is at this barrier while others are at that of {1}; all "
             "threads of a block must come to the same one", threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x,
             blockIdx.y, blockIdx.z);
    ++w.at_barrier;
    w.votes += predicate != 0;
    if (!w.complete_barrier()) w.suspend(AT_BARRIER, place);
    return (int)w.vote_result;
}

const Meeting* emulated_meet(Kind kind, unsigned mask, const void* brought, std::size_t size, unsigned line,
                             const void* place)
{
    if (!place) place = __builtin_return_address(0);
    Worker& w = *worker;
    w.stop_if_failed();
    Thread& self = w.thread();
    Warp& warp = w.warp();
    const unsigned lane = w.current % 32;
    ++self.collectives;
    if (w.profile) w.profile->used();
    w.leave(self, lane);
    if (!(mask >> lane & 1))
        fail(place, nullptr, "{0}: lane %u came to a collective with mask %08x, which leaves it out; thread (%u, %u, %u) "
             "of block (%u, %u, %u)", lane, mask, threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y,
             blockIdx.z);
    Meeting* meeting = nullptr;
    for (Meeting* pending : warp.pending) {
        const bool same = pending->mask == mask;
        if (same && pending->kind == kind && (kind != ALIGNED || pending->line == line)) {
            meeting = pending;
            break;
        }
        // Other masks may overlap, as long as nobody here waits for somebody who waits for this lane.
        if (same || (pending->present & mask && pending->mask >> lane & 1))
            fail(place, pending->place,
                 "{0}: lane %u came to a collective with mask %08x, while lanes %08x are at that of {1} with mask %08x; all "
                 "lanes of a mask must come to the same one; thread (%u, %u, %u) of block (%u, %u, %u)", lane, mask,
                 pending->present, pending->mask, threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y,
                 blockIdx.z);
    }
    if (!meeting) {
        if (w.free_meetings.empty()) {
            w.meetings.emplace_back(new Meeting);
            w.free_meetings.push_back(w.meetings.back().get());
        }
        meeting = w.free_meetings.back();
        w.free_meetings.pop_back();
        meeting->mask = mask;
        meeting->present = 0;
        meeting->kind = kind;
        meeting->line = line;
        meeting->place = place;
        warp.pending.push_back(meeting);
    }
    if (size) std::memcpy(meeting->brought[lane], brought, size);
    meeting->present |= 1u << lane;
    if (!w.complete(warp, meeting)) w.suspend(IN_MEETING, place);
    self.held = meeting;
    if (kind == ALIGNED && meeting->present != ~0u)
        fail(place, nullptr, "{0}: thread (%u, %u, %u) of block (%u, %u, %u) is at an instruction that needs all 32 lanes of "
             "its warp, and lanes %08x are there", threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
             meeting->present);
    return meeting;
}

unsigned emulated_activemask()
{
    Worker& w = *worker;
    w.suspend(AT_ACTIVEMASK, __builtin_return_address(0));
    return w.thread().active;
}

unsigned emulated_lane() { return worker->current % 32; }

void emulated_fence(Fence fence)
{
    if (worker->checks) worker->checks->fence(fence);
}

void emulated_touch(const volatile void* address, std::size_t size, int touch, const void* place)
{
    Worker* w = worker;
    if (!w) return;
    w->stop_if_failed();
    if (w->checks) w->checks->touch((std::uintptr_t)address, size, touch, place);
    if (w->profile) w->profile->touch((std::uintptr_t)address, size, touch, place);
}

// The compiler instruments loads and stores, not what happens inside the C library.
void* emulated_memmove(void* to, const void* from, std::size_t size, const void* place)
{
    if (!place) place = __builtin_return_address(0);
    emulated_touch(from, size, READ, place);
    emulated_touch(to, size, WRITE, place);
    return std::memmove(to, from, size);
}

void* emulated_memset(void* to, int value, std::size_t size, const void* place)
{
    emulated_touch(to, size, WRITE, place ? place : __builtin_return_address(0));
    return std::memset(to, value, size);
}

// The bytes of an asynchronous copy arrive when they are waited for, not before.
void emulated_cp_async(void* shared, const void* global, unsigned size, unsigned from_source)
{
    const void* place = __builtin_return_address(0);
    Worker& w = *worker;
    const std::uintptr_t misaligned = ((std::uintptr_t)shared | (from_source ? (std::uintptr_t)global : 0)) % size;
    if (misaligned || from_source > size || !w.in_shared((std::uintptr_t)shared, size))
        fail(place, nullptr, "{0}: thread (%u, %u, %u) of block (%u, %u, %u) copies %u bytes asynchronously from %p to %p, "
             "which must both be multiples of %u, and the latter shared memory, and asks for %u from the source", threadIdx.x,
             threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z, size, global, shared, size, from_source);
    if (w.checks && from_source) w.checks->touch((std::uintptr_t)global, from_source, READ, place);
    if (w.profile) {
        if (from_source) w.profile->touch((std::uintptr_t)global, from_source, READ | ASYNC, place);
        w.profile->touch((std::uintptr_t)shared, size, WRITE | ASYNC, place);
    }
    if (w.checks) w.checks->touch((std::uintptr_t)shared, size, WRITE | ASYNC, place);
    w.thread().copies.push_back({(char*)shared, (const char*)global, size, from_source, place});
    if (w.checks) w.checks->copy_began(w.thread().copies.back());
}

void emulated_cp_async_commit() { worker->thread().groups.push_back(worker->thread().copies.size()); }

void emulated_cp_async_wait(unsigned groups_left)
{
    Worker& w = *worker;
    Thread& self = w.thread();
    // ~0u: also what was never committed.
    std::size_t arriving = 0, groups = 0;
    if (groups_left == ~0u)
        arriving = self.copies.size(), groups = self.groups.size();
    else if (self.groups.size() > groups_left)
        groups = self.groups.size() - groups_left, arriving = self.groups[groups - 1];
    for (std::size_t i = 0; i < arriving; ++i) {
        const Copy& copy = self.copies[i];
        if (w.checks) w.checks->copy_arrived(copy);
        std::memcpy(copy.to, copy.from, copy.from_source);
        std::memset(copy.to + copy.from_source, 0, copy.size - copy.from_source);
        if (w.profile) w.profile->arrived(copy);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + (std::ptrdiff_t)arriving);
    self.groups.erase(self.groups.begin(), self.groups.begin() + (std::ptrdiff_t)groups);
    for (std::size_t& group : self.groups) group -= arriving;
}

void emulated_trap(const char* why, const void* place)
{
    if (!place) place = __builtin_return_address(0);
    fail(place, nullptr, "{0}: thread (%u, %u, %u) of block (%u, %u, %u) stops the launch: %s", threadIdx.x, threadIdx.y,
         threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z, why);
}

void emulated_unaligned_atomic(const void* address, std::size_t size, const void* place)
{
    fail(place, nullptr, "{0}: thread (%u, %u, %u) of block (%u, %u, %u) atomically changes %zu bytes at address %p, which is "
         "not a multiple of %zu", threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z, size, address,
         size);
}

void emulated_matrix_row(const void* row, const void* place)
{
    if ((std::uintptr_t)row % 16 || !worker->in_shared((std::uintptr_t)row, 16))
        fail(place, nullptr, "{0}: thread (%u, %u, %u) of block (%u, %u, %u) gives ldmatrix a row of 16 bytes at address %p, "
             "which is not a multiple of 16 in shared memory", threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y,
             blockIdx.z, row);
    emulated_touch(row, 16, READ | MATRIX, place);
}

// What the compiler passes of an access: its beginning, as GCC's and Clang's runtime libraries declare it
// (compiler-rt/lib/ubsan/ubsan_handlers.h, TypeMismatchData).
struct CheckedType {
    std::uint16_t kind, info;
    char name[];
};
struct CheckedAccess {
    const char* file;
    std::uint32_t line, column;
    const CheckedType* type;
    unsigned char log_alignment, kind;
};

[[noreturn]] void emulated_misaligned(CheckedAccess* access, std::uintptr_t address)
{
    const char* verbs[] = {"reads", "writes"};
    fail(nullptr, nullptr, "%s:%u: thread (%u, %u, %u) of block (%u, %u, %u) %s %s at address 0x%zx, which is not a "
         "multiple of %u", access->file, access->line, threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y,
         blockIdx.z, access->kind < 2 ? verbs[access->kind] : "accesses", access->type->name, (std::size_t)address,
         1u << access->log_alignment);
}

}  // extern "C"
