//! `attention_forward` on the CPU: blockwise online softmax over packed panels.
//!
//! A task is a run of queries of one (batch row, kv head), all query heads of the group folded into rows, so that a
//! block of k and v is packed once and used by every panel. Memory beyond the outputs is one scratch per thread, a
//! few hundred rows, whatever the lengths.

use super::arch::{Kernels, PanelKernel, prefetch};
use super::codes::Dequantize;
use super::kernels::{M_INIT, Panel};
use super::partials::Partials;
use super::scratch::Plan;
use super::{Context, isa, pool};
use crate::args::{Problem, Rows};
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::{Axis, width};
use crate::softmax::lse_from_base2;
use crate::tiling::{Shape, Tiling};

/// Scratch that a task's rows may fill: q and o together stay in a second-level cache of 1 MiB.
const CACHE: usize = 880 << 10;

/// Offsets into a thread's scratch.
struct Scratch {
    plan: Plan,
    q: usize,
    k: usize,
    v: usize,
    p: usize,
    m: usize,
    l: usize,
    o: usize,
    hi: usize,
    /// Rows of compact k and v of a block, made dense.
    k_rows: usize,
    v_rows: usize,
}

struct Task {
    b: usize,
    kv_head: usize,
    q0: usize,
    q1: usize,
    split: usize,
}

struct Plans {
    kernel: PanelKernel,
    /// head_dim padded to the kernel's multiple.
    dp: usize,
    units: usize,
    tiling: Tiling,
    blocks: usize,
    scratch: Scratch,
}

impl Plans {
    fn new(p: &Problem, kernel: PanelKernel, threads: usize) -> Self {
        let dp = p.head_dim.next_multiple_of(kernel.multiple);
        let units = dp / kernel.pair;
        let row = 4 * (dp + units + kernel.lanes + 1);
        let last = (0..p.batch).map(|b| span(p.visible(b, p.q_len - 1))).max().unwrap_or(0);
        let first = (0..p.batch).map(|b| span(p.visible(b, 0))).max().unwrap_or(0).min(last);
        let tiling = Shape {
            heads: p.batch * p.kv_heads,
            q_len: p.q_len,
            group: p.group,
            first,
            last,
            threads,
            panel_rows: kernel.rows,
            block_kv: kernel.keys,
            max_rows: CACHE / row / kernel.rows * kernel.rows,
        }
        .choose();
        let rows = (tiling.block_q * p.group).next_multiple_of(kernel.rows);
        let mut plan = Plan::default();
        let dense = if p.kv.is_compact() { kernel.keys * p.head_dim * p.q.dtype().size() / 4 + 1 } else { 0 };
        let scratch = Scratch {
            k: plan.words(units * kernel.keys),
            v: plan.words(kernel.keys / kernel.pair * dp),
            p: plan.words(kernel.rows * kernel.keys / kernel.pair),
            hi: plan.words(kernel.rows),
            m: plan.words(rows),
            l: plan.words(rows * kernel.lanes),
            q: plan.words(rows * units),
            o: plan.words(rows * dp),
            k_rows: plan.words(dense),
            v_rows: plan.words(dense),
            plan,
        };
        Self {
            kernel,
            dp,
            units,
            tiling,
            blocks: p.q_len.div_ceil(tiling.block_q),
            scratch: Scratch { plan, ..scratch },
        }
    }

    /// The n-th task: late queries first, since under a causal mask they are the longest.
    fn task(&self, p: &Problem, n: usize) -> Task {
        let heads = p.batch * p.kv_heads;
        let (rest, split) = (n / self.tiling.splits, n % self.tiling.splits);
        let (block, head) = (self.blocks - 1 - rest / heads, rest % heads);
        let q0 = block * self.tiling.block_q;
        let q1 = (q0 + self.tiling.block_q).min(p.q_len);
        Task { b: head / p.kv_heads, kv_head: head % p.kv_heads, q0, q1, split }
    }
}

fn span((lo, hi): (usize, usize)) -> usize {
    hi - lo
}

/// Exact attention of every query; see [`crate::attention::attention_forward`].
///
/// # Errors
/// When interrupted or out of resources.
pub fn attention_forward(p: &Problem, cx: &Context) -> Result<()> {
    if p.batch * p.q_heads * p.q_len == 0 {
        return Ok(());
    }
    let kernels = &isa::active()?.kernels;
    let plans = Plans::new(p, (kernels.panel)(p.q.dtype()), cx.threads);
    let tasks = plans.blocks * p.batch * p.kv_heads;
    let splits = plans.tiling.splits;
    let rows = plans.tiling.block_q * p.group;
    let mut partials = Partials::new(if splits > 1 { tasks } else { 0 }, splits, rows, p.head_dim)?;
    let slots = partials.slots();
    pool::run(cx, tasks * splits, 1, |n| {
        let t = plans.task(p, n);
        plans.scratch.plan.with(|scratch| {
            // SAFETY: `active` chose kernels this CPU has, the scratch was planned for them, the problem is validated,
            // and rows of the output (or slots of the partials) belong to this task alone.
            unsafe {
                attend(p, &plans, kernels, &t, scratch);
                store(p, &plans, &t, scratch, |row| {
                    (splits > 1).then(|| partials.slot(&slots, n / splits, t.split, row))
                });
            }
        });
    })?;
    if splits > 1 {
        partials.join(tasks, kernels, cx, |task, row| {
            let t = plans.task(p, task * splits);
            let (i, head) = (t.q0 + row / p.group, t.kv_head * p.group + row % p.group);
            (i < t.q1).then(|| (p.out.row(t.b, head, i), p.out.dtype(), p.lse.as_ref().map(|l| l.row(t.b, head, i))))
        })?;
    }
    Ok(())
}

