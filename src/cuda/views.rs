//! Validated views as kernels take them.

use super::params::{Attn, Page, Side, View};
use crate::args::{self, KvRef, Problem};
use crate::error::{Error, Result};
use crate::quant::{Codes, CompactMut};
use crate::shapes::SideMut;
use crate::tensor::{Unit, ViewMut, ViewRef};

fn view(ptr: u64, strides: [usize; 3]) -> View {
    let [batch_stride, head_stride, row_stride] = strides.map(|s| s as i64);
    View { ptr, batch_stride, head_stride, row_stride }
}

impl<U: Unit> From<&ViewRef<'_, U>> for View {
    fn from(t: &ViewRef<'_, U>) -> Self {
        view(t.start() as u64, t.byte_strides())
    }
}

impl<U: Unit> From<&ViewMut<'_, U>> for View {
    fn from(t: &ViewMut<'_, U>) -> Self {
        view(t.start() as u64, t.byte_strides())
    }
}

/// Whether rows of a view begin at multiples of so many bytes.
pub fn aligned(v: &View, bytes: usize) -> bool {
    let strides = [v.batch_stride, v.head_stride, v.row_stride];
    v.ptr.is_multiple_of(bytes as u64) && strides.iter().all(|s| s % bytes as i64 == 0)
}

/// Most of anything that a kernel counts, tokens above all: it does so in 32 bits.
pub const MOST: usize = 1 << 30;

/// Refuses what a kernel can't count.
///
/// # Errors
/// When a number is above `most`.
pub fn countable(name: &str, n: usize, most: usize) -> Result<()> {
    if n > most { Err(Error::value(name, format!("at most {most} of them on a GPU"), n)) } else { Ok(()) }
}

/// float32 rows `[batch, heads, len, width]` of a workspace, one after the other.
pub fn contiguous(ptr: u64, heads: usize, len: usize, width: usize) -> View {
    let row = 4 * width;
    view(ptr, [row * len * heads, row * len, row])
}

/// The number of a format in `params.h`.
pub fn format(codes: Option<Codes>) -> i32 {
    match codes {
        None => 0,
        Some(Codes::Int8) => 1,
        Some(Codes::Int4) => 2,
        Some(Codes::Fp8) => 3,
    }
}

impl From<&args::Side<'_>> for Side {
    fn from(s: &args::Side<'_>) -> Self {
        match s {
            args::Side::Dense(t) => Self { rows: t.into(), ..Self::default() },
            args::Side::Compact(c) => {
                Self { rows: (&c.rows).into(), params: (&c.params).into(), format: format(Some(c.codes)), reserved: 0 }
            }
        }
    }
}

impl From<&CompactMut<'_>> for Side {
    fn from(c: &CompactMut<'_>) -> Self {
        Self { rows: (&c.rows).into(), params: (&c.params).into(), format: format(Some(c.codes)), reserved: 0 }
    }
}

impl From<&SideMut<'_>> for Side {
    fn from(s: &SideMut<'_>) -> Self {
        match s {
            SideMut::Dense(t) => Self { rows: t.into(), ..Self::default() },
            SideMut::Compact(c) => c.into(),
        }
    }
}

/// Pages in use.
pub fn pages(kv: &KvRef) -> Vec<Page> {
    let page = |(k, v, first, tokens): (&args::Side, &args::Side, usize, usize)| Page {
        k: k.into(),
        v: v.into(),
        first: first as i32,
        tokens: tokens as i32,
    };
    kv.pages().map(page).collect()
}

/// First and last visible key of each batch row, as device addresses of int64 `[batch]`; 0: none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bounds {
    /// `kv_start`.
    pub start: u64,
    /// `kv_end`.
    pub end: u64,
}

/// A call without its pages.
pub fn attn(p: &Problem, bounds: Bounds) -> Attn {
    Attn {
        q: (&p.q).into(),
        out: (&p.out).into(),
        lse: p.lse.as_ref().map_or(0, |l| l.start() as u64),
        kv_start: bounds.start,
        kv_end: bounds.end,
        q_start: p.q_start(),
        batch: p.batch as i32,
        q_heads: p.q_heads as i32,
        kv_heads: p.kv_heads as i32,
        q_len: p.q_len as i32,
        kv_len: p.kv_len as i32,
        head_dim: p.head_dim as i32,
        causal: i32::from(p.causal()),
        out_f32: i32::from(p.out.dtype() == crate::dtype::DType::F32),
        scale: (p.softmax_scale * std::f64::consts::LOG2_E) as f32,
        ..Attn::default()
    }
}
