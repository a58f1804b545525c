// decode.cu against float64: pages of all formats in one call, splits, groups, masks. The bound of an error of compact pages is
// derived from the kernel's own roundings: q and q * scale to float16, p * scale to bfloat16, p beside offsets to float16, out.
#define SHIM_IMPL
#include "attention_case.h"
#include "decode.cu"

#include <cstring>
#include <memory>

struct Format2 {
    Format k, v;
};

struct CompactCase {
    const char* name;
    int dtype = BF16, head_dim = 128, batch = 1, q_heads = 4, kv_heads = 1, q_len = 1;
    std::vector<int> tokens;         // of each page
    std::vector<Format2> formats;    // of each page
    bool causal = true;
    std::vector<int64_t> kv_start = {}, kv_end = {};
    int split_len = 64;
    bool out_f32 = false;
    float spread = 1.f;
};

// A page of random codes and scales, and what they stand for. Everything that must not be read is NaN or all ones.
class CompactPage {
  public:
    CompactPage(const CompactCase& c, Format2 f, int tokens, Random& random)
        : f(f), c(c), tokens(tokens), groups((tokens + GROUP - 1) / GROUP), room(groups * GROUP) {
        const int heads = c.batch * c.kv_heads, d = c.head_dim;
        if (f.k == DENSE) k = std::make_unique<Tensor4>(c.dtype, c.batch, c.kv_heads, room, d);
        if (f.v == DENSE) v = std::make_unique<Tensor4>(c.dtype, c.batch, c.kv_heads, room, d);
        key.resize((size_t)heads * tokens * d);
        value.resize(key.size());
        key_size.resize(key.size());
        k_codes.assign((size_t)heads * groups * GROUP * d / 4 + 4, 0);
        v_codes.assign((size_t)heads * room * d / 4 + 4, 0xFFFFFFFFu);
        k_params.assign((size_t)heads * groups * 2 * d + 8, 0x7e00);
        v_params.assign((size_t)heads * 2 * (d / GROUP) * room + 8, 0x7e00);
        for (int h = 0; h < heads; h++) fill(h, random);
    }
    // Values that are hidden may be anything: their elements, or scales and offsets, become NaN.
    void hide(int b, int lo, int hi) {
        const int blocks = c.head_dim / GROUP;
        for (int i = 0; i < tokens; i++) {
            if (i >= lo && i < hi) continue;
            for (int head = 0; head < c.kv_heads; head++) {
                uint16_t* const params = (uint16_t*)base(v_params.data()) + (size_t)(b * c.kv_heads + head) * 2 * blocks * room;
                for (int d = 0; v && d < c.head_dim; d++) v->set(b, head, i, d, NAN);
                for (int d = 0; k && d < c.head_dim; d++) k->set(b, head, i, d, NAN);
                for (int n = 0; n < 2 * blocks; n++) params[n * room + i] = 0x7e00;
            }
        }
    }
    Page page(int first) const {
        Page p = {};
        p.first = first;
        p.tokens = tokens;
        const int64_t d = c.head_dim, k_row = GROUP * d / (f.k == INT4 ? 2 : 1), v_row = d / (f.v == INT4 ? 2 : 1);
        auto four = [&](const void* at, int64_t row, int64_t rows) {
            return View{(uint64_t)at, row * rows * c.kv_heads, row * rows, row};
        };
        p.k.rows = k ? k->view() : four(base(k_codes.data()), k_row, groups);
        p.v.rows = v ? v->view() : four(base(v_codes.data()), v_row, room);
        if (!k) p.k.params = four(base(k_params.data()), 4 * d, groups);
        if (!v) p.v.params = four(base(v_params.data()), 2 * room, 2 * d / GROUP);
        p.k.format = f.k;
        p.v.format = f.v;
        return p;
    }
    size_t at(int b, int h, int i, int d) const { return ((size_t)(b * c.kv_heads + h) * tokens + i) * c.head_dim + d; }
    std::vector<double> key, value, key_size;  // key_size: |scale code| + |offset|

