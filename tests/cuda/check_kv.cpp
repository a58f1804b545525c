// kv_append, kv_read: pages byte for byte as the rule in python/llama1m_ext/formats.py and src/quant.rs has them, written here
// once more, one number at a time; and nothing but the tokens that were appended is touched.
#define SHIM_IMPL
#include "kv.cu"

#include "rows.h"

struct Case {
    int dtype, k_format, v_format, batch, heads, head_dim, tokens, at, len, pairs;
    Layout layout;  // of the rows that come
};

static const char* name_of_format(int format) { return format == DENSE ? "dense" : format == INT8 ? "int8" : format == INT4 ? "int4" : "fp8"; }
static int width_of(int head_dim) { return (head_dim + 63) / 64 * 64; }

// K or V of a page. Codes are counted in pairs of bytes here.
struct PageSide {
    int format, width;
    bool is_key;
    Rows rows, params;
    PageSide(const Case& c, bool is_key)
        : format(is_key ? c.k_format : c.v_format),
          width(width_of(c.head_dim)),
          is_key(is_key),
          rows(format == DENSE ? c.dtype : BF16, c.batch, c.heads, format == DENSE || !is_key ? c.tokens : (c.tokens + 63) / 64,
               format == DENSE ? c.head_dim : (is_key ? 64 : 1) * width / (format == INT4 ? 4 : 2), {format == DENSE && c.layout.tokens_first}),
          params(F16, c.batch, c.heads, is_key ? (c.tokens + 63) / 64 : 2 * width / 64, is_key ? 2 * width : c.tokens) {}
    Side side() const { return {rows.view(), format == DENSE ? View{} : params.view(), format, 0}; }
};

static float half_of(float x) { return half_to_float(float_to_half(x)); }
static double finest(int format) { return format == INT8 ? 255 : format == INT4 ? 15 : 896; }
static double lowest(int format) { return format == INT8 ? -128 : format == INT4 ? -8 : -448; }

// The nearest e4m3, ties to the even code.
static int nearest_e4m3(float x) {
    int best = 0;
    for (int code = 1; code <= 0x7e; code++) {
        const double e = std::fabs(std::fabs((double)x) - e4m3_to_float(code)), b = std::fabs(std::fabs((double)x) - e4m3_to_float(best));
        if (e < b || (e == b && code % 2 == 0)) best = code;
    }
    return best | (std::signbit(x) ? 0x80 : 0);
}

struct Expected {
    float scale, offset;
    uint16_t scale_bits, offset_bits;
};

static Expected expected_scale(int format, const std::vector<float>& x) {
    float least = x[0], most = x[0];
    bool odd = false;
    for (float v : x) {
        least = v < least ? v : least;
        most = v > most ? v : most;
        odd |= !std::isfinite(v);
    }
    least += 0.f;  // -0 becomes 0
    const float scale = half_of((most - least) / (float)finest(format));
    const float offset = half_of(least - (float)lowest(format) * scale);
    if (odd || !std::isfinite(scale) || !std::isfinite(offset)) return {0, NAN, 0, 0x7e00};
    return {scale, offset, float_to_half(scale), float_to_half(offset)};
}

// A code as it is stored.
static int expected_code(int format, float x, Expected s) {
    float y = s.scale == 0 ? 0 : (x - s.offset) / s.scale;
    const float high = (float)(lowest(format) + finest(format));
    y = std::isnan(y) ? (float)lowest(format) : std::min(std::max(y, (float)lowest(format)), high);
    if (format == FP8) return nearest_e4m3(y);
    return format == INT8 ? (int)nearbyintf(y) & 255 : (int)nearbyintf(y) + 8;
}

