//! What the kernels ask of an instruction set: float32 vectors ([`Vector`]) and the multiply that the attention
//! matrices go through ([`Dot`]: float32 FMA, or pairs of bf16 accumulated in float32).
//!
//! Contract of every method: the caller runs on a CPU that has the instruction set (each kernel's entry point says so
//! with `target_feature`), and pointers are valid for the lanes named. No alignment is asked for. All methods are
//! `#[inline(always)]`, so that they take on the features of the entry point they end up in.

/// Most lanes of any vector.
pub const MAX_LANES: usize = 16;

/// A vector of [`Vector::LANES`] float32 numbers.
///
/// # Safety
/// Implementations read and write exactly LANES elements at the pointers given.
#[allow(clippy::missing_safety_doc)] // one contract for all methods: the module's
pub unsafe trait Vector: Copy {
    /// Number of lanes: 4, 8 or 16.
    const LANES: usize;
    /// Every lane `x`.
    unsafe fn splat(x: f32) -> Self;
    /// LANES float32 (or 32-bit patterns, which are moved untouched).
    unsafe fn load(p: *const f32) -> Self;
    /// LANES float32 (or 32-bit patterns).
    unsafe fn store(self, p: *mut f32);
    /// LANES bf16, widened.
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// LANES f16, widened.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// LANES bf16, rounded to nearest even; NaN stays NaN.
    unsafe fn store_bf16(self, p: *mut u16);
    /// LANES f16, rounded to nearest even.
    unsafe fn store_f16(self, p: *mut u16);
    /// `self + o`.
    unsafe fn add(self, o: Self) -> Self;
    /// `self * o`.
    unsafe fn mul(self, o: Self) -> Self;
    /// The larger of each lane; a NaN in `self` is dropped.
    unsafe fn max(self, o: Self) -> Self;
    /// `self * b + c`, fused where the instruction set fuses.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// `self * b - c`, likewise.
    unsafe fn mul_sub(self, b: Self, c: Self) -> Self;
    /// `2^x`, relative error below 2e-7 on [-126, 127]; below that 0 or nearly, `2^-inf = 0` exactly, NaN stays NaN.
    unsafe fn exp2(self) -> Self;
    /// `2^x` for a probability that is rounded to bf16 next: relative error below 2e-4; the rest as [`Vector::exp2`].
    #[inline(always)]
    unsafe fn exp2_bf16(self) -> Self {
        // SAFETY: the module's contract.
        unsafe { self.exp2() }
    }
    /// Lane i keeps its value where `first + i < hi`, else becomes -inf.
    unsafe fn keep_below(self, first: i32, hi: i32) -> Self;
    /// Whether any lane is greater than `x` (NaN is not).
    unsafe fn any_gt(self, x: f32) -> bool;
    /// The largest lane (NaN may be lost).
    unsafe fn reduce_max(self) -> f32;
    /// The sum of all lanes.
    unsafe fn reduce_add(self) -> f32;
    /// Transposes the LANES x LANES matrix in the first LANES entries.
    unsafe fn transpose(m: &mut [Self; MAX_LANES]);
    /// Writes the 16 sums of the lanes of `v[0]` ... `v[15]`.
    #[inline(always)]
    unsafe fn sum16(v: &[Self; 16], out: *mut f32) {
        // SAFETY: the module's contract.
        unsafe {
            for (i, x) in v.iter().enumerate() {
                out.add(i).write(x.reduce_add());
            }
        }
    }
    /// LANES signed bytes as numbers.
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: the module's contract, here and below.
        unsafe { Self::from_fn(|i| f32::from(*p.add(i) as i8)) }
    }
    /// The low halves of LANES bytes, minus 8.
    #[inline(always)]
    unsafe fn load_low4(p: *const u8) -> Self {
        // SAFETY: as above.
        unsafe { Self::from_fn(|i| f32::from(*p.add(i) & 15) - 8.0) }
    }
    /// The high halves of LANES bytes, minus 8.
    #[inline(always)]
    unsafe fn load_high4(p: *const u8) -> Self {
        // SAFETY: as above.
        unsafe { Self::from_fn(|i| f32::from(*p.add(i) >> 4) - 8.0) }
    }
    /// LANES e4m3 as numbers.
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: as above.
        unsafe { Self::from_fn(|i| crate::quant::e4m3_to_f32(*p.add(i))) }
    }
    /// Byte `i` of LANES units of 32 bits, signed.
    #[inline(always)]
    unsafe fn unit_i8(p: *const u8, i: usize) -> Self {
        // SAFETY: as above; 4 * LANES bytes are readable.
        unsafe { Self::from_fn(|lane| f32::from(*p.add(4 * lane + i) as i8)) }
    }
    /// Byte `i` of LANES units, as e4m3.
    #[inline(always)]
    unsafe fn unit_e4m3(p: *const u8, i: usize) -> Self {
        // SAFETY: as above.
        unsafe { Self::from_fn(|lane| crate::quant::e4m3_to_f32(*p.add(4 * lane + i))) }
    }
    /// The 4 bits from bit `shift` on of LANES units, minus 8.
    #[inline(always)]
    unsafe fn unit_low4(p: *const u8, shift: u32) -> Self {
        // SAFETY: as above.
        unsafe { Self::from_fn(|lane| (p.cast::<u32>().add(lane).read_unaligned() >> shift & 15) as f32 - 8.0) }
    }
    /// Lane i is `f(i)`.
    #[inline(always)]
    unsafe fn from_fn(f: impl Fn(usize) -> f32) -> Self {
        let mut x = [0.0f32; MAX_LANES];
        for (i, x) in x.iter_mut().enumerate().take(Self::LANES) {
            *x = f(i);
        }
        // SAFETY: MAX_LANES elements.
        unsafe { Self::load(x.as_ptr()) }
    }
    /// Asks for the cache line at `p`; never faults.
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
}

