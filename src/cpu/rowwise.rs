//! Decode: up to 8 rows (the heads of a group times a few queries) against keys taken straight from row-major memory.
//!
//! Nothing is packed: at so few rows the cache is read at the speed of memory, so every K and V byte is touched once,
//! in order, and the arithmetic stays in registers. R rows x KT keys = 16 dot products accumulate side by side and are
//! summed across lanes together ([`Vector::sum16`], about 3 operations a product).
//!
//! Memory is kept busy in both halves of a block: while k is multiplied this block's v rows are asked for, while v is
//! multiplied the next block's k rows. A fixed distance ahead in the same stream alone (4 to 32 KiB) reached 66 to 70% of
//! raw read speed (one thread, 32 heads on 8, head_dim 128, bf16, Zen 5) where this reaches 80 to 84%.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs, and the field docs below
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use super::vector::{Dot, Load, Vector};

/// Keys handled between two looks at the running reference.
pub const BLOCK: usize = 64;
/// Rows ahead in the same stream that are asked for once more: the CPU drops requests when its queue is full.
const NEAR: usize = 16;

/// How decode reads rows: `CHUNK` elements of k as operand units, and v rows (in pairs where PAIR is 2).
///
/// # Safety
/// As [`Vector`]; loads touch CHUNK elements.
pub unsafe trait Rows: Dot {
    /// Source bytes of CHUNK elements.
    const CHUNK_BYTES: usize;
    /// Elements in a chunk: LANES * PAIR.
    const CHUNK: usize;
    /// A chunk of a k row, as operand units.
    unsafe fn load_k(p: *const u8) -> Self::B;
    /// The same chunk of two v rows as PAIR operand vectors (for PAIR 1 only `a` is read), so that
    /// `dot(acc[i], p, result[i])` adds `p_a * a + p_b * b` for the elements `order(i, lane)`.
    unsafe fn load_v(a: *const u8, b: *const u8) -> [Self::B; 2];
    /// Which element of the chunk lane `lane` of accumulator `i` holds.
    fn order(i: usize, lane: usize) -> usize;
}

/// Float32 arithmetic over rows of any dtype.
pub struct FloatRows<V, L>(std::marker::PhantomData<(V, L)>);

