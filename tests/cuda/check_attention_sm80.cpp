// attention_sm80.cu against float64: edges of its tiles, masks, pages, groups, and segments that are folded.
#define SHIM_IMPL
#include <cstdint>
#define SEGMENT SEGMENT_OF_THE_KERNELS  // here a segment is two blocks and a half, so that folding happens
#include "params.h"
#undef SEGMENT
constexpr int SEGMENT = 160;

#include "attention_case.h"
#include "attention_sm80.cu"

#include <cstring>

static void launch(const Attn& p, const Case& c, cpu::Mode mode, uint64_t seed) {
    const unsigned tiles = (p.q_len + BLOCK_Q - 1) / BLOCK_Q, group = p.q_heads / p.kv_heads;
    const size_t smem = c.head_dim == 64 ? SMEM_BYTES<64> : SMEM_BYTES<128>;
    auto* const kernel = c.dtype == BF16 ? (c.head_dim == 64 ? attention_sm80_bf16_d64 : attention_sm80_bf16_d128)
                                         : (c.head_dim == 64 ? attention_sm80_f16_d64 : attention_sm80_f16_d128);
    cpu::launch({tiles * group, (unsigned)p.kv_heads, (unsigned)p.batch}, {THREADS, 1, 1}, smem, [&] { kernel(p); }, mode, seed, 2);
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
    std::vector<Case> cases = {
        {.name = "one key", .q_len = 1, .kv_len = 1},
        {.name = "a tile and a bit", .q_len = 129, .kv_len = 129, .q_heads = 1},
        {.name = "more keys", .q_len = 70, .kv_len = 193, .q_heads = 4, .kv_heads = 2, .spread = 4},
        {.name = "d64", .head_dim = 64, .q_len = 130, .kv_len = 200, .q_heads = 3},
        {.name = "f16", .dtype = F16, .q_len = 66, .kv_len = 127, .spread = 3},
        {.name = "f16 d64", .dtype = F16, .head_dim = 64, .q_len = 40, .kv_len = 128},
        {.name = "not causal", .head_dim = 64, .q_len = 33, .kv_len = 150, .causal = false},
        {.name = "queries before keys", .head_dim = 64, .q_len = 100, .kv_len = 90, .batch = 2, .q_start = -5},
        {.name = "queries after keys", .head_dim = 64, .q_len = 10, .kv_len = 65, .q_start = 1000},
        {.name = "intervals", .head_dim = 64, .q_len = 80, .kv_len = 140, .batch = 3, .kv_start = {0, 37, 130}, .kv_end = {140, 99, 131}},
        {.name = "nothing to see", .head_dim = 64, .q_len = 20, .kv_len = 70, .batch = 2, .causal = false, .kv_start = {30, 0}, .kv_end = {30, 70}},
        {.name = "pages", .head_dim = 64, .q_len = 70, .kv_len = 230, .cut = {1, 65, 66, 130}, .spare = 5},
        {.name = "pages and padding", .dtype = F16, .head_dim = 64, .q_len = 65, .kv_len = 200, .batch = 2, .kv_start = {70, 3}, .cut = {64, 100}, .spare = 64},
        {.name = "float32 out, no lse", .head_dim = 64, .q_len = 30, .kv_len = 100, .out_f32 = true, .lse = false},
        {.name = "segments", .q_len = 50, .kv_len = 520, .q_heads = 1, .total = true, .spread = 3},
        {.name = "segments d64", .head_dim = 64, .q_len = 150, .kv_len = 700, .q_heads = 2, .cut = {100, 300}, .total = true},
        {.name = "segments nobody sees first", .head_dim = 64, .q_len = 128, .kv_len = 400, .q_start = 100, .kv_start = {90}, .total = true},
    };
    return check_all("attention_sm80", cases, quick, launch);
}
