//! `attention_backward` on the CPU: blockwise, from what the forward pass left (Dao, 2307.08691, section 3.1.2).
//!
//! A task is a run of queries of one (batch row, kv head), all query heads of the group folded into rows, as in the forward
//! pass. Its q, gradient and dq stay with it; it walks over the keys a block at a time, and adds to dk and dv of the block in
//! a float32 buffer that all tasks of the head share.
//!
//! Tasks of a head add to a block in one order, latest queries first: each waits until the one before it is past the block.
//! So a gradient has the same bits on any number of threads, in every run. Nobody waits long: a task that starts a block
//! after the one before it stays a block after it. Under a causal mask the first task is the longest, the last the shortest,
//! which evens the threads out.
//!
//! Memory beyond the outputs: float32 dk and dv of as many heads as there are threads (at most all of them), and a scratch of
//! some hundred rows per thread.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::arch::{BackwardKernel, Kernels};
use super::backward_block::{Block, SIDE};
use super::scratch::Plan;
use super::{Context, isa, pool};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gradients::Gradients;
use crate::tensor::{TensorMut, TensorRef};

/// Most blocks of rows in a task: what packing keys costs, and going through dk and dv, is shared by so many rows.
const MOST_BLOCKS: usize = 5;
/// A head's rows are cut into so many tasks where it has enough of them.
const TASKS: usize = 16;
/// float32 of a cache line.
const LINE: usize = 16;
/// What a task has finished when it is done.
const ALL: usize = usize::MAX;

/// Offsets into a thread's scratch.
#[derive(Clone, Copy)]
struct Scratch {
    plan: Plan,
    q: usize,
    g: usize,
    q_rows: usize,
    g_rows: usize,
    k: usize,
    v: usize,
    k_rows: usize,
    lse: usize,
    minus_delta: usize,
    p: usize,
    ds: usize,
    ds_keys: usize,
    dq: usize,
    hi: usize,
}

impl Scratch {
    fn new(kernel: &BackwardKernel, dp: usize, units: usize, blocks: usize) -> Self {
        let mut plan = Plan::default();
        let rows = blocks * SIDE;
        let square = SIDE * SIDE / kernel.pair;
        let ds = plan.words(square);
        let made = Self {
            // A panel's last column overwrites up to 16 words beyond.
            q: plan.words(rows * units + 16),
            g: plan.words(rows * units + 16),
            q_rows: plan.words(rows / kernel.pair * dp),
            g_rows: plan.words(rows / kernel.pair * dp),
            k: plan.words(SIDE * units),
            v: plan.words(SIDE * units),
            k_rows: plan.words(SIDE / kernel.pair * dp),
            lse: plan.words(2 * rows),
            minus_delta: plan.words(rows),
            p: plan.words(square),
            ds,
            ds_keys: if kernel.pair == 1 { ds } else { plan.words(square) },
            dq: plan.words(rows * dp),
            hi: plan.words(SIDE),
            plan,
        };
        Self { plan, ..made }
    }
}

struct Plans {
    kernel: BackwardKernel,
    /// head_dim padded to the kernel's multiple.
    dp: usize,
    units: usize,
    /// Queries of a task.
    queries: usize,
    /// Tasks of a head.
    tasks: usize,
    heads: usize,
    /// Heads that are worked on at the same time, each with a buffer.
    slots: usize,
    /// float32 of dk (and of dv) in a buffer.
    words: usize,
    scratch: Scratch,
}

struct Task {
    b: usize,
    kv_head: usize,
    /// Of the head's tasks; the first one to run has the highest number.
    n: usize,
    head: usize,
    q0: usize,
    q1: usize,
}

impl Plans {
    fn new(p: &Gradients, kernel: BackwardKernel, threads: usize) -> Self {
        let dp = p.head_dim.next_multiple_of(kernel.tiles.multiple);
        let units = dp / kernel.pair;
        // From the shape alone, so that sums are the same on any number of threads.
        let rows = (p.q_len * p.group).div_ceil(TASKS).next_multiple_of(SIDE).clamp(SIDE, MOST_BLOCKS * SIDE);
        let queries = (rows / p.group).clamp(1, p.q_len.max(1));
        let heads = p.batch * p.kv_heads;
        let most = (0..p.batch).map(|b| p.visible(b, p.q_len.max(1) - 1)).map(|(lo, hi)| hi - lo).max().unwrap_or(0);
        Self {
            scratch: Scratch::new(&kernel, dp, units, (queries * p.group).div_ceil(SIDE)),
            kernel,
            dp,
            units,
            queries,
            tasks: p.q_len.div_ceil(queries).max(1),
            heads,
            slots: threads.clamp(1, heads.max(1)),
            words: most.next_multiple_of(SIDE) * dp,
        }
    }

