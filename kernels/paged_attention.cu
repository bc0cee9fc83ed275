// paged_attention: attention of new tokens over the K and V of their sequences, read from the pools by the block tables.
//
// Contract   Row (token, head) of out is softmax(scores) V over the positions that the token sees (sequences.cuh: Mask), its
//            score with position p being softmax_scale (q . k), capped, less ALiBi's slope times the distance. A row that sees
//            nothing is zeros. Where `scratch` is given, sums and values of each split of 256 positions are left there, and
//            merge_splits.cu makes the result of them. Nothing outside the pools is read: a block that is not there is
//            zeros. What a row does not see does not reach it, be it NaN.
// Layout     All strides are in bytes; K's and V's last axes are contiguous. ROWS rows are computed together, those of a KV
//            head: row r is token r / GROUP of the sequence, head r % GROUP of the group, so that a group reads K and V
//            once. 16 rows are a tile of the tensor cores.
// Launch     Grid (row tiles, KV heads x parts of V, z), blocks of four warps. Row tiles are numbered through all sequences;
//            some have no rows. Without scratch z is 1, and a block unites the splits of its rows as merge_splits would;
//            with scratch, block z takes the splits z, z + gridDim.z, ...
// Defined by the launch code: ELEMENT, TENSOR (by mma, or by multiplying and adding), HEAD_DIM, V_DIM, V_PART (columns of V
//            that a block has), V_IS_K (V is the beginning of K, and read with it), GROUP, BLOCK_SIZE, ROWS, TILE (positions
//            looked at together), STAGES, ACCESS (bytes that a copy can have), SOFTCAP, TABLE_T, LENS_T, CU_T.
//
//   split of 256 positions:  | tile | tile | tile | tile |     TILE positions each, at fixed places of the sequence
//   warps, for scores:       each has a fourth of the tile's positions, for all rows
//   warps, for values:       each has a fourth of V's columns, for all rows and positions
//
// Weights go from the one to the other through shared memory. So each element of K and V is read from shared memory once,
// whatever ROWS is; and what is added to what, in which order, does not depend on it, either: a token gets the same bits
// among 15 others or 63, in this launch or in another.
//
// The first kernel to read is the one without tensor cores (#else): the same steps by plain loops.

#include "attention.cuh"
#include "sequences.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW_TILES = ROWS / 16;
constexpr int SCORE_TILES = TILE / 8 / WARPS;                       // of 8 positions, of a warp
constexpr int VALUE_TILES = (V_PART + 8 * WARPS - 1) / (8 * WARPS); // of 8 columns of V, of a warp
constexpr int QUERY_BATCH = 16;                                     // elements that a thread asks for before it stores one
typedef ELEMENT::Bits Bits;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// 16 x 8 numbers of a warp, as mma leaves them: lane 4g + t has x[i] of row g + 8 (i / 2), column 2t + i % 2.
struct Accumulator {
    float x[4] = {};
    static __device__ __forceinline__ int row(int i) { return lane() / 4 + 8 * (i / 2); }
    static __device__ __forceinline__ int column(int i) { return 2 * (lane() % 4) + i % 2; }
};

// What is known of a row.
struct Row {
    Interval sees;
    int position;
    float slope;  // ALiBi's, in units of log 2
    int token, head;  // of the query; token -1 where there is no row
};

struct Scoring {
    float inner, outer;  // outer * tanh(inner * product), or outer * product
    bool slopes;

    __device__ __forceinline__ float operator()(float product, const Row& row, int p) const
    {
        const float x = SOFTCAP ? __fmul_rn(outer, tanhf(__fmul_rn(inner, product))) : __fmul_rn(outer, product);
        return slopes ? __fmaf_rn(-row.slope, (float)abs(row.position - p), x) : x;
    }
};

// Where the positions of a tile lie in the pools, in bytes from their beginnings; NOWHERE if no row sees one.
struct Places {
    long long k[TILE], v[TILE];
};
constexpr long long NOWHERE = -1;

// Chunks of 16 bytes in shared memory, in rows of CHUNKS. A row's chunks are permuted so that neither 8 chunks one after
// the other, as copies write them, nor a chunk of 8 rows, as ldmatrix reads them, share a bank. CHUNKS is even. The order
// repeats every 8 rows.
template <int CHUNKS> __device__ __forceinline__ int swizzled(int row, int chunk)
{
    constexpr int COMMON = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    return (row * CHUNKS + chunk) ^ row / (8 / COMMON) % COMMON;
}

