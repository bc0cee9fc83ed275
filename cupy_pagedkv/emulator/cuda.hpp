// cuda.hpp: what a kernel sees of CUDA when a host compiler compiles it. kernel.py includes this file ahead of the source and
// appends EMULATED_KERNEL(name). A kernel that needs more of CUDA finds the place to add it here; instructions that CUDA C++
// has no name for stand in ptx.hpp.
//
// Nothing here knows how threads are run: that is the library's business (runtime.hpp says what it offers). `line` is the
// line of the kernel that calls, which the default argument sees.

#pragma once
// NVRTC has no <cstdint>, so that kernels define these themselves, as `long long`; the host's are `long`, under other names.
#define int64_t emulated_host_int64_t
#define uint64_t emulated_host_uint64_t
#include "runtime.hpp"
#include <cassert>
#include <climits>
#include <cstdio>
#include <cstring>
#include <math.h>    // not <cmath>: abs(-0.5f) would be that of int, exp(0.5f) that of double
#include <stdlib.h>
#include <type_traits>
#include <utility>

#define __global__
#define __host__
#define __device__
#define __constant__
#define __managed__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __shared__ thread_local  // a host thread runs one block at a time
#define EMULATED 1

// What the C library's assert calls.
extern "C" __attribute__((used, visibility("hidden"))) EMULATED_CALLED void
__assert_fail(const char* condition, const char*, unsigned, const char*) noexcept
{
    char why[256];
    snprintf(why, sizeof why, "assertion failed: %s", condition);
    emulated_trap(why, __builtin_return_address(0));
}

constexpr int warpSize = 32;
constexpr unsigned emulated_full_mask = 0xffffffffu;

// Clang checks the alignment of a scalar and of what a reference is bound to, not of a struct that it copies. So vectors
// are copied by functions, and functions need constructors where an aggregate has none.
#if defined(__clang__)
#define EMULATED_COPIES(name, parameters, ...)                                            \
    name() = default;                                                                    \
    constexpr name parameters : __VA_ARGS__ {}                                           \
    EMULATED_INLINE name(const name& v) { __builtin_memcpy((void*)this, &v, sizeof v); } \
    EMULATED_INLINE name& operator=(const name& v)                                       \
    {                                                                                    \
        __builtin_memcpy((void*)this, &v, sizeof v);                                     \
        return *this;                                                                    \
    }
#else
#define EMULATED_COPIES(...)
#endif
#define EMULATED_COPIES1(type, name) EMULATED_COPIES(name, (type x), x(x))
#define EMULATED_COPIES2(type, name) EMULATED_COPIES(name, (type x, type y = 0), x(x), y(y))
#define EMULATED_COPIES3(type, name) EMULATED_COPIES(name, (type x, type y = 0, type z = 0), x(x), y(y), z(z))
#define EMULATED_COPIES4(type, name) \
    EMULATED_COPIES(name, (type x, type y = 0, type z = 0, type w = 0), x(x), y(y), z(z), w(w))

// Vector types, aligned as on the device (CUDA programming guide, "Built-in Vector Types").
#define EMULATED_VECTORS(type, name, align2, align4)                                                    \
    struct name##1 { type x; EMULATED_COPIES1(type, name##1) };                                        \
    struct alignas(align2) name##2 { type x, y; EMULATED_COPIES2(type, name##2) };                     \
    EMULATED_VECTOR3(type, name)                                                                       \
    struct alignas(align4) name##4 { type x, y, z, w; EMULATED_COPIES4(type, name##4) };               \
    inline name##1 make_##name##1(type x) { return {x}; }                                              \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                   \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                        \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define EMULATED_VECTOR3(type, name) struct name##3 { type x, y, z; EMULATED_COPIES3(type, name##3) };
