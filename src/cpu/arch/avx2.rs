//! AVX2 with FMA and F16C: 8 lanes, 16 registers; everything in float32.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use std::arch::x86_64::*;

use super::{
    BackwardKernel, CodesKernel, Kernels, PackV, Packs, PanelKernel, RowsKernel, instantiate, instantiate_common,
    per_rows, table,
};
use crate::cpu::backward_block::{Gradient, SIDE, Tiles};
use crate::cpu::rowwise::{FloatRows, Rows};
use crate::cpu::vector::{Bf16, Dot, F16, Float, MAX_LANES, Raw, Vector};
use crate::cpu::{backward_block, codes, kernels, merge, rope, rowwise};
use crate::dtype::DType;

/// 8 float32.
#[derive(Clone, Copy)]
pub struct V(__m256);

unsafe impl Vector for V {
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(_mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        _mm256_storeu_ps(p, self.0);
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        let x = _mm256_castps_si256(self.0);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(x), _mm256_set1_epi32(1));
        let r = _mm256_srli_epi32::<16>(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
        let q = _mm256_or_si256(_mm256_srli_epi32::<16>(x), _mm256_set1_epi32(0x40));
        let y = _mm256_blendv_epi8(r, q, nan);
        let packed = _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256::<1>(y));
        _mm_storeu_si128(p.cast(), packed);
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        Self(_mm256_add_ps(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        Self(_mm256_mul_ps(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        Self(_mm256_max_ps(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(_mm256_fmadd_ps(self.0, b.0, c.0))
    }
    #[inline(always)]
    unsafe fn mul_sub(self, b: Self, c: Self) -> Self {
        Self(_mm256_fmsub_ps(self.0, b.0, c.0))
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        let low = _mm256_set1_ps(-126.0);
        // VMAXPS returns its second operand when one is NaN: NaN stays.
        let x = _mm256_max_ps(low, self.0);
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let f = _mm256_sub_ps(x, n);
        let mut p = _mm256_set1_ps(1.534_581_2e-4);
        for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_8e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0] {
            p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c));
        }
        let e = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
        // Below -126 the result is 0, for -inf exactly; NLT is true for NaN, which passes.
        let keep = _mm256_cmp_ps::<_CMP_NLT_UQ>(self.0, low);
        Self(_mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(e))))
    }
    #[inline(always)]
    unsafe fn keep_below(self, first: i32, hi: i32) -> Self {
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let ok = _mm256_cmpgt_epi32(_mm256_set1_epi32(hi - first), lane);
        Self(_mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), self.0, _mm256_castsi256_ps(ok)))
    }
    #[inline(always)]
    unsafe fn any_gt(self, x: f32) -> bool {
        _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(self.0, _mm256_set1_ps(x))) != 0
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        let x = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
    }
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        let x = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
    }
    #[inline(always)]
    unsafe fn transpose(m: &mut [Self; MAX_LANES]) {
        let r = |i: usize| m[i].0;
        let lo = |i| _mm256_unpacklo_ps(r(i), r(i + 1));
        let hi = |i| _mm256_unpackhi_ps(r(i), r(i + 1));
        let t = [lo(0), hi(0), lo(2), hi(2), lo(4), hi(4), lo(6), hi(6)];
        let mut u = t;
        for i in 0..2 {
            let (a, b, c, d) = (t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]);
            u[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
            u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        for i in 0..4 {
            m[i].0 = _mm256_permute2f128_ps::<0x20>(u[i], u[4 + i]);
            m[4 + i].0 = _mm256_permute2f128_ps::<0x31>(u[i], u[4 + i]);
        }
    }
    #[inline(always)]
    unsafe fn sum16(v: &[Self; 16], out: *mut f32) {
        for h in 0..4 {
            let a = _mm256_hadd_ps(v[4 * h].0, v[4 * h + 1].0);
            let b = _mm256_hadd_ps(v[4 * h + 2].0, v[4 * h + 3].0);
            let c = _mm256_hadd_ps(a, b);
            _mm_storeu_ps(out.add(4 * h), _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps::<1>(c)));
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))))
    }
    #[inline(always)]
    unsafe fn load_low4(p: *const u8) -> Self {
        let x = _mm256_and_si256(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), _mm256_set1_epi32(15));
        Self(_mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(8))))
    }
    #[inline(always)]
    unsafe fn load_high4(p: *const u8) -> Self {
        let x = _mm256_srli_epi32::<4>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())));
        Self(_mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(8))))
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        e4m3(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))
    }
    #[inline(always)]
    unsafe fn unit_i8(p: *const u8, i: usize) -> Self {
        Self(_mm256_cvtepi32_ps(signed_byte(p, i)))
    }
    #[inline(always)]
    unsafe fn unit_e4m3(p: *const u8, i: usize) -> Self {
        e4m3(signed_byte(p, i))
    }
    #[inline(always)]
    unsafe fn unit_low4(p: *const u8, shift: u32) -> Self {
        let x = _mm256_srl_epi32(_mm256_loadu_si256(p.cast()), _mm_cvtsi32_si128(shift as i32));
        let x = _mm256_and_si256(x, _mm256_set1_epi32(15));
        Self(_mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(8))))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// Byte `i` of 8 units of 32 bits.