#if TENSOR

constexpr int K_CHUNKS = HEAD_DIM / 8, V_CHUNKS = V_IS_K ? K_CHUNKS : V_DIM / 8, WEIGHT_CHUNKS = TILE / 8;

struct alignas(16) Chunk {
    Bits x[8];
};

struct Shared {
    Chunk query[ROWS * K_CHUNKS];
    Chunk weights[ROWS * WEIGHT_CHUNKS];
    Chunk k[STAGES][TILE * K_CHUNKS];
    Chunk v[V_IS_K ? 1 : STAGES][V_IS_K ? 1 : TILE * V_CHUNKS];
    Places places[2];
    Row rows[ROWS];
    Sum united[WARPS][ROWS];  // of the splits so far; each warp has its own, for want of registers
    float of_warps[WARPS][ROWS];

    __device__ __forceinline__ const Chunk* values(int stage) const { return V_IS_K ? k[stage] : v[stage]; }
    __device__ __forceinline__ void put_query(int row, int d, Bits x) { query[swizzled<K_CHUNKS>(row, d / 8)].x[d % 8] = x; }
    __device__ __forceinline__ void put_weights(int row, int p, float low, float high)
    {
        *(unsigned*)&weights[swizzled<WEIGHT_CHUNKS>(row, p / 8)].x[p % 8] = ELEMENT::round(low, high);
    }
};

// Fragments of a 16-row matrix and of an 8-column one, over 16 numbers of their common axis.
struct FragmentA {
    unsigned x[4];
    template <int CHUNKS> __device__ __forceinline__ void load(const Chunk* rows, int row, int chunk)
    {
        ldmatrix_x4(x, &rows[CHUNKS * row + swizzled<CHUNKS>(lane() % 16, chunk + lane() / 16)]);
    }
};
struct FragmentB {
    unsigned x[2];
};
__device__ __forceinline__ void multiply(Accumulator& d, const FragmentA& a, const FragmentB& b)
{
#if __CUDA_ARCH__ >= 800
    if constexpr (ELEMENT::EXPONENT == F16::EXPONENT)
        mma_m16n8k16_f16(d.x, a.x, b.x);
    else
        mma_m16n8k16_bf16(d.x, a.x, b.x);
#else
    const unsigned low[2] = {a.x[0], a.x[1]}, high[2] = {a.x[2], a.x[3]};
    mma_m16n8k8_f16(d.x, low, b.x[0]);
    mma_m16n8k8_f16(d.x, high, b.x[1]);
#endif
}

// A chunk, on its way: ACCESS bytes a copy. Copies of less than 4 bytes have no asynchronous form.
__device__ __forceinline__ void copy_chunk(Chunk* to, const char* from, bool there)
{
    if constexpr (ACCESS >= 4) {
#pragma unroll
        for (int i = 0; i < 16; i += ACCESS) cp_async<ACCESS>((char*)to + i, from + i, there ? ACCESS : 0);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) to->x[i] = there ? ((const Bits*)from)[i] : Bits(0);
    }
}
template <int CHUNKS> __device__ __forceinline__ void copy_tile(Chunk* to, const char* pool, const long long (&places)[TILE])
{
    static_assert(TILE * CHUNKS % THREADS == 0, "");  // chunks come in pairs, and positions by 32
#pragma unroll
    for (int first = 0; first < TILE * CHUNKS; first += THREADS) {
        const unsigned i = first + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
        const long long place = places[row];
        copy_chunk(&to[swizzled<CHUNKS>(row, chunk)], place == NOWHERE ? pool : pool + place + chunk * 16, place != NOWHERE);
    }
}
__device__ __forceinline__ void fetch(Shared& s, int stage, const Places& places, const char* k_pool, const char* v_pool)
{
    copy_tile<K_CHUNKS>(s.k[stage], k_pool, places.k);
    if constexpr (!V_IS_K) copy_tile<V_CHUNKS>(s.v[stage], v_pool, places.v);
}

