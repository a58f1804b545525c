//! `rope_apply` on the CPU: one token at a time, all its heads, rotated in float32 and rounded once.

use crate::cpu::vector::Vector;
use crate::cpu::{Context, isa, pool};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::rope::{MAX_POSITION, cos_sin};
use crate::shapes::{self, MAX_PAIRS};
use crate::tensor::{TensorMut, TensorRef};

/// The rows of one token to rotate by its position.
pub struct Rotation<'a> {
    pos: i64,
    turns: &'a [u64],
    scaling: f64,
    batch: usize,
    token: usize,
    pairs: &'a [(TensorRef<'a>, TensorMut<'a>)],
}

/// Rotates one token: `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)` over the two halves of the first
/// `2 * turns.len()` elements of each head; the rest is copied.
///
/// # Safety
/// The CPU has V's instruction set; views hold the token (batch, token).
#[inline(always)]
pub unsafe fn rotate_rows<V: Vector>(a: &Rotation) {
    let half = a.turns.len();
    let (mut cos, mut sin) = ([0.0f32; MAX_PAIRS], [0.0f32; MAX_PAIRS]);
    cos_sin(a.pos, a.turns, a.scaling, &mut cos[..half], &mut sin[..half]);
    for (src, dst) in a.pairs {
        let [_, heads, _, head_dim] = src.shape();
        for h in 0..heads {
            let (from, to) = (src.row(a.batch, h, a.token), dst.row(a.batch, h, a.token));
            // SAFETY: rows of head_dim elements inside checked views; vectors stay below `half`, and both halves are
            // read before either is written, so `to == from` is fine.
            unsafe {
                match src.dtype() {
                    DType::F32 => rotate_f32::<V>(from.cast(), to.cast(), &cos[..half], &sin[..half]),
                    d => rotate_16::<V>(d, from, to, &cos[..half], &sin[..half]),
                }
                let (at, n) = (2 * half * src.dtype().size(), (head_dim - 2 * half) * src.dtype().size());
                std::ptr::copy(from.add(at), to.add(at), n);
            }
        }
    }
}

#[inline(always)]
unsafe fn rotate_f32<V: Vector>(from: *const f32, to: *mut f32, cos: &[f32], sin: &[f32]) {
    // SAFETY: the caller's.
    unsafe {
        let half = cos.len();
        let mut d = 0;
        while d + V::LANES <= half {
            let (x, y) = (V::load(from.add(d)), V::load(from.add(d + half)));
            let (c, s) = (V::load(cos.as_ptr().add(d)), V::load(sin.as_ptr().add(d)));
            x.mul_sub(c, y.mul(s)).store(to.add(d));
            y.mul_add(c, x.mul(s)).store(to.add(d + half));
            d += V::LANES;
        }
        for d in d..half {
            let (x, y) = (from.add(d).read_unaligned(), from.add(d + half).read_unaligned());
            to.add(d).write_unaligned(x * cos[d] - y * sin[d]);
            to.add(d + half).write_unaligned(y * cos[d] + x * sin[d]);
        }
    }
}

#[inline(always)]
unsafe fn rotate_16<V: Vector>(dtype: DType, from: *const u8, to: *mut u8, cos: &[f32], sin: &[f32]) {
    // SAFETY: the caller's.
    unsafe {
        let half = cos.len();
        let (src, dst) = (from.cast::<u16>(), to.cast::<u16>());
        let mut d = 0;
        while d + V::LANES <= half {
            let load = |p| if dtype == DType::BF16 { V::load_bf16(p) } else { V::load_f16(p) };
            let store = |x: V, p| if dtype == DType::BF16 { x.store_bf16(p) } else { x.store_f16(p) };
            let (x, y) = (load(src.add(d)), load(src.add(d + half)));
            let (c, s) = (V::load(cos.as_ptr().add(d)), V::load(sin.as_ptr().add(d)));
            store(x.mul_sub(c, y.mul(s)), dst.add(d));
            store(y.mul_add(c, x.mul(s)), dst.add(d + half));
            d += V::LANES;
        }
        for d in d..half {
            let (x, y) = (dtype.read(from.add(2 * d)), dtype.read(from.add(2 * (d + half))));
            dtype.write(to.add(2 * d), x * cos[d] - y * sin[d]);
            dtype.write(to.add(2 * (d + half)), y * cos[d] + x * sin[d]);
        }
    }
}

/// Rotates q and (optionally) k `[batch, heads, len, head_dim]` into outputs of the same shape and dtype, which may be
/// the inputs themselves. `positions` has `batch * len` entries, or `len` for all rows; `turns` come from
/// [`crate::rope::turns`], one for each pair of elements.
///
/// # Errors
/// When shapes, dtypes or positions don't fit.
pub fn rope_apply(
    pairs: &[(&str, TensorRef, TensorMut)],
    positions: &[i64],
    turns: &[u64],
    scaling: f64,
    cx: &Context,
) -> Result<()> {
    let Some((_, q, _)) = pairs.first() else { return Ok(()) };
    let [batch, _, len, _] = q.shape();
    shapes::rope(pairs, turns, scaling)?;
    if positions.len() != len && positions.len() != batch * len {
        return Err(Error::value("positions", format!("[{batch}, {len}], [1, {len}] or [{len}]"), positions.len()));
    }
    if let Some(p) = positions.iter().find(|p| !(0..MAX_POSITION).contains(*p)) {
        return Err(Error::value("positions", "numbers from 0 to 2^40", p));
    }
    let kernels = isa::active()?.kernels;
    let views: Vec<_> = pairs.iter().map(|(_, s, d)| (*s, *d)).collect();
    // Small shares, so that threads stay even; a decode step stays on the calling thread.
    const SHARE: usize = 16;
    pool::run(cx, (batch * len).div_ceil(SHARE), 4, |share| {
        for i in share * SHARE..((share + 1) * SHARE).min(batch * len) {
            let pos = positions[if positions.len() == len { i % len } else { i }];
            let a = Rotation { pos, turns, scaling, batch: i / len, token: i % len, pairs: &views };
            // SAFETY: `active` chose kernels this CPU has; the token is inside the views, and only this task has it.
            unsafe { (kernels.rotate)(&a) }
        }
    })
}
