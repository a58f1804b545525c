// Cases of attention's gradients for any kernel that is told what to do by Backward, and their truth in float64.
//
// The truth is that of the very inputs: of out as it was rounded, and of lse in float32. Memory that must not be read is NaN, as in
// attention_case.h; what lies around the gradients must be untouched. Bounds are derived: P and dS are each rounded once to the dtype,
// the gradient once, and the rest is float32.
#pragma once
#include "attention_case.h"
#include "sweep.cuh"

struct GradCase {
    const char* name;
    int dtype = BF16, head_dim = 128;
    int q_len = 1, kv_len = 1, batch = 1, q_heads = 2, kv_heads = 1;
    bool causal = true;
    int64_t q_start = std::numeric_limits<int64_t>::min();  // default: the queries are the last tokens
    std::vector<int64_t> kv_start = {}, kv_end = {};
    int spare = 0;  // rows of k and v beyond kv_len
    bool out_f32 = false, grad_f32 = false, dk_f32 = false, grad_lse = false, total = false, wide = true;
    float spread = 1.f;  // of q: 4 makes attention sharp
    float scale = 0.f;   // softmax_scale; 0: the usual one
};

class GradProblem {
  public:
    explicit GradProblem(const GradCase& c)
        : c(c), q(c.dtype, c.batch, c.q_heads, c.q_len, c.head_dim), k(c.dtype, c.batch, c.kv_heads, c.kv_len + c.spare, c.head_dim),
          v(k), grad_out(q), out(c.out_f32 ? F32 : c.dtype, c.batch, c.q_heads, c.q_len, c.head_dim),
          lse(F32, c.batch, c.q_heads, c.q_len, 1), grad_lse(lse) {
        Random random(1);
        for (int b = 0; b < c.batch; b++) {
            for (int h = 0; h < c.q_heads; h++)
                for (int i = 0; i < c.q_len; i++) {
                    grad_lse.set(b, h, i, 0, random.normal());
                    for (int d = 0; d < c.head_dim; d++) {
                        q.set(b, h, i, d, random.normal() * c.spread);
                        grad_out.set(b, h, i, d, random.normal());
                    }
                }
            for (int h = 0; h < c.kv_heads; h++)
                for (int j = low(b); j < high(b); j++)  // the others stay NaN
                    for (int d = 0; d < c.head_dim; d++) {
                        k.set(b, h, j, d, random.normal());
                        v.set(b, h, j, d, random.normal());
                    }
        }
        scale = c.scale != 0 ? c.scale : 1 / std::sqrt((float)c.head_dim);
        solve();
    }

    template <class Launch>
    void run(Verdict& verdict, const char* mode, Launch launch) {
        Case named = {.name = c.name};
        const int grad = c.grad_f32 ? F32 : c.dtype, key_rows = c.kv_len + c.spare;
        const bool dk_f32 = c.grad_f32 || c.dk_f32;
        Tensor4 dq(grad, c.batch, c.q_heads, c.q_len, c.head_dim), dk(dk_f32 ? F32 : c.dtype, c.batch, c.kv_heads, key_rows, c.head_dim),
            dv(grad, c.batch, c.kv_heads, key_rows, c.head_dim);
        Backward p = {};
        p.q = q.view(), p.k = k.view(), p.v = v.view(), p.grad_out = grad_out.view(), p.out = out.view(), p.lse = lse.view();
        if (c.grad_lse) p.grad_lse = grad_lse.view();
        p.dq = dq.view(), p.dk = dk.view(), p.dv = dv.view();
        p.kv_start = c.kv_start.empty() ? 0 : (uint64_t)c.kv_start.data();
        p.kv_end = c.kv_end.empty() ? 0 : (uint64_t)c.kv_end.data();
        p.q_start = q_start();
        p.batch = c.batch, p.q_heads = c.q_heads, p.kv_heads = c.kv_heads, p.q_len = c.q_len, p.kv_len = c.kv_len;
        p.head_dim = c.head_dim, p.stats_len = (c.q_len + STATS - 1) / STATS * STATS, p.key_rows = key_rows;
        p.causal = c.causal, p.out_f32 = c.out_f32, p.dq_f32 = p.dv_f32 = c.grad_f32, p.dk_f32 = dk_f32, p.wide = c.wide;
        p.heads = c.kv_heads;
        p.scale = scale * 1.4426950408889634f, p.softmax_scale = scale;
        std::vector<Stat> stats((size_t)c.batch * c.q_heads * p.stats_len + 2, Stat{NAN, NAN});
        p.stats = ((uint64_t)stats.data() + 15) & ~15ull;
        const size_t rows = (size_t)c.batch * std::max(c.q_heads * c.q_len, 2 * c.kv_heads * key_rows);
        std::vector<float> total(c.total ? rows * c.head_dim : 0, NAN);
        p.total = c.total ? (uint64_t)total.data() : 0;
        launch(p);
        verdict.runs++;
        judge(verdict, named, mode, "dq", dq, truth.dq, c.q_heads, c.q_len);
        judge(verdict, named, mode, "dk", dk, truth.dk, c.kv_heads, key_rows);
        judge(verdict, named, mode, "dv", dv, truth.dv, c.kv_heads, key_rows);
        verdict.judge(named, mode, "bytes beside the gradients", !(dq.is_clean() && dk.is_clean() && dv.is_clean()), 0);
    }