#[inline(always)]
unsafe fn signed_byte(p: *const u8, i: usize) -> __m256i {
    let x = _mm256_sll_epi32(_mm256_loadu_si256(p.cast()), _mm_cvtsi32_si128(24 - 8 * i as i32));
    _mm256_srai_epi32::<24>(x)
}

/// Sign-extended e4m3 to float32.
#[inline(always)]
unsafe fn e4m3(x: __m256i) -> V {
    let magnitude = _mm256_slli_epi32::<20>(_mm256_and_si256(x, _mm256_set1_epi32(0x7f)));
    let normal = _mm256_castsi256_ps(_mm256_add_epi32(magnitude, _mm256_set1_epi32(120 << 23)));
    let small = _mm256_castsi256_ps(_mm256_add_epi32(magnitude, _mm256_set1_epi32(121 << 23)));
    let small = _mm256_sub_ps(small, _mm256_set1_ps(0.015_625));
    let is_small = _mm256_cmpeq_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0x78)), _mm256_setzero_si256());
    let y = _mm256_blendv_ps(normal, small, _mm256_castsi256_ps(is_small));
    V(_mm256_or_ps(y, _mm256_and_ps(_mm256_castsi256_ps(x), _mm256_set1_ps(-0.0))))
}

mod base {
    use super::*;
    instantiate_common! { #[target_feature(enable = "avx2,fma,f16c")]; vector V; }
    instantiate! {
        #[target_feature(enable = "avx2,fma,f16c")];
        vector V;
        panel f32: Float<V>, load Raw, 6 x 2, tiles 2, pv 6 x 2;
        panel bf16: Float<V>, load Bf16, 6 x 2, tiles 2, pv 6 x 2;
        panel f16: Float<V>, load F16, 6 x 2, tiles 2, pv 6 x 2;
        backward gradients: Float<V>, 6 x 2, sums 6 x 2 x 2, packs f32 Raw, bf16 Bf16, f16 F16;
        codes float_codes: Float<V>;
        rows f32_rows: FloatRows<V, Raw>, pv 8, 4, 2, 1;
        rows bf16_rows: FloatRows<V, Bf16>, pv 8, 4, 2, 1;
        rows f16_rows: FloatRows<V, F16>, pv 8, 4, 2, 1;
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn peak(rounds: usize) -> u64 {
    let mut acc = [_mm256_setzero_ps(); 12];
    let (a, b) = (_mm256_set1_ps(std::hint::black_box(1e-3)), _mm256_set1_ps(std::hint::black_box(0.9999)));
    for _ in 0..rounds {
        for x in &mut acc {
            *x = _mm256_fmadd_ps(*x, b, a);
        }
    }
    let sum = acc.iter().fold(_mm256_setzero_ps(), |s, x| _mm256_add_ps(s, *x));
    std::hint::black_box(V(sum).reduce_add());
    rounds as u64 * 12 * 16
}

/// AVX2 + FMA + F16C.
pub const AVX2: Kernels = table!(peak | _ | peak);
