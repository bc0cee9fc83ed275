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
//            that a block has), V_IS_K (V is the beginning of K, and read with it), GROUP, BLOCK_SIZE, ROWS (16, 32 or 64),
//            TILE (positions looked at together), STAGES, ACCESS (bytes of K and V that a copy can have), QUERY_ACCESS (the
//            same of the query), SOFTCAP, TABLE_T, LENS_T, CU_T.
//
//   split of 256 positions:  | tile | tile | tile | tile |     TILE positions each, at fixed places of the sequence
//   a warp has 16 rows. Warps that have the same, COLUMN_WARPS of them, share the columns:
//   for scores               those of the tile's positions
//   for values               those of V
//
// Weights go from the one to the other through shared memory. What is added to what, in which order, does not depend on ROWS:
// a fourth of a tile's positions has a sum of its own, whosever it is. So a token gets the same bits among 15 others or 63,
// in this launch or in another.
//
// Three blocks a multiprocessor (the second launch bound), as many as shared memory has room for with head_dims of 128, leave a
// thread 168 registers. Where it has more accumulators, it needs them all.
//
// The first kernel to read is the one without tensor cores (#else): the same steps by plain loops.

#include "attention.cuh"
#include "sequences.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW_WARPS = ROWS / 16, COLUMN_WARPS = WARPS / ROW_WARPS;
constexpr int SCORE_TILES = TILE / 8 / COLUMN_WARPS;                              // of 8 positions, of a warp
constexpr int VALUE_TILES = (V_PART + 8 * COLUMN_WARPS - 1) / (8 * COLUMN_WARPS); // of 8 columns of V, of a warp
constexpr int SHARES = ROW_WARPS;                                                 // fourths of a tile, of a warp
typedef ELEMENT::Bits Bits;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int first_row_of_warp() { return threadIdx.x / 32 / COLUMN_WARPS * 16; }
__device__ __forceinline__ int column_warp() { return threadIdx.x / 32 % COLUMN_WARPS; }

// For the warps that have the same rows, at least.
__device__ __forceinline__ void sync_rows()
{
    if constexpr (COLUMN_WARPS == 1)
        __syncwarp();
    else
        __syncthreads();
}

// 16 x 8 numbers of a warp, as mma leaves them: lane 4g + t has x[i] of row g + 8 (i / 2), column 2t + i % 2. row(i) is that
// row among the block's.
struct Accumulator {
    float x[4] = {};
    static __device__ __forceinline__ int row(int i) { return first_row_of_warp() + lane() / 4 + 8 * (i / 2); }
    static __device__ __forceinline__ int column(int i) { return 2 * (lane() % 4) + i % 2; }
};

// Elements that lie one after the other, in one access.
template <int N> struct alignas(N * sizeof(Bits)) Elements {
    Bits x[N];
};
constexpr int QUERY_WIDTH = QUERY_ACCESS / sizeof(Bits);

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
    Sum united[COLUMN_WARPS][ROWS];  // of the splits so far; each warp has its own, for want of registers
    float of_fourths[WARPS][ROWS];

    __device__ __forceinline__ const Chunk* values(int stage) const { return V_IS_K ? k[stage] : v[stage]; }
    __device__ __forceinline__ void put_query(int row, int d, const Elements<QUERY_WIDTH>& x)
    {
        *(Elements<QUERY_WIDTH>*)&query[swizzled<K_CHUNKS>(row, d / 8)].x[d % 8] = x;
    }
    __device__ __forceinline__ void put_weights(int row, int p, float low, float high)
    {
        *(unsigned*)&weights[swizzled<WEIGHT_CHUNKS>(row, p / 8)].x[p % 8] = ELEMENT::round(low, high);
    }
};