    const GradCase c;

  private:
    struct Side {
        std::vector<double> value, bound;
    };
    struct {
        Side dq, dk, dv;
    } truth;

    int64_t q_start() const { return c.q_start == std::numeric_limits<int64_t>::min() ? c.kv_len - c.q_len : c.q_start; }
    int low(int b) const { return c.kv_start.empty() ? 0 : (int)c.kv_start[b]; }
    int high(int b) const { return c.kv_end.empty() ? c.kv_len : (int)std::min<int64_t>(c.kv_end[b], c.kv_len); }

    void judge(Verdict& verdict, const Case& named, const char* mode, const char* what, const Tensor4& got, const Side& want, int heads, int rows) {
        size_t at = 0;
        for (int b = 0; b < c.batch; b++)
            for (int h = 0; h < heads; h++)
                for (int i = 0; i < rows; i++)
                    for (int d = 0; d < c.head_dim; d++, at++) {
                        const double x = got.get(b, h, i, d), error = std::isfinite(x) ? std::fabs(x - want.value[at]) : INFINITY;
                        verdict.judge(named, mode, what, error, want.bound[at]);
                    }
    }

    void solve() {
        const int D = c.head_dim, group = c.q_heads / c.kv_heads, key_rows = c.kv_len + c.spare;
        const double u = c.dtype == F32 ? 0 : c.dtype == BF16 ? 1. / 256 : 1. / 2048, small = 3e-5;
        for (Side* side : {&truth.dq, &truth.dk, &truth.dv}) {
            const size_t n = (size_t)c.batch * D * (side == &truth.dq ? c.q_heads * c.q_len : c.kv_heads * key_rows);
            side->value.assign(n, 0);
            side->bound.assign(n, 0);
        }
        std::vector<double> p(c.kv_len), o(D);
        for (int b = 0; b < c.batch; b++)
            for (int h = 0; h < c.q_heads; h++)
                for (int i = 0; i < c.q_len; i++) {
                    const int kv_head = h / group, lo = std::max(0, low(b));
                    const int hi = (int)(c.causal ? std::min<int64_t>(high(b), q_start() + i + 1) : high(b));
                    // Forward: out and lse as they are handed over.
                    double most = -INFINITY, sum = 0;
                    for (int j = lo; j < hi; j++) {
                        p[j] = 0;
                        for (int d = 0; d < D; d++) p[j] += (double)q.get(b, h, i, d) * k.get(b, kv_head, j, d);
                        p[j] *= scale;
                        most = std::max(most, p[j]);
                    }
                    std::fill(o.begin(), o.end(), 0);
                    for (int j = lo; j < hi; j++) sum += std::exp(p[j] - most);
                    lse.set(b, h, i, 0, hi > lo ? (float)(most + std::log(sum)) : -INFINITY);
                    for (int j = lo; j < hi; j++) {
                        p[j] = std::exp(p[j] - lse.get(b, h, i, 0));
                        for (int d = 0; d < D; d++) o[d] += p[j] * v.get(b, kv_head, j, d);
                    }
                    double delta = 0, delta_size = 0;
                    for (int d = 0; d < D; d++) {
                        out.set(b, h, i, d, (float)o[d]);
                        const double x = (double)out.get(b, h, i, d) * grad_out.get(b, h, i, d);
                        delta += x, delta_size += std::fabs(x);
                    }
                    if (c.grad_lse) delta -= grad_lse.get(b, h, i, 0), delta_size += std::fabs(grad_lse.get(b, h, i, 0));
                    for (int j = lo; j < hi; j++) {
                        double dp = 0, dp_size = 0;
                        for (int d = 0; d < D; d++) {
                            const double x = (double)grad_out.get(b, h, i, d) * v.get(b, kv_head, j, d);
                            dp += x, dp_size += std::fabs(x);
                        }
                        const double ds = p[j] * (dp - delta), slack = u * std::fabs(ds) + small * p[j] * (dp_size + delta_size);
                        const size_t query = ((size_t)(b * c.q_heads + h) * c.q_len + i) * D;
                        const size_t key = ((size_t)(b * c.kv_heads + kv_head) * key_rows + j) * D;
                        for (int d = 0; d < D; d++) {
                            add(truth.dq, query + d, scale * ds, slack * scale, k.get(b, kv_head, j, d));
                            add(truth.dk, key + d, scale * ds, slack * scale, q.get(b, h, i, d));
                            add(truth.dv, key + d, p[j], (u + small) * p[j], grad_out.get(b, h, i, d));
                        }
                    }
                }
        // float16's subnormals: P and dS are rounded to steps of 2^-25 at the least.
        const double least = c.dtype == F16 ? 0x1p-24 : 0;
        for (Side* side : {&truth.dq, &truth.dk, &truth.dv})
            for (size_t n = 0; n < side->value.size(); n++) {
                if (side->bound[n] == 0) continue;  // no term: exactly 0
                const int terms = side == &truth.dq ? c.kv_len : c.q_len * group;
                side->bound[n] += (c.grad_f32 ? 0 : u * std::fabs(side->value[n])) + least * 8 * c.spread * terms + 1e-7;
            }
    }
    static void add(Side& side, size_t at, double x, double slack, double y) {
        side.value[at] += x * y;
        side.bound[at] += std::fabs(slack * y) + 1e-30;
    }

