//! NEON (Advanced SIMD), part of every AArch64 CPU: 4 lanes, 32 registers; everything in float32.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use std::arch::aarch64::*;

use super::{
    BackwardKernel, CodesKernel, Kernels, PackV, Packs, PanelKernel, RowsKernel, instantiate, instantiate_common,
    per_rows, table,
};
use crate::cpu::backward_block::{Gradient, SIDE, Tiles};
use crate::cpu::rowwise::{FloatRows, Rows};
use crate::cpu::vector::{Bf16, Dot, F16, Float, MAX_LANES, Raw, Vector};
use crate::cpu::{backward_block, codes, kernels, merge, rope, rowwise};
use crate::dtype::DType;

/// 4 float32.
#[derive(Clone, Copy)]
pub struct V(float32x4_t);

unsafe impl Vector for V {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(vdupq_n_f32(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(vld1q_f32(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        vst1q_f32(p, self.0);
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p))))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        let x: [f32; 4] = std::array::from_fn(|i| DType::F16.read(p.add(i).cast()));
        Self(vld1q_f32(x.as_ptr()))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        let x = vreinterpretq_u32_f32(self.0);
        let odd = vandq_u32(vshrq_n_u32::<16>(x), vdupq_n_u32(1));
        let r = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let q = vorrq_u32(x, vdupq_n_u32(0x40_0000));
        let number = vceqq_f32(self.0, self.0);
        vst1_u16(p, vshrn_n_u32::<16>(vbslq_u32(number, r, q)));
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        let mut x = [0.0f32; 4];
        vst1q_f32(x.as_mut_ptr(), self.0);
        for (i, y) in x.into_iter().enumerate() {
            DType::F16.write(p.add(i).cast(), y);
        }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        Self(vaddq_f32(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        Self(vmulq_f32(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        Self(vmaxnmq_f32(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(vfmaq_f32(c.0, self.0, b.0))
    }
    #[inline(always)]
    unsafe fn mul_sub(self, b: Self, c: Self) -> Self {
        Self(vfmaq_f32(vnegq_f32(c.0), self.0, b.0))
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        let low = vdupq_n_f32(-126.0);
        let under = vcltq_f32(self.0, low);
        // FMAX keeps a NaN.
        let x = vmaxq_f32(self.0, low);
        let n = vrndnq_f32(x);
        let f = vsubq_f32(x, n);
        let mut p = vdupq_n_f32(1.534_581_2e-4);
        for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_8e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0] {
            p = vfmaq_f32(vdupq_n_f32(c), p, f);
        }
        let e = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
        let y = vmulq_f32(p, vreinterpretq_f32_s32(e));
        Self(vbslq_f32(under, vdupq_n_f32(0.0), y))
    }
    #[inline(always)]
    unsafe fn keep_below(self, first: i32, hi: i32) -> Self {
        let iota = [0i32, 1, 2, 3];
        let ok = vcltq_s32(vld1q_s32(iota.as_ptr()), vdupq_n_s32(hi - first));
        Self(vbslq_f32(ok, self.0, vdupq_n_f32(f32::NEG_INFINITY)))
    }
    #[inline(always)]
    unsafe fn any_gt(self, x: f32) -> bool {
        vmaxvq_u32(vcgtq_f32(self.0, vdupq_n_f32(x))) != 0
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        vmaxnmvq_f32(self.0)
    }
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        vaddvq_f32(self.0)
    }
    #[inline(always)]
    unsafe fn transpose(m: &mut [Self; MAX_LANES]) {
        let (a, b) = (vtrnq_f32(m[0].0, m[1].0), vtrnq_f32(m[2].0, m[3].0));
        m[0].0 = vcombine_f32(vget_low_f32(a.0), vget_low_f32(b.0));
        m[1].0 = vcombine_f32(vget_low_f32(a.1), vget_low_f32(b.1));
        m[2].0 = vcombine_f32(vget_high_f32(a.0), vget_high_f32(b.0));
        m[3].0 = vcombine_f32(vget_high_f32(a.1), vget_high_f32(b.1));
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        let x = vreinterpret_s8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
        Self(vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x)))))
    }
    #[inline(always)]
    unsafe fn load_low4(p: *const u8) -> Self {
        let x = vand_u8(vreinterpret_u8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned())), vdup_n_u8(15));
        let x = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(x))));
        Self(vcvtq_f32_s32(vsubq_s32(x, vdupq_n_s32(8))))
    }
    #[inline(always)]
    unsafe fn load_high4(p: *const u8) -> Self {
        let x = vshr_n_u8::<4>(vreinterpret_u8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned())));
        let x = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(x))));
        Self(vcvtq_f32_s32(vsubq_s32(x, vdupq_n_s32(8))))
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        let x = vreinterpret_s8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
        e4m3(vmovl_s16(vget_low_s16(vmovl_s8(x))))
    }
    #[inline(always)]
    unsafe fn unit_i8(p: *const u8, i: usize) -> Self {
        Self(vcvtq_f32_s32(signed_byte(p, i)))
    }
    #[inline(always)]
    unsafe fn unit_e4m3(p: *const u8, i: usize) -> Self {
        e4m3(signed_byte(p, i))
    }
    #[inline(always)]
    unsafe fn unit_low4(p: *const u8, shift: u32) -> Self {
        // USHL by a negative count shifts to the right.
        let x = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p)), vdupq_n_s32(-(shift as i32)));
        let x = vreinterpretq_s32_u32(vandq_u32(x, vdupq_n_u32(15)));
        Self(vcvtq_f32_s32(vsubq_s32(x, vdupq_n_s32(8))))
    }
    #[inline(always)]
    unsafe fn sum16(v: &[Self; 16], out: *mut f32) {
        for h in 0..4 {
            let a = vpaddq_f32(v[4 * h].0, v[4 * h + 1].0);
            let b = vpaddq_f32(v[4 * h + 2].0, v[4 * h + 3].0);
            vst1q_f32(out.add(4 * h), vpaddq_f32(a, b));
        }
    }
}