// Of a 16-row matrix, over 16 numbers of the axis that it has in common with an 8-column one.
struct FragmentA {
    unsigned x[4];
};
template <int CHUNKS> __device__ __forceinline__ FragmentA of_rows(const Chunk* rows, int chunk)  // the warp's
{
    FragmentA a;
    ldmatrix_x4(a.x, &rows[CHUNKS * first_row_of_warp() + swizzled<CHUNKS>(lane() % 16, chunk + lane() / 16)]);
    return a;
}
__device__ __forceinline__ void multiply(Accumulator& d, const FragmentA& a, unsigned b0, unsigned b1)
{
#if __CUDA_ARCH__ >= 800
    const unsigned b[2] = {b0, b1};
    if constexpr (ELEMENT::EXPONENT == F16::EXPONENT)
        mma_m16n8k16_f16(d.x, a.x, b);
    else
        mma_m16n8k16_bf16(d.x, a.x, b);
#else
    const unsigned low[2] = {a.x[0], a.x[1]}, high[2] = {a.x[2], a.x[3]};
    mma_m16n8k8_f16(d.x, low, b0);
    mma_m16n8k8_f16(d.x, high, b1);
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
// WHOLE: all positions are in the pool.
template <int CHUNKS, bool WHOLE>
__device__ __forceinline__ void copy_tile(Chunk* to, const char* pool, const long long (&places)[TILE])
{
    constexpr int ALL = TILE * CHUNKS, BATCH = ALL % THREADS ? 2 : 8;
#pragma unroll 1
    for (int first = 0; first < ALL; first += BATCH * THREADS) {
        const auto exists = [&](int j) { return first + j * THREADS + (ALL % THREADS ? (int)threadIdx.x : 0) < ALL; };
        // A load that stands behind a copy waits for it to be begun: hence all loads first.
        long long place[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j)
            if (exists(j)) place[j] = places[(first + j * THREADS + threadIdx.x) / CHUNKS];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            if (!exists(j)) break;
            const unsigned i = first + j * THREADS + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
            const bool there = WHOLE || place[j] != NOWHERE;
            copy_chunk(&to[swizzled<CHUNKS>(row, chunk)], pool + (there ? place[j] : 0) + chunk * 16, there);
        }
    }
}
template <bool WHOLE>
__device__ __forceinline__ void fetch(Shared& s, int stage, const Places& places, const char* k_pool, const char* v_pool)
{
    copy_tile<K_CHUNKS, WHOLE>(s.k[stage], k_pool, places.k);
    if constexpr (!V_IS_K) copy_tile<V_CHUNKS, WHOLE>(s.v[stage], v_pool, places.v);
}

// Products of the warp's rows with its positions.
__device__ __forceinline__ void products(
    Accumulator (&s)[SCORE_TILES], const Shared& shared, int stage, const Places&, const char*, int)
{
    const Chunk* keys = &shared.k[stage][column_warp() * (8 * SCORE_TILES) * K_CHUNKS];
    // A head_dim of 128 as a whole, so that the places of chunks are constants: on an H100 4% of prefill.
#pragma unroll(K_CHUNKS <= 16 ? 4 : 2)
    for (int chunk = 0; chunk + 4 <= K_CHUNKS; chunk += 4) {
        const FragmentA low = of_rows<K_CHUNKS>(shared.query, chunk), high = of_rows<K_CHUNKS>(shared.query, chunk + 2);
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n) {
            unsigned b[4];
            ldmatrix_x4(b, &keys[8 * n * K_CHUNKS + swizzled<K_CHUNKS>(lane() % 8, chunk + lane() / 8)]);
            multiply(s[n], low, b[0], b[1]);
            multiply(s[n], high, b[2], b[3]);
        }
    }
    if constexpr (K_CHUNKS % 4 != 0) {
        const FragmentA last = of_rows<K_CHUNKS>(shared.query, K_CHUNKS - 2);
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n) {
            unsigned b[2];
            ldmatrix_x2(b, &keys[8 * n * K_CHUNKS + swizzled<K_CHUNKS>(lane() % 8, K_CHUNKS - 2 + lane() / 8 % 2)]);
            multiply(s[n], last, b[0], b[1]);
        }
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

// o += weights V, for the warp's rows and columns. Unless SIFTED, 0 * NaN would put into a row what it does not see.
constexpr bool FULL = COLUMN_WARPS * VALUE_TILES == V_DIM / 8;  // each warp has all of its columns
template <bool SIFTED, int AT_ONCE = FULL && VALUE_TILES % 2 == 0 ? 2 : 1>
__device__ __forceinline__ void add_values(Accumulator (&o)[VALUE_TILES], const Shared& shared, int stage)
{
#pragma unroll
    for (int p = 0; p < TILE; p += 16) {
        const FragmentA a = of_rows<WEIGHT_CHUNKS>(shared.weights, p / 8);
#pragma unroll
        for (int n = 0; n < VALUE_TILES; n += AT_ONCE) {
            const int chunk = column_warp() * VALUE_TILES + n;
            if (!FULL && chunk >= V_DIM / 8) break;
            unsigned b[2 * AT_ONCE];
            const Chunk* of_lane = &shared.values(stage)[p * V_CHUNKS];
            if constexpr (AT_ONCE == 2)
                ldmatrix_trans_x4(b, &of_lane[swizzled<V_CHUNKS>(lane() % 16, chunk + lane() / 16)]);
            else
                ldmatrix_trans_x2(b, &of_lane[swizzled<V_CHUNKS>(lane() % 16, chunk)]);
            if constexpr (SIFTED)
                for (unsigned& pair : b) pair = only_finite(pair);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) multiply(o[n + j], a, b[2 * j], b[2 * j + 1]);
        }
    }
}

