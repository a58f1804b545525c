//! The kernels: which source they are in, and the geometry of a block.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::GROUP;

macro_rules! sources {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../../csrc/", $name)))),*] };
}

/// Sources that NVRTC compiles, one program each.
pub const SOURCES: &[(&str, &str)] = sources![
    "attention_any.cu",
    "attention_backward_any.cu",
    "attention_backward_sm80.cu",
    "attention_backward_sm90.cu",
    "attention_sm80.cu",
    "attention_sm90.cu",
    "decode.cu",
    "kv.cu",
    "merge.cu",
    "rope.cu",
];

/// What they include, by name, in byte order of the names.
pub const HEADERS: &[(&str, &str)] = sources![
    "codes.cuh",
    "elements.cuh",
    "encode.cuh",
    "mask.cuh",
    "params.h",
    "phase.cuh",
    "ptx.cuh",
    "segment.cuh",
    "sweep.cuh",
    "tiles.cuh",
    "vectors.cuh",
    "walk.cuh",
];

/// An entry point of a source.
#[derive(Debug)]
pub struct Kernel {
    /// Its name, unmangled.
    pub entry: &'static str,
    /// The file it is in.
    pub source: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub smem: u32,
}

/// One kernel for each dtype.
pub struct ByDtype {
    pub(super) f32: Kernel,
    pub(super) bf16: Kernel,
    pub(super) f16: Kernel,
}

impl ByDtype {
    /// The one for a dtype.
    pub fn of(&'static self, dtype: DType) -> &'static Kernel {
        match dtype {
            DType::F32 => &self.f32,
            DType::BF16 => &self.bf16,
            DType::F16 => &self.f16,
        }
    }
}

pub(super) const fn kernel(entry: &'static str, source: &'static str, threads: u32, smem: u32) -> Kernel {
    Kernel { entry, source, threads, smem }
}

macro_rules! by_dtype {
    ($name:literal, $source:literal, $threads:expr, $smem:expr) => {
        ByDtype {
            f32: kernel(concat!($name, "_f32"), $source, $threads, $smem),
            bf16: kernel(concat!($name, "_bf16"), $source, $threads, $smem),
            f16: kernel(concat!($name, "_f16"), $source, $threads, $smem),
        }
    };
}
pub(super) use by_dtype;

/// Queries of a block of `attention_any`.
pub const ANY_QUERIES: usize = 16;
/// See `csrc/attention_any.cu`.
pub static ATTENTION_ANY: ByDtype =
    by_dtype!("attention_any", "attention_any.cu", 128, 4 * (16 * 257 + 32 * 257 + 16 * 32 + 16));

/// Queries of a block of `attention_sm80`.
pub const SM80_QUERIES: usize = 128;
const fn sm80(entry: &'static str, head_dim: usize) -> Kernel {
    kernel(entry, "attention_sm80.cu", 128, ((SM80_QUERIES + 2 * 64) * head_dim * 2 + SM80_QUERIES * 16) as u32)
}

/// The kernel of `csrc/attention_sm80.cu` for a dtype and head_dim.
///
/// # Errors
/// When there is none.
pub fn attention_sm80(dtype: DType, head_dim: usize) -> Result<&'static Kernel> {
    static KERNELS: [Kernel; 4] = [
        sm80("attention_sm80_bf16_d64", 64),
        sm80("attention_sm80_bf16_d128", 128),
        sm80("attention_sm80_f16_d64", 64),
        sm80("attention_sm80_f16_d128", 128),
    ];
    tuned(&KERNELS, dtype, head_dim)
}

/// Warpgroups of a block of `attention_sm90` that compute, and stages of K and V.
const fn sm90_shape(head_dim: usize) -> (usize, usize) {
    if head_dim == 64 { (3, 4) } else { (2, 2) }
}
/// Queries of a block of `attention_sm90`.
pub const fn sm90_queries(head_dim: usize) -> usize {
    64 * sm90_shape(head_dim).0
}
const fn sm90(entry: &'static str, head_dim: usize) -> Kernel {
    let (groups, stages) = sm90_shape(head_dim);
    let tiles = (sm90_queries(head_dim) + 2 * stages * 128) * head_dim * 2;
    kernel(entry, "attention_sm90.cu", 128 * (1 + groups as u32), (tiles + groups * 128 * 8 + 256) as u32)
}

/// The kernel of `csrc/attention_sm90.cu` for a dtype and head_dim.
///
/// # Errors
/// When there is none.
pub fn attention_sm90(dtype: DType, head_dim: usize) -> Result<&'static Kernel> {
    static KERNELS: [Kernel; 4] = [
        sm90("attention_sm90_bf16_d64", 64),
        sm90("attention_sm90_bf16_d128", 128),
        sm90("attention_sm90_f16_d64", 64),
        sm90("attention_sm90_f16_d128", 128),
    ];
    tuned(&KERNELS, dtype, head_dim)
}

