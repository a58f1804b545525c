// Prefill attention for Hopper (sm_90a): TMA, wgmma, warp specialisation; after FlashAttention-3 (Shah et al., 2407.08608).
//
// A block has BLOCK_Q queries of one head and three warpgroups. The first loads: one thread of it asks the tensor copy engine for the
// tiles of K and V, two of each ahead. The other two have 64 queries each: S = Q K^T of the next block of keys and O += P V of this one
// are given to the tensor cores together, and while those compute, the softmax of the next block is worked out. P never leaves
// registers. Tiles lie in shared memory as wgmma reads them: boxes of 64 channels (128 bytes a row, swizzled).
//
//   grid: x = (head of the group fastest, then tiles of queries, the last first: under a causal mask they take longest),
//         y = key heads, z = batch
//   THREADS 384, dynamic shared memory: SMEM_BYTES<head_dim> = 163 KB for 128, 83 KB for 64
// Dense pages only, at most MAPS_PAGES of them; rows at multiples of 16 bytes; scale > 0. NaN in a key or value that only causality
// hides may reach the queries before it in the same block; what kv_start, kv_end and kv_len hide does not matter.
#include "elements.cuh"
#include "mask.cuh"
#include "segment.cuh"
#include "walk.cuh"

constexpr int THREADS = 384, CONSUMERS = 2, BLOCK_Q = 128, BLOCK_KV = 128, STAGES = 2;
constexpr int FAR = 1 << 30;  // beyond any key
constexpr float LN2 = 0.6931471805599453f;
constexpr int MAPS_PAGES = 6;  // of a launch: parameters are to stay under 4 KB

// How the copy engine sees the tensors, [batch, heads, tokens in use, channels]: boxes of 128 rows and 64 channels.
struct Maps {
    TensorMap q, k[MAPS_PAGES], v[MAPS_PAGES];
};

template <int D>
constexpr int TILE = 128 * D * 2;  // bytes, of Q as of K and V: 128 rows
template <int D>
constexpr int SMEM_BYTES = (1 + 2 * STAGES) * TILE<D> + CONSUMERS * 128 * 8 + 256;

// Shared memory, as offsets in the address space of TMA and wgmma.
template <int D>
struct Places {
    uint32_t q, k, v;      // tiles; k and v: STAGES of them
    uint32_t q_full;       // barriers, 8 bytes each
    uint32_t k_full, v_full, k_empty, v_empty;  // STAGES each

    MEMBER explicit Places(uint32_t base)
        : q(base), k(q + TILE<D>), v(k + STAGES * TILE<D>), q_full(v + STAGES * TILE<D> + CONSUMERS * 128 * 8),
          k_full(q_full + 8), v_full(k_full + 8 * STAGES), k_empty(v_full + 8 * STAGES), v_empty(k_empty + 8 * STAGES) {}
};

// Which stage of a ring is next, and the parity of its barriers.
struct Ring {
    int stage = 0, parity = 0;

