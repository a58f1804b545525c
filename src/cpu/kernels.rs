//! The kernels, written once over [`Vector`] and [`Dot`]; `arch/` compiles them per instruction set.
//!
//! Prefill works on *panels* of R rows (queries of all heads of a group, folded) against a *block* of keys that was
//! packed once for all panels of the task:
//!
//! ```text
//! q panel [units][R]      k block [units][keys]     v block [keys / PAIR][head_dim_padded]     (32-bit units)
//! S = q k^T in R x C vector accumulators -> online softmax in registers -> p [R][keys / PAIR] -> o += p v
//! ```
//! The running reference m moves only when a score exceeds it by 8 in log2 (an eager rescale costs 9%), l is kept
//! per lane and summed once at the end, and each block's p v starts at zero and is added to o, which makes the
//! summation over keys two-level: in float32 a row of 2^20 terms then loses no more than its 2^14 block sums do.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs, and the field docs below
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use super::vector::{Dot, Load, MAX_LANES, Vector, load_upto};

/// Score excess (log2) above the running reference that makes a rescale: 2^8 is far from any overflow.
const SLACK: f32 = 8.0;
/// Reference before any key was seen: finite, so that -inf minus it stays -inf.
pub const M_INIT: f32 = -1e30;

/// One panel against one block. All buffers are the task's own scratch.
pub struct Panel {
    /// `[units][R]`
    pub q: *const u32,
    /// `[units][keys]`
    pub k: *const u32,
    /// `[keys / PAIR][dp]`
    pub v: *const u32,
    /// `[R][keys / PAIR]`, overwritten
    pub p: *mut u32,
    /// `[R]` running reference in log2
    pub m: *mut f32,
    /// `[R][LANES]` running sums, lane-wise
    pub l: *mut f32,
    /// `[R][dp]` running output, unnormalised
    pub o: *mut f32,
    /// units of a row of q and k: `dp / PAIR`
    pub units: usize,
    /// head_dim padded to the kernel's multiple
    pub dp: usize,
    /// what makes q k^T scores in base 2: see `Scores::scaling`
    pub scale: f32,
    /// row r sees keys `j < hi[r]` of the block (blocks begin at the first visible key); null when all rows see all keys
    pub hi: *const i32,
}