  private:
    static const void* base(const void* p) { return (const void*)(((uint64_t)p + 15) & ~15ull); }
    static double number(Format f, uint32_t code) {
        if (f == INT8) return (int8_t)code;
        if (f == INT4) return (int)code - 8;
        const int e = code >> 3 & 15, m = code & 7;
        const double x = e ? std::ldexp(8 + m, e - 10) : std::ldexp(m, -9);
        return code & 128 ? -x : x;
    }
    static uint32_t draw(Format f, Random& random) {
        const uint32_t bits = (uint32_t)(int)(random.normal() * 1000);
        return f == INT4 ? bits & 15 : f == FP8 && (bits & 0x7f) == 0x7f ? 0x7e : bits & 255;
    }
    void fill(int h, Random& random) {
        for (int i = 0; i < tokens; i++)
            for (int d = 0; d < c.head_dim; d++) {
                const size_t n = ((size_t)h * tokens + i) * c.head_dim + d;
                key[n] = k ? dense(*k, h, i, d, random) : compact_key(h, i, d, random, key_size[n]);
                if (k) key_size[n] = std::fabs(key[n]);
                value[n] = v ? dense(*v, h, i, d, random) : compact_value(h, i, d, random);
            }
    }
    double dense(Tensor4& side, int h, int i, int d, Random& random) {
        side.set(h / c.kv_heads, h % c.kv_heads, i, d, random.normal());
        return side.get(h / c.kv_heads, h % c.kv_heads, i, d);
    }
    static double unit(Format f) { return f == INT8 ? .02 : f == INT4 ? .3 : .006; }
    // Scales and offsets are drawn when the first element comes that they belong to.
    static double param(uint16_t& bits, double x) {
        if (bits == 0x7e00) bits = float_to_half((float)x);
        return half_to_float(bits);
    }
    double compact_key(int h, int i, int d, Random& random, double& size) {
        const int group = i / GROUP, token = i % GROUP, d_len = c.head_dim;
        uint8_t* const codes = (uint8_t*)base(k_codes.data()) + (size_t)(h * groups + group) * GROUP * d_len / (f.k == INT4 ? 2 : 1);
        uint16_t* const params = (uint16_t*)base(k_params.data()) + (size_t)(h * groups + group) * 2 * d_len;
        const double scale = param(params[d], (1 + .3 * random.normal()) * unit(f.k));
        const double offset = param(params[d_len + d], random.normal() * .5);
        const uint32_t code = draw(f.k, random);
        if (f.k == INT4)
            ((uint32_t*)codes)[d / 8 * GROUP + token] |= code << (4 * (d % 8 / 2) + 16 * (d % 2));
        else
            ((uint32_t*)codes)[d / 4 * GROUP + token] |= code << (8 * (d % 4));
        size = std::fabs(scale * number(f.k, code)) + std::fabs(offset);
        return scale * number(f.k, code) + offset;
    }
    double compact_value(int h, int i, int d, Random& random) {
        const int d_len = c.head_dim, blocks = d_len / GROUP;
        uint8_t* const codes = (uint8_t*)base(v_codes.data()) + (size_t)(h * room + i) * d_len / (f.v == INT4 ? 2 : 1);
        uint16_t* const params = (uint16_t*)base(v_params.data()) + (size_t)h * 2 * blocks * room;
        const double scale = param(params[d / GROUP * room + i], (1 + .3 * random.normal()) * unit(f.v));
        const double offset = param(params[(blocks + d / GROUP) * room + i], random.normal() * .5);
        const uint32_t code = draw(f.v, random);
        if (f.v == INT4) {
            uint8_t& byte = codes[d / GROUP * 32 + d % 32];
            byte = d % GROUP < 32 ? (byte & 0xf0) | code : (byte & 15) | code << 4;
        } else {
            codes[d] = (uint8_t)code;
        }
        return scale * number(f.v, code) + offset;
    }
    const Format2 f;
    const CompactCase& c;
    const int tokens, groups, room;
    std::unique_ptr<Tensor4> k, v;
    std::vector<uint32_t> k_codes, v_codes;
    std::vector<uint16_t> k_params, v_params;
};

