//! Kernels on torch's stream: no synchronisation, no allocation, no event, so that a CUDA graph may capture it all.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use super::driver::{Device, said};
use super::kernels::Kernel;
use crate::error::{Error, Result};

/// torch's current stream on a device: 0 is the default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub usize);

/// Where a verb runs.
#[derive(Clone, Copy)]
pub struct Context {
    /// The device that all memory is on.
    pub device: &'static Device,
    /// What work is given to.
    pub stream: Stream,
}

impl Context {
    /// Launches a kernel.
    ///
    /// # Errors
    /// [`Error::Device`] with the kernel's name, the shape of the call and what the driver says.
    ///
    /// # Safety
    /// `params` point to what the kernel's signature says, in its order, and device addresses among them are valid for what
    /// the kernel does with them, until the stream has come to its end.
    pub unsafe fn launch(
        &self,
        kernel: &'static Kernel,
        grid: [u32; 3],
        params: &mut [*mut c_void],
        shape: &dyn Fn() -> String,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(kernel, kernel.smem, grid, params, shape) }
    }

    /// As [`Self::launch`], with as much shared memory as the call needs: at most what the kernel's table says.
    ///
    /// # Errors
    /// As [`Self::launch`].
    ///
    /// # Safety
    /// As [`Self::launch`].
    pub unsafe fn launch_with(
        &self,
        kernel: &'static Kernel,
        smem: u32,
        grid: [u32; 3],
        params: &mut [*mut c_void],
        shape: &dyn Fn() -> String,
    ) -> Result<()> {
        debug_assert!(smem <= kernel.smem, "{}: {smem} bytes of shared memory", kernel.entry);
        if grid.contains(&0) {
            return Ok(());
        }
        if grid[0] > i32::MAX as u32 || grid[1] > 65_535 || grid[2] > 65_535 {
            return Err(Error::Device(format!("{} {}: a grid of {grid:?} blocks is too large", kernel.entry, shape())));
        }
        let device = self.device;
        device.with(|| {
            let f = device.function(kernel.entry, || super::cubin::image(device, kernel), kernel.smem as i32)?;
            // SAFETY: the caller's promise.
            unsafe {
                result::launch_kernel(
                    f.0,
                    (grid[0], grid[1], grid[2]),
                    (kernel.threads, 1, 1),
                    smem,
                    self.stream.0 as sys::CUstream,
                    params,
                )
            }
            .map_err(|e| said(&format!("{} {} on {}", kernel.entry, shape(), device.name), e))
        })
    }
}

/// The address of a parameter, for `launch`.
pub fn param<T>(x: &T) -> *mut c_void {
    std::ptr::from_ref(x).cast_mut().cast()
}