/// The multiply-accumulate of q k^T and p v. Operands are 32-bit units: one float32, or two neighbouring bf16.
///
/// # Safety
/// As [`Vector`].
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Dot {
    /// Accumulators and softmax.
    type V: Vector;
    /// One operand vector.
    type B: Copy;
    /// Elements in a unit: 1 (float32) or 2 (bf16).
    const PAIR: usize;
    /// The unit at `p` in every lane.
    unsafe fn splat(p: *const u32) -> Self::B;
    /// LANES units.
    unsafe fn load(p: *const u32) -> Self::B;
    /// `acc + a * b`, summed over the elements of each unit.
    unsafe fn dot(acc: Self::V, a: Self::B, b: Self::B) -> Self::V;
    /// `2^x` as exact as the operand type deserves.
    unsafe fn exp2(x: Self::V) -> Self::V;
    /// Stores C vectors of probabilities as operand units at `p` (C * LANES / PAIR units) and returns
    /// `l + their sum`, summed *after* rounding, so that the weights of a row add up to exactly what l says.
    unsafe fn put_p<const C: usize>(row: &[Self::V; C], p: *mut u32, l: Self::V) -> Self::V;
}

/// How elements of the caller's dtype become units: see the implementations.
///
/// # Safety
/// As [`Vector`].
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Load<V: Vector> {
    /// Source bytes that make one unit.
    const BYTES: usize;
    /// LANES units from `p` on.
    unsafe fn load(p: *const u8) -> V;
}

/// 32-bit units taken as they are: float32, or pairs of bf16.
pub struct Raw;
/// bf16 widened to float32.
pub struct Bf16;
/// f16 widened to float32.
pub struct F16;

// SAFETY: reads LANES * 4 bytes.
unsafe impl<V: Vector> Load<V> for Raw {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        // SAFETY: the module's contract.
        unsafe { V::load(p.cast()) }
    }
}
// SAFETY: reads LANES * 2 bytes.
unsafe impl<V: Vector> Load<V> for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        // SAFETY: the module's contract.
        unsafe { V::load_bf16(p.cast()) }
    }
}
// SAFETY: reads LANES * 2 bytes.
unsafe impl<V: Vector> Load<V> for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        // SAFETY: the module's contract.
        unsafe { V::load_f16(p.cast()) }
    }
}

/// LANES units from a row of which only `left` bytes remain; what is beyond them is zero and never read.
///
/// # Safety
/// `left` bytes are readable at `p`; the module's contract.
#[inline(always)]
pub unsafe fn load_upto<V: Vector, L: Load<V>>(p: *const u8, left: usize) -> V {
    // SAFETY: a whole vector is read only where enough bytes remain; else the remaining ones are copied first.
    unsafe {
        if left >= V::LANES * L::BYTES {
            return L::load(p);
        }
        let mut part = [0u8; MAX_LANES * 4];
        std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), left);
        L::load(part.as_ptr())
    }
}

/// Float32 operands: one FMA a unit.
pub struct Float<V>(std::marker::PhantomData<V>);

// SAFETY: forwards to V.
unsafe impl<V: Vector> Dot for Float<V> {
    type V = V;
    type B = V;
    const PAIR: usize = 1;
    #[inline(always)]
    unsafe fn splat(p: *const u32) -> V {
        // SAFETY: the module's contract.
        unsafe { V::splat(p.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> V {
        // SAFETY: as above.
        unsafe { V::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn dot(acc: V, a: V, b: V) -> V {
        // SAFETY: as above.
        unsafe { a.mul_add(b, acc) }
    }
    #[inline(always)]
    unsafe fn exp2(x: V) -> V {
        // SAFETY: as above.
        unsafe { x.exp2() }
    }
    #[inline(always)]
    unsafe fn put_p<const C: usize>(row: &[V; C], p: *mut u32, l: V) -> V {
        // SAFETY: as above.
        unsafe {
            // The row's own sum first: fewer additions of small numbers to a large l, each of which rounds l.
            let mut sum = row[0];
            row[0].store(p.cast());
            for (c, x) in row.iter().enumerate().skip(1) {
                x.store(p.cast::<f32>().add(c * V::LANES));
                sum = sum.add(*x);
            }
            l.add(sum)
        }
    }
}
