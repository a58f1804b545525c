//! The door to Python: turns tensors into views, calls an operation without the GIL, turns errors into exceptions.

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_backward;
#[cfg(feature = "cuda")]
mod cuda_verbs;
mod error;
mod kv;
mod probe;
mod ring;
mod rope;
mod tensor;

use std::cell::RefCell;

use pyo3::prelude::*;

use crate::cpu::Context;
use crate::error::Result;

/// Runs `work` without the GIL on `threads` threads; a pending signal (Ctrl-C) stops it and is raised.
fn detached<T: Send>(py: Python<'_>, threads: usize, work: impl Send + FnOnce(&Context) -> Result<T>) -> PyResult<T> {
    let (done, raised) = py.detach(move || {
        let raised = RefCell::new(None);
        let poll = || match Python::attach(|py| py.check_signals()) {
            Ok(()) => false,
            Err(e) => {
                *raised.borrow_mut() = Some(e);
                true
            }
        };
        let done = work(&Context { threads: threads.clamp(1, 1024), poll: &poll });
        (done, raised.into_inner())
    });
    match raised {
        Some(e) => Err(e),
        None => Ok(done.map_err(error::raise)?),
    }
}

/// The compiled core of `llama1m_ext`; `llama1m_ext.ops` is the interface meant for people.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_function(wrap_pyfunction!(attention::attention, m)?)?;
    m.add_function(wrap_pyfunction!(attention::attention_backward, m)?)?;
    m.add_function(wrap_pyfunction!(attention::merge_partials, m)?)?;
    m.add_function(wrap_pyfunction!(kv::kv_append, m)?)?;
    m.add_function(wrap_pyfunction!(kv::kv_read, m)?)?;
    m.add_function(wrap_pyfunction!(kv::checksum, m)?)?;
    m.add_function(wrap_pyfunction!(kv::checksums, m)?)?;
    m.add_function(wrap_pyfunction!(rope::rope_apply, m)?)?;
    m.add_function(wrap_pyfunction!(rope::cos_sin, m)?)?;
    m.add_function(wrap_pyfunction!(probe::isa, m)?)?;
    m.add_function(wrap_pyfunction!(probe::isa_levels, m)?)?;
    m.add_function(wrap_pyfunction!(probe::peak_flops, m)?)?;
    m.add_function(wrap_pyfunction!(probe::read_seconds, m)?)?;
    m.add_function(wrap_pyfunction!(ring::ring_shard, m)?)?;
    m.add_function(wrap_pyfunction!(ring::ring_schedule, m)?)?;
    m.add_function(wrap_pyfunction!(ring::ring_gradients, m)?)?;
    m.add_function(wrap_pyfunction!(ring::ring_bytes, m)?)?;
    m.add_function(wrap_pyfunction!(ring::ring_balance, m)?)?;
    m.add_function(wrap_pyfunction!(ring::ring_topology, m)?)?;
    #[cfg(feature = "cuda")]
    {
        m.add_function(wrap_pyfunction!(cuda::cuda_attention, m)?)?;
        m.add_function(wrap_pyfunction!(cuda::cuda_attention_workspace, m)?)?;
        m.add_function(wrap_pyfunction!(cuda_backward::cuda_attention_backward, m)?)?;
        m.add_function(wrap_pyfunction!(cuda_backward::cuda_attention_backward_workspace, m)?)?;
        m.add_function(wrap_pyfunction!(cuda_verbs::cuda_merge_partials, m)?)?;
        m.add_function(wrap_pyfunction!(cuda_verbs::cuda_rope_apply, m)?)?;
        m.add_function(wrap_pyfunction!(cuda_verbs::cuda_kv_append, m)?)?;
        m.add_function(wrap_pyfunction!(cuda_verbs::cuda_kv_read, m)?)?;
        m.add_function(wrap_pyfunction!(cuda::cuda_info, m)?)?;
        m.add_function(wrap_pyfunction!(cuda::cuda_set_up, m)?)?;
        m.add_function(wrap_pyfunction!(cuda::cuda_sources, m)?)?;
        m.add_function(wrap_pyfunction!(cuda::nvrtc_compile, m)?)?;
    }
    Ok(())
}
