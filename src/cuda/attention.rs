//! Attention on a GPU: which kernel, how many launches, how much workspace.

use super::driver::Device;
use super::kernels;
use super::launch::{Context, param};
use super::merge::{Splits, merge_splits};
use super::params::{Attn, MAX_PAGES, Page, View};
use super::views::{self, Bounds};
use crate::args::{KvRef, Problem};
use crate::error::{Error, Result};
use crate::tensor::TensorRef;

/// Where a workspace's parts begin: a multiple of so many bytes.
pub const ALIGN: usize = 256;

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// The fastest that serves the call.
    Auto,
    /// `attention_any`.
    Any,
}

impl Path {
    /// From its name.
    ///
    /// # Errors
    /// When there is no such path.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "any" => Ok(Self::Any),
            _ => Err(Error::value("path", "auto or any", name)),
        }
    }
}

/// A call that is planned: launches, and what lies where in the workspace.
struct Plan {
    /// Pages of each launch.
    launches: Vec<Vec<Page>>,
    /// Bytes of a launch's partial out and lse, 0 where one launch does it all.
    out_bytes: usize,
    lse_bytes: usize,
}

impl Plan {
    fn new(q: &TensorRef, kv: &KvRef) -> Self {
        let pages = views::pages(kv);
        let launches: Vec<Vec<Page>> = if pages.is_empty() {
            vec![Vec::new()] // nothing to see: out is to become 0
        } else {
            pages.chunks(MAX_PAGES).map(<[Page]>::to_vec).collect()
        };
        let [batch, q_heads, q_len, head_dim] = q.shape();
        let rows = if launches.len() > 1 { batch * q_heads * q_len } else { 0 };
        Self {
            launches,
            out_bytes: (rows * head_dim * 4).next_multiple_of(ALIGN),
            lse_bytes: (rows * 4).next_multiple_of(ALIGN),
        }
    }

    fn bytes(&self) -> usize {
        self.launches.len() * (self.out_bytes + self.lse_bytes)
    }
}

/// Bytes of workspace that [`attention`] wants for q over these keys.
///
/// # Errors
/// When the path does not serve the call.
pub fn workspace_bytes(q: &TensorRef, kv: &KvRef, out_f32: bool, path: Path, device: &Device) -> Result<usize> {
    let _ = (out_f32, path, device); // one kernel so far
    Ok(Plan::new(q, kv).bytes())
}

/// Exact attention of q over the visible keys. Memory is the device's; `workspace`: address and bytes.
///
/// # Errors
/// When the call is too large for a launch, the workspace too small, or the driver refuses.
///
/// # Safety
/// All views, bounds and the workspace are memory of `cx.device`, valid until the stream has come to its end.
pub unsafe fn attention(
    p: &Problem,
    bounds: Bounds,
    workspace: Option<(u64, usize)>,
    path: Path,
    cx: &Context,
) -> Result<()> {
    let _ = path; // one kernel so far
    if p.batch * p.q_heads * p.q_len == 0 {
        return Ok(());
    }
    for (name, n) in [("kv_len", p.kv_len), ("q_len", p.q_len)] {
        if n > 1 << 30 {
            return Err(Error::value(name, "at most 2^30 on a GPU", n));
        }
    }
    if let Some(lse) = &p.lse
        && lse.byte_strides()
            != crate::tensor::contiguous(lse.shape())[..3].iter().map(|s| 4 * s).collect::<Vec<_>>()[..]
    {
        return Err(Error::value("lse", "a contiguous tensor", format!("strides of {:?} bytes", lse.byte_strides())));
    }
    let plan = Plan::new(&p.q, &p.kv);
    let (at, given) = workspace.unwrap_or_default();
    if given < plan.bytes() || !(at as usize).is_multiple_of(ALIGN) {
        let want = format!("{} bytes at a multiple of {ALIGN}", plan.bytes());
        return Err(Error::value("workspace", want, format!("{given} bytes at {at:#x}")));
    }
    let call = views::attn(p, bounds);
    let (outs, lses) = (at, at + (plan.launches.len() * plan.out_bytes) as u64);
    for (n, pages) in plan.launches.iter().enumerate() {
        let mut call = Attn { pages: pages.len() as i32, ..call };
        call.page[..pages.len()].copy_from_slice(pages);
        if plan.launches.len() > 1 {
            call.out = contiguous(p, outs + (n * plan.out_bytes) as u64, p.head_dim);
            call.out_f32 = 1;
            call.lse = lses + (n * plan.lse_bytes) as u64;
        }
        // SAFETY: the caller's promise; the parameter is what the kernels' signature says.
        unsafe { any(p, &call, cx)? }
    }
    if plan.launches.len() > 1 {
        let parts =
            Splits { outs, lses, count: plan.launches.len(), out_stride: plan.out_bytes, lse_stride: plan.lse_bytes };
        // SAFETY: as above; the partials are in the workspace.
        unsafe { merge_splits(&parts, p.out, p.lse, cx)? }
    }
    Ok(())
}

fn shape(p: &Problem) -> String {
    format!("q [{}, {}, {}, {}], {} keys of {} heads", p.batch, p.q_heads, p.q_len, p.head_dim, p.kv_len, p.kv_heads)
}

unsafe fn any(p: &Problem, call: &Attn, cx: &Context) -> Result<()> {
    let tiles = p.q_len.div_ceil(kernels::ANY_QUERIES);
    let grid = [tiles, p.q_heads, p.batch].map(|n| n as u32);
    // SAFETY: the caller's promise.
    unsafe { cx.launch(kernels::ATTENTION_ANY.of(p.q.dtype()), grid, &mut [param(call)], &|| shape(p)) }
}

/// Rows `[batch, q_heads, q_len, width]` of float32, one after the other.
fn contiguous(p: &Problem, ptr: u64, width: usize) -> View {
    let row = 4 * width as i64;
    let head = row * p.q_len as i64;
    View { ptr, batch_stride: head * p.q_heads as i64, head_stride: head, row_stride: row }
}
