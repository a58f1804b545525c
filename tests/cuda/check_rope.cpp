// rope_*: against float64 phases of the exact product position * turns, at positions where float32 angles are long lost.
#define SHIM_IMPL
#include "rope.cu"

#include "rows.h"

struct Case {
    int dtype, batch, q_heads, kv_heads, len, q_dim, k_dim, pairs;
    bool in_place, own_positions;
    Layout layout;
    int64_t first;
};

static const double TURN = 6.283185307179586476925286766559;

// inv_freq / (2 pi) turns, to 2^-64.
static uint64_t turns_of(double inv_freq) {
    return (uint64_t)(unsigned __int128)((long double)inv_freq / 6.28318530717958647692528676655900577L * 0x1p64L + 0.5L);
}

static bool is_wide(const Case& c, std::initializer_list<const Rows*> all) {
    const int size = c.dtype == F32 ? 4 : 2;
    for (int n : {c.pairs, c.q_dim, c.kv_heads ? c.k_dim : 0})
        if (n * size % 16) return false;
    for (const Rows* r : all) {
        const View v = r->view();
        if (v.ptr % 16 || v.batch_stride % 16 || v.head_stride % 16 || v.row_stride % 16) return false;
    }
    return true;
}

static bool check(const Case& c, int seed) {
    std::mt19937_64 random(seed);
    Rows q(c.dtype, c.batch, c.q_heads, c.len, c.q_dim, c.layout), k(c.dtype, c.batch, c.kv_heads, c.len, c.k_dim, c.layout);
    Rows q_out(c.dtype, c.batch, c.q_heads, c.len, c.q_dim), k_out(c.dtype, c.batch, c.kv_heads, c.len, c.k_dim, c.layout);
    q.fill(random);
    k.fill(random);
    Rows q_in(F32, c.batch, c.q_heads, c.len, c.q_dim), k_in(F32, c.batch, c.kv_heads, c.len, c.k_dim);
    q.each([&](int b, int h, int i, int d) { q_in.set(b, h, i, d, q.get(b, h, i, d)); });
    k.each([&](int b, int h, int i, int d) { k_in.set(b, h, i, d, k.get(b, h, i, d)); });

    std::vector<int64_t> positions(c.own_positions ? c.batch * c.len : c.len);
    for (auto& p : positions) p = c.first + (int64_t)(random() % 100000);
    Rope p = {};
    p.q = q.view(), p.k = k.view();
    p.q_out = c.in_place ? q.view() : q_out.view(), p.k_out = c.in_place ? k.view() : k_out.view();
    p.q_heads = c.q_heads, p.kv_heads = c.kv_heads, p.len = c.len, p.q_dim = c.q_dim, p.k_dim = c.k_dim;
    p.wide = c.in_place ? is_wide(c, {&q, &k}) : is_wide(c, {&q, &k, &q_out, &k_out});
    p.rotation.positions = (uint64_t)positions.data();
    p.rotation.position_stride = c.own_positions ? c.len : 0;
    p.rotation.pairs = c.pairs;
    p.rotation.scaling = 1.25f;
    for (int f = 0; f < MAX_PAIRS; f++) p.rotation.turns[f] = 0x5555555555555555;  // what nobody asked for
    for (int f = 0; f < c.pairs; f++) p.rotation.turns[f] = turns_of(std::pow(5e5, -(double)f / c.pairs));
    const dim3 grid = {(unsigned)(c.len + TOKENS - 1) / TOKENS, (unsigned)c.batch};
    auto kernel = c.dtype == F32 ? rope_f32 : c.dtype == BF16 ? rope_bf16 : rope_f16;
    cpu::launch(grid, {THREADS}, SMEM_BYTES, [&] { kernel(p); }, MODES[seed % 3], seed);

    Worst worst;
    auto compare = [&](const Rows& in, const Rows& out) {
        out.each([&](int b, int h, int i, int d) {
            double want = in.get(b, h, i, d);
            if (d < 2 * c.pairs) {
                const int f = d % c.pairs;
                const uint64_t at = (uint64_t)positions[c.own_positions ? b * c.len + i : i] * p.rotation.turns[f];
                const double angle = (double)at * 0x1p-64 * TURN, x = in.get(b, h, i, f), y = in.get(b, h, i, f + c.pairs);
                want = d < c.pairs ? x * cos(angle) - y * sin(angle) : y * cos(angle) + x * sin(angle);
                want *= 1.25;
            }
            const double exact = d < 2 * c.pairs ? 1e-6 : 0;  // of |x|, |y| up to 4
            worst.see(out.get(b, h, i, d), want, std::fabs(want) * half_step(c.dtype) * 1.001 + least_step(c.dtype) + exact);
        });
    };
    compare(q_in, c.in_place ? q : q_out);
    compare(k_in, c.in_place ? k : k_out);
    const bool clean = q.is_clean() && k.is_clean() && (c.in_place || (q_out.is_clean() && k_out.is_clean()));
    const bool good = worst.good() && clean;
    if (!good || seed < 3)
        std::printf("%s %s [%d, %d+%d, %d, %d/%d] %d pairs%s%s%s from %lld: worst error %.2e, %.2f of what is allowed%s\n",
                    good ? "ok" : "BAD", name_of_dtype(c.dtype), c.batch, c.q_heads, c.kv_heads, c.len, c.q_dim, c.k_dim, c.pairs,
                    c.in_place ? ", in place" : "", p.wide ? ", wide" : "", c.own_positions ? ", own positions" : "",
                    (long long)c.first, worst.error, worst.share, clean ? "" : "; wrote beside its rows");
    return good;
}

