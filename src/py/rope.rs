//! `rope_apply` for Python.

use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;

use super::error::raise;
use super::tensor::HOST;
use super::{detached, tensor};
use crate::cpu::rope as cpu;
use crate::error::Error;
use crate::{rope, shapes};

/// Frequencies on the host, as the engines take them.
pub(super) fn turns(inv_freq: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    tensor::float64s("inv_freq", inv_freq)?.into_iter().map(|x| rope::turns(x).map_err(raise)).collect()
}

/// Rotates q and k by their positions into q_out and k_out. See `llama1m_ext.ops.rope_apply`.
#[pyfunction]
#[pyo3(signature = (q, k, q_out, k_out, positions, inv_freq, *, attention_scaling=1.0, threads=1))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn rope_apply(
    py: Python<'_>,
    q: &Bound<'_, PyAny>,
    k: Option<&Bound<'_, PyAny>>,
    q_out: &Bound<'_, PyAny>,
    k_out: Option<&Bound<'_, PyAny>>,
    positions: &Bound<'_, PyAny>,
    inv_freq: &Bound<'_, PyAny>,
    attention_scaling: f64,
    threads: usize,
) -> PyResult<()> {
    let pairs = HOST.pairs(q, k, q_out, k_out)?;
    let [batch, _, len, _] = pairs[0].1.shape();
    let (values, shape) = tensor::int64s("positions", positions)?;
    shapes::positions(&shape, batch, len).map_err(raise)?;
    let turns = turns(inv_freq)?;
    detached(py, threads, move |cx| cpu::rope_apply(&pairs, &values, &turns, attention_scaling, cx))
}

type Vector<'py> = Bound<'py, PyArray1<f32>>;

/// The `(cos, sin)` float32 vectors that `rope_apply` uses at one position.
#[pyfunction]
#[pyo3(signature = (position, inv_freq, *, attention_scaling=1.0))]
pub fn cos_sin<'py>(
    py: Python<'py>,
    position: i64,
    inv_freq: &Bound<'py, PyAny>,
    attention_scaling: f64,
) -> PyResult<(Vector<'py>, Vector<'py>)> {
    if !(0..rope::MAX_POSITION).contains(&position) {
        return Err(raise(Error::value("position", "a number from 0 to 2^40", position)));
    }
    let turns = turns(inv_freq)?;
    let (cos, sin) = (PyArray1::zeros(py, turns.len(), false), PyArray1::zeros(py, turns.len(), false));
    // The arrays are fresh: nobody else borrows them.
    let (mut c, mut s) = (cos.try_readwrite()?, sin.try_readwrite()?);
    rope::cos_sin(position, &turns, attention_scaling, c.as_slice_mut()?, s.as_slice_mut()?);
    drop((c, s));
    Ok((cos, sin))
}
