//! Borrowed rank-4 memory: pointer, shape, strides, dtype. The core owns no tensor.
//!
//! Axes are always `[batch, heads, len, head_dim]`; strides are in elements, never negative, and the last one is 1.
//! Offsets are 64-bit: one layer's q at 2^20 tokens has exactly 2^32 elements.

use std::marker::PhantomData;

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};

/// What a view is made of: elements of a dtype, or bytes.
pub trait Unit: Copy {
    /// Bytes of one.
    fn size(self) -> usize;
    /// What messages call it.
    fn name(self) -> &'static str;
}

impl Unit for DType {
    fn size(self) -> usize {
        Self::size(self)
    }

    fn name(self) -> &'static str {
        Self::name(self)
    }
}

/// The unit of codes.
#[derive(Debug, Clone, Copy)]
pub struct Byte;

impl Unit for Byte {
    fn size(self) -> usize {
        1
    }

    fn name(self) -> &'static str {
        "bytes"
    }
}

/// A view `[batch, heads, len, head_dim]` that may be read.
#[derive(Debug, Clone, Copy)]
pub struct ViewRef<'a, U> {
    ptr: *const u8,
    unit: U,
    shape: [usize; 4],
    stride: [usize; 4],
    life: PhantomData<&'a u8>,
}

// SAFETY: a view is only ever read through, like `&[u8]`.
unsafe impl<U: Send> Send for ViewRef<'_, U> {}
// SAFETY: as above.
unsafe impl<U: Sync> Sync for ViewRef<'_, U> {}

/// A view `[batch, heads, len, head_dim]` that may be written; engines write disjoint rows from several threads.
#[derive(Debug, Clone, Copy)]
pub struct ViewMut<'a, U> {
    ptr: *mut u8,
    unit: U,
    shape: [usize; 4],
    stride: [usize; 4],
    life: PhantomData<&'a mut u8>,
}

// SAFETY: engines hand each row to one task; the type itself shares nothing.
unsafe impl<U: Send> Send for ViewMut<'_, U> {}
// SAFETY: as above.
unsafe impl<U: Sync> Sync for ViewMut<'_, U> {}

/// A view of elements to read.
pub type TensorRef<'a> = ViewRef<'a, DType>;
/// A view of elements to write.
pub type TensorMut<'a> = ViewMut<'a, DType>;
/// Rows of bytes `[batch, heads, len, bytes]` to read: the codes of compact keys or values.
pub type BytesRef<'a> = ViewRef<'a, Byte>;
/// Rows of bytes to write.
pub type BytesMut<'a> = ViewMut<'a, Byte>;

/// Elements from the first to the last one that the view can touch, or None on overflow; 0 for an empty view.
pub fn span(shape: &[usize], stride: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0usize;
    for (&n, &s) in shape.iter().zip(stride) {
        last = last.checked_add((n - 1).checked_mul(s)?)?;
    }
    last.checked_add(1).filter(|n| *n <= isize::MAX as usize / 4)
}

fn check(name: &str, unit: impl Unit, shape: [usize; 4], stride: [usize; 4], bytes: usize) -> Result<()> {
    if shape[3] > 1 && stride[3] != 1 {
        return Err(Error::value(name, "a contiguous last axis (stride 1)", format!("stride {}", stride[3])));
    }
    match span(&shape, &stride) {
        Some(n) if n * unit.size() <= bytes => Ok(()),
        _ => Err(Error::value(
            name,
            format!("a view inside its memory of {bytes} bytes"),
            format!("shape {shape:?} with strides {stride:?} of {}", unit.name()),
        )),
    }
}

/// Two elements of an output must not share an address.
fn check_unshared(name: &str, shape: [usize; 4], stride: [usize; 4]) -> Result<()> {
    if shape.iter().zip(&stride).any(|(n, s)| *n > 1 && *s == 0) {
        return Err(Error::value(name, "an output without expanded (stride 0) axes", format!("strides {stride:?}")));
    }
    Ok(())
}

/// What both kinds of view know of themselves.
macro_rules! layout {
    ($ptr:ty) => {
        /// `[batch, heads, len, head_dim]`, or bytes on the last axis.
        pub fn shape(&self) -> [usize; 4] {
            self.shape
        }

        /// Bytes from one row (token) to the next.
        pub fn row_bytes(&self) -> usize {
            self.stride[2] * self.unit.size()
        }

        /// Bytes from one batch row, head and row to the next.
        pub fn byte_strides(&self) -> [usize; 3] {
            [0, 1, 2].map(|a| self.stride[a] * self.unit.size())
        }

        /// Whether rows lie one after the other, without gaps.
        pub fn is_contiguous(&self) -> bool {
            self.stride[..3] == contiguous(self.shape)[..3]
        }

        /// Where the first row begins, or would if there were any.
        pub fn start(&self) -> $ptr {
            self.ptr
        }

        /// Where row `(batch, head, i)` begins. The result is only to be used within the last axis.
        #[inline(always)]
        pub fn row(&self, b: usize, h: usize, i: usize) -> $ptr {
            debug_assert!(b < self.shape[0] && h < self.shape[1] && i < self.shape[2]);
            let at = b * self.stride[0] + h * self.stride[1] + i * self.stride[2];
            // wrapping_add: no promise is needed to compute the address, only to use it.
            self.ptr.wrapping_add(at * self.unit.size())
        }
    };
}

