//! `rope_apply` on a GPU.

use super::kernels::{ROPE, ROPE_TOKENS};
use super::launch::{Context, param};
use super::params::{MAX_PAIRS, Rope, Rotation};
use super::views::{MOST, aligned, countable};
use crate::error::{Error, Result};
use crate::shapes;
use crate::tensor::{TensorMut, TensorRef};

/// Positions on the device: int64 `[len]` for all batch rows, or `[batch, len]`, contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Positions {
    /// Where they are.
    pub at: u64,
    /// Elements from batch row to batch row: len, or 0 where all have the same.
    pub batch_stride: usize,
}

/// What kernels are told of a rotation.
pub fn rotation(positions: Positions, turns: &[u64], scaling: f64) -> Rotation {
    let mut padded = [0; MAX_PAIRS];
    padded[..turns.len()].copy_from_slice(turns);
    Rotation {
        positions: positions.at,
        position_stride: positions.batch_stride as i64,
        pairs: turns.len() as i32,
        scaling: scaling as f32,
        turns: padded,
    }
}

/// Rotates q and (optionally) k `[batch, heads, len, head_dim]` into outputs of the same shape and dtype, which may be the
/// inputs themselves. `turns` come from [`crate::rope::turns`]. A position outside of what is served gives NaN.
///
/// # Errors
/// When shapes or dtypes don't fit, or the driver refuses.
///
/// # Safety
/// All views and positions are memory of `cx.device`, valid until the stream has come to its end.
pub unsafe fn rope_apply(
    pairs: &[(&str, TensorRef, TensorMut)],
    positions: Positions,
    turns: &[u64],
    scaling: f64,
    cx: &Context,
) -> Result<()> {
    shapes::rope(pairs, turns, scaling)?;
    let Some((_, q, q_out)) = pairs.first() else { return Ok(()) };
    let (dtype, [batch, q_heads, len, q_dim]) = (q.dtype(), q.shape());
    for (_, x, _) in pairs {
        countable("tokens", len, MOST)?;
        countable("heads", x.shape()[1], 1 << 16)?;
        countable("elements of a head", x.shape()[3], 1 << 12)?;
    }
    let mut call = Rope {
        q: q.into(),
        q_out: q_out.into(),
        q_heads: q_heads as i32,
        len: len as i32,
        q_dim: q_dim as i32,
        rotation: rotation(positions, turns, scaling),
        ..Rope::default()
    };
    if let Some((name, k, k_out)) = pairs.get(1) {
        if k.dtype() != dtype {
            return Err(Error::type_(name, format!("the dtype of q, {}", dtype.name()), k.dtype().name()));
        }
        let [_, heads, _, dim] = k.shape();
        (call.k, call.k_out, call.kv_heads, call.k_dim) = (k.into(), k_out.into(), heads as i32, dim as i32);
    }
    let parts = [turns.len(), q_dim, call.k_dim as usize].iter().all(|n| (n * dtype.size()).is_multiple_of(16));
    let views = [&call.q, &call.q_out, &call.k, &call.k_out];
    call.wide = i32::from(parts && views.iter().all(|v| aligned(v, 16)));
    let grid = [len.div_ceil(ROPE_TOKENS) as u32, batch as u32, 1];
    let shape = || format!("q [{batch}, {q_heads}, {len}, {q_dim}], k of {} heads", call.kv_heads);
    // SAFETY: the caller's promise; the parameter is what the kernels' signature says.
    unsafe { cx.launch(ROPE.of(dtype), grid, &mut [param(&call)], &shape) }
}
