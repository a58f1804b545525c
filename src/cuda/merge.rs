//! `merge_partials` on a GPU: lists of partials, and splits that lie evenly in a workspace.

use super::kernels::{MERGE, MERGE_ROWS, MERGE_SPLITS};
use super::launch::{Context, param};
use super::params::{MAX_PARTIALS, Merge, dtype};
use super::views::contiguous;
use super::views::{MOST, aligned, countable};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::shapes;
use crate::tensor::{TensorMut, TensorRef};

/// Elements that a lane takes at a time.
const WIDE: usize = 4;
/// Partials from which on several warps share a row, as long as rows are few.
const MANY: usize = 8;

/// Partials that lie evenly in a workspace.
#[derive(Debug, Clone, Copy)]
pub struct Splits {
    /// float32 `[batch, q_heads, q_len, head_dim]`, the first.
    pub outs: u64,
    /// float32 `[batch, q_heads, q_len]`, the first.
    pub lses: u64,
    /// How many.
    pub count: usize,
    /// Bytes between outs.
    pub out_stride: usize,
    /// Bytes between lses.
    pub lse_stride: usize,
}

/// Joins partials over disjoint keys: `outs[i]` `[batch, q_heads, q_len, head_dim]` with `lses[i]` `[batch, q_heads, q_len, 1]`
/// float32. A partial whose lse is -inf is not read, so its out may be anything.
///
/// # Errors
/// When shapes or dtypes differ, there are more than [`MAX_PARTIALS`], or the driver refuses.
///
/// # Safety
/// All views are memory of `cx.device`, valid until the stream has come to its end.
pub unsafe fn merge_partials(
    outs: &[TensorRef],
    lses: &[TensorRef],
    out: TensorMut,
    lse: Option<TensorMut>,
    cx: &Context,
) -> Result<()> {
    shapes::merge(outs, lses, &out, lse.as_ref())?;
    if outs.len() > MAX_PARTIALS {
        return Err(Error::value("outs", format!("at most {MAX_PARTIALS} partials in one call on a GPU"), outs.len()));
    }
    let mut call = Merge { count: outs.len() as i32, is_list: 1, ..joined(&out, lse.as_ref()) };
    let mut wide = call.wide != 0;
    for (n, (o, s)) in outs.iter().zip(lses).enumerate() {
        (call.outs[n], call.lses[n], call.in_dtype[n]) = (o.into(), s.into(), dtype(o.dtype()));
        wide &= aligned(&call.outs[n], WIDE * o.dtype().size());
    }
    call.wide = i32::from(wide);
    // SAFETY: the caller's promise.
    unsafe { launch(&call, out.shape(), cx) }
}

/// Joins the splits of a workspace into `out` and `lse`.
///
/// # Errors
/// When the call is too large, or the driver refuses.
///
/// # Safety
/// As [`merge_partials`]; the splits have the shape of `out`, and begin at multiples of 16 bytes.
pub unsafe fn merge_splits(parts: &Splits, out: TensorMut, lse: Option<TensorMut>, cx: &Context) -> Result<()> {
    let [_, heads, len, head_dim] = out.shape();
    let rows = |ptr, width| contiguous(ptr, heads, len, width);
    let mut call = Merge {
        count: parts.count as i32,
        split_stride: parts.out_stride as i64,
        lse_split_stride: parts.lse_stride as i64,
        ..joined(&out, lse.as_ref())
    };
    (call.outs[0], call.lses[0], call.in_dtype[0]) =
        (rows(parts.outs, head_dim), rows(parts.lses, 1), dtype(DType::F32));
    call.wide &= i32::from(aligned(&call.outs[0], WIDE * 4) && parts.out_stride.is_multiple_of(WIDE * 4));
    // SAFETY: the caller's promise.
    unsafe { launch(&call, out.shape(), cx) }
}

/// A call without its partials.
fn joined(out: &TensorMut, lse: Option<&TensorMut>) -> Merge {
    let [batch, heads, len, head_dim] = out.shape();
    let view = out.into();
    Merge {
        out: view,
        lse: lse.map_or(0, |l| l.start() as u64),
        lse_stride: lse.map_or([0; 3], |l| l.byte_strides().map(|s| s as i64)),
        batch: batch as i32,
        heads: heads as i32,
        len: len as i32,
        head_dim: head_dim as i32,
        out_dtype: dtype(out.dtype()),
        wide: i32::from(head_dim.is_multiple_of(WIDE) && aligned(&view, WIDE * out.dtype().size())),
        ..Merge::default()
    }
}

unsafe fn launch(call: &Merge, shape: [usize; 4], cx: &Context) -> Result<()> {
    for (name, n) in ["batch rows", "heads", "queries", "elements of a head"].into_iter().zip(shape) {
        countable(name, n, MOST)?;
    }
    let rows = call.batch as usize * call.heads as usize * call.len as usize;
    let shape = || {
        let Merge { batch, heads, len, head_dim, count, .. } = call;
        format!("{count} partials [{batch}, {heads}, {len}, {head_dim}]")
    };
    let (kernel, blocks) = if call.count as usize >= MANY && rows < 16 * cx.device.sms as usize {
        (&MERGE_SPLITS, rows)
    } else {
        (&MERGE, rows.div_ceil(MERGE_ROWS))
    };
    let Ok(blocks) = u32::try_from(blocks) else {
        return Err(Error::Device(format!("{} {}: too many rows for a launch", kernel.entry, shape())));
    };
    // SAFETY: the caller's promise; the parameter is what the kernels' signature says.
    unsafe { cx.launch(kernel, [blocks, 1, 1], &mut [param(call)], &shape) }
}
