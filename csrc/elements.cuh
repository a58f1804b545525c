// Single elements of q, k, v and out, whatever they are kept as: for the kernels that are readable rather than fast.
#pragma once
#include "params.h"
#include "ptx.cuh"

PRIM int round_up(int n, int to) { return (n + to - 1) / to * to; }

PRIM uint64_t row_address(const View& v, int b, int h, int64_t i) {
    return v.ptr + b * v.batch_stride + h * v.head_stride + i * v.row_stride;
}

template <int DTYPE>
PRIM float load_element(uint64_t row, int d) {
    if constexpr (DTYPE == F32)
        return ((const float*)row)[d];
    else if constexpr (DTYPE == BF16)
        return bf16_to_float(((const uint16_t*)row)[d]);
    else
        return half_to_float(((const uint16_t*)row)[d]);
}

template <int DTYPE>
PRIM void store_element(uint64_t row, int d, float x) {
    if constexpr (DTYPE == F32)
        ((float*)row)[d] = x;
    else if constexpr (DTYPE == BF16)
        ((uint16_t*)row)[d] = float_to_bf16(x);
    else
        ((uint16_t*)row)[d] = float_to_half(x);
}

// e4m3 without infinities; subnormals by way of 2^-6 (1 + m / 8), not as subnormals of float32. As src/quant.rs.
PRIM float e4m3_to_float(uint32_t code) {
    const uint32_t magnitude = (code & 0x7f) << 20;
    const float x = (code & 0x78) == 0 ? bits_float(magnitude + (121u << 23)) - 0.015625f
                                       : bits_float(magnitude + (120u << 23));
    return code & 0x80 ? -x : x;
}

// Element d of compact K, token i of the page. Layout: python/llama1m_ext/formats.py.
PRIM float compact_key(const Side& s, int b, int h, int i, int d, int head_dim) {
    const int width = round_up(head_dim, GROUP), token = i % GROUP;
    const uint64_t group = row_address(s.rows, b, h, i / GROUP);
    const uint16_t* params = (const uint16_t*)row_address(s.params, b, h, i / GROUP);
    float code;
    if (s.format == INT4) {
        const uint32_t unit = ((const uint32_t*)group)[d / 8 * GROUP + token];
        code = (float)(unit >> (4 * (d % 8 / 2) + 16 * (d % 2)) & 15) - 8.f;
    } else {
        const uint32_t unit = ((const uint32_t*)group)[d / 4 * GROUP + token] >> (8 * (d % 4)) & 255;
        code = s.format == INT8 ? (float)(int8_t)unit : e4m3_to_float(unit);
    }
    return fma_rn(half_to_float(params[d]), code, half_to_float(params[width + d]));
}

// Element d of compact V, token i of the page.
PRIM float compact_value(const Side& s, int b, int h, int i, int d, int head_dim) {
    const int blocks = round_up(head_dim, GROUP) / GROUP, block = d / GROUP, c = d % GROUP;
    const uint64_t row = row_address(s.rows, b, h, i);
    const float scale = half_to_float(((const uint16_t*)row_address(s.params, b, h, block))[i]);
    const float offset = half_to_float(((const uint16_t*)row_address(s.params, b, h, blocks + block))[i]);
    float code;
    if (s.format == INT4) {
        const uint32_t byte = ((const uint8_t*)row)[block * (GROUP / 2) + c % (GROUP / 2)];
        code = (float)(c < GROUP / 2 ? byte & 15 : byte >> 4) - 8.f;
    } else {
        const uint32_t byte = ((const uint8_t*)row)[d];
        code = s.format == INT8 ? (float)(int8_t)byte : e4m3_to_float(byte);
    }
    return fma_rn(scale, code, offset);
}

// Element d of K or V of a page, token i.
template <int DTYPE, bool IS_KEY>
PRIM float side_element(const Side& s, int b, int h, int i, int d, int head_dim) {
    if (s.format == DENSE)
        return load_element<DTYPE>(row_address(s.rows, b, h, i), d);
    return IS_KEY ? compact_key(s, b, h, i, d, head_dim) : compact_value(s, b, h, i, d, head_dim);
}