// Products of all rows with the warp's positions.
__device__ __forceinline__ void products(
    Accumulator (&s)[ROW_TILES][SCORE_TILES], const Shared& shared, int stage, const Places&, const char*)
{
    const auto step = [&](int chunk, const FragmentB (&b)[SCORE_TILES]) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            FragmentA a;
            a.load<K_CHUNKS>(shared.query, 16 * r, chunk);
#pragma unroll
            for (int n = 0; n < SCORE_TILES; ++n) multiply(s[r][n], a, b[n]);
        }
    };
    const Chunk* keys = &shared.k[stage][warp() * (8 * SCORE_TILES) * K_CHUNKS];
#pragma unroll 2
    for (int chunk = 0; chunk + 4 <= K_CHUNKS; chunk += 4) {
        FragmentB low[SCORE_TILES], high[SCORE_TILES];
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n) {
            unsigned four[4];
            ldmatrix_x4(four, &keys[8 * n * K_CHUNKS + swizzled<K_CHUNKS>(lane() % 8, chunk + lane() / 8)]);
            low[n] = {four[0], four[1]};
            high[n] = {four[2], four[3]};
        }
        step(chunk, low);
        step(chunk + 2, high);
    }
    if constexpr (K_CHUNKS % 4 != 0) {
        FragmentB last[SCORE_TILES];
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
            ldmatrix_x2(last[n].x, &keys[8 * n * K_CHUNKS + swizzled<K_CHUNKS>(lane() % 8, K_CHUNKS - 2 + lane() / 8 % 2)]);
        step(K_CHUNKS - 2, last);
    }
}

// Of a pair of numbers, those that are inf or NaN, or the others; zeros in place of the rest.
__device__ __forceinline__ bool is_finite(unsigned bits) { return (bits & ELEMENT::EXPONENT) != ELEMENT::EXPONENT; }
__device__ __forceinline__ bool both_finite(unsigned pair) { return is_finite(pair) && is_finite(pair >> 16); }
__device__ __forceinline__ unsigned only_finite(unsigned pair)
{
    return (is_finite(pair) ? pair & 0xffffu : 0u) | (is_finite(pair >> 16) ? pair & 0xffff0000u : 0u);
}

// Whether the tile's V has neither inf nor NaN. All threads come.
__device__ __forceinline__ bool all_finite(const Shared& shared, int stage)
{
    bool mine = true;
    for (int i = threadIdx.x; i < TILE * V_CHUNKS; i += THREADS) {
        const uint4 x = *(const uint4*)&shared.values(stage)[i];
        mine = mine && both_finite(x.x) && both_finite(x.y) && both_finite(x.z) && both_finite(x.w);
    }
    return __syncthreads_and(mine);
}

// o += weights V, for the warp's columns. Without `sifted`, 0 * NaN would put into a row what it does not see.
template <bool SIFTED>
__device__ __forceinline__ void add_values(Accumulator (&o)[ROW_TILES][VALUE_TILES], const Shared& shared, int stage)
{
#pragma unroll
    for (int p = 0; p < TILE; p += 16) {
        FragmentA a[ROW_TILES];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) a[r].load<WEIGHT_CHUNKS>(shared.weights, 16 * r, p / 8);
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n) {
            const int chunk = warp() * VALUE_TILES + n;
            if (chunk >= V_DIM / 8) break;
            FragmentB b;
            ldmatrix_trans_x2(b.x, &shared.values(stage)[p * V_CHUNKS + swizzled<V_CHUNKS>(lane() % 16, chunk)]);
            if constexpr (SIFTED)
                for (unsigned& pair : b.x) pair = only_finite(pair);
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) multiply(o[r][n], a[r], b);
        }
    }
}

// What `add_values<true>` left out, for those rows that see it.
__device__ __forceinline__ void add_others(Accumulator (&o)[ROW_TILES][VALUE_TILES], const Shared& shared, int stage, int first)
{
    for (int p = 0; p < TILE; ++p)
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = 8 * (warp() * VALUE_TILES + n) + Accumulator::column(i);
                if (column >= V_DIM) continue;
                const Bits v = shared.values(stage)[swizzled<V_CHUNKS>(p, column / 8)].x[column % 8];
                if (is_finite(v)) continue;
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) {
                    const int row = 16 * r + Accumulator::row(i);
                    const Bits weight = shared.weights[swizzled<WEIGHT_CHUNKS>(row, p / 8)].x[p % 8];
                    if (shared.rows[row].sees.has(first + p))
                        o[r][n].x[i] = __fmaf_rn(ELEMENT::get(weight), ELEMENT::get(v), o[r][n].x[i]);
                }
            }
}

