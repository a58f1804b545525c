// Tiles of rows in shared memory as mma.sync wants them: rows of D channels (16-bit), in chunks of 16 bytes that are swizzled.
#pragma once
#include "ptx.cuh"

// Where 16 bytes (8 channels) of a row lie in a tile: the rows of an 8x8 matrix meet different banks.
template <int D>
PRIM uint32_t chunk_at(uint32_t tile, int row, int chunk) {
    return tile + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
}
// From a lane's place in the first 16 channels of a tile (128-byte aligned) to the one in 16 channels `d`: a step that costs no
// register of its own.
PRIM uint32_t channels_at(uint32_t place, int d) { return (place ^ ((d & 3) << 5)) + (d >> 2) * 128; }

// Starts copying ROWS rows to shared memory; those from n on become zeros, and nothing is read for them.
template <int D, int ROWS, int THREADS>
PRIM void load_rows(uint32_t tile, uint64_t rows, int64_t stride, int n) {
    constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "steps keep a row's place in the swizzle");
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const uint32_t to = chunk_at<D>(tile, row, chunk);
    uint64_t from = rows + row * stride + chunk * 16;
    UNROLL for (int i = 0; i < ROWS; i += STEP) {
        cp_async16_zfill(to + i * (D * 2), (const void*)from, row + i < n ? 16 : 0);
        from += STEP * stride;
    }
}

template <bool BF16_>
PRIM void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (BF16_)
        mma_m16n8k16_bf16(d, a, b0, b1);
    else
        mma_m16n8k16_f16(d, a, b0, b1);
}

template <bool BF16_>
PRIM uint32_t pack(float lo, float hi) {
    return BF16_ ? pack_bf16(lo, hi) : pack_f16(lo, hi);
}
