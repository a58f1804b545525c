// Gradients of attention for Hopper (sm_90a): TMA, wgmma, warp specialisation; sweep.cuh has the formulae and the two sweeps, and
// attention_backward_sm80.cu what X and Y are.
//
// A block has ROWS rows of X0 and X1 in shared memory. Its first warpgroup loads: one thread of it asks the tensor copy engine for the
// rows of Y0 and Y1 that come next, STAGES of them ahead. The two others have 64 rows each: X0 Y0^T and X1 Y1^T (P and dS, or their
// transposes) are computed by the tensor cores from shared memory, and become operands of the sums in registers. P is worked out while
// X1 Y1^T is computed; beyond that the two warpgroups fill each other's waits, for there are no registers for a second step under way.
//
//   backward_keys_sm90_*     grid: x = tiles of keys (the first ones meet most queries), y = key heads of the launch, z = batch
//   backward_queries_sm90_*  grid: x = (head of the group fastest, then tiles of queries, the last first), y, z likewise
//   384 threads, dynamic shared memory: SMEM_BYTES<head_dim>
// Rows at multiples of 16 bytes. NaN in a key or value that only causality hides may reach the queries before it in the same step; of
// what kv_start, kv_end and kv_len hide nothing is used.
#include "segment.cuh"
#include "sweep.cuh"
#include "vectors.cuh"

constexpr int GROUPS = 2, THREADS = 128 * (1 + GROUPS), ROWS = 64 * GROUPS;  // warpgroups that compute; rows of a block
constexpr int FAR = 1 << 30;  // beyond any key; lengths are at most half of it
constexpr int STAGES = 4;  // of steps in shared memory
template <bool KEYS, int D>
constexpr int COLUMNS = KEYS || D == 128 ? 64 : 128;  // of a step: as many as registers are left for
template <int D>
constexpr int X = ROWS * D * 2;  // bytes of a tile
template <bool KEYS, int D>
constexpr int Y = COLUMNS<KEYS, D> * D * 2;
template <bool KEYS, int D>
constexpr int STAT = COLUMNS<KEYS, D> * 8;
template <bool KEYS, int D>
constexpr int SMEM_BYTES = 2 * X<D> + STAGES * (2 * Y<KEYS, D> + STAT<KEYS, D>) + 128;

// src/cuda/kernels.rs has the same:
static_assert(ROWS == 128 && THREADS == 384, "both");
static_assert(COLUMNS<true, 64> == 64 && SMEM_BYTES<true, 64> == 100480, "keys of head_dim 64");
static_assert(COLUMNS<false, 64> == 128 && SMEM_BYTES<false, 64> == 168064, "queries of head_dim 64");
static_assert(COLUMNS<true, 128> == 64 && SMEM_BYTES<true, 128> == 198784, "keys of head_dim 128");
static_assert(COLUMNS<false, 128> == 64 && SMEM_BYTES<false, 128> == 198784, "queries of head_dim 128");
static_assert(STATS % COLUMNS<true, 128> == 0, "a step's stats are all there");

// How the copy engine sees the tensors, [batch, heads, rows in use, channels]: boxes of ROWS or COLUMNS rows and 64 channels.
struct Maps {
    TensorMap x0, x1, y0, y1;
};

// Shared memory, as offsets in the address space of TMA and wgmma.
template <bool KEYS, int D>
struct Places {
    uint32_t x0, x1, y, stats;     // tiles; y: Y0 and Y1 of each stage
    uint32_t x_full, full, empty;  // barriers, 8 bytes each; full and empty: STAGES of them

    MEMBER explicit Places(uint32_t base)
        : x0(base), x1(x0 + X<D>), y(x1 + X<D>), stats(y + STAGES * 2 * Y<KEYS, D>), x_full(stats + STAGES * STAT<KEYS, D>),
          full(x_full + 8), empty(full + 8 * STAGES) {}
};

// Which stage is next, and the parity of its barriers.
struct Ring {
    int stage = 0, parity = 0;