// `same`: all rows see all positions that any of them sees, and the others are zeros.
__device__ __forceinline__ void values(Accumulator (&o)[ROW_TILES][VALUE_TILES], const Shared& shared, int stage,
                                       const Places&, const char*, int first, bool same)
{
    if (same || all_finite(shared, stage)) {
        add_values<false>(o, shared, stage);
    } else {
        add_values<true>(o, shared, stage);
        add_others(o, shared, stage, first);
    }
}

#else  // plain loops, straight from the pools: what shared memory would save, the first cache has

struct Shared {
    static constexpr int PITCH = HEAD_DIM + 4;  // or rows would share banks
    float query[ROWS][PITCH];
    float weights[ROWS][TILE + 4];
    Places places[2];
    Row rows[ROWS];
    Sum united[WARPS][ROWS];  // of the splits so far; each warp has its own, for want of registers
    float of_warps[WARPS][ROWS];

    __device__ __forceinline__ void put_query(int row, int d, Bits x) { query[row][d] = ELEMENT::get(x); }
    __device__ __forceinline__ void put_weights(int row, int p, float low, float high)
    {
        weights[row][p] = low;
        weights[row][p + 1] = high;
    }
};

__device__ __forceinline__ void fetch(Shared&, int, const Places&, const char*, const char*) {}

// Elements that lie one after the other, in one access.
template <int N> struct alignas(N * sizeof(Bits)) Elements {
    Bits x[N];
};
constexpr int K_WIDTH = ACCESS / sizeof(Bits);
constexpr int V_WIDTH = ACCESS >= 2 * sizeof(Bits) ? 2 : 1;

__device__ __forceinline__ void products(
    Accumulator (&s)[ROW_TILES][SCORE_TILES], const Shared& shared, int, const Places& places, const char* k_pool)
{
    const Bits* keys[SCORE_TILES][2];
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const long long place = places.k[8 * (warp() * SCORE_TILES + n) + Accumulator::column(j)];
            keys[n][j] = place == NOWHERE ? nullptr : (const Bits*)(k_pool + place);
        }
    for (int d = 0; d < HEAD_DIM; d += K_WIDTH) {
        Elements<K_WIDTH> k[SCORE_TILES][2];
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) k[n][j] = keys[n][j] ? *(const Elements<K_WIDTH>*)(keys[n][j] + d) : Elements<K_WIDTH>{};
#pragma unroll
        for (int e = 0; e < K_WIDTH; ++e)
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float q = shared.query[16 * r + Accumulator::row(i)][d + e];
#pragma unroll
                    for (int n = 0; n < SCORE_TILES; ++n)
                        s[r][n].x[i] = __fmaf_rn(q, ELEMENT::get(k[n][i % 2].x[e]), s[r][n].x[i]);
                }
    }
}

__device__ __forceinline__ void values(Accumulator (&o)[ROW_TILES][VALUE_TILES], const Shared& shared, int,
                                       const Places& places, const char* v_pool, int first, bool)
{
    const int part = blockIdx.y % ((V_DIM + V_PART - 1) / V_PART) * V_PART;
    for (int p = 0; p < TILE; ++p) {
        const long long place = places.v[p];
        if (place == NOWHERE) continue;
        float v[VALUE_TILES][2] = {};
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 2; j += V_WIDTH) {
                const int column = part + 8 * (warp() * VALUE_TILES + n) + Accumulator::column(j);
                if (column >= V_DIM) continue;
                const Elements<V_WIDTH> x = *(const Elements<V_WIDTH>*)((const Bits*)(v_pool + place) + column);
#pragma unroll
                for (int e = 0; e < V_WIDTH; ++e) v[n][j + e] = ELEMENT::get(x.x[e]);
            }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 16 * r + Accumulator::row(i);
                if (!shared.rows[row].sees.has(first + p)) continue;
                const float weight = shared.weights[row][p];
#pragma unroll
                for (int n = 0; n < VALUE_TILES; ++n) o[r][n].x[i] = __fmaf_rn(weight, v[n][i % 2], o[r][n].x[i]);
            }
    }
}

