//! `attention_backward` on one GPU, for Python.

use pyo3::prelude::*;

use super::cuda::{Pages, device_memory, on_device, per_row};
use super::error::raise;
use crate::cuda::attention::Path;
use crate::cuda::backward as verb;
use crate::cuda::views::Bounds;
use crate::gradients::BackwardArgs;

/// Gradients of exact attention on one GPU, written to `dq`, `dk` and `dv`.
///
/// `kv_start` and `kv_end` are int64 `[batch]` on the device, `workspace` uint8 of `cuda_attention_backward_workspace` bytes
/// there.
#[pyfunction]
#[pyo3(signature = (grad_out, q, k, v, out, lse, dq, dk, dv, *, causal=true, softmax_scale=None, q_start=None, kv_start=None, kv_end=None, kv_len=None, grad_lse=None, workspace=None, stream=0, path="auto"))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn cuda_attention_backward(
    py: Python<'_>,
    grad_out: &Bound<'_, PyAny>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    dq: &Bound<'_, PyAny>,
    dk: &Bound<'_, PyAny>,
    dv: &Bound<'_, PyAny>,
    causal: bool,
    softmax_scale: Option<f64>,
    q_start: Option<i64>,
    kv_start: Option<&Bound<'_, PyAny>>,
    kv_end: Option<&Bound<'_, PyAny>>,
    kv_len: Option<usize>,
    grad_lse: Option<&Bound<'_, PyAny>>,
    workspace: Option<&Bound<'_, PyAny>>,
    stream: usize,
    path: &str,
) -> PyResult<()> {
    let path = Path::parse(path).map_err(raise)?;
    let memory = device_memory()?;
    let pages = Pages::new(k, v)?;
    let q = memory.rows("q", q)?;
    let batch = q.shape()[0];
    let bounds = Bounds {
        start: per_row(&memory, "kv_start", kv_start, batch)?,
        end: per_row(&memory, "kv_end", kv_end, batch)?,
    };
    let args = BackwardArgs {
        grad_out: memory.rows("grad_out", grad_out)?,
        q,
        kv: pages.view(&memory, kv_len)?,
        out: memory.rows("out", out)?,
        lse: memory.sums("lse", lse)?,
        grad_lse: grad_lse.map(|o| memory.sums("grad_lse", o)).transpose()?,
        dq: memory.rows_mut("dq", dq)?,
        dk: memory.rows_mut("dk", dk)?,
        dv: memory.rows_mut("dv", dv)?,
        causal,
        softmax_scale,
        q_start,
        kv_start: None,
        kv_end: None,
    };
    let p = args.validate().map_err(raise)?;
    let workspace = workspace.map(|o| memory.workspace("workspace", o)).transpose()?;
    // SAFETY: every view was checked against its tensor, which is on that device; torch gives memory back in the order of
    // the stream, so it stays valid for what is launched there.
    on_device(py, &memory, stream, move |cx| unsafe { verb::attention_backward(&p, bounds, workspace, path, cx) })
}

/// Bytes of workspace that `cuda_attention_backward` wants for such a call.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, kv_len=None))]
pub fn cuda_attention_backward_workspace(
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    kv_len: Option<usize>,
) -> PyResult<usize> {
    let memory = device_memory()?;
    let pages = Pages::new(k, v)?;
    let q = memory.rows("q", q)?;
    let kv = pages.view(&memory, kv_len)?;
    verb::workspace_bytes(&q, &kv).map_err(raise)
}