    /// The n-th task: heads in groups of `slots`; in a group the latest queries of all heads first.
    fn task(&self, p: &Gradients, n: usize) -> Task {
        let group = n / (self.slots * self.tasks);
        let slots = self.slots.min(self.heads - group * self.slots);
        let rest = n - group * self.slots * self.tasks;
        let (task, head) = (self.tasks - 1 - rest / slots, group * self.slots + rest % slots);
        let q0 = (task * self.queries).min(p.q_len);
        let q1 = (q0 + self.queries).min(p.q_len);
        Task { b: head / p.kv_heads, kv_head: head % p.kv_heads, n: task, head, q0, q1 }
    }
}

/// How far tasks are: blocks of keys that each is past. A task that panics is past all, so that nobody waits for it.
struct Progress {
    past: Vec<AtomicUsize>,
    tasks: usize,
}

impl Progress {
    fn at(&self, head: usize, task: usize) -> &AtomicUsize {
        &self.past[head * self.tasks + task]
    }

    /// Returns once the task is past `blocks` blocks. It was begun before whoever waits for it, so it gets there.
    fn wait(&self, head: usize, task: usize, blocks: usize) {
        let mut rounds = 0u32;
        while self.at(head, task).load(Ordering::Acquire) < blocks {
            rounds += 1;
            if rounds < 200 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

struct Finish<'a>(&'a AtomicUsize);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(ALL, Ordering::Release);
    }
}

/// The float32 buffers, which tasks of a head write in turn.
struct Buffers(*mut f32);
// SAFETY: see `Progress`: no two tasks are at the same block of a buffer.
unsafe impl Sync for Buffers {}

/// Gradients of q, k and v; see [`crate::attention::attention_backward`].
///
/// # Errors
/// When interrupted or out of resources.
pub fn attention_backward(p: &Gradients, cx: &Context) -> Result<()> {
    let kernels = &isa::active()?.kernels;
    let plans = Plans::new(p, (kernels.backward)(p.q.dtype(), p.grad_out.dtype()), cx.threads);
    if p.q_heads * p.q_len == 0 {
        // SAFETY: rows of outputs that nobody else writes.
        unsafe { (0..plans.heads).for_each(|h| clear(p, h / p.kv_heads, h % p.kv_heads, 0, 0)) };
        return Ok(());
    }
    let n = plans.words.checked_mul(2 * plans.slots).filter(|n| *n <= isize::MAX as usize / 8);
    let n = n.ok_or_else(|| Error::Resources("dk and dv in float32 are larger than any memory".into()))?;
    // Cache lines, so that no vector straddles two. A task writes zeros before anything is read.
    let mut memory: Vec<[f32; LINE]> = Vec::new();
    let lines = n.div_ceil(LINE) + 1;
    memory.try_reserve_exact(lines).map_err(|e| Error::Resources(format!("{} bytes for dk and dv: {e}", n * 4)))?;
    let start = memory.as_mut_ptr().cast::<f32>();
    let buffers = Buffers(start.wrapping_add(start.align_offset(LINE * 4)));
    let all = plans.heads * plans.tasks;
    let progress = Progress { past: (0..all).map(|_| AtomicUsize::new(0)).collect(), tasks: plans.tasks };
    pool::run(cx, all, 1, |n| {
        let t = plans.task(p, n);
        let done = Finish(progress.at(t.head, t.n));
        let buffer = { &buffers }.0.wrapping_add(t.head % plans.slots * 2 * plans.words);
        plans.scratch.plan.with(|scratch| {
            // SAFETY: `active` chose kernels this CPU has, the scratch was planned for them, the call is validated; rows of
            // dq belong to this task alone, and those of the buffer, dk and dv while `progress` says so.
            unsafe { walk(p, &plans, kernels, &t, scratch, buffer, &progress) }
        });
        drop(done);
    })
}