EMULATED_VECTORS(signed char, char, 2, 4)
EMULATED_VECTORS(unsigned char, uchar, 2, 4)
EMULATED_VECTORS(short, short, 4, 8)
EMULATED_VECTORS(unsigned short, ushort, 4, 8)
EMULATED_VECTORS(int, int, 8, 16)
EMULATED_VECTORS(long long, longlong, 16, 16)
EMULATED_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATED_VECTORS(float, float, 8, 16)
EMULATED_VECTORS(double, double, 16, 16)
#undef EMULATED_VECTOR3
#define EMULATED_VECTOR3(type, name)  // uint3 stands in runtime.hpp
EMULATED_VECTORS(unsigned, uint, 8, 16)

// Arithmetic.
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b)
{
    return (std::common_type_t<A, B>)b < (std::common_type_t<A, B>)a ? (std::common_type_t<A, B>)b : (std::common_type_t<A, B>)a;
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b)
{
    return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? (std::common_type_t<A, B>)b : (std::common_type_t<A, B>)a;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x)
{
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline int __mul24(int a, int b) { return (int)((long long)(a << 8 >> 8) * (b << 8 >> 8)); }
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector)
{
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned byte = (unsigned)(bytes >> 8 * (selector >> 4 * i & 7)) & 255;
        result |= (selector >> 4 * i & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return 1 / sqrtf(a); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline double rsqrt(double a) { return 1 / sqrt(a); }
inline float __expf(float a) { return expf(a); }
inline float __exp2f(float a) { return exp2f(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1.f : 0.f; }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
inline double erfcinv(double y)
{
    if (y > 1) return -erfcinv(2 - y);
    if (!(y > 0)) return y == 0 ? HUGE_VAL : NAN;
    const double t = sqrt(-2 * log(y / 2));  // a guess (Abramowitz and Stegun 26.2.22), and Halley's steps from there
    double x = (t - (2.30753 + 0.27061 * t) / (1 + t * (0.99229 + 0.04481 * t))) * 0.70710678118654752;
    for (int step = 0; step < 3; ++step) {
        const double newton = (erfc(x) - y) / (-1.1283791670955126 * exp(-x * x));
        x -= newton / (1 + x * newton);
    }
    return x;
}
inline float erfcinv(float y) { return (float)erfcinv((double)y); }
inline float erfcinvf(float y) { return (float)erfcinv((double)y); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752); }

template <class To, class From> To emulated_bits(From from)
{
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_ru(float x) { return (int)ceilf(x); }
inline float __int2float_rn(int x) { return (float)x; }

// Loads and stores with a hint.
template <class T> EMULATED_INLINE T __ldg(const T* p) { return *p; }
template <class T> EMULATED_INLINE T __ldca(const T* p) { return *p; }
template <class T> EMULATED_INLINE T __ldcg(const T* p) { return *p; }
template <class T> EMULATED_INLINE T __ldcs(const T* p) { return *p; }
template <class T> EMULATED_INLINE void __stcg(T* p, T value) { *p = value; }
template <class T> EMULATED_INLINE void __stcs(T* p, T value) { *p = value; }
template <class T> EMULATED_INLINE void __stwt(T* p, T value) { *p = value; }
inline std::size_t __cvta_generic_to_shared(const void* p) { return (std::size_t)p; }
inline std::size_t __cvta_generic_to_global(const void* p) { return (std::size_t)p; }

// Clang before 15 makes calls of these of copies of structs, after it has instrumented the rest. Hidden, they are called
// before the C library's. GCC would come here, too, for structs that it has told the instrument of.
#if defined(EMULATED_CHECKED) && defined(__clang__)
#define EMULATED_HIDDEN extern "C" __attribute__((visibility("hidden"))) EMULATED_CALLED void*
EMULATED_HIDDEN memcpy(void* to, const void* from, std::size_t size) noexcept
{
    return emulated_memmove(to, from, size, __builtin_return_address(0));
}
EMULATED_HIDDEN memmove(void* to, const void* from, std::size_t size) noexcept
{
    return emulated_memmove(to, from, size, __builtin_return_address(0));
}
EMULATED_HIDDEN memset(void* to, int value, std::size_t size) noexcept
{
    return emulated_memset(to, value, size, __builtin_return_address(0));
}
#endif
namespace std {
using ::emulated_memmove, ::emulated_memset;
}

// Barriers and fences.
EMULATED_INLINE void __syncthreads(unsigned line = __builtin_LINE()) { emulated_barrier(emulated::NO_VOTE, 0, line); }
EMULATED_INLINE int __syncthreads_count(int predicate, unsigned line = __builtin_LINE())
{
    return emulated_barrier(emulated::COUNT, predicate, line);
}
EMULATED_INLINE int __syncthreads_and(int predicate, unsigned line = __builtin_LINE())
{
    return emulated_barrier(emulated::AND, predicate, line);
}
EMULATED_INLINE int __syncthreads_or(int predicate, unsigned line = __builtin_LINE())
{
    return emulated_barrier(emulated::OR, predicate, line);
}
inline void __threadfence() { emulated_fence(emulated::OF_DEVICE); }
inline void __threadfence_block() { emulated_fence(emulated::OF_BLOCK); }
inline void __threadfence_system() { emulated_fence(emulated::OF_DEVICE); }
inline void __nanosleep(unsigned) {}
EMULATED_INLINE void __trap() { emulated_trap("__trap"); }

// Collectives of a warp.
EMULATED_INLINE void __syncwarp(unsigned mask = emulated_full_mask, unsigned line = __builtin_LINE())
{
    emulated_meet(emulated::SYNC, mask, nullptr, 0, line);
}
EMULATED_INLINE unsigned __activemask() { return emulated_activemask(); }

// What `from` brought; garbage, if it is not there or did not come.
template <class T> EMULATED_UNSEEN T emulated_brought(const emulated::Meeting* meeting, int from)
{
    T value;
    if (meeting->present >> from & 1)
        std::memcpy(&value, meeting->brought[from], sizeof value);
    else
        std::memset(&value, 0x7f, sizeof value);
    return value;
}
template <class T> EMULATED_CALLED T emulated_shuffle(unsigned mask, T value, int from, unsigned line)
{
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    return emulated_brought<T>(emulated_meet(emulated::SHUFFLE, mask, &value, sizeof value, line,
                                             __builtin_return_address(0)), from);
}
template <class T>
EMULATED_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32, unsigned line = __builtin_LINE())
{
    const int lane = (int)emulated_lane();
    return emulated_shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), line);
}
template <class T>
EMULATED_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, unsigned line = __builtin_LINE())
{
    const int lane = (int)emulated_lane(), from = lane - (int)delta;
    return emulated_shuffle(mask, value, from < (lane & ~(width - 1)) ? lane : from, line);
}
template <class T>
EMULATED_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, unsigned line = __builtin_LINE())
{
    const int lane = (int)emulated_lane(), from = lane + (int)delta;
    return emulated_shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, line);
}
template <class T>
EMULATED_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, unsigned line = __builtin_LINE())
{
    const int lane = (int)emulated_lane(), from = lane ^ lanes;
    return emulated_shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, line);
}

