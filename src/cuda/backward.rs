//! Gradients of attention on a GPU: the stats of all queries, then a sweep of keys (dk, dv) and one of queries (dq). See
//! `csrc/sweep.cuh`.

use super::attention::{ALIGN, Path};
use super::backward_kernels::{self as kernels, Sweep};
use super::driver::Device;
use super::launch::{Context, param};
use super::params::{Backward, SEGMENT, STATS, View};
use super::tensor_map::{SweepMaps, unmapped};
use super::views::{Bounds, aligned, countable};
use crate::args::{KvRef, Side};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gradients::Gradients;
use crate::tensor::TensorRef;

/// Most of anything: a kernel adds two of them in 32 bits.
const MOST: usize = 1 << 29;
/// Bytes of sums of segments that a launch may have; where all heads would take more, there are several launches.
const TOTAL: usize = 1 << 30;

/// What lies where in the workspace: stats, then sums of segments.
struct Plan {
    stats_len: usize,
    stats_bytes: usize,
    /// Key heads of a launch.
    heads: usize,
    keys_total: usize,
    queries_total: usize,
}

impl Plan {
    fn new(q: &TensorRef, kv: &KvRef, folds: bool) -> Self {
        let [batch, q_heads, q_len, head_dim] = q.shape();
        let [_, kv_heads, kv_len, _] = kv.shape();
        let group = q_heads.checked_div(kv_heads).unwrap_or(1).max(1);
        let stats_len = q_len.next_multiple_of(STATS);
        let row = batch * head_dim * 4;
        // Of one key head.
        let keys = if folds && q_len * group > SEGMENT { 2 * kv.held() * row } else { 0 };
        let queries = if folds && kv_len > SEGMENT { group * q_len * row } else { 0 };
        let heads = TOTAL.checked_div(keys.max(queries)).unwrap_or(kv_heads).clamp(1, kv_heads.max(1));
        Self {
            stats_len,
            stats_bytes: (batch * q_heads * stats_len * 8).next_multiple_of(ALIGN),
            heads,
            keys_total: heads * keys,
            queries_total: heads * queries,
        }
    }

    fn bytes(&self) -> usize {
        self.stats_bytes + self.keys_total.max(self.queries_total)
    }
}

/// Kernels count in 32 bits. Axes that are expanded may have any length without any memory.
fn numbers(q: &TensorRef, kv: &KvRef) -> Result<()> {
    let [batch, q_heads, q_len, _] = q.shape();
    for (name, n) in [("batch", batch), ("q_heads", q_heads), ("q_len", q_len), ("kv_len", kv.held())] {
        countable(name, n, MOST)?;
    }
    Ok(())
}

/// Whether a tuned kernel may serve such a call, if its rows lie well.
fn tunable(dtype: DType, head_dim: usize) -> bool {
    dtype != DType::F32 && (head_dim == 64 || head_dim == 128)
}

/// Bytes of workspace that [`attention_backward`] wants for q over these keys.
///
/// # Errors
/// When the call is too large.
pub fn workspace_bytes(q: &TensorRef, kv: &KvRef) -> Result<usize> {
    numbers(q, kv)?;
    Ok(Plan::new(q, kv, tunable(q.dtype(), q.shape()[3])).bytes())
}

/// Why the tuned kernels don't serve a call; None: they do.
fn untuned(p: &Gradients, call: &Backward) -> Option<String> {
    if !tunable(p.q.dtype(), p.head_dim) {
        return Some(format!("{} of head_dim {}", p.q.dtype().name(), p.head_dim));
    }
    if p.batch * p.q_heads * p.q_len * p.kv_len == 0 {
        return Some("no queries or no keys".into());
    }
    for (name, view, bytes) in [
        ("q", &call.q, 16),
        ("k", &call.k, 16),
        ("v", &call.v, 16),
        ("grad_out", &call.grad_out, 16),
        ("dq", &call.dq, 4),
        ("dk", &call.dk, 4),
        ("dv", &call.dv, 4),
    ] {
        if !aligned(view, bytes) {
            return Some(format!("rows of {name} that begin off multiples of {bytes} bytes"));
        }
    }
    None
}

