//! The CUDA engine for Python: tensors on a GPU come in as addresses, work goes to torch's stream.
//!
//! `llama1m_ext.cuda` is the caller; it gives outputs, workspaces and the stream. Nothing here waits for a device.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use super::error::raise;
use super::tensor::{self, Memory};
use crate::args::{AttnArgs, KvRef};
use crate::cuda::attention::{self as verb, Path};
use crate::cuda::launch::{Context, Stream};
use crate::cuda::views::Bounds;
use crate::cuda::{cubin, driver, kernels, nvrtc};
use crate::error::{Error, Result};
use crate::quant::Axis;

/// The memory of one GPU, that of the first tensor that is looked at.
pub(super) fn device_memory() -> PyResult<Memory> {
    let fake = driver::driver().map_err(raise)?.fake;
    Ok(Memory::Device { ordinal: std::cell::Cell::new(None), fake })
}

/// Runs `work` without the GIL on the device that the tensors were on.
pub(super) fn on_device<T: Send>(
    py: Python<'_>,
    memory: &Memory,
    stream: usize,
    work: impl Send + FnOnce(&Context) -> Result<T>,
) -> PyResult<T> {
    let ordinal = memory.ordinal().unwrap_or(0);
    py.detach(|| work(&Context { device: driver::device(ordinal)?, stream: Stream(stream) })).map_err(raise)
}

/// k and v pages from tensors, tuples `(codes, params)`, or lists of them.
pub(super) struct Pages<'py> {
    k: Vec<Bound<'py, PyAny>>,
    v: Vec<Bound<'py, PyAny>>,
}

impl<'py> Pages<'py> {
    pub(super) fn new(k: &Bound<'py, PyAny>, v: &Bound<'py, PyAny>) -> PyResult<Self> {
        Ok(Self { k: tensor::items(k)?, v: tensor::items(v)? })
    }

    pub(super) fn view(&self, memory: &Memory, kv_len: Option<usize>) -> PyResult<KvRef<'_>> {
        let k = tensor::sides(memory, "k", &self.k, Axis::Channel)?;
        let v = tensor::sides(memory, "v", &self.v, Axis::Token)?;
        let held: usize = v.iter().map(|p| p.shape()[2]).sum();
        KvRef::paged(k, v, kv_len.unwrap_or(held)).map_err(raise)
    }
}

/// The address of one int64 entry for each batch row; 0: none.
pub(super) fn per_row(memory: &Memory, name: &str, o: Option<&Bound<'_, PyAny>>, batch: usize) -> PyResult<u64> {
    let Some(o) = o else { return Ok(0) };
    let (at, shape) = memory.int64_address(name, o)?;
    if shape != [batch] {
        return Err(raise(Error::value(name, format!("shape [{batch}]"), format!("shape {shape:?}"))));
    }
    Ok(at)
}

/// Exact attention on one GPU, written to `out` and `lse`.
///
/// `kv_start` and `kv_end` are int64 `[batch]` on the device, `workspace` uint8 of `cuda_attention_workspace` bytes there.
#[pyfunction]
#[pyo3(signature = (q, k, v, out, lse=None, *, causal=true, softmax_scale=None, q_start=None, kv_start=None, kv_end=None, kv_len=None, workspace=None, stream=0, path="auto"))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn cuda_attention(
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
    workspace: Option<&Bound<'_, PyAny>>,
    stream: usize,
    path: &str,
) -> PyResult<()> {
    let path = Path::parse(path).map_err(raise)?;
    let memory = device_memory()?;
    let pages = Pages::new(k, v)?;
    let q = memory.rows("q", q)?;
    let kv = pages.view(&memory, kv_len)?;
    let out = memory.rows_mut("out", out)?;
    let lse = lse.map(|o| memory.sums_mut("lse", o)).transpose()?;
    let batch = q.shape()[0];
    let bounds = Bounds {
        start: per_row(&memory, "kv_start", kv_start, batch)?,
        end: per_row(&memory, "kv_end", kv_end, batch)?,
    };
    let workspace = workspace.map(|o| memory.workspace("workspace", o)).transpose()?;
    let args = AttnArgs { q, kv, out, lse, causal, softmax_scale, q_start, kv_start: None, kv_end: None };
    let p = args.validate().map_err(raise)?;
    // SAFETY: every view was checked against its tensor, which is on that device; torch gives memory back in the order of
    // the stream, so it stays valid for what is launched there.
    on_device(py, &memory, stream, move |cx| unsafe { verb::attention(&p, bounds, workspace, path, cx) })
}

