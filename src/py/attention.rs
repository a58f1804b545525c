//! `attention` and `merge_partials` for Python.

use pyo3::prelude::*;

use super::error::raise;
use super::tensor::HOST;
use super::{detached, tensor};
use crate::args::{AttnArgs, KvRef};
use crate::attention as operation;
use crate::error::Error;
use crate::gradients::BackwardArgs;
use crate::quant::Axis;

/// One entry for each batch row: from an int64 vector, or one int for all rows.
fn per_row(name: &str, o: Option<&Bound<'_, PyAny>>, batch: usize) -> PyResult<Option<Vec<i64>>> {
    let Some(o) = o else { return Ok(None) };
    if let Ok(x) = o.extract::<i64>() {
        return Ok(Some(vec![x; batch]));
    }
    let (values, shape) = tensor::int64s(name, o)?;
    if shape != [batch] {
        return Err(raise(Error::value(name, format!("an int or shape [{batch}]"), format!("shape {shape:?}"))));
    }
    Ok(Some(values))
}

/// Exact attention on CPU tensors or numpy arrays, written to `out` and `lse`.
///
/// k and v are tensors, or lists of pages, each a tensor or a tuple `(codes, params)`.
/// `path` is "auto", "prefill" or "decode". See `llama1m_ext.ops.attention`.
#[pyfunction]
#[pyo3(signature = (q, k, v, out, lse=None, *, causal=true, softmax_scale=None, q_start=None, kv_start=None, kv_end=None, kv_len=None, threads=1, path="auto"))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn attention(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    lse: Option<&Bound<'_, PyAny>>,
    causal: bool,
    softmax_scale: Option<f64>,
    q_start: Option<i64>,
    kv_start: Option<&Bound<'_, PyAny>>,
    kv_end: Option<&Bound<'_, PyAny>>,
    kv_len: Option<usize>,
    threads: usize,
    path: &str,
) -> PyResult<()> {
    let run = match path {
        "auto" => operation::attention,
        "prefill" => operation::attention_forward,
        "decode" => operation::attention_decode,
        _ => return Err(raise(Error::value("path", "auto, prefill or decode", path))),
    };
    let (k_pages, v_pages) = (tensor::items(k)?, tensor::items(v)?);
    let ks = tensor::sides(&HOST, "k", &k_pages, Axis::Channel)?;
    let vs = tensor::sides(&HOST, "v", &v_pages, Axis::Token)?;
    let held: usize = vs.iter().map(|p| p.shape()[2]).sum();
    let q = HOST.rows("q", q)?;
    let out = HOST.rows_mut("out", out)?;
    let lse = lse.map(|o| HOST.sums_mut("lse", o)).transpose()?;
    let batch = q.shape()[0];
    let starts = per_row("kv_start", kv_start, batch)?;
    let ends = per_row("kv_end", kv_end, batch)?;
    let kv = KvRef::paged(ks, vs, kv_len.unwrap_or(held)).map_err(raise)?;
    let args = AttnArgs {
        q,
        kv,
        out,
        lse,
        causal,
        softmax_scale,
        q_start,
        kv_start: starts.as_deref(),
        kv_end: ends.as_deref(),
    };
    detached(py, threads, move |cx| run(args, cx))
}

/// Gradients of exact attention on CPU tensors or numpy arrays, written to `dq`, `dk` and `dv`, from the `out` and `lse` that
/// `attention` wrote.
///
/// k and v are tensors, or lists of pages; dk and dv are one tensor each, over all tokens of the pages. See
/// `llama1m_ext.ops.attention_backward`.
#[pyfunction]
#[pyo3(signature = (grad_out, q, k, v, out, lse, dq, dk, dv, *, causal=true, softmax_scale=None, q_start=None, kv_start=None, kv_end=None, kv_len=None, grad_lse=None, threads=1))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn attention_backward(
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
    threads: usize,
) -> PyResult<()> {
    let (k_pages, v_pages) = (tensor::items(k)?, tensor::items(v)?);
    let ks = tensor::sides(&HOST, "k", &k_pages, Axis::Channel)?;
    let vs = tensor::sides(&HOST, "v", &v_pages, Axis::Token)?;
    let held: usize = vs.iter().map(|p| p.shape()[2]).sum();
    let q = HOST.rows("q", q)?;
    let batch = q.shape()[0];
    let starts = per_row("kv_start", kv_start, batch)?;
    let ends = per_row("kv_end", kv_end, batch)?;
    let args = BackwardArgs {
        grad_out: HOST.rows("grad_out", grad_out)?,
        q,
        kv: KvRef::paged(ks, vs, kv_len.unwrap_or(held)).map_err(raise)?,
        out: HOST.rows("out", out)?,
        lse: HOST.sums("lse", lse)?,
        grad_lse: grad_lse.map(|o| HOST.sums("grad_lse", o)).transpose()?,
        dq: HOST.rows_mut("dq", dq)?,
        dk: HOST.rows_mut("dk", dk)?,
        dv: HOST.rows_mut("dv", dv)?,
        causal,
        softmax_scale,
        q_start,
        kv_start: starts.as_deref(),
        kv_end: ends.as_deref(),
    };
    detached(py, threads, move |cx| operation::attention_backward(args, cx))
}

/// Joins partials `(outs[i], lses[i])` over disjoint keys into `out` and `lse`.
#[pyfunction]
#[pyo3(signature = (outs, lses, out, lse=None, *, threads=1))]
pub fn merge_partials(
    py: Python<'_>,
    outs: &Bound<'_, PyAny>,
    lses: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    lse: Option<&Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<()> {
    let (out_items, lse_items) = (tensor::items(outs)?, tensor::items(lses)?);
    let (o, s) = HOST.partials(&out_items, &lse_items)?;
    let out = HOST.rows_mut("out", out)?;
    let lse = lse.map(|x| HOST.sums_mut("lse", x)).transpose()?;
    detached(py, threads, move |cx| crate::cpu::merge::merge_partials(&o, &s, out, lse, cx))
}
