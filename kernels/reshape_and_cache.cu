// reshape_and_cache: scatter the K and V of new tokens to their slots in the paged pools.
//
// Contract   For every token t < num_tokens with 0 <= slot_mapping[t] < num_slots, row t of key becomes
//            k_cache[slot / BLOCK_SIZE][slot % BLOCK_SIZE], and row t of value the same place of v_cache. Any other
//            slot writes nothing. Bytes move, not numbers. If one slot comes twice, either row may win.
// Layout     All strides are in bytes. A row of K is K_HEADS x K_RUNS runs of K_RUN accesses of sizeof(ACCESS_T) bytes:
//            a run is contiguous on both sides, runs of a head are key_dim apart in key and adjacent in the pool,
//            heads are key_head and k_head apart. The host merges what it can, so that the common row is one run.
//            The same for V. Every address that the strides reach is a multiple of sizeof(ACCESS_T).
// Launch     Grid (x, 2, layers): y = 0 copies K, y = 1 copies V; the slots are the same in every layer. Blocks of
//            whole warps, one warp for each slice of 32 * UNROLL accesses of a row; x * warps a block >= num_tokens *
//            slices of the longer row.
// Defined by the launch code: SLOT_T, ACCESS_T, UNROLL, BLOCK_SIZE, K_HEADS, K_RUNS, K_RUN, V_HEADS, V_RUNS, V_RUN.
//
// A warp reads its slot once, and its loads do not wait for it: of 64 tokens on an H100, 2.25 µs instead of 2.59.
//
// Six blocks a multiprocessor (the second launch bound) leave a thread 80 registers; bench.py's shapes take up to 56.
// With eight, rows of 1,152 accesses of 16 bytes spilled for sm_90; without a bound ptxas at times aims at more blocks still.

#include "rows.cuh"

template <int HEADS, int RUNS, int RUN>
__device__ __forceinline__ void scatter_rows(
    const char* __restrict__ rows, long long token_stride, long long head_stride, long long dim_stride,
    char* __restrict__ pool, long long block_stride, long long slot_stride, long long pool_head_stride,
    const char* __restrict__ slot_mapping, long long slot_mapping_stride, long long num_tokens, long long num_slots)
{
    using Row = Runs<HEADS, RUNS, RUN, const char>;
    using Slot = Runs<HEADS, 1, RUNS * RUN, char>;
    constexpr int SLICES = slices_of(Row::ROW);
    const long long token = warp_of_grid() / SLICES;
    if (token >= num_tokens) return;

    const long long slot = *(const SLOT_T*)(slot_mapping + token * slot_mapping_stride);
    Carried carried((int)(warp_of_grid() % SLICES), Row::ROW);
    carried.load(Row{rows + token * token_stride, 0, head_stride, dim_stride});
    if (slot < 0 || slot >= num_slots) return;
    carried.store(Slot{pool + slot / BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride, 0, pool_head_stride, 0});
}

extern "C" __global__ void __launch_bounds__(128, 6) reshape_and_cache(
    const char* key, const char* value, char* k_cache, char* v_cache, const char* slot_mapping,
    long long key_layer, long long key_token, long long key_head, long long key_dim,
    long long value_layer, long long value_token, long long value_head, long long value_dim,
    long long k_layer, long long k_block, long long k_slot, long long k_head,
    long long v_layer, long long v_block, long long v_slot, long long v_head,
    long long slot_mapping_stride, long long num_tokens, long long num_slots)
{
    const long long layer = blockIdx.z;
    if (blockIdx.y == 0)
        scatter_rows<K_HEADS, K_RUNS, K_RUN>(
            key + layer * key_layer, key_token, key_head, key_dim, k_cache + layer * k_layer, k_block, k_slot, k_head,
            slot_mapping, slot_mapping_stride, num_tokens, num_slots);
    else
        scatter_rows<V_HEADS, V_RUNS, V_RUN>(
            value + layer * value_layer, value_token, value_head, value_dim, v_cache + layer * v_layer, v_block, v_slot,
            v_head, slot_mapping, slot_mapping_stride, num_tokens, num_slots);
}