// Launches the splits, and joins their partials in float64.
static void decode_all(const Attn& given, int dtype, int head_dim, int split_len, cpu::Mode mode, uint64_t seed) {
    Attn p = given;
    p.split_len = split_len;
    p.splits = 0;
    for (int n = 0; n < p.pages; n++) p.splits += (p.page[n].tokens + split_len - 1) / split_len;
    p.splits = std::max(p.splits, 1);
    const size_t rows = (size_t)p.batch * p.q_heads * p.q_len;
    std::vector<float> outs(p.splits * rows * head_dim, NAN), lses(p.splits * rows, NAN);
    p.part_out = (uint64_t)outs.data();
    p.part_lse = (uint64_t)lses.data();
    auto* const kernel = dtype == BF16 ? (head_dim == 64 ? decode_bf16_d64 : decode_bf16_d128)
                                       : (head_dim == 64 ? decode_f16_d64 : decode_f16_d128);
    const unsigned tiles = (p.q_heads / p.kv_heads * p.q_len + ROWS - 1) / ROWS;
    cpu::launch({p.splits * tiles, (unsigned)p.kv_heads, (unsigned)p.batch}, {THREADS, 1, 1},
                head_dim == 64 ? SMEM_BYTES<64> : SMEM_BYTES<128>, [&] { kernel(p); }, mode, seed, 2);
    if (p.splits == 1) return;
    size_t row = 0;
    for (int b = 0; b < p.batch; b++)
        for (int h = 0; h < p.q_heads; h++)
            for (int i = 0; i < p.q_len; i++, row++) {
                double most = -INFINITY, sum = 0;
                for (int s = 0; s < p.splits; s++) {
                    if (std::isnan(lses[s * rows + row])) sum = NAN;
                    most = std::max(most, (double)lses[s * rows + row]);
                }
                for (int s = 0; s < p.splits; s++)
                    if (!std::isinf(lses[s * rows + row])) sum += std::exp(lses[s * rows + row] - most);
                for (int d = 0; d < head_dim; d++) {
                    double x = 0;
                    for (int s = 0; s < p.splits; s++)
                        if (!std::isinf(lses[s * rows + row]))
                            x += std::exp(lses[s * rows + row] - most) / sum * outs[(s * rows + row) * head_dim + d];
                    const uint64_t to = row_address(p.out, b, h, i);
                    if (p.out_f32)
                        store_element<F32>(to, d, (float)x);
                    else if (dtype == BF16)
                        store_element<BF16>(to, d, (float)x);
                    else
                        store_element<F16>(to, d, (float)x);
                }
                if (p.lse) ((float*)p.lse)[row] = sum == 0 ? -INFINITY : (float)(most + std::log(sum));
            }
}

