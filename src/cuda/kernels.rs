//! The kernels: which source they are in, and the geometry of a block.

use crate::dtype::DType;

macro_rules! sources {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../../csrc/", $name)))),*] };
}

/// Sources that NVRTC compiles, one program each.
pub const SOURCES: &[(&str, &str)] = sources!["attention_any.cu", "merge.cu", "rope.cu"];

/// What they include, by name, in byte order of the names.
pub const HEADERS: &[(&str, &str)] = sources!["elements.cuh", "mask.cuh", "params.h", "phase.cuh", "ptx.cuh"];

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
    f32: Kernel,
    bf16: Kernel,
    f16: Kernel,
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

macro_rules! by_dtype {
    ($name:literal, $threads:expr, $smem:expr) => {
        ByDtype {
            f32: Kernel {
                entry: concat!($name, "_f32"),
                source: concat!($name, ".cu"),
                threads: $threads,
                smem: $smem,
            },
            bf16: Kernel {
                entry: concat!($name, "_bf16"),
                source: concat!($name, ".cu"),
                threads: $threads,
                smem: $smem,
            },
            f16: Kernel {
                entry: concat!($name, "_f16"),
                source: concat!($name, ".cu"),
                threads: $threads,
                smem: $smem,
            },
        }
    };
}

/// Queries of a block of `attention_any`.
pub const ANY_QUERIES: usize = 16;
/// See `csrc/attention_any.cu`.
pub static ATTENTION_ANY: ByDtype = by_dtype!("attention_any", 128, 4 * (16 * 257 + 32 * 257 + 16 * 32 + 16));
/// Rows of a block of `merge`.
pub const MERGE_ROWS: usize = 4;
/// See `csrc/merge.cu`.
pub static MERGE: Kernel = Kernel { entry: "merge", source: "merge.cu", threads: 128, smem: 0 };
/// See `csrc/rope.cu`.
pub static ROPE: ByDtype = by_dtype!("rope", 128, 0);
