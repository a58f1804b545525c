// Prefill attention for Hopper (sm_90a): TMA, wgmma, warp specialisation; after FlashAttention-3 (Shah et al., 2407.08608).
//
// A block has BLOCK_Q queries of one head. Its first warpgroup loads: one thread of it asks the tensor copy engine for the tiles of K
// and V, STAGES of each ahead. The others have 64 queries each: S = Q K^T of the next block of keys and O += P V of this one are given
// to the tensor cores together, and while those compute, the softmax of the next block is worked out. P never leaves registers. Tiles
// lie in shared memory as wgmma reads them: boxes of 64 channels (128 bytes a row, swizzled). tests/gpu/PREDICTIONS.md counts what a
// block of keys costs: the tensor cores are the limit for head_dim 128; for 64 the exponentials take as long as the products.
//
//   grid: x = (head of the group fastest, then tiles of queries, the last first: under a causal mask they take longest),
//         y = key heads, z = batch
//   head_dim 128: 128 queries, 384 threads; 64: 192 queries, 512 threads; dynamic shared memory: SMEM_BYTES<head_dim>
// Dense pages only, at most MAPS_PAGES of them; rows at multiples of 16 bytes; scale > 0. NaN in a key or value that only causality
// hides may reach the queries before it in the same block; what kv_start, kv_end and kv_len hide does not matter.
#include "elements.cuh"
#include "mask.cuh"
#include "segment.cuh"
#include "walk.cuh"

constexpr int BLOCK_KV = 128;
template <int D>
constexpr int CONSUMERS = D == 64 ? 3 : 2;  // warpgroups that compute
template <int D>
constexpr int THREADS = 128 * (1 + CONSUMERS<D>);
template <int D>
constexpr int BLOCK_Q = 64 * CONSUMERS<D>;
template <int D>
constexpr int STAGES = D == 64 ? 4 : 2;  // tiles of K, and of V, in shared memory
constexpr int FAR = 1 << 30;  // beyond any key
constexpr float LN2 = 0.6931471805599453f;
constexpr int MAPS_PAGES = 6;  // of a launch: parameters are to stay under 4 KB

// How the copy engine sees the tensors, [batch, heads, tokens in use, channels]: boxes of 128 rows and 64 channels.
struct Maps {
    TensorMap q, k[MAPS_PAGES], v[MAPS_PAGES];
};

template <int D>
constexpr int Q_TILE = BLOCK_Q<D> * D * 2;  // bytes
template <int D>
constexpr int TILE = BLOCK_KV * D * 2;
template <int D>
constexpr int SMEM_BYTES = Q_TILE<D> + 2 * STAGES<D> * TILE<D> + CONSUMERS<D> * 128 * 8 + 256;

// src/cuda/kernels.rs has the same:
static_assert(BLOCK_Q<64> == 192 && THREADS<64> == 512 && SMEM_BYTES<64> == 158976, "head_dim 64");
static_assert(BLOCK_Q<128> == 128 && THREADS<128> == 384 && SMEM_BYTES<128> == 166144, "head_dim 128");

// Shared memory, as offsets in the address space of TMA and wgmma.
template <int D>
struct Places {
    uint32_t q, k, v;                           // tiles; k and v: STAGES of them
    uint32_t totals;                            // maxima of what is in p.total: two for each thread that computes
    uint32_t q_full;                            // barriers, 8 bytes each
    uint32_t k_full, v_full, k_empty, v_empty;  // STAGES each

    MEMBER explicit Places(uint32_t base)
        : q(base), k(q + Q_TILE<D>), v(k + STAGES<D> * TILE<D>), totals(v + STAGES<D> * TILE<D>),
          q_full(totals + CONSUMERS<D> * 128 * 8), k_full(q_full + 8), v_full(k_full + 8 * STAGES<D>),
          k_empty(v_full + 8 * STAGES<D>), v_empty(k_empty + 8 * STAGES<D>) {}
};

// Which stage of a ring is next, and the parity of its barriers.
template <int D>
struct Ring {
    int stage = 0, parity = 0;

