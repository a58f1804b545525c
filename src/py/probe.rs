//! What the bench and `llama1m env` ask of the machine.

use std::time::Duration;

use pyo3::prelude::*;

use super::error::raise;
use super::{detached, tensor};
use crate::cpu::{isa as levels, probe};
use crate::dtype::DType;
use crate::error::Error;

/// The instruction-set level in use.
#[pyfunction]
pub fn isa() -> PyResult<&'static str> {
    Ok(levels::active().map_err(raise)?.name)
}

/// The levels this CPU has, best first.
#[pyfunction]
pub fn isa_levels() -> Vec<&'static str> {
    levels::available().map(|l| l.name).collect()
}

/// Measured FLOP/s of multiply-adds in registers, in the operand type that attention uses for `dtype`.
#[pyfunction]
#[pyo3(signature = (dtype, threads=1, seconds=0.2))]
pub fn peak_flops(py: Python<'_>, dtype: &str, threads: usize, seconds: f64) -> PyResult<f64> {
    let dtype = match dtype {
        "float32" => DType::F32,
        "bfloat16" => DType::BF16,
        "float16" => DType::F16,
        _ => return Err(raise(Error::value("dtype", "float32, bfloat16 or float16", dtype))),
    };
    if !(0.0..=60.0).contains(&seconds) {
        return Err(raise(Error::value("seconds", "a number from 0 to 60", seconds)));
    }
    detached(py, threads, move |cx| probe::peak_flops(dtype, cx.threads, Duration::from_secs_f64(seconds)))
}

/// Seconds that one pass over a contiguous tensor's memory takes.
#[pyfunction]
#[pyo3(signature = (tensor, threads=1))]
pub fn read_seconds(py: Python<'_>, tensor: &Bound<'_, PyAny>, threads: usize) -> PyResult<f64> {
    let data = tensor::bytes("tensor", tensor)?;
    detached(py, threads, move |cx| probe::read_seconds(data, cx.threads))
}
