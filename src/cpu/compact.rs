//! Decode over compact keys and values: codes become operands in registers, scales never touch them.
//!
//! `q (s c + b) = (q s) c + q b`: a group's scales go into q, once for its 64 keys, and its offsets make one number for
//! each row. Keys lie channel by channel within their group: lanes are tokens, and nothing is summed across lanes (with
//! keys in rows that took half the time of int4). `p (s c + b) = (p s) c + p b`: a token's scale goes into its probability, its offset into a sum that every
//! channel gets. What is left for each element is to spread it and to multiply: for int4 on AVX-512 a shift and a table
//! lookup (VPERMW) for 32 elements.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs, and the field docs of Block
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use super::codes::{Code, Codewise};
use super::rowwise::{BLOCK, Block};
use super::vector::{Dot, Float, Vector};
use crate::quant::GROUP;

/// S = q k^T in base 2 over the keys of one group, or some of them.
#[inline(always)]
pub unsafe fn scores<D: Codewise<C>, C: Code, const R: usize>(a: &Block) {
    if a.codes.k_first == 0 {
        D::scores::<R>(a, a.s);
        return;
    }
    // The whole group, then the part that is asked for; a page's edge or padding, so seldom.
    let mut all = [[0.0f32; BLOCK]; R];
    D::scores::<R>(a, all.as_mut_ptr().cast());
    for r in 0..R {
        std::ptr::copy_nonoverlapping(all[r].as_ptr().add(a.codes.k_first), a.s.add(r * BLOCK), a.n);
    }
}

/// q times the scales of a group's channels, as `D`'s operand units `[R][width / PAIR]`; returns what its offsets add to
/// every score of a row.
#[inline(always)]
pub unsafe fn scale_q<D: Dot, const R: usize>(a: &Block, dst: *mut u32) -> [f32; R] {
    let (lanes, width) = (D::V::LANES, a.codes.width);
    let mut add = [0.0f32; R];
    for r in 0..R {
        let mut sum = D::V::splat(0.0);
        for c in (0..width).step_by(lanes * D::PAIR) {
            let mut x = [D::V::splat(0.0); 2];
            for i in 0..D::PAIR {
                let at = c + i * lanes;
                let q = D::V::load(a.codes.q.add(r * width + at));
                sum = q.mul_add(D::V::load_f16(a.codes.k_params.add(width + at)), sum);
                x[i] = q.mul(D::V::load_f16(a.codes.k_params.add(at)));
            }
            put::<D>(&x, dst.add((r * width + c) / D::PAIR));
        }
        add[r] = sum.reduce_add();
    }
    add
}

/// Asks for the `per` cache lines from the `n * per`-th on: a block's lines, shared out over the steps of a loop.
#[inline(always)]
pub unsafe fn ask_for<V: Vector>(p: *const u8, per: usize, n: usize) {
    for line in 0..per {
        V::prefetch(p.wrapping_add((n * per + line) * 64));
    }
}

/// `Codewise::scores` in float32: lanes are tokens, one channel after the other.
#[inline(always)]
pub unsafe fn scores_float<V: Vector, C: Code, const R: usize>(a: &Block, out: *mut f32) {
    // 8 accumulators suit 16 registers; 16 would be better where there are 32, and wider vectors mean there are.
    let most = if V::LANES == 16 { 16 } else { 8 };
    let add = scale_q::<Float<V>, R>(a, a.codes.units);
    let q: *const f32 = a.codes.units.cast();
    let (width, fold) = (a.codes.width, C::CODES.fold());
    let tv = (most / R).clamp(1, 4);
    let units = width / fold;
    let per = a.codes.v_lines.div_ceil(GROUP / (tv * V::LANES) * units);
    for t0 in (0..GROUP).step_by(tv * V::LANES) {
        let mut acc = [[V::splat(0.0); 4]; R];
        for u in 0..units {
            ask_for::<V>(a.v, per, t0 / (tv * V::LANES) * units + u);
            let unit = a.k.add((u * GROUP + t0) * 4);
            for i in 0..fold {
                for t in 0..tv {
                    let b = C::key::<V>(unit.add(t * V::LANES * 4), i);
                    for r in 0..R {
                        acc[r][t] = V::splat(*q.add(r * width + u * fold + i)).mul_add(b, acc[r][t]);
                    }
                }
            }
        }
        for r in 0..R {
            for t in 0..tv {
                acc[r][t].add(V::splat(add[r])).store(out.add(r * BLOCK + t0 + t * V::LANES));
            }
        }
    }
}

