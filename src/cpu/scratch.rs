//! A thread's working memory: made once, kept for the next call, never shared.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;

/// Cache lines don't straddle, and large buffers can be huge pages.
const ALIGN: usize = 4096;

struct Buffer {
    ptr: *mut u8,
    layout: Layout,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated below with this layout.
            unsafe { dealloc(self.ptr, self.layout) }
        }
    }
}

thread_local! {
    static KEPT: RefCell<Buffer> =
        const { RefCell::new(Buffer { ptr: std::ptr::null_mut(), layout: Layout::new::<()>() }) };
}

/// Lays parts out one after the other, each on a cache line.
#[derive(Default, Clone, Copy)]
pub struct Plan {
    bytes: usize,
}

impl Plan {
    /// Reserves `n` 32-bit words; returns their offset in bytes.
    pub fn words(&mut self, n: usize) -> usize {
        let at = self.bytes;
        self.bytes += (n * 4).next_multiple_of(64);
        at
    }

    /// Calls `f` with this thread's memory of at least the planned size; its contents are whatever was left there.
    /// Not to be nested.
    pub fn with<R>(&self, f: impl FnOnce(*mut u8) -> R) -> R {
        KEPT.with(|kept| {
            let mut kept = kept.borrow_mut();
            if kept.layout.size() < self.bytes {
                let size = self.bytes.next_multiple_of(ALIGN);
                let layout = Layout::from_size_align(size, ALIGN).expect("scratch is far below isize::MAX");
                // SAFETY: the size is not zero.
                let ptr = unsafe { alloc(layout) };
                if ptr.is_null() {
                    handle_alloc_error(layout);
                }
                *kept = Buffer { ptr, layout };
            }
            f(kept.ptr)
        })
    }
}