    Tensor4 q, k, v, grad_out, out, lse, grad_lse;
    float scale;
};

// Stats as attention_backward_any.cu makes them, whose check has its own in it.
template <int DTYPE>
void make_stats_of(const Backward& p) {
    for (int b = 0; b < p.batch; b++)
        for (int h = 0; h < p.q_heads; h++)
            for (int i = 0; i < p.stats_len; i++) {
                Stat& stat = (Stat&)stats_of(p, b, h)[i];
                stat = {INF, 0};
                const float lse = i < p.q_len ? *(const float*)row_address(p.lse, b, h, i) : -INF;
                if (lse == -INF) continue;
                double delta = p.grad_lse.ptr ? -*(const float*)row_address(p.grad_lse, b, h, i) : 0;
                for (int d = 0; d < p.head_dim; d++) {
                    const uint64_t out = row_address(p.out, b, h, i), grad = row_address(p.grad_out, b, h, i);
                    delta += (p.out_f32 ? load_element<F32>(out, d) : load_element<DTYPE>(out, d)) * load_element<DTYPE>(grad, d);
                }
                stat = {lse * 1.4426950408889634f, (float)delta};
            }
}

inline void make_stats(const Backward& p, int dtype) { dtype == BF16 ? make_stats_of<BF16>(p) : make_stats_of<F16>(p); }

// As check_all of attention_case.h.
template <class Launch>
int check_gradients(const char* family, const std::vector<GradCase>& cases, bool quick, Launch launch) {
    Verdict verdict;
    for (const GradCase& c : cases) {
        if (quick && verdict.failures) break;  // a planted bug that was seen
        GradProblem problem(c);
        const int seeds = quick ? 1 : 2;
        for (int n = 0; n < 2 + seeds; n++) {
            const cpu::Mode mode = n == 0 ? cpu::EAGER : n == 1 ? cpu::LAZY : cpu::RANDOM;
            problem.run(verdict, n == 0 ? "eager" : n == 1 ? "lazy" : "random",
                        [&](const Backward& p) { launch(p, c, mode, (uint64_t)(7 + 1000 * n)); });
        }
    }
    std::printf("%s: %d runs, %d failures, worst error %.2f of its bound\n", family, verdict.runs, verdict.failures, verdict.worst);
    return verdict.failures != 0;
}