/// Repeats a block with `$r` = 0, 1 ... $n - 1 as constants ($n up to 12). A `for` is left to LLVM, which stops unrolling
/// past a size and then keeps the accumulators in memory: float32 ran at half its speed.
macro_rules! unroll {
    ($r:ident < $n:expr => $body:block) => {
        unroll!(@ $r, $n, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $r:ident, $n:expr, $body:block, $($i:literal)*) => {
        $(if $i < $n {
            let $r: usize = $i;
            $body
        })*
    };
}
pub(super) use unroll;

#[inline(always)]
unsafe fn max_of<V: Vector, const C: usize>(row: &[V; C]) -> V {
    let mut t = row[0];
    for x in &row[1..] {
        t = t.max(*x);
    }
    t
}

/// R rows, QK tiles of C vectors, T tiles a block; PV tiles of PR rows by PC vectors (PR divides R).
#[inline(always)]
pub unsafe fn panel<D: Dot, const R: usize, const C: usize, const T: usize, const PR: usize, const PC: usize>(
    a: &Panel,
) {
    if a.hi.is_null() {
        panel_masked::<D, R, C, T, PR, PC, false>(a);
    } else {
        panel_masked::<D, R, C, T, PR, PC, true>(a);
    }
}

#[inline(always)]
unsafe fn panel_masked<
    D: Dot,
    const R: usize,
    const C: usize,
    const T: usize,
    const PR: usize,
    const PC: usize,
    const MASK: bool,
>(
    a: &Panel,
) {
    let lanes = D::V::LANES;
    let keys = T * C * lanes;
    let p_stride = keys / D::PAIR;
    let scale = D::V::splat(a.scale);
    for t in 0..T {
        // S = q k^T: R x C accumulators live in registers.
        let mut s = [[D::V::splat(0.0); C]; R];
        let (mut q, mut k) = (a.q, a.k.add(t * C * lanes));
        for _ in 0..a.units {
            let mut b = [D::load(k); C];
            for c in 1..C {
                b[c] = D::load(k.add(c * lanes));
            }
            unroll!(r < R => {
                let x = D::splat(q.add(r));
                for c in 0..C {
                    s[r][c] = D::dot(s[r][c], x, b[c]);
                }
            });
            q = q.add(R);
            k = k.add(keys);
        }
        if MASK {
            unroll!(r < R => {
                let hi = *a.hi.add(r);
                for c in 0..C {
                    s[r][c] = s[r][c].keep_below(((t * C + c) * lanes) as i32, hi);
                }
            });
        }
        // Does any score exceed its row's reference by more than SLACK?
        let mut excess = D::V::splat(f32::NEG_INFINITY);
        unroll!(r < R => {
            // In this order a NaN in one row can't hide another row's excess.
            excess = max_of(&s[r]).mul_sub(scale, D::V::splat(*a.m.add(r))).max(excess);
        });
        if excess.any_gt(SLACK) {
            // Rare after the first blocks. Nothing is called here, so the accumulators need not be spilled for it.
            let mut top = [0.0f32; R];
            unroll!(r < R => {
                top[r] = max_of(&s[r]).reduce_max();
            });
            for r in 0..R {
                let new = top[r] * a.scale;
                let old = *a.m.add(r);
                if new > old {
                    *a.m.add(r) = new;
                    let f = D::V::splat(old - new).exp2();
                    let l = a.l.add(r * lanes);
                    D::V::load(l).mul(f).store(l);
                    let o = a.o.add(r * a.dp);
                    let mut d = 0;
                    while d < a.dp {
                        D::V::load(o.add(d)).mul(f).store(o.add(d));
                        d += lanes;
                    }
                    // Earlier tiles of this block wait in p, which is float32 whenever there is more than one tile.
                    for i in 0..t * C {
                        let p = a.p.add(r * p_stride + i * lanes).cast::<f32>();
                        D::V::load(p).mul(f).store(p);
                    }
                }
            }
        }
        unroll!(r < R => {
            let m = D::V::splat(*a.m.add(r));
            let mut e = s[r];
            for c in 0..C {
                e[c] = D::exp2(s[r][c].mul_sub(scale, m));
            }
            let l = a.l.add(r * lanes);
            D::put_p(&e, a.p.add(r * p_stride + t * C * lanes / D::PAIR), D::V::load(l)).store(l);
        });
    }
    // o += p v
    let steps = keys / D::PAIR;
    for r0 in (0..R).step_by(PR) {
        let mut d = 0;
        while d < a.dp {
            let o = a.o.add(r0 * a.dp + d);
            let mut s = [[D::V::splat(0.0); PC]; PR];
            let (mut p, mut v) = (a.p.add(r0 * p_stride), a.v.add(d));
            for _ in 0..steps {
                let mut b = [D::load(v); PC];
                for c in 1..PC {
                    b[c] = D::load(v.add(c * lanes));
                }
                unroll!(r < PR => {
                    let x = D::splat(p.add(r * p_stride));
                    for c in 0..PC {
                        s[r][c] = D::dot(s[r][c], x, b[c]);
                    }
                });
                p = p.add(1);
                v = v.add(a.dp);
            }
            unroll!(r < PR => {
                for c in 0..PC {
                    let at = o.add(r * a.dp + c * lanes);
                    D::V::load(at).add(s[r][c]).store(at);
                }
            });
            d += PC * lanes;
        }
    }
}

/// Packs `keys` rows (a multiple of LANES; null = zeros) of `row_bytes` bytes into `[units][keys]`.
/// `units` is a multiple of LANES; what lies beyond the row is zero.
#[inline(always)]
pub unsafe fn pack_k<V: Vector, L: Load<V>>(
    rows: *const *const u8,
    keys: usize,
    row_bytes: usize,
    units: usize,
    dst: *mut u32,
) {
    let n = V::LANES;
    for k0 in (0..keys).step_by(n) {
        for u0 in (0..units).step_by(n) {
            let at = u0 * L::BYTES;
            let mut m = [V::splat(0.0); MAX_LANES];
            for i in 0..n {
                let row = *rows.add(k0 + i);
                if !row.is_null() && at < row_bytes {
                    m[i] = load_upto::<V, L>(row.add(at), row_bytes - at);
                }
            }
            V::transpose(&mut m);
            for i in 0..n {
                m[i].store(dst.add((u0 + i) * keys + k0).cast());
            }
        }
    }
}

/// Copies `keys` rows (null = zeros) of `row_bytes` bytes into float32 `[keys][dp]`, zero beyond the row.
#[inline(always)]
pub unsafe fn pack_v<V: Vector, L: Load<V>>(
    rows: *const *const u8,
    keys: usize,
    row_bytes: usize,
    dp: usize,
    dst: *mut u32,
) {
    for j in 0..keys {
        let row = *rows.add(j);
        for d in (0..dp).step_by(V::LANES) {
            let at = d * L::BYTES;
            let x = if row.is_null() || at >= row_bytes {
                V::splat(0.0)
            } else {
                load_upto::<V, L>(row.add(at), row_bytes - at)
            };
            x.store(dst.add(j * dp + d).cast());
        }
    }
}

/// Writes one finished row `o / l` in the caller's dtype; `n` elements.
#[inline(always)]
pub unsafe fn finish_row<V: Vector>(o: *const f32, inv: f32, n: usize, dtype: crate::dtype::DType, dst: *mut u8) {
    use crate::dtype::DType;
    let f = V::splat(inv);
    let mut d = 0;
    while d + V::LANES <= n {
        let x = V::load(o.add(d)).mul(f);
        let at = dst.add(d * dtype.size());
        match dtype {
            DType::F32 => x.store(at.cast()),
            DType::BF16 => x.store_bf16(at.cast()),
            DType::F16 => x.store_f16(at.cast()),
        }
        d += V::LANES;
    }
    while d < n {
        dtype.write(dst.add(d * dtype.size()), *o.add(d) * inv);
        d += 1;
    }
}