// x [len][head_dim] of one head, to tokens at.. of a page.
static void expected_append(PageSide& page, int b, int h, int at, const std::vector<std::vector<float>>& x, int dtype) {
    const int len = (int)x.size(), head_dim = (int)x[0].size(), width = page.width;
    auto bytes = [&](int i) { return (uint8_t*)page.rows.row(b, h, i); };
    auto params = [&](int i) { return (uint16_t*)page.params.row(b, h, i); };
    if (page.format == DENSE) {
        for (int i = 0; i < len; i++)
            for (int d = 0; d < head_dim; d++) page.rows.set(b, h, at + i, d, x[i][d]);
    } else if (page.is_key) {
        for (int i0 = 0; i0 < len; i0 += 64)
            for (int c = 0; c < width; c++) {
                const int group = (at + i0) / 64, n = std::min(64, len - i0);
                std::vector<float> column(n, 0.f);
                for (int t = 0; t < n && c < head_dim; t++) column[t] = x[i0 + t][c];
                const Expected s = c < head_dim ? expected_scale(page.format, column) : Expected{0, 0, 0, 0};
                params(group)[c] = s.scale_bits;
                params(group)[width + c] = s.offset_bits;
                for (int t = 0; t < n; t++) {
                    const int code = expected_code(page.format, column[t], s);
                    if (page.format == INT4) {  // 0 2 4 6 1 3 5 7 from the lowest bit on
                        const int place = "\0\4\1\5\2\6\3\7"[c % 8];
                        uint8_t& byte = bytes(group)[(c / 8 * 64 + t) * 4 + place / 2];
                        byte = place % 2 ? (byte & 15) | code << 4 : (byte & 240) | code;
                    } else {
                        bytes(group)[(c / 4 * 64 + t) * 4 + c % 4] = (uint8_t)code;
                    }
                }
            }
    } else {
        for (int i = 0; i < len; i++)
            for (int c0 = 0; c0 < width; c0 += 64) {
                const int end = std::min(c0 + 64, head_dim);
                const Expected s = expected_scale(page.format, {x[i].begin() + c0, x[i].begin() + end});
                params(c0 / 64)[at + i] = s.scale_bits;
                params(width / 64 + c0 / 64)[at + i] = s.offset_bits;
                for (int c = c0; c < c0 + 64; c++) {
                    const int code = c < head_dim ? expected_code(page.format, x[i][c], s) : page.format == INT4 ? 8 : 0;
                    if (page.format == INT4) {
                        uint8_t& byte = bytes(at + i)[c0 / 2 + c % 32];
                        byte = c % 64 >= 32 ? (byte & 15) | code << 4 : (byte & 240) | code;
                    } else {
                        bytes(at + i)[c] = (uint8_t)code;
                    }
                }
            }
    }
}

template <class F>
static void launch(dim3 grid, int smem, int seed, F f) {
    cpu::launch(grid, {THREADS}, smem, f, MODES[seed % 3], seed);
}

static bool is_aligned(const View& v) { return v.ptr % 16 == 0 && v.batch_stride % 16 == 0 && v.head_stride % 16 == 0 && v.row_stride % 16 == 0; }

// Numbers as keys and values are, with what makes trouble: large channels, constant ones, zeros of either sign, no numbers.
static void fill(Rows& rows, std::mt19937_64& random) {
    rows.fill(random);
    rows.each([&](int b, int h, int i, int d) {
        if (d % 7 == 3) rows.set(b, h, i, d, rows.get(b, h, i, d) * 30 + 90);
        if (d % 11 == 5) rows.set(b, h, i, d, 2.5);
        if (b == 1 && d == 4) rows.set(b, h, i, d, i % 2 ? 0.0 : -0.0);
        if (b == 1 && h == 1 && i == 2) rows.set(b, h, i, d, d % 3 ? 0.0 : -0.0);
        if (b == 1 && h == 0 && i == 1 && d == 9) rows.set(b, h, i, d, NAN);
        if (b == 0 && h == 1 && i == 0 && d == 1) rows.set(b, h, i, d, -INFINITY);
        if (b == 1 && h == 1 && i == 3 && d == 6 && rows.dtype != F16) rows.set(b, h, i, d, 1e8);
    });
}

