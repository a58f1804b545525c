// Decode: few queries, many keys. The keys are cut into splits; a block takes one split of one kv head, and leaves a
// partial (out, lse), which merge.cu joins. Bound by memory, so everything is arranged around the stream of K and V:
//
// - The rows of the 16-row tensor-core tile are (query, head of the group) pairs: a kv head's keys are read once for all of
//   its query heads.
// - A warp takes STEP tokens at a time. Each thread copies just those bytes to shared memory that it will read itself
//   (cp.async, several steps ahead), so K and V need no barrier between threads, and no registers while they are on
//   their way. Only the scales of compact pages are shared by the lanes of a warp.
// - What a matmul sums over may come in any order. Tokens and channels are dealt out so that the 16 bytes that a thread
//   has are its own B fragments, with no shuffle and no transposition: codes become numbers where they are.
//
// Within a step, lane = 4 n + c has (TILES = STEP / 8):
//   K: tokens n TILES + t, t < TILES: column n of tile t of S = Q K^T, and of the channels those in units c, 4 + c, ...
//   V: its own tokens c * 2 TILES + u, u < 2 TILES: those that its P fragments are of, since columns 2 c and 2 c + 1 of
//      tile t are the tokens u = t and u = TILES + t; and of the channels column n of each tile of O.
//
// Compact K: scores = (q * scale) code + q offset. q * scale is made anew for each step, in float16 with q brought to
// 2^6 at most (its exponent goes into the softmax scale): codes and scales are exact in float16, and the product is
// rounded to 2^-11, where bfloat16 would have 2^-8. Compact V: out = (p * scale) code + p offset, in bfloat16, whose range
// the smallest p need.
//
//   grid: x = splits, y = kv heads * tiles of 16 rows, z = batch; THREADS 128
//   dynamic shared memory: `stages` * 4 warps * STAGE_BYTES, at least the 4 warps' outputs
#include "codes.cuh"
#include "elements.cuh"
#include "mask.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, ROWS = 16;
constexpr int PARAM_BYTES = 1024;                   // of a step: K 2 * 128 * 2, V 4 * 32 * 2
constexpr int STAGE_BYTES = 8192 + PARAM_BYTES;     // of a warp: K, V and params of STEP tokens, head_dim 128
constexpr float LN2 = 0.6931471805599453f;

struct alignas(8) Two {
    uint32_t x[2];
};
struct alignas(16) Four {
    uint32_t x[4];
};

