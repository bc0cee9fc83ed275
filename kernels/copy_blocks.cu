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

template <int OUTER, int INNER, int RUN>
__device__ __forceinline__ void copy_slice(
    char* pool, long long block_stride, long long outer_stride, long long inner_stride,
    const char* __restrict__ src, long long src_stride, const char* __restrict__ dst, long long dst_stride,
    long long num_pairs, long long num_blocks)
{
    constexpr int BLOCK = OUTER * INNER * RUN;
    constexpr int SLICES = (BLOCK + 32 * UNROLL - 1) / (32 * UNROLL);
    const long long warp = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
    const long long pair = warp / SLICES;
    const int first = (int)(warp % SLICES) * (32 * UNROLL) + threadIdx.x % 32;
    if (pair >= num_pairs) return;

    const long long from = *(const SRC_T*)(src + pair * src_stride);
    const long long to = *(const DST_T*)(dst + pair * dst_stride);
    if (from < 0 || from >= num_blocks || to < 0 || to >= num_blocks) return;

    ACCESS_T loaded[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int i = first + u * 32, run = i / RUN;
        if (i < BLOCK)
            loaded[u] = *(const ACCESS_T*)(pool + from * block_stride + run / INNER * outer_stride
                                           + run % INNER * inner_stride + i % RUN * (int)sizeof(ACCESS_T));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const int i = first + u * 32, run = i / RUN;
        if (i < BLOCK)
            *(ACCESS_T*)(pool + to * block_stride + run / INNER * outer_stride + run % INNER * inner_stride
                         + i % RUN * (int)sizeof(ACCESS_T)) = loaded[u];
    }
}

extern "C" __global__ void __launch_bounds__(128, 6) copy_blocks(
    char* k_cache, char* v_cache, const char* src, const char* dst,
    long long k_layer, long long k_block, long long k_outer, long long k_inner,
    long long v_layer, long long v_block, long long v_outer, long long v_inner,
    long long src_stride, long long dst_stride, long long num_pairs, long long num_blocks)
{
    const long long layer = blockIdx.z;
    if (blockIdx.y == 0)
        copy_slice<K_OUTER, K_INNER, K_RUN>(k_cache + layer * k_layer, k_block, k_outer, k_inner, src, src_stride, dst,
                                            dst_stride, num_pairs, num_blocks);
    else
        copy_slice<V_OUTER, V_INNER, V_RUN>(v_cache + layer * v_layer, v_block, v_outer, v_inner, src, src_stride, dst,
                                            dst_stride, num_pairs, num_blocks);
}
