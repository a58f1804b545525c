// Rotary embedding in Llama's layout (Su et al., 2104.09864): elements d and d + pairs of a head turn by position * turns[d]; what
// is beyond 2 * pairs is copied. In place where the outputs are the inputs. float32 arithmetic, one rounding.
//
// A block has TOKENS tokens of a batch row and all their heads: it computes each phase once, for all heads, then streams the
// rows through registers, 16 bytes of either half of a row at a time.
//
//   grid: x = tiles of TOKENS tokens, y = batch
//   THREADS 256, dynamic shared memory SMEM_BYTES
#include "phase.cuh"
#include "vectors.cuh"

constexpr int TOKENS = 4, THREADS = 256;
constexpr int SMEM_BYTES = MAX_PAIRS * 8 + TOKENS * MAX_PAIRS * 8;
static_assert(SMEM_BYTES == 5120, "src/cuda/kernels.rs has the same");

// Rows of all tokens and heads of one tensor; N elements at a time.
template <int DTYPE, int N>
PRIM void rotate_rows(const View& from, const View& to, int heads, int head_dim, int pairs, int i0, int tokens,
                      const Phase* phases) {
    const int b = blockIdx.y;
    const int steps = pairs / N, tail = (head_dim - 2 * pairs) / N;
    for (int n = threadIdx.x; n < tokens * heads * steps; n += THREADS) {
        const int d = n % steps * N, h = n / steps % heads, t = n / steps / heads;
        const uint64_t src = row_address(from, b, h, i0 + t), dst = row_address(to, b, h, i0 + t);
        float x[N], y[N];
        // Both halves are read before either is written: src may be dst.
        load_elements<DTYPE, N>(src, d, x);
        load_elements<DTYPE, N>(src, d + pairs, y);
        UNROLL for (int e = 0; e < N; e++) rotate(x[e], y[e], phases[t * pairs + d + e]);
        store_elements<DTYPE, N>(dst, d, x);
        store_elements<DTYPE, N>(dst, d + pairs, y);
    }
    if (from.ptr == to.ptr) return;
    for (int n = threadIdx.x; n < tokens * heads * tail; n += THREADS) {
        const int d = 2 * pairs + n % tail * N, h = n / tail % heads, t = n / tail / heads;
        float x[N];
        load_elements<DTYPE, N>(row_address(from, b, h, i0 + t), d, x);
        store_elements<DTYPE, N>(row_address(to, b, h, i0 + t), d, x);
    }
}

template <int DTYPE, int N>
PRIM void rotate_both(const Rope& p, int i0, int tokens, const Phase* phases) {
    rotate_rows<DTYPE, N>(p.q, p.q_out, p.q_heads, p.q_dim, p.rotation.pairs, i0, tokens, phases);
    if (p.kv_heads) rotate_rows<DTYPE, N>(p.k, p.k_out, p.kv_heads, p.k_dim, p.rotation.pairs, i0, tokens, phases);
}

template <int DTYPE>
PRIM void rope(const Rope& p) {
    DYN_SMEM(smem);
    uint64_t* const turns = (uint64_t*)smem;            // [pairs]
    Phase* const phases = (Phase*)(turns + MAX_PAIRS);  // [tokens][pairs]
    const Rotation& r = p.rotation;
    const int i0 = blockIdx.x * TOKENS, tokens = p.len - i0 < TOKENS ? p.len - i0 : TOKENS;
    // By way of shared memory: threads that read different parameters read them one after another.
    for (int f = threadIdx.x; f < r.pairs; f += THREADS) turns[f] = r.turns[f];
    block_sync();
    for (int n = threadIdx.x; n < tokens * r.pairs; n += THREADS)
        phases[n] = phase(position_of(r, blockIdx.y, i0 + n / r.pairs), turns[n % r.pairs], r.scaling);
    block_sync();
    if (p.wide)
        rotate_both<DTYPE, WIDEST<DTYPE>>(p, i0, tokens, phases);
    else
        rotate_both<DTYPE, 1>(p, i0, tokens, phases);
}

KERNEL(THREADS, 4) rope_f32(PARAM Rope p) { rope<F32>(p); }
KERNEL(THREADS, 4) rope_bf16(PARAM Rope p) { rope<BF16>(p); }
KERNEL(THREADS, 4) rope_f16(PARAM Rope p) { rope<F16>(p); }