// What `add_values<true>` left out, for those rows that see it.
__device__ __forceinline__ void add_others(Accumulator (&o)[VALUE_TILES], const Shared& shared, int stage, int first)
{
    for (int p = 0; p < TILE; ++p)
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = 8 * (column_warp() * VALUE_TILES + n) + Accumulator::column(i);
                if (column >= V_DIM) continue;
                const Bits v = shared.values(stage)[swizzled<V_CHUNKS>(p, column / 8)].x[column % 8];
                if (is_finite(v)) continue;
                const int row = Accumulator::row(i);
                const Bits weight = shared.weights[swizzled<WEIGHT_CHUNKS>(row, p / 8)].x[p % 8];
                if (shared.rows[row].sees.has(first + p))
                    o[n].x[i] = __fmaf_rn(ELEMENT::get(weight), ELEMENT::get(v), o[n].x[i]);
            }
}

// `same`: all rows see all positions that any of them sees, and the others are zeros.
__device__ __forceinline__ void values(Accumulator (&o)[VALUE_TILES], const Shared& shared, int stage,
                                       const Places&, const char*, int, int first, bool same)
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
    Sum united[COLUMN_WARPS][ROWS];  // of the splits so far; each warp has its own, for want of registers
    float of_fourths[WARPS][ROWS];

    __device__ __forceinline__ void put_query(int row, int d, const Elements<QUERY_WIDTH>& x)
    {
        for (int i = 0; i < QUERY_WIDTH; ++i) query[row][d + i] = ELEMENT::get(x.x[i]);
    }
    __device__ __forceinline__ void put_weights(int row, int p, float low, float high)
    {
        weights[row][p] = low;
        weights[row][p + 1] = high;
    }
};

template <bool> __device__ __forceinline__ void fetch(Shared&, int, const Places&, const char*, const char*) {}

constexpr int K_WIDTH = ACCESS / sizeof(Bits);
constexpr int V_WIDTH = ACCESS >= 2 * sizeof(Bits) ? 2 : 1;

// Of the query: as many elements as an access of K has.
struct alignas(K_WIDTH < 4 ? 4 * K_WIDTH : 16) Floats {
    float x[K_WIDTH];
};

// HALVES: 1 where the warp has no more than 8 rows. Of what a decoding sequence needs, many loads are on their way before
// the first of them is waited for.
template <int HALVES>
__device__ __forceinline__ void products_of(Accumulator (&s)[SCORE_TILES], const Shared& shared,
                                            const Bits* const (&keys)[SCORE_TILES][2])
{
#pragma unroll(SCORE_TILES == 1 ? 8 : 1)
    for (int d = 0; d < HEAD_DIM; d += K_WIDTH) {
        Elements<K_WIDTH> k[SCORE_TILES][2];
        Floats q[HALVES];
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) k[n][j] = keys[n][j] ? *(const Elements<K_WIDTH>*)(keys[n][j] + d) : Elements<K_WIDTH>{};
#pragma unroll
        for (int half = 0; half < HALVES; ++half) q[half] = *(const Floats*)&shared.query[Accumulator::row(2 * half)][d];
#pragma unroll
        for (int e = 0; e < K_WIDTH; ++e)
#pragma unroll
            for (int i = 0; i < 2 * HALVES; ++i)
#pragma unroll
                for (int n = 0; n < SCORE_TILES; ++n)
                    s[n].x[i] = __fmaf_rn(q[i / 2].x[e], ELEMENT::get(k[n][i % 2].x[e]), s[n].x[i]);
    }
}
__device__ __forceinline__ void products(Accumulator (&s)[SCORE_TILES], const Shared& shared, int, const Places& places,
                                         const char* k_pool, int num_rows)
{
    const Bits* keys[SCORE_TILES][2];
#pragma unroll
    for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const long long place = places.k[8 * (column_warp() * SCORE_TILES + n) + Accumulator::column(j)];
            keys[n][j] = place == NOWHERE ? nullptr : (const Bits*)(k_pool + place);
        }
    if (num_rows <= 8)
        products_of<1>(s, shared, keys);
    else
        products_of<2>(s, shared, keys);
}

