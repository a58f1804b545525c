//! torch tensors and numpy arrays as views: type, device, dtype, shape, strides and memory are read from the object
//! itself and checked against its storage, so that no argument can make the core read out of bounds.

#[cfg(feature = "cuda")]
use std::cell::Cell;

use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyString, PyTuple};

use super::error::raise;
use crate::args::Side;
use crate::cpu::kv::SideMut;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{Axis, Codes, CompactMut, CompactRef};
use crate::tensor::{Byte, BytesMut, BytesRef, TensorMut, TensorRef, span};

/// What torch gives once: its tensor type and dtypes, compared by identity.
struct Torch {
    tensor: Py<PyAny>,
    strided: Py<PyAny>,
    float32: Py<PyAny>,
    bfloat16: Py<PyAny>,
    float16: Py<PyAny>,
    float64: Py<PyAny>,
    int64: Py<PyAny>,
    int8: Py<PyAny>,
    uint8: Py<PyAny>,
    fp8: Py<PyAny>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// torch, if somebody imported it: a program without it has no tensors to give us.
fn torch(py: Python<'_>) -> PyResult<Option<&Torch>> {
    if let Some(t) = TORCH.get(py) {
        return Ok(Some(t));
    }
    let modules = py.import("sys")?.getattr("modules")?;
    let Ok(torch) = modules.get_item("torch") else { return Ok(None) };
    let get = |name: &str| torch.getattr(name).map(Bound::unbind);
    let made = Torch {
        tensor: get("Tensor")?,
        strided: get("strided")?,
        float32: get("float32")?,
        bfloat16: get("bfloat16")?,
        float16: get("float16")?,
        float64: get("float64")?,
        int64: get("int64")?,
        int8: get("int8")?,
        uint8: get("uint8")?,
        fp8: get("float8_e4m3fn")?,
    };
    Ok(Some(TORCH.get_or_init(py, || made)))
}

/// Element types that cross the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Real(DType),
    F64,
    I64,
    Code(Codes),
}

impl Kind {
    fn size(self) -> usize {
        match self {
            Self::Real(d) => d.size(),
            Self::F64 | Self::I64 => 8,
            Self::Code(_) => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Real(d) => d.name(),
            Self::F64 => "float64",
            Self::I64 => "int64",
            Self::Code(Codes::Int8) => "int8",
            Self::Code(Codes::Int4) => "uint8",
            Self::Code(Codes::Fp8) => "float8_e4m3fn",
        }
    }
}

/// Which memory a call takes its tensors from.
#[derive(Debug)]
pub enum Memory {
    /// The CPU's.
    Host,
    /// One GPU's: that of the first tensor that comes. The host's under a driver that runs kernels there, as in our tests.
    #[cfg(feature = "cuda")]
    Device {
        /// Its number, once it is known.
        ordinal: Cell<Option<i32>>,
        /// Whether host memory is the device's.
        fake: bool,
    },
}

/// The CPU's memory.
pub const HOST: Memory = Memory::Host;

/// A checked strided array: `bytes` are readable from `ptr` on.
struct Array {
    ptr: *mut u8,
    bytes: usize,
    kind: Kind,
    shape: Vec<usize>,
    stride: Vec<usize>,
    writeable: bool,
}

fn type_name(o: &Bound<'_, PyAny>) -> String {
    o.get_type().fully_qualified_name().map_or_else(|_| "an object".into(), |n| n.to_string())
}

