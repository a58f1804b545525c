// Decode: few queries, many keys. The keys are cut into splits; a block takes one split of one kv head, and leaves a
// partial (out, lse) that merge.cu joins. Bound by memory: everything is arranged around the stream of K and V.
//
// - The rows of the 16-row tensor-core tile are (query, head of the group) pairs: a kv head's keys are read once for all
//   of its query heads.
// - A warp takes a group of GROUP = 64 tokens at a time, every WARPS-th of the split, in pieces: K, then V, dense ones in
//   halves. Pieces come by cp.async into a ring of the warp's own, so that no barrier of the block stands in the loop.
// - What a matmul sums over may come in any order, and so may its columns. Tokens and channels are dealt out so that what
//   a lane reads with one instruction is its own B fragments: no shuffle, no transposition, codes become numbers in place.
// - K and V branch apart, by the formats of the page, which are the same for the whole block: 4 + 4 bodies serve 16 pairs.
//
// How they are dealt out, lane = 4 n + c. Tile 4 h + i of S = Q K^T, column x: token 32 h + 4 x + i. So a lane reads K of
// tokens 32 h + 4 n + i, and after the matmul it has, of rows n and n + 8, tokens 32 h + 8 c + 0..7: those whose V it needs.
// k-step 2 h + e of O = P V: tokens 32 h + 8 c + 4 e + 0..3. Of channels a lane has
//   in K: of dense rows and int4 those of units of 8 channels c, 4 + c, ...; of int8 and fp8 units of 4 channels alike
//   in O: column x of tile 8 b + j is channel 64 b + 8 x + j; int4: 64 b + 32 (j / 4) + 4 x + j % 4
//
// Compact K: scores = (q scale) code + q offset. q scale is made anew for each group, in float16, q brought to 4 at most
// (its exponent goes into the softmax scale): codes, scales and offsets are exact, the product is rounded to 2^-11.
// Compact V: out = (p scale) code + p offset, the first in bfloat16, the second in float16 with p times 2^PEAK.
//
//   grid: x = tiles of ROWS rows, the fastest, times splits; y = kv heads; z = batch
//   THREADS 128, dynamic shared memory SMEM_BYTES<head_dim>: three blocks on a multiprocessor of sm_90, two on sm_80
#include "codes.cuh"
#include "mask.cuh"
#include "vectors.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, ROWS = 16;
constexpr int PARAM_BYTES = 512;  // of a group: K 2 * 128 * 2, V 4 * 64 * 2
template <int D>
constexpr int SLOT_BYTES = 64 * D + PARAM_BYTES;  // a piece: 32 dense tokens or 64 compact ones
template <int D>
constexpr int SLOTS = 256 / D;
template <int D>
constexpr int RING_BYTES = SLOTS<D> * SLOT_BYTES<D>;  // of a warp
template <int D>
constexpr int SMEM_BYTES = WARPS * RING_BYTES<D> + ROWS * D * 2 + 288;  // and Common
static_assert(SMEM_BYTES<128> == 74016 && SMEM_BYTES<64> == 76064, "what src/cuda/kernels.rs gives");
template <int D>
constexpr int OUT_PITCH = D + 4;  // floats; at the end the rings hold the warps' outputs, then m and l
static_assert(ROWS * (OUT_PITCH<128> + 2) * 4 <= RING_BYTES<128> && ROWS * (OUT_PITCH<64> + 2) * 4 <= RING_BYTES<64>,
              "a warp's output fits into its ring");
constexpr float PEAK = 14.f;  // weights are at most 2^14: in float16 they reach down to 2^-38 of that
constexpr float LN2 = 0.6931471805599453f;

using Four = Words<16>;
using Two = Words<8>;

// What a block works at. Tokens are counted within the page.
struct Task {
    int k_format, v_format;
    int lo, hi;  // tokens that some row may see
    int shared;  // one past the last that every row sees
};

struct Rows {
    int b, kv_head, group, first;  // group: query heads of a kv head
    int split;
};

// Where K or V of this batch row and head is.
struct alignas(16) Source {
    uint64_t rows, params;
    int64_t stride, param_stride;
};