static bool check(const Case& c, int seed) {
    std::mt19937_64 random(seed);
    Rows k(c.dtype, c.batch, c.heads, c.len, c.head_dim, c.layout), v(c.dtype, c.batch, c.heads, c.len, c.head_dim, c.layout);
    fill(k, random);
    fill(v, random);
    PageSide page_k(c, true), page_v(c, false), want_k(c, true), want_v(c, false);
    std::vector<int64_t> positions(c.len);
    for (auto& x : positions) x = (int64_t)(random() % 2000000);

    Append p = {};
    p.k = k.view(), p.v = v.view(), p.page_k = page_k.side(), p.page_v = page_v.side();
    p.heads = c.heads, p.len = c.len, p.head_dim = c.head_dim, p.at = c.at, p.dtype = c.dtype;
    const int size = c.dtype == F32 ? 4 : 2;
    p.wide = c.head_dim * size % 16 == 0 && c.pairs * size % 16 == 0 && is_aligned(p.k) && is_aligned(p.v) &&
             (c.k_format != DENSE || is_aligned(p.page_k.rows)) && (c.v_format != DENSE || is_aligned(p.page_v.rows));
    p.rotation.pairs = c.pairs, p.rotation.positions = (uint64_t)positions.data(), p.rotation.scaling = 1.f;
    for (int f = 0; f < MAX_PAIRS; f++) p.rotation.turns[f] = random();
    const bool compact = c.k_format != DENSE || c.v_format != DENSE;
    launch({(unsigned)(c.len + 63) / 64, (unsigned)c.heads * 2, (unsigned)c.batch}, smem_bytes(compact ? width_of(c.head_dim) : 0), seed,
           [&] { kv_append(p); });

    for (int b = 0; b < c.batch; b++)
        for (int h = 0; h < c.heads; h++)
            for (bool is_key : {true, false}) {
                std::vector<std::vector<float>> x(c.len, std::vector<float>(c.head_dim));
                for (int i = 0; i < c.len; i++) {
                    for (int d = 0; d < c.head_dim; d++) x[i][d] = (float)(is_key ? k : v).get(b, h, i, d);
                    for (int f = 0; is_key && f < c.pairs; f++) {
                        rotate(x[i][f], x[i][f + c.pairs], phase(positions[i], p.rotation.turns[f], 1.f));
                        for (float* y : {&x[i][f], &x[i][f + c.pairs]})
                            *y = c.dtype == F32 ? rounded<F32>(*y) : c.dtype == BF16 ? rounded<BF16>(*y) : rounded<F16>(*y);
                    }
                }
                expected_append(is_key ? want_k : want_v, b, h, c.at, x, c.dtype);
            }
    // Memory that begins elsewhere is laid out alike: 64-byte steps. So bytes compare as they lie, from the first row on.
    auto same = [](const Rows& a, const Rows& b) {
        size_t differ = 0;
        for (int x = 0; x < a.batch; x++)
            for (int h = 0; h < a.heads; h++)
                for (int i = 0; i < a.len; i++)
                    for (int n = 0; n < a.dim * (a.dtype == F32 ? 4 : 2); n++)
                        differ += ((uint8_t*)a.row(x, h, i))[n] != ((uint8_t*)b.row(x, h, i))[n];
        return differ;
    };
    // Of dense rows a NaN is a NaN, whatever its bits.
    auto equal = [](const Rows& a, const Rows& b) {
        size_t differ = 0;
        a.each([&](int x, int h, int i, int d) {
            const double u = a.get(x, h, i, d), w = b.get(x, h, i, d);
            differ += !(u == w || (std::isnan(u) && std::isnan(w)));
        });
        return differ;
    };
    size_t differ = 0;
    for (auto [got, want] : {std::pair{&page_k, &want_k}, std::pair{&page_v, &want_v}})
        differ += got->format == DENSE ? equal(got->rows, want->rows) : same(got->rows, want->rows) + same(got->params, want->params);
    bool clean = page_k.rows.is_clean() && page_k.params.is_clean() && page_v.rows.is_clean() && page_v.params.is_clean();

    // Out again: tokens of the page that were written, from some token on.
    size_t unlike = 0;
    for (bool is_key : {true, false}) {
        const PageSide& page = is_key ? page_k : page_v;
        const int start = c.at + c.len / 3, n = c.len - c.len / 3;
        Rows out(c.dtype, c.batch, c.heads, n, c.head_dim, c.layout);
        Read r = {};
        r.out = out.view(), r.side = page.side(), r.heads = c.heads, r.len = n, r.head_dim = c.head_dim, r.start = start, r.dtype = c.dtype;
        r.is_key = is_key && page.format != DENSE;
        r.wide = c.head_dim * size % 16 == 0 && is_aligned(r.out) && (page.format != DENSE || is_aligned(r.side.rows));
        const unsigned tiles = (start + n + 63) / 64 - start / 64;
        launch({tiles, (unsigned)c.heads, (unsigned)c.batch}, smem_bytes(r.is_key ? width_of(c.head_dim) : 0), seed, [&] { kv_read(r); });
        Rows want(c.dtype, c.batch, c.heads, n, c.head_dim);
        want.each([&](int b, int h, int i, int d) {
            want.set(b, h, i, d,
                     page.format == DENSE ? page.rows.get(b, h, start + i, d)
                     : is_key             ? compact_key(r.side, b, h, start + i, d, c.head_dim)
                                          : compact_value(r.side, b, h, start + i, d, c.head_dim));
        });
        unlike += equal(out, want);
        clean &= out.is_clean();
    }
    const bool good = differ == 0 && unlike == 0 && clean;
    if (!good || seed % 9 == 0)
        std::printf("%s %s to %s/%s [%d, %d, %d, %d] at %d%s%s: %zu bytes of the page and %zu numbers read from it differ%s\n",
                    good ? "ok" : "BAD", name_of_dtype(c.dtype), name_of_format(c.k_format), name_of_format(c.v_format), c.batch, c.heads,
                    c.len, c.head_dim, c.at, p.wide ? ", wide" : "", c.pairs ? ", rotated" : "", differ, unlike,
                    clean ? "" : "; wrote beside its rows");
    return good;
}

