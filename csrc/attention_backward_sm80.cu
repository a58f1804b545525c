// Gradients of attention on mma.sync and cp.async, for sm_80 and whatever came after; sweep.cuh has the formulae and the two sweeps.
//
// Both sweeps are one kernel: a block owns rows of X0 and X1, and streams rows of Y0 and Y1 past them.
//
//              X0  X1         Y0  Y1         sums
//   keys       K   V          Q   grad_out   dK += dS^T Q, dV += P^T grad_out
//   queries    Q   grad_out   K   V          dQ += dS K
//
// Each step computes X0 Y0^T and X1 Y1^T (P and dS, or their transposes), whose accumulators become operands of the sums without
// leaving registers. A warp has 32 rows, so that what it loads from shared memory serves two tiles of 16, without which shared memory
// would be the limit. For head_dim 128 that is more sums than registers: there two warps share 32 rows, each has half of a step's
// columns of the first products and 64 channels of the sums, and they hand each other their halves of P and dS.
//
//   backward_keys_sm80_*     grid: x = tiles of keys (the first ones meet most queries), y = key heads of the launch, z = batch
//   backward_queries_sm80_*  grid: x = (head of the group fastest, then tiles of queries, the last first), y, z likewise
// "small": for GPUs whose blocks get 99 KB of shared memory (8.6, 8.9, 12.0).
// Rows of q, k, v and grad_out 16-byte aligned. NaN in a key or value that only causality hides may reach the queries before it in the
// same step; of what kv_start, kv_end and kv_len hide nothing is used.
#include "segment.cuh"
#include "sweep.cuh"
#include "tiles.cuh"
#include "vectors.cuh"

constexpr int TILES = 2;  // of 16 rows, of a warp
constexpr int FAR = 1 << 30;  // beyond any key; lengths are at most half of it

template <int D, bool SMALL>
struct Shape {
    static constexpr int SHARE = D / 64;                      // warps that share 32 rows
    static constexpr int ROWS = SMALL ? 64 : 128;             // of a block
    static constexpr int OWN = SMALL ? 16 : 32;               // columns of a step whose P and dS a warp computes
    static constexpr int COLUMNS = OWN * SHARE;               // of a step
    static constexpr int WARPS = ROWS / 32 * SHARE, THREADS = WARPS * 32;
    static constexpr int X = ROWS * D * 2, Y = COLUMNS * D * 2;  // bytes of a tile
    static constexpr int STAT = COLUMNS * 8;
    static constexpr int HANDED = SHARE > 1 ? 2 * TILES * (OWN / 16) * 512 : 0;  // of a warp: its P and dS
    static constexpr int SMEM_BYTES = 2 * X + 4 * Y + 2 * STAT + WARPS * HANDED;
};
// src/cuda/kernels.rs has the same:
static_assert(Shape<64, false>::THREADS == 128 && Shape<64, false>::SMEM_BYTES == 49664, "head_dim 64");
static_assert(Shape<128, false>::THREADS == 256 && Shape<128, false>::SMEM_BYTES == 164864, "head_dim 128");
static_assert(Shape<128, true>::THREADS == 128 && Shape<128, true>::SMEM_BYTES == 74240, "head_dim 128, small");
static_assert(STATS % Shape<128, false>::COLUMNS == 0 && STATS % Shape<64, false>::COLUMNS == 0, "a step's stats are all there");

// acc = A B^T over D channels: a warp's 32 rows of one tile, N rows of another.
template <bool BF16_, int D, int N>
PRIM void multiply(float (&acc)[TILES][N / 8][4], uint32_t a_place, uint32_t b_place) {
    UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int n = 0; n < N / 8; n++) UNROLL for (int i = 0; i < 4; i++) acc[t][n][i] = 0.f;
    UNROLL for (int d = 0; d < D / 16; d++) {
        uint32_t a[TILES][4];
        UNROLL for (int t = 0; t < TILES; t++) ldmatrix_x4(a[t], channels_at(a_place, d) + t * 16 * D * 2);
        UNROLL for (int n = 0; n < N / 16; n++) {
            uint32_t b[4];  // two tiles of 8 columns
            ldmatrix_x4(b, channels_at(b_place, d) + n * 16 * D * 2);
            UNROLL for (int t = 0; t < TILES; t++) {
                mma<BF16_>(acc[t][2 * n], a[t], b[0], b[1]);
                mma<BF16_>(acc[t][2 * n + 1], a[t], b[2], b[3]);
            }
        }
    }
}

// What `multiply` left, rounded, as operands of the next product: [columns / 16][TILES].
template <bool BF16_, int N>
PRIM void round_operands(uint32_t (&w)[N / 16][TILES][4], const float (&x)[TILES][N / 8][4]) {
    UNROLL for (int k = 0; k < N / 16; k++) UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int i = 0; i < 4; i++)
        w[k][t][i] = pack<BF16_>(x[t][2 * k + i / 2][i % 2 * 2], x[t][2 * k + i / 2][i % 2 * 2 + 1]);
}

