//! Plain Rust over `[f32; 8]`: runs anywhere, and is what the other instruction sets are compared with.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use super::{
    BackwardKernel, CodesKernel, Kernels, PackV, Packs, PanelKernel, RowsKernel, instantiate, instantiate_common,
    per_rows, table,
};
use crate::cpu::backward_block::{Gradient, SIDE, Tiles};
use crate::cpu::rowwise::{FloatRows, Rows};
use crate::cpu::vector::{Bf16, Dot, F16, Float, MAX_LANES, Raw, Vector};
use crate::cpu::{backward_block, codes, kernels, merge, rope, rowwise};
use crate::dtype::DType;

/// 8 float32 in an array; the compiler vectorises what it can.
#[derive(Clone, Copy)]
pub struct V([f32; 8]);

impl V {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(self.0.map(f))
    }
    #[inline(always)]
    fn zip(self, o: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], o.0[i])))
    }
}

unsafe impl Vector for V {
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(p.cast::<[f32; 8]>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        p.cast::<[f32; 8]>().write_unaligned(self.0);
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(p.cast::<[u16; 8]>().read_unaligned().map(|x| f32::from_bits(u32::from(x) << 16)))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(std::array::from_fn(|i| DType::F16.read(p.add(i).cast())))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        for (i, x) in self.0.into_iter().enumerate() {
            DType::BF16.write(p.add(i).cast(), x);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        for (i, x) in self.0.into_iter().enumerate() {
            DType::F16.write(p.add(i).cast(), x);
        }
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        self.zip(o, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        self.zip(o, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        self.zip(o, |a, b| if a > b { a } else { b })
    }
    // Not f32::mul_add: without the instruction it is a call into libm, a hundred times slower.
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn mul_sub(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] - c.0[i]))
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        self.map(|x| {
            const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
            let y = if x < -126.0 { -126.0 } else { x };
            let t = y + ROUND;
            let f = y - (t - ROUND);
            let mut p = 1.534_581_2e-4;
            for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_8e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0] {
                p = p * f + c;
            }
            let e = f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000));
            if x < -126.0 { 0.0 } else { p * e }
        })
    }
    #[inline(always)]
    unsafe fn keep_below(self, first: i32, hi: i32) -> Self {
        Self(std::array::from_fn(|i| if first + (i as i32) < hi { self.0[i] } else { f32::NEG_INFINITY }))
    }
    #[inline(always)]
    unsafe fn any_gt(self, x: f32) -> bool {
        self.0.iter().any(|y| *y > x)
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        let x = self.0;
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }
    #[inline(always)]
    unsafe fn transpose(m: &mut [Self; MAX_LANES]) {
        let r = *m;
        for i in 0..8 {
            for j in 0..8 {
                m[i].0[j] = r[j].0[i];
            }
        }
    }
}

mod base {
    use super::*;
    instantiate_common! { #[inline(never)]; vector V; }
    instantiate! {
        #[inline(never)];
        vector V;
        panel f32: Float<V>, load Raw, 4 x 2, tiles 2, pv 4 x 2;
        panel bf16: Float<V>, load Bf16, 4 x 2, tiles 2, pv 4 x 2;
        panel f16: Float<V>, load F16, 4 x 2, tiles 2, pv 4 x 2;
        backward gradients: Float<V>, 4 x 2, sums 4 x 2 x 2, packs f32 Raw, bf16 Bf16, f16 F16;
        codes float_codes: Float<V>;
        rows f32_rows: FloatRows<V, Raw>, pv 4, 2, 1, 1;
        rows bf16_rows: FloatRows<V, Bf16>, pv 4, 2, 1, 1;
        rows f16_rows: FloatRows<V, F16>, pv 4, 2, 1, 1;
    }
}

unsafe fn peak(rounds: usize) -> u64 {
    let mut acc = [V([0.0; 8]); 4];
    let (a, b) = (V([std::hint::black_box(1e-3); 8]), V([std::hint::black_box(0.9999); 8]));
    for _ in 0..rounds {
        for x in &mut acc {
            *x = x.mul_add(b, a);
        }
    }
    std::hint::black_box(acc.iter().map(|x| x.0[0]).sum::<f32>());
    rounds as u64 * 4 * 16
}

/// No instruction set beyond the target's baseline.
pub const PORTABLE: Kernels = table!(peak | _ | peak);