#endif

// The greatest, or the sum, over the four lanes that have numbers of the same row.
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Rows 16 r + g + 8 half of a lane, and what they come to.
struct Sums {
    Sum of[ROW_TILES][2];
    static __device__ __forceinline__ int row(int r, int half) { return 16 * r + lane() / 4 + 8 * half; }
};

// The online softmax: scores become weights, in shared memory, relative to the greatest score so far; what was there before
// is scaled to that. `sums` has the lane's share of the totals.
__device__ __forceinline__ void online_softmax(Accumulator (&s)[ROW_TILES][SCORE_TILES], Sums& sums,
                                               Accumulator (&o)[ROW_TILES][VALUE_TILES], Shared& shared)
{
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = -INF;
#pragma unroll
            for (int n = 0; n < SCORE_TILES; ++n) most = fmaxf(most, fmaxf(s[r][n].x[2 * half], s[r][n].x[2 * half + 1]));
            most = quad_max(most);
            if (lane() % 4 == 0) shared.of_warps[warp()][Sums::row(r, half)] = most;
        }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = Sums::row(r, half);
            Sum& sum = sums.of[r][half];
            float most = sum.most;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared.of_warps[w][row]);
            const float shift = shift_of(most), before = ex2_approx(sum.most - shift);
            float total = 0;
#pragma unroll
            for (int n = 0; n < SCORE_TILES; ++n) {
                const float low = ex2_approx(s[r][n].x[2 * half] - shift), high = ex2_approx(s[r][n].x[2 * half + 1] - shift);
                shared.put_weights(row, 8 * (warp() * SCORE_TILES + n) + Accumulator::column(0), low, high);
                total += low + high;
            }
            sum.most = most;
            sum.total = __fmaf_rn(sum.total, before, total);
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) o[r][n].x[2 * half + j] = __fmul_rn(o[r][n].x[2 * half + j], before);
        }
    __syncthreads();
}