impl Memory {
    /// Checks that a torch tensor is where it should be.
    fn check(&self, name: &str, o: &Bound<'_, PyAny>) -> PyResult<()> {
        let device = o.getattr("device")?;
        let kind = device.getattr("type")?;
        let kind = kind.cast::<PyString>()?.to_cow()?;
        match self {
            Self::Host if kind == "cpu" => Ok(()),
            Self::Host => Err(raise(Error::type_(name, "a CPU tensor", format!("a tensor on {device}")))),
            #[cfg(feature = "cuda")]
            Self::Device { ordinal, fake } => {
                let number = match &*kind {
                    "cuda" => device.getattr("index")?.extract::<Option<i32>>()?.unwrap_or(0),
                    "cpu" if *fake => 0,
                    _ => return Err(raise(Error::type_(name, "a CUDA tensor", format!("a tensor on {device}")))),
                };
                match ordinal.replace(Some(number)) {
                    Some(first) if first != number => {
                        Err(raise(Error::type_(name, format!("a tensor on cuda:{first}, as the first one"), device)))
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

impl Array {
    fn new(name: &str, o: &Bound<'_, PyAny>, memory: &Memory) -> PyResult<Self> {
        if let Some(t) = torch(o.py())?
            && o.is_instance(t.tensor.bind(o.py()))?
        {
            memory.check(name, o)?;
            return Self::from_torch(name, o, t);
        }
        #[cfg(feature = "cuda")]
        if matches!(memory, Memory::Device { .. }) {
            return Err(raise(Error::type_(name, "a torch.Tensor on a GPU", type_name(o))));
        }
        match o.cast::<PyUntypedArray>() {
            Ok(a) => Self::from_numpy(name, a),
            Err(_) => Err(raise(Error::type_(name, "a torch.Tensor (or a numpy array)", type_name(o)))),
        }
    }

    fn from_torch(name: &str, o: &Bound<'_, PyAny>, t: &Torch) -> PyResult<Self> {
        let py = o.py();
        let layout = o.getattr("layout")?;
        if !layout.is(&t.strided) {
            return Err(raise(Error::type_(name, "a dense (strided) tensor", layout)));
        }
        let dtype = o.getattr("dtype")?;
        let kind = if dtype.is(&t.bfloat16) {
            Kind::Real(DType::BF16)
        } else if dtype.is(&t.float32) {
            Kind::Real(DType::F32)
        } else if dtype.is(&t.float16) {
            Kind::Real(DType::F16)
        } else if dtype.is(&t.int64) {
            Kind::I64
        } else if dtype.is(&t.float64) {
            Kind::F64
        } else if dtype.is(&t.int8) {
            Kind::Code(Codes::Int8)
        } else if dtype.is(&t.uint8) {
            Kind::Code(Codes::Int4)
        } else if dtype.is(&t.fp8) {
            Kind::Code(Codes::Fp8)
        } else {
            return Err(raise(Error::type_(
                name,
                "a dtype of float32, bfloat16 or float16 (positions: int64, inv_freq: float64; codes: int8, uint8, float8_e4m3fn)",
                dtype,
            )));
        };
        let shape: Vec<usize> = o.getattr("shape")?.extract()?;
        let stride: Vec<usize> = o.call_method0("stride")?.extract()?;
        // Through the base class, past any override in a subclass.
        let tensor = t.tensor.bind(py);
        let ptr: usize = tensor.call_method1("data_ptr", (o,))?.extract()?;
        let storage = tensor.call_method1("untyped_storage", (o,))?;
        let (base, size): (usize, usize) =
            (storage.call_method0("data_ptr")?.extract()?, storage.call_method0("nbytes")?.extract()?);
        let made = Self {
            ptr: ptr as *mut u8,
            bytes: (base + size).saturating_sub(ptr),
            kind,
            shape,
            stride,
            writeable: true,
        };
        if made.shape.contains(&0) {
            return Ok(made);
        }
        if ptr == 0 || ptr < base {
            return Err(raise(Error::type_(
                name,
                "a tensor with memory of its own",
                "one without (meta, fake or a wrapper)",
            )));
        }
        made.bounded(name).map_err(raise)
    }

    fn from_numpy(name: &str, a: &Bound<'_, PyUntypedArray>) -> PyResult<Self> {
        let py = a.py();
        let dtype = a.dtype();
        let kind = if dtype.is_equiv_to(&numpy::dtype::<f32>(py)) {
            Kind::Real(DType::F32)
        } else if dtype.is_equiv_to(&numpy::dtype::<i64>(py)) {
            Kind::I64
        } else if dtype.is_equiv_to(&numpy::dtype::<f64>(py)) {
            Kind::F64
        } else if dtype.kind() == b'f' && dtype.itemsize() == 2 && dtype.is_native_byteorder().unwrap_or(false) {
            Kind::Real(DType::F16)
        } else {
            return Err(raise(Error::type_(
                name,
                "float32 or float16 (positions: int64, inv_freq: float64) in native byte order",
                dtype,
            )));
        };
        let size = kind.size();
        let mut stride = Vec::with_capacity(a.ndim());
        for (n, s) in a.shape().iter().zip(a.strides()) {
            let ok = *s >= 0 && (*s as usize).is_multiple_of(size);
            if !ok && *n > 1 {
                return Err(raise(Error::value(
                    name,
                    "strides that are whole, non-negative numbers of elements",
                    format!("{s} bytes"),
                )));
            }
            stride.push(if ok { *s as usize / size } else { 0 });
        }
        // SAFETY: a live array object; its fields are read only.
        let (ptr, flags) = unsafe { ((*a.as_array_ptr()).fields.data, (*a.as_array_ptr()).fields.flags) };
        let shape = a.shape().to_vec();
        // numpy vouches for every element of its own array.
        let bytes = span(&shape, &stride).and_then(|n| n.checked_mul(size)).unwrap_or(0);
        let writeable = flags & numpy::npyffi::NPY_ARRAY_WRITEABLE != 0;
        Ok(Self { ptr: ptr.cast(), bytes, kind, shape, stride, writeable })
    }

    fn bounded(self, name: &str) -> Result<Self> {
        match span(&self.shape, &self.stride) {
            Some(n) if n.checked_mul(self.kind.size()).is_some_and(|b| b <= self.bytes) => Ok(self),
            _ => Err(Error::value(
                name,
                format!("a view inside its storage of {} bytes", self.bytes),
                format!("shape {:?} with strides {:?}", self.shape, self.stride),
            )),
        }
    }

    /// Shape and strides padded to rank 4: `[batch, heads, len]` gets a last axis of 1.
    fn rank4(&self, name: &str, rank: usize, axes: &str) -> Result<(DType, [usize; 4], [usize; 4])> {
        let Kind::Real(dtype) = self.kind else {
            return Err(Error::type_(name, "float32, bfloat16 or float16", self.kind.name()));
        };
        if self.shape.len() != rank {
            return Err(Error::value(name, axes, format!("shape {:?}", self.shape)));
        }
        let (mut shape, mut stride) = ([1; 4], [1; 4]);
        shape[..rank].copy_from_slice(&self.shape);
        stride[..rank].copy_from_slice(&self.stride);
        Ok((dtype, shape, stride))
    }
}

const ROWS: &str = "[batch, heads, len, head_dim]";
const SUMS: &str = "[batch, heads, len]";

impl Memory {
    /// A view to read, `[batch, heads, len, head_dim]`, or `[batch, heads, len]` where `rank` is 3. Views live as long as
    /// their objects, which the caller keeps.
    fn read<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>, rank: usize) -> PyResult<TensorRef<'a>> {
        let a = Array::new(name, o, self)?;
        let (dtype, shape, stride) = a.rank4(name, rank, if rank == 4 { ROWS } else { SUMS }).map_err(raise)?;
        // SAFETY: the array was checked against its storage, which the object keeps alive.
        unsafe { TensorRef::from_raw(name, a.ptr, a.bytes, dtype, shape, stride) }.map_err(raise)
    }

    /// `[batch, heads, len, head_dim]` to read.
    pub fn rows<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>) -> PyResult<TensorRef<'a>> {
        self.read(name, o, 4)
    }

    /// `[batch, heads, len]` to read.
    pub fn sums<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>) -> PyResult<TensorRef<'a>> {
        self.read(name, o, 3)
    }

