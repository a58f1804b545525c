//! torch's own threads, borrowed.
//!
//! After each parallel operation of torch its OpenMP threads (libgomp) spin for some milliseconds, waiting for the next.
//! Threads of ours would share the cores with them: decode attention took 1.6 times as long right after a linear layer
//! as alone (2 cores, 131072 keys). So where torch has loaded libgomp, tasks run on its team, which is awake anyway.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `GOMP_parallel(fn, data, num_threads, flags)`: calls fn(data) on each thread of a team, this one included.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, u32, u32);

/// The entry point of the libgomp that is in this process, if one is.
#[cfg(target_os = "linux")]
fn find() -> Option<Parallel> {
    use libloading::os::unix::{Library, RTLD_NOW};
    /// Only a library that is loaded already: another libgomp would have threads of its own.
    const RTLD_NOLOAD: i32 = 4;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .find(|path| path.rsplit('/').next().is_some_and(|name| name.starts_with("libgomp") && name.contains(".so")))?;
    // SAFETY: the library is loaded: no initialiser runs. The symbol has this signature since GCC 4.9.
    unsafe {
        let library = Library::open(Some(path), RTLD_NOW | RTLD_NOLOAD).ok()?;
        let entry = *library.get::<Parallel>(b"GOMP_parallel\0").ok()?;
        std::mem::forget(library); // the entry must stay valid; torch never unloads it either
        Some(entry)
    }
}

#[cfg(not(target_os = "linux"))]
fn find() -> Option<Parallel> {
    None
}

/// What the team calls, and the first panic among its members.
struct Team<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

extern "C" fn member(data: *mut c_void) {
    // SAFETY: `run` passes a Team that outlives the region.
    let team = unsafe { &*data.cast::<Team>() };
    // A panic must not unwind into C.
    if let Err(e) = catch_unwind(AssertUnwindSafe(team.work)) {
        team.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
    }
}

/// Calls `work` on `threads` threads of torch's, this one among them; false if there is no team to borrow.
///
/// libgomp does not survive a fork, so only the process that found it uses it.
pub fn run(threads: usize, work: &(dyn Fn() + Sync)) -> bool {
    static FOUND: OnceLock<Option<(u32, Parallel)>> = OnceLock::new();
    let pid = std::process::id();
    let Some((owner, parallel)) = *FOUND.get_or_init(|| find().map(|f| (pid, f))) else { return false };
    let Ok(threads) = u32::try_from(threads) else { return false };
    if owner != pid {
        return false;
    }
    let team = Team { work, panic: Mutex::new(None) };
    // SAFETY: `team` lives until the region ends, which is when the call returns; `member` never unwinds.
    unsafe { parallel(member, (&raw const team).cast_mut().cast(), threads, 0) };
    match team.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(e) => resume_unwind(e),
        None => true,
    }
}
