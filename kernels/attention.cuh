// attention.cuh: what the attention kernels share: how sums over parts of the keys are united, and how a row ends.
//
// Scores are kept in units of log 2, so that 2^x stands where e^x would. Every rounding that decides about the last bit
// is written out (__fmaf_rn, __fmul_rn), since a compiler may contract a * b + c in one kernel and not in another, and a
// token's result must not depend on which of them computed it.

#include "ptx.cuh"

#define INF __int_as_float(0x7f800000)
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Elements of the arrays: their bits, and what they are.
struct F32 {
    typedef float Bits;
    static __device__ __forceinline__ float get(Bits x) { return x; }
    static __device__ __forceinline__ Bits round(float x) { return x; }
};
struct F16 {
    typedef unsigned short Bits;
    static constexpr unsigned EXPONENT = 0x7c00;
    static __device__ __forceinline__ float get(Bits x) { return f16_to_f32(x); }
    static __device__ __forceinline__ Bits round(float x) { return f32_to_f16(x); }
    static __device__ __forceinline__ unsigned round(float low, float high) { return f32x2_to_f16x2(low, high); }
};
struct BF16 {
    typedef unsigned short Bits;
    static constexpr unsigned EXPONENT = 0x7f80;
    static __device__ __forceinline__ float get(Bits x) { return bf16_to_f32(x); }
    static __device__ __forceinline__ Bits round(float x) { return f32_to_bf16(x); }
    static __device__ __forceinline__ unsigned round(float low, float high) { return f32x2_to_bf16x2(low, high); }
};

// What a set of keys comes to in one row: its greatest score, and the sum of 2^(score - greatest). The values, so weighed,
// are kept beside it.
struct Sum {
    float most = -INF, total = 0;
};

// What 2^(score - most) is taken from; it must not be -inf, or nothing would come out as 2^(-inf + inf).
__device__ __forceinline__ float shift_of(float most) { return most == -INF ? 0.f : most; }

// The sum of two sets, and what the values of each count in it.
struct United {
    Sum sum;
    float a, b;
    __device__ __forceinline__ float values(float of_a, float of_b) const { return __fmaf_rn(of_a, a, __fmul_rn(of_b, b)); }
};
__device__ __forceinline__ United unite(const Sum& a, const Sum& b)
{
    United u;
    u.sum.most = fmaxf(a.most, b.most);
    const float shift = shift_of(u.sum.most);
    u.a = ex2_approx(a.most - shift);
    u.b = ex2_approx(b.most - shift);
    u.sum.total = u.values(a.total, b.total);
    return u;
}

// How a row ends: what its values are multiplied by and divided by, and its LSE.
struct End {
    float scale, total, lse;
    __device__ __forceinline__ float value(float x) const { return total == 0 ? 0.f : __fdiv_rn(__fmul_rn(x, scale), total); }
};
__device__ __forceinline__ End end_of(const Sum& sum)
{
    return {1.f, sum.total, __fmul_rn(__fadd_rn(sum.most, log2f(sum.total)), LN_2)};
}
// With a sink: one more score, in units of log e, that brings no value.
__device__ __forceinline__ End end_of(const Sum& sum, float sink)
{
    Sum more;
    more.most = __fmul_rn(sink, LOG2_E);
    more.total = 1;
    const United u = unite(sum, more);
    End end = end_of(u.sum);
    end.scale = u.a;
    return end;
}