template <int HALVES>
__device__ __forceinline__ void add_values(Accumulator (&o)[VALUE_TILES], const Shared& shared, const Places& places,
                                           const char* v_pool, int first, bool same)
{
    constexpr int BATCH = VALUE_TILES <= 4 ? 8 : 1;
    const int part = blockIdx.y % ((V_DIM + V_PART - 1) / V_PART) * V_PART;
    for (int begin = 0; begin < TILE; begin += BATCH) {
        Elements<V_WIDTH> v[BATCH][VALUE_TILES][2 / V_WIDTH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const long long place = places.v[begin + b];
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
                for (int j = 0; j < 2 / V_WIDTH; ++j) {
                    const int column = part + 8 * (column_warp() * VALUE_TILES + n) + Accumulator::column(j * V_WIDTH);
                    const bool there = place != NOWHERE && column < V_DIM;
                    v[b][n][j] = there ? *(const Elements<V_WIDTH>*)((const Bits*)(v_pool + place) + column) : Elements<V_WIDTH>{};
                }
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                const int row = Accumulator::row(2 * half);
                if (!same && !shared.rows[row].sees.has(first + begin + b)) continue;
                const float weight = shared.weights[row][begin + b];
#pragma unroll
                for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        o[n].x[2 * half + j] = __fmaf_rn(weight, ELEMENT::get(v[b][n][j / V_WIDTH].x[j % V_WIDTH]), o[n].x[2 * half + j]);
            }
    }
}

// `same`: all rows see all positions that any of them sees, and the others are zeros.
__device__ __forceinline__ void values(Accumulator (&o)[VALUE_TILES], const Shared& shared, int, const Places& places,
                                       const char* v_pool, int num_rows, int first, bool same)
{
    if (num_rows <= 8)
        add_values<1>(o, shared, places, v_pool, first, same);
    else
        add_values<2>(o, shared, places, v_pool, first, same);
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

// What the scores of a split come to so far, in a lane's two rows.
struct Sums {
    float most[2] = {-INF, -INF};
    float shares[2][SHARES] = {};  // of the lane, of the sums over a fourth of each tile
};

// The online softmax: scores become weights, in shared memory, relative to the greatest score so far; what was there before
// is scaled to that.
__device__ __forceinline__ void online_softmax(Accumulator (&s)[SCORE_TILES], Sums& sums, Accumulator (&o)[VALUE_TILES],
                                               Shared& shared)
{
    float most[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        most[half] = -INF;
#pragma unroll
        for (int n = 0; n < SCORE_TILES; ++n) most[half] = fmaxf(most[half], fmaxf(s[n].x[2 * half], s[n].x[2 * half + 1]));
        most[half] = quad_max(most[half]);
        if (COLUMN_WARPS > 1 && lane() % 4 == 0) shared.of_fourths[column_warp()][Accumulator::row(2 * half)] = most[half];
    }
    if constexpr (COLUMN_WARPS > 1) __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = Accumulator::row(2 * half);
        most[half] = fmaxf(most[half], sums.most[half]);
        if constexpr (COLUMN_WARPS > 1)
#pragma unroll
            for (int w = 0; w < COLUMN_WARPS; ++w) most[half] = fmaxf(most[half], shared.of_fourths[w][row]);
        const float shift = shift_of(most[half]), before = ex2_approx(sums.most[half] - shift);
        sums.most[half] = most[half];
        constexpr int TILES_OF_SHARE = SCORE_TILES / SHARES;
#pragma unroll
        for (int share = 0; share < SHARES; ++share) {
            float total = 0;
#pragma unroll
            for (int n = share * TILES_OF_SHARE; n < (share + 1) * TILES_OF_SHARE; ++n) {
                const float low = ex2_approx(s[n].x[2 * half] - shift), high = ex2_approx(s[n].x[2 * half + 1] - shift);
                shared.put_weights(row, 8 * (column_warp() * SCORE_TILES + n) + Accumulator::column(0), low, high);
                total += low + high;
            }
            sums.shares[half][share] = __fmaf_rn(sums.shares[half][share], before, total);
        }
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) o[n].x[2 * half + j] = __fmul_rn(o[n].x[2 * half + j], before);
    }
    sync_rows();
}