/// Byte `i` of 4 units of 32 bits.
#[inline(always)]
unsafe fn signed_byte(p: *const u8, i: usize) -> int32x4_t {
    let x = vshlq_s32(vreinterpretq_s32_u8(vld1q_u8(p)), vdupq_n_s32(24 - 8 * i as i32));
    vshrq_n_s32::<24>(x)
}

/// Sign-extended e4m3 to float32.
#[inline(always)]
unsafe fn e4m3(x: int32x4_t) -> V {
    let x = vreinterpretq_u32_s32(x);
    let magnitude = vshlq_n_u32::<20>(vandq_u32(x, vdupq_n_u32(0x7f)));
    let normal = vreinterpretq_f32_u32(vaddq_u32(magnitude, vdupq_n_u32(120 << 23)));
    let small = vreinterpretq_f32_u32(vaddq_u32(magnitude, vdupq_n_u32(121 << 23)));
    let small = vsubq_f32(small, vdupq_n_f32(0.015_625));
    let is_small = vceqzq_u32(vandq_u32(x, vdupq_n_u32(0x78)));
    let y = vreinterpretq_u32_f32(vbslq_f32(is_small, small, normal));
    V(vreinterpretq_f32_u32(vorrq_u32(y, vandq_u32(x, vdupq_n_u32(0x8000_0000)))))
}

mod base {
    use super::*;
    instantiate_common! { #[target_feature(enable = "neon")]; vector V; }
    instantiate! {
        #[target_feature(enable = "neon")];
        vector V;
        panel f32: Float<V>, load Raw, 6 x 4, tiles 2, pv 6 x 4;
        panel bf16: Float<V>, load Bf16, 6 x 4, tiles 2, pv 6 x 4;
        panel f16: Float<V>, load F16, 6 x 4, tiles 2, pv 6 x 4;
        backward gradients: Float<V>, 6 x 4, sums 6 x 4 x 4, packs f32 Raw, bf16 Bf16, f16 F16;
        codes float_codes: Float<V>;
        rows f32_rows: FloatRows<V, Raw>, pv 8, 8, 4, 2;
        rows bf16_rows: FloatRows<V, Bf16>, pv 8, 8, 4, 2;
        rows f16_rows: FloatRows<V, F16>, pv 8, 8, 4, 2;
    }
}

#[target_feature(enable = "neon")]
unsafe fn peak(rounds: usize) -> u64 {
    let mut acc = [vdupq_n_f32(0.0); 24];
    let (a, b) = (vdupq_n_f32(std::hint::black_box(1e-3)), vdupq_n_f32(std::hint::black_box(0.9999)));
    for _ in 0..rounds {
        for x in &mut acc {
            *x = vfmaq_f32(a, *x, b);
        }
    }
    let sum = acc.iter().fold(vdupq_n_f32(0.0), |s, x| vaddq_f32(s, *x));
    std::hint::black_box(vaddvq_f32(sum));
    rounds as u64 * 24 * 8
}

/// NEON.
pub const NEON: Kernels = table!(peak | _ | peak);
