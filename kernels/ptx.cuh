// ptx.cuh: PTX instructions as functions, one each, for kernels that include no header of CUDA's.
//
// On a device they are inline PTX; where a host compiles the kernel, their twins stand in cupy_pagedkv/emulator/ptx.hpp,
// argument for argument. 16-bit numbers travel as bits: unsigned short one, unsigned two, the first in the low half.
// Fragments are as the PTX ISA lays them out over a warp ("Matrix Fragments for mma.m16n8k16 with floating point type",
// "... mma.m16n8k8 ...", "ldmatrix"): with lane = 4 * group + t, of a 16 x 8 accumulator d[0], d[1] are row `group`, columns
// 2t, 2t + 1, and d[2], d[3] the same of row group + 8.

#ifndef EMULATED

// Conversions, to nearest even; a NaN stays one.
__device__ __forceinline__ float f16_to_f32(unsigned short x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ unsigned short f32_to_f16(float x)
{
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float bf16_to_f32(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ unsigned short f32_to_bf16(float x)
{
#if __CUDA_ARCH__ >= 800
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
__device__ __forceinline__ unsigned f32x2_to_f16x2(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return f32_to_f16(low) | (unsigned)f32_to_f16(high) << 16;
#endif
}
__device__ __forceinline__ unsigned f32x2_to_bf16x2(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return f32_to_bf16(low) | (unsigned)f32_to_bf16(high) << 16;
#endif
}

// 2^x and tanh(x), with the last bits missing; 0 where the result would be denormal.
__device__ __forceinline__ float ex2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float tanh_approx(float x)
{
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d += a b: a is 16 x 16 (or 16 x 8) by rows, b 16 x 8 (or 8 x 8) by columns, d 16 x 8.
__device__ __forceinline__ void mma_m16n8k8_f16(float (&d)[4], const unsigned (&a)[2], unsigned b)
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Matrices of 8 x 8 16-bit numbers from shared memory: lanes 8i to 8i + 7 say where the rows of matrix i begin, at multiples
// of 16 bytes, and r[i] becomes columns 2t, 2t + 1 of its row `group`; of its transpose, with _trans.
#define LDMATRIX(name, count, modifier, outputs, operand, ...)                                                       \
    __device__ __forceinline__ void name(unsigned (&r)[count], const void* row)                                      \
    {                                                                                                                \
        asm volatile("ldmatrix.sync.aligned.m8n8.x" #count modifier ".shared.b16 " outputs ", [" operand "];"        \
                     : __VA_ARGS__ : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");                       \
    }
#define LDMATRICES(name, modifier)                                                                                   \
    LDMATRIX(name##x1, 1, modifier, "{%0}", "%1", "=r"(r[0]))                                                        \
    LDMATRIX(name##x2, 2, modifier, "{%0, %1}", "%2", "=r"(r[0]), "=r"(r[1]))                                        \
    LDMATRIX(name##x4, 4, modifier, "{%0, %1, %2, %3}", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]))
LDMATRICES(ldmatrix_, "")
LDMATRICES(ldmatrix_trans_, ".trans")
#undef LDMATRICES
#undef LDMATRIX

// Asynchronous copies of SIZE (4, 8 or 16) bytes from global to shared memory, of which the first `from_source` are read and
// the others zeros. They arrive when their group has been waited for: all but the last N groups, or all. Others in the
// block see them behind a barrier after that.
#if __CUDA_ARCH__ >= 800
template <int SIZE> __device__ __forceinline__ void cp_async(void* shared, const void* global, int from_source = SIZE)
{
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    const unsigned long long from = __cvta_generic_to_global(global);
    if constexpr (SIZE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(from_source) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(SIZE), "r"(from_source)
                     : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
// Turing has none: a load and a store, done at once.
template <int SIZE> __device__ __forceinline__ void cp_async(void* shared, const void* global, int from_source = SIZE)
{
    unsigned words[SIZE / 4] = {};
    if (from_source == SIZE)
        for (int i = 0; i < SIZE / 4; ++i) words[i] = ((const unsigned*)global)[i];
    else
        for (int i = 0; i < from_source; ++i) words[i / 4] |= (unsigned)((const unsigned char*)global)[i] << i % 4 * 8;
    for (int i = 0; i < SIZE / 4; ++i) ((unsigned*)shared)[i] = words[i];
}
__device__ __forceinline__ void cp_async_commit() {}
template <int N> __device__ __forceinline__ void cp_async_wait() {}
__device__ __forceinline__ void cp_async_wait_all() {}
#endif

// Loads from global memory, which the kernel must not write before, that are begun where they stand. Others are put off until
// behind a branch of which one side alone needs them: by ptxas, too, which respects no `asm volatile`, but an order of memory.
#define LOAD_NOW(Type, suffix, outputs, operand, ...)                                                                \
    __device__ __forceinline__ void load_now(Type& x, const Type* p)                                                 \
    {                                                                                                                \
        asm volatile("ld.relaxed.cta.global." suffix " " outputs ", [" operand "];"                                  \
                     : __VA_ARGS__ : "l"(__cvta_generic_to_global(p)));                                              \
    }
LOAD_NOW(uint4, "v4.u32", "{%0, %1, %2, %3}", "%4", "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w))
LOAD_NOW(uint2, "v2.u32", "{%0, %1}", "%2", "=r"(x.x), "=r"(x.y))
LOAD_NOW(unsigned, "u32", "%0", "%1", "=r"(x))
LOAD_NOW(unsigned short, "u16", "%0", "%1", "=h"(x))
#undef LOAD_NOW
__device__ __forceinline__ void load_now(unsigned char& x, const unsigned char* p)
{
    unsigned short wider;
    asm volatile("ld.relaxed.cta.global.u8 %0, [%1];" : "=h"(wider) : "l"(__cvta_generic_to_global(p)));
    x = (unsigned char)wider;
}

#else
using namespace emulated_ptx;
#endif

// Over all lanes of a warp; each gets the result. Pairs are added in a fixed order.
__device__ __forceinline__ float warp_sum(float x)
{
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}
__device__ __forceinline__ float warp_max(float x)
{
    for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}
