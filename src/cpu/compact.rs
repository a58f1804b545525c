//! Decode over compact keys and values: codes become operands in registers, scales never touch them.
//!
//! `q (s c + b) = (q s) c + q b`: a group's scales go into q, once for its 64 keys, and its offsets make one number for
//! each row. `p (s c + b) = (p s) c + p b`: a token's scale goes into its probability, its offset into a sum that every
//! channel gets. What is left for each element is to spread it and to multiply: for int4 on AVX-512 two table lookups
//! (VPERMW) for 64 elements.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs, and the field docs of Block
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use super::codes::{Code, Codewise};
use super::rowwise::{BLOCK, Block};
use super::vector::Vector;
use crate::quant::GROUP;

/// Keys ahead in the same stream that are asked for: the CPU's own prefetcher stops at each 4 KiB page.
const AHEAD: usize = BLOCK;

/// S = q k^T in base 2 over one group's keys (or fewer), KT at a time; `R * KT == 16`.
#[inline(always)]
pub unsafe fn scores<D: Codewise<C>, C: Code, const R: usize, const KT: usize>(a: &Block) {
    let (lanes, width) = (D::V::LANES, a.codes.width);
    let step = lanes * D::PAIR;
    let mut add = [0.0f32; R];
    for r in 0..R {
        let mut sum = D::V::splat(0.0);
        for c in (0..width).step_by(step) {
            let mut x = [D::V::splat(0.0); 2];
            for i in 0..D::PAIR {
                let at = c + i * lanes;
                let q = D::V::load(a.codes.q.add(r * width + at));
                sum = q.mul_add(D::V::load_f16(a.codes.k_params.add(width + at)), sum);
                x[i] = q.mul(D::V::load_f16(a.codes.k_params.add(at)));
            }
            put::<D>(&x, a.codes.units.add((r * width + c) / D::PAIR));
        }
        add[r] = sum.reduce_add();
    }
    let units = width / D::PAIR;
    let mut j = 0;
    while j < a.n {
        let mut acc = [D::V::splat(0.0); 16];
        let mut at = [a.k; KT];
        for t in 0..KT {
            // Past the end the last key stands in; its score is masked.
            at[t] = a.k.add((j + t).min(a.n - 1) * a.k_stride);
            for line in (0..a.codes.v_bytes).step_by(64) {
                D::V::prefetch(a.v.wrapping_add((j + t) * a.v_stride + line));
            }
        }
        for g in 0..width / GROUP {
            for i in 0..GROUP / step {
                let mut b = [D::splat(a.codes.units); KT];
                for t in 0..KT {
                    b[t] = D::load_k(at[t].add(g * C::BYTES), i);
                }
                for r in 0..R {
                    let x = D::load(a.codes.units.add(r * units + g * GROUP / D::PAIR + i * lanes));
                    for t in 0..KT {
                        acc[r * KT + t] = D::dot(acc[r * KT + t], x, b[t]);
                    }
                }
            }
        }
        let mut sums = [0.0f32; 16];
        D::V::sum16(&acc, sums.as_mut_ptr());
        for r in 0..R {
            for t in 0..KT {
                a.s.add(r * BLOCK + j + t).write(sums[r * KT + t] + add[r]);
            }
        }
        j += KT;
    }
}

/// o += p v, RP rows at a time (`R` is a multiple of it).
#[inline(always)]
pub unsafe fn values<D: Codewise<C>, C: Code, const R: usize, const RP: usize>(a: &Block) {
    let (lanes, width) = (D::V::LANES, a.codes.width);
    let groups = width / GROUP;
    let units = BLOCK / D::PAIR;
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
                let mut v0 = a.v.add(g * C::BYTES);
                while j < a.n {
                    let v1 = if D::PAIR == 2 && j + 1 < a.n { v0.add(a.v_stride) } else { v0 };
                    let b = D::load_v(v0, v1, part);
                    for r in 0..RP {
                        let p = D::splat(a.codes.units.add((r0 + r) * units + j / D::PAIR));
                        for c in 0..D::PART {
                            acc[r][c] = D::dot(acc[r][c], p, b[c]);
                        }
                    }
                    if g == 0 && part == 0 && r0 == 0 {
                        for i in 0..D::PAIR {
                            let next = a.k.wrapping_add((AHEAD + j + i) * a.k_stride);
                            for line in (0..a.codes.k_bytes).step_by(64) {
                                D::V::prefetch(next.wrapping_add(line));
                            }
                        }
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
unsafe fn put<D: super::vector::Dot>(x: &[D::V; 2], p: *mut u32) {
    if D::PAIR == 2 {
        D::put_p::<2>(x, p, D::V::splat(0.0));
    } else {
        D::put_p::<1>(&[x[0]], p, D::V::splat(0.0));
    }
}