// What all warps use and no register is to be spent on; in shared memory.
template <int D>
struct Common {
    Four q[D / 16][32];  // Q as A fragments
    Task task;
    Source k, v;
    Rows rows;
    float scale[ROWS];   // what scores of a row are to be multiplied by
    int end[ROWS];       // one past the last token that a row sees
};

static_assert(sizeof(Common<64>) + WARPS * RING_BYTES<64> <= SMEM_BYTES<64>, "Common is counted");

// A warp's next piece: phases of a group are those of K, then those of V.
struct Piece {
    int group, phase;
};

// The running softmax of a warp; rows n = lane / 4 and n + 8.
template <int D>
struct State {
    float m[2], l[2];
    float s[8][4];    // scores, then weights
    float o[D / 8][4];
    float offset[4];  // compact V: sums of p * offset; columns 0 and 1 are blocks of 64 channels
};

template <int DTYPE>
PRIM uint32_t pack(float lo, float hi) {
    if constexpr (DTYPE == BF16)
        return pack_bf16(lo, hi);
    else
        return pack_f16(lo, hi);
}

template <int DTYPE>
PRIM void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (DTYPE == BF16)
        mma_m16n8k16_bf16(d, a, b0, b1);
    else
        mma_m16n8k16_f16(d, a, b0, b1);
}

PRIM int min_(int a, int b) { return a < b ? a : b; }
PRIM int max_(int a, int b) { return a > b ? a : b; }

PRIM bool is_row(const Attn& p, const Rows& rows, int r) { return rows.first + r < rows.group * p.q_len; }
PRIM int query_of(const Rows& rows, int r) { return (rows.first + r) / rows.group; }
PRIM int head_of(const Rows& rows, int r) { return rows.kv_head * rows.group + (rows.first + r) % rows.group; }

PRIM int phases_of(int format) { return format == DENSE ? 2 : 1; }

// Where a token of compact V lies in its piece: rows of BYTES, 4 lanes' tokens side by side, and the 16-byte chunks of a row
// swapped so that lanes that read at once meet different banks.
template <int BYTES>
PRIM int value_place(int token, int c, int chunk) {
    const int swapped = BYTES == 128 ? chunk ^ 2 * c : BYTES == 64 ? chunk ^ (c & 2) : chunk;
    return token * 4 * BYTES + c * BYTES + swapped * 16;
}

template <int D>
PRIM void fetch_dense_keys(Task t, Source from, int first, uint32_t slot) {
    const int lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
    UNROLL for (int i = 0; i < 4; i++) {
        const int token = first + 4 * n + i, bytes = token >= t.lo && token < t.hi ? 16 : 0;
        const uint64_t row = from.rows + token * from.stride + 16 * c;
        UNROLL for (int x = 0; x < D / 32; x++)
            cp_async16_zfill(slot + ((i * (D / 32) + x) * 32 + lane) * 16, (const void*)(row + 64 * x), bytes);
    }
}

// The group is there as a whole, whatever of it is in use.
template <int KF, int D>
PRIM void fetch_compact_keys(Task t, Source from, int group, uint32_t slot) {
    const int lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
    const uint64_t row = from.rows + group * from.stride + 4 * GROUP * c + 16 * n;
    UNROLL for (int x = 0; x < D / FOLD<KF> / 4; x++) UNROLL for (int h = 0; h < 2; h++)
        cp_async16(slot + ((2 * x + h) * 32 + lane) * 16, (const void*)(row + 16 * GROUP * x + 128 * h));
    if (lane < D / 4)
        cp_async16(slot + 64 * D + 16 * lane, (const void*)(from.params + group * from.param_stride + 16 * lane));
}

// Hidden values may be no numbers, and 0 * NaN is NaN: they come as zeros.
template <int D>
PRIM void fetch_dense_values(Task t, Source from, int first, uint32_t slot) {
    const int lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
    UNROLL for (int i = 0; i < 8; i++) {
        const int token = first + 8 * c + i, bytes = token >= t.lo && token < t.hi ? 16 : 0;
        const uint64_t row = from.rows + token * from.stride + 16 * n;
        UNROLL for (int b = 0; b < D / 64; b++)
            cp_async16_zfill(slot + ((i * (D / 64) + b) * 32 + lane) * 16, (const void*)(row + 128 * b), bytes);
    }
}

