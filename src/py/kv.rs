//! `kv_append`, `kv_read` and checksums for Python.

use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;

use super::error::raise;
use super::tensor::HOST;
use super::{detached, tensor};
use crate::cpu::{kv, pool};
use crate::error::Error;
use crate::quant::Axis;

/// Which side of a page: "k" or "v".
pub(super) fn axis(of: &str) -> PyResult<Axis> {
    match of {
        "k" => Ok(Axis::Channel),
        "v" => Ok(Axis::Token),
        _ => Err(raise(Error::value("of", "k or v", of))),
    }
}

/// Writes rows at token `at` of a page's keys (`of="k"`) or values (`of="v"`). See `llama1m_ext.ops.kv_append`.
#[pyfunction]
#[pyo3(signature = (rows, page, at, of, *, threads=1))]
pub fn kv_append(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    page: &Bound<'_, PyAny>,
    at: usize,
    of: &str,
    threads: usize,
) -> PyResult<()> {
    let side = HOST.side_mut(&format!("{of} page"), page, axis(of)?)?;
    let rows = HOST.rows(of, rows)?;
    detached(py, threads, move |cx| kv::kv_append(of, rows, side, at, cx))
}

/// Tokens `start ..` of a page's keys or values as dense rows, as many as `out` has. See `llama1m_ext.ops.kv_read`.
#[pyfunction]
#[pyo3(signature = (page, start, out, of, *, threads=1))]
pub fn kv_read(
    py: Python<'_>,
    page: &Bound<'_, PyAny>,
    start: usize,
    out: &Bound<'_, PyAny>,
    of: &str,
    threads: usize,
) -> PyResult<()> {
    let side = HOST.side(&format!("{of} page"), page, axis(of)?)?;
    let out = HOST.rows_mut("out", out)?;
    detached(py, threads, move |cx| kv::kv_read(of, side, start, out, cx))
}

/// 64-bit xxh3 of a contiguous tensor's bytes.
#[pyfunction]
pub fn checksum(py: Python<'_>, tensor: &Bound<'_, PyAny>) -> PyResult<u64> {
    let data = tensor::bytes("tensor", tensor)?;
    Ok(py.detach(|| xxhash_rust::xxh3::xxh3_64(data)))
}

/// 64-bit xxh3 of the bytes of each of some contiguous tensors.
#[pyfunction]
#[pyo3(signature = (tensors, *, threads=1))]
pub fn checksums(py: Python<'_>, tensors: Vec<Bound<'_, PyAny>>, threads: usize) -> PyResult<Vec<u64>> {
    let mut data = Vec::with_capacity(tensors.len());
    for (i, tensor) in tensors.iter().enumerate() {
        data.push(tensor::bytes(&format!("tensors[{i}]"), tensor)?);
    }
    let sums: Vec<AtomicU64> = data.iter().map(|_| AtomicU64::new(0)).collect();
    detached(py, threads, |cx| {
        pool::run(cx, data.len(), 1, |i| sums[i].store(xxhash_rust::xxh3::xxh3_64(data[i]), Ordering::Relaxed))
    })?;
    Ok(sums.into_iter().map(AtomicU64::into_inner).collect())
}
