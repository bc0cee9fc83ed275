// sequences.cuh: which tokens of a batch's query are whose, and which positions they see. Defined by the launch code: LENS_T,
// CU_T, BLOCK_SIZE.

constexpr int SPLIT = 256;  // positions whose sums are computed on their own, and then united left to right
constexpr long long MOST_POSITIONS = (1LL << 31) - SPLIT;

// Positions from `first` on, before `end`.
struct Interval {
    int first, end;
    __device__ __forceinline__ bool has(int p) const { return first <= p && p < end; }
    // Whether it has all positions from `a` on before `b`.
    __device__ __forceinline__ bool covers(int a, int b) const { return first <= a && b <= end; }
};

// Which positions the query tokens see, and where these stand: all that masks are.
struct Mask {
    long long left, right;
    long long seq_len, first_position;  // of the sequence's first query token

    __device__ __forceinline__ Interval of_token(long long token) const
    {
        const long long t = first_position + token;
        return {(int)max(0LL, t - left), (int)min(seq_len, t + right + 1)};
    }
};

// How many of `n` ascending numbers, which `number` gives, are at most `x`. All threads of the block come, and all know.
template <class Number> __device__ __forceinline__ int count_up_to(long long x, int n, const Number& number)
{
    int count = 0;
    for (int i = 0; i < n; i += blockDim.x) {
        const int mine = i + (int)threadIdx.x;
        count += __syncthreads_count(mine < n && number(mine) <= x);
    }
    return count;
}

// The sequences of a batch, and which tokens of the query are theirs. Without cu_seqlens each has one.
struct Sequences {
    const char *seq_lens, *cu_seqlens;
    long long lens_stride, cu_stride, num_seqs, num_tokens, max_blocks, left, right;

    // Anything outside the query counts as its nearest end.
    __device__ __forceinline__ long long first_token(long long seq) const
    {
        if (!cu_seqlens) return seq;
        return min(max((long long)*(const CU_T*)(cu_seqlens + seq * cu_stride), 0LL), num_tokens);
    }
    __device__ __forceinline__ long long tokens(long long seq) const { return first_token(seq + 1) - first_token(seq); }
    __device__ __forceinline__ Mask mask(long long seq) const
    {
        const long long seq_len = *(const LENS_T*)(seq_lens + seq * lens_stride);
        const long long held = max(0LL, min(min(seq_len, max_blocks * BLOCK_SIZE), MOST_POSITIONS));
        return {left, right, held, held - tokens(seq)};
    }
};