// From the lanes' shares of the totals to the totals, which all lanes of a row know. All threads come.
__device__ __forceinline__ void add_shares(Sums& sums, Shared& shared)
{
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = quad_sum(sums.of[r][half].total);
            if (lane() % 4 == 0) shared.of_warps[warp()][Sums::row(r, half)] = total;
        }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total += shared.of_warps[w][Sums::row(r, half)];
            sums.of[r][half].total = total;
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) paged_attention(
    const char* query, long long query_token, long long query_head, long long query_dim,
    const char* k_cache, long long k_block, long long k_slot, long long k_head,
    const char* v_cache, long long v_block, long long v_slot, long long v_head, long long num_blocks,
    const char* block_tables, long long table_stride, long long entry_stride, long long max_blocks,
    const char* seq_lens, long long lens_stride, const char* cu_seqlens, long long cu_stride,
    long long num_seqs, long long num_tokens, long long num_heads, long long left, long long right, float inner, float outer,
    const char* alibi_slopes, long long slope_stride, const char* sinks, long long sink_stride,
    char* out, long long out_token, long long out_head, long long out_dim,
    char* lse, long long lse_token, long long lse_head, float* scratch, long long num_splits)
{
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *(Shared*)memory;
    constexpr int PARTS = (V_DIM + V_PART - 1) / V_PART;
    const int kv_head = blockIdx.y / PARTS, part = blockIdx.y % PARTS * V_PART;
    const char *k_pool = k_cache + kv_head * k_head, *v_pool = v_cache + kv_head * v_head;
    const Sequences sequences{seq_lens, cu_seqlens, lens_stride, cu_stride, num_seqs, num_tokens, max_blocks,
                              left, right};

    // Which rows. The last row tiles of a sequence see most, and begin first. Tile numbers of sequence i begin at
    // tokens before it * GROUP / ROWS + i: no sequence needs more than it has until the next one's begin.
    const long long number = gridDim.x - 1 - blockIdx.x;
    const auto first_tile = [&](long long seq) { return sequences.first_token(seq) * GROUP / ROWS + seq; };
    const long long seq = cu_seqlens ? count_up_to(number, (int)num_seqs, first_tile) - 1 : number / ((GROUP + ROWS - 1) / ROWS);
    if (seq < 0) return;
    const long long first_row = ROWS * (cu_seqlens ? number - first_tile(seq) : number % ((GROUP + ROWS - 1) / ROWS));
    const long long num_rows = sequences.tokens(seq) * GROUP, first_token = sequences.first_token(seq);
    if (first_row < 0 || first_row >= num_rows) return;  // negative where cu_seqlens does not ascend
    const Mask mask = sequences.mask(seq);

    for (int row = threadIdx.x; row < ROWS; row += THREADS) {
        const long long token = (first_row + row) / GROUP;
        const bool exists = first_row + row < num_rows;
        const int head = (int)(kv_head * GROUP + (first_row + row) % GROUP);
        shared.rows[row] = {exists ? mask.of_token(token) : Interval{0, 0}, (int)(mask.first_position + token),
                            alibi_slopes ? __fmul_rn(LOG2_E, *(const float*)(alibi_slopes + head * slope_stride)) : 0.f,
                            exists ? (int)(first_token + token) : -1, head};
        for (int w = 0; w < WARPS; ++w) shared.united[w][row] = Sum();
    }
    // What any of the rows sees, and what all of them see.
    const Interval of_first = mask.of_token(first_row / GROUP);
    const Interval of_last = mask.of_token((min(first_row + ROWS, num_rows) - 1) / GROUP);
    const Interval any{of_first.first, of_last.end}, all{of_last.first, of_first.end};

    // Which tiles: those of the splits that are this block's.
    constexpr int TILES = SPLIT / TILE;
    const auto next = [](int tile) { return (tile + 1) % TILES ? tile + 1 : tile + 1 + ((int)gridDim.z - 1) * TILES; };
    const int end = (any.end + TILE - 1) / TILE;
    int tile = max(any.first / TILE, (any.first / SPLIT + (int)blockIdx.z) * TILES);
    int ahead = tile;
    if (scratch && tile >= end) return;

    // Each of the first TILE threads has one position of a tile.
    const char* table = block_tables + seq * table_stride;
    const auto position = [](int tile) { return (int)((unsigned)tile * TILE + threadIdx.x); };  // past the end it may wrap
    const auto block_of = [&](int tile) {
        const bool wanted = threadIdx.x < TILE && any.has(position(tile));
        return wanted ? (long long)*(const TABLE_T*)(table + position(tile) / BLOCK_SIZE * entry_stride) : -1;
    };
    const auto put_places = [&](Places& places, int tile, long long block) {
        if (threadIdx.x >= TILE) return;
        const int slot = position(tile) % BLOCK_SIZE;
        const bool there = 0 <= block && block < num_blocks;
        places.k[threadIdx.x] = there ? block * k_block + slot * k_slot : NOWHERE;
        places.v[threadIdx.x] = there ? block * v_block + slot * v_slot : NOWHERE;
    };
    // STAGES tiles are on their way before they are needed, and the blocks of one more are known: where a load is followed by
    // what needs it, a warp waits.
    long long blocks[STAGES + 1];
#pragma unroll
    for (int i = 0, t = tile; i <= STAGES; ++i, t = next(t)) blocks[i] = block_of(t);
#pragma unroll
    for (int i = 0; i < STAGES; ++i, ahead = next(ahead)) put_places(shared.places[i], ahead, blocks[i]);
    long long block_ahead = blocks[STAGES];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        fetch(shared, i, shared.places[i], k_pool, v_pool);
        cp_async_commit();
    }
    for (int first = threadIdx.x; first < ROWS * HEAD_DIM; first += QUERY_BATCH * THREADS) {
        Bits elements[QUERY_BATCH];
#pragma unroll
        for (int j = 0; j < QUERY_BATCH; ++j) {
            const int i = first + j * THREADS;
            if (i >= ROWS * HEAD_DIM) break;
            const Row& row = shared.rows[i / HEAD_DIM];
            const char* q = query + row.token * query_token + row.head * query_head + i % HEAD_DIM * query_dim;
            elements[j] = row.token >= 0 ? *(const Bits*)q : Bits(0);
        }
#pragma unroll
        for (int j = 0; j < QUERY_BATCH; ++j) {
            const int i = first + j * THREADS;
            if (i < ROWS * HEAD_DIM) shared.put_query(i / HEAD_DIM, i % HEAD_DIM, elements[j]);
        }
    }

    const Scoring scoring{inner, outer, alibi_slopes != nullptr};
    Accumulator o[ROW_TILES][VALUE_TILES], united_o[ROW_TILES][VALUE_TILES];
    Sums sums;
    for (int i = 0; tile < end; ++i, tile = next(tile), ahead = next(ahead)) {
        const int stage = i % STAGES, first = tile * TILE;
        const Places &here = shared.places[i % 2], &next_places = shared.places[(i + STAGES) % 2];
        cp_async_wait<STAGES - 1>();
        __syncthreads();  // the tile is there, and so is, at first, the query
        put_places(shared.places[(i + STAGES) % 2], ahead, block_ahead);
        block_ahead = block_of(next(ahead));

        Accumulator s[ROW_TILES][SCORE_TILES];
        products(s, shared, stage, here, k_pool);
        const bool seen = all.covers(first, first + TILE);
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                const Row& row = shared.rows[16 * r + Accumulator::row(l)];
#pragma unroll
                for (int n = 0; n < SCORE_TILES; ++n) {
                    const int p = first + 8 * (warp() * SCORE_TILES + n) + Accumulator::column(l);
                    s[r][n].x[l] = seen || row.sees.has(p) ? scoring(s[r][n].x[l], row, p) : -INF;
                }
            }
        online_softmax(s, sums, o, shared);
        values(o, shared, stage, here, v_pool, first, all.covers(max(first, any.first), min(first + TILE, any.end)));
        __syncthreads();  // nobody needs the tile any more
        fetch(shared, stage, next_places, k_pool, v_pool);
        cp_async_commit();

        if ((tile + 1) % TILES && tile + 1 < end) continue;
        add_shares(sums, shared);
        const long long slot = tile / TILES % num_splits;
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Row& row = shared.rows[Sums::row(r, half)];
                Sum& sum = sums.of[r][half];
                Sum& so_far = shared.united[warp()][Sums::row(r, half)];
                const United both = unite(so_far, sum);
                float* of_row = nullptr;
                if (scratch) of_row = scratch + ((slot * num_tokens + row.token) * num_heads + row.head) * (V_DIM + 2);