    MEMBER void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// N rows from `row` on, one box for each 64 channels.
template <int D, int N>
PRIM void load_tile(uint32_t tile, const TensorMap* map, uint32_t barrier, int row, int head, int b) {
    UNROLL for (int c = 0; c < D / 64; c++) tma_load_4d(tile + c * N * 128, map, barrier, c * 64, row, head, b);
}

template <bool KEYS, int D>
PRIM void produce(const Backward& p, const Maps& maps, const Places<KEYS, D>& at, Interval seen, int head, int kv_head, int row0) {
    const int b = blockIdx.z;
    Sweep<KEYS, COLUMNS<KEYS, D>> sweep;
    sweep.begin(p, seen, row0, ROWS, head);
    if (!sweep.n()) return;
    mbar_expect_tx(at.x_full, 2 * X<D>);
    load_tile<D, ROWS>(at.x0, &maps.x0, at.x_full, row0, head, b);
    load_tile<D, ROWS>(at.x1, &maps.x1, at.x_full, row0, head, b);
    Ring ring;
    for (bool first_round = true; sweep.n(); sweep.next()) {
        const int whose = KEYS ? sweep.head : kv_head;
        const uint32_t full = at.full + 8 * ring.stage, y = at.y + ring.stage * 2 * Y<KEYS, D>;
        if (!first_round) mbar_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);
        mbar_expect_tx(full, 2 * Y<KEYS, D> + (KEYS ? STAT<KEYS, D> : 0));
        load_tile<D, COLUMNS<KEYS, D>>(y, &maps.y0, full, sweep.at, whose, b);
        load_tile<D, COLUMNS<KEYS, D>>(y + Y<KEYS, D>, &maps.y1, full, sweep.at, whose, b);
        if (KEYS) bulk_load(at.stats + ring.stage * STAT<KEYS, D>, stats_of(p, b, whose) + sweep.at, STAT<KEYS, D>, full);
        ring.advance();
        if (ring.stage == 0) first_round = false;
    }
}

// A warp is done with a stage: it has waited for its products.
PRIM void release(uint32_t barrier, int lane) {
    if (lane == 0) mbar_arrive(barrier);
}

// Gives A B^T over all channels to the tensor cores: 64 rows of an X, a step's rows of a Y.
template <bool BF16_, int D, int C, int N>
PRIM void start_product(float (&acc)[N], uint32_t x, uint32_t y) {
    const uint64_t x_tile = wgmma_desc_sw128(x, 16, 1024), y_tile = wgmma_desc_sw128(y, 16, 1024);
    wgmma_fence();
    UNROLL for (int d = 0; d < D / 16; d++) {
        // An address stands in a descriptor's lowest bits, in units of 16 bytes.
        const int x_step = d / 4 * ROWS * 128 + d % 4 * 32, y_step = d / 4 * C * 128 + d % 4 * 32;
        wgmma_ss<BF16_>(acc, x_tile + x_step / 16, y_tile + y_step / 16, d != 0);
    }
    wgmma_commit();
}

// Gives sums += w Y to the tensor cores.
template <bool BF16_, int D, int C, int K>
PRIM void start_sums(float (&sums)[D / 2], const uint32_t (&w)[K][4], uint32_t y) {
    const uint64_t y_tile = wgmma_desc_sw128(y, C * 128, 1024);
    wgmma_fence();
    UNROLL for (int k = 0; k < K; k++) wgmma_rs<BF16_>(sums, w[k], y_tile + k * 16 * 128 / 16);
    wgmma_commit();
}

template <bool BF16_>
PRIM uint32_t pack(float lo, float hi) {
    return BF16_ ? pack_bf16(lo, hi) : pack_f16(lo, hi);
}

template <bool BF16_, int K, int N>
PRIM void round_operands(uint32_t (&w)[K][4], const float (&x)[N]) {
    UNROLL for (int k = 0; k < K; k++) UNROLL for (int i = 0; i < 4; i++) w[k][i] = pack<BF16_>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
}

// Keys that kv_end hides may be NaN, and 0 * NaN is NaN: rows from n on become zeros. Both warpgroups write the same. Only the last
// step needs it, for queries that own: elsewhere the copy engine has put zeros beyond the end.
template <int D, int C>
PRIM void clear_rows(uint8_t* tile, int n, int thread) {
    for (int i = n * 8 + thread; i < C * 8; i += 128)  // 16 bytes at a time; a swizzle stays within its row
        UNROLL for (int c = 0; c < D / 64; c++) *(Words<16>*)(tile + c * C * 128 + i * 16) = {};
    fence_async_proxy();
}

// Where a thread's share of one sum lies in p.total: sum 0 of all rows of the launch, then sum 1.
template <bool KEYS, int D>
PRIM TotalRows total_of(const Backward& p, int sum) {
    const int thread = thread_here() - 128, rows = KEYS ? p.key_rows : p.q_len, group = p.q_heads / p.kv_heads;
    const int heads = KEYS ? p.heads : p.heads * group, head = KEYS ? blockIdx.y : blockIdx.y * group + blockIdx.x % group;
    const int tile = KEYS ? blockIdx.x : gridDim.x / group - 1 - blockIdx.x / group;
    const int64_t first = (((int64_t)sum * p.batch + blockIdx.z) * heads + head) * rows;
    return total_rows(p.total, first, tile * ROWS + thread / 32 * 16, rows, D, thread % 32);
}

