//! `merge_partials`, `rope_apply`, `kv_append` and `kv_read` on one GPU, for Python.

use pyo3::prelude::*;

use super::cuda::{device_memory, on_device};
use super::error::raise;
use super::kv::axis;
use super::rope::turns;
use super::tensor::Memory;
use crate::cuda::rope::Positions;
use crate::cuda::{kv, merge, rope};
use crate::error::Error;
use crate::quant::Axis;
use crate::shapes;

// SAFETY, of all calls below: every view was checked against its tensor, which is on that device; torch gives memory back in
// the order of the stream, so it stays valid for what is launched there.

/// Positions of `[batch, len]` tokens: int64 `[len]`, `[1, len]` or `[batch, len]` on the device.
fn positions(memory: &Memory, o: &Bound<'_, PyAny>, batch: usize, len: usize) -> PyResult<Positions> {
    let (at, shape) = memory.int64_address("positions", o)?;
    shapes::positions(&shape, batch, len).map_err(raise)?;
    Ok(Positions { at, batch_stride: if shape.len() == 2 && shape[0] > 1 { len } else { 0 } })
}

/// Joins partials over disjoint keys into `out` and `lse`. See `llama1m_ext.ops.merge_partials`.
#[pyfunction]
#[pyo3(signature = (outs, lses, out, lse=None, *, stream=0))]
pub fn cuda_merge_partials(
    py: Python<'_>,
    outs: Vec<Bound<'_, PyAny>>,
    lses: Vec<Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    lse: Option<&Bound<'_, PyAny>>,
    stream: usize,
) -> PyResult<()> {
    let memory = device_memory()?;
    let (os, ss) = memory.partials(&outs, &lses)?;
    let out = memory.rows_mut("out", out)?;
    let lse = lse.map(|o| memory.sums_mut("lse", o)).transpose()?;
    // SAFETY: above.
    on_device(py, &memory, stream, move |cx| unsafe { merge::merge_partials(&os, &ss, out, lse, cx) })
}

/// Rotates q and k by their positions into q_out and k_out: positions int64 on the device, inv_freq on the host. A position
/// that is not served gives NaN. See `llama1m_ext.ops.rope_apply`.
#[pyfunction]
#[pyo3(signature = (q, k, q_out, k_out, positions, inv_freq, *, attention_scaling=1.0, stream=0))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn cuda_rope_apply(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: Option<&Bound<'_, PyAny>>,
    q_out: &Bound<'_, PyAny>,
    k_out: Option<&Bound<'_, PyAny>>,
    positions: &Bound<'_, PyAny>,
    inv_freq: &Bound<'_, PyAny>,
    attention_scaling: f64,
    stream: usize,
) -> PyResult<()> {
    let memory = device_memory()?;
    let pairs = memory.pairs(q, k, q_out, k_out)?;
    let [batch, _, len, _] = pairs[0].1.shape();
    let positions = self::positions(&memory, positions, batch, len)?;
    let turns = turns(inv_freq)?;
    // SAFETY: above.
    on_device(py, &memory, stream, move |cx| unsafe {
        rope::rope_apply(&pairs, positions, &turns, attention_scaling, cx)
    })
}

/// Writes rows of keys and values at token `at` of a page, keys rotated on the way where there are positions. See
/// `llama1m_ext.ops.kv_append`.
#[pyfunction]
#[pyo3(signature = (k, v, page_k, page_v, at, *, positions=None, inv_freq=None, attention_scaling=1.0, stream=0))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn cuda_kv_append(
    py: Python<'_>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    page_k: &Bound<'_, PyAny>,
    page_v: &Bound<'_, PyAny>,
    at: usize,
    positions: Option<&Bound<'_, PyAny>>,
    inv_freq: Option<&Bound<'_, PyAny>>,
    attention_scaling: f64,
    stream: usize,
) -> PyResult<()> {
    let memory = device_memory()?;
    let (k, v) = (memory.rows("k", k)?, memory.rows("v", v)?);
    let page_k = memory.side_mut("k page", page_k, Axis::Channel)?;
    let page_v = memory.side_mut("v page", page_v, Axis::Token)?;
    let [batch, _, len, _] = k.shape();
    let rotation = match (positions, inv_freq) {
        (Some(p), Some(f)) => {
            let turns = turns(f)?;
            shapes::rotation(&turns, attention_scaling).map_err(raise)?;
            Some(rope::rotation(self::positions(&memory, p, batch, len)?, &turns, attention_scaling))
        }
        (None, None) => None,
        _ => return Err(raise(Error::value("inv_freq", "positions and inv_freq together", "only one of them"))),
    };
    // SAFETY: above.
    on_device(py, &memory, stream, move |cx| unsafe { kv::kv_append(k, v, page_k, page_v, at, rotation, cx) })
}

/// Tokens `start ..` of a page's keys (`of="k"`) or values (`of="v"`) as dense rows, as many as `out` has. See
/// `llama1m_ext.ops.kv_read`.
#[pyfunction]
#[pyo3(signature = (side, start, out, of, *, stream=0))]
pub fn cuda_kv_read(
    py: Python<'_>,
    side: &Bound<'_, PyAny>,
    start: usize,
    out: &Bound<'_, PyAny>,
    of: &str,
    stream: usize,
) -> PyResult<()> {
    let memory = device_memory()?;
    let side = memory.side(&format!("{of} page"), side, axis(of)?)?;
    let out = memory.rows_mut("out", out)?;
    // SAFETY: above.
    on_device(py, &memory, stream, move |cx| unsafe { kv::kv_read(of, side, start, out, cx) })
}