// The totals of a lane's two rows, from the lanes' shares of the sums over fourths of the tiles.
__device__ __forceinline__ void add_shares(float (&totals)[2], const Sums& sums, Shared& shared)
{
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int share = 0; share < SHARES; ++share) {
            const float sum = quad_sum(sums.shares[half][share]);
            if (lane() % 4 == 0) shared.of_fourths[column_warp() * SHARES + share][Accumulator::row(2 * half)] = sum;
        }
    sync_rows();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        totals[half] = 0;
#pragma unroll
        for (int fourth = 0; fourth < WARPS; ++fourth) totals[half] += shared.of_fourths[fourth][Accumulator::row(2 * half)];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, ROWS == 16 && V_PART <= (TENSOR ? 256 : 128) ? 3 : 1) paged_attention(
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
        for (int w = 0; w < COLUMN_WARPS; ++w) shared.united[w][row] = Sum();
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
        TABLE_T block = -1;
        if (threadIdx.x < TILE && any.has(position(tile)))
            block = *(const TABLE_T*)(table + position(tile) / BLOCK_SIZE * entry_stride);
        return block;
    };
    // Whether it is there.
    const auto put_places = [&](Places& places, int tile, long long block) {
        if (threadIdx.x >= TILE) return true;
        const int slot = position(tile) % BLOCK_SIZE;
        const bool there = 0 <= block && block < num_blocks;
        places.k[threadIdx.x] = there ? block * k_block + slot * k_slot : NOWHERE;
        places.v[threadIdx.x] = there ? block * v_block + slot * v_slot : NOWHERE;
        return there;
    };
    const auto begin_fetch = [&](int stage, const Places& places, bool whole) {
        if (whole)
            fetch<true>(shared, stage, places, k_pool, v_pool);
        else
            fetch<false>(shared, stage, places, k_pool, v_pool);
        cp_async_commit();
    };
    // STAGES tiles are on their way before they are needed, and the blocks of one more are asked for: a warp waits where a
    // load is followed by what needs it.
    TABLE_T blocks[STAGES + 1];
#pragma unroll
    for (int i = 0, t = tile; i <= STAGES; ++i, t = next(t)) blocks[i] = block_of(t);
    TABLE_T block_ahead = blocks[STAGES];
    __syncthreads();  // shared.rows is there
    constexpr int QUERY_BATCH = 4;
    for (int first = threadIdx.x * QUERY_WIDTH; first < ROWS * HEAD_DIM; first += QUERY_BATCH * THREADS * QUERY_WIDTH) {
        Elements<QUERY_WIDTH> elements[QUERY_BATCH] = {};
#pragma unroll
        for (int j = 0; j < QUERY_BATCH; ++j) {
            const int i = first + j * THREADS * QUERY_WIDTH;
            if (i >= ROWS * HEAD_DIM) break;
            const Row& row = shared.rows[i / HEAD_DIM];
            const char* q = query + row.token * query_token + row.head * query_head + i % HEAD_DIM * query_dim;
            if (row.token >= 0) elements[j] = *(const Elements<QUERY_WIDTH>*)q;
        }
#pragma unroll
        for (int j = 0; j < QUERY_BATCH; ++j) {
            const int i = first + j * THREADS * QUERY_WIDTH;
            if (i < ROWS * HEAD_DIM) shared.put_query(i / HEAD_DIM, i % HEAD_DIM, elements[j]);
        }
    }
    bool whole[STAGES];
