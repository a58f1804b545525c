// merge, merge_splits: against sum exp(lse_i - lse) out_i in float64, with what a partial that saw no key may hold.
#define SHIM_IMPL
#include "merge.cu"

#include "rows.h"

struct Case {
    int out_dtype, in_dtype, batch, heads, len, dim, count;
    bool is_list, by_block;
    Layout layout;
    float spread;  // of lses
};

static bool check(const Case& c, int seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, 1);
    const int size = c.in_dtype == F32 ? 4 : 2;
    std::vector<std::unique_ptr<Rows>> outs, lses;
    for (int n = 0; n < c.count; n++) {
        // In a list every third partial is float32, as from a call that asked for it.
        outs.emplace_back(new Rows(c.is_list && n % 3 == 2 ? F32 : c.in_dtype, c.batch, c.heads, c.len, c.dim, c.layout));
        lses.emplace_back(new Rows(F32, c.batch, c.heads, c.len, 1));
        outs[n]->fill(random);
    }
    // Kinds of rows: all see keys, some partials see none, none sees any, a NaN, an infinity.
    for (int b = 0; b < c.batch; b++)
        for (int h = 0; h < c.heads; h++)
            for (int i = 0; i < c.len; i++) {
                const int kind = (b * 7 + h * 3 + i) % 8;
                for (int n = 0; n < c.count; n++) {
                    float s = normal(random) * c.spread;
                    if (kind == 1 && n % 2 == (i & 1)) s = -INF;
                    if (kind == 2) s = -INF;
                    if (kind == 3 && n == c.count - 1) s = NAN;
                    if (kind == 4 && n == 0) s = INF;
                    if (kind == 5) s += 1e30f;
                    lses[n]->set(b, h, i, 0, s);
                    if (s == -INF)
                        for (int d = 0; d < c.dim; d++) outs[n]->set(b, h, i, d, NAN);  // not to be read
                }
            }
    Rows out(c.out_dtype, c.batch, c.heads, c.len, c.dim, c.layout), lse(F32, c.batch, c.heads, c.len, 1, {true, 4});

    Merge p = {};
    p.out = out.view();
    const View l = lse.view();
    p.lse = l.ptr, p.lse_stride[0] = l.batch_stride, p.lse_stride[1] = l.head_stride, p.lse_stride[2] = l.row_stride;
    p.batch = c.batch, p.heads = c.heads, p.len = c.len, p.head_dim = c.dim, p.out_dtype = c.out_dtype, p.count = c.count;
    p.is_list = c.is_list;
    p.wide = c.dim % 4 == 0 && c.layout.pad % 16 == 0 && c.layout.shift % 16 == 0;
    // Splits of a workspace: one after the other, in one piece of memory.
    std::vector<uint8_t> workspace;
    if (c.is_list) {
        for (int n = 0; n < c.count; n++)
            p.outs[n] = outs[n]->view(), p.lses[n] = lses[n]->view(), p.in_dtype[n] = outs[n]->dtype;
    } else {
        const int64_t rows = (int64_t)c.batch * c.heads * c.len, out_bytes = (rows * c.dim * size + 255) / 256 * 256;
        workspace.assign(c.count * (out_bytes + rows * 4) + 256, 0xff);
        uint8_t* const at = workspace.data() + (256 - (uintptr_t)workspace.data() % 256) % 256;
        const int64_t row = c.dim * size;
        p.outs[0] = {(uint64_t)at, row * c.len * c.heads, row * c.len, row};
        p.lses[0] = {(uint64_t)at + c.count * out_bytes, (int64_t)4 * c.len * c.heads, (int64_t)4 * c.len, 4};
        p.in_dtype[0] = c.in_dtype;
        p.split_stride = out_bytes, p.lse_split_stride = rows * 4;
        for (int n = 0; n < c.count; n++)
            for (int b = 0; b < c.batch; b++)
                for (int h = 0; h < c.heads; h++)
                    for (int i = 0; i < c.len; i++) {
                        std::memcpy((void*)(row_address(p.outs[0], b, h, i) + n * out_bytes), (void*)outs[n]->row(b, h, i), row);
                        std::memcpy((void*)(row_address(p.lses[0], b, h, i) + n * p.lse_split_stride),
                                    (void*)lses[n]->row(b, h, i), 4);
                    }
    }
    const int rows = c.batch * c.heads * c.len;
    const dim3 grid = {(unsigned)(c.by_block ? rows : (rows + WARPS - 1) / WARPS)};
    auto kernel = c.by_block ? merge_splits : merge;
    cpu::launch(grid, {THREADS}, SMEM_BYTES, [&] { kernel(p); }, MODES[seed % 3], seed);

    Worst of_out, of_lse;
    std::vector<double> want(c.dim);
    for (int b = 0; b < c.batch; b++)
        for (int h = 0; h < c.heads; h++)
            for (int i = 0; i < c.len; i++) {
                double top = -INFINITY, sum = 0, size_of_terms = 0;
                bool broken = false;
                for (int n = 0; n < c.count; n++) {
                    const double s = lses[n]->get(b, h, i, 0);
                    broken |= std::isnan(s) || s == INFINITY;
                    top = std::max(top, s);
                }
                for (int n = 0; n < c.count; n++) sum += top == -INFINITY ? 0 : std::exp(lses[n]->get(b, h, i, 0) - top);
                for (int d = 0; d < c.dim; d++) {
                    want[d] = size_of_terms = 0;
                    for (int n = 0; n < c.count; n++) {
                        const double s = lses[n]->get(b, h, i, 0);
                        if (s == -INFINITY) continue;
                        const double term = std::exp(s - top) / sum * outs[n]->get(b, h, i, d);
                        want[d] += term, size_of_terms += std::fabs(term);
                    }
                    if (broken) want[d] = NAN;
                    of_out.see(out.get(b, h, i, d), want[d],
                               std::fabs(want[d]) * half_step(c.out_dtype) * 1.001 + least_step(c.out_dtype) + size_of_terms * 3e-6);
                }
                const double all = broken ? NAN : sum == 0 ? -INFINITY : top + std::log(sum);
                of_lse.see(lse.get(b, h, i, 0), all, sum == 0 ? 0 : std::fabs(all) * 1.3e-7 + 1e-6);
            }
    const bool clean = out.is_clean() && lse.is_clean();
    const bool good = of_out.good() && of_lse.good() && clean;
    if (!good || seed % 8 == 0)
        std::printf("%s %s from %s [%d, %d, %d, %d], %d %s, %s: worst error %.2e of out, %.2e of lse%s\n", good ? "ok" : "BAD",
                    name_of_dtype(c.out_dtype), name_of_dtype(c.in_dtype), c.batch, c.heads, c.len, c.dim, c.count,
                    c.is_list ? "in a list" : "splits", c.by_block ? "by block" : "by warp", of_out.error, of_lse.error,
                    clean ? "" : "; wrote beside its rows");
    return good;
}

int main() {
    bool good = true;
    int seed = 0;
    for (int out_dtype : {F32, BF16, F16})
        for (bool by_block : {false, true})
            for (bool is_list : {false, true})
                for (const Case& c : {
                         Case{out_dtype, F32, 2, 4, 5, 128, 3, is_list, by_block, {}, 3},
                         Case{out_dtype, is_list ? BF16 : F32, 1, 3, 7, 64, 2, is_list, by_block, {true, 16}, 40},
                         Case{out_dtype, is_list ? F16 : F32, 2, 2, 5, 256, 32, is_list, by_block, {true}, 1},
                         Case{out_dtype, F32, 2, 5, 1, 80, is_list ? 11 : 77, is_list, by_block, {}, 80},
                         Case{out_dtype, is_list ? BF16 : F32, 1, 3, 4, 18, is_list ? 31 : 130, is_list, by_block, {false, 4, 4}, 5},
                         Case{out_dtype, F32, 1, 2, 8, 36, 1, is_list, by_block, {}, 3},
                     })
                    good &= check(c, seed++);
    std::printf("%d cases, %s\n", seed, good ? "all good" : "FAILED");
    return good ? 0 : 1;
}
