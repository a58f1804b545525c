// Device primitives: one wrapper per PTX instruction. The kernels use only these,
// so that the same kernel text also compiles as host C++ against emulation.h.
#pragma once
#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include "emulation.h"
#else
#ifdef __CUDACC_RTC__  // NVRTC: no host headers needed at all
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
#else
#include <cstdint>
#endif
#define PRIM static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
#define KERNEL(threads, minblocks) extern "C" __global__ void __launch_bounds__(threads, minblocks)
#define DYN_SMEM(name) extern __shared__ __align__(1024) uint8_t name[]
#define UNROLL _Pragma("unroll")
#define PARAM const __grid_constant__
#define INF __int_as_float(0x7f800000)
typedef uint16_t bf16_t;
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};  // same bytes as CUtensorMap

// threadIdx.x, read at this very place: what is computed from it for a rare branch is computed there, and holds no register meanwhile.
PRIM int thread_here() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}
PRIM uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
PRIM void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
}
// Each 8x8 matrix transposed on the way: lane l gets rows 2 (l % 4) and the next of column l / 4.
PRIM void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
}
PRIM void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PRIM void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PRIM void cp_async16(uint32_t dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
// The first `bytes` (0 to 16) of the source, then zeros: with 0 nothing is read.
PRIM void cp_async16_zfill(uint32_t dst, const void* src, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
PRIM void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
PRIM void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
PRIM void block_sync() { __syncthreads(); }
PRIM void named_bar_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }
PRIM void named_bar_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
PRIM float shfl_xor(float v, int m) { return __shfl_xor_sync(0xffffffffu, v, m); }
PRIM float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PRIM float fmax_(float a, float b) { return fmaxf(a, b); }
PRIM uint32_t pack_bf16(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
PRIM uint32_t pack_f16(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
// Bytes of a (0 to 3) and b (4 to 7), chosen by the nibbles of `selector`.
PRIM uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// (x & mask) | bits as one instruction: of two constants the compiler makes two.
PRIM uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
    return r;
}
// Pairs of 16-bit numbers, each rounded on its own.
PRIM uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80), "r"(b));
    return r;
}
PRIM uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000));
    return r;
}
PRIM uint32_t add_f16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
PRIM uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
PRIM bool vote_any(bool x) { return __any_sync(0xffffffffu, x); }
PRIM void warp_sync() { __syncwarp(); }
// As cp_async16_zfill, 4 or 8 bytes: these go through the first-level cache.
template <int BYTES>
PRIM void cp_async_small_zfill(uint32_t dst, const void* src, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(BYTES), "r"(bytes) : "memory");
}
// float16 and bfloat16 as bits.
PRIM float half_to_float(uint16_t bits) {
    float x;
    asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "h"(bits));
    return x;
}
PRIM uint16_t float_to_half(float x) {
    uint16_t bits;
    asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; mov.b16 %0, h; }" : "=h"(bits) : "f"(x));
    return bits;
}
PRIM float bf16_to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
PRIM uint16_t float_to_bf16(float x) { return (uint16_t)pack_bf16(x, 0.f); }
PRIM uint32_t float_bits(float x) { return __float_as_uint(x); }
PRIM float bits_float(uint32_t x) { return __uint_as_float(x); }
PRIM float lg2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PRIM float rint_(float x) { return rintf(x); }
PRIM float abs_(float x) { return fabsf(x); }
// No contraction into a fused multiply-add: what the CPU engine rounds twice must be rounded twice here.
PRIM float mul_rn(float a, float b) { return __fmul_rn(a, b); }
PRIM float add_rn(float a, float b) { return __fadd_rn(a, b); }
PRIM float div_rn(float a, float b) { return __fdiv_rn(a, b); }
PRIM float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#if __CUDA_ARCH__ >= 900
PRIM void mbar_init(uint32_t b, uint32_t n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n) : "memory");
}
PRIM void mbar_expect_tx(uint32_t b, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
PRIM void mbar_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
PRIM bool mbar_try_wait(uint32_t b, uint32_t parity) {
    uint32_t ok;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ok)
                 : "r"(b), "r"(parity)
                 : "memory");
    return ok;
}
PRIM void mbar_wait(uint32_t b, uint32_t parity) {
    while (!mbar_try_wait(b, parity)) {
    }
}
PRIM void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PRIM void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
PRIM void tma_load_3d(uint32_t dst, const TensorMap* m, uint32_t bar, int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], "
        "[%2];" ::"r"(dst),
        "l"((uint64_t)m), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
PRIM void tma_load_4d(uint32_t dst, const TensorMap* m, uint32_t bar, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], "
        "[%2];" ::"r"(dst),
        "l"((uint64_t)m), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// Bytes in a row, a multiple of 16, from and to multiples of 16.
PRIM void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
}
// These values exist here: what computes them stays before this place, what uses them after it. A wait for wgmma names no registers,
// so without this the compiler moves it past arithmetic, and the overlap that was written down is gone.
template <int N>
PRIM void pin(float (&d)[N]) {
    UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
PRIM void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
PRIM void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
PRIM void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PRIM void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
PRIM void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
#define D8(i)                                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define D64 D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
#define R64                                                                                                            \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
    "30,%31,"                                                                                                          \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
    "%60,%61,%62,%63}"
#define D32 D8(0), D8(8), D8(16), D8(24)
#define R32                                                                                                            \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
    "30,%31}"
// S = A B: both operands in shared memory, K-major; 64 x 128, 64 x 64. A's dtype and B's: "bf16" or "f16".
#define WGMMA_N128_SS(dtype)                                                                                      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." dtype      \
                 "." dtype " " R64 ", %64, %65, p, 1, 1, 0, 0; }"                                                 \
                 : D64                                                                                            \
                 : "l"(a), "l"(b), "r"(accum))
#define WGMMA_N64_SS(dtype)                                                                                      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." dtype      \
                 "." dtype " " R32 ", %32, %33, p, 1, 1, 0, 0; }"                                                \
                 : D32                                                                                           \
                 : "l"(a), "l"(b), "r"(accum))
// D += A B: A in registers, B in shared memory, MN-major.
#define WGMMA_N128_RS(dtype)                                                                                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." dtype "." dtype " " R64                      \
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"                                                     \
                 : D64                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_N64_RS(dtype)                                                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." dtype "." dtype " " R32                       \
                 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"                                                     \
                 : D32                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <bool BF16_>
PRIM void wgmma_ss(float (&d)[64], uint64_t a, uint64_t b, int accum) {
    if constexpr (BF16_)
        WGMMA_N128_SS("bf16");
    else
        WGMMA_N128_SS("f16");
}
template <bool BF16_>
PRIM void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, int accum) {
    if constexpr (BF16_)
        WGMMA_N64_SS("bf16");
    else
        WGMMA_N64_SS("f16");
}
template <bool BF16_>
PRIM void wgmma_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (BF16_)
        WGMMA_N128_RS("bf16");
    else
        WGMMA_N128_RS("f16");
}
template <bool BF16_>
PRIM void wgmma_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (BF16_)
        WGMMA_N64_RS("bf16");
    else
        WGMMA_N64_RS("f16");
}
#endif
#endif
// shared by both: 128-byte-swizzle wgmma descriptor (lbo, sbo in bytes)
PRIM uint64_t wgmma_desc_sw128(uint32_t addr, uint32_t lbo, uint32_t sbo) {
    return (uint64_t)((addr & 0x3FFFF) >> 4) | ((uint64_t)(lbo >> 4) << 16) | ((uint64_t)(sbo >> 4) << 32) |
           (1ull << 62);
}
