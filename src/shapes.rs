//! What `merge_partials`, `rope_apply`, `kv_append` and `kv_read` ask of shapes and dtypes, whichever engine runs them.

use crate::args::Side;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{self, Axis, CompactMut, GROUP};
use crate::tensor::{TensorMut, TensorRef};

/// Most pairs of elements that rotate: head_dim 256.
pub const MAX_PAIRS: usize = 128;

/// Keys or values of a page, to write.
#[derive(Debug, Clone, Copy)]
pub enum SideMut<'a> {
    /// `[batch, kv_heads, tokens, head_dim]`.
    Dense(TensorMut<'a>),
    /// Codes and scales.
    Compact(CompactMut<'a>),
}

impl SideMut<'_> {
    /// `[batch, kv_heads, tokens, head_dim or width]`.
    pub fn shape(&self) -> [usize; 4] {
        match self {
            Self::Dense(t) => t.shape(),
            Self::Compact(c) => c.shape(),
        }
    }
}

/// Partials `[batch, q_heads, q_len, head_dim]` with `[batch, q_heads, q_len, 1]` float32, and what they are joined to.
///
/// # Errors
/// When shapes or dtypes differ.
pub fn merge(outs: &[TensorRef], lses: &[TensorRef], out: &TensorMut, lse: Option<&TensorMut>) -> Result<()> {
    if outs.is_empty() || outs.len() != lses.len() {
        return Err(Error::value(
            "lses",
            format!("as many as outs, at least one (outs has {})", outs.len()),
            lses.len(),
        ));
    }
    let shape = outs[0].shape();
    let rows = [shape[0], shape[1], shape[2], 1];
    for (i, (o, s)) in outs.iter().zip(lses).enumerate() {
        if o.shape() != shape {
            return Err(Error::value(
                format!("outs[{i}]"),
                format!("{shape:?} as outs[0]"),
                format!("{:?}", o.shape()),
            ));
        }
        if s.dtype() != DType::F32 {
            return Err(Error::type_(format!("lses[{i}]"), "float32", s.dtype().name()));
        }
        if s.shape() != rows {
            return Err(Error::value(
                format!("lses[{i}]"),
                format!("{:?}", &rows[..3]),
                format!("{:?}", &s.shape()[..3]),
            ));
        }
    }
    if out.shape() != shape {
        return Err(Error::value("out", format!("{shape:?}"), format!("{:?}", out.shape())));
    }
    if let Some(lse) = lse.filter(|l| l.dtype() != DType::F32 || l.shape() != rows) {
        let got = format!("{} {:?}", lse.dtype().name(), &lse.shape()[..3]);
        return Err(Error::value("lse", format!("float32 {:?}", &rows[..3]), got));
    }
    Ok(())
}

/// The shape of the positions of `[batch, len]` tokens.
///
/// # Errors
/// When it is another one.
pub fn positions(shape: &[usize], batch: usize, len: usize) -> Result<()> {
    if shape != [len] && shape != [1, len] && shape != [batch, len] {
        let want = format!("[{batch}, {len}], [1, {len}] or [{len}]");
        return Err(Error::value("positions", want, format!("shape {shape:?}")));
    }
    Ok(())
}

/// Frequencies and their factor.
///
/// # Errors
/// When there are none, or more than a head has room for, or the factor is no number.
pub fn rotation(turns: &[u64], scaling: f64) -> Result<()> {
    if turns.is_empty() || turns.len() > MAX_PAIRS {
        return Err(Error::value("inv_freq", format!("1 to {MAX_PAIRS} frequencies"), turns.len()));
    }
    if !scaling.is_finite() {
        return Err(Error::value("attention_scaling", "a finite number", scaling));
    }
    Ok(())
}

/// q and k `[batch, heads, len, head_dim]` and where they are rotated to.
///
/// # Errors
/// When shapes or dtypes don't fit.
pub fn rope(pairs: &[(&str, TensorRef, TensorMut)], turns: &[u64], scaling: f64) -> Result<()> {
    rotation(turns, scaling)?;
    let Some((first, q, _)) = pairs.first() else { return Ok(()) };
    let [batch, _, len, _] = q.shape();
    for (name, src, dst) in pairs {
        let s = src.shape();
        if s[0] != batch || s[2] != len {
            return Err(Error::value(name, format!("batch {batch} and len {len} as {first}"), format!("{s:?}")));
        }
        if s[3] < 2 * turns.len() {
            return Err(Error::value(name, format!("head_dim of at least {} (2 x inv_freq)", 2 * turns.len()), s[3]));
        }
        if dst.shape() != s || dst.dtype() != src.dtype() {
            return Err(Error::value(
                format!("{name}_out"),
                format!("{s:?} of {}", src.dtype().name()),
                format!("{:?} of {}", dst.shape(), dst.dtype().name()),
            ));
        }
    }
    Ok(())
}

/// Rows `[batch, kv_heads, n, head_dim]` and the page that they become tokens `at ..` of. Returns the page's elements of a row.
///
/// # Errors
/// When shapes or dtypes don't fit, or `at` is no group's first token.
pub fn append(name: &str, rows: &TensorRef, page: &SideMut, at: usize) -> Result<usize> {
    let [batch, heads, n, head_dim] = rows.shape();
    let shape = page.shape();
    let wide = match page {
        SideMut::Dense(t) => {
            if t.dtype() != rows.dtype() {
                return Err(Error::type_(name, format!("the page's dtype, {}", t.dtype().name()), rows.dtype().name()));
            }
            head_dim
        }
        SideMut::Compact(c) => {
            if c.axis == Axis::Channel && !at.is_multiple_of(GROUP) {
                return Err(Error::value("at", "a multiple of 64 for compact keys", at));
            }
            quant::width(head_dim)
        }
    };
    if [batch, heads, wide] != [shape[0], shape[1], shape[3]] || head_dim == 0 {
        let want = format!("rows that fit the page {shape:?}");
        return Err(Error::value(name, want, format!("{:?}", rows.shape())));
    }
    if at.checked_add(n).is_none_or(|end| end > shape[2]) {
        return Err(Error::value("at", format!("room for {n} tokens on a page of {}", shape[2]), at));
    }
    Ok(wide)
}

/// A page and rows `[batch, kv_heads, n, head_dim]` that its tokens `start ..` are read to. Returns the page's elements of a row.
///
/// # Errors
/// When shapes or dtypes don't fit.
pub fn read(name: &str, page: &Side, start: usize, out: &TensorMut) -> Result<usize> {
    let [batch, heads, n, head_dim] = out.shape();
    let shape = page.shape();
    let wide = if page.dtype().is_some() { head_dim } else { quant::width(head_dim) };
    if let Some(dtype) = page.dtype().filter(|d| *d != out.dtype()) {
        return Err(Error::type_(name, format!("the page's dtype, {}", dtype.name()), out.dtype().name()));
    }
    if [batch, heads, wide] != [shape[0], shape[1], shape[3]] || head_dim == 0 {
        let want = format!("an output that fits the page {shape:?}");
        return Err(Error::value(name, want, format!("{:?}", out.shape())));
    }
    if start.checked_add(n).is_none_or(|end| end > shape[2]) {
        let got = format!("{n} from {start} on");
        return Err(Error::value(name, format!("tokens on a page of {}", shape[2]), got));
    }
    Ok(wide)
}