/// o += p v, RP rows at a time (`R` is a multiple of it).
#[inline(always)]
pub unsafe fn values<D: Codewise<C>, C: Code, const R: usize, const RP: usize>(a: &Block) {
    let (lanes, width) = (D::V::LANES, a.codes.width);
    let groups = width / GROUP;
    let units = BLOCK / D::PAIR;
    let per = a.codes.k_lines.div_ceil(groups * units);
    for g in 0..groups {
        let at = |g: usize| a.codes.v_params.cast::<u8>().add(g * a.codes.v_params_stride).cast::<u16>();
        let (mut scale, mut offset) = (at(g), at(groups + g));
        let mut short = [[0u16; BLOCK]; 2];
        if a.n < BLOCK {
            // Nothing beyond the run may be read: it may lie outside the page.
            std::ptr::copy_nonoverlapping(scale, short[0].as_mut_ptr(), a.n);
            std::ptr::copy_nonoverlapping(offset, short[1].as_mut_ptr(), a.n);
            (scale, offset) = (short[0].as_ptr(), short[1].as_ptr());
        } else {
            D::V::prefetch(scale.wrapping_add(BLOCK).cast());
            D::V::prefetch(scale.wrapping_add(BLOCK + 32).cast());
            D::V::prefetch(offset.wrapping_add(BLOCK).cast());
            D::V::prefetch(offset.wrapping_add(BLOCK + 32).cast());
        }
        let mut add = [0.0f32; R];
        for r in 0..R {
            let mut sum = D::V::splat(0.0);
            for j in (0..BLOCK).step_by(lanes * D::PAIR) {
                let mut x = [D::V::splat(0.0); 2];
                for i in 0..D::PAIR {
                    let p = D::V::load(a.s.add(r * BLOCK + j + i * lanes));
                    sum = p.mul_add(D::V::load_f16(offset.add(j + i * lanes)), sum);
                    x[i] = p.mul(D::V::load_f16(scale.add(j + i * lanes)));
                }
                put::<D>(&x, a.codes.units.add(r * units + j / D::PAIR));
            }
            add[r] = sum.reduce_add();
        }
        for part in 0..GROUP / lanes / D::PART {
            for r0 in (0..R).step_by(RP) {
                let mut acc = [[D::V::splat(0.0); 4]; RP];
                let mut j = 0;
                let mut v0 = a.v.add(g * C::CODES.bytes(GROUP));
                while j < a.n {
                    let v1 = if D::PAIR == 2 && j + 1 < a.n { v0.add(a.v_stride) } else { v0 };
                    let b = D::load_v(v0, v1, part);
                    for r in 0..RP {
                        let p = D::splat(a.codes.units.add((r0 + r) * units + j / D::PAIR));
                        for c in 0..D::PART {
                            acc[r][c] = D::dot(acc[r][c], p, b[c]);
                        }
                    }
                    if part == 0 && r0 == 0 {
                        // The next block's keys, while this one's values are multiplied.
                        ask_for::<D::V>(a.codes.k_next, per, g * (BLOCK / D::PAIR) + j / D::PAIR);
                    }
                    j += D::PAIR;
                    v0 = v0.wrapping_add(D::PAIR * a.v_stride);
                }
                for r in 0..RP {
                    let o = a.o.add((r0 + r) * width + g * GROUP + part * D::PART * lanes);
                    let bias = D::V::splat(add[r0 + r]);
                    for c in 0..D::PART {
                        D::V::load(o.add(c * lanes)).add(acc[r][c].add(bias)).store(o.add(c * lanes));
                    }
                }
            }
        }
    }
}

/// PAIR vectors of numbers as operand units, in order.
#[inline(always)]
unsafe fn put<D: Dot>(x: &[D::V; 2], p: *mut u32) {
    if D::PAIR == 2 {
        D::put_p::<2>(x, p, D::V::splat(0.0));
    } else {
        D::put_p::<1>(&[x[0]], p, D::V::splat(0.0));
    }
}
