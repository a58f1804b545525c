// Rotary phases, as src/rope.rs has them: a frequency is a number of turns a token in 64-bit fixed point (2^64 = one turn), so
// that position * turns mod 2^64 is the phase with its whole turns removed, without rounding, at any position.
#pragma once
#include "params.h"
#include "ptx.cuh"

constexpr int64_t MAX_POSITION = 1ll << 40;  // exclusive

struct Phase {
    float cos, sin;
};

// Good to 1e-7 for scaling 1. A position that is not served gives NaN: it can't be refused here, and must not pass as right.
PRIM Phase phase(int64_t position, uint64_t turns, float scaling) {
    const uint32_t turn = (uint32_t)((uint64_t)position * turns >> 32);
    // The nearest quarter, and what is left: at most an eighth of a turn to either side.
    const uint32_t quarter = (turn + (1u << 29)) >> 30;
    const float x = (float)(int32_t)(turn - (quarter << 30)) * 1.46291807926715968105e-9f;  // 2 pi / 2^32
    const float y = x * x;
    // Taylor to x^9 and x^10 on |x| <= pi / 4; the largest term is added last, so that it alone decides the rounding.
    float s = fma_rn(y, 2.7557319e-6f, -1.9841270e-4f);
    s = fma_rn(y, s, 8.3333333e-3f);
    s = fma_rn(y, s, -1.6666667e-1f);
    s = fma_rn(x, y * s, x);
    float c = fma_rn(y, -2.7557319e-7f, 2.4801587e-5f);
    c = fma_rn(y, c, -1.3888889e-3f);
    c = fma_rn(y, c, 4.1666667e-2f);
    c = fma_rn(y, c, -0.5f);
    c = fma_rn(y, c, 1.f);
    if (position < 0 || position >= MAX_POSITION) scaling = INF - INF;
    const float a = quarter & 1 ? s : c, b = quarter & 1 ? c : s;
    return {a * ((quarter + 1) & 2 ? -scaling : scaling), b * (quarter & 2 ? -scaling : scaling)};
}

PRIM int64_t position_of(const Rotation& r, int b, int i) {
    return ((const int64_t*)r.positions)[b * r.position_stride + i];
}

// (x, y) -> (x cos - y sin, y cos + x sin), rounded where src/cpu/rope.rs rounds.
PRIM void rotate(float& x, float& y, Phase p) {
    const float turned = fma_rn(x, p.cos, -mul_rn(y, p.sin));
    y = fma_rn(y, p.cos, mul_rn(x, p.sin));
    x = turned;
}
