// Cases of attention for any kernel that is told what to do by Attn, and their truth in float64.
//
// Memory that must not be read is NaN: rows between heads, tokens of a page that are not in use, keys that kv_start and kv_end
// hide. The bound of an element's error is derived: P and the output are each rounded once to the dtype, so it is half an ulp times
// (sum of p |v| + |out|), and a little for float32.
#pragma once
#include "emulation.h"
#include "params.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

struct Case {
    const char* name;
    int dtype = BF16, head_dim = 128;
    int q_len = 1, kv_len = 1, batch = 1, q_heads = 2, kv_heads = 1;
    bool causal = true;
    int64_t q_start = std::numeric_limits<int64_t>::min();  // default: the queries are the last tokens
    std::vector<int64_t> kv_start = {}, kv_end = {};
    std::vector<int> cut = {};  // where pages end, but for the last
    int spare = 0;              // tokens of each page that are not in use
    bool out_f32 = false, lse = true, total = false;
    float spread = 1.f;  // of q: 4 makes attention sharp
};

class Random {
  public:
    explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull | 1) {}
    float normal() {  // the sum of 12 uniform numbers, near enough
        float sum = -6.f;
        for (int i = 0; i < 12; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            sum += (float)(state >> 40) / (1 << 24);
        }
        return sum;
    }

  private:
    uint64_t state;
};

// A tensor [batch, heads, rows, head_dim] with a gap of NaN after each row, head and batch row.
class Tensor4 {
  public:
    Tensor4(int dtype, int batch, int heads, int rows, int dim)
        : dtype(dtype), batch(batch), heads(heads), rows(rows), dim(dim), size(dtype == F32 ? 4 : 2), row((dim + 16 / size) * size), head(row * (rows + 1)), batch_row(head * heads + row),
          memory((size_t)batch_row * batch / 4 + 8, 0xFFFFFFFFu) {}
    View view() const { return {address(), batch_row, head, row}; }
    void set(int b, int h, int i, int d, float x) {
        uint8_t* const at = place(b, h, i, d);
        const uint16_t bits = dtype == BF16 ? float_to_bf16(x) : float_to_half(x);
        dtype == F32 ? std::memcpy(at, &x, 4) : std::memcpy(at, &bits, 2);
    }
    float get(int b, int h, int i, int d) const {
        const uint8_t* const at = place(b, h, i, d);
        float x;
        uint16_t bits;
        std::memcpy(&x, at, dtype == F32 ? 4 : 2);
        std::memcpy(&bits, at, 2);
        return dtype == F32 ? x : dtype == BF16 ? bf16_to_float(bits) : half_to_float(bits);
    }

    // Whether every byte that is no row's is as it was.
    bool is_clean() const {
        std::vector<uint32_t> seen = memory;
        const int64_t start = address() - (uint64_t)memory.data();
        for (int64_t b = 0; b < batch; b++)
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < rows; i++)
                    std::memset((uint8_t*)seen.data() + start + b * batch_row + h * head + i * row, 0xff, (size_t)dim * size);
        return std::all_of(seen.begin(), seen.end(), [](uint32_t x) { return x == 0xFFFFFFFFu; });
    }

  private:
    uint64_t address() const { return ((uint64_t)memory.data() + 15) & ~15ull; }
    uint8_t* place(int b, int h, int i, int d) const { return (uint8_t*)address() + b * batch_row + h * head + i * row + d * size; }
    int dtype, batch, heads, rows, dim, size;
    int64_t row, head, batch_row;
    std::vector<uint32_t> memory;
};

// What came of all cases of a check.
struct Verdict {
    int runs = 0, failures = 0;
    double worst = 0;  // error over its bound

    void judge(const Case& c, const char* mode, const char* what, double error, double bound) {
        if (error <= bound) {
            worst = std::max(worst, bound > 0 ? error / bound : 0);
            return;
        }
        if (failures++ < 20) std::printf("FAILED %s, %s: %s: error %.3g, bound %.3g\n", c.name, mode, what, error, bound);
    }
};

struct Truth {
    std::vector<double> out, bound, lse;  // [batch][q_heads][q_len][head_dim], the same, [batch][q_heads][q_len]
};