/// Bytes of workspace that `cuda_attention` wants for such a call.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, kv_len=None, path="auto", out_f32=false))]
pub fn cuda_attention_workspace(
    q: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    v: &Bound<'_, PyAny>,
    kv_len: Option<usize>,
    path: &str,
    out_f32: bool,
) -> PyResult<usize> {
    let path = Path::parse(path).map_err(raise)?;
    let memory = device_memory()?;
    let pages = Pages::new(k, v)?;
    let q = memory.rows("q", q)?;
    let kv = pages.view(&memory, kv_len)?;
    let device = driver::device(memory.ordinal().unwrap_or(0)).map_err(raise)?;
    verb::workspace_bytes(&q, &kv, out_f32, path, device).map_err(raise)
}

/// What there is of CUDA: driver, devices, NVRTC, kernels. Raises nothing where something is missing.
#[pyfunction]
pub fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    let of_driver = PyDict::new(py);
    // One entry for each number: what there is, or why it can't be told.
    let devices = PyList::empty(py);
    match driver::driver() {
        Ok(d) => {
            of_driver.set_item("found", true)?;
            of_driver.set_item("version", format!("{}.{}", d.version / 1000, d.version % 1000 / 10))?;
            of_driver.set_item("why", py.None())?;
            of_driver.set_item("fake", d.fake)?;
            for ordinal in 0..d.devices {
                match driver::device(ordinal) {
                    Ok(d) => devices.append((d.name.clone(), d.capability, d.sms, d.memory))?,
                    Err(e) => devices.append(e.to_string())?,
                }
            }
        }
        Err(e) => {
            of_driver.set_item("found", false)?;
            of_driver.set_item("version", py.None())?;
            of_driver.set_item("why", e.to_string())?;
            of_driver.set_item("fake", false)?;
        }
    }
    info.set_item("driver", of_driver)?;
    info.set_item("devices", devices)?;
    let of_nvrtc = PyDict::new(py);
    match cubin::nvrtc() {
        Ok(n) => {
            of_nvrtc.set_item("path", &n.path)?;
            of_nvrtc.set_item("version", format!("{}.{}", n.version.0, n.version.1))?;
            of_nvrtc.set_item("why", py.None())?;
        }
        Err(e) => {
            of_nvrtc.set_item("path", py.None())?;
            of_nvrtc.set_item("version", py.None())?;
            of_nvrtc.set_item("why", e.to_string())?;
        }
    }
    info.set_item("nvrtc", of_nvrtc)?;
    info.set_item("cubins", cubin::packed_archs())?;
    info.set_item("cache", cubin::setup().cache.map(|p| p.to_string_lossy().into_owned()))?;
    Ok(info)
}

/// Says where cubins, compiled kernels and NVRTC are.
#[pyfunction]
pub fn cuda_set_up(packed: Option<String>, cache: Option<String>, nvrtc: Vec<String>) {
    cubin::set_up(cubin::Setup { packed: packed.map(Into::into), cache: cache.map(Into::into), nvrtc });
}

/// The kernels' sources: name to the hash that cubins are known by.
#[pyfunction]
pub fn cuda_sources(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = PyDict::new(py);
    for (name, _) in kernels::SOURCES {
        found.set_item(name, cubin::source_hash(name))?;
    }
    Ok(found)
}

/// Compiles one of the kernels' sources for an architecture ("sm_90a": a cubin; "compute_80": PTX): the image and the
/// compiler's log.
#[pyfunction]
#[pyo3(signature = (source, arch, *, nvrtc=None))]
pub fn nvrtc_compile<'py>(
    py: Python<'py>,
    source: &str,
    arch: &str,
    nvrtc: Option<&str>,
) -> PyResult<(Bound<'py, PyBytes>, String)> {
    let done = py.detach(|| match nvrtc {
        Some(path) => cubin::compile(&nvrtc::Nvrtc::open(path)?, source, arch),
        None => cubin::compile(cubin::nvrtc()?, source, arch),
    });
    let done = done.map_err(raise)?;
    Ok((PyBytes::new(py, &done.image), done.log))
}