/// Why `attention_backward_sm90` does not serve a call on this device; None: it does.
fn not_hopper(p: &Gradients, call: &Backward, device: &Device) -> Option<String> {
    if device.capability != (9, 0) {
        let (major, minor) = device.capability;
        return Some(format!("{} of compute capability {major}.{minor}", device.name));
    }
    let queries = [&call.q, &call.grad_out].map(|v| (v, [p.batch, p.q_heads, p.q_len]));
    let keys = [&call.k, &call.v].map(|v| (v, [p.batch, p.kv_heads, p.kv_len]));
    untuned(p, call).or_else(|| queries.into_iter().chain(keys).find_map(|(v, shape)| unmapped(v, shape)))
}

/// What `auto` stands for; a path that was asked for, if it serves this call.
fn settle(path: Path, p: &Gradients, call: &Backward, device: &Device) -> Result<Path> {
    let why = match path {
        Path::Auto if not_hopper(p, call, device).is_none() => return Ok(Path::Sm90),
        Path::Auto if untuned(p, call).is_none() => return Ok(Path::Sm80),
        Path::Auto | Path::Any => return Ok(Path::Any),
        Path::Sm80 => untuned(p, call),
        Path::Sm90 => not_hopper(p, call, device),
        Path::Decode => Some("gradients".into()),
    };
    let refuse = |why| Err(Error::value("path", format!("any or auto for {why}"), format!("{path:?}")));
    why.map_or(Ok(path), refuse)
}

/// Writes the gradients of q, k and v. Memory is the device's; `workspace`: address and bytes. The same bits each time.
///
/// # Errors
/// When k and v are several pages, `grad_out` is not of q's dtype, the call is too large for a launch, the workspace too
/// small, or the driver refuses.
///
/// # Safety
/// All views, bounds and the workspace are memory of `cx.device`, valid until the stream has come to its end.
pub unsafe fn attention_backward(
    p: &Gradients,
    bounds: Bounds,
    workspace: Option<(u64, usize)>,
    path: Path,
    cx: &Context,
) -> Result<()> {
    numbers(&p.q, &p.kv)?;
    let mut call = described(p, bounds)?;
    let path = settle(path, p, &call, cx.device)?;
    let plan = Plan::new(&p.q, &p.kv, path != Path::Any);
    let (at, given) = workspace.unwrap_or_default();
    if given < plan.bytes() || !(at as usize).is_multiple_of(ALIGN) {
        let want = format!("{} bytes at a multiple of {ALIGN}", plan.bytes());
        return Err(Error::value("workspace", want, format!("{given} bytes at {at:#x}")));
    }
    call.stats = at;
    call.stats_len = plan.stats_len as i32;
    let dtype = p.q.dtype();
    let blocks = (p.batch * p.q_heads * plan.stats_len).div_ceil(kernels::STATS_ROWS);
    let Ok(blocks) = u32::try_from(blocks) else {
        return Err(Error::Device(format!("backward_stats {}: too many queries for a launch", shape(p))));
    };
    // SAFETY: the caller's promise; the parameter is what the kernels' signature says. Likewise below.
    unsafe { cx.launch(kernels::STATS.of(dtype), [blocks, 1, 1], &mut [param(&call)], &|| shape(p))? }
    let tiles = |n: usize, rows: usize| n.div_ceil(rows) as u32;
    let (heads, kv_heads, batch) = (p.q_heads as u32, p.kv_heads as u32, p.batch as u32);
    if path == Path::Any {
        let keys = [tiles(p.kv.held(), kernels::ANY_ROWS), kv_heads, batch];
        let queries = [tiles(p.q_len, kernels::ANY_ROWS), heads, batch];
        // SAFETY: above.
        unsafe {
            cx.launch(kernels::ANY_KEYS.of(dtype), keys, &mut [param(&call)], &|| shape(p))?;
            cx.launch(kernels::ANY_QUERIES.of(dtype), queries, &mut [param(&call)], &|| shape(p))?;
        }
        return Ok(());
    }
    let total = at + plan.stats_bytes as u64;
    for first in (0..p.kv_heads).step_by(plan.heads) {
        let heads = plan.heads.min(p.kv_heads - first);
        (call.first_head, call.heads) = (first as i32, heads as i32);
        for keys in [true, false] {
            let of_total = if keys { plan.keys_total } else { plan.queries_total };
            call.total = if of_total > 0 { total } else { 0 };
            let Sweep { kernel, rows, columns } = match path {
                Path::Sm90 => kernels::sm90_sweep(keys, dtype, p.head_dim)?,
                _ => kernels::sm80_sweep(keys, dtype, p.head_dim, cx.device.smem)?,
            };
            let x = if keys { tiles(p.kv.held(), rows) } else { tiles(p.q_len, rows) * p.group as u32 };
            let grid = [x, heads as u32, batch];
            if path == Path::Sm90 {
                let maps = SweepMaps::new(&call, dtype, keys, rows, columns)?;
                // SAFETY: above.
                unsafe { cx.launch(kernel, grid, &mut [param(&call), param(&maps)], &|| shape(p))? }
            } else {
                // SAFETY: above.
                unsafe { cx.launch(kernel, grid, &mut [param(&call)], &|| shape(p))? }
            }
        }
    }
    Ok(())
}

