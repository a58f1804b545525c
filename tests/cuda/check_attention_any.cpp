// attention_any.cu against float64: any head_dim and dtype, edges of its tiles, masks, pages.
#define SHIM_IMPL
#include "attention_case.h"
#include "attention_any.cu"

static void launch(const Attn& p, const Case& c, cpu::Mode mode, uint64_t seed) {
    const unsigned tiles = (p.q_len + QUERIES - 1) / QUERIES;
    auto* const kernel = c.dtype == F32 ? attention_any_f32 : c.dtype == BF16 ? attention_any_bf16 : attention_any_f16;
    cpu::launch({tiles, (unsigned)p.q_heads, (unsigned)p.batch}, {THREADS, 1, 1}, SMEM_BYTES, [&] { kernel(p); }, mode, seed, 2);
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
    const std::vector<Case> cases = {
        {.name = "one key", .dtype = F32, .head_dim = 8},
        {.name = "a tile and a bit", .dtype = F32, .head_dim = 40, .q_len = 17, .kv_len = 33},
        {.name = "odd head_dim", .dtype = F32, .head_dim = 33, .q_len = 16, .kv_len = 64, .q_heads = 6, .kv_heads = 2, .spread = 4},
        {.name = "widest", .dtype = F32, .head_dim = 256, .q_len = 20, .kv_len = 65},
        {.name = "bf16", .head_dim = 80, .q_len = 31, .kv_len = 70, .spread = 3},
        {.name = "f16", .dtype = F16, .head_dim = 128, .q_len = 15, .kv_len = 31},
        {.name = "not causal", .dtype = F32, .head_dim = 64, .q_len = 5, .kv_len = 50, .causal = false},
        {.name = "queries before keys", .dtype = F32, .head_dim = 64, .q_len = 40, .kv_len = 30, .batch = 2, .q_start = -5},
        {.name = "intervals", .dtype = F32, .head_dim = 64, .q_len = 40, .kv_len = 80, .batch = 3, .kv_start = {0, 37, 70}, .kv_end = {80, 60, 71}},
        {.name = "nothing to see", .head_dim = 64, .q_len = 20, .kv_len = 70, .batch = 2, .causal = false, .kv_start = {30, 0}, .kv_end = {30, 70}},
        {.name = "pages", .dtype = F32, .head_dim = 64, .q_len = 30, .kv_len = 120, .kv_start = {3}, .cut = {1, 33, 34, 66}, .spare = 5},
        {.name = "float32 out, no lse", .head_dim = 64, .q_len = 30, .kv_len = 50, .out_f32 = true, .lse = false},
    };
    return check_all("attention_any", cases, quick, launch);
}
