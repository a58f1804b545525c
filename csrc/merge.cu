// Joins partials (out_i, lse_i) over disjoint keys: lse = ln sum exp(lse_i), out = sum exp(lse_i - lse) out_i, in float32.
// As src/softmax.rs: a partial whose lse is -inf is not read, a NaN is not hidden.
//
// A warp has a row, its lanes the elements. Memory-bound: each partial is read once.
//
//   grid: x = rows of batch, heads and queries, ROWS to a block; THREADS 128, no shared memory
#include "elements.cuh"

constexpr int THREADS = 128, ROWS = THREADS / 32, WIDE = 4;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

PRIM float element_of(int dtype, uint64_t row, int d) {
    return dtype == F32 ? load_element<F32>(row, d) : dtype == BF16 ? load_element<BF16>(row, d) : load_element<F16>(row, d);
}

PRIM void store_of(int dtype, uint64_t row, int d, float x) {
    if (dtype == F32)
        store_element<F32>(row, d, x);
    else if (dtype == BF16)
        store_element<BF16>(row, d, x);
    else
        store_element<F16>(row, d, x);
}

PRIM uint64_t partial_row(const View& v, int64_t apart, int b, int h, int i) { return row_address(v, b, h, i) + apart; }

KERNEL(THREADS, 4) merge(PARAM Merge p) {
    const int lane = threadIdx.x % 32;
    const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / 32;
    if (row >= (int64_t)p.batch * p.heads * p.len) return;  // a warp as a whole
    const int i = (int)(row % p.len), h = (int)(row / p.len % p.heads), b = (int)(row / p.len / p.heads);
    auto lse_of = [&](int n) {
        const View& v = p.lses[p.is_list ? n : 0];
        return *(const float*)partial_row(v, p.is_list ? 0 : n * p.lse_split_stride, b, h, i);
    };

    float top = -INF;
    bool broken = false;  // a NaN
    for (int n = lane; n < p.count; n += 32) {
        const float s = lse_of(n);
        broken |= s != s;
        top = fmax_(top, s);
    }
    float bad = broken ? 1.f : 0.f;
    UNROLL for (int x = 16; x; x /= 2) {
        top = fmax_(top, shfl_xor(top, x));
        bad = fmax_(bad, shfl_xor(bad, x));
    }
    if (bad != 0.f) top = bits_float(0x7fc00000);
    const bool empty = top == -INF;
    float sum = 0.f;
    for (int n = lane; n < p.count; n += 32) {
        const float s = lse_of(n);
        sum += empty ? 0.f : ex2((s - top) * LOG2E);
    }
    UNROLL for (int x = 16; x; x /= 2) sum += shfl_xor(sum, x);
    const float inverse = empty ? 0.f : 1.f / sum;

    const uint64_t out = row_address(p.out, b, h, i);
    for (int d0 = 0; d0 < p.head_dim; d0 += 32 * WIDE) {
        float acc[WIDE];
        UNROLL for (int w = 0; w < WIDE; w++) acc[w] = 0.f;
        if (!empty)
            for (int n = 0; n < p.count; n++) {
                const float weight = ex2((lse_of(n) - top) * LOG2E) * inverse;
                if (weight == 0.f) continue;  // all lanes alike
                const uint64_t from = partial_row(p.outs[p.is_list ? n : 0], p.is_list ? 0 : n * p.split_stride, b, h, i);
                UNROLL for (int w = 0; w < WIDE; w++) {
                    const int d = d0 + w * 32 + lane;
                    if (d < p.head_dim) acc[w] = fma_rn(element_of(p.in_dtype, from, d), weight, acc[w]);
                }
            }
        UNROLL for (int w = 0; w < WIDE; w++) {
            const int d = d0 + w * 32 + lane;
            if (d < p.head_dim) store_of(p.out_dtype, out, d, acc[w]);
        }
    }
    if (lane == 0 && p.lse)
        *(float*)(p.lse + b * p.lse_stride[0] + h * p.lse_stride[1] + i * p.lse_stride[2]) =
            empty ? -INF : top + LN2 * lg2(sum);
}
