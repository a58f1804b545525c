// The emulation itself: fragments and copies of ptx.cuh against their definition in the PTX manual, written out differently.
#define SHIM_IMPL
#include "ptx.cuh"

#include <cstdio>

namespace {

int failures = 0;

void expect(bool good, const char* what) {
    if (!good) {
        std::printf("FAILED %s\n", what);
        failures++;
    }
}

float number(int i) { return (float)((i * 37 + 11) % 61 - 30) / 8; }  // exact in either half

// D = A B with A [16][16] and B [16][8]: each lane takes its fragment by the manual's formulas.
template <bool BF16>
void mma_product() {
    float want[16][8] = {}, got[16][8];
    auto a = [](int i, int k) { return number(i * 16 + k); };
    auto b = [](int k, int j) { return number(1000 + k * 8 + j); };
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++)
            for (int k = 0; k < 16; k++) want[i][j] += a(i, k) * b(k, j);
    cpu::launch({1, 1, 1}, {32, 1, 1}, 1024, [&] {
        const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
        auto pack = [](float lo, float hi) { return BF16 ? pack_bf16(lo, hi) : pack_f16(lo, hi); };
        const uint32_t fragment[4] = {pack(a(group, pair), a(group, pair + 1)), pack(a(group + 8, pair), a(group + 8, pair + 1)),
                                      pack(a(group, pair + 8), a(group, pair + 9)),
                                      pack(a(group + 8, pair + 8), a(group + 8, pair + 9))};
        const uint32_t b0 = pack(b(pair, group), b(pair + 1, group)), b1 = pack(b(pair + 8, group), b(pair + 9, group));
        float d[4] = {};
        if (BF16)
            mma_m16n8k16_bf16(d, fragment, b0, b1);
        else
            mma_m16n8k16_f16(d, fragment, b0, b1);
        for (int r = 0; r < 4; r++) got[group + r / 2 * 8][pair + r % 2] = d[r];
    });
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) expect(got[i][j] == want[i][j], BF16 ? "mma of bf16" : "mma of f16");
}

// Four 8x8 matrices, straight and transposed.
void matrices() {
    cpu::launch({1, 1, 1}, {32, 1, 1}, 1024, [&] {
        DYN_SMEM(smem);
        const int lane = threadIdx.x;
        uint16_t* const held = (uint16_t*)smem;  // [4][8][8]
        for (int i = lane; i < 256; i += 32) held[i] = (uint16_t)i;
        block_sync();
        uint32_t straight[4], turned[4];
        ldmatrix_x4(straight, smem_u32(held + lane * 8));
        ldmatrix_x4_trans(turned, smem_u32(held + lane * 8));
        for (int m = 0; m < 4; m++)
            for (int half = 0; half < 2; half++) {
                const int row = lane / 4, column = lane % 4 * 2 + half;
                expect((uint16_t)(straight[m] >> 16 * half) == m * 64 + row * 8 + column, "ldmatrix");
                expect((uint16_t)(turned[m] >> 16 * half) == m * 64 + column * 8 + row, "ldmatrix.trans");
            }
    });
}

// A copy is there after its wait; of a short one the rest is zero, and of none nothing is read.
void copies(cpu::Mode mode) {
    alignas(16) uint8_t source[32 * 16];
    for (int i = 0; i < 32 * 16; i++) source[i] = (uint8_t)(i + 1);
    cpu::launch({1, 1, 1}, {32, 1, 1}, 2048, [&] {
        DYN_SMEM(smem);
        const int lane = threadIdx.x;
        cp_async16(smem_u32(smem + lane * 16), source + lane * 16);
        cp_async_commit();
        const void* from = lane ? source + lane * 16 : (const void*)16;  // lane 0: an address that must not be read
        cp_async16_zfill(smem_u32(smem + 1024 + lane * 16), from, lane % 17);
        cp_async_commit();
        cp_async_wait<1>();
        for (int i = 0; i < 16; i++) expect(smem[lane * 16 + i] == source[lane * 16 + i], "cp.async");
        cp_async_wait<0>();
        for (int i = 0; i < 16; i++)
            expect(smem[1024 + lane * 16 + i] == (i < lane % 17 ? source[lane * 16 + i] : 0), "cp.async with zeros");
    }, mode, 5);
}

void halves() {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        if ((bits & 0x7c00) == 0x7c00 && (bits & 0x3ff)) continue;  // not numbers
        expect(float_to_half(half_to_float((uint16_t)bits)) == bits, "float16 there and back");
    }
    for (uint32_t bits = 0; bits < 65536; bits++) {
        if ((bits & 0x7f80) == 0x7f80 && (bits & 0x7f)) continue;
        expect(float_to_bf16(bf16_to_float((uint16_t)bits)) == bits, "bfloat16 there and back");
    }
    expect(float_to_bf16(1.00390625f) == 0x3f80 && float_to_bf16(1.01171875f) == 0x3f82, "bfloat16: ties to even");
    expect(pack_bf16(1.f, -2.f) == 0xc0003f80u && pack_f16(1.f, -2.f) == 0xc0003c00u, "packed: the first is the lower half");
}

}  // namespace

int main() {
    mma_product<true>();
    mma_product<false>();
    matrices();
    for (cpu::Mode mode : {cpu::EAGER, cpu::LAZY, cpu::RANDOM}) copies(mode);
    halves();
    std::printf("ptx: %d failures\n", failures);
    return failures != 0;
}
