//! NVRTC, the compiler that a pip-installed torch brings: found, loaded and called without headers or include paths.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::Library;

use crate::error::{Error, Result};

type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// A loaded NVRTC.
pub struct Nvrtc {
    /// What it was opened as.
    pub path: String,
    /// Major and minor.
    pub version: (i32, i32),
    library: &'static Library,
}

/// What came of a compilation.
pub struct Compiled {
    /// Cubin, for "sm_..", or PTX, for "compute_..".
    pub image: Vec<u8>,
    /// Warnings, and with `--ptxas-options=-v` registers and spills.
    pub log: String,
}

fn failed(e: impl std::fmt::Display) -> Error {
    Error::Device(format!("NVRTC: {e}"))
}

/// What the loader has against a library; `libloading` keeps its words one level down.
fn unloadable(path: &str, e: &libloading::Error) -> Error {
    let why = std::error::Error::source(e).map_or_else(|| e.to_string(), ToString::to_string);
    failed(if why.contains(path) { why } else { format!("{path}: {why}") })
}

impl Nvrtc {
    /// Loads a library: a path, or a name that is looked up among those that are loaded already.
    ///
    /// # Errors
    /// [`Error::Device`] where it can't be loaded, or is something else.
    pub fn open(path: &str) -> Result<Self> {
        // Without an RPATH, NVRTC finds its builtins only when they are loaded already: from the same folder, first.
        if let Some(folder) = Path::new(path).parent().filter(|p| !p.as_os_str().is_empty()) {
            for builtins in beside(folder, "libnvrtc-builtins.so") {
                // SAFETY: a library of NVIDIA's; kept for good.
                if let Ok(l) = unsafe { Library::new(&builtins) } {
                    std::mem::forget(l);
                }
            }
        }
        // SAFETY: as above.
        let library = unsafe { Library::new(path) }.map_err(|e| unloadable(path, &e))?;
        let library: &'static Library = Box::leak(Box::new(library)); // it was not made to be unloaded
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the signature is the documented one.
        unsafe {
            let version = library
                .get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(b"nvrtcVersion\0")
                .map_err(|e| unloadable(path, &e))?;
            version(&mut major, &mut minor);
        }
        Ok(Self { path: path.into(), version: (major, minor), library })
    }

    /// Compiles a source for an architecture ("sm_90a": a cubin, "compute_80": PTX).
    ///
    /// # Errors
    /// [`Error::Device`] with the compiler's own words.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        arch: &str,
        options: &[String],
    ) -> Result<Compiled> {
        // In a thread of its own: NVRTC 12.4 leaves the locale of the thread that calls it at "C" (uselocale), and Python would read and
        // write ASCII from then on.
        std::thread::scope(|scope| {
            let there = std::thread::Builder::new()
                .name("llama1m-nvrtc".into())
                .spawn_scoped(scope, || self.compile_here(name, source, headers, arch, options))
                .map_err(|e| failed(format!("{name}: no thread to compile it in: {e}")))?;
            there.join().unwrap_or_else(|_| Err(failed(format!("{name} for {arch}: the compiler's thread panicked"))))
        })
    }

    fn compile_here(
        &self,
        name: &str,
        source: &str,
        headers: &[(&str, &str)],
        arch: &str,
        options: &[String],
    ) -> Result<Compiled> {
        // NVRTC may be called from several threads, but its loader of builtins is not worth trusting with it.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let text = |s: &str| CString::new(s).map_err(|_| failed(format!("{name}: a NUL in the source")));
        let (source, file) = (text(source)?, text(name)?);
        let bodies = headers.iter().map(|h| text(h.1)).collect::<Result<Vec<_>>>()?;
        let names = headers.iter().map(|h| text(h.0)).collect::<Result<Vec<_>>>()?;
        let arch_option = format!("--gpu-architecture={arch}");
        let options = std::iter::once(&arch_option).chain(options).map(|o| text(o)).collect::<Result<Vec<_>>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (bodies, names, options) = (pointers(&bodies), pointers(&names), pointers(&options));
        // SAFETY: the documented signatures; all strings live until the program is destroyed.
        unsafe {
            let say = self.get::<unsafe extern "C" fn(c_int) -> *const c_char>("nvrtcGetErrorString")?;
            let check = |rc: c_int, log: &str| match rc {
                0 => Ok(()),
                rc => Err(failed(format!("{name} for {arch}: {}\n{log}", CStr::from_ptr(say(rc)).to_string_lossy()))),
            };
            let mut program: Program = std::ptr::null_mut();
            let create = self.get::<unsafe extern "C" fn(
                *mut Program,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int>("nvrtcCreateProgram")?;
            let count = bodies.len() as c_int;
            check(create(&mut program, source.as_ptr(), file.as_ptr(), count, bodies.as_ptr(), names.as_ptr()), "")?;
            let done = self.run(program, arch, &options, &check);
            let destroy = self.get::<unsafe extern "C" fn(*mut Program) -> c_int>("nvrtcDestroyProgram")?;
            destroy(&mut program);
            done
        }
    }

    unsafe fn run(
        &self,
        program: Program,
        arch: &str,
        options: &[*const c_char],
        check: &dyn Fn(c_int, &str) -> Result<()>,
    ) -> Result<Compiled> {
        // SAFETY: a live program and the documented signatures; sizes are asked for first.
        unsafe {
            let compile =
                self.get::<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int>("nvrtcCompileProgram")?;
            let rc = compile(program, options.len() as c_int, options.as_ptr());
            let fetch = |size: &str, get: &str| -> Result<Vec<u8>> {
                let (size, get) = (self.get::<Size>(size)?, self.get::<Get>(get)?);
                let mut n = 0;
                check(size(program, &mut n), "")?;
                let mut bytes = vec![0u8; n];
                check(get(program, bytes.as_mut_ptr().cast()), "")?;
                Ok(bytes)
            };
            let log = String::from_utf8_lossy(&fetch("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?)
                .trim_end_matches('\0')
                .trim()
                .to_string();
            check(rc, &log)?;
            let image = if arch.starts_with("sm_") {
                fetch("nvrtcGetCUBINSize", "nvrtcGetCUBIN")?
            } else {
                fetch("nvrtcGetPTXSize", "nvrtcGetPTX")? // with its NUL: the driver takes PTX as a C string
            };
            Ok(Compiled { image, log })
        }
    }

    unsafe fn get<T: Copy>(&self, name: &str) -> Result<T> {
        // SAFETY: the caller gives the documented signature.
        unsafe { self.library.get::<T>(name.as_bytes()) }.map(|f| *f).map_err(|e| unloadable(&self.path, &e))
    }
}

/// Files in a folder whose names begin so.
fn beside(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let named = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix));
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(named).collect();
    found.sort();
    found
}