fn shape(p: &Gradients) -> String {
    format!("q [{}, {}, {}, {}], {} keys of {} heads", p.batch, p.q_heads, p.q_len, p.head_dim, p.kv_len, p.kv_heads)
}

/// A call as the kernels are told of it, without its workspace.
fn described(p: &Gradients, bounds: Bounds) -> Result<Backward> {
    if p.grad_out.dtype() != p.q.dtype() {
        let want = format!("the dtype of q on a GPU, {}", p.q.dtype().name());
        return Err(Error::type_("grad_out", want, p.grad_out.dtype().name()));
    }
    let mut pages = p.kv.pages();
    let (k, v): (View, View) = match (pages.next(), pages.next()) {
        (None, _) => Default::default(), // no key in use
        (Some((Side::Dense(k), Side::Dense(v), ..)), None) => (k.into(), v.into()),
        _ => return Err(Error::value("k", "one tensor on a GPU", "several pages")),
    };
    let f32 = |dtype: DType| i32::from(dtype == DType::F32);
    let [out, grad_out]: [View; 2] = [(&p.out).into(), (&p.grad_out).into()];
    let wide = p.head_dim.is_multiple_of(4)
        && aligned(&out, 4 * p.out.dtype().size())
        && aligned(&grad_out, 4 * p.grad_out.dtype().size());
    Ok(Backward {
        q: (&p.q).into(),
        k,
        v,
        grad_out,
        out,
        lse: (&p.lse).into(),
        grad_lse: p.grad_lse.as_ref().map_or_else(View::default, Into::into),
        dq: (&p.dq).into(),
        dk: (&p.dk).into(),
        dv: (&p.dv).into(),
        kv_start: bounds.start,
        kv_end: bounds.end,
        q_start: p.q_start(),
        batch: p.batch as i32,
        q_heads: p.q_heads as i32,
        kv_heads: p.kv_heads as i32,
        q_len: p.q_len as i32,
        kv_len: p.kv_len as i32,
        head_dim: p.head_dim as i32,
        key_rows: p.kv.held() as i32,
        causal: i32::from(p.causal()),
        out_f32: f32(p.out.dtype()),
        dq_f32: f32(p.dq.dtype()),
        dk_f32: f32(p.dk.dtype()),
        dv_f32: f32(p.dv.dtype()),
        heads: p.kv_heads as i32,
        wide: i32::from(wide),
        scale: (p.softmax_scale * std::f64::consts::LOG2_E) as f32,
        softmax_scale: p.softmax_scale as f32,
        ..Backward::default()
    })
}
