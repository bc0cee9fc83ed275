// gather_cache: copy the K and V of sequences out of the paged pools, packed, in logical order.
//
// Contract   Positions [seq_starts[i], seq_lens[i]) of sequence i, for i = 0, 1, ... in turn, become the rows of key and
//            value. Position p is k_cache[block_tables[i][p / BLOCK_SIZE]][p % BLOCK_SIZE]; table entries past a
//            sequence's need are not read. Rows past the total are left alone, rows past num_rows are dropped. A row
//            whose block is not in the pool is zeros: nothing outside the pool is ever read. seq_starts may be null:
//            all sequences start at 0. A start or length outside the table counts as its nearest end.
// Layout     All strides are in bytes; a row is HEADS x RUNS x RUN accesses, as in reshape_and_cache.cu.
// Launch     Grid (x, 2, layers): y = 0 copies K, y = 1 copies V; the tables are the same for every layer. Blocks of whole
//            warps, four at most. A segment is the part of one block that one sequence needs, a slice 32 * UNROLL accesses
//            of it; a warp copies as many slices in turn as make all warps together enough, so x may be anything, and
//            the host need not know the lengths.
// Defined by the launch code: TABLE_T, LENS_T, STARTS_T, ACCESS_T, UNROLL, BLOCK_SIZE, K_HEADS, K_RUNS, K_RUN,
//            V_HEADS, V_RUNS, V_RUN.
//
// The lengths are summed here, once by each thread block, so that a captured CUDA graph can replay with new ones and needs
// no scratch memory: each thread sums a share of the sequences, a scan makes of that how many segments and rows lie before
// each share, and a warp looks up where its first slice lies. From there it walks. The fewer blocks are launched, the less
// is read twice; the more, the better they fill the device to the end: on an H100 the same 32,768 tokens took 103.5 µs in as
// many blocks as it holds at once, and 97.9 by a slice a warp, where a copy takes 94.1.
//
// Four blocks a multiprocessor (the second launch bound) leave a thread 128 registers. With five, rows of 15 accesses of
// 16 bytes in blocks of three slots spilled for sm_90.
// Without it ptxas aims at ten and spills for sm_80 and sm_90.

#include "rows.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int MAX_THREADS = 128;  // of a block

// The positions that one sequence contributes, and the blocks they lie in.
struct Extent {
    long long start, end, first_block, num_blocks;
};

__device__ __forceinline__ Extent extent_of(
    long long seq, const char* seq_lens, long long lens_stride, const char* seq_starts, long long starts_stride,
    long long max_blocks)
{
    const long long start = seq_starts ? (long long)*(const STARTS_T*)(seq_starts + seq * starts_stride) : 0;
    const long long end = *(const LENS_T*)(seq_lens + seq * lens_stride);
    Extent e;
    e.start = max(start, 0LL);
    e.end = max(e.start, min(end, max_blocks * BLOCK_SIZE));  // so that no sum of garbage can overflow
    e.first_block = e.start / BLOCK_SIZE;
    e.num_blocks = e.end > e.start ? (e.end - 1) / BLOCK_SIZE - e.first_block + 1 : 0;
    return e;
}

// `tokens` rows from `row` on: those of a block's places from `offset` on.
struct Segment {
    long long row;
    int offset, tokens;
};

// All that says which positions are wanted.
struct Lengths {
    const char *seq_lens, *seq_starts;
    long long lens_stride, starts_stride, max_blocks, num_seqs, num_rows;

    __device__ __forceinline__ Extent operator[](long long seq) const
    {
        return extent_of(seq, seq_lens, lens_stride, seq_starts, starts_stride, max_blocks);
    }
};

// How many segments and rows lie before the share of each thread; behind them the sums of all.
struct Before {
    long long segments[MAX_THREADS + 1], rows[MAX_THREADS + 1];
};

// Fills `before`; all threads of the block come. Each has a share of `share` sequences.
__device__ __forceinline__ void sum_lengths(const Lengths& lengths, long long share, Before& before)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long segments = 0, rows = 0;
    for (long long i = threadIdx.x * share; i < min((threadIdx.x + 1) * share, lengths.num_seqs); ++i) {
        const Extent e = lengths[i];
        segments += e.num_blocks;
        rows += e.end - e.start;
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const long long s = __shfl_up_sync(ALL, segments, d), r = __shfl_up_sync(ALL, rows, d);
        if (lane >= d) segments += s, rows += r;
    }
    __shared__ long long of_warps[2][MAX_THREADS / 32];
    if (lane == 31) of_warps[0][warp] = segments, of_warps[1][warp] = rows;
    __syncthreads();
    for (int w = 0; w < warp; ++w) segments += of_warps[0][w], rows += of_warps[1][w];
    before.segments[threadIdx.x + 1] = segments;
    before.rows[threadIdx.x + 1] = rows;
    if (threadIdx.x == 0) before.segments[0] = before.rows[0] = 0;
    __syncthreads();
}

// Walks through the segments of all sequences, in order. All lanes of a warp walk together.
struct Walk {
    const Lengths& lengths;
    long long seq, first, row;  // the sequence; how many segments and rows lie before it
    Extent extent;

