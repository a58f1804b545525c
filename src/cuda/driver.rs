//! The NVIDIA driver: found or not, its devices, and torch's contexts on them.
//!
//! cudarc panics where a library is missing, so everything here begins with [`driver`], which looks first.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::{result, sys};

use crate::error::{Error, Result};

/// All that is called of it. cudarc looks each up at its first call, and panics where it is missing: a stub of the driver,
/// such as containers and toolkits have.
const CALLS: [&str; 17] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuTensorMapEncodeTiled",
    "cuGetErrorName",
    "cuGetErrorString",
];

/// A driver that is there.
#[derive(Debug)]
pub struct Driver {
    /// As `cuDriverGetVersion` gives it: 1000 major + 10 minor.
    pub version: i32,
    /// Devices that it knows.
    pub devices: i32,
    /// Whether it is the stand-in of our tests, whose device memory is the host's.
    pub fake: bool,
}

/// The driver, looked for once.
///
/// # Errors
/// [`Error::Device`] where there is none, or it does not start.
pub fn driver() -> Result<&'static Driver> {
    static FOUND: OnceLock<Result<Driver>> = OnceLock::new();
    FOUND.get_or_init(find).as_ref().map_err(Clone::clone)
}

fn find() -> Result<Driver> {
    // SAFETY: loading the driver's library runs no code of ours.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device("expected the NVIDIA driver (libcuda.so.1), and it was not found".into()));
    }
    // SAFETY: the library is there; cuInit and the queries take what they are given.
    unsafe {
        let has = |name: &str| sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()).is_ok();
        if let Some(name) = CALLS.iter().find(|name| !has(name)) {
            let what =
                format!("expected a driver for CUDA 12 or newer, and the libcuda.so.1 that was found has no {name}");
            return Err(Error::Device(what));
        }
        let fake = has("llama1m_fake_driver");
        result::init().map_err(|e| said("cuInit", e))?;
        let (mut version, mut devices) = (0, 0);
        sys::cuDriverGetVersion(&mut version).result().map_err(|e| said("cuDriverGetVersion", e))?;
        sys::cuDeviceGetCount(&mut devices).result().map_err(|e| said("cuDeviceGetCount", e))?;
        Ok(Driver { version, devices, fake })
    }
}

/// An error of the driver's, in words.
pub fn said(call: &str, e: result::DriverError) -> Error {
    let name = e.error_name().map_or_else(|_| format!("{:?}", e.0), |n| n.to_string_lossy().into_owned());
    let text = e.error_string().map_or_else(|_| String::new(), |n| format!(" ({})", n.to_string_lossy()));
    Error::Device(format!("{call}: {name}{text}"))
}

/// A GPU with torch's own (the primary) context. Kept for good: the driver is gone before our destructors would run.
pub struct Device {
    /// Its number.
    pub ordinal: i32,
    /// What the driver calls it.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub sms: i32,
    /// Bytes of shared memory that a block can be given.
    pub smem: i32,
    /// Bytes of memory.
    pub memory: usize,
    number: sys::CUdevice,
    context: OnceLock<Context>,
    functions: Mutex<HashMap<&'static str, Function>>,
}

// SAFETY: contexts and functions of the driver may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// A device's primary context: torch's, where torch has been there.
#[derive(Debug, Clone, Copy)]
struct Context(sys::CUcontext);

// SAFETY: as of `Device`.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A kernel that is loaded on a device.
#[derive(Debug, Clone, Copy)]
pub struct Function(pub sys::CUfunction);

// SAFETY: as of `Device`.
unsafe impl Send for Function {}

