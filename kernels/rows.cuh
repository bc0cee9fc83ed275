// rows.cuh: how the copy kernels move rows of bytes between places that are laid out differently.
//
// A warp moves a slice, 32 * UNROLL accesses of sizeof(ACCESS_T) bytes: lane l takes access l, l + 32, ... of it, so that
// neighbouring lanes touch neighbouring addresses, and has up to UNROLL loads in flight before its first store.
// Who includes this says where access i is read from and where it is written to, as two Runs, and defines ACCESS_T and
// UNROLL.

#include "ptx.cuh"

// OUTER x INNER runs of RUN accesses each, that lie `outer` and `inner` bytes apart; and so on for further rows, `row`
// bytes apart. Where all of it is contiguous, the host says 1 x 1 runs of the whole row, and all strides but `row` fall
// away at compile time. RUN, INNER and OUTER are constants, so no division is left but multiplications and shifts.
template <int OUTER, int INNER, int RUN, class Byte>
struct Runs {
    static constexpr int ROW = OUTER * INNER * RUN;
    Byte* base;
    long long row, outer, inner;

    __device__ __forceinline__ Byte* operator()(int access) const
    {
        const int run = access % ROW / RUN;
        return base + access / ROW * row + run / INNER * outer + run % INNER * inner
               + access % RUN * (int)sizeof(ACCESS_T);
    }
};

// Slices that `accesses` take.
__device__ constexpr int slices_of(int accesses) { return (accesses + 32 * UNROLL - 1) / (32 * UNROLL); }

// The number of the warp among all that copy the same tensor of a layer.
__device__ __forceinline__ long long warp_of_grid()
{
    return blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
}

// What one lane carries of a slice. Zeros, until it is loaded.
struct Carried {
    ACCESS_T accesses[UNROLL] = {};
    int first, end;

    // Of slice number `slice` of something that has `end` accesses.
    __device__ __forceinline__ Carried(int slice, int end) : first(slice * (32 * UNROLL) + threadIdx.x % 32), end(end) {}

    template <class From> __device__ __forceinline__ void load(const From& from)
    {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (first + u * 32 < end) load_now(accesses[u], (const ACCESS_T*)from(first + u * 32));
    }

    template <class To> __device__ __forceinline__ void store(const To& to) const
    {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (first + u * 32 < end) *(ACCESS_T*)to(first + u * 32) = accesses[u];
    }
};
