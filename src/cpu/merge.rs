//! `merge_partials` on the CPU: joins partial outputs by their log-sum-exps, in float32.

use crate::cpu::vector::Vector;
use crate::cpu::{Context, isa, pool};
use crate::dtype::DType;
use crate::error::Result;
use crate::shapes;
use crate::softmax::merge_weights;
use crate::tensor::{TensorMut, TensorRef};

/// `acc[i] += w * x[i]` for n elements of a row in any dtype.
///
/// # Safety
/// The CPU has V's instruction set; n elements at both pointers.
#[inline(always)]
pub unsafe fn accumulate<V: Vector>(acc: *mut f32, x: *const u8, dtype: DType, w: f32, n: usize) {
    // SAFETY: the caller's; vectors stay below n.
    unsafe {
        let f = V::splat(w);
        let mut d = 0;
        while d + V::LANES <= n {
            let p = x.add(d * dtype.size());
            let v = match dtype {
                DType::F32 => V::load(p.cast()),
                DType::BF16 => V::load_bf16(p.cast()),
                DType::F16 => V::load_f16(p.cast()),
            };
            v.mul_add(f, V::load(acc.add(d))).store(acc.add(d));
            d += V::LANES;
        }
        for d in d..n {
            *acc.add(d) += w * dtype.read(x.add(d * dtype.size()));
        }
    }
}

/// Joins partials over disjoint keys: `outs[i]` `[batch, q_heads, q_len, head_dim]` with `lses[i]`
/// `[batch, q_heads, q_len, 1]` float32. A partial whose lse is -inf is not read, so its out may be anything.
///
/// # Errors
/// When shapes or dtypes differ.
pub fn merge_partials(
    outs: &[TensorRef],
    lses: &[TensorRef],
    out: TensorMut,
    lse: Option<TensorMut>,
    cx: &Context,
) -> Result<()> {
    shapes::merge(outs, lses, &out, lse.as_ref())?;
    let shape = outs[0].shape();
    let kernels = isa::active()?.kernels;
    let [batch, heads, len, head_dim] = shape;
    let total = batch * heads * len;
    const SHARE: usize = 64;
    pool::run(cx, total.div_ceil(SHARE), 4, |share| {
        let mut weights = vec![0.0f32; outs.len()];
        let mut acc = vec![0.0f32; head_dim];
        for row in share * SHARE..((share + 1) * SHARE).min(total) {
            let (b, h, i) = (row / (heads * len), row / len % heads, row % len);
            // SAFETY: one float32 inside a checked view.
            let read = |s: &TensorRef| unsafe { DType::F32.read(s.row(b, h, i)) };
            let joined = merge_weights(lses.iter().map(read), &mut weights);
            acc.fill(0.0);
            for (o, w) in outs.iter().zip(&weights) {
                if *w != 0.0 {
                    // SAFETY: `active` chose kernels this CPU has; head_dim elements inside a checked view.
                    unsafe { (kernels.accumulate)(acc.as_mut_ptr(), o.row(b, h, i), o.dtype(), *w, head_dim) }
                }
            }
            // SAFETY: as above; this task alone writes the row.
            unsafe {
                (kernels.finish)(acc.as_ptr(), 1.0, head_dim, out.dtype(), out.row(b, h, i));
                if let Some(lse) = &lse {
                    DType::F32.write(lse.row(b, h, i), joined);
                }
            }
        }
    })
}