template <int VF, int D>
PRIM void fetch_compact_values(Task t, Source from, int group, uint32_t slot) {
    constexpr int BYTES = VF == INT4 ? D / 2 : D, CHUNKS = BYTES / 16, TOKENS = 8 / CHUNKS;  // a lane's, of one instruction
    const int lane = threadIdx.x % 32, n = lane / 4, c = lane % 4, chunk = n % CHUNKS;
    UNROLL for (int x = 0; x < 16 / TOKENS; x++) {
        const int mine = x * TOKENS + n / CHUNKS;  // of the 16 that lanes c have
        const int token = GROUP * group + mine / 8 * 32 + 8 * c + mine % 8;
        cp_async16_zfill(slot + value_place<BYTES>(mine, c, chunk), (const void*)(from.rows + token * from.stride + 16 * chunk),
                         token >= t.lo && token < t.hi ? 16 : 0);
    }
    // Rows of scales, then of offsets, one for each 64 channels; 64 tokens of each.
    const int token = GROUP * group + 8 * (lane % 8);
    if (lane < D / 4)
        cp_async16_zfill(slot + 64 * D + 16 * lane, (const void*)(from.params + lane / 8 * from.param_stride + 2 * token),
                         max_(0, min_(16, 2 * (t.hi - token))));
}

template <int D>
PRIM void fetch(const Common<D>& common, Piece at, uint32_t slot) {
    const Task t = common.task;  // read once, not after each copy
    const int k_phases = phases_of(t.k_format), half = at.phase < k_phases ? at.phase : at.phase - k_phases;
    if (at.phase < k_phases) switch (t.k_format) {
            case DENSE: fetch_dense_keys<D>(t, common.k, GROUP * at.group + 32 * half, slot); break;
            case INT4: fetch_compact_keys<INT4, D>(t, common.k, at.group, slot); break;
            default: fetch_compact_keys<INT8, D>(t, common.k, at.group, slot); break;  // fp8 lies likewise
        }
    else switch (t.v_format) {
            case DENSE: fetch_dense_values<D>(t, common.v, GROUP * at.group + 32 * half, slot); break;
            case INT4: fetch_compact_values<INT4, D>(t, common.v, at.group, slot); break;
            default: fetch_compact_values<INT8, D>(t, common.v, at.group, slot); break;
        }
}

template <int DTYPE, int D, int HALF>
PRIM void dense_scores(const Four* slot, const Common<D>& common, State<D>& x) {
    const int lane = threadIdx.x % 32;
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int e = 0; e < 4; e++) x.s[4 * HALF + i][e] = 0.f;
    UNROLL for (int u = 0; u < D / 32; u++) {
        const Four q0 = common.q[2 * u][lane], q1 = common.q[2 * u + 1][lane];
        UNROLL for (int i = 0; i < 4; i++) {
            const Four k = slot[(i * (D / 32) + u) * 32 + lane];
            mma<DTYPE>(x.s[4 * HALF + i], q0.x, k.x[0], k.x[1]);
            mma<DTYPE>(x.s[4 * HALF + i], q1.x, k.x[2], k.x[3]);
        }
    }
}

