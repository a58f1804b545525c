//! `attention_decode` on the CPU: a few queries against a long cache, read once at the speed of memory.
//!
//! The key axis is split over the threads; splits leave partials that are merged. Rows (the query heads of a group
//! times the queries) go through the kernel eight at a time.

use super::arch::RowsKernel;
use super::kernels::M_INIT;
use super::partials::Partials;
use super::rowwise::{BLOCK, Block};
use super::scratch::Plan;
use super::{Context, isa, pool};
use crate::args::Problem;
use crate::dtype::DType;
use crate::error::Result;
use crate::softmax::lse_from_base2;

/// Most rows of a kernel.
pub const ROWS: usize = 8;
/// Shares per thread: evens out threads that are held up.
const SHARES: usize = 16;
/// Keys below which a split is not worth its merge.
const MIN_SPLIT: usize = 512;

struct Plans {
    kernel: RowsKernel,
    /// head_dim padded to whole chunks.
    dp: usize,
    chunk: usize,
    tiles: usize,
    splits: usize,
    plan: Plan,
    q: usize,
    s: usize,
    m: usize,
    l: usize,
    o: usize,
    /// Zero-padded copies of a block of k and v, where head_dim is not a whole number of chunks.
    k: usize,
    v: usize,
}

struct Task {
    b: usize,
    kv_head: usize,
    row0: usize,
    rows: usize,
    split: usize,
}

impl Plans {
    fn new(p: &Problem, kernel: RowsKernel, threads: usize) -> Self {
        let chunk = kernel.lanes * kernel.pair;
        let dp = p.head_dim.next_multiple_of(chunk);
        let tiles = (p.group * p.q_len).div_ceil(ROWS);
        let most = (0..p.batch).map(|b| p.visible(b, p.q_len - 1)).map(|(lo, hi)| hi - lo).max().unwrap_or(0);
        let wanted = (threads * SHARES).div_ceil((p.batch * p.kv_heads * tiles).max(1));
        let splits = if threads == 1 { 1 } else { wanted.min(most / MIN_SPLIT).max(1) };
        let mut plan = Plan::default();
        let padded = if dp == p.head_dim { 0 } else { BLOCK * dp * p.q.dtype().size() / 4 };
        Self {
            kernel,
            dp,
            chunk,
            tiles,
            splits,
            q: plan.words(ROWS * dp / kernel.pair),
            s: plan.words(ROWS * BLOCK),
            m: plan.words(ROWS),
            l: plan.words(ROWS * kernel.lanes),
            o: plan.words(ROWS * dp),
            k: plan.words(padded),
            v: plan.words(padded),
            plan,
        }
    }

    fn task(&self, p: &Problem, n: usize) -> Task {
        let (rest, split) = (n / self.splits, n % self.splits);
        let (head, tile) = (rest / self.tiles, rest % self.tiles);
        let row0 = tile * ROWS;
        let rows = ROWS.min(p.group * p.q_len - row0);
        Task { b: head / p.kv_heads, kv_head: head % p.kv_heads, row0, rows, split }
    }
}

/// Query and query head of row `row` of a task.
fn place(p: &Problem, t: &Task, row: usize) -> (usize, usize) {
    let r = t.row0 + row;
    (r / p.group, t.kv_head * p.group + r % p.group)
}

/// Exact attention, meant for `group * q_len` up to a few dozen rows; right for any.
///
/// # Errors
/// When interrupted or out of resources.
pub fn attention_decode(p: &Problem, cx: &Context) -> Result<()> {
    if p.batch * p.q_heads * p.q_len == 0 {
        return Ok(());
    }
    let kernels = &isa::active()?.kernels;
    let plans = Plans::new(p, (kernels.rows)(p.q.dtype()), cx.threads);
    let tasks = p.batch * p.kv_heads * plans.tiles;
    let splits = plans.splits;
    let mut partials = Partials::new(if splits > 1 { tasks } else { 0 }, splits, ROWS, p.head_dim)?;
    let slots = partials.slots();
    pool::run(cx, tasks * splits, 1, |n| {
        let t = plans.task(p, n);
        plans.plan_with(|scratch| {
            // SAFETY: `active` chose kernels this CPU has, the scratch was planned for them, the problem is validated,
            // and rows of the output (or slots of the partials) belong to this task alone.
            unsafe {
                attend(p, &plans, &t, scratch);
                store(p, &plans, &t, scratch, kernels, |row| {
                    (splits > 1).then(|| partials.slot(&slots, n / splits, t.split, row))
                });
            }
        });
    })?;
    if splits > 1 {
        partials.join(tasks, kernels, cx, |task, row| {
            let t = plans.task(p, task * splits);
            let (i, head) = place(p, &t, row.min(t.rows - 1));
            (row < t.rows)
                .then(|| (p.out.row(t.b, head, i), p.out.dtype(), p.lse.as_ref().map(|l| l.row(t.b, head, i))))
        })?;
    }
    Ok(())
}

impl Plans {
    fn plan_with(&self, f: impl FnOnce(*mut u8)) {
        self.plan.with(f);
    }
}