const fn decode_smem(head_dim: usize) -> u32 {
    let ring = (256 / head_dim) * (64 * head_dim + 512);
    (4 * ring + 16 * head_dim * 2 + 288) as u32
}

/// The kernel of `csrc/decode.cu` for a dtype and head_dim.
///
/// # Errors
/// When there is none.
pub fn decode(dtype: DType, head_dim: usize) -> Result<&'static Kernel> {
    static KERNELS: [Kernel; 4] = [
        kernel("decode_bf16_d64", "decode.cu", 128, decode_smem(64)),
        kernel("decode_bf16_d128", "decode.cu", 128, decode_smem(128)),
        kernel("decode_f16_d64", "decode.cu", 128, decode_smem(64)),
        kernel("decode_f16_d128", "decode.cu", 128, decode_smem(128)),
    ];
    tuned(&KERNELS, dtype, head_dim)
}

/// Of four kernels, bfloat16 before float16 and head_dim 64 before 128, the one for a call.
pub(super) fn tuned(kernels: &'static [Kernel; 4], dtype: DType, head_dim: usize) -> Result<&'static Kernel> {
    match (dtype, head_dim) {
        (DType::BF16, 64) => Ok(&kernels[0]),
        (DType::BF16, 128) => Ok(&kernels[1]),
        (DType::F16, 64) => Ok(&kernels[2]),
        (DType::F16, 128) => Ok(&kernels[3]),
        _ => {
            Err(Error::value("head_dim", "64 or 128 of bfloat16 or float16", format!("{head_dim} of {}", dtype.name())))
        }
    }
}

/// Rows of a block of `merge`.
pub const MERGE_ROWS: usize = 4;
/// See `csrc/merge.cu`: a warp for each row.
pub static MERGE: Kernel = kernel("merge", "merge.cu", 128, 2048);
/// A block for each row.
pub static MERGE_SPLITS: Kernel = kernel("merge_splits", "merge.cu", 128, 2048);

/// Tokens of a block of `rope`.
pub const ROPE_TOKENS: usize = 4;
/// See `csrc/rope.cu`.
pub static ROPE: ByDtype = by_dtype!("rope", "rope.cu", 256, 5120);

/// See `csrc/kv.cu`; shared memory: what the widest rows take.
pub static KV_APPEND: Kernel = kernel("kv_append", "kv.cu", 256, kv_smem(256));
/// As [`KV_APPEND`].
pub static KV_READ: Kernel = kernel("kv_read", "kv.cu", 256, kv_smem(256));

/// Bytes of shared memory that `kv.cu` takes for compact rows of so many elements; 0: no compact rows.
pub const fn kv_smem(head_dim: usize) -> u32 {
    let width = head_dim.next_multiple_of(GROUP);
    (4096 + if width == 0 { 0 } else { GROUP * (width + 4) * 4 }) as u32
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn source(name: &str) -> &'static str {
        SOURCES.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// What the sources assert of themselves is what is launched.
    #[test]
    fn geometry_is_the_sources() {
        let says = |name: &str, words: String| assert!(source(name).contains(&words), "{name}: expected {words}");
        says("kv.cu", format!("smem_bytes(MAX_WIDTH) == {} && smem_bytes(0) == {}", kv_smem(256), kv_smem(0)));
        says("merge.cu", format!("SMEM_BYTES == {}", MERGE.smem));
        says("rope.cu", format!("SMEM_BYTES == {}", ROPE.f32.smem));
        says("kv.cu", format!("THREADS = {},", KV_APPEND.threads));
        for d in [64, 128] {
            let Kernel { threads, smem, .. } = attention_sm90(DType::BF16, d).unwrap();
            let queries = sm90_queries(d);
            let same = format!("BLOCK_Q<{d}> == {queries} && THREADS<{d}> == {threads} && SMEM_BYTES<{d}> == {smem},");
            says("attention_sm90.cu", same);
        }
        says("attention_sm90.cu", format!("MAPS_PAGES = {};", crate::cuda::tensor_map::MAPS_PAGES));
        says("merge.cu", format!("THREADS = {},", MERGE.threads));
        says("merge.cu", "WARPS = THREADS / 32".into());
        assert_eq!(MERGE_ROWS * 32, MERGE.threads as usize);
        says("rope.cu", format!("TOKENS = {ROPE_TOKENS}, THREADS = {}", ROPE.f32.threads));
        let [wide, narrow] = [128, 64].map(decode_smem);
        says("decode.cu", format!("SMEM_BYTES<128> == {wide} && SMEM_BYTES<64> == {narrow}"));
        says("decode.cu", "THREADS = 128, WARPS = THREADS / 32, ROWS = 16".into());
    }
}
