// Codes of compact keys and values, made pairs of 16-bit numbers in registers, exactly: what a tensor core multiplies by.
//
// The bits of an integer code are put into the mantissa of a power of two. What is then too much is taken away at once
// (values), or stays and is taken off the sums, where it is the same for all tokens (keys).
#pragma once
#include "params.h"
#include "ptx.cuh"

// Channels of a unit: 4 bytes of one key. Layout: python/llama1m_ext/formats.py.
template <int FORMAT>
constexpr int FOLD = FORMAT == INT4 ? 8 : 4;

// What key_pairs leaves on each code, as float16, negative: 1024 + 128 and 1024 + 8.
template <int FORMAT>
constexpr uint32_t KEY_BIAS = FORMAT == INT8 ? 0xe480e480u : FORMAT == INT4 ? 0xe408e408u : 0u;

// The channels of a unit of keys as pairs of float16, in order, biased. 3 instructions for 4 codes of int8, 7 for 8 of
// int4, 10 for 4 of fp8.
template <int FORMAT>
PRIM void key_pairs(uint32_t unit, uint32_t (&pair)[FOLD<FORMAT> / 2]) {
    if constexpr (FORMAT == INT8) {
        const uint32_t u = unit ^ 0x80808080u;  // 0 to 255
        pair[0] = prmt(u, 0x64646464u, 0x4140);
        pair[1] = prmt(u, 0x64646464u, 0x4342);
    } else if constexpr (FORMAT == INT4) {
        UNROLL for (int i = 0; i < 4; i++) pair[i] = and_or(unit >> (4 * i), 0x000f000fu, 0x64006400u);
    } else {
        // e4m3 in the upper byte of a half; exponent and mantissa go down by one bit, and 2^8 makes up for the exponents'
        // biases, of subnormals too.
        UNROLL for (int i = 0; i < 2; i++) {
            const uint32_t high = prmt(unit, 0, i == 0 ? 0x1404 : 0x3424);
            pair[i] = mul_f16x2(and_or(high, 0x80008000u, high >> 1 & 0x3f803f80u), 0x5c005c00u);
        }
    }
}

// Byte i of a and of b, each twice: a code of one channel of two tokens.
PRIM uint32_t bytes_of_two(uint32_t a, uint32_t b, int i) { return prmt(a, b, 0x4400 + 0x1111 * i); }

// Such a pair as bfloat16, whose range the weights of rare keys need. int4: of the low halves.
template <int FORMAT>
PRIM uint32_t value_pair(uint32_t pair) {
    if constexpr (FORMAT == INT8)  // 7 bits fit beside 128; the sign makes -128 of it, or -256
        return add_bf16x2(and_or(pair, 0x007f007fu, 0x43004300u), and_or(pair, 0x00800080u, 0xc300c300u));
    else if constexpr (FORMAT == INT4)  // 128 + 8
        return add_bf16x2(and_or(pair, 0x000f000fu, 0x43004300u), 0xc308c308u);
    else  // 2^120 for the exponents' biases
        return mul_bf16x2(and_or(pair, 0x80008000u, pair >> 4 & 0x07f007f0u), 0x7b807b80u);
}