    fn write<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>, rank: usize) -> PyResult<TensorMut<'a>> {
        let a = Array::new(name, o, self)?;
        if !a.writeable {
            return Err(raise(Error::value(name, "a writeable array", "a read-only one")));
        }
        let (dtype, shape, stride) = a.rank4(name, rank, if rank == 4 { ROWS } else { SUMS }).map_err(raise)?;
        // SAFETY: as in `read`; the caller hands over an output that nobody else uses meanwhile.
        unsafe { TensorMut::from_raw(name, a.ptr, a.bytes, dtype, shape, stride) }.map_err(raise)
    }

    /// `[batch, heads, len, head_dim]` to write.
    pub fn rows_mut<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>) -> PyResult<TensorMut<'a>> {
        self.write(name, o, 4)
    }

    /// `[batch, heads, len]` to write.
    pub fn sums_mut<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>) -> PyResult<TensorMut<'a>> {
        self.write(name, o, 3)
    }

    /// q, and k where there is one, each with where its rotation goes.
    #[allow(clippy::type_complexity)] // as the engines take them
    pub fn pairs<'a>(
        &self,
        q: &'a Bound<'_, PyAny>,
        k: Option<&'a Bound<'_, PyAny>>,
        q_out: &'a Bound<'_, PyAny>,
        k_out: Option<&'a Bound<'_, PyAny>>,
    ) -> PyResult<Vec<(&'static str, TensorRef<'a>, TensorMut<'a>)>> {
        let mut pairs = vec![("q", self.rows("q", q)?, self.rows_mut("q_out", q_out)?)];
        match (k, k_out) {
            (Some(k), Some(k_out)) => pairs.push(("k", self.rows("k", k)?, self.rows_mut("k_out", k_out)?)),
            (None, None) => {}
            _ => return Err(raise(Error::value("k_out", "k and k_out together", "only one of them"))),
        }
        Ok(pairs)
    }

    /// Partials: outs `[batch, heads, len, head_dim]` and lses `[batch, heads, len]`.
    #[allow(clippy::type_complexity)] // as above
    pub fn partials<'a>(
        &self,
        outs: &'a [Bound<'_, PyAny>],
        lses: &'a [Bound<'_, PyAny>],
    ) -> PyResult<(Vec<TensorRef<'a>>, Vec<TensorRef<'a>>)> {
        let outs = outs.iter().enumerate().map(|(i, o)| self.rows(&format!("outs[{i}]"), o));
        let outs = outs.collect::<PyResult<_>>()?;
        let lses = lses.iter().enumerate().map(|(i, o)| self.sums(&format!("lses[{i}]"), o));
        Ok((outs, lses.collect::<PyResult<_>>()?))
    }

    /// Keys or values of a page, to read: a tensor, or `(codes, params)`.
    pub fn side<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>, axis: Axis) -> PyResult<Side<'a>> {
        let Ok(pair) = o.cast::<PyTuple>() else { return Ok(Side::Dense(self.rows(name, o)?)) };
        let c = self.compact(name, pair)?;
        // SAFETY: the arrays were checked against their storages, which the tuple's tensors keep alive; a tuple can't
        // change.
        let made = unsafe {
            BytesRef::from_raw(name, c.rows.ptr, c.rows.bytes, Byte, c.shape, c.stride).and_then(|rows| {
                let (shape, stride) = (c.params_shape, c.params_stride);
                let params =
                    TensorRef::from_raw(&c.params_name, c.params.ptr, c.params.bytes, c.params_dtype, shape, stride)?;
                CompactRef::new(name, c.codes, axis, rows, params)
            })
        };
        Ok(Side::Compact(made.map_err(raise)?))
    }

    /// Keys or values of a page, to write.
    pub fn side_mut<'a>(&self, name: &str, o: &'a Bound<'_, PyAny>, axis: Axis) -> PyResult<SideMut<'a>> {
        let Ok(pair) = o.cast::<PyTuple>() else { return Ok(SideMut::Dense(self.rows_mut(name, o)?)) };
        let c = self.compact(name, pair)?;
        if !(c.rows.writeable && c.params.writeable) {
            return Err(raise(Error::value(name, "a writeable array", "a read-only one")));
        }
        // SAFETY: as in `side`; the caller hands over a page that nobody else uses meanwhile.
        let made = unsafe {
            BytesMut::from_raw(name, c.rows.ptr, c.rows.bytes, Byte, c.shape, c.stride).and_then(|rows| {
                let (shape, stride) = (c.params_shape, c.params_stride);
                let params =
                    TensorMut::from_raw(&c.params_name, c.params.ptr, c.params.bytes, c.params_dtype, shape, stride)?;
                CompactMut::new(name, c.codes, axis, rows, params)
            })
        };
        Ok(SideMut::Compact(made.map_err(raise)?))
    }

    /// The two arrays of compact keys or values, from `(codes, params)`.
    fn compact(&self, name: &str, o: &Bound<'_, PyTuple>) -> PyResult<CompactArrays> {
        if o.len() != 2 {
            return Err(raise(Error::value(name, "(codes, params)", format!("a tuple of {}", o.len()))));
        }
        let rows = Array::new(name, &o.get_item(0)?, self)?;
        let Kind::Code(codes) = rows.kind else {
            return Err(raise(Error::type_(name, "codes of int8, uint8 or float8_e4m3fn", rows.kind.name())));
        };
        if rows.shape.len() != 4 {
            let got = format!("shape {:?}", rows.shape);
            return Err(raise(Error::value(name, "[batch, kv_heads, tokens, width]", got)));
        }
        let (mut shape, mut stride) = ([0; 4], [0; 4]);
        shape.copy_from_slice(&rows.shape);
        stride.copy_from_slice(&rows.stride);
        let params_name = format!("{name} params");
        let params = Array::new(&params_name, &o.get_item(1)?, self)?;
        let (params_dtype, params_shape, params_stride) = params.rank4(&params_name, 4, PARAMS).map_err(raise)?;
        Ok(CompactArrays { codes, rows, shape, stride, params_name, params, params_dtype, params_shape, params_stride })
    }

    /// The number of the GPU, once a tensor has come.
    #[cfg(feature = "cuda")]
    pub fn ordinal(&self) -> Option<i32> {
        if let Self::Device { ordinal, .. } = self { ordinal.get() } else { None }
    }

    /// The address of int64 values on a device, of a shape that the caller looks at, contiguous.
    #[cfg(feature = "cuda")]
    pub fn int64_address(&self, name: &str, o: &Bound<'_, PyAny>) -> PyResult<(u64, Vec<usize>)> {
        let a = Array::new(name, o, self)?;
        if a.kind != Kind::I64 {
            return Err(raise(Error::type_(name, "int64", a.kind.name())));
        }
        let n: usize = a.shape.iter().product();
        let mut run = 1;
        for (size, stride) in a.shape.iter().zip(&a.stride).rev() {
            if *size != 1 && *stride != run {
                return Err(raise(Error::value(name, "a contiguous tensor", format!("strides {:?}", a.stride))));
            }
            run *= size;
        }
        Ok((if n == 0 { 0 } else { a.ptr as u64 }, a.shape))
    }

    /// Address and bytes of a contiguous uint8 tensor on a device.
    #[cfg(feature = "cuda")]
    pub fn workspace(&self, name: &str, o: &Bound<'_, PyAny>) -> PyResult<(u64, usize)> {
        let a = Array::new(name, o, self)?;
        if a.kind != Kind::Code(Codes::Int4) || a.shape.len() != 1 || (a.shape[0] > 1 && a.stride[0] != 1) {
            return Err(raise(Error::type_(name, "contiguous bytes, uint8 [n]", format!("shape {:?}", a.shape))));
        }
        Ok((a.ptr as u64, a.shape[0]))
    }
}