template <int KF, int D>
PRIM void compact_scores(const Four* slot, const Common<D>& common, State<D>& x) {
    constexpr int STEPS = FOLD<KF> / 4;  // k-steps of a unit of each lane
    const int lane = threadIdx.x % 32, c = lane % 4;
    const Words<8 * STEPS>* const params = (const Words<8 * STEPS>*)(slot + 4 * D);  // scales of D channels, then offsets
    float same[4] = {0.f, 0.f, 0.f, 0.f};  // for all columns
    UNROLL for (int t = 0; t < 8; t++) UNROLL for (int e = 0; e < 4; e++) x.s[t][e] = 0.f;
    UNROLL for (int u = 0; u < D / FOLD<KF> / 4; u++) {
        const auto scales = params[4 * u + c], offsets = params[D / FOLD<KF> + 4 * u + c];
        uint32_t a[STEPS][4];
        UNROLL for (int k = 0; k < STEPS; k++) {
            const Four plain = common.q[u * STEPS + k][lane];
            mma_m16n8k16_f16(same, plain.x, offsets.x[2 * k], offsets.x[2 * k + 1]);
            UNROLL for (int r = 0; r < 4; r++) a[k][r] = mul_f16x2(plain.x[r], scales.x[2 * k + r / 2]);
            if constexpr (KF != FP8) mma_m16n8k16_f16(same, a[k], KEY_BIAS<KF>, KEY_BIAS<KF>);
        }
        UNROLL for (int h = 0; h < 2; h++) {
            const Four units = slot[(2 * u + h) * 32 + lane];
            UNROLL for (int i = 0; i < 4; i++) {
                uint32_t pair[2 * STEPS];
                key_pairs<KF>(units.x[i], pair);
                UNROLL for (int k = 0; k < STEPS; k++) mma_m16n8k16_f16(x.s[4 * h + i], a[k], pair[2 * k], pair[2 * k + 1]);
            }
        }
    }
    UNROLL for (int t = 0; t < 8; t++) UNROLL for (int e = 0; e < 4; e++) x.s[t][e] += same[e];
}

// Scores to weights; `first`: the group's first token.
template <int D>
PRIM void softmax(const Common<D>& common, int first, State<D>& x) {
    const Task t = common.task;
    const int n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const float scale[2] = {common.scale[n], common.scale[n + 8]};
    UNROLL for (int i = 0; i < 8; i++) UNROLL for (int e = 0; e < 4; e++) x.s[i][e] *= scale[e / 2];
    if (first < t.lo || first + GROUP > t.shared) {
        const int end[2] = {common.end[n], common.end[n + 8]};
        UNROLL for (int i = 0; i < 8; i++) UNROLL for (int e = 0; e < 4; e++) {
            const int token = first + i / 4 * 32 + 8 * c + e % 2 * 4 + i % 4;
            if (token < t.lo || token >= end[e / 2]) x.s[i][e] = -INF;
        }
    }
    float most[2] = {x.m[0], x.m[1]};
    UNROLL for (int i = 0; i < 8; i++) UNROLL for (int e = 0; e < 4; e++) most[e / 2] = fmax_(most[e / 2], x.s[i][e]);
    bool moved = false;
    UNROLL for (int r = 0; r < 2; r++) {
        most[r] = fmax_(most[r], shfl_xor(most[r], 1));
        most[r] = fmax_(most[r], shfl_xor(most[r], 2));
        moved |= most[r] != x.m[r];
    }
    if (vote_any(moved)) {  // seldom, after the first keys
        UNROLL for (int r = 0; r < 2; r++) {
            const float keep = most[r] == x.m[r] ? 1.f : ex2(x.m[r] - most[r]);
            x.m[r] = most[r];
            x.l[r] *= keep;
            UNROLL for (int i = 0; i < D / 8; i++) UNROLL for (int e = 0; e < 2; e++) x.o[i][2 * r + e] *= keep;
            UNROLL for (int e = 0; e < 2; e++) x.offset[2 * r + e] *= keep;
        }
    }
    UNROLL for (int r = 0; r < 2; r++) {
        const float base = x.m[r] == -INF ? 0.f : x.m[r] - PEAK;  // nothing seen yet: exp2(-inf - 0) is 0
        UNROLL for (int i = 0; i < 8; i++) UNROLL for (int e = 2 * r; e < 2 * r + 2; e++) {
            x.s[i][e] = ex2(x.s[i][e] - base);
            x.l[r] += x.s[i][e];
        }
    }
}

// Weights of the four tokens of a k-step as an A fragment: token 0 and 1 for columns 2 c, 2 c + 1, then 2 and 3; rows n, n + 8.
template <int DTYPE, int D>
PRIM void weights(const State<D>& x, int step, const float (&scale)[4], uint32_t (&a)[4]) {
    const int i = step / 2 * 4, e = step % 2;
    UNROLL for (int r = 0; r < 4; r++) {
        const int first = r / 2 * 2;  // of the four tokens
        a[r] = pack<DTYPE>(x.s[i + first][e + r % 2 * 2] * scale[first], x.s[i + first + 1][e + r % 2 * 2] * scale[first + 1]);
    }
}

