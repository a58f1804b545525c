//! Codes to numbers and numbers to codes, a vector at a time; `quant.rs` has the rule, one number at a time.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs, and the field docs below
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // channels are indices of several arrays

use super::kernels::finish_row;
use super::rowwise::Block;
use super::vector::{Dot, Float, MAX_LANES, Vector};
use crate::args::Rows;
use crate::dtype::DType;
use crate::quant::{Axis, Codes, GROUP, f32_to_e4m3, int4_shift, scale_offset};

/// Most channels of a row.
pub const MAX_WIDTH: usize = 256;

/// One kind of code.
///
/// # Safety
/// As [`Vector`].
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Code {
    /// Which.
    const CODES: Codes;
    /// Channel `i` of LANES units of keys, one unit a token.
    unsafe fn key<V: Vector>(p: *const u8, i: usize) -> V;
    /// Channels `i * LANES ..` of the 64 at `p` of a value.
    unsafe fn value<V: Vector>(p: *const u8, i: usize) -> V;
}

/// [`Codes::Int8`].
pub struct Int8;
/// [`Codes::Int4`].
pub struct Int4;
/// [`Codes::Fp8`].
pub struct Fp8;

unsafe impl Code for Int8 {
    const CODES: Codes = Codes::Int8;
    #[inline(always)]
    unsafe fn key<V: Vector>(p: *const u8, i: usize) -> V {
        V::unit_i8(p, i)
    }
    #[inline(always)]
    unsafe fn value<V: Vector>(p: *const u8, i: usize) -> V {
        V::load_i8(p.add(i * V::LANES))
    }
}
unsafe impl Code for Int4 {
    const CODES: Codes = Codes::Int4;
    #[inline(always)]
    unsafe fn key<V: Vector>(p: *const u8, i: usize) -> V {
        V::unit_low4(p, int4_shift(i))
    }
    #[inline(always)]
    unsafe fn value<V: Vector>(p: *const u8, i: usize) -> V {
        let at = i * V::LANES;
        if at < GROUP / 2 { V::load_low4(p.add(at)) } else { V::load_high4(p.add(at - GROUP / 2)) }
    }
}
unsafe impl Code for Fp8 {
    const CODES: Codes = Codes::Fp8;
    #[inline(always)]
    unsafe fn key<V: Vector>(p: *const u8, i: usize) -> V {
        V::unit_e4m3(p, i)
    }
    #[inline(always)]
    unsafe fn value<V: Vector>(p: *const u8, i: usize) -> V {
        V::load_e4m3(p.add(i * V::LANES))
    }
}

/// How decode takes codes as operands.
///
/// # Safety
/// As [`Vector`].
pub unsafe trait Codewise<C: Code>: Dot {
    /// q k^T in base 2 of R rows and a group's 64 keys, to `out` `[R][64]`; see `compact::scores`.
    unsafe fn scores<const R: usize>(a: &Block, out: *mut f32);
    /// Accumulators that one `load_v` serves, at most 4.
    const PART: usize;
    /// 64 channels of two v rows (for PAIR 1 only `a` is read): the operands of accumulators `part * PART ..`.
    unsafe fn load_v(a: *const u8, b: *const u8, part: usize) -> [Self::B; 4];
    /// Which of the 64 channels lane `lane` of accumulator `i` holds.
    fn order(i: usize, lane: usize) -> usize;
}

unsafe impl<V: Vector, C: Code> Codewise<C> for Float<V> {
    #[inline(always)]
    unsafe fn scores<const R: usize>(a: &Block, out: *mut f32) {
        super::compact::scores_float::<V, C, R>(a, out);
    }
    const PART: usize = if V::LANES == 16 { 4 } else { 2 };
    #[inline(always)]
    unsafe fn load_v(a: *const u8, _b: *const u8, part: usize) -> [V; 4] {
        let mut found = [V::splat(0.0); 4];
        for i in 0..<Self as Codewise<C>>::PART {
            found[i] = C::value(a, part * <Self as Codewise<C>>::PART + i);
        }
        found
    }
    fn order(i: usize, lane: usize) -> usize {
        i * V::LANES + lane
    }
}

/// Rows of codes to dense rows.
pub struct Dequantize {
    /// codes and params; for k all rows are of one group of tokens
    pub rows: Rows,
    /// k or v
    pub axis: Axis,
    /// rows
    pub n: usize,
    /// codes of a row
    pub width: usize,
    /// elements wanted
    pub head_dim: usize,
    /// of the result
    pub dtype: DType,
    /// `[n][head_dim]`
    pub dst: *mut u8,
    /// bytes between its rows
    pub dst_stride: usize,
}