    MEMBER void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A tile of 128 rows from `row` on, one box for each 64 channels.
template <int D>
PRIM void load_tile(uint32_t tile, const TensorMap* map, uint32_t barrier, int row, int head, int b) {
    UNROLL for (int c = 0; c < D / 64; c++) tma_load_4d(tile + c * 128 * 128, map, barrier, c * 64, row, head, b);
}

template <int D>
PRIM void produce(const Attn& p, const Maps& maps, const Places<D>& at, int head, int q0, Interval row, int end) {
    const int kv_head = blockIdx.y, b = blockIdx.z;
    mbar_expect_tx(at.q_full, TILE<D>);
    load_tile<D>(at.q, &maps.q, at.q_full, q0, head, b);
    Ring ring;
    bool first_round = true;
    Walk<BLOCK_KV> walk;
    for (walk.begin(p, row.lo, end); walk.n; walk.next(p, row.lo, end)) {
        const int from = walk.key - p.page[walk.page].first;
        if (!first_round) mbar_wait(at.k_empty + 8 * ring.stage, ring.parity ^ 1);
        mbar_expect_tx(at.k_full + 8 * ring.stage, TILE<D>);
        load_tile<D>(at.k + ring.stage * TILE<D>, &maps.k[walk.page], at.k_full + 8 * ring.stage, from, kv_head, b);
        if (!first_round) mbar_wait(at.v_empty + 8 * ring.stage, ring.parity ^ 1);
        mbar_expect_tx(at.v_full + 8 * ring.stage, TILE<D>);
        load_tile<D>(at.v + ring.stage * TILE<D>, &maps.v[walk.page], at.v_full + 8 * ring.stage, from, kv_head, b);
        ring.advance();
        if (ring.stage == 0) first_round = false;
    }
}

// A warpgroup is done with a stage: all four warps have waited for their products.
PRIM void mbar_release(uint32_t barrier, int group, int thread) {
    named_bar_sync(1 + group, 128);
    if (thread == 0) mbar_arrive(barrier);
}

// Gives S = Q K^T to the tensor cores.
template <bool BF16_, int D>
PRIM void start_scores(float (&s)[64], uint32_t q, uint32_t k) {
    wgmma_fence();
    UNROLL for (int d = 0; d < D / 16; d++) {
        const uint32_t at = d / 4 * 128 * 128 + d % 4 * 32;
        wgmma_ss<BF16_>(s, wgmma_desc_sw128(q + at, 16, 1024), wgmma_desc_sw128(k + at, 16, 1024), d != 0);
    }
    wgmma_commit();
}

// Gives O += P V to the tensor cores.
template <bool BF16_, int D>
PRIM void start_outputs(float (&o)[D / 2], const uint32_t (&w)[BLOCK_KV / 16][4], uint32_t v) {
    wgmma_fence();
    UNROLL for (int k = 0; k < BLOCK_KV / 16; k++)
        wgmma_rs<BF16_>(o, w[k], wgmma_desc_sw128(v + k * 16 * 128, 128 * 128, 1024));
    wgmma_commit();
}

template <bool BF16_>
PRIM uint32_t pack(float lo, float hi) {
    return BF16_ ? pack_bf16(lo, hi) : pack_f16(lo, hi);
}

template <bool BF16_>
PRIM void round_weights(uint32_t (&w)[BLOCK_KV / 16][4], const float (&s)[64]) {
    UNROLL for (int k = 0; k < BLOCK_KV / 16; k++) UNROLL for (int i = 0; i < 4; i++)
        w[k][i] = pack<BF16_>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

// What becomes of sums relative to the maximum `from` when the maximum is `to`.
PRIM float decay(float from, float to, float scale) { return to == -INF ? 1.f : ex2((from - to) * scale); }

// A thread's two rows of softmax.
struct Rows {
    float m[2], l[2];
};

// Scores of keys that a query does not see, or that are beyond the block, become -inf. `reach`: as far as causality goes, this
// thread's first row sees keys before that.
PRIM void mask(float (&s)[64], int reach, int key, int n, int lane) {
    UNROLL for (int r = 0; r < 2; r++) {
        const int seen = reach + 8 * r - key, end = (seen < n ? seen : n) - lane % 4 * 2;
        UNROLL for (int i = 0; i < 64; i += 4) UNROLL for (int c = 0; c < 2; c++)
            if (i * 2 + c >= end) s[i + 2 * r + c] = -INF;
    }
}

// Scores become weights, relative to the new maxima; keep: what becomes of sums relative to the old ones.
PRIM void weights(float (&s)[64], Rows& rows, float (&keep)[2], float scale) {
    UNROLL for (int r = 0; r < 2; r++) {
        float most = rows.m[r];
        UNROLL for (int i = 0; i < 64; i += 4) most = fmax_(most, fmax_(s[i + 2 * r], s[i + 2 * r + 1]));
        most = fmax_(most, shfl_xor(most, 1));
        most = fmax_(most, shfl_xor(most, 2));
        keep[r] = decay(rows.m[r], most, scale);
        rows.m[r] = most;
        const float base = most == -INF ? 0.f : most * scale;
        float sum = 0.f;
        UNROLL for (int i = 0; i < 64; i += 4) UNROLL for (int c = 0; c < 2; c++) {
            s[i + 2 * r + c] = ex2(fma_rn(s[i + 2 * r + c], scale, -base));
            sum += s[i + 2 * r + c];
        }
        rows.l[r] = rows.l[r] * keep[r] + sum;  // of this thread's columns
    }
}

// Values that kv_end hides may be NaN, and 0 * NaN is NaN: rows from n on become zeros. Both warpgroups write the same.
template <int D>
PRIM void clear_values(uint8_t* tile, int n, int thread) {
    for (int i = n * 8 + thread; i < BLOCK_KV * 8; i += 128)  // 16 bytes at a time; a swizzle stays within its row
        UNROLL for (int c = 0; c < D / 64; c++) {
            uint32_t* const at = (uint32_t*)(tile + c * 128 * 128 + i * 16);
            at[0] = at[1] = at[2] = at[3] = 0;
        }
    fence_async_proxy();
}

template <bool BF16_, int D>
PRIM void consume(const Attn& p, const Places<D>& at, uint8_t* smem, int head, int q0, Interval row, int end) {
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int q_thread = q0 + group * 64 + thread / 32 * 16 + lane / 4;  // this thread's rows: that one and 8 after it
    const int reach = (p.causal ? clamp_(p.q_start + 1, -FAR, FAR) : FAR) + q_thread;
    const int whole = reach - thread / 32 * 16 - lane / 4;  // every row of this warpgroup sees the keys before that
    const uint32_t q = at.q + group * 64 * 128;
    float* const m_total = (float*)(smem + (at.q_full - CONSUMERS * 128 * 8 - at.q)) + (threadIdx.x - 128) * 2;
    const int64_t first_row = ((int64_t)blockIdx.z * p.q_heads + head) * p.q_len;
    const int warp_row = q_thread - lane / 4;

    float o[D / 2];
    Rows rows = {{-INF, -INF}, {0.f, 0.f}};
    UNROLL for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    int held = 0;        // keys whose outputs are in o, or on their way there
    bool begun = false;  // others are in p.total

    Walk<BLOCK_KV> walk;
    walk.begin(p, row.lo, end);
    mbar_wait(at.q_full, 0);
    if (walk.n) {
        Ring k_ring, v_ring;
        float s[64], keep[2];
        uint32_t w[BLOCK_KV / 16][4];
        mbar_wait(at.k_full, 0);
        start_scores<BF16_, D>(s, q, at.k);
        wgmma_wait<0>();
        mbar_release(at.k_empty, group, thread);
        k_ring.advance();
        if (walk.n < BLOCK_KV || walk.key + BLOCK_KV > whole) mask(s, reach, walk.key, walk.n, lane);
        weights(s, rows, keep, p.scale);
        round_weights<BF16_>(w, s);
        held = BLOCK_KV;
        int n = walk.n;  // keys of the block whose weights are in w
        for (walk.next(p, row.lo, end); walk.n; walk.next(p, row.lo, end)) {
            mbar_wait(at.k_full + 8 * k_ring.stage, k_ring.parity);
            start_scores<BF16_, D>(s, q, at.k + k_ring.stage * TILE<D>);
            mbar_wait(at.v_full + 8 * v_ring.stage, v_ring.parity);
            if (n < BLOCK_KV) {
                clear_values<D>(smem + (at.v - at.q) + v_ring.stage * TILE<D>, n, thread);
                named_bar_sync(1 + group, 128);
            }
            start_outputs<BF16_, D>(o, w, at.v + v_ring.stage * TILE<D>);
            wgmma_wait<1>();
            mbar_release(at.k_empty + 8 * k_ring.stage, group, thread);
            if (walk.n < BLOCK_KV || walk.key + BLOCK_KV > whole) mask(s, reach, walk.key, walk.n, lane);
            weights(s, rows, keep, p.scale);
            wgmma_wait<0>();
            mbar_release(at.v_empty + 8 * v_ring.stage, group, thread);
            UNROLL for (int i = 0; i < D / 2; i++) o[i] *= keep[i >> 1 & 1];
            if (p.total && held + BLOCK_KV > SEGMENT) {
                const float rest[2] = {decay(m_total[0], rows.m[0], p.scale), decay(m_total[1], rows.m[1], p.scale)};
                fold(o, total_rows(p.total, first_row, warp_row, p.q_len, D, lane), rest, begun);
                m_total[0] = rows.m[0];
                m_total[1] = rows.m[1];
                begun = true;
                held = 0;
            }
            round_weights<BF16_>(w, s);
            held += BLOCK_KV;
            n = walk.n;
            k_ring.advance();
            v_ring.advance();
        }
        mbar_wait(at.v_full + 8 * v_ring.stage, v_ring.parity);
        if (n < BLOCK_KV) {
            clear_values<D>(smem + (at.v - at.q) + v_ring.stage * TILE<D>, n, thread);
            named_bar_sync(1 + group, 128);
        }
        start_outputs<BF16_, D>(o, w, at.v + v_ring.stage * TILE<D>);
        wgmma_wait<0>();
    }

    if (begun) {
        const float rest[2] = {decay(m_total[0], rows.m[0], p.scale), decay(m_total[1], rows.m[1], p.scale)};
        unfold(o, total_rows(p.total, first_row, warp_row, p.q_len, D, lane), rest);
    }
    UNROLL for (int r = 0; r < 2; r++) {
        float sum = rows.l[r];
        sum += shfl_xor(sum, 1);
        sum += shfl_xor(sum, 2);
        const int query = q_thread + 8 * r;
        if (query >= p.q_len) continue;
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        if (p.lse && lane % 4 == 0)
            ((float*)p.lse)[first_row + query] = sum == 0.f ? -INF : (rows.m[r] * p.scale + lg2(sum)) * LN2;
        const uint64_t out = row_address(p.out, blockIdx.z, head, query);
        UNROLL for (int i = 0; i < D / 8; i++) {
            const float x = o[4 * i + 2 * r] * inverse, y = o[4 * i + 2 * r + 1] * inverse;
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

template <bool BF16_, int D>
PRIM void attention_sm90(const Attn& p, const Maps& maps) {
    DYN_SMEM(smem);
    const Places<D> at(smem_u32(smem));
    const int group = p.q_heads / p.kv_heads, head = blockIdx.y * group + blockIdx.x % group, b = blockIdx.z;
    const int q0 = (int)(gridDim.x / group - 1 - blockIdx.x / group) * BLOCK_Q;
    const Interval row = row_interval(p, b);
    const int end = query_end(p, row, q0 + BLOCK_Q < p.q_len ? q0 + BLOCK_Q - 1 : p.q_len - 1);
    if (threadIdx.x == 0) {
        mbar_init(at.q_full, 1);
        UNROLL for (int s = 0; s < STAGES; s++) {
            mbar_init(at.k_full + 8 * s, 1);
            mbar_init(at.v_full + 8 * s, 1);
            mbar_init(at.k_empty + 8 * s, CONSUMERS);
            mbar_init(at.v_empty + 8 * s, CONSUMERS);
        }
        fence_barrier_init();
    }
    block_sync();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) produce<D>(p, maps, at, head, q0, row, end);
    } else {
        setmaxnreg_inc<232>();
        consume<BF16_, D>(p, at, smem, head, q0, row, end);
    }
}

KERNEL(THREADS, 1) attention_sm90_bf16_d64(PARAM Attn p, PARAM Maps maps) { attention_sm90<true, 64>(p, maps); }
KERNEL(THREADS, 1) attention_sm90_bf16_d128(PARAM Attn p, PARAM Maps maps) { attention_sm90<true, 128>(p, maps); }
KERNEL(THREADS, 1) attention_sm90_f16_d64(PARAM Attn p, PARAM Maps maps) { attention_sm90<false, 64>(p, maps); }
KERNEL(THREADS, 1) attention_sm90_f16_d128(PARAM Attn p, PARAM Maps maps) { attention_sm90<false, 128>(p, maps); }
