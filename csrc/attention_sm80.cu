// Prefill attention on mma.sync and cp.async, for sm_80 and whatever came after: after FlashAttention-2 (Dao, 2307.08691).
//
// A block of 4 warps has BLOCK_Q queries of one head, 32 a warp: each fragment of K and V that a warp loads from shared memory
// serves two tiles of 16 rows, without which shared memory would be the limit. While S = Q K^T is computed, V of the same block is on
// its way; while O += P V is, K of the next one. P never leaves registers: the accumulator of one product is the operand of the other.
//
//   grid: x = (head of the group fastest, then tiles of queries, the last first: under a causal mask they take longest),
//         y = key heads, z = batch
//   THREADS 128, dynamic shared memory: SMEM_BYTES<head_dim> = 66 KB for 128, 34 KB for 64; two blocks on a multiprocessor
// Dense pages only; rows 16-byte aligned; scale > 0. NaN in a key or value that only causality hides may reach the queries before it
// in the same block; what kv_start, kv_end and kv_len hide is never read.
#include "elements.cuh"
#include "mask.cuh"
#include "segment.cuh"
#include "tiles.cuh"
#include "walk.cuh"

constexpr int THREADS = 128, WARPS = 4, BLOCK_Q = 128, BLOCK_KV = 64;
constexpr int TILES = BLOCK_Q / WARPS / 16;  // of 16 queries, of a warp
template <int D>
constexpr int SMEM_BYTES = (BLOCK_Q + 2 * BLOCK_KV) * D * 2 + BLOCK_Q * 16;
constexpr int FAR = 1 << 30;  // beyond any key
constexpr float LN2 = 0.6931471805599453f;

// What becomes of sums relative to the maximum `from` when the maximum is `to`.
PRIM float decay(float from, float to, float scale) { return to == -INF ? 1.f : ex2((from - to) * scale); }

template <int D>
PRIM void load_side(uint32_t tile, const View& rows, const Walk<BLOCK_KV>& at, int first, int b, int kv_head) {
    load_rows<D, BLOCK_KV, THREADS>(tile, row_address(rows, b, kv_head, at.key - first), rows.row_stride, at.n);
    cp_async_commit();
}