// Sums become rows of a gradient; those of keys that nobody sees become 0.
template <bool BF16_, bool KEYS, int D>
PRIM void store(const Backward& p, const View& to, bool f32, const float (&sums)[D / 2], float scale, int head, int row0) {
    const int thread = thread_here() - 128, lane = thread % 32, b = blockIdx.z;
    const Interval seen = row_interval(p, b);
    UNROLL for (int r = 0; r < 2; r++) {
        const int i = row0 + thread / 32 * 16 + lane / 4 + 8 * r;
        if (i >= (KEYS ? p.key_rows : p.q_len)) continue;
        const bool has = !KEYS || (i >= seen.lo && i < seen.hi);
        const uint64_t at = row_address(to, b, head, i);
        UNROLL for (int n = 0; n < D / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            const float x = has ? sums[4 * n + 2 * r] * scale : 0.f, y = has ? sums[4 * n + 2 * r + 1] * scale : 0.f;
            if (f32) {
                ((float*)at)[column] = x;
                ((float*)at)[column + 1] = y;
            } else {
                ((uint32_t*)at)[column / 2] = pack<BF16_>(x, y);
            }
        }
    }
}

template <bool BF16_, bool KEYS, int D>
PRIM void consume(const Backward& p, const Places<KEYS, D>& at, uint8_t* smem, Interval seen, int head, int row0) {
    constexpr int C = COLUMNS<KEYS, D>, N = C / 2, K = C / 16;
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, b = blockIdx.z;
    const int row = row0 + threadIdx.x / 32 * 16 - 64 + lane / 4;  // this thread's rows: that one and 8 after it
    const int offset = p.causal ? clamp_(p.q_start, -FAR, FAR) : FAR;  // query i sees keys up to i + offset
    const uint32_t x0 = at.x0 + group * 64 * 128, x1 = at.x1 + group * 64 * 128;

    float sum0[D / 2], sum1[D / 2];
    UNROLL for (int i = 0; i < D / 2; i++) sum0[i] = sum1[i] = 0.f;
    Stat own[2];  // of queries that are rows
    if (!KEYS) UNROLL for (int r = 0; r < 2; r++) own[r] = stats_of(p, b, head)[row + 8 * r];
    bool begun = false;  // sums of other segments are in total

    Sweep<KEYS, C> sweep;
    sweep.begin(p, seen, row0, ROWS, head);
    Ring ring;
    if (sweep.n()) mbar_wait(at.x_full, 0);
    while (sweep.n()) {
        float weight[N], slope[N];
        uint32_t w[K][4], ds[K][4];
        mbar_wait(at.full + 8 * ring.stage, ring.parity);
        start_product<BF16_, D, C>(weight, x0, at.y + ring.stage * 2 * Y<KEYS, D>);
        for (int held = 0;;) {  // columns whose products are in the sums
            const int n = sweep.n();
            const uint32_t y0 = at.y + ring.stage * 2 * Y<KEYS, D>, y1 = y0 + Y<KEYS, D>;
            const uint8_t* const stat = smem + (at.stats - at.x0) + ring.stage * STAT<KEYS, D> + lane % 4 * 16;  // of two columns
            const int column = sweep.at + lane % 4 * 2;  // this thread's columns: that one, the next, and every 8 after
            start_product<BF16_, D, C>(slope, x1, y1);
            wgmma_wait<1>();
            pin(weight);

            // Weights: exp2(scale X0 Y0^T - lse).
            UNROLL for (int i = 0; i < N; i += 4) {
                Words<16> two;
                if (KEYS) two = *(const Words<16>*)(stat + i * 16);
                UNROLL for (int c = 0; c < 4; c++) {
                    const float lse = KEYS ? bits_float(two.x[c % 2 * 2]) : own[c / 2].lse;
                    weight[i + c] = ex2(fma_rn(weight[i + c], p.scale, -lse));
                }
            }
            // Hidden ones are 0: by causality where the step crosses the diagonal, beyond the last key. (Beyond the last query P is 0.)
            const bool whole = KEYS ? row0 + ROWS - 1 <= sweep.at + offset
                                    : n == C && sweep.at + C - 1 <= row0 + offset;
            if (!whole)
                UNROLL for (int i = 0; i < N; i++) {
                    const int r = row + (i / 2 & 1) * 8, c = i / 4 * 8 + i % 2;
                    const bool visible = KEYS ? r <= column + c + offset : column + c <= r + offset && column + c < sweep.at + n;
                    weight[i] = visible ? weight[i] : 0.f;
                }
            wgmma_wait<0>();
            pin(slope);

            // Slopes: P (X1 Y1^T - delta).
            UNROLL for (int i = 0; i < N; i += 4) {
                Words<16> two;
                if (KEYS) two = *(const Words<16>*)(stat + i * 16);
                UNROLL for (int c = 0; c < 4; c++) {
                    const float delta = KEYS ? bits_float(two.x[c % 2 * 2 + 1]) : own[c / 2].delta;
                    slope[i + c] = weight[i + c] * (slope[i + c] - delta);
                }
            }
            if (!KEYS && n < C) {
                UNROLL for (int i = 0; i < N; i++) slope[i] = column + i / 4 * 8 + i % 2 < sweep.at + n ? slope[i] : 0.f;
                clear_rows<D, C>(smem + (y0 - at.x0), n, threadIdx.x % 128);
                named_bar_sync(1 + group, 128);
            }
            if (KEYS) {  // not before: P as numbers and as operands, beside the slopes, would be more than there are registers
                round_operands<BF16_>(w, weight);
                start_sums<BF16_, D, C>(sum1, w, y1);
            }
            round_operands<BF16_>(ds, slope);
            start_sums<BF16_, D, C>(sum0, ds, y0);
            wgmma_wait<0>();
            if (KEYS) pin(sum1);
            pin(sum0);
            release(at.empty + 8 * ring.stage, lane);
            ring.advance();
            sweep.next();
            held += C;
            if (!sweep.n() || (p.total && held + C > SEGMENT)) break;
            mbar_wait(at.full + 8 * ring.stage, ring.parity);
            start_product<BF16_, D, C>(weight, x0, at.y + ring.stage * 2 * Y<KEYS, D>);
        }
        if (sweep.n()) {
            const float keep[2] = {1.f, 1.f};
            fold(sum0, total_of<KEYS, D>(p, 0), keep, begun);
            if (KEYS) fold(sum1, total_of<KEYS, D>(p, 1), keep, begun);
            begun = true;
        }
    }

    if (begun) {
        const float keep[2] = {1.f, 1.f};
        unfold(sum0, total_of<KEYS, D>(p, 0), keep);
        if (KEYS) unfold(sum1, total_of<KEYS, D>(p, 1), keep);
    }
    store<BF16_, KEYS, D>(p, KEYS ? p.dk : p.dq, KEYS ? p.dk_f32 : p.dq_f32, sum0, p.softmax_scale, head, row0);
    if (KEYS) store<BF16_, KEYS, D>(p, p.dv, p.dv_f32, sum1, 1.f, head, row0);
}