/// See [`Dequantize`].
#[inline(always)]
pub unsafe fn dequantize<V: Vector>(a: &Dequantize) {
    match a.rows.codes {
        Some(Codes::Int8) => each::<V, Int8>(a),
        Some(Codes::Int4) => each::<V, Int4>(a),
        Some(Codes::Fp8) => each::<V, Fp8>(a),
        None => {
            for j in 0..a.n {
                let row = a.rows.ptr.add(j * a.rows.stride);
                std::ptr::copy_nonoverlapping(row, a.dst.add(j * a.dst_stride), a.head_dim * a.dtype.size());
            }
        }
    }
}

#[inline(always)]
unsafe fn each<V: Vector, C: Code>(a: &Dequantize) {
    match a.axis {
        Axis::Channel => keys::<V, C>(a),
        Axis::Token => each_value::<V, C>(a),
    }
}

/// Tiles of LANES channels by LANES tokens, turned over.
#[inline(always)]
unsafe fn keys<V: Vector, C: Code>(a: &Dequantize) {
    let mut rows = [[0.0f32; MAX_WIDTH]; GROUP];
    let fold = C::CODES.fold();
    let (first, last) = (a.rows.first, a.rows.first + a.n);
    for t in (first / V::LANES * V::LANES..last).step_by(V::LANES) {
        for c in (0..a.width).step_by(V::LANES) {
            let mut tile = [V::splat(0.0); MAX_LANES];
            for i in 0..V::LANES {
                let c = c + i;
                let unit = a.rows.ptr.add((c / fold * GROUP + t) * 4);
                let scale = V::splat(DType::F16.read(a.rows.params.add(c).cast()));
                let offset = V::splat(DType::F16.read(a.rows.params.add(a.width + c).cast()));
                tile[i] = C::key::<V>(unit, c % fold).mul_add(scale, offset);
            }
            V::transpose(&mut tile);
            for i in 0..V::LANES {
                tile[i].store(rows[t + i].as_mut_ptr().add(c));
            }
        }
    }
    for j in 0..a.n {
        finish_row::<V>(rows[first + j].as_ptr(), 1.0, a.head_dim, a.dtype, a.dst.add(j * a.dst_stride));
    }
}

#[inline(always)]
unsafe fn each_value<V: Vector, C: Code>(a: &Dequantize) {
    let mut row = [0.0f32; MAX_WIDTH];
    let groups = a.width / GROUP;
    for j in 0..a.n {
        for g in 0..groups {
            let p = a.rows.ptr.add(j * a.rows.stride + g * C::CODES.bytes(GROUP));
            let at = |g: usize| a.rows.params.cast::<u8>().add(g * a.rows.params_stride + 2 * j);
            let (scale, offset) = (V::splat(DType::F16.read(at(g))), V::splat(DType::F16.read(at(groups + g))));
            for i in 0..GROUP / V::LANES {
                let x = C::value::<V>(p, i).mul_add(scale, offset);
                x.store(row.as_mut_ptr().add(g * GROUP + i * V::LANES));
            }
        }
        finish_row::<V>(row.as_ptr(), 1.0, a.head_dim, a.dtype, a.dst.add(j * a.dst_stride));
    }
}

/// Dense rows to codes: of k a group of tokens, of v some tokens.
pub struct Quantize {
    /// first row
    pub src: *const u8,
    /// bytes between rows
    pub src_stride: usize,
    /// of the rows
    pub dtype: DType,
    /// rows, 1..=64
    pub n: usize,
    /// elements of a row
    pub head_dim: usize,
    /// codes of a row; those beyond head_dim become 0
    pub width: usize,
    /// what to write
    pub codes: Codes,
    /// k or v
    pub axis: Axis,
    /// first row of codes; of k the group
    pub dst: *mut u8,
    /// bytes between rows of v
    pub dst_stride: usize,
    /// as in [`Rows`]
    pub params: *mut u16,
    /// as in [`Rows`]
    pub params_stride: usize,
}

