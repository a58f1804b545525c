// Gradients of attention for any GPU, dtype and head_dim (to 256): the one to read first (after sweep.cuh, which has the formulae),
// and the one that serves what the tuned kernels don't. Also what comes before all of them: the stats.
//
// A block of threads owns ROWS rows of a head and goes over the columns that they meet, COLUMNS at a time: rows of both kinds and the
// weights lie in shared memory, sums in registers, in float32, which round to nearest.
//
//   backward_stats_*   grid: x = queries of batch and heads, padded to stats_len, WARPS to a block
//   backward_keys_*    grid: x = tiles of keys, y = key heads, z = batch
//   backward_queries_* grid: x = tiles of queries, y = query heads, z = batch
//   THREADS 128, dynamic shared memory SMEM_BYTES (stats: none)
#include "sweep.cuh"
#include "vectors.cuh"

constexpr int ROWS = 16, COLUMNS = 16, THREADS = 128, WARPS = THREADS / 32, MAX_HEAD_DIM = 256;
constexpr int CHANNELS = MAX_HEAD_DIM / THREADS;  // of a thread's sums
constexpr int PITCH = MAX_HEAD_DIM + 1;  // of rows in shared memory: lanes that read several rows meet several banks
constexpr int SMEM_BYTES = 4 * (2 * (ROWS + COLUMNS) * PITCH + 2 * ROWS * COLUMNS);
static_assert(SMEM_BYTES == 67840, "src/cuda/kernels.rs has the same; every GPU from sm_80 on gives a block that much");
constexpr float LOG2E = 1.4426950408889634f;

// n rows from `first` on become float32; those that are not wanted become zeros, and are not read.
template <int DTYPE>
PRIM void load_tile(float* tile, const View& rows, int b, int head, int first, int lo, int hi, int d_len) {
    for (int e = threadIdx.x; e < ROWS * d_len; e += THREADS) {
        const int r = e / d_len, d = e % d_len;
        const bool wanted = first + r >= lo && first + r < hi;
        tile[r * PITCH + d] = wanted ? load_element<DTYPE>(row_address(rows, b, head, first + r), d) : 0.f;
    }
}

template <int DTYPE>
PRIM void store_row(const View& to, bool f32, int b, int head, int row, int d, float x) {
    const uint64_t at = row_address(to, b, head, row);
    if (f32)
        store_element<F32>(at, d, x);
    else
        store_element<DTYPE>(at, d, x);
}

template <int DTYPE, bool KEYS>
PRIM void backward_any(const Backward& p) {
    static_assert(ROWS == COLUMNS, "load_tile");
    DYN_SMEM(smem);
    float* const x0 = (float*)smem;             // [ROWS][PITCH]: k or q
    float* const x1 = x0 + ROWS * PITCH;        // v or grad_out
    float* const y0 = x1 + ROWS * PITCH;        // [COLUMNS][PITCH]: q or k
    float* const y1 = y0 + COLUMNS * PITCH;     // grad_out or v
    float* const weights = y1 + COLUMNS * PITCH;       // [ROWS][COLUMNS]: P, or its transpose
    float* const slopes = weights + ROWS * COLUMNS;    // likewise dS

    const int b = blockIdx.z, head = blockIdx.y, row0 = blockIdx.x * ROWS, d_len = p.head_dim;
    const int kv_head = KEYS ? head : head / (p.q_heads / p.kv_heads);
    const Interval seen = row_interval(p, b);
    const int row_lo = KEYS ? seen.lo : 0, row_hi = KEYS ? seen.hi : p.q_len;  // of rows that have a gradient
    load_tile<DTYPE>(x0, KEYS ? p.k : p.q, b, head, row0, row_lo, row_hi, d_len);
    load_tile<DTYPE>(x1, KEYS ? p.v : p.grad_out, b, head, row0, row_lo, row_hi, d_len);
    float sum0[ROWS][CHANNELS], sum1[ROWS][CHANNELS];  // dK and dV, or dQ; channels thread, thread + THREADS
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < CHANNELS; c++) sum0[r][c] = sum1[r][c] = 0.f;

    Sweep<KEYS, COLUMNS> sweep;
    for (sweep.begin(p, seen, row0, ROWS, head); sweep.n(); sweep.next()) {
        const int n = sweep.n(), whose = KEYS ? sweep.head : kv_head;
        block_sync();  // nobody reads the columns and weights of the last step any more
        load_tile<DTYPE>(y0, KEYS ? p.q : p.k, b, whose, sweep.at, sweep.at, sweep.at + n, d_len);
        load_tile<DTYPE>(y1, KEYS ? p.grad_out : p.v, b, whose, sweep.at, sweep.at, sweep.at + n, d_len);
        block_sync();
        for (int e = threadIdx.x; e < ROWS * COLUMNS; e += THREADS) {
            const int r = e / COLUMNS, c = e % COLUMNS;
            const int query = KEYS ? sweep.at + c : row0 + r, key = KEYS ? row0 + r : sweep.at + c;
            const Stat stat = stats_of(p, b, sweep.head)[query];
            float score = 0.f, slope = 0.f;
            for (int d = 0; d < d_len; d++) {
                score = fma_rn(x0[r * PITCH + d], y0[c * PITCH + d], score);
                slope = fma_rn(x1[r * PITCH + d], y1[c * PITCH + d], slope);
            }
            // (Beyond the last query lse is inf; what keys get that nobody sees is not stored.)
            // float32 stays in base e: each rounding that a change of base takes would be seen in all weights of a row.
            const float weight = key >= query_end(p, seen, query) ? 0.f
                                 : DTYPE == F32                   ? expf(fma_rn(score, p.softmax_scale, -stat.lse))
                                                                  : ex2(fma_rn(score, p.scale, -stat.lse));
            weights[e] = weight;
            slopes[e] = weight * (slope - stat.delta);
        }
        block_sync();
        // By themselves first: one sum over all columns would lose more.
        float part0[ROWS][CHANNELS], part1[ROWS][CHANNELS];
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < CHANNELS; c++) part0[r][c] = part1[r][c] = 0.f;
        for (int j = 0; j < n; j++) UNROLL for (int c = 0; c < CHANNELS; c++) {
            const int d = threadIdx.x + c * THREADS;
            if (d >= d_len) break;
            const float x = y0[j * PITCH + d], y = y1[j * PITCH + d];
            UNROLL for (int r = 0; r < ROWS; r++) {
                part0[r][c] = fma_rn(slopes[r * COLUMNS + j], x, part0[r][c]);
                if (KEYS) part1[r][c] = fma_rn(weights[r * COLUMNS + j], y, part1[r][c]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int c = 0; c < CHANNELS; c++) {
            sum0[r][c] += part0[r][c];
            sum1[r][c] += part1[r][c];
        }
    }

    UNROLL for (int r = 0; r < ROWS; r++) {
        if (row0 + r >= (KEYS ? p.key_rows : p.q_len)) break;
        const bool has = row0 + r >= row_lo && row0 + r < row_hi;
        UNROLL for (int c = 0; c < CHANNELS; c++) {
            const int d = threadIdx.x + c * THREADS;
            if (d >= d_len) continue;
            store_row<DTYPE>(KEYS ? p.dk : p.dq, KEYS ? p.dk_f32 : p.dq_f32, b, head, row0 + r, d, has ? sum0[r][c] * p.softmax_scale : 0.f);
            if (KEYS) store_row<DTYPE>(p.dv, p.dv_f32, b, head, row0 + r, d, has ? sum1[r][c] : 0.f);
        }
    }
}

