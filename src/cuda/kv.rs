//! `kv_append` and `kv_read` on a GPU: rows into pages, rotated and made compact on the way, and out of them.

use super::kernels::{KV_APPEND, KV_READ, kv_smem};
use super::launch::{Context, param};
use super::params::{self, Append, Read, Rotation};
use super::views::{MOST, aligned, countable};
use crate::args::Side;
use crate::error::{Error, Result};
use crate::quant::{Axis, GROUP};
use crate::shapes::{self, SideMut};
use crate::tensor::{TensorMut, TensorRef};

/// Writes rows `[batch, kv_heads, n, head_dim]` of keys and values at token `at` of a page; keys rotated on the way where there
/// is a rotation ([`super::rope::rotation`]), exactly as `rope_apply` and then this would have it.
///
/// # Errors
/// When shapes or dtypes don't fit, `at` is no first token of a group of compact keys, or the driver refuses.
///
/// # Safety
/// All views and positions are memory of `cx.device`, valid until the stream has come to its end.
pub unsafe fn kv_append(
    k: TensorRef,
    v: TensorRef,
    page_k: SideMut,
    page_v: SideMut,
    at: usize,
    rotation: Option<Rotation>,
    cx: &Context,
) -> Result<()> {
    shapes::append("k", &k, &page_k, at)?;
    shapes::append("v", &v, &page_v, at)?;
    let dtype = k.dtype();
    if v.dtype() != dtype {
        return Err(Error::type_("v", format!("the dtype of k, {}", dtype.name()), v.dtype().name()));
    }
    if v.shape() != k.shape() {
        return Err(Error::value("v", format!("the shape of k, {:?}", k.shape()), format!("{:?}", v.shape())));
    }
    let [batch, heads, len, head_dim] = k.shape();
    countable("tokens of the page", at + len, MOST)?;
    let rotation = rotation.unwrap_or_default();
    if rotation.pairs as usize * 2 > head_dim {
        let want = format!("at most {} frequencies for head_dim {head_dim}", head_dim / 2);
        return Err(Error::value("inv_freq", want, rotation.pairs));
    }
    let mut call = Append {
        k: (&k).into(),
        v: (&v).into(),
        page_k: (&page_k).into(),
        page_v: (&page_v).into(),
        heads: heads as i32,
        len: len as i32,
        head_dim: head_dim as i32,
        at: at as i32,
        dtype: params::dtype(dtype),
        rotation,
        ..Append::default()
    };
    let whole = [head_dim, rotation.pairs as usize].iter().all(|n| (n * dtype.size()).is_multiple_of(16));
    let dense = |s: &params::Side| s.format != 0 || aligned(&s.rows, 16);
    let wide = aligned(&call.k, 16) && aligned(&call.v, 16) && dense(&call.page_k) && dense(&call.page_v);
    call.wide = i32::from(whole && wide);
    check_codes("k page", &call.page_k, true)?;
    check_codes("v page", &call.page_v, false)?;
    let compact = call.page_k.format != 0 || call.page_v.format != 0;
    let grid = [len.div_ceil(GROUP) as u32, 2 * heads as u32, batch as u32];
    let shape = || format!("[{batch}, {heads}, {len}, {head_dim}] to token {at}");
    let smem = if compact { kv_smem(head_dim) } else { kv_smem(0) };
    // SAFETY: the caller's promise; the parameter is what the kernels' signature says.
    unsafe { cx.launch_with(&KV_APPEND, smem, grid, &mut [param(&call)], &shape) }
}

/// Tokens `start ..` of a page as dense rows, as many as `out` `[batch, kv_heads, n, head_dim]` has.
///
/// # Errors
/// When shapes or dtypes don't fit, or the driver refuses.
///
/// # Safety
/// As [`kv_append`].
pub unsafe fn kv_read(name: &str, page: Side, start: usize, out: TensorMut, cx: &Context) -> Result<()> {
    shapes::read(name, &page, start, &out)?;
    let [batch, heads, len, head_dim] = out.shape();
    countable("tokens of the page", start + len, MOST)?;
    let is_key = matches!(&page, Side::Compact(c) if c.axis == Axis::Channel);
    let mut call = Read {
        out: (&out).into(),
        side: (&page).into(),
        heads: heads as i32,
        len: len as i32,
        head_dim: head_dim as i32,
        start: start as i32,
        is_key: i32::from(is_key),
        dtype: params::dtype(out.dtype()),
        ..Read::default()
    };
    let whole = (head_dim * out.dtype().size()).is_multiple_of(16);
    call.wide = i32::from(whole && aligned(&call.out, 16) && (call.side.format != 0 || aligned(&call.side.rows, 16)));
    check_codes(name, &call.side, is_key)?;
    // Tiles lie as the page's groups do: the first may begin before `start`.
    let tiles = (start + len).div_ceil(GROUP) - start / GROUP;
    let grid = [if len == 0 { 0 } else { tiles as u32 }, heads as u32, batch as u32];
    let shape = || format!("[{batch}, {heads}, {len}, {head_dim}] from token {start}");
    let smem = if is_key { kv_smem(head_dim) } else { 0 };
    // SAFETY: the caller's promise; the parameter is what the kernels' signature says.
    unsafe { cx.launch_with(&KV_READ, smem, grid, &mut [param(&call)], &shape) }
}

/// Codes are read and written up to 16 bytes at a time, params of keys 8, of values 2.
fn check_codes(name: &str, side: &params::Side, is_key: bool) -> Result<()> {
    let params = if is_key { 8 } else { 2 };
    if side.format != 0 && !(aligned(&side.rows, 16) && aligned(&side.params, params)) {
        return Err(Error::value(
            name,
            "codes whose rows begin at multiples of 16 bytes on a GPU (params: of 8 or 2)",
            format!("{:?}", side.rows),
        ));
    }
    Ok(())
}