/// Runs a task's queries over its share of the keys; leaves m, l and o in the scratch.
unsafe fn attend(p: &Problem, plans: &Plans, kernels: &Kernels, t: &Task, scratch: *mut u8) {
    let (kernel, s) = (&plans.kernel, &plans.scratch);
    let rows = (t.q1 - t.q0) * p.group;
    let panels = rows.div_ceil(kernel.rows);
    let (lo, hi) = p.visible_span(t.b, t.q0, t.q1);
    // Splits are whole blocks.
    let share = (hi - lo).div_ceil(plans.tiling.splits).next_multiple_of(kernel.keys);
    let (lo, hi) = ((lo + t.split * share).min(hi), (lo + (t.split + 1) * share).min(hi));
    let (_, scale) = p.scaling(kernel.pair);
    // SAFETY: offsets and sizes are the plan's; k and v rows come from runs inside validated views.
    unsafe {
        let at = |offset: usize| scratch.add(offset);
        let o: *mut f32 = at(s.o).cast();
        let l: *mut f32 = at(s.l).cast();
        let m: *mut f32 = at(s.m).cast();
        std::ptr::write_bytes(o, 0, panels * kernel.rows * plans.dp);
        std::ptr::write_bytes(l, 0, panels * kernel.rows * kernel.lanes);
        std::slice::from_raw_parts_mut(m, panels * kernel.rows).fill(M_INIT);
        if lo < hi {
            pack_q(p, plans, t, at(s.q).cast());
        }
        let mut krows = [std::ptr::null::<u8>(); MAX_KEYS];
        let mut vrows = krows;
        let row_bytes = p.head_dim * p.q.dtype().size();
        let limits: *mut i32 = at(s.hi).cast();
        let mut k0 = lo;
        while k0 < hi {
            let n = kernel.keys.min(hi - k0);
            let mut j = 0;
            while j < n {
                let run = p.kv.run(t.b, t.kv_head, k0 + j, k0 + n);
                dense_rows(
                    p,
                    kernels,
                    &run.k,
                    Axis::Channel,
                    run.len,
                    at(s.k_rows).add(j * row_bytes),
                    &mut krows[j..],
                );
                dense_rows(p, kernels, &run.v, Axis::Token, run.len, at(s.v_rows).add(j * row_bytes), &mut vrows[j..]);
                j += run.len;
            }
            // Keys beyond n are zeros: masked, and never a stale NaN.
            krows[n..kernel.keys].fill(std::ptr::null());
            vrows[n..kernel.keys].fill(std::ptr::null());
            (kernel.pack_k)(krows.as_ptr(), row_bytes, plans.units, at(s.k).cast());
            (kernel.pack_v)(vrows.as_ptr(), row_bytes, plans.dp, at(s.v).cast());
            // The next block's rows are asked for while this one computes: from memory they'd cost 5% of the time.
            let ahead = (k0 + n < hi).then(|| p.kv.run(t.b, t.kv_head, k0 + n, (k0 + n + kernel.keys).min(hi)));
            let per_panel = kernel.keys.div_ceil(panels);
            for panel in 0..panels {
                if let Some(run) = &ahead {
                    for j in panel * per_panel..((panel + 1) * per_panel).min(run.len) {
                        for rows in [&run.k, &run.v] {
                            let bytes = rows.codes.map_or(row_bytes, |c| c.bytes(width(p.head_dim)));
                            // A stride of compact keys is a group's: its bytes are asked for a row's worth at a time.
                            let grouped = rows.codes.is_some() && std::ptr::eq(rows, &run.k);
                            let stride = if grouped { bytes } else { rows.stride };
                            prefetch(rows.ptr.wrapping_add(j * stride), bytes);
                        }
                    }
                }
                let r0 = panel * kernel.rows;
                let query = |r: usize| t.q0 + r.min(rows - 1) / p.group;
                // Intervals end later for later queries, so the first row sees least and the last one most.
                let (least, most) = (p.visible(t.b, query(r0)).1, p.visible(t.b, query(r0 + kernel.rows - 1)).1);
                if most <= k0 {
                    continue;
                }
                let masked = n < kernel.keys || least < k0 + n;
                if masked {
                    for r in 0..kernel.rows {
                        let end = p.visible(t.b, query(r0 + r)).1;
                        *limits.add(r) = end.saturating_sub(k0).min(n) as i32;
                    }
                }
                (kernel.panel)(&Panel {
                    q: at(s.q).cast::<u32>().add(r0 * plans.units),
                    k: at(s.k).cast(),
                    v: at(s.v).cast(),
                    p: at(s.p).cast(),
                    m: m.add(r0),
                    l: l.add(r0 * kernel.lanes),
                    o: o.add(r0 * plans.dp),
                    units: plans.units,
                    dp: plans.dp,
                    scale,
                    hi: if masked { limits } else { std::ptr::null() },
                });
            }
            k0 += n;
        }
    }
}