unsafe fn attend(p: &Problem, plans: &Plans, t: &Task, scratch: *mut u8) {
    let kernel = &plans.kernel;
    let (last, _) = place(p, t, t.rows - 1);
    let (first, _) = place(p, t, 0);
    let (lo, hi) = p.visible_span(t.b, first, last + 1);
    let share = (hi - lo).div_ceil(plans.splits).next_multiple_of(BLOCK);
    let (lo, hi) = ((lo + t.split * share).min(hi), (lo + (t.split + 1) * share).min(hi));
    // 1, 2, 4 or 8 rows; the ones beyond t.rows are zeros and ignored.
    let pick = t.rows.next_power_of_two().trailing_zeros() as usize;
    let rows = 1 << pick;
    let dtype = p.q.dtype();
    let row_bytes = p.head_dim * dtype.size();
    // SAFETY: offsets and sizes are the plan's; k and v rows come from runs inside validated views.
    unsafe {
        let at = |offset: usize| scratch.add(offset);
        let (m, l, o) = (at(plans.m).cast::<f32>(), at(plans.l).cast::<f32>(), at(plans.o).cast::<f32>());
        std::slice::from_raw_parts_mut(m, rows).fill(M_INIT);
        std::ptr::write_bytes(l, 0, rows * kernel.lanes);
        std::ptr::write_bytes(o, 0, rows * plans.dp);
        pack_q(p, plans, t, rows, at(plans.q).cast());
        let mut limits = [0i32; ROWS];
        let mut j = lo;
        while j < hi {
            let run = p.kv.run(t.b, t.kv_head, j, hi);
            let mut done = 0;
            while done < run.len {
                let n = BLOCK.min(run.len - done);
                for (r, limit) in limits.iter_mut().enumerate().take(rows) {
                    let (i, _) = place(p, t, r.min(t.rows - 1));
                    *limit = p.visible(t.b, i).1.saturating_sub(j + done).min(n) as i32;
                }
                let (mut k, mut v) = (run.k.wrapping_add(done * run.k_stride), run.v.wrapping_add(done * run.v_stride));
                let (mut k_stride, mut v_stride) = (run.k_stride, run.v_stride);
                if plans.dp != p.head_dim {
                    let wide = plans.dp * dtype.size();
                    for (src, stride, dst) in [(k, k_stride, at(plans.k)), (v, v_stride, at(plans.v))] {
                        std::ptr::write_bytes(dst, 0, n * wide);
                        for i in 0..n {
                            std::ptr::copy_nonoverlapping(src.add(i * stride), dst.add(i * wide), row_bytes);
                        }
                    }
                    (k, v, k_stride, v_stride) = (at(plans.k), at(plans.v), wide, wide);
                }
                (kernel.block[pick])(&Block {
                    q: at(plans.q).cast(),
                    k,
                    k_stride,
                    v,
                    v_stride,
                    n,
                    m,
                    l,
                    o,
                    s: at(plans.s).cast(),
                    chunks: plans.dp / plans.chunk,
                    scale: p.scaling(kernel.pair).1,
                    hi: limits.as_ptr(),
                });
                done += n;
            }
            j += run.len;
        }
    }
}

/// Rows of q to `[rows][dp / PAIR]` operand units, zero beyond head_dim and for rows beyond the task's.
unsafe fn pack_q(p: &Problem, plans: &Plans, t: &Task, rows: usize, dst: *mut u8) {
    let dtype = p.q.dtype();
    let (factor, _) = p.scaling(plans.kernel.pair);
    let size = 4 / plans.kernel.pair;
    for r in 0..rows {
        for d in 0..plans.dp {
            // SAFETY: inside the plan; q is read below head_dim only.
            unsafe {
                let to = dst.add((r * plans.dp + d) * size);
                let mut x = 0.0;
                if r < t.rows && d < p.head_dim {
                    let (i, head) = place(p, t, r);
                    x = dtype.read(p.q.row(t.b, head, i).add(d * dtype.size()));
                }
                let x = if factor == 0.0 { 0.0 } else { (f64::from(x) * factor) as f32 };
                if size == 4 { DType::F32.write(to, x) } else { dtype.write(to, x) }
            }
        }
    }
}

unsafe fn store(
    p: &Problem,
    plans: &Plans,
    t: &Task,
    scratch: *mut u8,
    kernels: &super::arch::Kernels,
    partial: impl Fn(usize) -> Option<*mut f32>,
) {
    let kernel = &plans.kernel;
    let mut straight = [0.0f32; 256];
    for row in 0..t.rows {
        let (i, head) = place(p, t, row);
        // SAFETY: inside the plan, the output and the slot; this task alone writes them.
        unsafe {
            let lanes =
                std::slice::from_raw_parts(scratch.add(plans.l).cast::<f32>().add(row * kernel.lanes), kernel.lanes);
            let l: f32 = lanes.iter().sum();
            let m = *scratch.add(plans.m).cast::<f32>().add(row);
            let o = std::slice::from_raw_parts(scratch.add(plans.o).cast::<f32>().add(row * plans.dp), plans.dp);
            // Undo the order in which pairs of rows came apart.
            for (c, chunk) in o.chunks_exact(plans.chunk).enumerate() {
                for (a, x) in chunk.iter().enumerate() {
                    straight[c * plans.chunk + (kernel.order)(a / kernel.lanes, a % kernel.lanes)] = *x;
                }
            }
            let inv = if l == 0.0 { 0.0 } else { 1.0 / l };
            let lse = lse_from_base2(m, l);
            match partial(row) {
                Some(slot) => {
                    (kernels.finish)(straight.as_ptr(), inv, p.head_dim, DType::F32, slot.cast());
                    *slot.add(p.head_dim) = lse;
                }
                None => {
                    (kernels.finish)(straight.as_ptr(), inv, p.head_dim, p.out.dtype(), p.out.row(t.b, head, i));
                    if let Some(out) = &p.lse {
                        DType::F32.write(out.row(t.b, head, i), lse);
                    }
                }
            }
        }
    }
}
