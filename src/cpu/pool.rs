//! Threads: tasks are taken from one counter by the calling thread and its helpers.
//!
//! The calling thread works too, and between its tasks asks the caller's `poll` whether to stop, so that Ctrl-C gets
//! through during a long prefill without a watcher thread. Helper pools are kept per size; after a fork (a
//! DataLoader worker) their threads are gone, so a pool belongs to the process that made it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Context;
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
    let work = |mut poll: Option<&mut dyn FnMut() -> bool>| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n || stop.load(Ordering::Relaxed) {
                return;
            }
            task(i);
            if poll.as_mut().is_some_and(|p| p()) {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    let mut since = std::time::Instant::now();
    let mut poll = || {
        // Looking for signals takes the GIL: ten times a second is often enough.
        if since.elapsed().as_millis() < 100 {
            return false;
        }
        since = std::time::Instant::now();
        (cx.poll)()
    };
    if threads == 1 {
        work(Some(&mut poll));
    } else {
        pool(threads - 1)?.in_place_scope(|s| {
            for _ in 1..threads {
                s.spawn(|_| work(None));
            }
            work(Some(&mut poll));
        });
    }
    if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}