#pragma unroll
                for (int n = 0; n < VALUE_TILES; ++n) {
                    const int column = part + 8 * (warp() * VALUE_TILES + n) + Accumulator::column(0);
                    float &low = o[r][n].x[2 * half], &high = o[r][n].x[2 * half + 1];
                    if (!scratch) {
                        united_o[r][n].x[2 * half] = both.values(united_o[r][n].x[2 * half], low);
                        united_o[r][n].x[2 * half + 1] = both.values(united_o[r][n].x[2 * half + 1], high);
                    } else if (row.token >= 0 && column + 1 < V_DIM && V_DIM % 2 == 0) {
                        *(float2*)(of_row + 2 + column) = make_float2(low, high);
                    } else if (row.token >= 0) {
                        if (column < V_DIM) of_row[2 + column] = low;
                        if (column + 1 < V_DIM) of_row[2 + column + 1] = high;
                    }
                    low = high = 0;
                }
                if (scratch && row.token >= 0 && part == 0 && warp() == 0 && lane() % 4 == 0) {
                    of_row[0] = sum.most;
                    of_row[1] = sum.total;
                }
                __syncwarp();
                if (lane() % 4 == 0) so_far = both.sum;
                sum = Sum();
            }
    }
    cp_async_wait_all();
    if (scratch) return;
    __syncwarp();  // for the warp's own united sums

#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row& row = shared.rows[Sums::row(r, half)];
            if (row.token < 0) continue;
            const Sum sum = shared.united[warp()][Sums::row(r, half)];
            const End ends = sinks ? end_of(sum, *(const float*)(sinks + row.head * sink_stride)) : end_of(sum);
            char* of_row = out + row.token * out_token + row.head * out_head;
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int column = part + 8 * (warp() * VALUE_TILES + n) + Accumulator::column(j);
                    if (column < V_DIM)
                        *(Bits*)(of_row + column * out_dim) = ELEMENT::round(ends.value(united_o[r][n].x[2 * half + j]));
                }
            if (lse && part == 0 && warp() == 0 && lane() % 4 == 0)
                *(float*)(lse + row.token * lse_token + row.head * lse_head) = ends.lse;
        }
}
