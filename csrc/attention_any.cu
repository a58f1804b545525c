// Attention for any GPU, dtype, head_dim (to 256) and page format: the one to read first, and the one that serves what the
// tuned kernels don't.
//
// A block of threads has QUERIES queries of one head, and goes over the keys they see, KEYS at a time: keys to shared memory,
// scores, softmax with a running maximum (Milakov and Gimelshein, 1805.02867), values to the same memory, output. o lives in
// registers, summed in float32: unlike wgmma's, these sums round to nearest, and need no segments.
//
//   grid: x = tiles of queries, the last first (under a causal mask they take longest), y = query heads, z = batch
//   THREADS 128, dynamic shared memory: smem_bytes(head_dim), at most SMEM_BYTES
#include "elements.cuh"
#include "mask.cuh"

constexpr int QUERIES = 16, KEYS = 32, THREADS = 128, MAX_HEAD_DIM = 256;
constexpr int PER_WARP = QUERIES / (THREADS / 32), COLUMNS = MAX_HEAD_DIM / THREADS;
constexpr int PITCH = MAX_HEAD_DIM + 1;  // of rows in shared memory: 32 lanes that read 32 rows meet 32 banks
constexpr int SMEM_BYTES = 4 * (QUERIES * PITCH + KEYS * PITCH + QUERIES * KEYS + QUERIES);
static_assert(SMEM_BYTES <= 64 << 10, "every GPU from sm_80 on gives a block that much");
constexpr float LN2 = 0.6931471805599453f;

template <int DTYPE>
PRIM void attention_any(const Attn& p) {
    DYN_SMEM(smem);
    float* const q = (float*)smem;               // [QUERIES][PITCH], times p.scale
    float* const kv = q + QUERIES * PITCH;       // [KEYS][PITCH], keys or values
    float* const weights = kv + KEYS * PITCH;    // [QUERIES][KEYS]
    float* const decay = weights + QUERIES * KEYS;  // [QUERIES], what becomes of o when a new maximum is found

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int b = blockIdx.z, head = blockIdx.y, kv_head = head / (p.q_heads / p.kv_heads);
    const int q0 = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES, d_len = p.head_dim;
    const Interval row = row_interval(p, b);
    const int last = q0 + QUERIES < p.q_len ? q0 + QUERIES - 1 : p.q_len - 1;
    const int end = query_end(p, row, last);  // it grows with the query: the last one sees the most

    for (int n = thread; n < QUERIES * d_len; n += THREADS) {
        const int r = n / d_len, d = n % d_len;
        q[r * PITCH + d] = q0 + r < p.q_len ? load_element<DTYPE>(row_address(p.q, b, head, q0 + r), d) * p.scale : 0.f;
    }
    float o[QUERIES][COLUMNS], m[PER_WARP], l[PER_WARP];  // o: columns thread, thread + THREADS; m, l: a warp's queries
    UNROLL for (int r = 0; r < QUERIES; r++) UNROLL for (int c = 0; c < COLUMNS; c++) o[r][c] = 0.f;
    UNROLL for (int r = 0; r < PER_WARP; r++) {
        m[r] = -INF;
        l[r] = 0.f;
    }

    for (int page = 0; page < p.pages; page++) {
        const Page& at = p.page[page];
        const int first = row.lo > at.first ? row.lo : at.first;
        const int stop = end < at.first + at.tokens ? end : at.first + at.tokens;
        for (int j0 = first; j0 < stop; j0 += KEYS) {
            const int n = stop - j0 < KEYS ? stop - j0 : KEYS;
            block_sync();  // nobody reads the values of the last round any more
            for (int e = thread; e < n * d_len; e += THREADS) {
                const int j = e / d_len, d = e % d_len;
                kv[j * PITCH + d] = side_element<DTYPE, true>(at.k, b, kv_head, j0 - at.first + j, d, d_len);
            }
            block_sync();
            UNROLL for (int r = 0; r < PER_WARP; r++) {
                const int query = warp * PER_WARP + r;
                float s = -INF;
                if (lane < n && j0 + lane < query_end(p, row, q0 + query)) {
                    s = 0.f;
                    for (int d = 0; d < d_len; d++) s = fma_rn(q[query * PITCH + d], kv[lane * PITCH + d], s);
                }
                float most = s;
                UNROLL for (int x = 16; x; x /= 2) most = fmax_(most, shfl_xor(most, x));
                most = fmax_(most, m[r]);
                const float base = most == -INF ? 0.f : most;  // no key seen yet: exp2(-inf - 0) is 0
                const float weight = ex2(s - base), keep = ex2(m[r] - base);
                float sum = weight;
                UNROLL for (int x = 16; x; x /= 2) sum += shfl_xor(sum, x);
                l[r] = l[r] * keep + sum;
                m[r] = most;
                weights[query * KEYS + lane] = weight;
                if (lane == 0) decay[query] = keep;
            }
            block_sync();
            for (int e = thread; e < n * d_len; e += THREADS) {
                const int j = e / d_len, d = e % d_len;
                kv[j * PITCH + d] = side_element<DTYPE, false>(at.v, b, kv_head, j0 - at.first + j, d, d_len);
            }
            block_sync();
            UNROLL for (int r = 0; r < QUERIES; r++) {
                const float keep = decay[r];
                UNROLL for (int c = 0; c < COLUMNS; c++) {
                    // By itself first: one sum over all keys would lose three times as much as torch's at 8192 of them.
                    float sum = 0.f;
                    const int d = thread + c * THREADS;
                    if (d < d_len)
                        for (int j = 0; j < n; j++) sum = fma_rn(weights[r * KEYS + j], kv[j * PITCH + d], sum);
                    o[r][c] = fma_rn(o[r][c], keep, sum);
                }
            }
        }
    }

    block_sync();
    UNROLL for (int r = 0; r < PER_WARP; r++) {
        const int query = warp * PER_WARP + r;
        if (lane == 0) decay[query] = l[r];
        if (lane == 0 && p.lse && q0 + query < p.q_len)
            ((float*)p.lse)[((int64_t)b * p.q_heads + head) * p.q_len + q0 + query] =
                l[r] == 0.f ? -INF : m[r] * LN2 + logf(l[r]);
    }
    block_sync();
    UNROLL for (int r = 0; r < QUERIES; r++) {
        if (q0 + r >= p.q_len) break;
        const float l_row = decay[r], inverse = l_row == 0.f ? 0.f : 1.f / l_row;
        const uint64_t out = row_address(p.out, b, head, q0 + r);
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            const int d = thread + c * THREADS;
            if (d >= d_len) continue;
            if (p.out_f32)
                store_element<F32>(out, d, o[r][c] * inverse);
            else
                store_element<DTYPE>(out, d, o[r][c] * inverse);
        }
    }
}

KERNEL(THREADS, 1) attention_any_f32(PARAM Attn p) { attention_any<F32>(p); }
KERNEL(THREADS, 1) attention_any_bf16(PARAM Attn p) { attention_any<BF16>(p); }
KERNEL(THREADS, 1) attention_any_f16(PARAM Attn p) { attention_any<F16>(p); }