impl<U: Unit> ViewRef<'_, U> {
    /// A view over raw memory of `bytes` readable bytes from `ptr` on.
    ///
    /// # Errors
    /// When the last axis is not contiguous or the view leaves the memory.
    ///
    /// # Safety
    /// `ptr` is valid for reads of `bytes` bytes for the view's lifetime.
    pub unsafe fn from_raw(
        name: &str,
        ptr: *const u8,
        bytes: usize,
        unit: U,
        shape: [usize; 4],
        stride: [usize; 4],
    ) -> Result<Self> {
        check(name, unit, shape, stride, bytes)?;
        Ok(Self { ptr, unit, shape, stride, life: PhantomData })
    }

    layout!(*const u8);
}

impl<U: Unit> ViewMut<'_, U> {
    /// A writable view over raw memory of `bytes` bytes from `ptr` on.
    ///
    /// # Errors
    /// When the last axis is not contiguous, the view leaves the memory, or two of its elements share an address
    /// because a stride is 0.
    ///
    /// # Safety
    /// `ptr` is valid for reads and writes of `bytes` bytes for the view's lifetime, and nobody else reads or writes the
    /// view meanwhile.
    pub unsafe fn from_raw(
        name: &str,
        ptr: *mut u8,
        bytes: usize,
        unit: U,
        shape: [usize; 4],
        stride: [usize; 4],
    ) -> Result<Self> {
        check(name, unit, shape, stride, bytes)?;
        check_unshared(name, shape, stride)?;
        Ok(Self { ptr, unit, shape, stride, life: PhantomData })
    }

    layout!(*mut u8);
}

impl<'a> TensorRef<'a> {
    /// A view over a slice with explicit strides.
    ///
    /// # Errors
    /// When the last axis is not contiguous or the view leaves the slice.
    pub fn new<T: Element>(name: &str, data: &'a [T], shape: [usize; 4], stride: [usize; 4]) -> Result<Self> {
        // SAFETY: a slice is valid for its length.
        unsafe { Self::from_raw(name, data.as_ptr().cast(), size_of_val(data), T::DTYPE, shape, stride) }
    }

    /// A contiguous view over a slice.
    ///
    /// # Errors
    /// When the slice is too short.
    pub fn dense<T: Element>(name: &str, data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Self::new(name, data, shape, contiguous(shape))
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.unit
    }

    /// One element as float32; bounds are checked. For the reference and for tests.
    pub fn get(&self, b: usize, h: usize, i: usize, d: usize) -> f32 {
        let s = self.shape;
        assert!(b < s[0] && h < s[1] && i < s[2] && d < s[3], "index ({b}, {h}, {i}, {d}) outside {s:?}");
        // SAFETY: inside the shape, which `check` found inside the memory.
        unsafe { self.unit.read(self.row(b, h, i).add(d * self.unit.size())) }
    }
}

impl<'a> TensorMut<'a> {
    /// A contiguous writable view over a slice.
    ///
    /// # Errors
    /// When the slice is too short.
    pub fn dense<T: Element>(name: &str, data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        let bytes = size_of_val(data);
        // SAFETY: a mutable slice is valid and unshared for its length.
        unsafe { Self::from_raw(name, data.as_mut_ptr().cast(), bytes, T::DTYPE, shape, contiguous(shape)) }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.unit
    }
}

impl<'a> BytesRef<'a> {
    /// A contiguous view over a slice.
    ///
    /// # Errors
    /// When the slice is too short.
    pub fn dense(name: &str, data: &'a [u8], shape: [usize; 4]) -> Result<Self> {
        // SAFETY: a slice is valid for its length.
        unsafe { Self::from_raw(name, data.as_ptr(), data.len(), Byte, shape, contiguous(shape)) }
    }

    /// A row as a slice; bounds are checked.
    pub fn bytes(&self, b: usize, h: usize, i: usize) -> &'a [u8] {
        let s = self.shape;
        assert!(b < s[0] && h < s[1] && i < s[2], "row ({b}, {h}, {i}) outside {s:?}");
        // SAFETY: inside the shape, which `check` found inside the memory; the last axis is contiguous.
        unsafe { std::slice::from_raw_parts(self.row(b, h, i), s[3]) }
    }
}

impl<'a> BytesMut<'a> {
    /// A contiguous writable view over a slice.
    ///
    /// # Errors
    /// When the slice is too short.
    pub fn dense(name: &str, data: &'a mut [u8], shape: [usize; 4]) -> Result<Self> {
        // SAFETY: a mutable slice is valid and unshared for its length.
        unsafe { Self::from_raw(name, data.as_mut_ptr(), data.len(), Byte, shape, contiguous(shape)) }
    }
}

/// Strides of a dense array of this shape, in elements.
pub fn contiguous(shape: [usize; 4]) -> [usize; 4] {
    let mut stride = [1; 4];
    for a in (0..3).rev() {
        stride[a] = stride[a + 1] * shape[a + 1].max(1);
    }
    stride
}