// S = Q K^T of a warp's tiles.
template <bool BF16_, int D>
PRIM void scores(float (&s)[TILES][BLOCK_KV / 8][4], uint32_t q, uint32_t k, int warp, int lane) {
    UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int n = 0; n < BLOCK_KV / 8; n++) UNROLL for (int i = 0; i < 4; i++)
        s[t][n][i] = 0.f;
    const uint32_t q_place = chunk_at<D>(q, warp * TILES * 16 + lane % 16, lane / 16);
    const uint32_t k_place = chunk_at<D>(k, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    UNROLL for (int d = 0; d < D / 16; d++) {
        uint32_t a[TILES][4];
        UNROLL for (int t = 0; t < TILES; t++) ldmatrix_x4(a[t], channels_at(q_place, d) + t * 16 * D * 2);
        UNROLL for (int n = 0; n < BLOCK_KV / 16; n++) {
            uint32_t b[4];  // two tiles of 8 keys
            ldmatrix_x4(b, channels_at(k_place, d) + n * 16 * D * 2);
            UNROLL for (int t = 0; t < TILES; t++) {
                mma<BF16_>(s[t][2 * n], a[t], b[0], b[1]);
                mma<BF16_>(s[t][2 * n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

// Scores of keys that a query does not see, or that are beyond the block, become -inf. `reach`: as far as causality goes,
// the first row of this thread sees keys before that.
PRIM void mask(float (&s)[TILES][BLOCK_KV / 8][4], int reach, const Walk<BLOCK_KV>& at, int lane) {
    UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int r = 0; r < 2; r++) {
        const int seen = reach + t * 16 + r * 8 - at.key;
        const int end = (seen < at.n ? seen : at.n) - lane % 4 * 2;
        UNROLL for (int n = 0; n < BLOCK_KV / 8; n++) UNROLL for (int c = 0; c < 2; c++)
            if (n * 8 + c >= end) s[t][n][2 * r + c] = -INF;
    }
}

// P, rounded to the dtype of V, as the operand of the next product.
template <bool BF16_>
PRIM void round_weights(uint32_t (&w)[BLOCK_KV / 16][TILES][4], const float (&s)[TILES][BLOCK_KV / 8][4]) {
    UNROLL for (int k = 0; k < BLOCK_KV / 16; k++) UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int i = 0; i < 4; i++)
        w[k][t][i] = pack<BF16_>(s[t][2 * k + i / 2][i % 2 * 2], s[t][2 * k + i / 2][i % 2 * 2 + 1]);
}

// O += P V of a warp's tiles.
template <bool BF16_, int D>
PRIM void weigh(float (&o)[TILES][D / 2], const uint32_t (&w)[BLOCK_KV / 16][TILES][4], uint32_t v, int lane) {
    const uint32_t v_place = chunk_at<D>(v, lane % 16, lane / 16);
    UNROLL for (int k = 0; k < BLOCK_KV / 16; k++) {
        UNROLL for (int d = 0; d < D / 16; d++) {
            uint32_t b[4];  // two tiles of 8 channels
            ldmatrix_x4_trans(b, channels_at(v_place, d) + k * 16 * D * 2);
            UNROLL for (int t = 0; t < TILES; t++) {
                mma<BF16_>((float(&)[4])o[t][d * 8], w[k][t], b[0], b[1]);
                mma<BF16_>((float(&)[4])o[t][d * 8 + 4], w[k][t], b[2], b[3]);
            }
        }
    }
}

// Where a thread's share of tile t goes at the end of a segment: rows of p.total, and the maxima that those are relative to, in shared
// memory. All of it is worked out on the spot, for there are no registers to keep it in.
template <int D>
struct Folded {
    TotalRows total;
    float* m;  // [2]
};
PRIM int head_here(const Attn& p) {
    const int group = p.q_heads / p.kv_heads;
    return blockIdx.y * group + blockIdx.x % group;
}
PRIM int first_query(const Attn& p) {
    const int group = p.q_heads / p.kv_heads;
    return (int)(gridDim.x / group - 1 - blockIdx.x / group) * BLOCK_Q;
}
template <int D>
PRIM Folded<D> folded(uint8_t* smem, const Attn& p, int t) {
    const int thread = thread_here();
    const int64_t first_row = ((int64_t)blockIdx.z * p.q_heads + head_here(p)) * p.q_len;
    return {total_rows(p.total, first_row, first_query(p) + (thread / 32 * TILES + t) * 16, p.q_len, D, thread % 32),
            (float*)(smem + (BLOCK_Q + 2 * BLOCK_KV) * D * 2) + (thread * TILES + t) * 2};
}

template <bool BF16_, int D>
PRIM void attention_sm80(const Attn& p) {
    DYN_SMEM(smem);
    const uint32_t q = smem_u32(smem), k = q + BLOCK_Q * D * 2, v = k + BLOCK_KV * D * 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int kv_head = blockIdx.y, b = blockIdx.z, q0 = first_query(p);
    const Interval row = row_interval(p, b);
    const int last = q0 + BLOCK_Q < p.q_len ? q0 + BLOCK_Q - 1 : p.q_len - 1;
    const int end = query_end(p, row, last);
    const int reach = (p.causal ? clamp_(p.q_start + 1, -FAR, FAR) : FAR) + q0 + warp * TILES * 16 + lane / 4;

    float o[TILES][D / 2], m[TILES][2], l[TILES][2];
    UNROLL for (int t = 0; t < TILES; t++) {
        UNROLL for (int i = 0; i < D / 2; i++) o[t][i] = 0.f;
        UNROLL for (int r = 0; r < 2; r++) {
            m[t][r] = -INF;
            l[t][r] = 0.f;
        }
    }
    int held = 0;        // keys whose outputs are in o
    bool begun = false;  // others are in total

    Walk<BLOCK_KV> at;
    at.begin(p, row.lo, end);
    load_rows<D, BLOCK_Q, THREADS>(q, row_address(p.q, b, head_here(p), q0), p.q.row_stride, p.q_len - q0);
    if (at.n) load_side<D>(k, p.page[at.page].k.rows, at, p.page[at.page].first, b, kv_head);
    while (at.n) {
        cp_async_wait<0>();
        block_sync();  // K is there, and nobody reads the last V any more
        load_side<D>(v, p.page[at.page].v.rows, at, p.page[at.page].first, b, kv_head);
        if (p.total && held + BLOCK_KV > SEGMENT) {
            UNROLL for (int t = 0; t < TILES; t++) {
                const Folded<D> to = folded<D>(smem, p, t);
                const float keep[2] = {decay(to.m[0], m[t][0], p.scale), decay(to.m[1], m[t][1], p.scale)};
                fold(o[t], to.total, keep, begun);
                UNROLL for (int r = 0; r < 2; r++) to.m[r] = m[t][r];
            }
            begun = true;
            held = 0;
        }
        float s[TILES][BLOCK_KV / 8][4];
        scores<BF16_, D>(s, q, k, warp, lane);
        if (at.n < BLOCK_KV || at.key + BLOCK_KV > reach - lane / 4) mask(s, reach, at, lane);
        held += BLOCK_KV;
        UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int r = 0; r < 2; r++) {
            float most = m[t][r];
            UNROLL for (int n = 0; n < BLOCK_KV / 8; n++) UNROLL for (int c = 0; c < 2; c++)
                most = fmax_(most, s[t][n][2 * r + c]);
            most = fmax_(most, shfl_xor(most, 1));
            most = fmax_(most, shfl_xor(most, 2));
            const float keep = decay(m[t][r], most, p.scale), base = most == -INF ? 0.f : most * p.scale;
            m[t][r] = most;
            float sum = 0.f;
            UNROLL for (int n = 0; n < BLOCK_KV / 8; n++) UNROLL for (int c = 0; c < 2; c++) {
                s[t][n][2 * r + c] = ex2(fma_rn(s[t][n][2 * r + c], p.scale, -base));
                sum += s[t][n][2 * r + c];
            }
            l[t][r] = l[t][r] * keep + sum;  // of this thread's columns
            UNROLL for (int i = 0; i < D / 2; i += 4) {
                o[t][i + 2 * r] *= keep;
                o[t][i + 2 * r + 1] *= keep;
            }
        }
        uint32_t w[BLOCK_KV / 16][TILES][4];
        round_weights<BF16_>(w, s);
        cp_async_wait<0>();
        block_sync();  // V is there, and nobody reads K any more
        at.next(p, row.lo, end);
        if (at.n) load_side<D>(k, p.page[at.page].k.rows, at, p.page[at.page].first, b, kv_head);
        weigh<BF16_, D>(o, w, v, lane);
    }
    cp_async_wait<0>();

    const int head = head_here(p), q_thread = first_query(p) + thread_here() / 32 * TILES * 16 + lane / 4;
    UNROLL for (int t = 0; t < TILES; t++) {
        if (begun) {
            const Folded<D> from = folded<D>(smem, p, t);
            const float keep[2] = {decay(from.m[0], m[t][0], p.scale), decay(from.m[1], m[t][1], p.scale)};
            unfold(o[t], from.total, keep);
        }
        UNROLL for (int r = 0; r < 2; r++) {
            float sum = l[t][r];
            sum += shfl_xor(sum, 1);
            sum += shfl_xor(sum, 2);
            const int query = q_thread + t * 16 + r * 8;
            if (query >= p.q_len) continue;
            const float inverse = sum == 0.f ? 0.f : 1.f / sum;
            if (p.lse && lane % 4 == 0)
                ((float*)p.lse)[((int64_t)b * p.q_heads + head) * p.q_len + query] = sum == 0.f ? -INF : (m[t][r] * p.scale + lg2(sum)) * LN2;
            const uint64_t out = row_address(p.out, b, head, query);
            UNROLL for (int i = 0; i < D / 8; i++) {
                const float x = o[t][4 * i + 2 * r] * inverse, y = o[t][4 * i + 2 * r + 1] * inverse;
                const int column = i * 8 + lane % 4 * 2;
                if (p.out_f32) {
                    ((float*)out)[column] = x;
                    ((float*)out)[column + 1] = y;
                } else {
                    ((uint32_t*)out)[column / 2] = pack<BF16_>(x, y);
                }
            }
        }
    }
}

KERNEL(THREADS, 2) attention_sm80_bf16_d64(PARAM Attn p) { attention_sm80<true, 64>(p); }
KERNEL(THREADS, 2) attention_sm80_bf16_d128(PARAM Attn p) { attention_sm80<true, 128>(p); }
KERNEL(THREADS, 2) attention_sm80_f16_d64(PARAM Attn p) { attention_sm80<false, 64>(p); }
KERNEL(THREADS, 2) attention_sm80_f16_d128(PARAM Attn p) { attention_sm80<false, 128>(p); }
