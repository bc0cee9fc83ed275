// What a kernel in kernels/ sees of CUDA when a host compiler compiles it: thread and block indices, vector types,
// barriers, warp shuffles and votes. emulator.py includes this file ahead of the kernel's source and appends
// EMULATED_KERNEL(name). A kernel that needs more of CUDA finds the place to add it here.
//
// A misaligned access, which a GPU refuses, ends the launch with an error: the compiler checks each access
// (-fsanitize=alignment, at compile time only; no library of its is linked) and calls a function that stands here.
//
// Thread blocks run one after another. Where the source has no barrier, shuffle or vote, so do the threads of a block,
// each to its end; where it has one (EMULATED_FIBERS), each thread is a fiber that a collective call suspends.

#pragma once
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a host thread runs one block at a time

struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T __ldg(const T* p) { return *p; }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace emulated {

static thread_local char error[256];  // the first thing that went wrong in this launch

// Sets threadIdx of the i-th thread of a block, x fastest.
inline void become(unsigned i) {
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
}

inline unsigned threads_of_block() { return blockDim.x * blockDim.y * blockDim.z; }

[[noreturn]] inline void stop();  // the thread that runs, and with it the launch, whose error has been set

}  // namespace emulated

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

extern "C" __attribute__((used, visibility("hidden"), noreturn)) void __ubsan_handle_type_mismatch_v1_abort(
    CheckedAccess* access, std::uintptr_t address)
{
    std::snprintf(emulated::error, sizeof emulated::error,
                  "%s:%u: thread (%u, %u, %u) of block (%u, %u, %u) accesses %s at address 0x%zx, which is not a "
                  "multiple of %u", access->file, access->line, threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x,
                  blockIdx.y, blockIdx.z, access->type->name, (std::size_t)address, 1u << access->log_alignment);
    emulated::stop();
}

#ifdef EMULATED_FIBERS

#include <ucontext.h>

namespace emulated {

struct Fiber {
    ucontext_t context;
    bool done;
    alignas(16) char stack[64 * 1024];
};

struct Warp {
    unsigned alive;                  // lanes that exist and have not returned: the others count as arrived
    unsigned mask, arrived;          // of the collective that its lanes are in
    unsigned long long completed;    // collectives so far
    // By parity of `completed`, since a lane may be at the next collective while others still read:
    unsigned present[2];             // the lanes that took part
    std::uint64_t exchanged[2][32];  // what each of them brought
};

// The block that runs.
static thread_local struct {
    ucontext_t scheduler;
    Fiber* fibers;
    Warp* warps;
    unsigned current;               // thread
    unsigned alive, at_barrier;     // threads that have not returned, and that wait in __syncthreads
    unsigned long long barriers;    // completed so far
    bool progress;                  // whether something happened that may let a waiting thread go on
    void (*kernel)(void* arguments);
    void* arguments;
} block;

inline void suspend() { swapcontext(&block.fibers[block.current].context, &block.scheduler); }

inline void stop() {
    for (;;) suspend();  // after an error, no thread is run again
}

// Lets the lanes of a collective go on, if all have come.
inline void complete(Warp& warp) {
    if (!warp.arrived || (warp.mask & warp.alive) & ~warp.arrived) return;
    warp.present[warp.completed % 2] = warp.arrived;
    warp.arrived = 0;
    ++warp.completed;
    block.progress = true;
}

// The same for the threads of a barrier.
inline void complete_barrier() {
    if (!block.at_barrier || block.at_barrier < block.alive) return;
    block.at_barrier = 0;
    ++block.barriers;
    block.progress = true;
}

inline void fiber_main() {
    block.kernel(block.arguments);
    block.fibers[block.current].done = block.progress = true;
    Warp& warp = block.warps[block.current / 32];
    warp.alive &= ~(1u << block.current % 32);
    --block.alive;
    complete(warp);
    complete_barrier();
    suspend();
}

// Runs the threads of the block in turns, until all are done or none can go on.
inline void run_block(void (*kernel)(void*), void* arguments) {
    const unsigned n = threads_of_block();
    block.kernel = kernel;
    block.arguments = arguments;
    block.alive = n;
    block.at_barrier = 0;
    std::memset(block.warps, 0, (n + 31) / 32 * sizeof(Warp));
    for (unsigned i = 0; i < n; ++i) {
        block.warps[i / 32].alive |= 1u << i % 32;
        Fiber& fiber = block.fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = sizeof fiber.stack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    do {
        block.progress = false;
        for (unsigned i = 0; i < n && !error[0]; ++i) {
            if (block.fibers[i].done) continue;
            block.current = i;
            become(i);
            swapcontext(&block.scheduler, &block.fibers[i].context);
        }
    } while (block.progress && !error[0]);
    for (unsigned i = 0; i < n && !error[0]; ++i)
        if (!block.fibers[i].done)
            std::snprintf(error, sizeof error,
                          "thread %u of block (%u, %u, %u) waits at a barrier or collective that others never reach",
                          i, blockIdx.x, blockIdx.y, blockIdx.z);
}

struct Memory {
    Memory() {
        block.fibers = new Fiber[threads_of_block()];
        block.warps = new Warp[(threads_of_block() + 31) / 32];
    }
    ~Memory() {
        delete[] block.fibers;
        delete[] block.warps;
    }
};

// Suspends the lane until every lane of `mask` has come; returns which half of `exchanged` they used.
inline int meet(unsigned mask) {
    const unsigned lane = block.current % 32;
    Warp& warp = block.warps[block.current / 32];
    const unsigned long long round = warp.completed;
    if (!(mask >> lane & 1) || (warp.arrived && warp.mask != mask))
        std::snprintf(error, sizeof error, "lane %u came to a collective with mask %08x, which leaves it out or is not "
                      "the mask of the lanes already there", lane, mask);
    warp.mask = mask;
    warp.arrived |= 1u << lane;
    complete(warp);
    while (warp.completed == round || error[0]) suspend();
    return round % 2;
}

template <class T> T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Warp& warp = block.warps[block.current / 32];
    std::memcpy(&warp.exchanged[warp.completed % 2][block.current % 32], &value, sizeof value);
    const int half = meet(mask);
    if (source >= 0 && source < 32) std::memcpy(&value, &warp.exchanged[half][source], sizeof value);
    return value;
}

inline int lane() { return block.current % 32; }

}  // namespace emulated