// `quotient` against the division that it stands for.
static bool check_quotients() {
    std::mt19937_64 random(3);
    std::normal_distribution<float> normal(0, 1);
    int differ = 0;
    for (int n = 0; n < 4000000; n++) {
        const float scale = half_to_float(1 + random() % 0x7bff);  // float16, subnormals too
        const float a = normal(random) * scale * (n % 2 ? 300.f : 3.f);
        differ += quotient(a, scale_of(scale, 0.f)) != a / scale;
    }
    std::printf("%s 4000000 quotients, %d differ from the division\n", differ ? "BAD" : "ok", differ);
    return differ == 0;
}

int main(int count, char** words) {
    const bool quick = count > 1 && !std::strcmp(words[1], "quick");
    bool good = check_quotients();
    int seed = 0;
    for (int dtype : {F32, BF16, F16})
        for (int k_format : {DENSE, INT8, INT4, FP8}) {
            const int v_format = (k_format + (seed / 3) % 4) % 4, other = (v_format + 1) % 4;
            good &= check({dtype, k_format, v_format, 2, 2, 128, 256, 64, 100, 64, {true}}, seed++);
            good &= check({dtype, k_format, other, 2, 2, 64, 130, 0, 130, 0, {}}, seed++);
            good &= check({dtype, k_format, k_format, 2, 2, 80, 192, 64, 5, 20, {false, 32}}, seed++);
            good &= check({dtype, k_format, v_format, 2, 2, 18, 64, 0, 7, 9, {true, dtype == F32 ? 4 : 2, dtype == F32 ? 4 : 2}}, seed++);
            good &= check({dtype, DENSE, k_format, 2, 3, 128, 200, 77, 1, 32, {}}, seed++);
            if (!quick) good &= check({dtype, k_format, k_format, 1, 2, 256, 128, 64, 64, 128, {}}, seed++);
        }
    std::printf("%d cases, %s\n", seed, good ? "all good" : "FAILED");
    return good ? 0 : 1;
}
