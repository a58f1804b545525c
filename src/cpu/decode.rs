//! `attention_decode` on the CPU: a few queries against a long cache, read once at the speed of memory.
//!
//! The key axis is split over the threads; splits leave partials that are merged. Rows (the query heads of a group
//! times the queries) go through the kernel eight at a time.

use super::arch::RowsKernel;
use super::kernels::M_INIT;
use super::partials::Partials;
use super::rowwise::{BLOCK, Block, BlockCodes};
use super::scratch::Plan;
use super::{Context, isa, pool};
use crate::args::{Problem, Rows};
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::{Codes, GROUP, width};
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
    /// Where pages are compact: q in float32 (`q` itself where that is float32) and operands made on the way; see
    /// `BlockCodes`.
    q32: usize,
    units: usize,
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
        let compact = p.kv.is_compact();
        let dp = if compact { width(p.head_dim) } else { p.head_dim.next_multiple_of(chunk) };
        let tiles = (p.group * p.q_len).div_ceil(ROWS);
        let most = (0..p.batch).map(|b| p.visible(b, p.q_len - 1)).map(|(lo, hi)| hi - lo).max().unwrap_or(0);
        let wanted = (threads * SHARES).div_ceil((p.batch * p.kv_heads * tiles).max(1));
        let splits = if threads == 1 { 1 } else { wanted.min(most / MIN_SPLIT).max(1) };
        let mut plan = Plan::default();
        let padded = if dp == p.head_dim { 0 } else { BLOCK * dp * p.q.dtype().size() / 4 };
        let q = plan.words(ROWS * dp / kernel.pair);
        Self {
            kernel,
            dp,
            chunk,
            tiles,
            splits,
            q,
            s: plan.words(ROWS * BLOCK),
            m: plan.words(ROWS),
            l: plan.words(ROWS * kernel.lanes),
            o: plan.words(ROWS * dp),
            k: plan.words(padded),
            v: plan.words(padded),
            q32: if compact && kernel.pair > 1 { plan.words(ROWS * dp) } else { q },
            units: plan.words(if compact { ROWS * dp.max(BLOCK) / kernel.pair } else { 0 }),
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
                let layout = attend(p, &plans, &t, scratch);
                store(p, &plans, &t, scratch, layout, kernels, |row| {
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

/// Runs a task's rows over its share of the keys; leaves m, l and o in the scratch and says how o is laid out.
unsafe fn attend(p: &Problem, plans: &Plans, t: &Task, scratch: *mut u8) -> Option<Codes> {
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
    let mut layout = None;
    // SAFETY: offsets and sizes are the plan's; k and v rows come from runs inside validated views.
    unsafe {
        let at = |offset: usize| scratch.add(offset);
        let (m, l, o) = (at(plans.m).cast::<f32>(), at(plans.l).cast::<f32>(), at(plans.o).cast::<f32>());
        std::slice::from_raw_parts_mut(m, rows).fill(M_INIT);
        std::ptr::write_bytes(l, 0, rows * kernel.lanes);
        std::ptr::write_bytes(o, 0, rows * plans.dp);
        if lo < hi {
            pack_q(p, plans, t, rows, kernel.pair, at(plans.q));
            if plans.q32 != plans.q {
                pack_q(p, plans, t, rows, 1, at(plans.q32));
            }
        }
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
                let (k, k_stride) = dense_rows(p, plans, &run.k, done, n, at(plans.k));
                let (v, v_stride) = dense_rows(p, plans, &run.v, done, n, at(plans.v));
                let lines = |rows: &Rows| n * rows.codes.map_or(plans.dp * dtype.size(), |c| c.bytes(plans.dp)) / 64;
                let block = Block {
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
                    // Compact keys meet a q that has it all.
                    scale: if run.k.codes.is_some() { 1.0 } else { p.scaling(kernel.pair).1 },
                    hi: limits.as_ptr(),
                    codes: BlockCodes {
                        q: at(plans.q32).cast(),
                        width: plans.dp,
                        k_params: run.k.params,
                        v_params: run.v.params.wrapping_add(done),
                        v_params_stride: run.v.params_stride,
                        k_first: run.k.first,
                        k_next: k.wrapping_add(if run.k.codes.is_some() { k_stride } else { n * k_stride }),
                        k_lines: lines(&run.k),
                        v_lines: lines(&run.v),
                        units: at(plans.units).cast(),
                    },
                };
                if run.v.codes != layout {
                    relay(plans, rows, o, layout, run.v.codes);
                    layout = run.v.codes;
                }
                match (run.k.codes, run.v.codes) {
                    (None, None) => (kernel.block[pick])(&block),
                    (k, v) => {
                        k.map_or(kernel.scores, |c| kernel.codes.scores[c as usize])[pick](&block);
                        kernel.codes.softmax[usize::from(v.is_some())][pick](&block);
                        v.map_or(kernel.values, |c| kernel.codes.values[c as usize])[pick](&block);
                    }
                }
                done += n;
            }
            j += run.len;
        }
    }
    layout
}

/// Rows as the kernel can take them, and the bytes between them: codes as they are, and dense rows too unless head_dim
/// must be padded, which needs a copy at `dst`.
unsafe fn dense_rows(
    p: &Problem,
    plans: &Plans,
    rows: &Rows,
    done: usize,
    n: usize,
    dst: *mut u8,
) -> (*const u8, usize) {
    // A run of compact keys is one block.
    let src = rows.ptr.wrapping_add(done * rows.stride);
    if rows.codes.is_some() || plans.dp == p.head_dim {
        return (src, rows.stride);
    }
    let size = p.q.dtype().size();
    let wide = plans.dp * size;
    // SAFETY: n rows of the run; the destination was planned for BLOCK padded rows.
    unsafe {
        std::ptr::write_bytes(dst, 0, n * wide);
        for i in 0..n {
            std::ptr::copy_nonoverlapping(src.add(i * rows.stride), dst.add(i * wide), p.head_dim * size);
        }
    }
    (dst, wide)
}

/// Element of a row of o that position `n` of the layout holds.
fn element(plans: &Plans, layout: Option<Codes>, n: usize) -> usize {
    let (chunk, order) = match layout {
        None => (plans.chunk, plans.kernel.order),
        Some(c) => (GROUP, plans.kernel.codes.order[c as usize]),
    };
    n / chunk * chunk + order(n % chunk / plans.kernel.lanes, n % plans.kernel.lanes)
}

/// Lays the rows of o out anew: each kind of v leaves them in an order of its own.
unsafe fn relay(plans: &Plans, rows: usize, o: *mut f32, from: Option<Codes>, to: Option<Codes>) {
    for r in 0..rows {
        // SAFETY: the plan has dp elements for each row.
        let row = unsafe { std::slice::from_raw_parts_mut(o.add(r * plans.dp), plans.dp) };
        let mut straight = [0.0f32; 256];
        for (n, x) in row.iter().enumerate() {
            straight[element(plans, from, n)] = *x;
        }
        for (n, x) in row.iter_mut().enumerate() {
            *x = straight[element(plans, to, n)];
        }
    }
}

/// Rows of q to `[rows][dp / pair]` operand units, zero beyond head_dim and for rows beyond the task's.
unsafe fn pack_q(p: &Problem, plans: &Plans, t: &Task, rows: usize, pair: usize, dst: *mut u8) {
    let dtype = p.q.dtype();
    let (factor, _) = p.scaling(pair);
    let size = 4 / pair;
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
    layout: Option<Codes>,
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
            for (n, x) in o.iter().enumerate() {
                straight[element(plans, layout, n)] = *x;
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
