// gather_cache: copy the K and V of sequences out of the paged pools, packed, in logical order.
//
// Contract   Positions [seq_starts[i], seq_lens[i]) of sequence i, for i = 0, 1, ... in turn, become the rows of key and
//            value. Position p is k_cache[block_tables[i][p / BLOCK_SIZE]][p % BLOCK_SIZE]; table entries past a
//            sequence's need are not read. Rows past the total are left alone, rows past num_rows are dropped. A row
//            whose block is not in the pool is zeros: nothing outside the pool is ever read. seq_starts may be null:
//            all sequences start at 0. A start or length outside the table counts as its nearest end.
// Layout     All strides are in bytes; a row is HEADS x RUNS x RUN accesses, as in reshape_and_cache.cu.
// Launch     Grid (x, 2, layers): y = 0 copies K, y = 1 copies V; the tables are the same for every layer. A segment
//            is the part of one block that one sequence needs; blocks of whole warps, one warp for each slice of
//            32 * UNROLL accesses of a segment. The host need not know the lengths: warps past the last segment
//            return, so x only has to be large enough.
// Defined by the launch code: TABLE_T, LENS_T, STARTS_T, ACCESS_T, UNROLL, BLOCK_SIZE, K_HEADS, K_RUNS, K_RUN,
//            V_HEADS, V_RUNS, V_RUN.
//
// The lengths are summed here, by each warp for itself, so that a captured CUDA graph can replay with new ones and
// needs no scratch memory. A warp narrows num_seqs sequences to its own by a factor of 32 a round; the first round
// reads every length once, 32 at a time. A block-table entry is read once a slice.
//
// Six blocks a multiprocessor (the second launch bound) leave a thread 80 registers; bench.py's shapes take up to 66.
// Without it ptxas aims at ten and spills for sm_80 and sm_90.

#include "rows.cuh"

constexpr unsigned ALL = 0xffffffffu;

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

// `tokens` rows from `row` on: those of a block's places from `offset` on, for column `column` of the table of `seq`.
struct Segment {
    long long seq, column, row;
    int offset, tokens;
};

// Segment number `segment` of all; of no tokens if there are not so many. All lanes of a warp ask for the same.
__device__ __forceinline__ Segment find_segment(
    long long segment, const char* __restrict__ seq_lens, long long lens_stride, const char* __restrict__ seq_starts,
    long long starts_stride, long long max_blocks, long long num_seqs, long long num_rows)
{
    const int lane = threadIdx.x % 32;
    long long seq = 0, count = num_seqs, row = 0;  // `segment` is counted from the first of `count` sequences from `seq`
    while (count > 1) {
        const long long share = (count + 31) / 32;
        const long long mine = lane * share;
        long long segments = 0, positions = 0;
        for (long long i = mine; i < mine + share && i < count; ++i) {
            const Extent e = extent_of(seq + i, seq_lens, lens_stride, seq_starts, starts_stride, max_blocks);
            segments += e.num_blocks;
            positions += e.end - e.start;
        }
        long long segments_through = segments, positions_through = positions;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const long long s = __shfl_up_sync(ALL, segments_through, d);
            const long long p = __shfl_up_sync(ALL, positions_through, d);
            if (lane >= d) segments_through += s, positions_through += p;
        }
        const unsigned holders = __ballot_sync(ALL, segments_through > segment);
        if (!holders) return {};
        const int holder = __ffs(holders) - 1;
        segment -= __shfl_sync(ALL, segments_through - segments, holder);
        row += __shfl_sync(ALL, positions_through - positions, holder);
        seq += holder * share;
        count = min(share, count - holder * share);
    }
    const Extent e = extent_of(seq, seq_lens, lens_stride, seq_starts, starts_stride, max_blocks);
    if (segment >= e.num_blocks) return {};
    const long long column = e.first_block + segment;
    const long long position = max(e.start, column * BLOCK_SIZE);
    const long long end = min(e.end, (column + 1) * BLOCK_SIZE);
    row += position - e.start;
    return {seq, column, row, (int)(position % BLOCK_SIZE), (int)min(end - position, max(num_rows - row, 0LL))};
}

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

extern "C" __global__ void __launch_bounds__(128, 6) gather_cache(
    char* key, char* value, const char* k_cache, const char* v_cache,
    long long key_layer, long long key_token, long long key_head, long long key_dim,
    long long value_layer, long long value_token, long long value_head, long long value_dim,
    long long k_layer, long long k_block, long long k_slot, long long k_head,
    long long v_layer, long long v_block, long long v_slot, long long v_head,
    const char* block_tables, long long table_stride, long long entry_stride, long long max_blocks,
    const char* seq_lens, long long lens_stride, const char* seq_starts, long long starts_stride,
    long long num_seqs, long long num_rows, long long num_blocks)
{
    constexpr int K_SLICES = slices_of(BLOCK_SIZE * K_HEADS * K_RUNS * K_RUN);
    constexpr int V_SLICES = slices_of(BLOCK_SIZE * V_HEADS * V_RUNS * V_RUN);
    const long long warp = warp_of_grid();
    const long long layer = blockIdx.z;
    const bool of_k = blockIdx.y == 0;
    const Segment segment = find_segment(of_k ? warp / K_SLICES : warp / V_SLICES, seq_lens, lens_stride, seq_starts,
                                         starts_stride, max_blocks, num_seqs, num_rows);
    if (segment.tokens == 0) return;
    const long long block = *(const TABLE_T*)(block_tables + segment.seq * table_stride + segment.column * entry_stride);
    if (of_k)
        copy_slice<K_HEADS, K_RUNS, K_RUN>(
            segment, (int)(warp % K_SLICES), block, num_blocks, key + layer * key_layer, key_token, key_head, key_dim,
            k_cache + layer * k_layer, k_block, k_slot, k_head);
    else
        copy_slice<V_HEADS, V_RUNS, V_RUN>(
            segment, (int)(warp % V_SLICES), block, num_blocks, value + layer * value_layer, value_token, value_head,
            value_dim, v_cache + layer * v_layer, v_block, v_slot, v_head);
}
