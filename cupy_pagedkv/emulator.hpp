// What a kernel in kernels/ sees of CUDA when a host compiler compiles it: thread and block indices, vector types,
// barriers, warp shuffles and votes. emulator.py includes this file ahead of the kernel's source and appends
// EMULATED_KERNEL(name). A kernel that needs more of CUDA finds the place to add it here.
//
// Thread blocks run one after another. Where the source has no barrier, shuffle or vote, so do the threads of a block,
// each to its end; where it has one (EMULATED_FIBERS), each thread is a fiber that a collective call suspends.

#pragma once
#include <algorithm>
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

using std::max;
using std::min;

struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

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

}  // namespace emulated

#ifdef EMULATED_FIBERS

#include <ucontext.h>

#include <vector>

namespace emulated {

constexpr std::size_t STACK_BYTES = 64 * 1024;

struct Warp {
    unsigned mask, arrived;          // of the collective that its lanes are in
    unsigned long long completed;    // collectives so far
    std::uint64_t exchanged[2][32];  // by parity of `completed`: a lane may be at the next while others still read
};

struct Fibers {
    ucontext_t scheduler;
    std::vector<ucontext_t> contexts;
    std::vector<char> stacks;
    std::vector<bool> done;
    std::vector<Warp> warps;
    unsigned current, at_barrier;
    unsigned long long barriers;
    bool progress;  // whether something happened that may let a waiting thread go on
    void (*kernel)(void* arguments);
    void* arguments;
};
static thread_local Fibers fibers;

inline void suspend() {
    const unsigned self = fibers.current;
    swapcontext(&fibers.contexts[self], &fibers.scheduler);
}

inline void fiber_main() {
    fibers.kernel(fibers.arguments);
    fibers.done[fibers.current] = fibers.progress = true;
    suspend();
}

// Runs the threads of one block, in turns, until all are done or none can go on.
inline void run_block(void (*kernel)(void*), void* arguments) {
    const unsigned n = threads_of_block();
    fibers.kernel = kernel;
    fibers.arguments = arguments;
    fibers.contexts.resize(n);
    fibers.stacks.resize(n * STACK_BYTES);
    fibers.done.assign(n, false);
    fibers.warps.assign((n + 31) / 32, Warp());
    fibers.at_barrier = 0;
    for (unsigned i = 0; i < n; ++i) {
        ucontext_t& context = fibers.contexts[i];
        getcontext(&context);
        context.uc_stack.ss_sp = &fibers.stacks[i * STACK_BYTES];
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
    }
    do {
        fibers.progress = false;
        for (unsigned i = 0; i < n && !error[0]; ++i) {
            if (fibers.done[i]) continue;
            fibers.current = i;
            become(i);
            swapcontext(&fibers.scheduler, &fibers.contexts[i]);
        }
    } while (fibers.progress && !error[0]);
    for (unsigned i = 0; i < n && !error[0]; ++i)
        if (!fibers.done[i])
            std::snprintf(error, sizeof error,
                          "thread %u of block (%u, %u, %u) waits at a barrier or collective that others never reach",
                          i, blockIdx.x, blockIdx.y, blockIdx.z);
}

// Suspends the lane until every lane of `mask` has come; returns which half of `exchanged` they used.
inline int meet(unsigned mask) {
    const unsigned lane = fibers.current % 32;
    Warp& warp = fibers.warps[fibers.current / 32];
    const unsigned long long round = warp.completed;
    if (!(mask >> lane & 1) || (warp.arrived && warp.mask != mask))
        std::snprintf(error, sizeof error, "lane %u came to a collective with mask %08x, which leaves it out or is not "
                      "the mask of the lanes already there", lane, mask);
    warp.mask = mask;
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        ++warp.completed;
        fibers.progress = true;
    }
    while (warp.completed == round || error[0]) suspend();
    return round % 2;
}

template <class T> T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Warp& warp = fibers.warps[fibers.current / 32];
    std::memcpy(&warp.exchanged[warp.completed % 2][fibers.current % 32], &value, sizeof value);
    const int half = meet(mask);
    if (source >= 0 && source < 32) std::memcpy(&value, &warp.exchanged[half][source], sizeof value);
    return value;
}

inline int lane() { return fibers.current % 32; }

}  // namespace emulated

inline void __syncthreads() {
    using emulated::fibers;
    const unsigned long long round = fibers.barriers;
    if (++fibers.at_barrier == emulated::threads_of_block()) {
        fibers.at_barrier = 0;
        ++fibers.barriers;
        fibers.progress = true;
    }
    while (fibers.barriers == round) emulated::suspend();
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
    emulated::Warp& warp = emulated::fibers.warps[emulated::fibers.current / 32];
    warp.exchanged[warp.completed % 2][emulated::lane()] = vote;
    const int half = emulated::meet(mask);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) votes |= (unsigned)warp.exchanged[half][i] << i;
    return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

#else

namespace emulated {

inline void run_block(void (*kernel)(void*), void* arguments) {
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
const char* launch(void (*)(P...), const unsigned* grid, const unsigned* block, void** arguments,
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
    blockDim = {block[0], block[1], block[2]};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z && !error[0]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y && !error[0]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x && !error[0]; ++blockIdx.x)
                run_block([](void* a) { apply((void (*)(P...))kernel, (void**)a, std::index_sequence_for<P...>()); },
                          arguments);
    return error[0] ? error : nullptr;
}

}  // namespace emulated

#define EMULATED_KERNEL(name)                                                                              \
    extern "C" const char* emulated_launch(const unsigned* grid, const unsigned* block, void** arguments,  \
                                           const std::size_t* sizes, std::size_t count) {                  \
        return emulated::launch<&name>(&name, grid, block, arguments, sizes, count);                       \
    }