/// The device of that number.
///
/// # Errors
/// [`Error::Device`] where there is no driver or no such device.
pub fn device(ordinal: i32) -> Result<&'static Device> {
    static DEVICES: Mutex<Option<HashMap<i32, &'static Device>>> = Mutex::new(None);
    let found = driver()?;
    if found.devices == 0 {
        return Err(Error::Device("expected a GPU, and the driver knows of none".into()));
    }
    if !(0..found.devices).contains(&ordinal) {
        return Err(Error::Device(format!("expected a device from 0 to {}, got {ordinal}", found.devices - 1)));
    }
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let devices = devices.get_or_insert_with(HashMap::new);
    if let Some(d) = devices.get(&ordinal) {
        return Ok(d);
    }
    let made: &'static Device = Box::leak(Box::new(open(ordinal)?));
    devices.insert(ordinal, made);
    Ok(made)
}

fn open(ordinal: i32) -> Result<Device> {
    use sys::CUdevice_attribute as A;
    let number = result::device::get(ordinal).map_err(|e| said("cuDeviceGet", e))?;
    // SAFETY: a device that the driver just named.
    let attribute =
        |a| unsafe { result::device::get_attribute(number, a) }.map_err(|e| said("cuDeviceGetAttribute", e));
    Ok(Device {
        ordinal,
        name: result::device::get_name(number).map_err(|e| said("cuDeviceGetName", e))?,
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sms: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        smem: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(number) }.map_err(|e| said("cuDeviceTotalMem", e))?,
        number,
        context: OnceLock::new(),
        functions: Mutex::new(HashMap::new()),
    })
}

impl Device {
    /// The primary context, retained for good when something is first done there: it takes hundreds of megabytes, and a card
    /// that others have for themselves refuses it. Who only asks about a device needs none.
    fn context(&self) -> Result<sys::CUcontext> {
        if let Some(found) = self.context.get() {
            return Ok(found.0);
        }
        // SAFETY: a device that the driver named.
        let made = unsafe { result::primary_ctx::retain(self.number) }
            .map_err(|e| said(&format!("cuDevicePrimaryCtxRetain of device {}, {}", self.ordinal, self.name), e))?;
        Ok(self.context.get_or_init(|| Context(made)).0)
    }

    /// Runs `work` with this device's context current, and puts back what was.
    ///
    /// # Errors
    /// What `work` returns, or the driver's.
    pub fn with<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = result::ctx::get_current().map_err(|e| said("cuCtxGetCurrent", e))?;
        let context = self.context()?;
        if before == Some(context) {
            return work();
        }
        // SAFETY: retained for good.
        unsafe { result::ctx::set_current(context) }.map_err(|e| said("cuCtxSetCurrent", e))?;
        let done = work();
        if let Some(before) = before {
            // SAFETY: it was current a moment ago.
            unsafe { result::ctx::set_current(before) }.map_err(|e| said("cuCtxSetCurrent", e))?;
        }
        done
    }

    /// The kernel of that name, loaded if need be. The context must be current.
    ///
    /// # Errors
    /// Where there is no image for this device, or the driver refuses it.
    pub fn function(
        &self,
        entry: &'static str,
        image: impl FnOnce() -> Result<Vec<u8>>,
        smem: i32,
    ) -> Result<Function> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(f) = functions.get(entry) {
            return Ok(*f);
        }
        let image = image()?;
        let name = CString::new(entry).map_err(|_| Error::Device(format!("{entry}: no name of a kernel")))?;
        // SAFETY: an image that NVRTC made, or a file of ours with a checksum; the module is never unloaded.
        let f = unsafe {
            let module = result::module::load_data(image.as_ptr().cast())
                .map_err(|e| said(&format!("{entry}: cuModuleLoadData on {}", self.name), e))?;
            let f = result::module::get_function(module, name)
                .map_err(|e| said(&format!("{entry}: cuModuleGetFunction"), e))?;
            if smem > 48 << 10 {
                let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(f, which, smem).map_err(|e| {
                    said(&format!("{entry}: {smem} bytes of shared memory, {} has {}", self.name, self.smem), e)
                })?;
            }
            Function(f)
        };
        functions.insert(entry, f);
        Ok(f)
    }
}
