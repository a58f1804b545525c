//! The backward pass of one block of rows (queries of all heads of a group, folded) against one block of keys.
//!
//! ```text
//! s = q k^T -> p = 2^(s - lse)      dp = g v^T -> ds = p (dp - delta)      (g: gradient of the output)
//! dv += p^T g                       dk += ds^T q                           dq += ds k
//! ```
//! All five are register tiles of some rows by some vectors: an operand `a` of which one unit goes to all lanes, and an operand
//! `b` that lies in tiles `[steps][vectors]`. (On AVX-512, 8 x 3 and 6 x 4 reach 85 to 90% of what registers alone do, 12 x 2
//! with its 14 loads for 24 products 75%.) Scores have keys in their lanes, so p and ds lie `[row][key]`; where a unit
//! is a pair of bf16, two rows of a key make a unit for dv and dk (which sum over rows), and two keys of a row one for dq.
//! Nothing is transposed: both pairings come from the same accumulators.
//!
//! Tried on Sapphire Rapids, side by side, and not kept, for 0 to 1.5%: rows in the lanes in place of keys (then k and v are only
//! copied for each task), steps of a product written out by fours, twice the rows in a task. There a product alone reaches 0.87
//! to 0.95 of two multiply-adds a clock, registers alone 0.90 to 0.98, and the whole pass 80 to 84% of the latter from 4096
//! tokens on where nobody else is on the core.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs, and the field docs below
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use super::kernels::unroll;
use super::vector::{Dot, Float, Load, MAX_LANES, Vector, load_upto};
use crate::dtype::DType;

/// Rows and keys of a block: whole panels and whole tiles of every instruction set, and even.
pub const SIDE: usize = 96;
/// Most panels of a block: each has at least 4 rows.
const PANELS: usize = SIDE / 4;

/// What a kernel's register tiles are.
#[derive(Debug, Clone, Copy)]
pub struct Tiles {
    /// Rows of a panel of q.
    pub rows: usize,
    /// Keys of a tile of scores.
    pub keys: usize,
    /// Elements of head_dim of a tile of dq, dk and dv.
    pub width: usize,
    /// head_dim is padded to a multiple of this; a last tile is narrower.
    pub multiple: usize,
}

/// A block of rows against a block of keys. All buffers are the task's own while it runs.
pub struct Block {
    /// `[panel][units][M]`
    pub q: *const u32,
    /// gradient of the output, likewise
    pub g: *const u32,
    /// `[dp / width][SIDE / PAIR][width]`; the last tile may be narrower
    pub q_rows: *const u32,
    /// likewise
    pub g_rows: *const u32,
    /// `[SIDE / keys][units][keys]`
    pub k: *const u32,
    /// likewise
    pub v: *const u32,
    /// as `q_rows`
    pub k_rows: *const u32,
    /// `[2][SIDE]` log-sum-exp in base 2, +inf where nothing was seen; and what its rounding left
    pub lse: *const f32,
    /// `[SIDE]` gradient of the log-sum-exp minus the sum of `out * g`
    pub minus_delta: *const f32,
    /// `[SIDE / PAIR][SIDE]`, overwritten
    pub p: *mut u32,
    /// likewise
    pub ds: *mut u32,
    /// `[SIDE][SIDE / PAIR]`, overwritten; `ds` itself where PAIR is 1
    pub ds_keys: *mut u32,
    /// `[SIDE][dp]`, added to
    pub dq: *mut f32,
    /// likewise
    pub dk: *mut f32,
    /// likewise
    pub dv: *mut f32,
    /// units of a row: `dp / PAIR`
    pub units: usize,
    /// padded head_dim
    pub dp: usize,
    /// panels that have rows
    pub panels: usize,
    /// what makes q k^T scores in base 2, and what its rounding left
    pub scale: [f32; 2],
    /// row r sees keys `j < hi[r]` of the block, no fewer than the row before; null when all rows see all keys
    pub hi: *const i32,
}

/// What the backward pass asks of an operand type beside [`Dot`].
///
/// # Safety
/// As [`Vector`].
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Gradient: Dot {
    /// Stores the numbers of two neighbouring rows, C vectors of keys each, as units of `[rows / PAIR][SIDE]` from `p` on.
    unsafe fn put_rows<const C: usize>(x: &[Self::V; C], y: &[Self::V; C], p: *mut u32);
    /// Stores the numbers of a row as units of neighbouring keys; nothing where `put_rows` has done it.
    unsafe fn put_keys<const C: usize>(x: &[Self::V; C], p: *mut u32);
    /// SIDE rows (null = zeros) of `row_bytes` bytes to `[dp / width][SIDE / PAIR][width]`, zero beyond the row.
    unsafe fn pack_rows<L: Load<Self::V>>(
        rows: *const *const u8,
        row_bytes: usize,
        dp: usize,
        width: usize,
        dst: *mut u32,
    );
}

/// Where element `d` of step `j` lies in `[dp / width][steps][width]`.
#[inline(always)]
pub fn place(d: usize, j: usize, steps: usize, dp: usize, width: usize) -> usize {
    let from = d / width * width;
    from * steps + j * width.min(dp - from) + d - from
}