/// Runs a task's queries over the keys that they see.
unsafe fn walk(
    p: &Gradients,
    plans: &Plans,
    kernels: &Kernels,
    t: &Task,
    scratch: *mut u8,
    buffer: *mut f32,
    progress: &Progress,
) {
    let (kernel, s) = (&plans.kernel, &plans.scratch);
    let rows = (t.q1 - t.q0) * p.group;
    let (lo, hi) = p.visible(t.b, t.q1 - 1);
    let first = t.n + 1 == plans.tasks;
    // SAFETY: offsets and sizes are the plan's; rows come from runs inside validated views.
    unsafe {
        let at = |offset: usize| scratch.add(offset);
        pack_queries(p, plans, kernels, t, scratch);
        let dq: *mut f32 = at(s.dq).cast();
        std::ptr::write_bytes(dq, 0, rows.next_multiple_of(SIDE) * plans.dp);
        if first {
            // The buffer was another head's: its tasks must be through.
            if t.head >= plans.slots {
                (0..plans.tasks).for_each(|n| progress.wait(t.head - plans.slots, n, ALL));
            }
            clear(p, t.b, t.kv_head, lo, hi);
        }
        let scale = halves(p.softmax_scale * std::f64::consts::LOG2_E);
        let limits: *mut i32 = at(s.hi).cast();
        let row_bytes = p.head_dim * p.q.dtype().size();
        let (mut krows, mut vrows) = ([std::ptr::null::<u8>(); SIDE], [std::ptr::null::<u8>(); SIDE]);
        for (block, k0) in (lo..hi).step_by(SIDE).enumerate() {
            let n = SIDE.min(hi - k0);
            let mut j = 0;
            while j < n {
                let run = p.kv.run(t.b, t.kv_head, k0 + j, k0 + n);
                for i in 0..run.len {
                    krows[j + i] = run.k.ptr.wrapping_add(i * run.k.stride);
                    vrows[j + i] = run.v.ptr.wrapping_add(i * run.v.stride);
                }
                j += run.len;
            }
            // Keys beyond n are zeros: masked, and never a stale NaN.
            krows[n..].fill(std::ptr::null());
            vrows[n..].fill(std::ptr::null());
            for i in 0..SIDE / kernel.tiles.keys {
                let to = i * kernel.tiles.keys * plans.units;
                (kernel.own.keys)(
                    krows[i * kernel.tiles.keys..].as_ptr(),
                    row_bytes,
                    plans.units,
                    at(s.k).cast::<u32>().add(to),
                );
                (kernel.own.keys)(
                    vrows[i * kernel.tiles.keys..].as_ptr(),
                    row_bytes,
                    plans.units,
                    at(s.v).cast::<u32>().add(to),
                );
            }
            (kernel.own.rows)(krows.as_ptr(), row_bytes, plans.dp, at(s.k_rows).cast());
            let dk = buffer.add(block * SIDE * plans.dp);
            let dv = dk.add(plans.words);
            if first {
                std::ptr::write_bytes(dk, 0, SIDE * plans.dp);
                std::ptr::write_bytes(dv, 0, SIDE * plans.dp);
            } else {
                progress.wait(t.head, t.n + 1, block + 1);
            }
            for r0 in (0..rows).step_by(SIDE) {
                // Later queries see no fewer keys: the first row sees least and the last one most.
                let sees = |r: usize| p.visible(t.b, t.q0 + r.min(rows - 1) / p.group).1;
                if sees(r0 + SIDE - 1) <= k0 {
                    continue;
                }
                let masked = n < SIDE || sees(r0) < k0 + n;
                if masked {
                    for r in 0..SIDE {
                        *limits.add(r) = sees(r0 + r).saturating_sub(k0).min(n) as i32;
                    }
                }
                let units = r0 * plans.units;
                let tiles = r0 / kernel.pair * plans.dp;
                (kernel.block)(&Block {
                    q: at(s.q).cast::<u32>().add(units),
                    g: at(s.g).cast::<u32>().add(units),
                    q_rows: at(s.q_rows).cast::<u32>().add(tiles),
                    g_rows: at(s.g_rows).cast::<u32>().add(tiles),
                    k: at(s.k).cast(),
                    v: at(s.v).cast(),
                    k_rows: at(s.k_rows).cast(),
                    lse: at(s.lse).cast::<f32>().add(2 * r0),
                    minus_delta: at(s.minus_delta).cast::<f32>().add(r0),
                    p: at(s.p).cast(),
                    ds: at(s.ds).cast(),
                    ds_keys: at(s.ds_keys).cast(),
                    dq: dq.add(r0 * plans.dp),
                    dk,
                    dv,
                    units: plans.units,
                    dp: plans.dp,
                    panels: (rows - r0).min(SIDE).div_ceil(kernel.tiles.rows),
                    scale,
                    hi: if masked { limits } else { std::ptr::null() },
                });
            }
            // The last task that sees the block writes it out.
            if t.n == 0 || p.visible(t.b, t.q0 - 1).1 <= k0 {
                // All of its keys, also those that only later queries see.
                for j in 0..SIDE.min(p.visible(t.b, p.q_len - 1).1 - k0) {
                    for (from, to, factor) in [(dk, &p.dk, p.softmax_scale as f32), (dv, &p.dv, 1.0)] {
                        let row = to.row(t.b, t.kv_head, k0 + j);
                        (kernels.finish)(from.add(j * plans.dp), factor, p.head_dim, to.dtype(), row);
                    }
                }
            }
            progress.at(t.head, t.n).store(block + 1, Ordering::Release);
        }
        for r in 0..rows {
            let row = p.dq.row(t.b, t.kv_head * p.group + r % p.group, t.q0 + r / p.group);
            (kernels.finish)(dq.add(r * plans.dp), p.softmax_scale as f32, p.head_dim, p.dq.dtype(), row);
        }
    }
}