template <int DTYPE, int D, int HALF>
PRIM void dense_output(const Four* slot, State<D>& x) {
    const int lane = threadIdx.x % 32;
    UNROLL for (int e = 0; e < 2; e++) {
        uint32_t a[4];
        weights<DTYPE>(x, 2 * HALF + e, {1.f, 1.f, 1.f, 1.f}, a);
        UNROLL for (int b = 0; b < D / 64; b++) {
            Four v[4];
            UNROLL for (int i = 0; i < 4; i++) v[i] = slot[((4 * e + i) * (D / 64) + b) * 32 + lane];
            UNROLL for (int j = 0; j < 8; j++) {
                const uint32_t half = j % 2 ? 0x7632 : 0x5410;
                mma<DTYPE>(x.o[8 * b + j], a, prmt(v[0].x[j / 2], v[1].x[j / 2], half),
                           prmt(v[2].x[j / 2], v[3].x[j / 2], half));
            }
        }
    }
}

// Zeros for scales and offsets of V that belong to hidden tokens.
template <int D>
PRIM void hide_params(Task t, int first, uint8_t* params) {
    const int lane = threadIdx.x % 32, token = first + 8 * (lane % 8);
    if (lane >= D / 4) return;
    Four& mine = ((Four*)params)[lane];
    Four w = mine;
    UNROLL for (int i = 0; i < 8; i++)
        if (token + i < t.lo || token + i >= t.hi) w.x[i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
    mine = w;
}

template <int VF, int D>
PRIM void compact_output(Task t, int first, uint8_t* slot, State<D>& x) {
    constexpr int BYTES = VF == INT4 ? D / 2 : D, MINE = BYTES / (D / 64) / 8;  // MINE: a lane's bytes of 64 channels
    const int lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
    if (first < t.lo || first + GROUP > t.hi) {  // what belongs to hidden tokens may be no number
        hide_params<D>(t, first, slot + 64 * D);
        warp_sync();
    }
    UNROLL for (int step = 0; step < 4; step++) {
        const int token = step / 2 * 32 + 8 * c + step % 2 * 4;  // of the group, the first of four
        auto params = [&](int row) { return *(const Two*)(slot + 64 * D + 128 * row + 2 * token); };
        uint32_t a[4];
        weights<F16>(x, step, {1.f, 1.f, 1.f, 1.f}, a);
        const Two offsets = params(D / 64 + n % (D / 64));
        mma_m16n8k16_f16(x.offset, a, n < D / 64 ? offsets.x[0] : 0u, n < D / 64 ? offsets.x[1] : 0u);
        UNROLL for (int b = 0; b < D / 64; b++) {
            const Two scales = params(b);
            float f[4];
            UNROLL for (int i = 0; i < 4; i++) f[i] = half_to_float((uint16_t)(scales.x[i / 2] >> (16 * (i % 2))));
            weights<BF16>(x, step, f, a);
            const int byte = b * 8 * MINE + n * MINE;
            Words<MINE> v[4];
            UNROLL for (int i = 0; i < 4; i++)
                v[i] = *(const Words<MINE>*)(slot + value_place<BYTES>(4 * step + i, c, byte / 16) + byte % 16);
            UNROLL for (int j = 0; j < MINE; j++) {
                const uint32_t b0 = bytes_of_two(v[0].x[j / 4], v[1].x[j / 4], j % 4);
                const uint32_t b1 = bytes_of_two(v[2].x[j / 4], v[3].x[j / 4], j % 4);
                mma_m16n8k16_bf16(x.o[8 * b + j], a, value_pair<VF>(b0), value_pair<VF>(b1));
                if constexpr (VF == INT4)
                    mma_m16n8k16_bf16(x.o[8 * b + 4 + j], a, value_pair<VF>(b0 >> 4), value_pair<VF>(b1 >> 4));
            }
        }
    }
}

// First channel of the four that a lane's A fragment has of k-step `step`.
PRIM int channel_of(int k_format, int step, int c) {
    return k_format == INT8 || k_format == FP8 ? 16 * step + 4 * c : step / 2 * 32 + 8 * c + step % 2 * 4;
}

// Q as A fragments, each warp some k-steps; and what scores are to be multiplied by.
template <int DTYPE, int D>
PRIM void load_q(const Attn& p, int k_format, Common<D>& common) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
    float factor[2], scale[2];
    uint64_t from[2];
    UNROLL for (int r = 0; r < 2; r++) {
        const int row = n + 8 * r;
        const Rows& rows = common.rows;
        from[r] = is_row(p, rows, row) ? row_address(p.q, rows.b, head_of(rows, row), query_of(rows, row)) : 0;
        scale[r] = p.scale;
        factor[r] = 1.f;
        if (k_format == DENSE) continue;
        float most = 0.f;
        if (from[r])
            UNROLL for (int d = 8 * c; d < D; d += 32) {
                float x[8];
                load_elements<DTYPE>(from[r], d, x);
                UNROLL for (int i = 0; i < 8; i++) most = fmax_(most, abs_(x[i]));
            }
        most = fmax_(most, shfl_xor(most, 1));
        most = fmax_(most, shfl_xor(most, 2));
        // To 2 <= most < 4, so that no scale takes it out of float16. Zeros stay; what is no number comes out as that.
        const int exponent = max_(-100, min_(100, (int)(float_bits(most) >> 23 & 255) - 128));
        factor[r] = bits_float((uint32_t)(127 - exponent) << 23);
        scale[r] = p.scale * bits_float((uint32_t)(127 + exponent) << 23);
    }
    UNROLL for (int step = warp; step < D / 16; step += WARPS) {
        Four a;
        UNROLL for (int r = 0; r < 2; r++) {
            float x[4] = {0.f, 0.f, 0.f, 0.f};
            if (from[r]) load_elements<DTYPE>(from[r], channel_of(k_format, step, c), x);
            UNROLL for (int i = 0; i < 2; i++)
                a.x[r + 2 * i] = k_format == DENSE ? pack<DTYPE>(x[2 * i], x[2 * i + 1])
                                                     : pack_f16(x[2 * i] * factor[r], x[2 * i + 1] * factor[r]);
        }
        common.q[step][lane] = a;
    }
    if (warp == 0 && c == 0) {
        common.scale[n] = scale[0];
        common.scale[n + 8] = scale[1];
    }
}

