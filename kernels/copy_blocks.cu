// copy_blocks: copy whole blocks of the paged pools onto other blocks of the same pools.
//
// Contract   For every pair p < num_pairs, K and V of block src[p] become block dst[p], in every layer. A pair with a
//            block that is not in the pool copies nothing. No block may be the dst of two pairs, or of one and the src
//            of another: then what it holds is undefined.
// Layout     All strides are in bytes. A block of K is K_OUTER x K_INNER runs of K_RUN accesses of sizeof(ACCESS_T)
//            bytes, k_outer and k_inner apart: its slots and heads, in the order of memory. The host merges what it can,
//            so that the common block is one run. The same for V. Every address that the strides reach is a multiple of
//            sizeof(ACCESS_T).
// Launch     Grid (x, 2, layers): y = 0 copies K, y = 1 copies V. Blocks of whole warps, one warp for each slice of
//            32 * UNROLL accesses of a block; x * warps a block >= num_pairs * slices of the longer block.
// Defined by the launch code: SRC_T, DST_T, ACCESS_T, UNROLL, K_OUTER, K_INNER, K_RUN, V_OUTER, V_INNER, V_RUN.

#include "rows.cuh"

template <int OUTER, int INNER, int RUN>
__device__ __forceinline__ void copy_block(
    char* pool, long long block_stride, long long outer_stride, long long inner_stride,
    const char* __restrict__ src, long long src_stride, const char* __restrict__ dst, long long dst_stride,
    long long num_pairs, long long num_blocks)
{
    using Block = Runs<OUTER, INNER, RUN, char>;
    constexpr int SLICES = slices_of(Block::ROW);
    const long long pair = warp_of_grid() / SLICES;
    if (pair >= num_pairs) return;

    const long long from = *(const SRC_T*)(src + pair * src_stride);
    const long long to = *(const DST_T*)(dst + pair * dst_stride);
    if (from < 0 || from >= num_blocks || to < 0 || to >= num_blocks) return;
    Carried carried((int)(warp_of_grid() % SLICES), Block::ROW);
    carried.load(Block{pool + from * block_stride, 0, outer_stride, inner_stride});
    carried.store(Block{pool + to * block_stride, 0, outer_stride, inner_stride});
}

extern "C" __global__ void __launch_bounds__(128, 6) copy_blocks(
    char* k_cache, char* v_cache, const char* src, const char* dst,
    long long k_layer, long long k_block, long long k_outer, long long k_inner,
    long long v_layer, long long v_block, long long v_outer, long long v_inner,
    long long src_stride, long long dst_stride, long long num_pairs, long long num_blocks)
{
    const long long layer = blockIdx.z;
    if (blockIdx.y == 0)
        copy_block<K_OUTER, K_INNER, K_RUN>(k_cache + layer * k_layer, k_block, k_outer, k_inner, src, src_stride, dst,
                                            dst_stride, num_pairs, num_blocks);
    else
        copy_block<V_OUTER, V_INNER, V_RUN>(v_cache + layer * v_layer, v_block, v_outer, v_inner, src, src_stride, dst,
                                            dst_stride, num_pairs, num_blocks);
}
