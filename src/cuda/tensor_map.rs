//! How Hopper's tensor copy engine (TMA) is told of a tensor: `cuTensorMapEncodeTiled`.

use cudarc::driver::sys;

use super::driver::said;
use super::kernels::sm90_queries;
use super::params::{Attn, Backward, View};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Pages of one launch of `attention_sm90`: a kernel's parameters are to stay under 4 KB.
pub const MAPS_PAGES: usize = 6;
/// Channels of a box: 128 bytes.
const CHANNELS: u32 = 64;
/// Rows of a box of K or V.
const KEYS: usize = 128;

/// The driver's own, which is only ever given to a kernel.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default)]
pub struct TensorMap([u64; 16]);

/// `Maps` of `csrc/attention_sm90.cu`: q, then k and v of each page.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Maps {
    q: TensorMap,
    k: [TensorMap; MAPS_PAGES],
    v: [TensorMap; MAPS_PAGES],
}

/// `Maps` of `csrc/attention_backward_sm90.cu`: what a block owns, and what it streams.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SweepMaps {
    x: [TensorMap; 2],
    y: [TensorMap; 2],
}

impl SweepMaps {
    /// Those of a sweep of keys (`keys`) or of queries: boxes of `rows` and of `columns` rows.
    ///
    /// # Errors
    /// When the driver refuses one.
    pub fn new(call: &Backward, dtype: DType, keys: bool, rows: usize, columns: usize) -> Result<Self> {
        let [batch, dim] = [call.batch, call.head_dim].map(|n| n as u64);
        let pair = |names: [&str; 2], views: [&View; 2], len: i32, heads: i32, tile: usize| {
            let one = |n: usize| encode(names[n], dtype, views[n], [dim, len as u64, heads as u64, batch], tile as u32);
            Ok([one(0)?, one(1)?])
        };
        let (of_queries, of_keys) = if keys { (columns, rows) } else { (rows, columns) };
        let queries = pair(["q", "grad_out"], [&call.q, &call.grad_out], call.q_len, call.q_heads, of_queries)?;
        let of_keys = pair(["k", "v"], [&call.k, &call.v], call.kv_len, call.kv_heads, of_keys)?;
        Ok(if keys { Self { x: of_keys, y: queries } } else { Self { x: queries, y: of_keys } })
    }
}

/// Why the copy engine can't read rows of such a view; None: it can. Shape: `[batch, heads, rows]`.
pub fn unmapped(view: &View, shape: [usize; 3]) -> Option<String> {
    let strides = [view.batch_stride, view.head_stride, view.row_stride];
    let bad = shape.iter().zip(strides).find(|(n, s)| **n > 1 && !(16..1 << 40).contains(s))?;
    Some(format!("an axis of {} with a stride of {} bytes", bad.0, bad.1))
}

impl Maps {
    /// Those of a call: its queries and the pages that it has.
    ///
    /// # Errors
    /// When the driver refuses one.
    pub fn new(call: &Attn, dtype: DType) -> Result<Self> {
        let [batch, dim] = [call.batch, call.head_dim].map(|n| n as u64);
        let one = |name: &str, view: &View, rows: i32, heads: i32, tile: usize| {
            encode(name, dtype, view, [dim, rows as u64, heads as u64, batch], tile as u32)
        };
        let q = one("q", &call.q, call.q_len, call.q_heads, sm90_queries(dim as usize))?;
        let mut maps = Self { q, ..Self::default() };
        for (n, page) in call.page[..call.pages as usize].iter().enumerate() {
            maps.k[n] = one("k", &page.k.rows, page.tokens, call.kv_heads, KEYS)?;
            maps.v[n] = one("v", &page.v.rows, page.tokens, call.kv_heads, KEYS)?;
        }
        Ok(maps)
    }
}

/// Sizes from the innermost axis on: channels, rows, heads, batch. What lies beyond them is read as zeros. `tile`: rows of a
/// box.
fn encode(name: &str, dtype: DType, view: &View, size: [u64; 4], tile: u32) -> Result<TensorMap> {
    let kind = match dtype {
        DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::F32 => return Err(Error::type_(name, "bfloat16 or float16", dtype.name())),
    };
    // A stride that is never taken may be anything, and the driver looks at it all the same.
    let taken = |n: u64, stride: i64| if n > 1 { stride as u64 } else { size[0] * 2 };
    let stride = [taken(size[1], view.row_stride), taken(size[2], view.head_stride), taken(size[3], view.batch_stride)];
    let mut map = sys::CUtensorMap_st { opaque: [0; 16] };
    // SAFETY: all arrays have the length that the rank says; the address is looked at, not through.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            kind,
            4,
            view.ptr as *mut std::ffi::c_void,
            size.as_ptr(),
            stride.as_ptr(),
            [CHANNELS, tile, 1, 1].as_ptr(),
            [1u32; 4].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|e| said(&format!("{name}: cuTensorMapEncodeTiled of {size:?} with strides {stride:?}"), e))?;
    Ok(TensorMap(map.opaque))
}