// A piece that has come.
template <int DTYPE, int D>
PRIM void take(const Common<D>& common, Piece at, uint8_t* slot, State<D>& x) {
    const Task t = common.task;
    const Four* const fours = (const Four*)slot;
    const int k_phases = phases_of(t.k_format), first = GROUP * at.group;
    if (at.phase < k_phases) {
        switch (t.k_format) {
            case DENSE:
                if (at.phase == 0)
                    dense_scores<DTYPE, D, 0>(fours, common, x);
                else
                    dense_scores<DTYPE, D, 1>(fours, common, x);
                break;
            case INT8: compact_scores<INT8>(fours, common, x); break;
            case INT4: compact_scores<INT4>(fours, common, x); break;
            default: compact_scores<FP8>(fours, common, x); break;
        }
        if (at.phase == k_phases - 1) softmax(common, first, x);
        return;
    }
    switch (t.v_format) {
        case DENSE:
            if (at.phase == k_phases)
                dense_output<DTYPE, D, 0>(fours, x);
            else
                dense_output<DTYPE, D, 1>(fours, x);
            break;
        case INT8: compact_output<INT8>(t, first, slot, x); break;
        case INT4: compact_output<INT4>(t, first, slot, x); break;
        default: compact_output<FP8>(t, first, slot, x); break;
    }
}

// The n-th piece of a warp, from one number: registers are dear.
PRIM Piece piece(const Task& t, int n) {
    const int phases = phases_of(t.k_format) + phases_of(t.v_format);  // 2, 3 or 4
    const int round = phases == 3 ? n / 3 : n >> phases / 2;
    return {t.lo / GROUP + (int)threadIdx.x / 32 + round * WARPS, n - round * phases};
}