/// Packs a task's rows of q and of the output's gradient, and what is subtracted from their scores.
unsafe fn pack_queries(p: &Gradients, plans: &Plans, kernels: &Kernels, t: &Task, scratch: *mut u8) {
    let (kernel, s) = (&plans.kernel, &plans.scratch);
    let rows = (t.q1 - t.q0) * p.group;
    let place = |r: usize| (t.kv_head * p.group + r % p.group, t.q0 + r / p.group);
    for (tensor, packs, panels, whole) in
        [(&p.q, &kernel.own, s.q, s.q_rows), (&p.grad_out, &kernel.grad, s.g, s.g_rows)]
    {
        let bytes = p.head_dim * tensor.dtype().size();
        for r0 in (0..rows).step_by(SIDE) {
            let mut from = [std::ptr::null::<u8>(); SIDE];
            for (r, from) in from.iter_mut().enumerate().take(rows - r0) {
                let (head, i) = place(r0 + r);
                *from = tensor.row(t.b, head, i);
            }
            // SAFETY: the plan's sizes; rows are inside validated views.
            unsafe {
                (packs.rows)(
                    from.as_ptr(),
                    bytes,
                    plans.dp,
                    scratch.add(whole).cast::<u32>().add(r0 / kernel.pair * plans.dp),
                );
                for panel in (0..SIDE).step_by(kernel.tiles.rows) {
                    let to = scratch.add(panels).cast::<u32>().add((r0 + panel) * plans.units);
                    (packs.panel)(from[panel..].as_ptr(), bytes, plans.units, to);
                }
            }
        }
    }
    for r in 0..rows.next_multiple_of(SIDE) {
        // SAFETY: as above; one float32 inside a validated view.
        unsafe {
            let (mut lse, mut delta) = ([f32::INFINITY, 0.0], 0.0);
            if r < rows {
                let (head, i) = place(r);
                let read = |x: &TensorRef| DType::F32.read(x.row(t.b, head, i));
                let natural = read(&p.lse);
                // A row that saw no key has no weights: 2^(s - inf) = 0.
                if natural != f32::NEG_INFINITY {
                    lse = halves(f64::from(natural) * std::f64::consts::LOG2_E);
                }
                let (g, o) = (&p.grad_out, &p.out);
                delta = (kernels.dot)(g.row(t.b, head, i), g.dtype(), o.row(t.b, head, i), o.dtype(), p.head_dim);
                delta -= p.grad_lse.as_ref().map_or(0.0, read);
            }
            let to = scratch.add(s.lse).cast::<f32>().add(r / SIDE * 2 * SIDE + r % SIDE);
            (*to, *to.add(SIDE)) = (lse[0], lse[1]);
            *scratch.add(s.minus_delta).cast::<f32>().add(r) = -delta;
        }
    }
}

/// A number as float32, and what that leaves of it; 0 where it is no finite one.
fn halves(x: f64) -> [f32; 2] {
    let rest = (x - f64::from(x as f32)) as f32;
    [x as f32, if rest.is_finite() { rest } else { 0.0 }]
}

/// Zeros for the keys outside `lo..hi`, which nobody sees.
unsafe fn clear(p: &Gradients, b: usize, kv_head: usize, lo: usize, hi: usize) {
    let zero = |t: &TensorMut| {
        for j in (0..lo).chain(hi..t.shape()[2]) {
            // SAFETY: a row of a validated output.
            unsafe { std::ptr::write_bytes(t.row(b, kv_head, j), 0, p.head_dim * t.dtype().size()) };
        }
    };
    zero(&p.dk);
    zero(&p.dv);
}