template <int DTYPE, int N>
PRIM float dot(uint64_t a, bool a_f32, uint64_t b, int d_len) {
    float sum = 0.f;
    for (int d = threadIdx.x % 32 * N; d < d_len; d += 32 * N) {
        float x[N], y[N];
        if (a_f32)
            load_elements<F32, N>(a, d, x);
        else
            load_elements<DTYPE, N>(a, d, x);
        load_elements<DTYPE, N>(b, d, y);
        UNROLL for (int e = 0; e < N; e++) sum = fma_rn(x[e], y[e], sum);
    }
    UNROLL for (int x = 16; x; x /= 2) sum += shfl_xor(sum, x);
    return sum;
}

// A warp has a query.
template <int DTYPE>
PRIM void backward_stats(const Backward& p) {
    const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= (int64_t)p.batch * p.q_heads * p.stats_len) return;
    const int i = (int)(row % p.stats_len), h = (int)(row / p.stats_len % p.q_heads), b = (int)(row / p.stats_len / p.q_heads);
    Stat stat = {INF, 0.f};
    const float lse = i < p.q_len ? *(const float*)row_address(p.lse, b, h, i) : -INF;
    if (lse != -INF) {
        const uint64_t out = row_address(p.out, b, h, i), grad = row_address(p.grad_out, b, h, i);
        const float sum = p.wide ? dot<DTYPE, 4>(out, p.out_f32, grad, p.head_dim) : dot<DTYPE, 1>(out, p.out_f32, grad, p.head_dim);
        stat = {DTYPE == F32 ? lse : lse * LOG2E, sum - (p.grad_lse.ptr ? *(const float*)row_address(p.grad_lse, b, h, i) : 0.f)};
    }
    if (threadIdx.x % 32 == 0) ((Stat*)p.stats)[row] = stat;
}

KERNEL(THREADS, 4) backward_stats_f32(PARAM Backward p) { backward_stats<F32>(p); }
KERNEL(THREADS, 4) backward_stats_bf16(PARAM Backward p) { backward_stats<BF16>(p); }
KERNEL(THREADS, 4) backward_stats_f16(PARAM Backward p) { backward_stats<F16>(p); }
KERNEL(THREADS, 1) backward_keys_f32(PARAM Backward p) { backward_any<F32, true>(p); }
KERNEL(THREADS, 1) backward_keys_bf16(PARAM Backward p) { backward_any<BF16, true>(p); }
KERNEL(THREADS, 1) backward_keys_f16(PARAM Backward p) { backward_any<F16, true>(p); }
KERNEL(THREADS, 1) backward_queries_f32(PARAM Backward p) { backward_any<F32, false>(p); }
KERNEL(THREADS, 1) backward_queries_bf16(PARAM Backward p) { backward_any<BF16, false>(p); }
KERNEL(THREADS, 1) backward_queries_f16(PARAM Backward p) { backward_any<F16, false>(p); }
