// runtime.hpp: what a compiled kernel and the library that runs it (runtime.cpp, checks.cpp, profile.cpp) ask of each other.

#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Where the running thread stands. A host thread runs one thread of one block at a time.
#define EMULATED_INDEX extern __thread uint3 __attribute__((tls_model("initial-exec")))
EMULATED_INDEX threadIdx;
EMULATED_INDEX blockIdx;
EMULATED_INDEX blockDim;
EMULATED_INDEX gridDim;

namespace emulated {

constexpr std::size_t DYNAMIC_SHARED = 227 * 1024;  // the most that any device gives a block
constexpr int BROUGHT = 32;                         // bytes that a lane can bring to a collective

// What a kernel's library says of its kernel.
struct Kernel {
    void (*call)(void** arguments);  // they come by address, as cuLaunchKernel takes them
    std::size_t count;
    const std::size_t* sizes;
    char* (*shared)();   // any address in this host thread's shared memory of the kernel
    char* (*dynamic)();  // where `extern __shared__` arrays begin, or null where the kernel has none
};

// What all lanes of a collective brought; valid until the lane comes to its next one.
struct Meeting {
    unsigned mask;     // the lanes that were asked to come
    unsigned present;  // those that did: the others had returned, or never were
    unsigned waiting;  // bits of lanes that have not left yet
    int kind;
    unsigned line;
    const void* place;
    alignas(16) unsigned char brought[32][BROUGHT];
};

enum Kind { SYNC, SHUFFLE, VOTE, MATCH, REDUCE, ALIGNED };  // of collectives; ALIGNED: all lanes at the same instruction
enum Vote { NO_VOTE, COUNT, AND, OR };                       // of barriers
enum Fence { NO_FENCE, OF_BLOCK, OF_DEVICE };               // how far it reaches
enum Touch { READ = 0, WRITE = 1, ATOMIC = 2, MATRIX = 4, ASYNC = 8 };  // of an access

}  // namespace emulated

// The library's functions. Where no place is given, it is the address that they return to.
extern "C" {
int emulated_barrier(emulated::Vote vote, int predicate, unsigned line);
const emulated::Meeting* emulated_meet(emulated::Kind kind, unsigned mask, const void* brought, std::size_t size,
                                       unsigned line, const void* place = nullptr);
unsigned emulated_activemask();
unsigned emulated_lane();
void emulated_fence(emulated::Fence fence);
void emulated_touch(const volatile void* address, std::size_t size, int touch, const void* place);
void* emulated_memmove(void* to, const void* from, std::size_t size, const void* place = nullptr);
void* emulated_memset(void* to, int value, std::size_t size, const void* place = nullptr);
void emulated_cp_async(void* shared, const void* global, unsigned size, unsigned from_source);
void emulated_cp_async_commit();
void emulated_cp_async_wait(unsigned groups_left);
[[noreturn]] void emulated_trap(const char* why, const void* place = nullptr);
[[noreturn]] void emulated_unaligned_atomic(const void* address, std::size_t size, const void* place);
void emulated_matrix_row(const void* row, const void* place);
}

// The instrument does not look into this function.
#define EMULATED_UNSEEN __attribute__((no_sanitize("thread")))
// Nor into this, which the kernel's own lines call: its return address is the place in the kernel ...
#define EMULATED_CALLED EMULATED_UNSEEN __attribute__((noinline))
// ... because what stands between becomes a part of the kernel.
#define EMULATED_INLINE inline __attribute__((always_inline))