/// See [`Quantize`].
#[inline(always)]
pub unsafe fn quantize<V: Vector>(a: &Quantize) {
    let mut x = [[0.0f32; MAX_WIDTH]; GROUP];
    for j in 0..a.n {
        widen::<V>(a.src.add(j * a.src_stride), a.dtype, a.head_dim, &mut x[j]);
    }
    let x = &x[..a.n];
    let mut scale = [0.0f32; MAX_WIDTH];
    let mut offset = [0.0f32; MAX_WIDTH];
    match a.axis {
        Axis::Channel => {
            let (mut least, mut most, mut sum) = (x[0], x[0], [0.0f32; MAX_WIDTH]);
            for row in x {
                for c in 0..MAX_WIDTH {
                    least[c] = if row[c] < least[c] { row[c] } else { least[c] };
                    most[c] = if row[c] > most[c] { row[c] } else { most[c] };
                    sum[c] += row[c] * 0.0; // NaN where a number is none: comparisons pass it over
                }
            }
            for c in 0..a.head_dim {
                (scale[c], offset[c]) = scale_offset(a.codes, least[c] + sum[c], most[c]);
            }
            for c in 0..a.width {
                a.params.add(c).write_unaligned(half::f16::from_f32(scale[c]).to_bits());
                a.params.add(a.width + c).write_unaligned(half::f16::from_f32(offset[c]).to_bits());
            }
            for j in 0..a.n {
                encode(&x[j], &scale, &offset, a, j);
            }
        }
        Axis::Token => {
            let groups = a.width / GROUP;
            for j in 0..a.n {
                for g in 0..groups {
                    let part = &x[j][g * GROUP..((g + 1) * GROUP).min(a.head_dim)];
                    let (mut least, mut most, mut sum) = (part[0], part[0], 0.0);
                    for v in part {
                        least = if *v < least { *v } else { least };
                        most = if *v > most { *v } else { most };
                        sum += v * 0.0;
                    }
                    let (s, b) = scale_offset(a.codes, least + sum, most);
                    scale[g * GROUP..(g + 1) * GROUP].fill(s);
                    offset[g * GROUP..(g + 1) * GROUP].fill(b);
                    let at = |g: usize| a.params.cast::<u8>().add(g * a.params_stride + 2 * j).cast::<u16>();
                    at(g).write_unaligned(half::f16::from_f32(s).to_bits());
                    at(groups + g).write_unaligned(half::f16::from_f32(b).to_bits());
                }
                // Channels beyond head_dim stand for the offset: code 0.
                scale[a.head_dim..].fill(0.0);
                encode(&x[j], &scale, &offset, a, j);
            }
        }
    }
}

#[inline(always)]
unsafe fn widen<V: Vector>(src: *const u8, dtype: DType, n: usize, dst: &mut [f32; MAX_WIDTH]) {
    let mut d = 0;
    while d + V::LANES <= n {
        let p = src.add(d * dtype.size());
        let x = match dtype {
            DType::F32 => V::load(p.cast()),
            DType::BF16 => V::load_bf16(p.cast()),
            DType::F16 => V::load_f16(p.cast()),
        };
        x.store(dst.as_mut_ptr().add(d));
        d += V::LANES;
    }
    while d < n {
        dst[d] = dtype.read(src.add(d * dtype.size()));
        d += 1;
    }
}

/// Row j's codes. Left to the compiler to vectorise: it does, for every instruction set.
#[inline(always)]
unsafe fn encode(x: &[f32; MAX_WIDTH], scale: &[f32; MAX_WIDTH], offset: &[f32; MAX_WIDTH], a: &Quantize, j: usize) {
    /// 1.5 * 2^23: adding it rounds to an integer, to even, which the low bits then are.
    const ROUND: f32 = 12_582_912.0;
    let mut code = [0u8; MAX_WIDTH];
    let (low, steps) = a.codes.range();
    let high = low + steps;
    let steps_of = |c: usize| {
        let y = if scale[c] == 0.0 { 0.0 } else { (x[c] - offset[c]) / scale[c] };
        let y = if y > low { y } else { low };
        if y < high { y } else { high }
    };
    match a.codes {
        Codes::Int8 => {
            for c in 0..MAX_WIDTH {
                code[c] = (steps_of(c) + ROUND).to_bits() as u8;
            }
        }
        Codes::Fp8 => {
            for c in 0..MAX_WIDTH {
                code[c] = f32_to_e4m3(steps_of(c));
            }
        }
        Codes::Int4 => {
            for c in 0..MAX_WIDTH {
                code[c] = ((steps_of(c) + (ROUND + 8.0)).to_bits() & 15) as u8;
            }
        }
    }
    match (a.axis, a.codes) {
        (Axis::Token, Codes::Int4) => {
            let dst = a.dst.add(j * a.dst_stride);
            for g in 0..a.width / GROUP {
                for i in 0..GROUP / 2 {
                    *dst.add(g * GROUP / 2 + i) = code[g * GROUP + i] | code[g * GROUP + GROUP / 2 + i] << 4;
                }
            }
        }
        (Axis::Token, _) => std::ptr::copy_nonoverlapping(code.as_ptr(), a.dst.add(j * a.dst_stride), a.width),
        (Axis::Channel, codes) => {
            for (u, x) in code[..a.width].chunks_exact(codes.fold()).enumerate() {
                let unit = match codes {
                    Codes::Int4 => (0..8).fold(0, |unit, i| unit | u32::from(x[i]) << int4_shift(i)),
                    _ => u32::from_le_bytes([x[0], x[1], x[2], x[3]]),
                };
                a.dst.cast::<u32>().add(u * GROUP + j).write_unaligned(unit.to_le());
            }
        }
    }
}