// How a pair of formats is dealt out: tokens of a step, and a thread's loads.
template <int KF, int VF, int D>
struct Deal {
    static constexpr int STEP = KF == DENSE ? 16 : 32, TILES = STEP / 8, MINE = 2 * TILES;  // MINE: tokens of V
    static constexpr int K_CHANNELS = KF == DENSE || KF == INT4 ? 8 : 4;  // of a thread, in one load of one token
    static constexpr int K_UNITS = D / (4 * K_CHANNELS);
    static constexpr int K_LOADS = KF == DENSE ? K_UNITS * TILES : K_UNITS;
    static constexpr int V_BYTES = VF == DENSE ? 16 : VF == INT4 ? 4 : 8;  // of one token and 64 channels
    static constexpr int BLOCKS = D / 64;
    static constexpr int V_AT = K_LOADS * 512, PARAMS_AT = 8192, V_PARAMS_AT = PARAMS_AT + 512;
    static_assert(V_AT + MINE * BLOCKS * V_BYTES * 32 <= PARAMS_AT, "a stage has room for K and V");
    static_assert((KF == DENSE) == (VF == DENSE), "dense keys go with dense values");
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

// What a block works at: 16 rows of one kv head, and a run of tokens of one page.
struct Work {
    int b, kv_head, row0, group;
    Interval row;           // of the batch row
    int first;              // the page's first token in the call
    int begin, end;         // tokens of the page, begin a multiple of 64
    int limit;              // tokens of the page that may be read
};

// The running softmax of a warp over its steps; rows g = lane / 4 and g + 8.
template <int D>
struct State {
    float m[2], l[2];
    float o[D / 8][4];
    float offset[D / 64][4];  // compact V: sum of p * offset, the same for all channels of a block
};

PRIM bool is_row(const Attn& p, const Work& w, int r) { return w.row0 + r < w.group * p.q_len; }
PRIM int query_of(const Work& w, int r) { return (w.row0 + r) / w.group; }
PRIM int head_of(const Work& w, int r) { return w.kv_head * w.group + (w.row0 + r) % w.group; }

// First channel of a pair of A's: k-step `ks`, slots 2 c and 2 c + 1 (half 0) or 8 more (half 1).
template <int CHANNELS>
PRIM int channel_of(int ks, int c, int half) {
    if constexpr (CHANNELS == 4)
        return 16 * ks + 4 * c + 2 * half;
    else
        return 32 * (ks / 2) + 8 * c + 4 * (ks % 2) + 2 * half;
}

// Q as A fragments in the order of the keys' channels, and what scores of rows g and g + 8 are to be multiplied by.
template <int DTYPE, int KF, int VF, int D>
PRIM void load_q(const Attn& p, const Work& w, uint32_t (&q)[D / 16][4], float (&scale)[2]) {
    using Of = Deal<KF, VF, D>;
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    UNROLL for (int e = 0; e < 2; e++) {
        const int r = g + 8 * e;
        const bool real = is_row(p, w, r);
        const uint64_t from = real ? row_address(p.q, w.b, head_of(w, r), query_of(w, r)) : 0;
        UNROLL for (int ks = 0; ks < D / 16; ks++) UNROLL for (int half = 0; half < 2; half++)
            q[ks][e + 2 * half] = real ? *(const uint32_t*)(from + 2 * channel_of<Of::K_CHANNELS>(ks, c, half)) : 0u;
        scale[e] = p.scale;
        if constexpr (KF != DENSE) {
            auto lo = [](uint32_t x) { return DTYPE == BF16 ? bits_float(x << 16) : half_to_float((uint16_t)x); };
            auto hi = [](uint32_t x) { return DTYPE == BF16 ? bits_float(x & 0xffff0000u) : half_to_float((uint16_t)(x >> 16)); };
            float most = 0.f;
            UNROLL for (int ks = 0; ks < D / 16; ks++) UNROLL for (int half = 0; half < 2; half++) {
                const uint32_t x = q[ks][e + 2 * half];
                most = fmax_(most, fmax_(abs_(lo(x)), abs_(hi(x))));
            }
            most = fmax_(most, shfl_xor(most, 1));
            most = fmax_(most, shfl_xor(most, 2));
            // To 2^5 <= most < 2^6. Zeros stay; infinities and NaN come out as they must.
            int exponent = (int)(float_bits(most) >> 23 & 255) - 127 - 5;
            exponent = most == 0.f || exponent > 100 || exponent < -100 ? 0 : exponent;
            const float factor = bits_float((uint32_t)(127 - exponent) << 23);
            scale[e] = p.scale * bits_float((uint32_t)(127 + exponent) << 23);
            UNROLL for (int ks = 0; ks < D / 16; ks++) UNROLL for (int half = 0; half < 2; half++) {
                const uint32_t x = q[ks][e + 2 * half];
                q[ks][e + 2 * half] = pack_f16(lo(x) * factor, hi(x) * factor);
            }
        }
    }
}

// Starts the copies of one step to a stage.
template <int KF, int VF, int D>
PRIM void fetch(const Page& page, const Work& w, int j0, uint32_t stage) {
    using Of = Deal<KF, VF, D>;
    const int lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
    if constexpr (KF == DENSE) {
        UNROLL for (int t = 0; t < Of::TILES; t++) {
            const int j = j0 + n * Of::TILES + t;
            const bool there = j < w.limit;
            const uint64_t from = row_address(page.k.rows, w.b, w.kv_head, there ? j : j0);
            UNROLL for (int u = 0; u < Of::K_UNITS; u++)
                cp_async16_zfill(stage + ((t * Of::K_UNITS + u) * 32 + lane) * 16, (const void*)(from + 16 * (4 * u + c)),
                                 there ? 16 : 0);
        }
    } else {
        // The group is there as a whole, whatever of it is in use.
        const uint64_t from = row_address(page.k.rows, w.b, w.kv_head, j0 / GROUP) + 4 * (j0 % GROUP + n * Of::TILES);
        UNROLL for (int u = 0; u < Of::K_UNITS; u++)
            cp_async16(stage + (u * 32 + lane) * 16, (const void*)(from + 4 * GROUP * (4 * u + c)));
        if (lane < D / 4)
            cp_async16(stage + Of::PARAMS_AT + 16 * lane,
                       (const void*)(row_address(page.k.params, w.b, w.kv_head, j0 / GROUP) + 16 * lane));
    }
    UNROLL for (int u = 0; u < Of::MINE; u++) {
        const int j = j0 + c * Of::MINE + u, at = w.first + j;
        // Hidden values may be no numbers, and 0 * NaN is NaN: they come as zeros.
        const bool seen = j < w.limit && at >= w.row.lo && at < w.row.hi;
        const uint64_t from = row_address(page.v.rows, w.b, w.kv_head, seen ? j : j0) + n * Of::V_BYTES;
        UNROLL for (int k = 0; k < Of::BLOCKS; k++) {
            const uint32_t to = stage + Of::V_AT + ((u * Of::BLOCKS + k) * 32 + lane) * Of::V_BYTES;
            const void* src = (const void*)(from + k * 8 * Of::V_BYTES);
            if constexpr (VF == DENSE)
                cp_async16_zfill(to, src, seen ? 16 : 0);
            else
                cp_async_small_zfill<Of::V_BYTES>(to, src, seen ? Of::V_BYTES : 0);
        }
    }
    if constexpr (VF != DENSE) {
        // 2 BLOCKS rows of scales and offsets, 64 bytes of each.
        const int r = lane / 4, j = j0 + 8 * (lane % 4), left = 2 * (w.limit - j);
        if (r < 2 * Of::BLOCKS) {
            const uint64_t from = row_address(page.v.params, w.b, w.kv_head, r) + 2 * (left > 0 ? j : j0);
            cp_async16_zfill(stage + Of::V_PARAMS_AT + 64 * r + 16 * (lane % 4), (const void*)from,
                             left < 0 ? 0 : left > 16 ? 16 : left);
        }
    }
}

// S = Q K^T of one step, times what makes it base 2.
template <int DTYPE, int KF, int VF, int D>
PRIM void scores(const uint8_t* stage, const uint32_t (&q)[D / 16][4], const float (&scale)[2],
                 float (&s)[Deal<KF, VF, D>::TILES][4]) {
    using Of = Deal<KF, VF, D>;
    const int lane = threadIdx.x % 32, c = lane % 4;
    UNROLL for (int t = 0; t < Of::TILES; t++) UNROLL for (int e = 0; e < 4; e++) s[t][e] = 0.f;
    if constexpr (KF == DENSE) {
        UNROLL for (int t = 0; t < Of::TILES; t++) UNROLL for (int u = 0; u < Of::K_UNITS; u++) {
            const Four k = *(const Four*)(stage + ((t * Of::K_UNITS + u) * 32 + lane) * 16);
            mma<DTYPE>(s[t], q[2 * u], k.x[0], k.x[1]);
            mma<DTYPE>(s[t], q[2 * u + 1], k.x[2], k.x[3]);
        }
    } else {
        const uint8_t* params = stage + Of::PARAMS_AT;
        float offset[4] = {0.f, 0.f, 0.f, 0.f};
        Four k;
        UNROLL for (int ks = 0; ks < D / 16; ks++) {
            const int d = channel_of<Of::K_CHANNELS>(ks, c, 0);
            const Two scales = *(const Two*)(params + 2 * d), offsets = *(const Two*)(params + 2 * (D + d));
            mma_m16n8k16_f16(offset, q[ks], offsets.x[0], offsets.x[1]);
            const uint32_t a[4] = {mul_f16x2(q[ks][0], scales.x[0]), mul_f16x2(q[ks][1], scales.x[0]),
                                   mul_f16x2(q[ks][2], scales.x[1]), mul_f16x2(q[ks][3], scales.x[1])};
            if constexpr (KF == INT4) {
                if (ks % 2 == 0) k = *(const Four*)(stage + (ks / 2 * 32 + lane) * 16);
                UNROLL for (int t = 0; t < Of::TILES; t++)
                    mma_m16n8k16_f16(s[t], a, to_f16<INT4>(k.x[t] >> (8 * (ks % 2))), to_f16<INT4>(k.x[t] >> (8 * (ks % 2) + 4)));
            } else {
                k = *(const Four*)(stage + (ks * 32 + lane) * 16);
                UNROLL for (int t = 0; t < Of::TILES; t++)
                    mma_m16n8k16_f16(s[t], a, to_f16<KF>(bytes_of_one(k.x[t], 0)), to_f16<KF>(bytes_of_one(k.x[t], 1)));
            }
        }
        UNROLL for (int t = 0; t < Of::TILES; t++) UNROLL for (int e = 0; e < 4; e++) s[t][e] += offset[e];
    }
    UNROLL for (int t = 0; t < Of::TILES; t++) UNROLL for (int e = 0; e < 4; e++) s[t][e] *= scale[e / 2];
}

// O += P V of one step.
template <int DTYPE, int KF, int VF, int D>
PRIM void values(const uint8_t* stage, const float (&s)[Deal<KF, VF, D>::TILES][4], State<D>& x) {
    using Of = Deal<KF, VF, D>;
    const int lane = threadIdx.x % 32, c = lane % 4;
    UNROLL for (int step = 0; step < Of::TILES / 2; step++) {
        // The four tokens of this thread's that slots 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 stand for.
        const int u[4] = {2 * step, Of::TILES + 2 * step, 2 * step + 1, Of::TILES + 2 * step + 1};
        const float(&p0)[4] = s[2 * step];
        const float(&p1)[4] = s[2 * step + 1];
        UNROLL for (int k = 0; k < Of::BLOCKS; k++) {
            const uint8_t* at = stage + Of::V_AT + (k * 32 + lane) * Of::V_BYTES;
            constexpr int apart = Of::BLOCKS * 32 * Of::V_BYTES;
            uint32_t a[4];
            if constexpr (VF == DENSE) {
                a[0] = pack<DTYPE>(p0[0], p0[1]), a[1] = pack<DTYPE>(p0[2], p0[3]);
                a[2] = pack<DTYPE>(p1[0], p1[1]), a[3] = pack<DTYPE>(p1[2], p1[3]);
                Four v[4];
                UNROLL for (int i = 0; i < 4; i++) v[i] = *(const Four*)(at + u[i] * apart);
                UNROLL for (int j = 0; j < 8; j++) {
                    const uint32_t of = j % 2 ? 0x7632 : 0x5410;
                    mma<DTYPE>(x.o[8 * k + j], a, prmt(v[0].x[j / 2], v[1].x[j / 2], of), prmt(v[2].x[j / 2], v[3].x[j / 2], of));
                }
            } else {
                const uint16_t* scales = (const uint16_t*)(stage + Of::V_PARAMS_AT) + 32 * k + c * Of::MINE;
                const uint16_t* offsets = scales + 32 * Of::BLOCKS;
                float f[4];
                UNROLL for (int i = 0; i < 4; i++) f[i] = half_to_float(scales[u[i]]);
                const uint32_t plain[4] = {pack_bf16(p0[0], p0[1]), pack_bf16(p0[2], p0[3]), pack_bf16(p1[0], p1[1]),
                                           pack_bf16(p1[2], p1[3])};
                mma_m16n8k16_bf16(x.offset[k], plain, pack_bf16(half_to_float(offsets[u[0]]), half_to_float(offsets[u[1]])),
                                  pack_bf16(half_to_float(offsets[u[2]]), half_to_float(offsets[u[3]])));
                a[0] = pack_bf16(p0[0] * f[0], p0[1] * f[1]), a[1] = pack_bf16(p0[2] * f[0], p0[3] * f[1]);
                a[2] = pack_bf16(p1[0] * f[2], p1[1] * f[3]), a[3] = pack_bf16(p1[2] * f[2], p1[3] * f[3]);
                if constexpr (VF == INT4) {
                    uint32_t v[4];
                    UNROLL for (int i = 0; i < 4; i++) v[i] = *(const uint32_t*)(at + u[i] * apart);
                    UNROLL for (int j = 0; j < 4; j++) {
                        const uint32_t b0 = bytes_of_two(v[0], v[1], j), b1 = bytes_of_two(v[2], v[3], j);
                        mma_m16n8k16_bf16(x.o[8 * k + j], a, to_bf16<INT4>(b0), to_bf16<INT4>(b1));
                        mma_m16n8k16_bf16(x.o[8 * k + 4 + j], a, to_bf16<INT4>(b0 >> 4), to_bf16<INT4>(b1 >> 4));
                    }
                } else {
                    Two v[4];
                    UNROLL for (int i = 0; i < 4; i++) v[i] = *(const Two*)(at + u[i] * apart);
                    UNROLL for (int j = 0; j < 8; j++)
                        mma_m16n8k16_bf16(x.o[8 * k + j], a, to_bf16<VF>(bytes_of_two(v[0].x[j / 4], v[1].x[j / 4], j % 4)),
                                          to_bf16<VF>(bytes_of_two(v[2].x[j / 4], v[3].x[j / 4], j % 4)));
                }
            }
        }
    }
}

// Channel of column `column` of tile `tile` of O.
template <int VF>
PRIM int out_channel(int tile, int column) {
    const int block = tile / 8, j = tile % 8;
    if constexpr (VF == INT4)
        return 64 * block + (j < 4 ? 4 * column + j : 32 + 4 * column + j - 4);
    else
        return 64 * block + 8 * column + j;
}

// A warp's share of a split: every WARPS-th step.
template <int DTYPE, int KF, int VF, int D>
PRIM void run(const Attn& p, const Page& page, const Work& w, uint8_t* smem, State<D>& x) {
    using Of = Deal<KF, VF, D>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    uint8_t* const mine = smem + warp * p.stages * STAGE_BYTES;
    const uint32_t ring = smem_u32(mine);
    const int steps = (w.end - w.begin + Of::STEP - 1) / Of::STEP;
    int end[2];  // one past the last key that rows g and g + 8 see
    UNROLL for (int e = 0; e < 2; e++) end[e] = is_row(p, w, g + 8 * e) ? query_end(p, w.row, query_of(w, g + 8 * e)) : w.row.lo;
    const int least = query_end(p, w.row, query_of(w, 0));  // all real rows see that much

    uint32_t q[D / 16][4];
    float scale[2];
    load_q<DTYPE, KF, VF, D>(p, w, q, scale);
    for (int i = 0; i < p.stages - 1; i++) {
        const int step = warp + i * WARPS;
        if (step < steps) fetch<KF, VF, D>(page, w, w.begin + step * Of::STEP, ring + i * STAGE_BYTES);
        cp_async_commit();
    }
    int stage = 0;
    for (int step = warp; step < steps; step += WARPS) {
        // The stage that the last step was read from is free: nobody but this thread reads its K and V there, and all lanes are
        // done with the params.
        const int ahead = step + (p.stages - 1) * WARPS, to = stage == 0 ? p.stages - 1 : stage - 1;
        if (ahead < steps) fetch<KF, VF, D>(page, w, w.begin + ahead * Of::STEP, ring + to * STAGE_BYTES);
        cp_async_commit();
        if (p.stages == 3)
            cp_async_wait<2>();
        else
            cp_async_wait<1>();
        if constexpr (KF != DENSE) warp_sync();

        float s[Of::TILES][4];
        const uint8_t* at = mine + stage * STAGE_BYTES;
        scores<DTYPE, KF, VF, D>(at, q, scale, s);
        const int j0 = w.first + w.begin + step * Of::STEP;
        if (j0 < w.row.lo || j0 + Of::STEP > least || j0 + Of::STEP > w.first + w.end) {
            UNROLL for (int t = 0; t < Of::TILES; t++) UNROLL for (int e = 0; e < 4; e++) {
                const int j = j0 + (2 * c + e % 2) * Of::TILES + t;
                if (j < w.row.lo || j >= end[e / 2] || j >= w.first + w.end) s[t][e] = -INF;
            }
        }
        float most[2] = {x.m[0], x.m[1]};
        UNROLL for (int t = 0; t < Of::TILES; t++) UNROLL for (int e = 0; e < 4; e++) most[e / 2] = fmax_(most[e / 2], s[t][e]);
        bool moved = false;
        UNROLL for (int e = 0; e < 2; e++) {
            most[e] = fmax_(most[e], shfl_xor(most[e], 1));
            most[e] = fmax_(most[e], shfl_xor(most[e], 2));
            moved |= most[e] != x.m[e];
        }
        if (vote_any(moved)) {  // seldom, after the first keys
            float keep[2];
            UNROLL for (int e = 0; e < 2; e++) {
                keep[e] = x.m[e] == most[e] ? 1.f : ex2(x.m[e] - most[e]);
                x.m[e] = most[e];
                x.l[e] *= keep[e];
            }
            UNROLL for (int t = 0; t < D / 8; t++) UNROLL for (int e = 0; e < 4; e++) x.o[t][e] *= keep[e / 2];
            UNROLL for (int k = 0; k < Of::BLOCKS; k++) UNROLL for (int e = 0; e < 4; e++) x.offset[k][e] *= keep[e / 2];
        }
        UNROLL for (int e = 0; e < 4; e++) {
            const float base = x.m[e / 2] == -INF ? 0.f : x.m[e / 2];  // nothing seen yet: exp2(-inf - 0) is 0
            UNROLL for (int t = 0; t < Of::TILES; t++) {
                s[t][e] = ex2(s[t][e] - base);
                x.l[e / 2] += s[t][e];
            }
        }
        values<DTYPE, KF, VF, D>(at, s, x);
        if constexpr (KF != DENSE) warp_sync();  // before the params are overwritten
        stage = stage + 1 == p.stages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    UNROLL for (int e = 0; e < 2; e++) {
        x.l[e] += shfl_xor(x.l[e], 1);
        x.l[e] += shfl_xor(x.l[e], 2);
    }

    // The warps' outputs, one beside the other: [WARPS][ROWS][D], then m and l, [WARPS][ROWS] each.
    block_sync();
    float* const outs = (float*)smem;
    float* const ms = outs + WARPS * ROWS * D;
    float* const ls = ms + WARPS * ROWS;
    UNROLL for (int e = 0; e < 4; e++) {
        const int r = g + 8 * (e / 2);
        UNROLL for (int t = 0; t < D / 8; t++)
            outs[(warp * ROWS + r) * D + out_channel<VF>(t, 2 * c + e % 2)] =
                x.o[t][e] + (VF == DENSE ? 0.f : x.offset[t / 8][e]);
        if (c == 0 && e % 2 == 0) {
            ms[warp * ROWS + r] = x.m[e / 2];
            ls[warp * ROWS + r] = x.l[e / 2];
        }
    }
    block_sync();
}

// The block's partial, from its warps' outputs.
template <int DTYPE, int D>
PRIM void finish(const Attn& p, const Work& w, const uint8_t* smem, bool empty) {
    const float* const outs = (const float*)smem;
    const float* const ms = outs + WARPS * ROWS * D;
    const float* const ls = ms + WARPS * ROWS;
    const int r = threadIdx.x / 8, split = blockIdx.x;
    if (!is_row(p, w, r)) return;
    const int head = head_of(w, r), i = query_of(w, r);
    float weight[WARPS], m = -INF, l = 0.f;
    UNROLL for (int n = 0; n < WARPS; n++) m = empty ? m : fmax_(m, ms[n * ROWS + r]);
    UNROLL for (int n = 0; n < WARPS; n++) {
        weight[n] = empty || m == -INF ? 0.f : ex2(ms[n * ROWS + r] - m);
        l += empty ? 0.f : weight[n] * ls[n * ROWS + r];
    }
    const bool none = l == 0.f;
    const float inverse = none ? 0.f : 1.f / l;
    const int64_t at = (((int64_t)split * p.batch + w.b) * p.q_heads + head) * p.q_len + i;
    const bool whole = p.splits == 1;
    const uint64_t out = whole ? row_address(p.out, w.b, head, i) : p.part_out + 4 * at * D;
    if (threadIdx.x % 8 == 0) {
        const float lse = none ? -INF : (m + lg2(l)) * LN2;
        if (!whole)
            ((float*)p.part_lse)[at] = lse;
        else if (p.lse)
            ((float*)p.lse)[at] = lse;
    }
    for (int d = threadIdx.x % 8; d < D; d += 8) {
        float sum = 0.f;
        UNROLL for (int n = 0; n < WARPS; n++) sum += none ? 0.f : weight[n] * outs[(n * ROWS + r) * D + d];
        if (!whole || p.out_f32)
            store_element<F32>(out, d, sum * inverse);
        else
            store_element<DTYPE>(out, d, sum * inverse);
    }
}

template <int DTYPE, int D>
PRIM void decode(const Attn& p) {
    DYN_SMEM(smem);
    Work w;
    w.b = blockIdx.z;
    w.group = p.q_heads / p.kv_heads;
    const int tiles = (w.group * p.q_len + ROWS - 1) / ROWS;
    w.kv_head = blockIdx.y / tiles;
    w.row0 = blockIdx.y % tiles * ROWS;
    w.row = row_interval(p, w.b);
    int page = 0, split = blockIdx.x;
    for (; page < p.pages - 1; page++) {
        const int here = (p.page[page].tokens + p.split_len - 1) / p.split_len;
        if (split < here) break;
        split -= here;
    }
    const Page& at = p.page[page];
    w.first = at.first;
    w.limit = at.tokens;
    const int last_row = w.row0 + ROWS < w.group * p.q_len ? ROWS - 1 : w.group * p.q_len - 1 - w.row0;
    const int hi = query_end(p, w.row, query_of(w, last_row));
    // From the first visible key on, by whole groups, to the last one.
    const int begin = split * p.split_len, seen = w.row.lo - w.first;
    w.begin = seen > begin ? seen / GROUP * GROUP : begin;
    w.end = begin + p.split_len < at.tokens ? begin + p.split_len : at.tokens;
    w.end = hi - w.first < w.end ? hi - w.first : w.end;

    State<D> x;
    UNROLL for (int e = 0; e < 2; e++) {
        x.m[e] = -INF;
        x.l[e] = 0.f;
    }
    UNROLL for (int t = 0; t < D / 8; t++) UNROLL for (int e = 0; e < 4; e++) x.o[t][e] = 0.f;
    UNROLL for (int k = 0; k < D / 64; k++) UNROLL for (int e = 0; e < 4; e++) x.offset[k][e] = 0.f;
    const bool empty = p.pages == 0 || w.begin >= w.end;
    if (!empty) {
        switch (at.k.format * 4 + at.v.format) {
            case INT8 * 4 + INT8: run<DTYPE, INT8, INT8, D>(p, at, w, smem, x); break;
            case INT8 * 4 + INT4: run<DTYPE, INT8, INT4, D>(p, at, w, smem, x); break;
            case INT4 * 4 + INT4: run<DTYPE, INT4, INT4, D>(p, at, w, smem, x); break;
            case FP8 * 4 + FP8: run<DTYPE, FP8, FP8, D>(p, at, w, smem, x); break;
            default: run<DTYPE, DENSE, DENSE, D>(p, at, w, smem, x); break;
        }
    }
    finish<DTYPE, D>(p, w, smem, empty);
}

KERNEL(THREADS, 2) decode_bf16_d128(PARAM Attn p) { decode<BF16, 128>(p); }
KERNEL(THREADS, 2) decode_bf16_d64(PARAM Attn p) { decode<BF16, 64>(p); }
KERNEL(THREADS, 2) decode_f16_d128(PARAM Attn p) { decode<F16, 128>(p); }
KERNEL(THREADS, 2) decode_f16_d64(PARAM Attn p) { decode<F16, 64>(p); }
