// checks.hpp: who touched which byte last, and whether whoever touches it now may.

#pragma once
#include "worker.hpp"
#include <unordered_map>

namespace emulated {

// The last accesses to a byte. A place is an offset in the kernel's library, with ATOMIC_PLACE for atomic accesses.
struct Cell {
    std::uint32_t write, write_place;     // stamps are indices into Checks::stamps; 0 is none
    std::uint32_t read[2], read_place[2];  // two reads of which neither is ordered before the other, of two warps if need be
};

// When an access happened: accesses of one thread between two points of synchronisation have the same.
struct Stamp {
    std::uint64_t block;
    std::uint32_t thread, barriers, clock;
};

class Checks {
public:
    Checks(Worker& worker, const std::vector<Region>& segments);
    void begin_block();
    void touch(std::uintptr_t address, std::size_t size, int touch, const void* place);
    void sync_warp(unsigned warp, unsigned lanes);
    void sync_block();
    void fence(Fence fence);
    void copy_began(const Copy& copy);
    void copy_arrived(const Copy& copy);

private:
    enum Space { OWN, SHARED, GLOBAL };
    static constexpr std::uint32_t ATOMIC_PLACE = 1u << 31, ASYNC_PLACE = 1u << 30, PLACE = ASYNC_PLACE - 1;
    static constexpr std::size_t PAGE = 4096;

    // What one thread made known to others: by a fence and an atomic access behind it, all up to there.
    struct Release {
        std::uint64_t block, time;
        std::uint32_t thread, barriers, stamps, own_stamps;
        Fence fence;
    };
    struct Acquire {
        std::uint64_t time;
        std::uint32_t thread, barriers;
    };

    Worker& w;
    std::vector<Region> arrays, segments;
    std::vector<Stamp> stamps;
    std::vector<std::uint32_t> stamp_of;              // of each thread of the block, now; 0: none yet
    std::vector<std::vector<std::uint32_t>> clocks;   // of each warp: [lane][other] how far the lane knows the other
    std::uint32_t barriers = 0;                       // of the launch so far
    std::vector<Cell> shared;
    std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages;
    std::uintptr_t last_page = 0;  // where nothing lies
    Cell* last_cells = nullptr;
    std::vector<Copy> in_flight;
    struct Fenced {
        Fence fence;
        std::uint32_t stamps;  // its own accesses with earlier stamps lie before it
    };
    std::vector<Fenced> fenced;  // each thread's widest fence so far, and its last
    std::vector<Release> releases;
    std::vector<Acquire> acquires;
    std::uint64_t time = 0;

    Space space_of(std::uintptr_t address, std::size_t size, int touch, const void* place);
    Cell& cell(std::uintptr_t address, Space space);
    std::uint32_t stamp();
    bool ordered(std::uint32_t earlier) const;
    void synchronise_atomic();
    [[noreturn]] void race(std::uintptr_t address, std::size_t size, int touch, const void* place, std::uint32_t other,
                           std::uint32_t other_place, bool other_wrote);
};

}  // namespace emulated
