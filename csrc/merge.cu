// Joins partials (out_i, lse_i) over disjoint keys: lse = ln sum exp(lse_i), out = sum exp(lse_i - lse) out_i, in float32.
// As src/softmax.rs: a partial whose lse is -inf is not read, a NaN is not hidden.
//
// Memory-bound: each partial is read once, N elements a lane and access. Two forms of one function:
//   merge        few partials of many rows (prefill): a warp has a row
//   merge_splits many partials of few rows (decode): a block has a row, its warps every fourth partial each
//
//   grid: x = rows of batch, heads and queries, WARPS to a block of `merge`, one to a block of `merge_splits`
//   THREADS 128, dynamic shared memory SMEM_BYTES
#include "vectors.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, WIDE = 4;
constexpr int AHEAD = 4;  // partials that are on their way before the first is used
constexpr int SMEM_BYTES = THREADS * WIDE * 4;
static_assert(SMEM_BYTES == 2048, "src/cuda/kernels.rs has the same");

template <int N>
PRIM void load_any(int dtype, uint64_t row, int d, float (&x)[N]) {
    if (dtype == F32)
        load_elements<F32, N>(row, d, x);
    else if (dtype == BF16)
        load_elements<BF16, N>(row, d, x);
    else
        load_elements<F16, N>(row, d, x);
}

template <int N>
PRIM void store_any(int dtype, uint64_t row, int d, const float (&x)[N]) {
    if (dtype == F32)
        store_elements<F32, N>(row, d, x);
    else if (dtype == BF16)
        store_elements<BF16, N>(row, d, x);
    else
        store_elements<F16, N>(row, d, x);
}

struct Place {
    int b, h, i;
};

PRIM float lse_of(const Merge& p, Place at, int n) {
    const uint64_t first = row_address(p.lses[p.is_list ? n : 0], at.b, at.h, at.i);
    return *(const float*)(first + (p.is_list ? 0 : n * p.lse_split_stride));
}

PRIM uint64_t out_of(const Merge& p, Place at, int n) {
    return row_address(p.outs[p.is_list ? n : 0], at.b, at.h, at.i) + (p.is_list ? 0 : n * p.split_stride);
}

// The larger one; a NaN is larger than anything.
PRIM float top_of(float a, float b) { return b > a || b != b ? b : a; }

// A partial that saw no key is not read: its out may be anything.
PRIM bool counts(float weight) { return weight != 0.f; }

template <int WARPS_OF_ROW, int N>
PRIM void merge_row(const Merge& p, int64_t row, float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS_OF_ROW;
    const Place at = {(int)(row / p.len / p.heads), (int)(row / p.len % p.heads), (int)(row % p.len)};

    // Every warp of the row knows the whole sum: it is small, and all of them need it.
    float top = -INF;
    for (int n = lane; n < p.count; n += 32) top = top_of(top, lse_of(p, at, n));
    UNROLL for (int x = 16; x; x /= 2) top = top_of(top, shfl_xor(top, x));
    const bool empty = top == -INF;
    float sum = 0.f;
    if (!empty)
        for (int n = lane; n < p.count; n += 32) sum += expf(lse_of(p, at, n) - top);
    UNROLL for (int x = 16; x; x /= 2) sum += shfl_xor(sum, x);
    const float inverse = empty ? 0.f : 1.f / sum;
    if (p.lse && warp == 0 && lane == 0)
        *(float*)(p.lse + at.b * p.lse_stride[0] + at.h * p.lse_stride[1] + at.i * p.lse_stride[2]) =
            empty ? -INF : top + logf(sum);

    const uint64_t out = row_address(p.out, at.b, at.h, at.i);
    for (int d0 = 0; d0 < p.head_dim; d0 += 32 * N) {
        const int d = d0 + lane * N;
        float acc[N];
        UNROLL for (int e = 0; e < N; e++) acc[e] = 0.f;
        if (!empty && d < p.head_dim)
            for (int n0 = warp; n0 < p.count; n0 += AHEAD * WARPS_OF_ROW) {
                float weight[AHEAD], x[AHEAD][N];
                UNROLL for (int j = 0; j < AHEAD; j++) {
                    const int n = n0 + j * WARPS_OF_ROW;
                    weight[j] = n < p.count ? expf(lse_of(p, at, n) - top) * inverse : 0.f;
                }
                UNROLL for (int j = 0; j < AHEAD; j++) {
                    const int n = n0 + j * WARPS_OF_ROW;
                    if (!counts(weight[j])) continue;
                    load_any<N>(p.in_dtype[p.is_list ? n : 0], out_of(p, at, n), d, x[j]);
                }
                UNROLL for (int j = 0; j < AHEAD; j++) {
                    if (!counts(weight[j])) continue;
                    UNROLL for (int e = 0; e < N; e++) acc[e] = fma_rn(x[j][e], weight[j], acc[e]);
                }
            }
        if constexpr (WARPS_OF_ROW > 1) {
            block_sync();  // the sums of the last round have been read
            UNROLL for (int e = 0; e < N; e++) shared[threadIdx.x * N + e] = acc[e];
            block_sync();
            if (warp != 0) continue;
            UNROLL for (int w = 1; w < WARPS_OF_ROW; w++)
                UNROLL for (int e = 0; e < N; e++) acc[e] += shared[(w * 32 + lane) * N + e];
        }
        if (d < p.head_dim) store_any<N>(p.out_dtype, out, d, acc);
    }
}

template <int WARPS_OF_ROW>
PRIM void merge_rows(const Merge& p) {
    DYN_SMEM(smem);
    const int64_t row = (int64_t)blockIdx.x * (WARPS / WARPS_OF_ROW) + threadIdx.x / 32 / WARPS_OF_ROW;
    if (row >= (int64_t)p.batch * p.heads * p.len) return;  // all warps of the row
    if (p.wide)
        merge_row<WARPS_OF_ROW, WIDE>(p, row, (float*)smem);
    else
        merge_row<WARPS_OF_ROW, 1>(p, row, (float*)smem);
}

KERNEL(THREADS, 4) merge(PARAM Merge p) { merge_rows<1>(p); }
KERNEL(THREADS, 4) merge_splits(PARAM Merge p) { merge_rows<WARPS>(p); }