template <bool BF16_, bool KEYS, int D>
PRIM void backward_sm90(const Backward& p, const Maps& maps) {
    DYN_SMEM(smem);
    const Places<KEYS, D> at(smem_u32(smem));
    const int group = p.q_heads / p.kv_heads, kv_head = p.first_head + blockIdx.y;
    const int head = KEYS ? kv_head : kv_head * group + blockIdx.x % group;
    const int row0 = (int)(KEYS ? blockIdx.x : gridDim.x / group - 1 - blockIdx.x / group) * ROWS;
    const Interval seen = row_interval(p, blockIdx.z);
    if (threadIdx.x == 0) {
        mbar_init(at.x_full, 1);
        UNROLL for (int s = 0; s < STAGES; s++) {
            mbar_init(at.full + 8 * s, 1);
            mbar_init(at.empty + 8 * s, GROUPS * 4);
        }
        fence_barrier_init();
    }
    block_sync();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<24>();
        if (threadIdx.x == 0) produce<KEYS, D>(p, maps, at, seen, head, kv_head, row0);
    } else {
        setmaxnreg_inc<240>();
        consume<BF16_, KEYS, D>(p, at, smem, seen, head, row0);
    }
}

#define BOTH(dtype, is_bf16, d)                                                                                          \
    KERNEL(THREADS, 1) backward_keys_sm90_##dtype##_d##d(PARAM Backward p, PARAM Maps maps) {                             \
        backward_sm90<is_bf16, true, d>(p, maps);                                                                        \
    }                                                                                                                    \
    KERNEL(THREADS, 1) backward_queries_sm90_##dtype##_d##d(PARAM Backward p, PARAM Maps maps) {                          \
        backward_sm90<is_bf16, false, d>(p, maps);                                                                       \
    }
BOTH(bf16, true, 64)
BOTH(bf16, true, 128)
BOTH(f16, false, 64)
BOTH(f16, false, 128)