unsafe impl<V: Vector> Gradient for Float<V> {
    #[inline(always)]
    unsafe fn put_rows<const C: usize>(x: &[V; C], y: &[V; C], p: *mut u32) {
        for c in 0..C {
            x[c].store(p.add(c * V::LANES).cast());
            y[c].store(p.add(SIDE + c * V::LANES).cast());
        }
    }
    #[inline(always)]
    unsafe fn put_keys<const C: usize>(_x: &[V; C], _p: *mut u32) {}
    #[inline(always)]
    unsafe fn pack_rows<L: Load<V>>(rows: *const *const u8, row_bytes: usize, dp: usize, width: usize, dst: *mut u32) {
        for j in 0..SIDE {
            let row = *rows.add(j);
            for d in (0..dp).step_by(V::LANES) {
                let at = d * L::BYTES;
                let x = if row.is_null() || at >= row_bytes {
                    V::splat(0.0)
                } else {
                    load_upto::<V, L>(row.add(at), row_bytes - at)
                };
                x.store(dst.add(place(d, j, SIDE, dp, width)).cast());
            }
        }
    }
}

/// M rows (null = zeros) of `row_bytes` bytes to `[units][M]`, zero beyond the row. Up to 16 words beyond are overwritten.
#[inline(always)]
pub unsafe fn pack_panel<V: Vector, L: Load<V>, const M: usize>(
    rows: *const *const u8,
    row_bytes: usize,
    units: usize,
    dst: *mut u32,
) {
    let n = V::LANES;
    // A vector may be longer than what is left of a column: what it overwrites is stored after it.
    for r0 in (0..M).step_by(n).rev() {
        for u0 in (0..units).step_by(n) {
            let at = u0 * L::BYTES;
            let mut m = [V::splat(0.0); MAX_LANES];
            for i in 0..n.min(M - r0) {
                let row = *rows.add(r0 + i);
                if !row.is_null() && at < row_bytes {
                    m[i] = load_upto::<V, L>(row.add(at), row_bytes - at);
                }
            }
            V::transpose(&mut m);
            for i in 0..n {
                m[i].store(dst.add((u0 + i) * M + r0).cast());
            }
        }
    }
}

/// The sum of `a * b` over `n` elements.
#[inline(always)]
pub unsafe fn dot<V: Vector>(a: *const u8, a_dtype: DType, b: *const u8, b_dtype: DType, n: usize) -> f32 {
    let load = |p: *const u8, dtype| match dtype {
        DType::F32 => V::load(p.cast()),
        DType::BF16 => V::load_bf16(p.cast()),
        DType::F16 => V::load_f16(p.cast()),
    };
    let mut sum = V::splat(0.0);
    let mut d = 0;
    while d + V::LANES <= n {
        sum = load(a.add(d * a_dtype.size()), a_dtype).mul_add(load(b.add(d * b_dtype.size()), b_dtype), sum);
        d += V::LANES;
    }
    let mut total = sum.reduce_add();
    while d < n {
        total += a_dtype.read(a.add(d * a_dtype.size())) * b_dtype.read(b.add(d * b_dtype.size()));
        d += 1;
    }
    total
}

/// M x C vectors of `a b`: unit `k` of row r of `a` at `r * row + k * step`, `b` as `[steps][C vectors]`.
#[inline(always)]
unsafe fn product<D: Dot, const M: usize, const C: usize>(
    mut a: *const u32,
    row: usize,
    step: usize,
    mut b: *const u32,
    steps: usize,
) -> [[D::V; C]; M] {
    let lanes = D::V::LANES;
    let mut s = [[D::V::splat(0.0); C]; M];
    for _ in 0..steps {
        let mut y = [D::load(b); C];
        for c in 1..C {
            y[c] = D::load(b.add(c * lanes));
        }
        unroll!(r < M => {
            let x = D::splat(a.add(r * row));
            for c in 0..C {
                s[r][c] = D::dot(s[r][c], x, y[c]);
            }
        });
        a = a.add(step);
        b = b.add(C * lanes);
    }
    s
}

/// Adds M x C vectors to rows of `stride` float32.
#[inline(always)]
unsafe fn accumulate<V: Vector, const M: usize, const C: usize>(s: &[[V; C]; M], to: *mut f32, stride: usize) {
    unroll!(r < M => {
        for c in 0..C {
            let at = to.add(r * stride + c * V::LANES);
            V::load(at).add(s[r][c]).store(at);
        }
    });
}

