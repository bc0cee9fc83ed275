// ptx.hpp: the host's twins of kernels/ptx.cuh, argument for argument, with the fragment layouts of the PTX ISA.

#pragma once
#include "runtime.hpp"
#include <cmath>
#include <cstring>

namespace emulated_ptx {  // which ptx.cuh uses: a kernel without it may have functions of these names

// Conversions ("cvt"): to nearest even; every NaN becomes 0x7fff, as on the device.
inline float f16_to_f32(unsigned short x)
{
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    const float sign = x & 0x8000 ? -1.f : 1.f;
    if (exponent == 31) return emulated_bits<float>((unsigned)(x & 0x8000) << 16 | 0x7f800000u | (unsigned)mantissa << 13);
    return sign * (exponent ? ldexpf((float)(1024 + mantissa), exponent - 25) : ldexpf((float)mantissa, -24));
}
inline unsigned short f32_to_f16(float x)
{
    const unsigned bits = emulated_bits<unsigned>(x), sign = bits >> 16 & 0x8000;
    if (x != x) return 0x7fff;
    const float size = fabsf(x);
    if (size >= 65520.f) return (unsigned short)(sign | 0x7c00);  // half way to 2^16, and so to even
    // Below 2^-14 numbers are multiples of 2^-24, above of 2^-10 of their power of two.
    if (size < 6.103515625e-5f) return (unsigned short)(sign | (unsigned)rintf(size * 16777216.f));
    const unsigned magnitude = bits & 0x7fffffffu;
    return (unsigned short)(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13) - (112 << 10));
}
inline float bf16_to_f32(unsigned short x) { return emulated_bits<float>((unsigned)x << 16); }
inline unsigned short f32_to_bf16(float x)
{
    const unsigned bits = emulated_bits<unsigned>(x);
    return x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline unsigned f32x2_to_f16x2(float low, float high) { return f32_to_f16(low) | (unsigned)f32_to_f16(high) << 16; }
inline unsigned f32x2_to_bf16x2(float low, float high) { return f32_to_bf16(low) | (unsigned)f32_to_bf16(high) << 16; }

inline float ex2_approx(float x)
{
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.f : y;
}
inline float tanh_approx(float x) { return tanhf(x); }

template <class T> EMULATED_INLINE void load_now(T& x, const T* p) { x = *p; }

namespace of_warp {

using namespace emulated;

// What a lane brings to an mma: its registers of a and of b.
template <int A, int B> struct Registers {
    unsigned a[A], b[B];
};

inline float number(unsigned pair, int which, bool bf16)
{
    const unsigned short bits = (unsigned short)(which ? pair >> 16 : pair);
    return bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

// d += a b for K columns of a. PTX ISA, "Matrix Fragments for mma.m16n8k8" and "... mma.m16n8k16": a[i] of lane 4g + t holds
// row g + 8 (i % 2), columns 8 (i / 2) + 2t and the next; b[i] rows 8i + 2t and the next of column g; d[i] row g + 8 (i / 2),
// column 2t + i % 2. The device rounds in ways that are not told; here the sum is exact but for one rounding.
template <int K>
EMULATED_CALLED void mma(float (&d)[4], const unsigned* a, const unsigned* b, bool bf16, unsigned line)
{
    Registers<K / 4, K / 8> mine;
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    const Meeting* meeting = emulated_meet(ALIGNED, 0xffffffffu, &mine, sizeof mine, line, __builtin_return_address(0));
    const int g = (int)emulated_lane() / 4, t = (int)emulated_lane() % 4;
    const auto of = [meeting](int lane) EMULATED_UNSEEN {
        Registers<K / 4, K / 8> r;
        std::memcpy(&r, meeting->brought[lane], sizeof r);
        return r;
    };
    double sums[4] = {d[0], d[1], d[2], d[3]};
    for (int block = 0; block < K / 8; ++block)
        for (int s = 0; s < 4; ++s) {  // columns 8 block + 2s and the next of a
            const auto row = of(4 * g + s);
            for (int column = 0; column < 2; ++column) {
                const auto other = of(4 * (2 * t + column) + s);
                for (int half = 0; half < 2; ++half)
                    for (int pair = 0; pair < 2; ++pair)
                        sums[2 * half + column] += number(row.a[2 * block + half], pair, bf16)
                                                   * number(other.b[block], pair, bf16);
            }
        }
    for (int i = 0; i < 4; ++i) d[i] = (float)sums[i];
}

// PTX ISA, "ldmatrix": matrix i is the rows that lanes 8i to 8i + 7 point to; lane 4g + t gets columns 2t and 2t + 1 of row g.
template <int COUNT, bool TRANS>
EMULATED_UNSEEN void ldmatrix(unsigned (&r)[COUNT], const void* row, const void* place, unsigned line)
{
    const int lane = (int)emulated_lane(), g = lane / 4, t = lane % 4;
    unsigned short numbers[8] = {};
    if (lane < 8 * COUNT) {
        emulated_matrix_row(row, place);
        std::memcpy(numbers, row, sizeof numbers);
    }
    const Meeting* meeting = emulated_meet(ALIGNED, 0xffffffffu, numbers, sizeof numbers, line, place);
    for (int i = 0; i < COUNT; ++i) {
        unsigned short pair[2];
        for (int j = 0; j < 2; ++j) {
            const int from = TRANS ? 2 * t + j : g, column = TRANS ? g : 2 * t + j;
            std::memcpy(&pair[j], meeting->brought[8 * i + from] + 2 * column, 2);
        }
        r[i] = pair[0] | (unsigned)pair[1] << 16;
    }
}

}  // namespace of_warp

EMULATED_INLINE void mma_m16n8k8_f16(float (&d)[4], const unsigned (&a)[2], unsigned b, unsigned line = __builtin_LINE())
{
    of_warp::mma<8>(d, a, &b, false, line);
}
EMULATED_INLINE void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], unsigned line = __builtin_LINE())
{
    of_warp::mma<16>(d, a, b, false, line);
}
EMULATED_INLINE void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], unsigned line = __builtin_LINE())
{
    of_warp::mma<16>(d, a, b, true, line);
}

#define EMULATED_LDMATRIX(name, count, trans)                                                                        \
    EMULATED_CALLED inline void name(unsigned (&r)[count], const void* row,                \
                                                               unsigned line = __builtin_LINE())                     \
    {                                                                                                                \
        of_warp::ldmatrix<count, trans>(r, row, __builtin_return_address(0), line);                                 \
    }
EMULATED_LDMATRIX(ldmatrix_x1, 1, false)
EMULATED_LDMATRIX(ldmatrix_x2, 2, false)
EMULATED_LDMATRIX(ldmatrix_x4, 4, false)
EMULATED_LDMATRIX(ldmatrix_trans_x1, 1, true)
EMULATED_LDMATRIX(ldmatrix_trans_x2, 2, true)
EMULATED_LDMATRIX(ldmatrix_trans_x4, 4, true)

template <int SIZE> EMULATED_INLINE void cp_async(void* shared, const void* global, int from_source = SIZE)
{
    static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16, "the sizes of cp.async");
    emulated_cp_async(shared, global, SIZE, (unsigned)from_source);
}
EMULATED_INLINE void cp_async_commit() { emulated_cp_async_commit(); }
template <int N> EMULATED_INLINE void cp_async_wait() { emulated_cp_async_wait(N); }
EMULATED_INLINE void cp_async_wait_all() { emulated_cp_async_wait(~0u); }

}  // namespace emulated_ptx
