//! Threads: tasks are taken from one counter by the calling thread and its helpers.
//!
//! The calling thread works too, and between its tasks asks the caller's `poll` whether to stop, so that Ctrl-C gets
//! through during a long prefill without a watcher thread. Helpers are torch's own threads where it is loaded (see
//! `openmp`), else pools of ours, kept per size; after a fork (a DataLoader worker) their threads are gone, so a pool
//! belongs to the process that made it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;

use super::{Context, openmp};
use crate::error::{Error, Result};

type Pools = Mutex<Option<(u32, HashMap<usize, Arc<rayon::ThreadPool>>)>>;
static POOLS: Pools = Mutex::new(None);

fn pool(helpers: usize) -> Result<Arc<rayon::ThreadPool>> {
    let pid = std::process::id();
    let mut slot = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if slot.as_ref().is_some_and(|(owner, _)| *owner != pid) {
        // The parent's pools: their threads don't exist here, and dropping them would wait for those. Leaked on purpose.
        std::mem::forget(slot.take());
    }
    let (_, pools) = slot.get_or_insert_with(|| (pid, HashMap::new()));
    if let Some(p) = pools.get(&helpers) {
        return Ok(p.clone());
    }
    let built = rayon::ThreadPoolBuilder::new().num_threads(helpers).thread_name(|i| format!("llama1m-{i}")).build();
    let built = Arc::new(built.map_err(|e| Error::Resources(format!("{helpers} threads: {e}")))?);
    pools.insert(helpers, built.clone());
    Ok(built)
}

/// Runs `task(0) ... task(n - 1)` on at most `cx.threads` threads, at least `min_share` tasks for each.
///
/// # Errors
/// [`Error::Interrupted`] when `poll` said stop; tasks not begun by then are not run.
pub fn run(cx: &Context, n: usize, min_share: usize, task: impl Fn(usize) + Sync) -> Result<()> {
    let threads = cx.threads.min(n.div_ceil(min_share.max(1))).max(1);
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    // In this order a task that was taken is run: later ones may wait for it (see `backward`).
    let take = || {
        if stop.load(Ordering::Relaxed) {
            return None;
        }
        Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < n)
    };
    let help = || {
        while let Some(i) = take() {
            task(i);
        }
    };
    // The calling thread works too, and looks for signals between its tasks: that takes the GIL, so ten times a second.
    let lead = || {
        let mut since = Instant::now();
        while let Some(i) = take() {
            task(i);
            if since.elapsed().as_millis() >= 100 {
                since = Instant::now();
                if (cx.poll)() {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    if threads == 1 {
        lead();
    } else {
        let caller = Caller { id: std::thread::current().id(), lead: &lead };
        let member = || if caller.is_me() { caller.lead() } else { help() };
        if !openmp::run(threads, &member) {
            pool(threads - 1)?.in_place_scope(|s| {
                for _ in 1..threads {
                    s.spawn(|_| help());
                }
                lead();
            });
        }
    }
    if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}

/// The calling thread's own work, which is not `Sync` (`poll` is not): handed out to that thread only.
struct Caller<'a> {
    id: ThreadId,
    lead: &'a dyn Fn(),
}

// SAFETY: `lead` runs on the thread that made it and nowhere else; the id is plain data.
unsafe impl Sync for Caller<'_> {}

impl Caller<'_> {
    fn is_me(&self) -> bool {
        std::thread::current().id() == self.id
    }

    fn lead(&self) {
        assert!(self.is_me());
        (self.lead)();
    }
}