// Phases alone: every quarter, and positions to the last one that is served.
static bool check_phases() {
    std::mt19937_64 random(1);
    double worst = 0;
    for (int n = 0; n < 400000; n++) {
        const uint64_t turns = random();
        const int64_t position = (int64_t)(random() % (uint64_t)MAX_POSITION);
        const long double angle = (long double)((uint64_t)position * turns) * 0x1p-64L * 6.28318530717958647692528676655900577L;
        const Phase f = phase(position, turns, 1.f);
        worst = std::max({worst, std::fabs(f.cos - (double)cosl(angle)), std::fabs(f.sin - (double)sinl(angle))});
    }
    bool good = worst < 1.1e-7;
    for (int64_t position : {(int64_t)-1, MAX_POSITION, INT64_MIN})
        good &= std::isnan(phase(position, 12345, 1.f).cos) && std::isnan(phase(position, 12345, 1.f).sin);
    std::printf("%s phases: worst error %.2e\n", good ? "ok" : "BAD", worst);
    return good;
}

int main() {
    bool good = check_phases();
    int seed = 0, cases = 0;
    for (int dtype : {F32, BF16, F16})
        for (const Case& c : {
                 Case{dtype, 2, 4, 2, 9, 128, 128, 64, false, true, {true}, 1000},
                 Case{dtype, 1, 4, 1, 5, 64, 64, 32, true, false, {}, (1ll << 40) - 200000},
                 Case{dtype, 2, 3, 3, 4, 128, 96, 24, false, false, {false, 32}, 1ll << 20},
                 Case{dtype, 2, 2, 1, 6, 80, 80, 20, false, true, {true, 2 * 4, 0}, 0},
                 Case{dtype, 1, 2, 2, 3, 64, 64, 32, true, true, {false, 4, dtype == F32 ? 4 : 2}, 7},
                 Case{dtype, 3, 5, 0, 1, 256, 256, 128, false, true, {}, 131072},
                 Case{dtype, 2, 2, 1, 7, 10, 12, 5, true, true, {}, 99},
             }) {
            good &= check(c, seed++);
            cases++;
        }
    std::printf("%d cases, %s\n", cases, good ? "all good" : "FAILED");
    return good ? 0 : 1;
}
