// merge_attention_states: attention over the union of two sets of keys, from that over each.
//
// Contract   Row (token, head): lse = log(e^lse_a + e^lse_b), out = (e^lse_a out_a + e^lse_b out_b) / e^lse. Two rows without keys
//            (LSE -inf) give zeros.
// Layout     All strides are in bytes.
// Launch     Grid (num_tokens * num_heads, x), a block a row, a thread a column: x blocks of 128 threads for V_DIM columns.
// Defined by the launch code: ELEMENT, V_DIM.

#include "attention.cuh"

// A row that has been divided by its sum, with the LSE in units of log e: its greatest score may as well be that.
__device__ __forceinline__ Sum sum_of(float lse)
{
    Sum sum;
    sum.most = __fmul_rn(lse, LOG2_E);
    sum.total = lse == -INF ? 0.f : 1.f;
    return sum;
}

extern "C" __global__ void __launch_bounds__(128) merge_attention_states(
    const char* out_a, long long a_token, long long a_head, long long a_dim,
    const char* lse_a, long long lse_a_token, long long lse_a_head,
    const char* out_b, long long b_token, long long b_head, long long b_dim,
    const char* lse_b, long long lse_b_token, long long lse_b_head,
    char* out, long long out_token, long long out_head, long long out_dim, char* lse, long long lse_token, long long lse_head,
    long long num_heads)
{
    typedef ELEMENT::Bits Bits;
    const int token = blockIdx.x / (unsigned)num_heads, head = blockIdx.x % (unsigned)num_heads;  // 64 bits take long
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= V_DIM) return;
    const Sum a = sum_of(*(const float*)(lse_a + token * lse_a_token + head * lse_a_head));
    const Sum b = sum_of(*(const float*)(lse_b + token * lse_b_token + head * lse_b_head));
    // A set without keys brings nothing, whatever its row holds.
    const float of_a = a.total == 0 ? 0.f : ELEMENT::get(*(const Bits*)(out_a + token * a_token + head * a_head + column * a_dim));
    const float of_b = b.total == 0 ? 0.f : ELEMENT::get(*(const Bits*)(out_b + token * b_token + head * b_head + column * b_dim));
    const United both = unite(a, b);
    const End ends = end_of(both.sum);
    *(Bits*)(out + token * out_token + head * out_head + column * out_dim) = ELEMENT::round(ends.value(both.values(of_a, of_b)));
    if (column == 0) *(float*)(lse + token * lse_token + head * lse_head) = ends.lse;
}