    // To the sequence of `segment`, which is one of those that `before` counts.
    __device__ __forceinline__ Walk(const Lengths& lengths, long long segment, long long share, const Before& before)
        : lengths(lengths)
    {
        int from = 0, past = blockDim.x;  // the last share with before.segments[from] <= segment
        while (past - from > 1) {
            const int middle = (from + past) / 2;
            (before.segments[middle] <= segment ? from : past) = middle;
        }
        seq = from * share;
        first = before.segments[from];
        row = before.rows[from];
        extent = lengths[seq];
    }

    __device__ __forceinline__ void to(long long segment)
    {
        while (segment - first >= extent.num_blocks) {
            first += extent.num_blocks;
            row += extent.end - extent.start;
            extent = lengths[++seq];
        }
    }

    __device__ __forceinline__ long long column(long long segment) const { return extent.first_block + segment - first; }

    __device__ __forceinline__ Segment at(long long segment) const
    {
        const long long begin = column(segment) * BLOCK_SIZE;
        const long long position = max(extent.start, begin), end = min(extent.end, begin + BLOCK_SIZE);
        const long long to = row + position - extent.start;
        return {to, (int)(position % BLOCK_SIZE), (int)min(end - position, max(lengths.num_rows - to, 0LL))};
    }
};

template <int HEADS, int RUNS, int RUN>
__device__ __forceinline__ void copy_slice(
    const Segment& segment, int slice, long long block, long long num_blocks,
    char* __restrict__ rows, long long token_stride, long long head_stride, long long dim_stride,
    const char* __restrict__ pool, long long block_stride, long long slot_stride, long long pool_head_stride)
{
    using Row = Runs<HEADS, RUNS, RUN, char>;
    using Slot = Runs<HEADS, 1, RUNS * RUN, const char>;
    Carried carried(slice, segment.tokens * Row::ROW);
    if (block >= 0 && block < num_blocks)
        carried.load(Slot{pool + block * block_stride + segment.offset * slot_stride, slot_stride, pool_head_stride, 0});
    carried.store(Row{rows + segment.row * token_stride, token_stride, head_stride, dim_stride});
}

template <int HEADS, int RUNS, int RUN>
__device__ __forceinline__ void gather_rows(
    const Lengths& lengths, const char* __restrict__ block_tables, long long table_stride, long long entry_stride,
    long long num_blocks, char* __restrict__ rows, long long token_stride, long long head_stride, long long dim_stride,
    const char* __restrict__ pool, long long block_stride, long long slot_stride, long long pool_head_stride)
{
    constexpr int SLICES = slices_of(BLOCK_SIZE * HEADS * RUNS * RUN);
    __shared__ Before before;
    const long long share = (lengths.num_seqs + blockDim.x - 1) / blockDim.x;
    sum_lengths(lengths, share, before);

    const long long slices = before.segments[blockDim.x] * SLICES, warps = gridDim.x * (long long)(blockDim.x / 32);
    const long long of_warp = (slices + warps - 1) / warps;
    long long slice = warp_of_grid() * of_warp;
    const long long end = min(slice + of_warp, slices);
    if (slice >= end) return;
    Walk walk(lengths, slice / SLICES, share, before);
    long long block = -1, read = -1;  // the entry of segment number `read`
    for (; slice < end; ++slice) {
        const long long segment = slice / SLICES;
        walk.to(segment);
        if (segment != read)
            block = *(const TABLE_T*)(block_tables + walk.seq * table_stride + walk.column(segment) * entry_stride);
        read = segment;
        copy_slice<HEADS, RUNS, RUN>(walk.at(segment), (int)(slice % SLICES), block, num_blocks, rows, token_stride,
                                     head_stride, dim_stride, pool, block_stride, slot_stride, pool_head_stride);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 4) gather_cache(
    char* key, char* value, const char* k_cache, const char* v_cache,
    long long key_layer, long long key_token, long long key_head, long long key_dim,
    long long value_layer, long long value_token, long long value_head, long long value_dim,
    long long k_layer, long long k_block, long long k_slot, long long k_head,
    long long v_layer, long long v_block, long long v_slot, long long v_head,
    const char* block_tables, long long table_stride, long long entry_stride, long long max_blocks,
    const char* seq_lens, long long lens_stride, const char* seq_starts, long long starts_stride,
    long long num_seqs, long long num_rows, long long num_blocks)
{
    const Lengths lengths{seq_lens, seq_starts, lens_stride, starts_stride, max_blocks, num_seqs, num_rows};
    const long long layer = blockIdx.z;
    if (blockIdx.y == 0)
        gather_rows<K_HEADS, K_RUNS, K_RUN>(
            lengths, block_tables, table_stride, entry_stride, num_blocks, key + layer * key_layer, key_token, key_head,
            key_dim, k_cache + layer * k_layer, k_block, k_slot, k_head);
    else
        gather_rows<V_HEADS, V_RUNS, V_RUN>(
            lengths, block_tables, table_stride, entry_stride, num_blocks, value + layer * value_layer, value_token,
            value_head, value_dim, v_cache + layer * v_layer, v_block, v_slot, v_head);
}
