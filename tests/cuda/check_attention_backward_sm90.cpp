// attention_backward_sm90.cu against float64: edges of its tiles and steps, masks, groups, the ring of stages, segments that are folded.
#define SHIM_IMPL
#include <cstdint>
#define SEGMENT SEGMENT_OF_THE_KERNELS  // here a segment is a few steps, so that folding happens
#include "params.h"
#undef SEGMENT
constexpr int SEGMENT = 200;

#include "fake_driver.h"

#include "attention_backward_sm90.cu"

#include "backward_case.h"

// As src/cuda/tensor_map.rs asks the driver for it.
static void encode(TensorMap& map, int dtype, const View& view, uint64_t dim, uint64_t rows, uint64_t heads, uint64_t batch,
                   int box_rows) {
    const uint64_t size[4] = {dim, rows, heads, batch};
    const uint64_t stride[3] = {(uint64_t)view.row_stride, (uint64_t)view.head_stride, (uint64_t)view.batch_stride};
    const uint32_t box[4] = {64, (uint32_t)box_rows, 1, 1}, one[4] = {1, 1, 1, 1};
    SHIM_CHECK(fake::encode_tensor_map(&map, dtype == BF16 ? 9 : 6, 4, (void*)view.ptr, size, stride, box, one, 0, 3),
               "a tensor map that the driver would refuse");
}

template <bool KEYS, int D>
static void sweep(const Backward& p, const GradCase& c, cpu::Mode mode, uint64_t seed) {
    const bool bf16 = c.dtype == BF16;
    auto* const kernel = KEYS ? (D == 64 ? (bf16 ? backward_keys_sm90_bf16_d64 : backward_keys_sm90_f16_d64)
                                         : (bf16 ? backward_keys_sm90_bf16_d128 : backward_keys_sm90_f16_d128))
                              : (D == 64 ? (bf16 ? backward_queries_sm90_bf16_d64 : backward_queries_sm90_f16_d64)
                                         : (bf16 ? backward_queries_sm90_bf16_d128 : backward_queries_sm90_f16_d128));
    Maps maps = {};
    const int of_queries = KEYS ? COLUMNS<KEYS, D> : ROWS, of_keys = KEYS ? ROWS : COLUMNS<KEYS, D>;
    encode(KEYS ? maps.y0 : maps.x0, c.dtype, p.q, D, p.q_len, p.q_heads, p.batch, of_queries);
    encode(KEYS ? maps.y1 : maps.x1, c.dtype, p.grad_out, D, p.q_len, p.q_heads, p.batch, of_queries);
    encode(KEYS ? maps.x0 : maps.y0, c.dtype, p.k, D, p.kv_len, p.kv_heads, p.batch, of_keys);
    encode(KEYS ? maps.x1 : maps.y1, c.dtype, p.v, D, p.kv_len, p.kv_heads, p.batch, of_keys);
    const unsigned tiles = ((KEYS ? p.key_rows : p.q_len) + ROWS - 1) / ROWS, group = KEYS ? 1 : p.q_heads / p.kv_heads;
    cpu::launch({tiles * group, (unsigned)p.heads, (unsigned)p.batch}, {THREADS, 1, 1}, SMEM_BYTES<KEYS, D>, [&] { kernel(p, maps); },
                mode, seed, 2);
}

static void launch(const Backward& given, const GradCase& c, cpu::Mode mode, uint64_t seed) {
    Backward p = given;
    make_stats(p, c.dtype);
    const int step = p.total ? 1 : p.kv_heads;  // a head at a time where there are segments, as src/cuda/backward.rs may
    for (p.first_head = 0; p.first_head < p.kv_heads; p.first_head += step) {
        p.heads = std::min(step, p.kv_heads - p.first_head);
        if (c.head_dim == 64) {
            sweep<true, 64>(p, c, mode, seed);
            sweep<false, 64>(p, c, mode, seed);
        } else {
            sweep<true, 128>(p, c, mode, seed);
            sweep<false, 128>(p, c, mode, seed);
        }
    }
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
    const std::vector<GradCase> cases = {
        {.name = "one key", .q_heads = 1},
        {.name = "a tile and a bit", .q_len = 129, .kv_len = 129, .q_heads = 1},
        {.name = "groups", .q_len = 70, .kv_len = 100, .q_heads = 4, .kv_heads = 2, .spread = 4},
        {.name = "d64", .head_dim = 64, .q_len = 130, .kv_len = 140, .q_heads = 2},
        {.name = "many stages", .q_len = 330, .kv_len = 20, .q_heads = 1, .causal = false},
        {.name = "many stages of keys", .head_dim = 64, .q_len = 20, .kv_len = 700, .q_heads = 1, .dk_f32 = true, .grad_lse = true},
        {.name = "f16", .dtype = F16, .q_len = 40, .kv_len = 70, .q_heads = 1, .spread = 3},
        {.name = "f16 d64", .dtype = F16, .head_dim = 64, .q_len = 33, .kv_len = 64, .out_f32 = true, .grad_f32 = true},
        {.name = "not causal", .head_dim = 64, .q_len = 33, .kv_len = 150, .causal = false, .grad_lse = true},
        {.name = "queries before keys", .head_dim = 64, .q_len = 140, .kv_len = 130, .batch = 2, .q_heads = 1, .q_start = -5},
        {.name = "queries after keys", .head_dim = 64, .q_len = 10, .kv_len = 65, .q_start = 1000},
        {.name = "intervals", .head_dim = 64, .q_len = 80, .kv_len = 240, .batch = 3, .q_heads = 1, .kv_start = {0, 37, 130}, .kv_end = {240, 199, 131}},
        {.name = "nothing to see", .head_dim = 64, .q_len = 20, .kv_len = 70, .batch = 2, .causal = false, .kv_start = {30, 0}, .kv_end = {30, 70}},
        {.name = "rows not in use", .q_len = 40, .kv_len = 60, .q_heads = 1, .spare = 130, .grad_f32 = true},
        {.name = "a negative scale", .head_dim = 64, .q_len = 40, .kv_len = 40, .q_heads = 1, .scale = -0.2f},
        {.name = "one key of very low scores", .head_dim = 64, .q_len = 40, .kv_len = 1, .causal = false, .spread = 60},
        {.name = "segments", .q_len = 70, .kv_len = 270, .q_heads = 4, .kv_heads = 2, .total = true},
        {.name = "segments d64", .head_dim = 64, .q_len = 130, .kv_len = 430, .kv_start = {10}, .grad_f32 = true, .total = true, .spread = 3},
    };
    return check_gradients("attention_backward_sm90", cases, quick, launch);
}