unsafe impl<V: Vector, L: Load<V>> Dot for FloatRows<V, L> {
    type V = V;
    type B = V;
    const PAIR: usize = 1;
    #[inline(always)]
    unsafe fn splat(p: *const u32) -> V {
        V::splat(p.cast::<f32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> V {
        V::load(p.cast())
    }
    #[inline(always)]
    unsafe fn dot(acc: V, a: V, b: V) -> V {
        a.mul_add(b, acc)
    }
    #[inline(always)]
    unsafe fn exp2(x: V) -> V {
        x.exp2()
    }
    #[inline(always)]
    unsafe fn put_p<const C: usize>(row: &[V; C], p: *mut u32, l: V) -> V {
        super::vector::Float::<V>::put_p(row, p, l)
    }
}
unsafe impl<V: Vector, L: Load<V>> Rows for FloatRows<V, L> {
    const CHUNK_BYTES: usize = V::LANES * L::BYTES;
    const CHUNK: usize = V::LANES;
    #[inline(always)]
    unsafe fn load_k(p: *const u8) -> V {
        L::load(p)
    }
    #[inline(always)]
    unsafe fn load_v(a: *const u8, _b: *const u8) -> [V; 2] {
        let x = L::load(a);
        [x, x]
    }
    fn order(_i: usize, lane: usize) -> usize {
        lane
    }
}

/// R rows against a run of at most [`BLOCK`] keys.
pub struct Block {
    /// `[R][chunks * LANES]` operand units
    pub q: *const u32,
    /// first k row; `n` rows `k_stride` bytes apart
    pub k: *const u8,
    /// see `k`
    pub k_stride: usize,
    /// first v row
    pub v: *const u8,
    /// see `v`
    pub v_stride: usize,
    /// keys, 1..=BLOCK
    pub n: usize,
    /// `[R]` running reference, log2
    pub m: *mut f32,
    /// `[R][LANES]`
    pub l: *mut f32,
    /// `[R][chunks * CHUNK]` in [`Rows::order`]
    pub o: *mut f32,
    /// `[R][BLOCK]` float32 scores, then operand units of probabilities
    pub s: *mut f32,
    /// chunks of a row (the row is a whole number of them)
    pub chunks: usize,
    /// what makes q k^T scores in base 2: see `Scores::scaling`
    pub scale: f32,
    /// row r sees keys `j < hi[r]` of the block
    pub hi: *const i32,
    /// what a block with compact k or v needs besides
    pub codes: BlockCodes,
}

/// Where codes come in; unused where k and v are dense.
#[derive(Clone, Copy)]
pub struct BlockCodes {
    /// `[R][width]` float32: q times what makes scores in base 2 (the block's `scale` is 1 then)
    pub q: *const f32,
    /// codes of a row
    pub width: usize,
    /// k's params, see `args::Rows`
    pub k_params: *const u16,
    /// v's params
    pub v_params: *const u16,
    /// bytes between those of 64 channels
    pub v_params_stride: usize,
    /// which token of the group at k the first row is
    pub k_first: usize,
    /// where the next block's k begins
    pub k_next: *const u8,
    /// cache lines of a block of k
    pub k_lines: usize,
    /// cache lines of a block of v
    pub v_lines: usize,
    /// scratch for operands: `[R][max(width, BLOCK) / PAIR]` units
    pub units: *mut u32,
}

/// `R * KT == 16`; `PC` accumulators for each row in the p v pass (a multiple of PAIR).
#[inline(always)]
pub unsafe fn block<D: Rows, const R: usize, const KT: usize, const PC: usize>(a: &Block) {
    scores::<D, R, KT>(a);
    softmax::<D, R, true>(a);
    values::<D, R, PC>(a);
}

/// S = q k^T, KT keys at a time.
#[inline(always)]
pub unsafe fn scores<D: Rows, const R: usize, const KT: usize>(a: &Block) {
    let lanes = D::V::LANES;
    let width = a.chunks * lanes;
    let mut j = 0;
    while j < a.n {
        let mut acc = [D::V::splat(0.0); 16];
        let mut at = [a.k; KT];
        for t in 0..KT {
            // Past the end the last key stands in; its score is masked below.
            at[t] = a.k.add((j + t).min(a.n - 1) * a.k_stride);
        }
        for c in 0..a.chunks {
            let mut b = [D::splat(a.q); KT];
            for t in 0..KT {
                b[t] = D::load_k(at[t].add(c * D::CHUNK_BYTES));
                D::V::prefetch(a.v.wrapping_add((j + t) * a.v_stride + c * D::CHUNK_BYTES));
                D::V::prefetch(at[t].wrapping_add(NEAR * a.k_stride + c * D::CHUNK_BYTES));
            }
            for r in 0..R {
                let x = D::load(a.q.add(r * width + c * lanes));
                for t in 0..KT {
                    acc[r * KT + t] = D::dot(acc[r * KT + t], x, b[t]);
                }
            }
        }
        let mut sums = [0.0f32; 16];
        D::V::sum16(&acc, sums.as_mut_ptr());
        for r in 0..R {
            for t in 0..KT {
                a.s.add(r * BLOCK + j + t).write(sums[r * KT + t]);
            }
        }
        j += KT;
    }
}

/// Scores to probabilities, a row at a time: operand units if UNITS, else float32 and zeros to the end of the block.
#[inline(always)]
pub unsafe fn softmax<D: Dot, const R: usize, const UNITS: bool>(a: &Block) {
    let lanes = D::V::LANES;
    // The row of o, whichever way it is laid out.
    let wide = if UNITS { a.chunks * lanes * D::PAIR } else { a.codes.width };
    let scale = D::V::splat(a.scale);
    for r in 0..R {
        let s = a.s.add(r * BLOCK);
        let hi = (*a.hi.add(r)).min(a.n as i32);
        let mut top = D::V::splat(f32::NEG_INFINITY);
        if hi == BLOCK as i32 {
            for i in (0..BLOCK).step_by(lanes) {
                top = top.max(D::V::load(s.add(i)));
            }
        } else {
            for i in (0..a.n).step_by(lanes) {
                let x = D::V::load(s.add(i)).keep_below(i as i32, hi);
                x.store(s.add(i));
                top = top.max(x);
            }
        }
        let new = top.reduce_max() * a.scale;
        let old = *a.m.add(r);
        if new > old + 8.0 {
            *a.m.add(r) = new;
            let f = D::V::splat(old - new).exp2();
            let l = a.l.add(r * lanes);
            D::V::load(l).mul(f).store(l);
            for d in (0..wide).step_by(lanes) {
                let o = a.o.add(r * wide + d);
                D::V::load(o).mul(f).store(o);
            }
        }
        let m = D::V::splat(*a.m.add(r));
        let mut l = D::V::load(a.l.add(r * lanes));
        // Units are written over the scores: never ahead of what is read.
        if !UNITS {
            for i in (0..BLOCK).step_by(lanes) {
                let mut x = D::V::splat(0.0);
                if i < a.n {
                    x = D::exp2(D::V::load(s.add(i)).mul_sub(scale, m));
                    l = l.add(x);
                }
                x.store(s.add(i));
            }
        } else if D::PAIR == 2 {
            for i in (0..a.n).step_by(2 * lanes) {
                let x = D::exp2(D::V::load(s.add(i)).mul_sub(scale, m));
                let y = if i + lanes < a.n {
                    D::exp2(D::V::load(s.add(i + lanes)).mul_sub(scale, m))
                } else {
                    D::V::splat(0.0)
                };
                l = D::put_p(&[x, y], s.add(i / 2).cast(), l);
            }
        } else {
            for i in (0..a.n).step_by(lanes) {
                let x = D::exp2(D::V::load(s.add(i)).mul_sub(scale, m));
                l = D::put_p(&[x], s.add(i).cast(), l);
            }
        }
        l.store(a.l.add(r * lanes));
    }
}

/// o += p v, PC accumulators a row at a time; v rows are read in runs of PC * lanes elements.
#[inline(always)]
pub unsafe fn values<D: Rows, const R: usize, const PC: usize>(a: &Block) {
    let per = PC / D::PAIR;
    let mut c0 = 0;
    while c0 < a.chunks {
        let cn = per.min(a.chunks - c0);
        if cn == per {
            pv::<D, R, PC>(a, c0, per);
        } else {
            for c in c0..a.chunks {
                pv_one::<D, R>(a, c);
            }
        }
        c0 += cn;
    }
}

#[inline(always)]
unsafe fn pv<D: Rows, const R: usize, const PC: usize>(a: &Block, c0: usize, per: usize) {
    let lanes = D::V::LANES;
    let mut acc = [[D::V::splat(0.0); PC]; R];
    let mut j = 0;
    let mut v0 = a.v.add(c0 * D::CHUNK_BYTES);
    while j < a.n {
        let v1 = if D::PAIR == 2 && j + 1 < a.n { v0.add(a.v_stride) } else { v0 };
        let mut b = [D::splat(a.q); PC];
        for c in 0..PC / D::PAIR {
            let at = c * D::CHUNK_BYTES;
            for i in 0..D::PAIR {
                D::V::prefetch(v0.wrapping_add((i + NEAR) * a.v_stride + at));
            }
            let x = D::load_v(v0.add(at), v1.add(at));
            for i in 0..D::PAIR {
                b[c * D::PAIR + i] = x[i];
            }
        }
        for r in 0..R {
            let p = D::splat(a.s.add(r * BLOCK + j / D::PAIR).cast());
            for c in 0..PC {
                acc[r][c] = D::dot(acc[r][c], p, b[c]);
            }
        }
        if c0 == 0 {
            for i in 0..D::PAIR {
                let next = a.k.wrapping_add((a.n + j + i) * a.k_stride);
                for c in 0..a.chunks {
                    D::V::prefetch(next.wrapping_add(c * D::CHUNK_BYTES));
                }
            }
        }
        j += D::PAIR;
        v0 = v0.wrapping_add(D::PAIR * a.v_stride);
    }
    for r in 0..R {
        let o = a.o.add(r * a.chunks * D::CHUNK + c0 * D::CHUNK);
        for c in 0..per * D::PAIR {
            D::V::load(o.add(c * lanes)).add(acc[r][c]).store(o.add(c * lanes));
        }
    }
}

#[inline(always)]
unsafe fn pv_one<D: Rows, const R: usize>(a: &Block, c: usize) {
    if D::PAIR == 2 { pv::<D, R, 2>(a, c, 1) } else { pv::<D, R, 1>(a, c, 1) }
}
