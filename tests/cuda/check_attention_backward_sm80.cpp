// attention_backward_sm80.cu against float64: edges of its tiles and steps, masks, groups, shared rows, and segments that are folded.
#define SHIM_IMPL
#include <cstdint>
#define SEGMENT SEGMENT_OF_THE_KERNELS  // here a segment is a few steps, so that folding happens
#include "params.h"
#undef SEGMENT
constexpr int SEGMENT = 100;

#include "attention_backward_sm80.cu"

#include "backward_case.h"

template <int D, bool SMALL>
static void sweeps(Backward p, const GradCase& c, cpu::Mode mode, uint64_t seed) {
    using S = Shape<D, SMALL>;
    using Kernel = void (*)(const Backward);
    const bool bf16 = c.dtype == BF16;
    const Kernel keys = D == 64 ? (bf16 ? backward_keys_sm80_bf16_d64 : backward_keys_sm80_f16_d64)
                        : SMALL ? (bf16 ? backward_keys_sm80_bf16_d128_small : backward_keys_sm80_f16_d128_small)
                                : (bf16 ? backward_keys_sm80_bf16_d128 : backward_keys_sm80_f16_d128);
    const Kernel queries = D == 64 ? (bf16 ? backward_queries_sm80_bf16_d64 : backward_queries_sm80_f16_d64)
                           : SMALL ? (bf16 ? backward_queries_sm80_bf16_d128_small : backward_queries_sm80_f16_d128_small)
                                   : (bf16 ? backward_queries_sm80_bf16_d128 : backward_queries_sm80_f16_d128);
    const unsigned batch = p.batch, group = p.q_heads / p.kv_heads;
    const auto tiles = [](int rows) { return (unsigned)(rows + S::ROWS - 1) / S::ROWS; };
    const int step = p.total ? 1 : p.kv_heads;  // a head at a time where there are segments, as src/cuda/backward.rs may
    for (p.first_head = 0; p.first_head < p.kv_heads; p.first_head += step) {
        p.heads = std::min(step, p.kv_heads - p.first_head);
        const auto run = [&](Kernel kernel, unsigned x) {
            cpu::launch({x, (unsigned)p.heads, batch}, {S::THREADS, 1, 1}, S::SMEM_BYTES, [&] { kernel(p); }, mode, seed, 2);
        };
        run(keys, tiles(p.key_rows));
        run(queries, tiles(p.q_len) * group);
    }
}

static void launch(const Backward& p, const GradCase& c, cpu::Mode mode, uint64_t seed) {
    make_stats(p, c.dtype);
    if (c.head_dim == 64)
        sweeps<64, false>(p, c, mode, seed);
    else if (std::strstr(c.name, "small"))
        sweeps<128, true>(p, c, mode, seed);
    else
        sweeps<128, false>(p, c, mode, seed);
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
    const std::vector<GradCase> cases = {
        {.name = "one key", .q_heads = 1},
        {.name = "a tile and a bit", .q_len = 129, .kv_len = 129, .q_heads = 1},
        {.name = "groups", .q_len = 70, .kv_len = 100, .q_heads = 4, .kv_heads = 2, .spread = 4},
        {.name = "small, a tile and a bit", .q_len = 66, .kv_len = 66, .q_heads = 2, .spread = 3},
        {.name = "small f16", .dtype = F16, .q_len = 50, .kv_len = 90, .q_heads = 1, .dk_f32 = true, .grad_lse = true},
        {.name = "d64", .head_dim = 64, .q_len = 130, .kv_len = 140, .q_heads = 2},
        {.name = "f16", .dtype = F16, .q_len = 40, .kv_len = 70, .q_heads = 1, .spread = 3},
        {.name = "f16 d64", .dtype = F16, .head_dim = 64, .q_len = 33, .kv_len = 64, .out_f32 = true, .grad_f32 = true},
        {.name = "not causal", .head_dim = 64, .q_len = 33, .kv_len = 100, .causal = false, .grad_lse = true},
        {.name = "queries before keys", .head_dim = 64, .q_len = 100, .kv_len = 90, .batch = 2, .q_heads = 1, .q_start = -5},
        {.name = "queries after keys", .head_dim = 64, .q_len = 10, .kv_len = 65, .q_start = 1000},
        {.name = "intervals", .head_dim = 64, .q_len = 80, .kv_len = 140, .batch = 3, .q_heads = 1, .kv_start = {0, 37, 130}, .kv_end = {140, 99, 131}},
        {.name = "nothing to see", .head_dim = 64, .q_len = 20, .kv_len = 70, .batch = 2, .causal = false, .kv_start = {30, 0}, .kv_end = {30, 70}},
        {.name = "rows not in use", .q_len = 40, .kv_len = 60, .q_heads = 1, .spare = 130, .grad_f32 = true},
        {.name = "a negative scale", .head_dim = 64, .q_len = 40, .kv_len = 40, .q_heads = 1, .scale = -0.2f},
        {.name = "one key of very low scores", .head_dim = 64, .q_len = 40, .kv_len = 1, .causal = false, .spread = 60},
        {.name = "segments", .q_len = 66, .kv_len = 140, .batch = 2, .q_heads = 4, .kv_heads = 2, .total = true},
        {.name = "segments d64", .head_dim = 64, .q_len = 130, .kv_len = 150, .kv_start = {10}, .grad_f32 = true, .total = true, .spread = 3},
    };
    return check_gradients("attention_backward_sm80", cases, quick, launch);
}
