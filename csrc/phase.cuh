// Rotary phases without loss: position * frequency in turns, as 64-bit fixed point, whose whole turns fall off by
// themselves. See src/rope.rs.
#pragma once
#include "ptx.cuh"

struct Phase {
    float cos, sin;
};

// cos and sin of `position * turns` 2^-64 turns, within 1e-7: the nearest quarter turn by swaps and signs, and what is left,
// at most an eighth, by its Taylor series in float32.
PRIM Phase phase(int64_t position, uint64_t turns, float scaling) {
    const uint32_t at = (uint32_t)(((uint64_t)position * turns) >> 32);
    const uint32_t quarter = (at + (1u << 29)) >> 30;
    const int32_t rest = (int32_t)(at - (quarter << 30));
    const float x = (float)rest * 1.4629180792671596e-9f;  // 2 pi / 2^32
    const float y = x * x;
    const float s = fma_rn(x * y, fma_rn(y, fma_rn(y, fma_rn(y, 2.7557319e-6f, -1.9841270e-4f), 8.3333333e-3f), -1.6666667e-1f), x);
    const float c = fma_rn(y, fma_rn(y, fma_rn(y, fma_rn(y, 2.4801587e-5f, -1.3888889e-3f), 4.1666667e-2f), -0.5f), 1.f);
    const float a = quarter & 1 ? s : c, b = quarter & 1 ? c : s;
    return {(quarter + 1) & 2 ? -a * scaling : a * scaling, quarter & 2 ? -b * scaling : b * scaling};
}