class Problem {
  public:
    explicit Problem(const Case& c, uint64_t seed = 1) : c(c), q(c.dtype, c.batch, c.q_heads, c.q_len, c.head_dim),
          out(c.out_f32 ? F32 : c.dtype, c.batch, c.q_heads, c.q_len, c.head_dim), starts(c.kv_start), ends(c.kv_end) {
        Random random(seed);
        for (int b = 0; b < c.batch; b++)
            for (int h = 0; h < c.q_heads; h++)
                for (int i = 0; i < c.q_len; i++)
                    for (int d = 0; d < c.head_dim; d++) q.set(b, h, i, d, random.normal() * c.spread);
        std::vector<int> edges = {0};
        for (int cut : c.cut)
            if (cut < c.kv_len) edges.push_back(cut);
        edges.push_back(c.kv_len);
        for (size_t n = 0; n + 1 < edges.size(); n++) {
            const int tokens = edges[n + 1] - edges[n];
            firsts.push_back(edges[n]);
            for (auto* side : {&k, &v}) {
                side->emplace_back(c.dtype, c.batch, c.kv_heads, tokens + c.spare, c.head_dim);
                for (int b = 0; b < c.batch; b++)
                    for (int h = 0; h < c.kv_heads; h++)
                        for (int i = 0; i < tokens; i++) {
                            const int key = edges[n] + i;
                            const bool hidden = key < low(b) || key >= high(b);
                            for (int d = 0; d < c.head_dim; d++)
                                side->back().set(b, h, i, d, hidden ? NAN : random.normal());
                        }
            }
        }
        firsts.push_back(c.kv_len);
        solve();
    }

    // Runs `launch(Attn)` once over poisoned results and judges what it leaves.
    template <class Launch>
    void run(Verdict& verdict, const char* mode, Launch launch) {
        const size_t rows = (size_t)c.batch * c.q_heads * c.q_len;
        std::vector<float> lse(rows, NAN), total(c.total ? rows * c.head_dim : 0, NAN);
        out = Tensor4(c.out_f32 ? F32 : c.dtype, c.batch, c.q_heads, c.q_len, c.head_dim);
        Attn p = {};
        p.q = q.view();
        p.out = out.view();
        p.lse = c.lse ? (uint64_t)lse.data() : 0;
        p.total = c.total ? (uint64_t)total.data() : 0;
        p.kv_start = starts.empty() ? 0 : (uint64_t)starts.data();
        p.kv_end = ends.empty() ? 0 : (uint64_t)ends.data();
        p.q_start = first_query();
        p.batch = c.batch, p.q_heads = c.q_heads, p.kv_heads = c.kv_heads;
        p.q_len = c.q_len, p.kv_len = c.kv_len, p.head_dim = c.head_dim;
        p.causal = c.causal, p.out_f32 = c.out_f32;
        p.scale = (float)(1.4426950408889634 / std::sqrt((double)c.head_dim));
        p.pages = (int)k.size();
        SHIM_CHECK(p.pages <= MAX_PAGES, "a case of too many pages");
        for (int n = 0; n < p.pages; n++) {
            p.page[n].k.rows = k[n].view();
            p.page[n].v.rows = v[n].view();
            p.page[n].first = firsts[n];
            p.page[n].tokens = firsts[n + 1] - firsts[n];
        }
        launch(p);
        verdict.runs++;
        size_t row = 0;
        for (int b = 0; b < c.batch; b++)
            for (int h = 0; h < c.q_heads; h++)
                for (int i = 0; i < c.q_len; i++, row++) {
                    for (int d = 0; d < c.head_dim; d++) {
                        const size_t at = row * c.head_dim + d;
                        verdict.judge(c, mode, "out", distance(out.get(b, h, i, d), truth.out[at]), truth.bound[at]);
                    }
                    if (c.lse) {
                        const double bound = std::isinf(truth.lse[row]) ? 0 : 1e-5 * std::max(1.0, std::fabs(truth.lse[row]));
                        verdict.judge(c, mode, "lse", distance(lse[row], truth.lse[row]), bound);
                    }
                }
    }

    const Case c;