// sums += w * rows of a tile: 16 rows for each w[k], 64 channels.
template <bool BF16_, int D, int K>
PRIM void accumulate(float (&sums)[TILES][32], const uint32_t (&w)[K][TILES][4], uint32_t place) {
    UNROLL for (int k = 0; k < K; k++) UNROLL for (int d = 0; d < 4; d++) {
        uint32_t b[4];  // two tiles of 8 channels
        ldmatrix_x4_trans(b, channels_at(place, d) + k * 16 * D * 2);
        UNROLL for (int t = 0; t < TILES; t++) {
            mma<BF16_>((float(&)[4])sums[t][d * 8], w[k][t], b[0], b[1]);
            mma<BF16_>((float(&)[4])sums[t][d * 8 + 4], w[k][t], b[2], b[3]);
        }
    }
}

// What two warps hand each other: each lane's registers as they are.
template <int K>
PRIM void hand_over(uint8_t* at, const uint32_t (&w)[K][TILES][4], int lane) {
    UNROLL for (int k = 0; k < K; k++) UNROLL for (int t = 0; t < TILES; t++) {
        Words<16> x;
        UNROLL for (int i = 0; i < 4; i++) x.x[i] = w[k][t][i];
        *(Words<16>*)(at + (k * TILES + t) * 512 + lane * 16) = x;
    }
}
template <int K>
PRIM void take_over(uint32_t (&w)[K][TILES][4], const uint8_t* at, int lane) {
    UNROLL for (int k = 0; k < K; k++) UNROLL for (int t = 0; t < TILES; t++) {
        const Words<16> x = *(const Words<16>*)(at + (k * TILES + t) * 512 + lane * 16);
        UNROLL for (int i = 0; i < 4; i++) w[k][t][i] = x.x[i];
    }
}

// Starts copying a step's columns, and their stats where columns are queries.
template <bool KEYS, int D, class S>
PRIM void load_step(const Backward& p, const Sweep<KEYS, S::COLUMNS>& sweep, uint32_t y, uint32_t stats, int b, int kv_head) {
    const int head = KEYS ? sweep.head : kv_head, n = sweep.n();
    const View &y0 = KEYS ? p.q : p.k, &y1 = KEYS ? p.grad_out : p.v;
    load_rows<D, S::COLUMNS, S::THREADS>(y, row_address(y0, b, head, sweep.at), y0.row_stride, n);
    load_rows<D, S::COLUMNS, S::THREADS>(y + S::Y, row_address(y1, b, head, sweep.at), y1.row_stride, n);
    if (KEYS && threadIdx.x < S::STAT / 16)
        cp_async16(stats + threadIdx.x * 16, (const uint8_t*)(stats_of(p, b, head) + sweep.at) + threadIdx.x * 16);
    cp_async_commit();
}

// Where a thread's share of one sum of tile t lies in p.total: sum 0 of all rows of the launch, then sum 1.
template <bool KEYS, int D, class S>
PRIM TotalRows total_of(const Backward& p, int sum, int t) {
    const int thread = thread_here(), warp = thread / 32, rows = KEYS ? p.key_rows : p.q_len, group = p.q_heads / p.kv_heads;
    const int heads = KEYS ? p.heads : p.heads * group, head = KEYS ? blockIdx.y : blockIdx.y * group + blockIdx.x % group;
    const int tile = KEYS ? blockIdx.x : gridDim.x / group - 1 - blockIdx.x / group;
    const int64_t first = (((int64_t)sum * p.batch + blockIdx.z) * heads + head) * rows;
    const uint64_t channels = p.total + warp % S::SHARE * 256;
    return total_rows(channels, first, tile * S::ROWS + warp / S::SHARE * 32 + t * 16, rows, D, thread % 32);
}

// Sums become rows of a gradient; those of keys that nobody sees become 0.
template <bool BF16_, bool KEYS, int D, class S>
PRIM void store(const Backward& p, const View& to, bool f32, const float (&sums)[TILES][32], float scale, int head, int row0) {
    const int thread = thread_here(), warp = thread / 32, lane = thread % 32, b = blockIdx.z;
    const Interval seen = row_interval(p, b);
    UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int r = 0; r < 2; r++) {
        const int i = row0 + warp / S::SHARE * 32 + lane / 4 + t * 16 + r * 8;
        if (i >= (KEYS ? p.key_rows : p.q_len)) continue;
        const bool has = !KEYS || (i >= seen.lo && i < seen.hi);
        const uint64_t at = row_address(to, b, head, i);
        UNROLL for (int n = 0; n < 8; n++) {
            const int column = warp % S::SHARE * 64 + n * 8 + lane % 4 * 2;
            const float x = has ? sums[t][4 * n + 2 * r] * scale : 0.f, y = has ? sums[t][4 * n + 2 * r + 1] * scale : 0.f;
            if (f32) {
                ((float*)at)[column] = x;
                ((float*)at)[column + 1] = y;
            } else {
                ((uint32_t*)at)[column / 2] = pack<BF16_>(x, y);
            }
        }
    }
}