PRIM bool is_there(const Task& t, Piece at) { return t.lo < t.hi && at.group * GROUP < t.hi; }

// A warp's share of a split: every WARPS-th group.
template <int DTYPE, int D>
PRIM void run(const Attn& p, Common<D>& common, uint8_t* smem, State<D>& x) {
    uint8_t* const ring = smem + threadIdx.x / 32 * RING_BYTES<D>;
    auto fetch_piece = [&](int n) {
        const Piece next = piece(common.task, n);
        if (is_there(common.task, next)) fetch<D>(common, next, smem_u32(ring + n % SLOTS<D> * SLOT_BYTES<D>));
        cp_async_commit();
    };
#pragma unroll 1
    for (int n = 0; n < SLOTS<D>; n++) fetch_piece(n);
    load_q<DTYPE>(p, common.task.k_format, common);  // while the first pieces are on their way
    block_sync();
    for (int n = 0;; n++) {
        const Piece at = piece(common.task, n);
        if (!is_there(common.task, at)) break;
        cp_async_wait<SLOTS<D> - 1>();
        warp_sync();
        take<DTYPE>(common, at, ring + n % SLOTS<D> * SLOT_BYTES<D>, x);
        warp_sync();  // all lanes are done with the slot
        fetch_piece(n + SLOTS<D>);
    }
}

// Each warp's output to its ring: [ROWS][OUT_PITCH], then m and l of its rows.
template <int D>
PRIM void leave(int v_format, uint8_t* smem, State<D>& x) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
    float* const out = (float*)(smem + warp * RING_BYTES<D>);
    float* const m = out + ROWS * OUT_PITCH<D>;
    warp_sync();
    UNROLL for (int i = 0; i < 4; i++) {  // columns 0 and 1 are lane c = 0's, the others 0
        x.offset[i] += shfl_xor(x.offset[i], 1);
        x.offset[i] += shfl_xor(x.offset[i], 2);
    }
    UNROLL for (int r = 0; r < 2; r++) {
        x.l[r] += shfl_xor(x.l[r], 1);
        x.l[r] += shfl_xor(x.l[r], 2);
        if (c == 0) {
            m[n + 8 * r] = x.m[r];
            m[ROWS + n + 8 * r] = x.l[r];
        }
        UNROLL for (int b = 0; b < D / 64; b++) UNROLL for (int half = 0; half < 2; half++) UNROLL for (int e = 0; e < 2; e++) {
            const int column = 2 * c + e, channel = v_format == INT4 ? 32 * half + 4 * column : 8 * column + 4 * half;
            Four four;
            UNROLL for (int j = 0; j < 4; j++)
                four.x[j] = float_bits(x.o[8 * b + 4 * half + j][2 * r + e] + x.offset[2 * r + b]);
            *(Four*)(out + (n + 8 * r) * OUT_PITCH<D> + 64 * b + channel) = four;
        }
    }
}