  private:
    int64_t first_query() const { return c.q_start == std::numeric_limits<int64_t>::min() ? c.kv_len - c.q_len : c.q_start; }
    int64_t low(int b) const { return c.kv_start.empty() ? 0 : c.kv_start[b]; }
    int64_t high(int b) const { return c.kv_end.empty() ? c.kv_len : std::min<int64_t>(c.kv_end[b], c.kv_len); }
    static double distance(double a, double b) {
        return a == b ? 0 : std::isnan(a) || std::isinf(a) ? std::numeric_limits<double>::infinity() : std::fabs(a - b);
    }

    void solve() {
        const size_t rows = (size_t)c.batch * c.q_heads * c.q_len;
        const double half_ulp = c.dtype == F32 ? 0 : c.dtype == BF16 ? 1. / 256 : 1. / 2048;  // relative, of the least mantissa: 2^-8, 2^-11
        truth.out.resize(rows * c.head_dim);
        truth.bound.resize(rows * c.head_dim);
        truth.lse.resize(rows);
        size_t row = 0;
        for (int b = 0; b < c.batch; b++)
            for (int h = 0; h < c.q_heads; h++)
                for (int i = 0; i < c.q_len; i++, row++) solve_row(b, h, i, row, half_ulp);
    }
    void solve_row(int b, int h, int i, size_t row, double half_ulp) {
        const int kv_head = h / (c.q_heads / c.kv_heads);
        const int64_t lo = std::max<int64_t>(0, low(b));
        const int64_t hi = c.causal ? std::min(high(b), first_query() + i + 1) : high(b);
        std::vector<double> weight;
        double most = -INFINITY, sum = 0;
        for (int64_t j = lo; j < hi; j++) {
            const auto [page, at] = find((int)j);
            double s = 0;
            for (int d = 0; d < c.head_dim; d++) s += (double)q.get(b, h, i, d) * k[page].get(b, kv_head, at, d);
            weight.push_back(s / std::sqrt((double)c.head_dim));
            most = std::max(most, weight.back());
        }
        for (double& w : weight) sum += w = std::exp(w - most);
        truth.lse[row] = weight.empty() ? -INFINITY : most + std::log(sum);
        std::vector<double> o(c.head_dim), size(c.head_dim);
        for (size_t n = 0; n < weight.size(); n++) {
            const auto [page, at] = find((int)(lo + n));
            for (int d = 0; d < c.head_dim; d++) {
                const double x = weight[n] / sum * v[page].get(b, kv_head, at, d);
                o[d] += x;
                size[d] += std::fabs(x);
            }
        }
        for (int d = 0; d < c.head_dim; d++) {
            truth.out[row * c.head_dim + d] = o[d];
            // float32: products and sums of scores move a weight by some 1e-6 of itself for each unit of the score.
            truth.bound[row * c.head_dim + d] =
                weight.empty() ? 0 : half_ulp * (size[d] + (c.out_f32 ? 0 : std::fabs(o[d]))) + 3e-5 * size[d] + 1e-7;
        }
    }
    std::pair<int, int> find(int key) const {
        int page = 0;
        while (key >= firsts[page + 1]) page++;
        return {page, key - firsts[page]};
    }

    Tensor4 q, out;
    std::vector<Tensor4> k, v;
    std::vector<int> firsts;
    std::vector<int64_t> starts, ends;
    Truth truth;
};

// Every case with copies done early, late, and at some random moments. `launch(Attn, case, mode, seed)`.
template <class Launch>
int check_all(const char* family, const std::vector<Case>& cases, bool quick, Launch launch) {
    Verdict verdict;
    for (const Case& c : cases) {
        if (quick && verdict.failures) break;  // a planted bug that was seen
        Problem problem(c);
        const int seeds = quick ? 2 : 4;
        for (int n = 0; n < 2 + seeds; n++) {
            const cpu::Mode mode = n == 0 ? cpu::EAGER : n == 1 ? cpu::LAZY : cpu::RANDOM;
            problem.run(verdict, n == 0 ? "eager" : n == 1 ? "lazy" : "random",
                        [&](const Attn& p) { launch(p, c, mode, (uint64_t)(7 + 1000 * n)); });
        }
    }
    std::printf("%s: %d runs, %d failures, worst error %.2f of its bound\n", family, verdict.runs, verdict.failures, verdict.worst);
    return verdict.failures != 0;
}