/// Where `n` rows of k or v lie: themselves, or at `dst` after they were made dense.
unsafe fn dense_rows(
    p: &Problem,
    kernels: &Kernels,
    rows: &Rows,
    axis: Axis,
    n: usize,
    dst: *mut u8,
    to: &mut [*const u8],
) {
    let dtype = p.q.dtype();
    let row_bytes = p.head_dim * dtype.size();
    let (ptr, stride) = if rows.codes.is_some() {
        let wide = width(p.head_dim);
        // SAFETY: the run is inside a validated page; the scratch was planned for a block of dense rows.
        unsafe {
            (kernels.dequantize)(&Dequantize {
                rows: *rows,
                axis,
                n,
                width: wide,
                head_dim: p.head_dim,
                dtype,
                dst,
                dst_stride: row_bytes,
            });
        }
        (dst.cast_const(), row_bytes)
    } else {
        (rows.ptr, rows.stride)
    };
    for (i, to) in to.iter_mut().enumerate().take(n) {
        *to = ptr.wrapping_add(i * stride);
    }
}

/// Most keys of any kernel's block.
const MAX_KEYS: usize = 64;

/// Rows of q to `[panel][units][R]`, times the part of the scale that belongs there (see [`crate::args::Scores::scaling`]).
unsafe fn pack_q(p: &Problem, plans: &Plans, t: &Task, dst: *mut u32) {
    let (r_of, pair) = (plans.kernel.rows, plans.kernel.pair);
    let rows = (t.q1 - t.q0) * p.group;
    let dtype = p.q.dtype();
    let (factor, _) = p.scaling(pair);
    let flip: u32 = if factor < 0.0 { 0x8000_8000 } else { 0 };
    for r in 0..rows.next_multiple_of(r_of) {
        // SAFETY: the destination was planned for whole panels; the source row is inside q and read within head_dim.
        unsafe {
            let to = dst.add(r / r_of * plans.units * r_of + r % r_of);
            let mut done = 0;
            if r < rows && factor != 0.0 {
                let from = p.q.row(t.b, t.kv_head * p.group + r % p.group, t.q0 + r / p.group);
                if pair == 1 {
                    for u in 0..p.head_dim {
                        let x = f64::from(dtype.read(from.add(u * dtype.size()))) * factor;
                        *to.add(u * r_of) = (x as f32).to_bits();
                    }
                } else {
                    for u in 0..p.head_dim / 2 {
                        *to.add(u * r_of) = from.cast::<u32>().add(u).read_unaligned() ^ flip;
                    }
                    if p.head_dim % 2 == 1 {
                        // An odd head_dim leaves half a pair.
                        let last = from.cast::<u16>().add(p.head_dim - 1).read_unaligned();
                        *to.add(p.head_dim / 2 * r_of) = u32::from(last) ^ (flip & 0xffff);
                    }
                }
                done = p.head_dim.div_ceil(pair);
            }
            for u in done..plans.units {
                *to.add(u * r_of) = 0;
            }
        }
    }
}

/// Writes a task's finished rows: to the output, or to the slot that `partial(row)` names.
unsafe fn store(p: &Problem, plans: &Plans, t: &Task, scratch: *mut u8, partial: impl Fn(usize) -> Option<*mut f32>) {
    let (kernel, s) = (&plans.kernel, &plans.scratch);
    for row in 0..(t.q1 - t.q0) * p.group {
        let (i, head) = (t.q0 + row / p.group, t.kv_head * p.group + row % p.group);
        // SAFETY: inside the plan, the output and the slot; this task alone writes them.
        unsafe {
            let lanes =
                std::slice::from_raw_parts(scratch.add(s.l).cast::<f32>().add(row * kernel.lanes), kernel.lanes);
            let l: f32 = lanes.iter().sum();
            let m = *scratch.add(s.m).cast::<f32>().add(row);
            let o = scratch.add(s.o).cast::<f32>().add(row * plans.dp);
            let inv = if l == 0.0 { 0.0 } else { 1.0 / l };
            let lse = lse_from_base2(m, l);
            match partial(row) {
                Some(slot) => {
                    (kernel.finish)(o, inv, p.head_dim, DType::F32, slot.cast());
                    *slot.add(p.head_dim) = lse;
                }
                None => {
                    (kernel.finish)(o, inv, p.head_dim, p.out.dtype(), p.out.row(t.b, head, i));
                    if let Some(out) = &p.lse {
                        DType::F32.write(out.row(t.b, head, i), lse);
                    }
                }
            }
        }
    }
}
