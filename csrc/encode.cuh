// Numbers to codes: src/quant.rs and src/cpu/codes.rs, rounding for rounding, so that a page is the same whoever made it.
#pragma once
#include "params.h"
#include "ptx.cuh"

template <int FORMAT>
constexpr float LOWEST = FORMAT == INT8 ? -128.f : FORMAT == INT4 ? -8.f : -448.f;
// From the lowest code to the highest.
template <int FORMAT>
constexpr float STEPS = FORMAT == INT8 ? 255.f : FORMAT == INT4 ? 15.f : 896.f;

// A code stands for scale * code + offset. Both are float16.
struct Scale {
    float scale, offset;
    float inverse;  // 1 / scale, for `quotient`
};

PRIM Scale scale_of(float scale, float offset) { return {scale, offset, div_rn(1.f, scale)}; }

// a / s.scale as a division rounds it, in five steps: the inverse is rounded correctly and no float16 has a mantissa of 24 ones,
// so that the second correction ends on the nearest (Markstein, IBM J. Res. Dev. 34, 1990).
PRIM float quotient(float a, Scale s) {
    float q = mul_rn(a, s.inverse);
    q = fma_rn(fma_rn(-q, s.scale, a), s.inverse, q);
    return fma_rn(fma_rn(-q, s.scale, a), s.inverse, q);
}

// For numbers from `least` to `most`. Where float16 can't hold it, or they are no numbers, the offset is NaN.
template <int FORMAT>
PRIM Scale scale_for(float least, float most) {
    const float scale = half_to_float(float_to_half(div_rn(add_rn(most, -least), STEPS<FORMAT>)));
    const float offset = half_to_float(float_to_half(add_rn(least, -mul_rn(LOWEST<FORMAT>, scale))));
    const bool finite = abs_(scale) < INF && abs_(offset) < INF;
    return finite ? scale_of(scale, offset) : scale_of(0.f, bits_float(0x7fc00000));
}

// One of float16, with the one NaN that the CPU writes.
PRIM uint16_t param_bits(float x) { return x != x ? 0x7e00 : float_to_half(x); }

// |x| <= 448 to e4m3, to nearest even.
PRIM uint32_t float_to_e4m3(float x) {
    const uint32_t bits = float_bits(abs_(x));
    const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    // Below 2^-6 the step is 2^-9: adding 2^14 leaves just those bits of the mantissa.
    const uint32_t small = float_bits(add_rn(bits_float(bits), 16384.f)) & 15;
    return (bits < 0x3c800000 ? small : normal) | (float_bits(x) >> 24 & 0x80);
}

// The code of x, in the low bits; of int4 8 more than what it stands for.
template <int FORMAT>
PRIM uint32_t code_of(float x, Scale s) {
    constexpr float HIGHEST = LOWEST<FORMAT> + STEPS<FORMAT>;
    float y = s.scale == 0.f ? 0.f : quotient(add_rn(x, -s.offset), s);
    y = y > LOWEST<FORMAT> ? y : LOWEST<FORMAT>;
    y = y < HIGHEST ? y : HIGHEST;
    // 1.5 * 2^23: adding it rounds to an integer, to even, which the low bits then are.
    constexpr float ROUND = 12582912.f;
    if constexpr (FORMAT == FP8)
        return float_to_e4m3(y);
    else if constexpr (FORMAT == INT8)
        return float_bits(add_rn(y, ROUND)) & 255;
    else
        return float_bits(add_rn(y, ROUND + 8.f)) & 15;
}
