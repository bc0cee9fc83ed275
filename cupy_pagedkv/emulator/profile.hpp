// profile.hpp: what a launch moves, request by request.

#pragma once
#include "worker.hpp"
#include <unordered_map>

namespace emulated {

// Counts of the requests that were made from one place to one array; a request is what the lanes of a warp touch at the
// same place in the same pass, of one array.
struct Row {
    std::uint64_t place;                // offset in the kernel's library
    std::int64_t array;                 // argument, or -1: shared memory, -2: a variable of the device
    std::uint64_t touch;                // emulated::Touch
    std::uint64_t requests, bytes, sectors;  // of global memory: bytes that any lane asked for; sectors of 32 bytes
    std::uint64_t wavefronts, least;    // of shared memory: passes that the banks take, and that so many bytes need
};

// How often the bytes of an array were touched by requests.
struct Bytes {
    std::int64_t array;
    std::uint64_t touch, once, more, most;
};

struct Report {
    std::uint64_t num_rows, num_bytes;
    const Row* rows;
    const Bytes* bytes;
    std::uint64_t collectives, barriers;  // of all threads
    std::uint64_t in_flight;  // the most bytes that a block's threads have asked global memory for and not used
};

class Profile {
public:
    explicit Profile(Worker& worker) : w(worker) {}
    void begin_block();
    void end_block();
    void touch(std::uintptr_t address, std::size_t size, int touch, const void* place);
    void used();                     // the running thread comes to a point that needs what it loaded
    void arrived(const Copy& copy);  // the bytes of a copy are no longer in flight
    void report(Report& report);

private:
    struct Event {
        std::uint32_t place, pass;
        std::uintptr_t address;
        std::uint32_t size;
        std::int16_t array;
        std::uint8_t lane, touch;
    };
    struct InFlight {
        std::uint64_t loaded, copying, most;
    };
    static constexpr std::size_t PAGE = 4096;
    struct Counts {
        std::uint16_t times[2][PAGE];  // read, written
    };

    Worker& w;
    std::vector<std::vector<Event>> events;                                 // of each warp of the block
    std::vector<std::unordered_map<std::uint32_t, std::uint32_t>> passes;  // of each thread: place -> how often
    std::vector<InFlight> in_flight;
    std::unordered_map<std::uint64_t, std::size_t> index;
    std::vector<Row> rows;
    std::vector<Bytes> bytes;
    std::unordered_map<std::uintptr_t, std::unique_ptr<Counts>> pages;
    std::uint64_t collectives = 0, barriers = 0, most_in_flight = 0;

    long array_of(std::uintptr_t address) const;
    void request(const Event* begin, const Event* end);
};

}  // namespace emulated
