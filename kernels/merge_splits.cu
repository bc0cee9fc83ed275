// merge_splits: what paged_attention.cu left of each split, united left to right, becomes the result.
//
// Contract   Row (token, head) of out and lse, from `scratch`: the splits that the row sees, in order. Others are not read:
//            nobody may have written them. Rows of tokens that are no sequence's are left alone.
// Layout     scratch is [num_splits][num_tokens][num_heads] rows of 2 + V_DIM floats: greatest score, sum, values. Split i is
//            at i % num_splits: no row sees more than num_splits in turn.
// Launch     Grid (num_tokens * num_heads, x), a block a row, a thread a column: x blocks of 128 threads for V_DIM columns.
// Defined by the launch code: ELEMENT, V_DIM, BLOCK_SIZE, LENS_T, CU_T.

#include "attention.cuh"
#include "sequences.cuh"

constexpr int BATCH = 8;  // splits that are read before the first of them is united

extern "C" __global__ void __launch_bounds__(128) merge_splits(
    const float* scratch, long long num_splits, const char* seq_lens, long long lens_stride, const char* cu_seqlens,
    long long cu_stride, long long num_seqs, long long num_tokens, long long num_heads, long long max_blocks,
    long long left, long long right, const char* sinks, long long sink_stride,
    char* out, long long out_token, long long out_head, long long out_dim, char* lse, long long lse_token, long long lse_head)
{
    const int token = blockIdx.x / (unsigned)num_heads, head = blockIdx.x % (unsigned)num_heads;  // 64 bits take long
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    const Sequences sequences{seq_lens, cu_seqlens, lens_stride, cu_stride, num_seqs, num_tokens, max_blocks,
                              left, right};
    const auto first_token = [&](long long seq) { return sequences.first_token(seq); };
    const long long seq = cu_seqlens ? count_up_to(token, (int)num_seqs, first_token) - 1 : token;
    if (seq < 0 || token >= sequences.first_token(seq + 1) || column >= V_DIM) return;

    const Interval sees = sequences.mask(seq).of_token(token - sequences.first_token(seq));
    Sum sum;
    float value = 0;
    const int first = sees.first / SPLIT, end = (sees.end + SPLIT - 1) / SPLIT;
    const long long of_split = num_tokens * num_heads * (V_DIM + 2);
    const float* of_row = scratch + blockIdx.x * (V_DIM + 2LL);
    int slot = first % (int)num_splits;
    for (int split = first; split < end; split += BATCH) {
        Sum sums[BATCH];
        float values[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (split + i >= end) break;
            const float* row = of_row + slot * of_split;
            sums[i].most = row[0];
            sums[i].total = row[1];
            values[i] = row[2 + column];
            if (++slot == num_splits) slot = 0;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (split + i >= end) break;
            const United both = unite(sum, sums[i]);
            value = both.values(value, values[i]);
            sum = both.sum;
        }
    }
    const End ends = sinks ? end_of(sum, *(const float*)(sinks + head * sink_stride)) : end_of(sum);
    *(ELEMENT::Bits*)(out + token * out_token + head * out_head + column * out_dim) = ELEMENT::round(ends.value(value));
    if (lse && column == 0) *(float*)(lse + token * lse_token + head * lse_head) = ends.lse;
}
