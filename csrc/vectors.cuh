// Several elements at a time: one access of up to 16 bytes, float32 in registers.
#pragma once
#include "elements.cuh"

template <int BYTES>
struct alignas(BYTES) Words {
    uint32_t x[BYTES / 4];
};

template <int DTYPE>
constexpr int ELEMENT_BYTES = DTYPE == F32 ? 4 : 2;
// Elements of an access of 16 bytes.
template <int DTYPE>
constexpr int WIDEST = 16 / ELEMENT_BYTES<DTYPE>;

// N elements from `d` on; for N > 1 their address is a multiple of their size.
template <int DTYPE, int N>
PRIM void load_elements(uint64_t row, int d, float (&x)[N]) {
    if constexpr (N == 1) {
        x[0] = load_element<DTYPE>(row, d);
    } else {
        constexpr int BYTES = N * ELEMENT_BYTES<DTYPE>;
        const Words<BYTES> w = *(const Words<BYTES>*)(row + (int64_t)d * ELEMENT_BYTES<DTYPE>);
        UNROLL for (int i = 0; i < N; i++) {
            if constexpr (DTYPE == F32)
                x[i] = bits_float(w.x[i]);
            else if constexpr (DTYPE == BF16)
                x[i] = bits_float(i % 2 ? w.x[i / 2] & 0xffff0000u : w.x[i / 2] << 16);
            else
                x[i] = half_to_float((uint16_t)(w.x[i / 2] >> (16 * (i % 2))));
        }
    }
}

// x as elements, rounded to nearest.
template <int DTYPE, int N>
PRIM Words<N * ELEMENT_BYTES<DTYPE>> packed(const float (&x)[N]) {
    Words<N * ELEMENT_BYTES<DTYPE>> w;
    UNROLL for (int i = 0; i < N * ELEMENT_BYTES<DTYPE> / 4; i++) {
        if constexpr (DTYPE == F32)
            w.x[i] = float_bits(x[i]);
        else if constexpr (DTYPE == BF16)
            w.x[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        else
            w.x[i] = float_to_half(x[2 * i]) | (uint32_t)float_to_half(x[2 * i + 1]) << 16;
    }
    return w;
}

template <int DTYPE, int N>
PRIM void store_elements(uint64_t row, int d, const float (&x)[N]) {
    if constexpr (N == 1) {
        store_element<DTYPE>(row, d, x[0]);
    } else {
        constexpr int BYTES = N * ELEMENT_BYTES<DTYPE>;
        *(Words<BYTES>*)(row + (int64_t)d * ELEMENT_BYTES<DTYPE>) = packed<DTYPE, N>(x);
    }
}

// x as the dtype would keep it.
template <int DTYPE>
PRIM float rounded(float x) {
    if constexpr (DTYPE == F32)
        return x;
    else if constexpr (DTYPE == BF16)
        return bf16_to_float(float_to_bf16(x));
    else
        return half_to_float(float_to_half(x));
}
