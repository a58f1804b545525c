//! `kv_append` and `kv_read` on the CPU: rows into pages, made compact on the way, and out of them.

use super::codes::{Dequantize, Quantize};
use super::{Context, isa, pool};
use crate::args::{Rows, Side};
use crate::error::Result;
use crate::quant::{Axis, GROUP};
use crate::shapes;
pub use crate::shapes::SideMut;
use crate::tensor::{TensorMut, TensorRef};

/// Writes rows `[batch, kv_heads, n, head_dim]` at token `at` of a page.
///
/// Compact keys share scales over 64 tokens: `at` is a multiple of 64 there, and a last group that is not whole can't be
/// added to later.
///
/// # Errors
/// When shapes or dtypes don't fit, or `at` is no group's first token.
pub fn kv_append(name: &str, rows: TensorRef, page: SideMut, at: usize, cx: &Context) -> Result<()> {
    let [batch, heads, n, head_dim] = rows.shape();
    let wide = shapes::append(name, &rows, &page, at)?;
    let kernels = isa::active()?.kernels;
    let shares = n.div_ceil(GROUP);
    pool::run(cx, batch * heads * shares, 4, |task| {
        let (head, share) = (task / shares, task % shares);
        let (b, h, i) = (head / heads, head % heads, share * GROUP);
        let count = GROUP.min(n - i);
        // SAFETY: `active` chose kernels this CPU has; tokens i..i + count are inside both views, and this task's alone.
        unsafe {
            match page {
                SideMut::Dense(t) => {
                    for j in i..i + count {
                        let bytes = head_dim * rows.dtype().size();
                        std::ptr::copy_nonoverlapping(rows.row(b, h, j), t.row(b, h, at + j), bytes);
                    }
                }
                SideMut::Compact(c) => {
                    let (dst, params) = c.place(b, h, at + i);
                    (kernels.quantize)(&Quantize {
                        src: rows.row(b, h, i),
                        src_stride: rows.row_bytes(),
                        dtype: rows.dtype(),
                        n: count,
                        head_dim,
                        width: wide,
                        codes: c.codes,
                        axis: c.axis,
                        dst,
                        dst_stride: c.rows.row_bytes(),
                        params,
                        params_stride: c.params.row_bytes(),
                    })
                }
            }
        }
    })
}

/// Tokens `start ..` of a page as dense rows, as many as `out` `[batch, kv_heads, n, head_dim]` has.
///
/// # Errors
/// When shapes or dtypes don't fit.
pub fn kv_read(name: &str, page: Side, start: usize, out: TensorMut, cx: &Context) -> Result<()> {
    let [batch, heads, n, head_dim] = out.shape();
    let wide = shapes::read(name, &page, start, &out)?;
    let kernels = isa::active()?.kernels;
    let axis = if let Side::Compact(c) = page { c.axis } else { Axis::Token };
    let shares = n.div_ceil(GROUP);
    pool::run(cx, batch * heads * shares, 4, |task| {
        let (head, share) = (task / shares, task % shares);
        let (b, h) = (head / heads, head % heads);
        let (mut i, end) = (share * GROUP, ((share + 1) * GROUP).min(n));
        while i < end {
            // Of compact keys one group of tokens at a time.
            let count = (end - i).min(GROUP - (start + i) % GROUP);
            let rows: Rows = page.rows(b, h, start + i);
            // SAFETY: as in kv_append.
            unsafe {
                (kernels.dequantize)(&Dequantize {
                    rows,
                    axis,
                    n: count,
                    width: wide,
                    head_dim,
                    dtype: out.dtype(),
                    dst: out.row(b, h, i),
                    dst_stride: out.row_bytes(),
                });
            }
            i += count;
        }
    })
}