template <bool BF16_, bool KEYS, int D, bool SMALL>
PRIM void backward_sm80(const Backward& p) {
    using S = Shape<D, SMALL>;
    DYN_SMEM(smem);
    const uint32_t x0 = smem_u32(smem), x1 = x0 + S::X, y = x1 + S::X, stats = y + 4 * S::Y;  // y: Y0, Y1 of this step, and of the next
    uint8_t* const handed = smem + 2 * S::X + 4 * S::Y + 2 * S::STAT;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = warp % S::SHARE, group = p.q_heads / p.kv_heads;
    const int b = blockIdx.z, kv_head = p.first_head + blockIdx.y, head = KEYS ? kv_head : kv_head * group + blockIdx.x % group;
    const int row0 = (int)(KEYS ? blockIdx.x : gridDim.x / group - 1 - blockIdx.x / group) * S::ROWS;
    const int row = row0 + warp / S::SHARE * 32 + lane / 4;  // this thread's rows: that one and 8, 16 and 24 after it
    const Interval seen = row_interval(p, b);
    const int offset = p.causal ? clamp_(p.q_start, -FAR, FAR) : FAR;  // query i sees keys up to i + offset

    float sum0[TILES][32], sum1[TILES][32];
    UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int i = 0; i < 32; i++) sum0[t][i] = sum1[t][i] = 0.f;
    Stat own[TILES][2];  // of queries that are rows
    if (!KEYS)
        UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int r = 0; r < 2; r++)
            own[t][r] = stats_of(p, b, head)[row + t * 16 + r * 8];
    constexpr int FOLD = SEGMENT / S::COLUMNS;  // steps of a segment
    int steps = 0;

    Sweep<KEYS, S::COLUMNS> sweep;
    sweep.begin(p, seen, row0, S::ROWS, head);
    if (sweep.n()) {
        const View &v0 = KEYS ? p.k : p.q, &v1 = KEYS ? p.v : p.grad_out;
        const int row_hi = KEYS ? seen.hi : p.q_len;
        load_rows<D, S::ROWS, S::THREADS>(x0, row_address(v0, b, head, row0), v0.row_stride, row_hi - row0);
        load_rows<D, S::ROWS, S::THREADS>(x1, row_address(v1, b, head, row0), v1.row_stride, row_hi - row0);
        load_step<KEYS, D, S>(p, sweep, y, stats, b, kv_head);
    }
    while (const int n = sweep.n()) {
        const int at = sweep.at;
        cp_async_wait<0>();
        block_sync();  // this step is there, and nobody reads the last one any more
        const int stage = steps & 1, next = stage ^ 1;
        const uint32_t y0 = y + stage * 2 * S::Y, y1 = y0 + S::Y;
        const Stat* const stat = (const Stat*)(smem + 2 * S::X + 4 * S::Y + stage * S::STAT) + share * S::OWN + lane % 4 * 2;
        sweep.next();
        if (sweep.n()) load_step<KEYS, D, S>(p, sweep, y + next * 2 * S::Y, stats + next * S::STAT, b, kv_head);
        if (p.total && steps > 0 && steps % FOLD == 0) {
            const float keep[2] = {1.f, 1.f};
            UNROLL for (int t = 0; t < TILES; t++) {
                fold(sum0[t], total_of<KEYS, D, S>(p, 0, t), keep, steps > FOLD);
                if (KEYS) fold(sum1[t], total_of<KEYS, D, S>(p, 1, t), keep, steps > FOLD);
            }
        }
        steps++;

        // As many columns at a time as there are registers for.
        constexpr int PART = KEYS && D == 64 ? 16 : S::OWN, K = S::OWN / 16;
        const int a_row = warp / S::SHARE * 32 + lane % 16, b_row = share * S::OWN + lane / 16 * 8 + lane % 8;
        uint32_t w[K][TILES][4], ds[K][TILES][4];
        UNROLL for (int part = 0; part < S::OWN; part += PART) {
            // Weights: exp2(scale X0 Y0^T - lse).
            float weight[TILES][PART / 8][4], slope[TILES][PART / 8][4];
            multiply<BF16_, D, PART>(weight, chunk_at<D>(x0, a_row, lane / 16), chunk_at<D>(y0, b_row, lane / 8 % 2) + part * D * 2);
            const int column = at + share * S::OWN + part + lane % 4 * 2;  // this thread's columns: that one, the next, and every 8 after
            UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int m = 0; m < PART / 8; m++) UNROLL for (int i = 0; i < 4; i++) {
                const float lse = KEYS ? stat[part + m * 8 + i % 2].lse : own[t][i / 2].lse;
                weight[t][m][i] = ex2(fma_rn(weight[t][m][i], p.scale, -lse));
            }
            // Hidden ones are 0: by causality where the step crosses the diagonal, beyond the last key. (Beyond the last query P is 0.)
            const bool whole = KEYS ? row0 + S::ROWS - 1 <= at + offset : n == S::COLUMNS && at + S::COLUMNS - 1 <= row0 + offset;
            if (!whole)
                UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int m = 0; m < PART / 8; m++) UNROLL for (int i = 0; i < 4; i++) {
                    const int r = row + t * 16 + i / 2 * 8, c = column + m * 8 + i % 2;
                    const bool visible = KEYS ? r <= c + offset : c <= r + offset && c < at + n;
                    weight[t][m][i] = visible ? weight[t][m][i] : 0.f;
                }
            // Slopes: P (X1 Y1^T - delta).
            multiply<BF16_, D, PART>(slope, chunk_at<D>(x1, a_row, lane / 16), chunk_at<D>(y1, b_row, lane / 8 % 2) + part * D * 2);
            UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int m = 0; m < PART / 8; m++) UNROLL for (int i = 0; i < 4; i++) {
                const float delta = KEYS ? stat[part + m * 8 + i % 2].delta : own[t][i / 2].delta;
                slope[t][m][i] = weight[t][m][i] * (slope[t][m][i] - delta);
            }
            round_operands<BF16_, PART>((uint32_t(&)[PART / 16][TILES][4])ds[part / 16], slope);
            if (KEYS) round_operands<BF16_, PART>((uint32_t(&)[PART / 16][TILES][4])w[part / 16], weight);
        }
        uint8_t* const mine = handed + warp * S::HANDED;
        if (S::SHARE > 1) hand_over(mine, ds, lane);
        if (KEYS && S::SHARE > 1) hand_over(mine + S::HANDED / 2, w, lane);
        const uint32_t place = chunk_at<D>(0, lane % 16, lane / 16) + share * 128;  // of 64 channels of the sums
        accumulate<BF16_, D>(sum0, ds, y0 + place + share * S::OWN * D * 2);
        if (KEYS) accumulate<BF16_, D>(sum1, w, y1 + place + share * S::OWN * D * 2);
        if (S::SHARE > 1) {
            named_bar_sync(1 + warp / S::SHARE, 32 * S::SHARE);  // the other half is there
            const uint8_t* const theirs = handed + (warp ^ 1) * S::HANDED;
            const uint32_t other = (share ^ 1) * S::OWN * D * 2;
            take_over(ds, theirs, lane);
            accumulate<BF16_, D>(sum0, ds, y0 + place + other);
            if (KEYS) {
                take_over(w, theirs + S::HANDED / 2, lane);
                accumulate<BF16_, D>(sum1, w, y1 + place + other);
            }
        }
    }

    if (p.total && steps > FOLD) {
        const float keep[2] = {1.f, 1.f};
        UNROLL for (int t = 0; t < TILES; t++) {
            unfold(sum0[t], total_of<KEYS, D, S>(p, 0, t), keep);
            if (KEYS) unfold(sum1[t], total_of<KEYS, D, S>(p, 1, t), keep);
        }
    }
    store<BF16_, KEYS, D, S>(p, KEYS ? p.dk : p.dq, KEYS ? p.dk_f32 : p.dq_f32, sum0, p.softmax_scale, head, row0);
    if (KEYS) store<BF16_, KEYS, D, S>(p, p.dv, p.dv_f32, sum1, 1.f, head, row0);
}

#define BOTH(dtype, is_bf16, d, suffix, small, blocks)                                                                    \
    KERNEL((Shape<d, small>::THREADS), blocks) backward_keys_sm80_##dtype##suffix(PARAM Backward p) {                      \
        backward_sm80<is_bf16, true, d, small>(p);                                                                        \
    }                                                                                                                     \
    KERNEL((Shape<d, small>::THREADS), blocks) backward_queries_sm80_##dtype##suffix(PARAM Backward p) {                   \
        backward_sm80<is_bf16, false, d, small>(p);                                                                       \
    }
BOTH(bf16, true, 64, _d64, false, 2)
BOTH(bf16, true, 128, _d128, false, 1)
BOTH(bf16, true, 128, _d128_small, true, 1)
BOTH(f16, false, 64, _d64, false, 2)
BOTH(f16, false, 128, _d128, false, 1)
BOTH(f16, false, 128, _d128_small, true, 1)