/// Codes and params as they came, not yet a view.
struct CompactArrays {
    codes: Codes,
    rows: Array,
    shape: [usize; 4],
    stride: [usize; 4],
    params_name: String,
    params: Array,
    params_dtype: DType,
    params_shape: [usize; 4],
    params_stride: [usize; 4],
}

/// Keys or values of pages; a single one is called `name`, several `name[i]`.
pub fn sides<'a>(memory: &Memory, name: &str, pages: &'a [Bound<'_, PyAny>], axis: Axis) -> PyResult<Vec<Side<'a>>> {
    let one = pages.len() == 1;
    let called = |i: usize| if one { name.to_string() } else { format!("{name}[{i}]") };
    pages.iter().enumerate().map(|(i, o)| memory.side(&called(i), o, axis)).collect()
}

const PARAMS: &str = "params of rank 4";

/// The items of a list or tuple, or the object itself as the only one.
pub fn items<'py>(o: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
    if o.is_instance_of::<PyList>() || o.is_instance_of::<PyTuple>() {
        return o.try_iter()?.collect();
    }
    Ok(vec![o.clone()])
}

/// All elements of an int64 or float64 array, in order, whatever its strides.
fn values<T: Copy>(name: &str, a: &Array) -> Result<Vec<T>> {
    let n: usize = a.shape.iter().product();
    let mut out = Vec::new();
    out.try_reserve_exact(n).map_err(|e| Error::Resources(format!("{name}: {e}")))?;
    let mut index = vec![0usize; a.shape.len()];
    for _ in 0..n {
        let at: usize = index.iter().zip(&a.stride).map(|(i, s)| i * s).sum();
        // SAFETY: inside the shape, which was checked against the memory.
        out.push(unsafe { a.ptr.cast::<T>().add(at).read_unaligned() });
        for d in (0..index.len()).rev() {
            index[d] += 1;
            if index[d] < a.shape[d] {
                break;
            }
            index[d] = 0;
        }
    }
    Ok(out)
}