static void check_compact(const CompactCase& c, Verdict& verdict, bool quick) {
    Random random(11);
    Case as = {.name = c.name, .dtype = c.dtype, .head_dim = c.head_dim};
    Tensor4 q(c.dtype, c.batch, c.q_heads, c.q_len, c.head_dim);
    for (int b = 0; b < c.batch; b++)
        for (int h = 0; h < c.q_heads; h++)
            for (int i = 0; i < c.q_len; i++)
                for (int d = 0; d < c.head_dim; d++) q.set(b, h, i, d, random.normal() * c.spread);
    std::vector<std::unique_ptr<CompactPage>> pages;
    std::vector<int> firsts = {0};
    for (size_t n = 0; n < c.tokens.size(); n++) {
        pages.push_back(std::make_unique<CompactPage>(c, c.formats[n], c.tokens[n], random));
        firsts.push_back(firsts.back() + c.tokens[n]);
    }
    const int kv_len = firsts.back();
    for (size_t n = 0; n < pages.size(); n++)
        for (int b = 0; b < c.batch; b++)
            pages[n]->hide(b, (c.kv_start.empty() ? 0 : (int)c.kv_start[b]) - firsts[n], (c.kv_end.empty() ? kv_len : (int)c.kv_end[b]) - firsts[n]);
    for (int n = 0; n < (quick ? 3 : 5); n++) {
        const cpu::Mode mode = n == 0 ? cpu::EAGER : n == 1 ? cpu::LAZY : cpu::RANDOM;
        const char* name = n == 0 ? "eager" : n == 1 ? "lazy" : "random";
        Tensor4 out(c.out_f32 ? F32 : c.dtype, c.batch, c.q_heads, c.q_len, c.head_dim);
        std::vector<float> lse((size_t)c.batch * c.q_heads * c.q_len, NAN);
        Attn p = {};
        p.q = q.view();
        p.out = out.view();
        p.lse = (uint64_t)lse.data();
        p.kv_start = c.kv_start.empty() ? 0 : (uint64_t)c.kv_start.data();
        p.kv_end = c.kv_end.empty() ? 0 : (uint64_t)c.kv_end.data();
        p.q_start = kv_len - c.q_len;
        p.batch = c.batch, p.q_heads = c.q_heads, p.kv_heads = c.kv_heads, p.q_len = c.q_len, p.kv_len = kv_len;
        p.head_dim = c.head_dim, p.causal = c.causal, p.out_f32 = c.out_f32;
        p.scale = (float)(1.4426950408889634 / std::sqrt((double)c.head_dim));
        p.pages = (int)pages.size();
        for (int i = 0; i < p.pages; i++) p.page[i] = pages[i]->page(firsts[i]);
        decode_all(p, c.dtype, c.head_dim, c.split_len, mode, 5 + 100 * n);
        verdict.runs++;
        size_t row = 0;
        for (int b = 0; b < c.batch; b++)
            for (int h = 0; h < c.q_heads; h++)
                for (int i = 0; i < c.q_len; i++, row++) {
                    const int kv_head = h / (c.q_heads / c.kv_heads);
                    const int lo = c.kv_start.empty() ? 0 : (int)c.kv_start[b];
                    int hi = c.kv_end.empty() ? kv_len : std::min((int)c.kv_end[b], kv_len);
                    if (c.causal) hi = std::min(hi, kv_len - c.q_len + i + 1);
                    double most = -INFINITY, sum = 0, slack = 0;
                    std::vector<double> weight;
                    auto each = [&](auto f) {
                        for (size_t n = 0; n < pages.size(); n++)
                            for (int t = 0; t < c.tokens[n]; t++)
                                if (firsts[n] + t >= lo && firsts[n] + t < hi) f(*pages[n], t, firsts[n] + t);
                    };
                    each([&](const CompactPage& page, int t, int) {
                        double s = 0, square = 0;
                        for (int d = 0; d < c.head_dim; d++) {
                            s += (double)q.get(b, h, i, d) * page.key[page.at(b, kv_head, t, d)];
                            square += std::pow(q.get(b, h, i, d) * page.key_size[page.at(b, kv_head, t, d)], 2);
                        }
                        weight.push_back(s / std::sqrt((double)c.head_dim));
                        // A score's error is a sum of independent roundings, each at most half of 2^-10; here four times its
                        // deviation were they all that large.
                        slack = std::max(slack, 4 * std::sqrt(square / c.head_dim) / 2048);
                        most = std::max(most, weight.back());
                    });
                    for (double& w : weight) sum += w = std::exp(w - most);
                    for (int d = 0; d < c.head_dim; d++) {
                        double o = 0, size = 0;
                        size_t n = 0;
                        each([&](const CompactPage& page, int t, int) {
                            const double x = weight[n++] / sum * page.value[page.at(b, kv_head, t, d)];
                            o += x;
                            size += std::fabs(x) + weight[n - 1] / sum * .5;  // code and offset may cancel
                        });
                        const double last = c.out_f32 ? 0 : c.dtype == BF16 ? 1. / 256 : 1. / 2048;
                        const double bound = weight.empty() ? 0 : (1. / 256 + slack) * size + last * std::fabs(o) + 1e-6;
                        verdict.judge(as, name, "out", std::isnan(out.get(b, h, i, d)) ? INFINITY : std::fabs(out.get(b, h, i, d) - o), bound);
                    }
                    const double truth = weight.empty() ? -INFINITY : most + std::log(sum);
                    verdict.judge(as, name, "lse", lse[row] == truth ? 0 : std::isfinite(lse[row]) ? std::fabs(lse[row] - truth) : INFINITY,
                                  weight.empty() ? 0 : 2e-5 + slack);
                }
    }
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
    const std::vector<Case> dense = {
        {.name = "one key", .kv_len = 1},
        {.name = "a step and one", .kv_len = 17, .q_heads = 8},
        {.name = "many", .kv_len = 700, .q_heads = 4, .kv_heads = 2, .spread = 3},
        {.name = "group of 5, three queries", .head_dim = 64, .q_len = 3, .kv_len = 150, .q_heads = 10, .kv_heads = 2},
        {.name = "f16", .dtype = F16, .kv_len = 333, .q_heads = 4, .spread = 2},
        {.name = "f16 d64, 9 queries", .dtype = F16, .head_dim = 64, .q_len = 9, .kv_len = 130, .q_heads = 4},
        {.name = "pages", .kv_len = 300, .q_heads = 2, .cut = {1, 64, 130}, .spare = 3},
        {.name = "intervals", .q_len = 2, .kv_len = 260, .batch = 3, .kv_start = {0, 100, 258}, .kv_end = {260, 133, 260}},
        {.name = "nothing to see", .head_dim = 64, .kv_len = 90, .batch = 2, .kv_start = {90, 0}, .kv_end = {90, 1}},
        {.name = "before all keys", .head_dim = 64, .q_len = 4, .kv_len = 70, .q_start = -2},
        {.name = "float32", .kv_len = 200, .out_f32 = true},
        {.name = "not causal", .q_len = 5, .kv_len = 80, .causal = false},
    };
    int failed = 0;
    for (int split_len : {64, 4096}) {
        failed |= check_all(split_len == 64 ? "decode, splits of 64" : "decode, one split a page", dense, quick,
                            [&](const Attn& p, const Case& c, cpu::Mode mode, uint64_t seed) {
                                decode_all(p, c.dtype, c.head_dim, split_len, mode, seed);
                            });
    }
    const Format2 dd = {DENSE, DENSE}, i8 = {INT8, INT8}, i84 = {INT8, INT4}, i4 = {INT4, INT4}, f8 = {FP8, FP8};
    std::vector<Format2> pairs;
    for (Format k : {DENSE, INT8, INT4, FP8})
        for (Format v : {DENSE, INT8, INT4, FP8}) pairs.push_back({k, v});
    const std::vector<Format2> first(pairs.begin(), pairs.begin() + 8), second(pairs.begin() + 8, pairs.end());
    const std::vector<int> eight = {64, 320, 70, 129, 64, 1, 200, 65};
    const std::vector<CompactCase> compact = {
        {.name = "all pairs, dense and int8 keys", .tokens = eight, .formats = first, .split_len = 192, .spread = 2},
        {.name = "all pairs, int4 and fp8 keys", .tokens = eight, .formats = second, .split_len = 128, .spread = 2},
        {.name = "all pairs, f16 d64", .dtype = F16, .head_dim = 64, .q_heads = 6, .kv_heads = 2, .tokens = eight, .formats = first},
        {.name = "all pairs, bf16 d64", .head_dim = 64, .q_len = 3, .tokens = eight, .formats = second, .split_len = 320},
        {.name = "all pairs, f16", .dtype = F16, .tokens = eight, .formats = second, .split_len = 4096},
        {.name = "int8, long", .tokens = {1500}, .formats = {i8}, .split_len = 4096, .spread = 3},
        {.name = "int4, long", .tokens = {1500}, .formats = {i4}, .split_len = 4096, .spread = 3},
        {.name = "fp8, long", .tokens = {1500}, .formats = {f8}, .split_len = 4096, .spread = 3},
        {.name = "int8/int4 d64, long", .head_dim = 64, .batch = 2, .tokens = {1100}, .formats = {i84}, .split_len = 1024},
        {.name = "fp8 d64 f16, long", .dtype = F16, .head_dim = 64, .tokens = {1100}, .formats = {f8}, .split_len = 2048},
        {.name = "large queries", .tokens = {130}, .formats = {i8}, .split_len = 4096, .spread = 3000},
        {.name = "small queries", .tokens = {130}, .formats = {i4}, .spread = 1e-30f},
        {.name = "a page that is not full", .tokens = {200}, .formats = {i8}, .split_len = 128},
        {.name = "a page that is not full, int4", .tokens = {77}, .formats = {i4}, .split_len = 4096},
        {.name = "padding", .batch = 3, .q_len = 2, .tokens = {64, 256, 66}, .formats = {dd, i8, dd}, .kv_start = {0, 70, 380}, .kv_end = {386, 300, 386}},
        {.name = "padding, int4 and float32", .batch = 2, .tokens = {256}, .formats = {i4}, .kv_start = {33, 255}, .kv_end = {222, 256}, .out_f32 = true},
        {.name = "20 queries of a group of 3", .q_heads = 6, .kv_heads = 2, .q_len = 20, .tokens = {70, 128, 90}, .formats = {f8, i84, dd}, .split_len = 128},
        {.name = "not causal", .q_len = 5, .tokens = {64, 100}, .formats = {i4, f8}, .causal = false, .split_len = 4096},
    };
    Verdict verdict;
    for (const CompactCase& c : compact) check_compact(c, verdict, quick);
    std::printf("decode, compact: %d runs, %d failures, worst error %.2f of its bound\n", verdict.runs, verdict.failures, verdict.worst);
    return failed | (verdict.failures != 0);
}
