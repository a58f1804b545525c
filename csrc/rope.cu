// Rotary embedding in Llama's layout (Su et al., 2104.09864): elements d and d + pairs of a head turn by position * turns[d]; what
// is beyond 2 * pairs is copied. In place where the outputs are the inputs.
//
// A thread has one pair of one token, and takes it through all heads: its phase is computed once.
//
//   grid: x = tokens of all batch rows, TOKENS to a block, y = parts of the heads; THREADS 128, no shared memory
#include "elements.cuh"
#include "phase.cuh"

constexpr int THREADS = 128;

template <int DTYPE>
PRIM void turn(const View& from, const View& to, int b, int h, int i, int d, int pairs, int head_dim, Phase f) {
    const uint64_t src = row_address(from, b, h, i), dst = row_address(to, b, h, i);
    if (d < pairs) {
        const float x = load_element<DTYPE>(src, d), y = load_element<DTYPE>(src, d + pairs);
        store_element<DTYPE>(dst, d, fma_rn(x, f.cos, -mul_rn(y, f.sin)));
        store_element<DTYPE>(dst, d + pairs, fma_rn(y, f.cos, mul_rn(x, f.sin)));
    } else if (d + pairs < head_dim) {
        store_element<DTYPE>(dst, d + pairs, load_element<DTYPE>(src, d + pairs));
    }
}

template <int DTYPE>
PRIM void rope(const Rope& p) {
    // Columns: pairs, and after them the elements that are only copied.
    const int widest = p.q_dim > p.k_dim ? p.q_dim : p.k_dim, columns = widest - p.pairs;
    const int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t token = n / columns;
    if (token >= (int64_t)p.batch * p.len) return;
    const int d = (int)(n % columns), b = (int)(token / p.len), i = (int)(token % p.len);
    Phase f = {1.f, 0.f};
    if (d < p.pairs) f = phase(((const int64_t*)p.positions)[b * p.position_stride + i], p.turns[d], p.scaling);
    for (int h = blockIdx.y; h < p.q_heads + p.kv_heads; h += gridDim.y) {
        if (h < p.q_heads)
            turn<DTYPE>(p.q, p.q_out, b, h, i, d, p.pairs, p.q_dim, f);
        else
            turn<DTYPE>(p.k, p.k_out, b, h - p.q_heads, i, d, p.pairs, p.k_dim, f);
    }
}

KERNEL(THREADS, 8) rope_f32(PARAM Rope p) { rope<F32>(p); }
KERNEL(THREADS, 8) rope_bf16(PARAM Rope p) { rope<BF16>(p); }
KERNEL(THREADS, 8) rope_f16(PARAM Rope p) { rope<F16>(p); }
