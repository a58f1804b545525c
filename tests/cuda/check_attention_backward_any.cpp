// attention_backward_any.cu against float64: any head_dim and dtype, edges of its tiles, masks, groups; and the stats of all kernels.
#define SHIM_IMPL
#include "attention_backward_any.cu"

#include "backward_case.h"

static void launch(const Backward& p, const GradCase& c, cpu::Mode mode, uint64_t seed) {
    using Kernel = void (*)(const Backward);
    static constexpr Kernel STATS_OF[] = {backward_stats_f32, backward_stats_bf16, backward_stats_f16};
    static constexpr Kernel KEYS_OF[] = {backward_keys_f32, backward_keys_bf16, backward_keys_f16};
    static constexpr Kernel QUERIES_OF[] = {backward_queries_f32, backward_queries_bf16, backward_queries_f16};
    const auto run = [&](Kernel kernel, dim3 grid) {
        cpu::launch(grid, {THREADS, 1, 1}, SMEM_BYTES, [&] { kernel(p); }, mode, seed, 2);
    };
    const unsigned batch = p.batch, heads = p.q_heads, kv_heads = p.kv_heads;
    run(STATS_OF[c.dtype], {(batch * heads * p.stats_len + WARPS - 1) / WARPS, 1, 1});
    run(KEYS_OF[c.dtype], {(unsigned)(p.key_rows + ROWS - 1) / ROWS, kv_heads, batch});
    run(QUERIES_OF[c.dtype], {(unsigned)(p.q_len + ROWS - 1) / ROWS, heads, batch});
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
    const std::vector<GradCase> cases = {
        {.name = "one key", .dtype = F32, .head_dim = 8, .q_heads = 1},
        {.name = "a tile and a bit", .dtype = F32, .head_dim = 40, .q_len = 17, .kv_len = 17, .q_heads = 1},
        {.name = "odd head_dim", .dtype = F32, .head_dim = 33, .q_len = 16, .kv_len = 35, .q_heads = 4, .kv_heads = 2, .wide = false, .spread = 4},
        {.name = "widest", .dtype = F32, .head_dim = 256, .q_len = 12, .kv_len = 18, .q_heads = 1},
        {.name = "bf16", .head_dim = 80, .q_len = 21, .kv_len = 40, .spread = 3},
        {.name = "f16", .dtype = F16, .head_dim = 128, .q_len = 15, .kv_len = 31, .q_heads = 1},
        {.name = "not causal", .dtype = F32, .head_dim = 24, .q_len = 5, .kv_len = 34, .causal = false, .grad_lse = true},
        {.name = "queries before keys", .dtype = F32, .head_dim = 24, .q_len = 40, .kv_len = 30, .batch = 2, .q_start = -5},
        {.name = "queries after keys", .dtype = F32, .head_dim = 24, .q_len = 7, .kv_len = 20, .q_start = 1000},
        {.name = "intervals", .dtype = F32, .head_dim = 24, .q_len = 40, .kv_len = 60, .batch = 3, .kv_start = {0, 23, 50}, .kv_end = {60, 48, 51}},
        {.name = "nothing to see", .head_dim = 24, .q_len = 20, .kv_len = 40, .batch = 2, .causal = false, .kv_start = {30, 0}, .kv_end = {30, 40}},
        {.name = "rows not in use", .dtype = F32, .head_dim = 24, .q_len = 20, .kv_len = 20, .spare = 21},
        {.name = "float32 dk alone", .dtype = F16, .head_dim = 24, .q_len = 18, .kv_len = 18, .q_heads = 1, .dk_f32 = true},
        {.name = "float32 out and gradients", .head_dim = 32, .q_len = 20, .kv_len = 33, .q_heads = 3, .out_f32 = true, .grad_f32 = true, .grad_lse = true},
        {.name = "a negative scale", .dtype = F32, .head_dim = 16, .q_len = 20, .kv_len = 20, .scale = -0.2f},
    };
    return check_gradients("attention_backward_any", cases, quick, launch);
}