/// p and ds of panel `panel` and tile `t`.
#[inline(always)]
unsafe fn scores<D: Gradient, const M: usize, const C: usize, const MASK: bool>(a: &Block, panel: usize, t: usize) {
    let (tile, r0) = (C * D::V::LANES, panel * M);
    let (scale, scale_rest) = (D::V::splat(a.scale[0]), D::V::splat(a.scale[1]));
    let s = product::<D, M, C>(a.q.add(r0 * a.units), 1, M, a.k.add(t * a.units * tile), a.units);
    let mut p = s;
    unroll!(r < M => {
        let (lse, lse_rest) = (D::V::splat(*a.lse.add(r0 + r)), D::V::splat(*a.lse.add(SIDE + r0 + r)));
        for c in 0..C {
            let mut x = s[r][c].mul_sub(scale, lse);
            if D::PAIR == 1 {
                // A rounded factor or sum would tilt all weights of a row alike, which does not average out.
                x = x.add(s[r][c].mul_sub(scale_rest, lse_rest));
            }
            if MASK {
                x = x.keep_below((t * tile + c * D::V::LANES) as i32, *a.hi.add(r0 + r));
            }
            p[r][c] = D::exp2(x);
        }
    });
    let mut ds = product::<D, M, C>(a.g.add(r0 * a.units), 1, M, a.v.add(t * a.units * tile), a.units);
    unroll!(r < M => {
        let delta = D::V::splat(*a.minus_delta.add(r0 + r));
        for c in 0..C {
            ds[r][c] = ds[r][c].add(delta).mul(p[r][c]);
        }
        D::put_keys(&ds[r], a.ds_keys.add(((r0 + r) * SIDE + t * tile) / D::PAIR));
    });
    unroll!(h < M / 2 => {
        let at = (r0 + 2 * h) / D::PAIR * SIDE + t * tile;
        D::put_rows(&p[2 * h], &p[2 * h + 1], a.p.add(at));
        D::put_rows(&ds[2 * h], &ds[2 * h + 1], a.ds.add(at));
    });
}

/// p and ds of panel `panel` and tile `t` where no row sees a key of it.
#[inline(always)]
unsafe fn hidden<D: Gradient, const M: usize, const C: usize>(a: &Block, panel: usize, t: usize) {
    let (tile, r0, zero) = (C * D::V::LANES, panel * M, [D::V::splat(0.0); C]);
    for r in 0..M {
        D::put_keys(&zero, a.ds_keys.add(((r0 + r) * SIDE + t * tile) / D::PAIR));
    }
    for r in (0..M).step_by(2) {
        let at = (r0 + r) / D::PAIR * SIDE + t * tile;
        D::put_rows(&zero, &zero, a.p.add(at));
        D::put_rows(&zero, &zero, a.ds.add(at));
    }
}

/// One block. Scores in tiles of M rows (even, at least 4) by C vectors, sums in tiles of R by W, or by T where that is all
/// that is left of head_dim.
#[inline(always)]
pub unsafe fn block<D: Gradient, const M: usize, const C: usize, const R: usize, const W: usize, const T: usize>(
    a: &Block,
) {
    let tile = C * D::V::LANES;
    // Keys of the block that each panel sees, in whole tiles: what lies beyond is zero and is left out of the sums.
    let mut seen = [SIDE; PANELS];
    if !a.hi.is_null() {
        for panel in 0..a.panels {
            seen[panel] = (*a.hi.add(panel * M + M - 1)).max(0) as usize;
            seen[panel] = seen[panel].next_multiple_of(tile).min(SIDE);
        }
    }
    for t in 0..SIDE / tile {
        for panel in 0..a.panels {
            if seen[panel] <= t * tile {
                hidden::<D, M, C>(a, panel, t);
            } else if a.hi.is_null() {
                scores::<D, M, C, false>(a, panel, t);
            } else {
                scores::<D, M, C, true>(a, panel, t);
            }
        }
    }
    let mut d = 0;
    while d + W * D::V::LANES <= a.dp {
        sums::<D, M, R, W>(a, &seen, d);
        d += W * D::V::LANES;
    }
    while d < a.dp {
        sums::<D, M, R, T>(a, &seen, d);
        d += T * D::V::LANES;
    }
}

/// The share of the block in W vectors of dv, dk and dq from element `d` on.
#[inline(always)]
unsafe fn sums<D: Gradient, const M: usize, const R: usize, const W: usize>(
    a: &Block,
    seen: &[usize; PANELS],
    d: usize,
) {
    let (width, from, rows) = (W * D::V::LANES, d * SIDE / D::PAIR, a.panels * M);
    // R keys at a time, over the rows from the first panel that sees one of them.
    for (p, b, to) in [(a.p.cast_const(), a.g_rows, a.dv), (a.ds.cast_const(), a.q_rows, a.dk)] {
        let mut first = 0;
        for j in (0..SIDE).step_by(R) {
            while first < a.panels && seen[first] <= j {
                first += 1;
            }
            if first == a.panels {
                break;
            }
            let skip = first * M / D::PAIR;
            let s =
                product::<D, R, W>(p.add(skip * SIDE + j), 1, SIDE, b.add(from + skip * width), rows / D::PAIR - skip);
            accumulate(&s, to.add(j * a.dp + d), a.dp);
        }
    }
    for r in (0..rows).step_by(R) {
        let steps = seen[(r + R - 1).min(rows - 1) / M] / D::PAIR;
        let s = product::<D, R, W>(a.ds_keys.add(r * SIDE / D::PAIR), SIDE / D::PAIR, 1, a.k_rows.add(from), steps);
        accumulate(&s, a.dq.add(r * a.dp + d), a.dp);
    }
}