// What all lanes of the mask brought, put together by `step`, lane by lane.
template <class T, class R, class Step>
EMULATED_CALLED R emulated_over(emulated::Kind kind, unsigned mask, T value, unsigned line, R result, Step step)
{
    const emulated::Meeting* meeting = emulated_meet(kind, mask, &value, sizeof value, line, __builtin_return_address(0));
    for (int lane = 0; lane < 32; ++lane)
        if (meeting->present >> lane & 1) result = step(result, emulated_brought<T>(meeting, lane), lane);
    return result;
}
EMULATED_INLINE unsigned __ballot_sync(unsigned mask, int vote, unsigned line = __builtin_LINE())
{
    return emulated_over(emulated::VOTE, mask, vote, line, 0u,
                         [](unsigned votes, int v, int lane) EMULATED_UNSEEN { return votes | (v != 0 ? 1u << lane : 0u); });
}
EMULATED_INLINE int __any_sync(unsigned mask, int vote, unsigned line = __builtin_LINE())
{
    return emulated_over(emulated::VOTE, mask, vote, line, 0, [](int any, int v, int) EMULATED_UNSEEN { return any | (v != 0); });
}
EMULATED_INLINE int __all_sync(unsigned mask, int vote, unsigned line = __builtin_LINE())
{
    return emulated_over(emulated::VOTE, mask, vote, line, 1, [](int all, int v, int) EMULATED_UNSEEN { return all & (v != 0); });
}
template <class T> EMULATED_INLINE unsigned __match_any_sync(unsigned mask, T value, unsigned line = __builtin_LINE())
{
    return emulated_over(emulated::MATCH, mask, value, line, 0u, [value](unsigned same, T v, int lane) EMULATED_UNSEEN {
        return same | (std::memcmp(&v, &value, sizeof v) == 0 ? 1u << lane : 0u);
    });
}
#define EMULATED_REDUCE(name, types, start, expression)                                                        \
    template <class T> EMULATED_INLINE T name(unsigned mask, T value, unsigned line = __builtin_LINE())                 \
    {                                                                                                          \
        static_assert(types, "32-bit integers, as on the device");                                            \
        return emulated_over(emulated::REDUCE, mask, value, line, (T)(start),                                  \
                             [](T a, T b, int) EMULATED_UNSEEN { return (T)(expression); });                   \
    }
