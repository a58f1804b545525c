// Codes of compact keys and values, made pairs of 16-bit numbers in registers, exactly.
//
// A pair comes in as bytes 0 and 2 of a word; what is in bytes 1 and 3 does not matter. int8 and int4 become numbers by
// putting their bits into the mantissa of a power of two, which a subtraction then takes away; fp8 (e4m3) by shifting
// exponent and mantissa into place and multiplying by what the two exponents' biases differ by.
#pragma once
#include "params.h"
#include "ptx.cuh"

// Bytes i and 4 + i of (a, b): channel i of two tokens whose words are a and b.
PRIM uint32_t bytes_of_two(uint32_t a, uint32_t b, int i) { return prmt(a, b, 0x4400 + 0x1111 * i); }

// Bytes 2 i and 2 i + 1 of a word: two neighbouring channels of one token.
PRIM uint32_t bytes_of_one(uint32_t word, int i) { return prmt(word, 0, i == 0 ? 0x1100 : 0x3322); }

template <int FORMAT>
PRIM uint32_t to_bf16(uint32_t pair) {
    if constexpr (FORMAT == INT8)  // 7 bits fit beside 128; the sign is 0 or -128, beside -128
        return add_bf16x2((pair & 0x007f007f) | 0x43004300, (pair & 0x00800080) | 0xc300c300);
    else if constexpr (FORMAT == INT4)  // 128 + code + 8
        return add_bf16x2((pair & 0x000f000f) | 0x43004300, 0xc308c308);
    else
        return mul_bf16x2((pair & 0x007f007f) << 4 | (pair & 0x00800080) << 8, 0x7b807b80);  // 2^120
}

template <int FORMAT>
PRIM uint32_t to_f16(uint32_t pair) {
    if constexpr (FORMAT == INT8)  // 1024 + code + 128
        return add_f16x2(((pair ^ 0x00800080) & 0x00ff00ff) | 0x64006400, 0xe480e480);
    else if constexpr (FORMAT == INT4)  // 1024 + code + 8
        return add_f16x2((pair & 0x000f000f) | 0x64006400, 0xe408e408);
    else
        return mul_f16x2((pair & 0x007f007f) << 7 | (pair & 0x00800080) << 8, 0x5c005c00);  // 2^8
}