/// int64 values and their shape, from a tensor or an array.
pub fn int64s(name: &str, o: &Bound<'_, PyAny>) -> PyResult<(Vec<i64>, Vec<usize>)> {
    let a = Array::new(name, o, &HOST)?;
    if a.kind != Kind::I64 {
        return Err(raise(Error::type_(name, "int64", a.kind.name())));
    }
    Ok((values(name, &a).map_err(raise)?, a.shape))
}

/// float64 values of a vector, from a tensor or an array.
pub fn float64s(name: &str, o: &Bound<'_, PyAny>) -> PyResult<Vec<f64>> {
    let a = Array::new(name, o, &HOST)?;
    if a.kind != Kind::F64 {
        return Err(raise(Error::type_(name, "float64", a.kind.name())));
    }
    if a.shape.len() != 1 {
        return Err(raise(Error::value(name, "a vector", format!("shape {:?}", a.shape))));
    }
    values(name, &a).map_err(raise)
}

/// The bytes of a contiguous tensor or array, for measuring how fast they can be read.
pub fn bytes<'a>(name: &str, o: &'a Bound<'_, PyAny>) -> PyResult<&'a [u8]> {
    let a = Array::new(name, o, &HOST)?;
    let n: usize = a.shape.iter().product();
    if span(&a.shape, &a.stride) != Some(n) {
        return Err(raise(Error::value(name, "a contiguous tensor", format!("strides {:?}", a.stride))));
    }
    if n == 0 {
        return Ok(&[]);
    }
    // SAFETY: checked against the storage, which the object keeps alive; the bytes are only read.
    Ok(unsafe { std::slice::from_raw_parts(a.ptr, n * a.kind.size()) })
}
