//! Element types, and the only place that knows how `half` spells them.

use half::{bf16, f16};

/// Element type of q, k, v and out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16: binary32 cut to 8 bits of precision.
    BF16,
    /// IEEE binary16.
    F16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }

    /// torch's word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::BF16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Reads one element as float32 (exact for all three types).
    ///
    /// # Safety
    /// `p` points at one readable element of this type; no alignment is needed.
    #[inline(always)]
    pub unsafe fn read(self, p: *const u8) -> f32 {
        // SAFETY: the caller vouches for `size()` readable bytes; the reads are unaligned.
        unsafe {
            match self {
                Self::F32 => p.cast::<f32>().read_unaligned(),
                Self::BF16 => f32::from_bits(u32::from(p.cast::<u16>().read_unaligned()) << 16),
                Self::F16 => f16::from_bits(p.cast::<u16>().read_unaligned()).to_f32(),
            }
        }
    }

    /// Writes `x` rounded to nearest even.
    ///
    /// # Safety
    /// `p` points at one writable element of this type; no alignment is needed.
    #[inline(always)]
    pub unsafe fn write(self, p: *mut u8, x: f32) {
        // SAFETY: the caller vouches for `size()` writable bytes; the writes are unaligned.
        unsafe {
            match self {
                Self::F32 => p.cast::<f32>().write_unaligned(x),
                Self::BF16 => p.cast::<u16>().write_unaligned(bf16::from_f32(x).to_bits()),
                Self::F16 => p.cast::<u16>().write_unaligned(f16::from_f32(x).to_bits()),
            }
        }
    }
}

/// Rust types that are a [`DType`]; lets safe code make a tensor from a slice.
pub trait Element: Copy + Send + Sync + 'static {
    /// The matching dtype.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