#pragma unroll
    for (int i = 0; i < STAGES; ++i, ahead = next(ahead)) whole[i] = put_places(shared.places[i], ahead, blocks[i]);
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        whole[i] = __syncthreads_and(whole[i]);
        begin_fetch(i, shared.places[i], whole[i]);
    }

    const Scoring scoring{inner, outer, alibi_slopes != nullptr};
    const int rows_of_warp = (int)min(num_rows - first_row, (long long)ROWS) - first_row_of_warp();  // or more than it has
    Accumulator o[VALUE_TILES], united_o[VALUE_TILES];
    Sums sums;
    for (int i = 0; tile < end; ++i, tile = next(tile), ahead = next(ahead)) {
        const int stage = i % STAGES, first = tile * TILE;
        const Places &here = shared.places[i % 2], &next_places = shared.places[(i + STAGES) % 2];
        cp_async_wait<STAGES - 1>();
        __syncthreads();  // the tile is there
        const bool there = put_places(shared.places[(i + STAGES) % 2], ahead, block_ahead);
        block_ahead = block_of(next(ahead));

        Accumulator s[SCORE_TILES];
        products(s, shared, stage, here, k_pool, rows_of_warp);
        if (all.covers(first, first + TILE) && !SOFTCAP && !scoring.slopes) {
#pragma unroll
            for (int n = 0; n < SCORE_TILES; ++n)
#pragma unroll
                for (int l = 0; l < 4; ++l) s[n].x[l] = __fmul_rn(outer, s[n].x[l]);
        } else {
#pragma unroll
            for (int l = 0; l < 4; ++l) {
                const Row& row = shared.rows[Accumulator::row(l)];
#pragma unroll
                for (int n = 0; n < SCORE_TILES; ++n) {
                    const int p = first + 8 * (column_warp() * SCORE_TILES + n) + Accumulator::column(l);
                    const float score = scoring(s[n].x[l], row, p);  // whether or not: a branch would take longer
                    s[n].x[l] = row.sees.has(p) ? score : -INF;
                }
            }
        }
        online_softmax(s, sums, o, shared);
        values(o, shared, stage, here, v_pool, rows_of_warp, first,
               all.covers(max(first, any.first), min(first + TILE, any.end)));
        begin_fetch(stage, next_places, __syncthreads_and(there));  // nobody needs the tile any more

        if ((tile + 1) % TILES && tile + 1 < end) continue;
        float totals[2];
        add_shares(totals, sums, shared);
        const int slot = tile / TILES % (int)num_splits;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row& row = shared.rows[Accumulator::row(2 * half)];
            Sum sum;
            sum.most = sums.most[half];
            sum.total = totals[half];
            Sum& so_far = shared.united[column_warp()][Accumulator::row(2 * half)];
            const United both = unite(so_far, sum);
            float* of_row = nullptr;
            if (scratch) of_row = scratch + ((slot * num_tokens + row.token) * num_heads + row.head) * (V_DIM + 2);
#pragma unroll
            for (int n = 0; n < VALUE_TILES; ++n) {
                const int column = part + 8 * (column_warp() * VALUE_TILES + n) + Accumulator::column(0);
                float &low = o[n].x[2 * half], &high = o[n].x[2 * half + 1];
                if (!scratch) {
                    united_o[n].x[2 * half] = both.values(united_o[n].x[2 * half], low);
                    united_o[n].x[2 * half + 1] = both.values(united_o[n].x[2 * half + 1], high);
                } else if (row.token >= 0 && column + 1 < V_DIM && V_DIM % 2 == 0) {
                    *(float2*)(of_row + 2 + column) = make_float2(low, high);
                } else if (row.token >= 0) {
                    if (column < V_DIM) of_row[2 + column] = low;
                    if (column + 1 < V_DIM) of_row[2 + column + 1] = high;
                }
                low = high = 0;
            }
            if (scratch && row.token >= 0 && part == 0 && column_warp() == 0 && lane() % 4 == 0) {
                of_row[0] = sum.most;
                of_row[1] = sum.total;
            }
            __syncwarp();
            if (lane() % 4 == 0) so_far = both.sum;
        }
        sums = Sums();
    }
    cp_async_wait_all();
    if (scratch) return;
    __syncwarp();  // for the warp's own united sums

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Row& row = shared.rows[Accumulator::row(2 * half)];
        if (row.token < 0) continue;
        const Sum sum = shared.united[column_warp()][Accumulator::row(2 * half)];
        const End ends = sinks ? end_of(sum, *(const float*)(sinks + row.head * sink_stride)) : end_of(sum);
        char* of_row = out + row.token * out_token + row.head * out_head;
#pragma unroll
        for (int n = 0; n < VALUE_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int column = part + 8 * (column_warp() * VALUE_TILES + n) + Accumulator::column(j);
                if (column < V_DIM)
                    *(Bits*)(of_row + column * out_dim) = ELEMENT::round(ends.value(united_o[n].x[2 * half + j]));
            }
        if (lse && part == 0 && column_warp() == 0 && lane() % 4 == 0)
            *(float*)(lse + row.token * lse_token + row.head * lse_head) = ends.lse;
    }
}