inline void __syncthreads() {
    using emulated::block;
    const unsigned long long round = block.barriers;
    ++block.at_barrier;
    emulated::complete_barrier();
    while (block.barriers == round) emulated::suspend();
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::meet(mask); }

template <class T> T __shfl_sync(unsigned mask, T value, int source) {
    return emulated::exchange(mask, value, source & 31);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    return emulated::exchange(mask, value, emulated::lane() - (int)delta);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    return emulated::exchange(mask, value, emulated::lane() + (int)delta);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return emulated::exchange(mask, value, emulated::lane() ^ lanes);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
    emulated::Warp& warp = emulated::block.warps[emulated::block.current / 32];
    warp.exchanged[warp.completed % 2][emulated::lane()] = vote;
    const int half = emulated::meet(mask);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
        if (warp.present[half] >> i & 1) votes |= (unsigned)warp.exchanged[half][i] << i;
    return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

#else

namespace emulated {

struct Memory {};

static thread_local std::jmp_buf stopped;

inline void stop() { std::longjmp(stopped, 1); }

inline void run_block(void (*kernel)(void*), void* arguments) {
    if (setjmp(stopped)) return;
    for (unsigned i = 0; i < threads_of_block(); ++i) {
        become(i);
        kernel(arguments);
    }
}

}  // namespace emulated

#endif

namespace emulated {

template <class... P, std::size_t... I>
void apply(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_cv_t<P>*)arguments[I]...);
}

// Runs the grid. The arguments come by address, as cuLaunchKernel takes them, which trusts that each has the size of
// its parameter; here a wrong count or size is said instead of read.
template <auto kernel, class... P>
const char* launch(void (*)(P...), const unsigned* grid, const unsigned* threads, void** arguments,
                   const std::size_t* sizes, std::size_t count) {
    const std::size_t expected[] = {sizeof(P)..., 0};
    error[0] = 0;
    if (count != sizeof...(P))
        std::snprintf(error, sizeof error, "the kernel takes %zu arguments and got %zu", sizeof...(P), count);
    for (std::size_t i = 0; i < count && !error[0]; ++i)
        if (sizes[i] != expected[i])
            std::snprintf(error, sizeof error, "argument %zu has %zu bytes, but its parameter takes %zu", i, sizes[i],
                          expected[i]);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads[0], threads[1], threads[2]};
    [[maybe_unused]] const Memory memory;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z && !error[0]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y && !error[0]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x && !error[0]; ++blockIdx.x)
                run_block([](void* a) { apply((void (*)(P...))kernel, (void**)a, std::index_sequence_for<P...>()); },
                          arguments);
    return error[0] ? error : nullptr;
}

}  // namespace emulated

#define EMULATED_KERNEL(name)                                                                               \
    extern "C" const char* emulated_launch(const unsigned* grid, const unsigned* threads, void** arguments, \
                                           const std::size_t* sizes, std::size_t count) {                   \
        return emulated::launch<&name>(&name, grid, threads, arguments, sizes, count);                      \
    }