// The block's partial, from its warps'.
template <int DTYPE, int D>
PRIM void finish(const Attn& p, const Rows& rows, const uint8_t* smem) {
    const int r = threadIdx.x / 8;
    if (!is_row(p, rows, r)) return;
    auto warps = [&](int w) { return (const float*)(smem + w * RING_BYTES<D>); };
    const int head = head_of(rows, r), i = query_of(rows, r);
    float m = -INF, l = 0.f, weight[WARPS];
    UNROLL for (int w = 0; w < WARPS; w++) m = fmax_(m, warps(w)[ROWS * OUT_PITCH<D> + r]);
    UNROLL for (int w = 0; w < WARPS; w++) {
        const float* const own = warps(w) + ROWS * OUT_PITCH<D> + r;
        weight[w] = own[0] == -INF ? 0.f : ex2(own[0] - m);
        l += weight[w] * own[ROWS];
    }
    const bool none = l == 0.f, whole = p.splits == 1;
    const int64_t row = ((int64_t)rows.b * p.q_heads + head) * p.q_len + i;
    const int64_t at = rows.split * (int64_t)p.batch * p.q_heads * p.q_len + row;
    if (threadIdx.x % 8 == 0) {
        const float lse = none ? -INF : (m - PEAK + lg2(l)) * LN2;
        if (!whole)
            ((float*)p.part_lse)[at] = lse;
        else if (p.lse)
            ((float*)p.lse)[row] = lse;
    }
    const uint64_t out = whole ? row_address(p.out, rows.b, head, i) : p.part_out + 4 * at * D;
    const float inverse = none ? 0.f : 1.f / l;
    UNROLL for (int d = threadIdx.x % 8 * 4; d < D; d += 32) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        UNROLL for (int w = 0; w < WARPS; w++) {
            const Four four = *(const Four*)(warps(w) + r * OUT_PITCH<D> + d);
            UNROLL for (int j = 0; j < 4; j++) sum[j] += weight[w] * bits_float(four.x[j]);
        }
        UNROLL for (int j = 0; j < 4; j++) sum[j] *= inverse;
        if (!whole || p.out_f32)
            store_elements<F32>(out, d, sum);
        else
            store_elements<DTYPE>(out, d, sum);
    }
}

template <int DTYPE, int D>
PRIM void decode(const Attn& p) {
    DYN_SMEM(smem);
    Common<D>& common = *(Common<D>*)(smem + WARPS * RING_BYTES<D>);
    const int group = p.q_heads / p.kv_heads, tiles = (group * p.q_len + ROWS - 1) / ROWS;
    const int tile = blockIdx.x % tiles;
    const Rows rows = {(int)blockIdx.z, (int)blockIdx.y, group, tile * ROWS, (int)(blockIdx.x / tiles)};
    int page = 0, split = rows.split;
    for (; page < p.pages - 1; page++) {
        const int here = (p.page[page].tokens + p.split_len - 1) / p.split_len;
        if (split < here) break;
        split -= here;
    }
    const Page& at = p.page[page];
    const Interval seen = row_interval(p, rows.b);
    const int begin = split * p.split_len, stop = p.pages == 0 ? 0 : min_(begin + p.split_len, at.tokens);
    const int last = group * p.q_len - 1 - rows.first;
    auto end_of = [&](int r) { return min_(query_end(p, seen, query_of(rows, min_(r, last))) - at.first, stop); };
    if (threadIdx.x < ROWS) common.end[threadIdx.x] = end_of(threadIdx.x);
    if (threadIdx.x == 0) {
        common.rows = rows;
        common.task = {at.k.format, at.v.format, max_(seen.lo - at.first, begin), end_of(ROWS - 1), end_of(0)};
    }
    if (threadIdx.x < 2) {
        const Side& side = threadIdx.x ? at.v : at.k;
        Source& source = threadIdx.x ? common.v : common.k;
        source.rows = row_address(side.rows, rows.b, rows.kv_head, 0);
        source.params = row_address(side.params, rows.b, rows.kv_head, 0);
        source.stride = side.rows.row_stride;
        source.param_stride = side.params.row_stride;
    }
    block_sync();

    State<D> x;
    UNROLL for (int r = 0; r < 2; r++) {
        x.m[r] = -INF;
        x.l[r] = 0.f;
    }
    UNROLL for (int i = 0; i < D / 8; i++) UNROLL for (int e = 0; e < 4; e++) x.o[i][e] = 0.f;
    UNROLL for (int e = 0; e < 4; e++) x.offset[e] = 0.f;
    run<DTYPE>(p, common, smem, x);
    leave<D>(common.task.v_format, smem, x);
    block_sync();
    finish<DTYPE, D>(p, common.rows, smem);
}

KERNEL(THREADS, 3) decode_bf16_d128(PARAM Attn p) { decode<BF16, 128>(p); }
KERNEL(THREADS, 3) decode_bf16_d64(PARAM Attn p) { decode<BF16, 64>(p); }
KERNEL(THREADS, 3) decode_f16_d128(PARAM Attn p) { decode<F16, 128>(p); }
KERNEL(THREADS, 3) decode_f16_d64(PARAM Attn p) { decode<F16, 64>(p); }