    MEMBER void advance() {
        if (++stage == STAGES<D>) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A tile of ROWS rows from `row` on, one box for each 64 channels.
template <int D, int ROWS>
PRIM void load_tile(uint32_t tile, const TensorMap* map, uint32_t barrier, int row, int head, int b) {
    mbar_expect_tx(barrier, ROWS * D * 2);
    UNROLL for (int c = 0; c < D / 64; c++) tma_load_4d(tile + c * ROWS * 128, map, barrier, c * 64, row, head, b);
}

template <int D>
PRIM void produce(const Attn& p, const Maps& maps, const Places<D>& at, int head, int q0, Interval row, int end) {
    const int kv_head = blockIdx.y, b = blockIdx.z;
    load_tile<D, BLOCK_Q<D>>(at.q, &maps.q, at.q_full, q0, head, b);
    Ring<D> ring;
    bool first_round = true;
    Walk<BLOCK_KV> walk;
    for (walk.begin(p, row.lo, end); walk.n; walk.next(p, row.lo, end)) {
        const int from = walk.key - p.page[walk.page].first;
        const uint32_t barrier = 8 * ring.stage, tile = ring.stage * TILE<D>;
        if (!first_round) mbar_wait(at.k_empty + barrier, ring.parity ^ 1);
        load_tile<D, BLOCK_KV>(at.k + tile, &maps.k[walk.page], at.k_full + barrier, from, kv_head, b);
        if (!first_round) mbar_wait(at.v_empty + barrier, ring.parity ^ 1);
        load_tile<D, BLOCK_KV>(at.v + tile, &maps.v[walk.page], at.v_full + barrier, from, kv_head, b);
        ring.advance();
        if (ring.stage == 0) first_round = false;
    }
}

// A warp is done with a stage: it has waited for its products.
PRIM void release(uint32_t barrier, int lane) {
    if (lane == 0) mbar_arrive(barrier);
}

// Warpgroups take turns at giving work to the tensor cores, so that one's softmax falls into the time of another's products and
// not all of them wait for the same unit: each hands on the turn as soon as its own products are on their way.
template <int D>
PRIM void take_turn(int group) {
    named_bar_sync(1 + group, 256);
}
template <int D>
PRIM void give_turn(int group) {
    named_bar_arrive(group + 1 == CONSUMERS<D> ? 1 : 2 + group, 256);
}
// The threads of a warpgroup meet.
template <int D>
PRIM void group_sync(int group) {
    named_bar_sync(1 + CONSUMERS<D> + group, 128);
}

// Gives S = Q K^T to the tensor cores.
template <bool BF16_, int D>
PRIM void start_scores(float (&s)[64], uint32_t q, uint32_t k) {
    const uint64_t q_tile = wgmma_desc_sw128(q, 16, 1024), k_tile = wgmma_desc_sw128(k, 16, 1024);
    wgmma_fence();
    UNROLL for (int d = 0; d < D / 16; d++) {
        // An address stands in a descriptor's lowest bits, in units of 16 bytes.
        const int q_step = d / 4 * BLOCK_Q<D> * 128 + d % 4 * 32, k_step = d / 4 * BLOCK_KV * 128 + d % 4 * 32;
        wgmma_ss<BF16_>(s, q_tile + q_step / 16, k_tile + k_step / 16, d != 0);
    }
    wgmma_commit();
}

// Gives O += P V to the tensor cores.
template <bool BF16_, int D>
PRIM void start_outputs(float (&o)[D / 2], const uint32_t (&w)[BLOCK_KV / 16][4], uint32_t v) {
    const uint64_t v_tile = wgmma_desc_sw128(v, BLOCK_KV * 128, 1024);
    wgmma_fence();
    UNROLL for (int k = 0; k < BLOCK_KV / 16; k++) wgmma_rs<BF16_>(o, w[k], v_tile + k * 16 * 128 / 16);
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
        float sum[2] = {0.f, 0.f};
        UNROLL for (int i = 0; i < 64; i += 4) UNROLL for (int c = 0; c < 2; c++) {
            s[i + 2 * r + c] = ex2(fma_rn(s[i + 2 * r + c], scale, -base));
            sum[c] += s[i + 2 * r + c];
        }
        rows.l[r] = rows.l[r] * keep[r] + (sum[0] + sum[1]);  // of this thread's columns
    }
}

// Values that kv_end hides may be NaN, and 0 * NaN is NaN: rows from n on become zeros. All warpgroups write the same. Only the last
// block of all needs it: beyond the end of any other there is no more of the page, and the copy engine has put zeros.
template <int D>
PRIM void clear_values(uint8_t* tile, int n, int thread) {
    for (int i = n * 8 + thread; i < BLOCK_KV * 8; i += 128)  // 16 bytes at a time; a swizzle stays within its row
        UNROLL for (int c = 0; c < D / 64; c++) {
            uint32_t* const at = (uint32_t*)(tile + c * BLOCK_KV * 128 + i * 16);
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
    float* const m_total = (float*)(smem + (at.totals - at.q)) + (threadIdx.x - 128) * 2;
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
        Ring<D> k_ring, v_ring;
        float s[64], keep[2];
        uint32_t w[BLOCK_KV / 16][4];
        int key = walk.key, n = walk.n;  // the block whose scores are in s
        if (group == CONSUMERS<D> - 1) give_turn<D>(group);
        mbar_wait(at.k_full, 0);
        start_scores<BF16_, D>(s, q, at.k);
        wgmma_wait<0>();
        pin(s);
        release(at.k_empty, lane);
        k_ring.advance();
        if (n < BLOCK_KV || key + BLOCK_KV > whole) mask(s, reach, key, n, lane);
        weights(s, rows, keep, p.scale);
        round_weights<BF16_>(w, s);
        held = BLOCK_KV;
        walk.next(p, row.lo, end);
        if (walk.n) mbar_wait(at.k_full + 8 * k_ring.stage, k_ring.parity);
        while (walk.n) {
            key = walk.key;
            n = walk.n;
            take_turn<D>(group);
            start_scores<BF16_, D>(s, q, at.k + k_ring.stage * TILE<D>);
            mbar_wait(at.v_full + 8 * v_ring.stage, v_ring.parity);
            start_outputs<BF16_, D>(o, w, at.v + v_ring.stage * TILE<D>);
            walk.next(p, row.lo, end);
            if (walk.n || group + 1 < CONSUMERS<D>) give_turn<D>(group);
            wgmma_wait<1>();
            pin(s);
            release(at.k_empty + 8 * k_ring.stage, lane);
            k_ring.advance();
            if (n < BLOCK_KV || key + BLOCK_KV > whole) mask(s, reach, key, n, lane);
            weights(s, rows, keep, p.scale);
            pin(s);
            // This wait also has a loop in it, which keeps the next one from being moved up before the softmax.
            if (walk.n) mbar_wait(at.k_full + 8 * k_ring.stage, k_ring.parity);
            wgmma_wait<0>();
            pin(o);
            release(at.v_empty + 8 * v_ring.stage, lane);
            v_ring.advance();
            if (vote_any(keep[0] != 1.f || keep[1] != 1.f))  // later on maxima hardly ever move
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
        }
        mbar_wait(at.v_full + 8 * v_ring.stage, v_ring.parity);
        if (n < BLOCK_KV) {
            clear_values<D>(smem + (at.v - at.q) + v_ring.stage * TILE<D>, n, thread);
            group_sync<D>(group);
        }
        start_outputs<BF16_, D>(o, w, at.v + v_ring.stage * TILE<D>);
        wgmma_wait<0>();
        pin(o);
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
    const int q0 = (int)(gridDim.x / group - 1 - blockIdx.x / group) * BLOCK_Q<D>;
    const Interval row = row_interval(p, b);
    const int end = query_end(p, row, q0 + BLOCK_Q<D> < p.q_len ? q0 + BLOCK_Q<D> - 1 : p.q_len - 1);
    if (threadIdx.x == 0) {
        mbar_init(at.q_full, 1);
        UNROLL for (int s = 0; s < STAGES<D>; s++) {
            mbar_init(at.k_full + 8 * s, 1);
            mbar_init(at.v_full + 8 * s, 1);
            mbar_init(at.k_empty + 8 * s, CONSUMERS<D> * 4);
            mbar_init(at.v_empty + 8 * s, CONSUMERS<D> * 4);
        }
        fence_barrier_init();
    }
    block_sync();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<D == 64 ? 32 : 24>();
        if (threadIdx.x == 0) produce<D>(p, maps, at, head, q0, row, end);
    } else {
        setmaxnreg_inc<D == 64 ? 160 : 240>();
        consume<BF16_, D>(p, at, smem, head, q0, row, end);
    }
}

KERNEL(THREADS<64>, 1) attention_sm90_bf16_d64(PARAM Attn p, PARAM Maps maps) { attention_sm90<true, 64>(p, maps); }
KERNEL(THREADS<128>, 1) attention_sm90_bf16_d128(PARAM Attn p, PARAM Maps maps) { attention_sm90<true, 128>(p, maps); }
KERNEL(THREADS<64>, 1) attention_sm90_f16_d64(PARAM Attn p, PARAM Maps maps) { attention_sm90<false, 64>(p, maps); }
KERNEL(THREADS<128>, 1) attention_sm90_f16_d128(PARAM Attn p, PARAM Maps maps) { attention_sm90<false, 128>(p, maps); }