EMULATED_REDUCE(__reduce_add_sync, std::is_integral<T>::value && sizeof(T) == 4, 0, (unsigned)a + (unsigned)b)
EMULATED_REDUCE(__reduce_min_sync, std::is_integral<T>::value && sizeof(T) == 4,
                std::is_signed<T>::value ? (T)INT_MAX : (T)~0u, b < a ? b : a)
EMULATED_REDUCE(__reduce_max_sync, std::is_integral<T>::value && sizeof(T) == 4,
                std::is_signed<T>::value ? (T)INT_MIN : (T)0, a < b ? b : a)
EMULATED_REDUCE(__reduce_and_sync, (std::is_same<T, unsigned>::value), ~0u, a & b)
EMULATED_REDUCE(__reduce_or_sync, (std::is_same<T, unsigned>::value), 0, a | b)
EMULATED_REDUCE(__reduce_xor_sync, (std::is_same<T, unsigned>::value), 0, a ^ b)

// Atomics: of the whole machine, since blocks may run side by side. Each returns what was there before.
template <class T, class Step>
EMULATED_UNSEEN T emulated_atomic(T* address, const void* place, Step step)
{
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "atomics change 2, 4 or 8 bytes");
    if ((std::size_t)address % sizeof(T)) emulated_unaligned_atomic(address, sizeof(T), place);
    using Bits = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>>;
    emulated_touch(address, sizeof *address, emulated::ATOMIC, place);
    Bits before = __atomic_load_n((Bits*)address, __ATOMIC_SEQ_CST);
    for (;;) {
        T old, now;
        std::memcpy(&old, &before, sizeof old);
        now = step(old);
        Bits after;
        std::memcpy(&after, &now, sizeof after);
        if (__atomic_compare_exchange_n((Bits*)address, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return old;
    }
}
#define EMULATED_ATOMIC(name, expression)                                                                   \
    template <class T, class V> EMULATED_CALLED T name(T* address, V operand)     \
    {                                                                                                       \
        const T value = (T)operand;                                                                         \
        return emulated_atomic(address, __builtin_return_address(0),                                        \
                               [value](T old) EMULATED_UNSEEN { return (T)(expression); });                 \
    }
#define EMULATED_ATOMICS(name, expression) \
    EMULATED_ATOMIC(name, expression) EMULATED_ATOMIC(name##_block, expression) EMULATED_ATOMIC(name##_system, expression)
EMULATED_ATOMICS(atomicAdd, old + value)
EMULATED_ATOMICS(atomicSub, old - value)
EMULATED_ATOMICS(atomicExch, ((void)old, value))
EMULATED_ATOMICS(atomicMin, value < old ? value : old)
EMULATED_ATOMICS(atomicMax, old < value ? value : old)
EMULATED_ATOMICS(atomicAnd, old & value)
EMULATED_ATOMICS(atomicOr, old | value)
EMULATED_ATOMICS(atomicXor, old ^ value)
EMULATED_ATOMICS(atomicInc, old >= value ? 0 : old + 1)
EMULATED_ATOMICS(atomicDec, old == 0 || old > value ? value : old - 1)
template <class T, class A, class B>
EMULATED_CALLED T atomicCAS(T* address, A compare, B operand)
{
    const T expected = (T)compare, value = (T)operand;
    return emulated_atomic(address, __builtin_return_address(0), [=](T old) EMULATED_UNSEEN {
        return std::memcmp(&old, &expected, sizeof old) == 0 ? value : old;
    });
}

#include "ptx.hpp"

namespace emulated {

template <class... P, std::size_t... I>
EMULATED_UNSEEN void apply(void (*kernel)(P...), void** arguments, std::index_sequence<I...>)
{
    kernel(*(std::remove_cv_t<P>*)arguments[I]...);
}

template <auto kernel, class... P> Kernel describe(void (*)(P...), char* (*shared)(), char* (*dynamic)())
{
    static constexpr std::size_t sizes[] = {sizeof(P)..., 0};
    return {[](void** arguments) EMULATED_UNSEEN {
                apply((void (*)(P...))kernel, arguments, std::index_sequence_for<P...>());
            },
            sizeof...(P), sizes, shared, dynamic};
}

inline char* shared_memory()
{
    static thread_local char somewhere;
    return &somewhere;
}

}  // namespace emulated

// The compiler checks the alignment of each access (-fsanitize=alignment, at compile time only) and calls this.
extern "C" [[noreturn]] void emulated_misaligned(void* access, std::uintptr_t address);
extern "C" __attribute__((used, visibility("hidden"), noreturn)) EMULATED_UNSEEN void
__ubsan_handle_type_mismatch_v1_abort(void* access, std::uintptr_t address)
{
    emulated_misaligned(access, address);
}

inline char* emulated_no_dynamic() { return nullptr; }

// `dynamic` says where `extern __shared__` arrays begin.
#define EMULATED_KERNEL(name, dynamic)                               \
    extern "C" __attribute__((visibility("default"))) const emulated::Kernel emulated_kernel = \
        emulated::describe<&name>(&name, emulated::shared_memory, dynamic);
// All `extern __shared__` arrays begin at one address: their names are further names of this memory.
#define EMULATED_DYNAMIC_SHARED                                                                              \
    extern "C" {                                                                                             \
    alignas(1024) __attribute__((visibility("default"))) thread_local char                                   \
        emulated_dynamic_shared[emulated::DYNAMIC_SHARED];                                                   \
    }                                                                                                        \
    inline char* emulated_dynamic() { return emulated_dynamic_shared; }
#define EMULATED_DYNAMIC_NAME(name) asm(".globl " #name "\n.type " #name ", @tls_object\n.set " #name ", emulated_dynamic_shared");

#undef int64_t
#undef uint64_t
typedef long long int64_t;
typedef unsigned long long uint64_t;
namespace std {
using ::int64_t;
using ::uint64_t;
}

// From here on the kernel's own text.
#define memcpy emulated_memmove
#define memmove emulated_memmove
#define memset emulated_memset
#define __builtin_memcpy emulated_memmove
#define __builtin_memmove emulated_memmove
#define __builtin_memset emulated_memset
