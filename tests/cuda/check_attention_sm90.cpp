// attention_sm90.cu against float64: edges of its tiles, masks, pages, groups, the ring of stages, and segments that are folded.
#define SHIM_IMPL
#include <cstdint>
#define SEGMENT SEGMENT_OF_THE_KERNELS  // here a segment is two blocks and a half, so that folding happens
#include "params.h"
#undef SEGMENT
constexpr int SEGMENT = 320;

#include "fake_driver.h"

#include "attention_case.h"
#include "attention_sm90.cu"

// As src/cuda/tensor_map.rs asks the driver for it.
static void encode(TensorMap& map, int dtype, const View& view, uint64_t dim, uint64_t rows, uint64_t heads, uint64_t batch,
                   int box_rows) {
    const uint64_t size[4] = {dim, rows, heads, batch};
    const uint64_t stride[3] = {(uint64_t)view.row_stride, (uint64_t)view.head_stride, (uint64_t)view.batch_stride};
    const uint32_t box[4] = {64, (uint32_t)box_rows, 1, 1}, one[4] = {1, 1, 1, 1};
    SHIM_CHECK(fake::encode_tensor_map(&map, dtype == BF16 ? 9 : 6, 4, (void*)view.ptr, size, stride, box, one, 0, 3),
               "a tensor map that the driver would refuse");
}

static void launch(const Attn& p, const Case& c, cpu::Mode mode, uint64_t seed) {
    Maps maps = {};
    encode(maps.q, c.dtype, p.q, p.head_dim, p.q_len, p.q_heads, p.batch, c.head_dim == 64 ? BLOCK_Q<64> : BLOCK_Q<128>);
    SHIM_CHECK(p.pages <= MAPS_PAGES, "a case of too many pages");
    for (int n = 0; n < p.pages; n++) {
        encode(maps.k[n], c.dtype, p.page[n].k.rows, p.head_dim, p.page[n].tokens, p.kv_heads, p.batch, BLOCK_KV);
        encode(maps.v[n], c.dtype, p.page[n].v.rows, p.head_dim, p.page[n].tokens, p.kv_heads, p.batch, BLOCK_KV);
    }
    const bool narrow = c.head_dim == 64;
    const unsigned block_q = narrow ? BLOCK_Q<64> : BLOCK_Q<128>, threads = narrow ? THREADS<64> : THREADS<128>;
    const unsigned tiles = (p.q_len + block_q - 1) / block_q, group = p.q_heads / p.kv_heads;
    const size_t smem = narrow ? SMEM_BYTES<64> : SMEM_BYTES<128>;
    auto* const kernel = c.dtype == BF16 ? (narrow ? attention_sm90_bf16_d64 : attention_sm90_bf16_d128)
                                         : (narrow ? attention_sm90_f16_d64 : attention_sm90_f16_d128);
    cpu::launch({tiles * group, (unsigned)p.kv_heads, (unsigned)p.batch}, {threads, 1, 1}, smem, [&] { kernel(p, maps); }, mode, seed, 2);
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
    const std::vector<Case> cases = {
        {.name = "one key", .q_len = 1, .kv_len = 1},
        {.name = "more keys", .q_len = 70, .kv_len = 393, .q_heads = 2, .kv_heads = 2, .spread = 4},
        {.name = "a tile and a bit", .q_len = 129, .kv_len = 257, .q_heads = 1},
        {.name = "d64", .head_dim = 64, .q_len = 130, .kv_len = 400, .q_heads = 3},
        {.name = "groups", .head_dim = 64, .q_len = 200, .kv_len = 200, .batch = 2, .q_heads = 6, .kv_heads = 2},
        {.name = "f16", .dtype = F16, .q_len = 66, .kv_len = 255, .spread = 3},
        {.name = "f16 d64", .dtype = F16, .head_dim = 64, .q_len = 40, .kv_len = 128},
        {.name = "not causal", .head_dim = 64, .q_len = 33, .kv_len = 300, .causal = false},
        {.name = "many stages", .head_dim = 64, .q_len = 8, .kv_len = 1100, .q_heads = 1},
        {.name = "queries before keys", .head_dim = 64, .q_len = 150, .kv_len = 140, .batch = 2, .q_start = -5},
        {.name = "queries after keys", .head_dim = 64, .q_len = 10, .kv_len = 65, .q_start = 1000},
        {.name = "intervals", .head_dim = 64, .q_len = 80, .kv_len = 300, .batch = 3, .kv_start = {0, 37, 130}, .kv_end = {300, 199, 131}},
        {.name = "nothing to see", .head_dim = 64, .q_len = 20, .kv_len = 70, .batch = 2, .causal = false, .kv_start = {30, 0}, .kv_end = {30, 70}},
        {.name = "pages", .head_dim = 64, .q_len = 70, .kv_len = 430, .cut = {1, 129, 130, 280}, .spare = 5},
        {.name = "pages and padding", .dtype = F16, .head_dim = 64, .q_len = 65, .kv_len = 300, .batch = 2, .kv_start = {140, 3}, .kv_end = {290, 300}, .cut = {128, 200}, .spare = 64},
        {.name = "float32 out, no lse", .head_dim = 64, .q_len = 30, .kv_len = 100, .out_f32 = true, .lse = false},
        {.name = "segments", .q_len = 50, .kv_len = 1100, .q_heads = 1, .total = true, .spread = 3},
        {.name = "segments d64", .head_dim = 64, .q_len = 150, .kv_len = 1000, .q_heads = 2, .cut = {100, 300}, .total = true},
        {.name = "segments nobody sees first", .head_dim = 64, .q_len = 128, .kv_len = 900, .q_start = 100, .kv_start = {90}, .total = true},
    };
    return check_all("attention_sm90", cases, quick, launch);
}
