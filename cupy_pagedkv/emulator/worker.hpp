// worker.hpp: a launch, and the host threads that run its blocks; seen by the library only.

#pragma once
#include "runtime.hpp"
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace emulated {

// The memory of one array of the launch: of whatever it is a slice of, and of itself.
struct Region {
    std::uintptr_t begin, end, view_begin, view_end;
};

enum Order { ANY, FORWARD, BACKWARD, SHUFFLED };  // of threads in a block and of blocks; ANY: blocks side by side

// A launch as kernel.py asks for it. The two structs have to agree.
struct Launch {
    const Kernel* kernel;
    void** arguments;
    unsigned grid[3], block[3];
    std::size_t shared_bytes;  // of `extern __shared__` arrays
    std::uint64_t seed;
    std::uint32_t order, host_threads, checks, profiles;
    const Region* regions;
    std::size_t num_regions;
    // What went wrong first: {0} and {1} in the text stand for places, offsets in the kernel's library.
    char error[1024];
    std::uintptr_t places[2];
};

struct Copy {  // asynchronous, of the thread that asked for it
    char* to;
    const char* from;
    unsigned size, from_source;
    const void* place;
};

enum Waiting { NOT, AT_BARRIER, IN_MEETING, AT_ACTIVEMASK };

struct Stack {
    char* low = nullptr;
    static constexpr std::size_t SIZE = 128 * 1024;
    static constexpr std::size_t GUARD = 512 * 1024;  // below it: as much as a thread's variables can take on any device
    bool holds(std::uintptr_t address, std::size_t size) const
    {
        return address >= (std::uintptr_t)low && address + size <= (std::uintptr_t)low + SIZE;
    }
};

struct Thread {
    void* sp = nullptr;  // where it is suspended; null before it has begun
    Stack stack;
    bool done = false;
    Waiting waiting = NOT;
    Meeting* held = nullptr;      // the last collective, of which it may still read
    const void* place = nullptr;  // of what it waits for
    unsigned active = 0;  // what __activemask returns
    unsigned barriers = 0, collectives = 0;
    std::vector<Copy> copies;      // asked for and not waited for, in groups
    std::vector<std::size_t> groups;  // how many copies had been asked for at each commit
};

struct Warp {
    unsigned alive = 0;  // lanes that exist and have not returned: the others count as arrived
    std::vector<Meeting*> pending;
};

class Checks;
class Profile;

// One host thread's share of a launch.
struct Worker {
    Launch& launch;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned> order;       // rank of a thread -> its number
    std::vector<unsigned> rank;        // and back
    std::vector<std::uint64_t> ready;  // bits by rank
    std::vector<Stack> free_stacks;
    std::vector<std::unique_ptr<Meeting>> meetings;
    std::vector<Meeting*> free_meetings;
    void* host = nullptr;  // stack pointer of who runs the blocks
    void* host_stack = nullptr;
    std::size_t host_stack_size = 0;
    unsigned current = 0;  // thread
    std::uint64_t block = 0;
    unsigned alive = 0, at_barrier = 0, votes = 0, vote_result = 0, barrier_line = 0;
    Vote vote = NO_VOTE;
    const void* barrier_place = nullptr;
    char* shared_begin = nullptr;
    char* shared_end = nullptr;
    char* dynamic = nullptr;
    std::uintptr_t code = 0, code_end = 0;  // where the kernel's library was loaded
    Checks* checks = nullptr;
    Profile* profile = nullptr;

    explicit Worker(Launch& launch);
    ~Worker();
    void run_block(std::uint64_t linear);
    Thread& thread() { return threads[current]; }
    Warp& warp() { return warps[current / 32]; }
    bool in_shared(std::uintptr_t address, std::size_t size) const;
    bool in_arguments(std::uintptr_t address, std::size_t size) const;

    void become(unsigned thread);
    void set_ready(unsigned thread) { ready[rank[thread] / 64] |= 1ull << rank[thread] % 64; }
    unsigned take_ready();
    unsigned next();
    void go(unsigned thread);
    void suspend(Waiting waiting, const void* place);
    bool complete(Warp& warp, Meeting* meeting);
    bool complete_barrier();
    bool release_activemask();
    void leave(Thread& thread, unsigned lane);
    void returned();
    [[noreturn]] void abandon();
    void stop_if_failed()
    {
        if (*(volatile char*)launch.error) abandon();
    }
};

extern __thread Worker* worker __attribute__((tls_model("initial-exec")));

// Ends the launch with an error. `format` is printf's, and begins with {0} where `place` is known.
[[noreturn]] void fail(const void* place, const void* other, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// signals.cpp: what the operating system says of a kernel.

void watch_faults();  // in this host thread, for ever: accesses of kernels to no memory are errors

// As long as it lives, an interrupt (Ctrl-C) ends the launch, if Python's main thread, which is told of it, called it.
class Interruptible {
public:
    explicit Interruptible(Launch& launch);
    ~Interruptible();
    static void interrupt(const Launch& launch, std::thread& helper);  // which runs blocks that need not end
};

}  // namespace emulated
