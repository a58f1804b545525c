//! Attention on a GPU: which kernel, how many launches, how much workspace.

use super::decode;
use super::driver::Device;
use super::kernels;
use super::kv::kv_read;
use super::launch::{Context, param};
use super::merge::{Splits, merge_splits};
use super::params::{Attn, MAX_PAGES, Page, SEGMENT, Side, View};
use super::tensor_map::{MAPS_PAGES, Maps, unmapped};
use super::views::{self, Bounds};
use crate::args::{KvRef, Problem};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{TensorMut, TensorRef};

/// Where a workspace's parts begin: a multiple of so many bytes.
pub const ALIGN: usize = 256;
/// Tokens of compact pages that are made dense at a time for a tuned prefill kernel.
const MADE: usize = 16_384;

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// The fastest that serves the call.
    Auto,
    /// `attention_any`.
    Any,
    /// `attention_sm80`.
    Sm80,
    /// `attention_sm90`.
    Sm90,
    /// `decode`.
    Decode,
}

impl Path {
    /// From its name.
    ///
    /// # Errors
    /// When there is no such path.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "any" => Ok(Self::Any),
            "sm80" => Ok(Self::Sm80),
            "sm90" => Ok(Self::Sm90),
            "decode" => Ok(Self::Decode),
            _ => Err(Error::value("path", "auto, any, sm80, sm90 or decode", name)),
        }
    }

    /// What `auto` stands for; a path that was asked for, if it serves these tensors.
    fn settle(self, q: &TensorRef, kv: &KvRef, device: &Device) -> Result<Self> {
        let [_, q_heads, q_len, _] = q.shape();
        let rows = q_heads / kv.shape()[1].max(1) * q_len;
        match self {
            Self::Auto if rows <= decode::ROWS && decode::unserved(q, kv).is_none() => Ok(Self::Decode),
            Self::Auto if not_hopper(q, kv, device).is_none() => Ok(Self::Sm90),
            Self::Auto if untuned(q, kv).is_none() => Ok(Self::Sm80),
            Self::Auto => Ok(Self::Any),
            asked => {
                let why = match asked {
                    Self::Decode => decode::unserved(q, kv),
                    Self::Sm80 => untuned(q, kv),
                    Self::Sm90 => not_hopper(q, kv, device),
                    Self::Any | Self::Auto => None,
                };
                let refuse = |why| Err(Error::value("path", format!("any or auto for {why}"), format!("{asked:?}")));
                why.map_or(Ok(asked), refuse)
            }
        }
    }
}

/// Why the tuned kernels don't serve these tensors; None: they do.
fn untuned(q: &TensorRef, kv: &KvRef) -> Option<String> {
    let head_dim = q.shape()[3];
    if q.dtype() == DType::F32 || !(head_dim == 64 || head_dim == 128) {
        return Some(format!("{} of head_dim {head_dim}", q.dtype().name()));
    }
    let sides = kv.pages().flat_map(|(k, v, ..)| [Side::from(k), Side::from(v)]);
    let rows = sides.filter(|s| s.format == 0).map(|s| s.rows).chain([View::from(q)]);
    let odd = rows.into_iter().find(|v| !views::aligned(v, 16))?;
    Some(format!("rows that begin off multiples of 16 bytes ({odd:?})"))
}

/// Why `attention_sm90` does not serve these tensors on this device; None: it does.
fn not_hopper(q: &TensorRef, kv: &KvRef, device: &Device) -> Option<String> {
    if device.capability != (9, 0) {
        let (major, minor) = device.capability;
        return Some(format!("{} of compute capability {major}.{minor}", device.name));
    }
    let [batch, q_heads, q_len, _] = q.shape();
    let sides = kv.pages().flat_map(|(k, v, _, tokens)| [(Side::from(k), tokens), (Side::from(v), tokens)]);
    let rows = sides.filter(|(s, _)| s.format == 0).map(|(s, n)| (s.rows, [batch, kv.shape()[1], n]));
    let odd = rows.chain([(View::from(q), [batch, q_heads, q_len])]).find_map(|(v, n)| unmapped(&v, n));
    untuned(q, kv).or(odd)
}

/// A run of tokens of one page that is made dense before its launch.
#[derive(Debug, Clone, Copy)]
struct Made {
    /// Which of the pages in use.
    page: usize,
    /// First token, in the page.
    from: usize,
    tokens: usize,
    /// Which of the launch's pages it becomes.
    place: usize,
}

#[derive(Debug, Default)]
struct Launch {
    pages: Vec<Page>,
    made: Option<Made>,
}

/// A call that is planned: launches, and what lies where in the workspace: partials that are merged two at a time (three places:
/// the old one, the new one, their merge), sums of segments, keys and values that are made dense.
struct Plan {
    launches: Vec<Launch>,
    partials: usize,
    out_bytes: usize,
    lse_bytes: usize,
    total_bytes: usize,
    made_tokens: usize,
    made_bytes: usize,
}

impl Plan {
    fn new(q: &TensorRef, kv: &KvRef, path: Path) -> Self {
        let [batch, q_heads, q_len, head_dim] = q.shape();
        let launches = launches(kv, path);
        let rows = batch * q_heads * q_len;
        let partials = if launches.len() > 1 { launches.len().min(3) } else { 0 };
        let keys = |l: &Launch| l.pages.iter().map(|p| p.tokens as usize).sum::<usize>();
        let folds = path != Path::Any && launches.iter().any(|l| keys(l) > SEGMENT);
        let made_tokens = launches.iter().filter_map(|l| l.made).map(|m| m.tokens).max().unwrap_or(0);
        let made = batch * kv.shape()[1] * made_tokens * head_dim * q.dtype().size();
        Self {
            launches,
            partials,
            out_bytes: (rows * head_dim * 4).next_multiple_of(ALIGN),
            lse_bytes: (rows * 4).next_multiple_of(ALIGN),
            total_bytes: if folds { (rows * head_dim * 4).next_multiple_of(ALIGN) } else { 0 },
            made_tokens,
            made_bytes: made.next_multiple_of(ALIGN),
        }
    }

    fn bytes(&self) -> usize {
        self.partials * (self.out_bytes + self.lse_bytes) + self.total_bytes + 2 * self.made_bytes
    }
}

/// Pages, as many to a launch as it takes. The tuned kernels read dense rows only: compact ones are made dense, a stretch for
/// each launch.
fn launches(kv: &KvRef, path: Path) -> Vec<Launch> {
    let most = if path == Path::Sm90 { MAPS_PAGES } else { MAX_PAGES };
    let mut all = vec![Launch::default()]; // one even if there is nothing to see: out is to become 0
    for (n, page) in views::pages(kv).into_iter().enumerate() {
        let make = path != Path::Any && (page.k.format != 0 || page.v.format != 0);
        let step = if make { MADE } else { page.tokens as usize };
        for from in (0..page.tokens as usize).step_by(step) {
            let tokens = step.min(page.tokens as usize - from);
            if all.last().is_some_and(|l| l.pages.len() == most || (make && l.made.is_some())) {
                all.push(Launch::default());
            }
            let Some(launch) = all.last_mut() else { continue };
            if make {
                launch.made = Some(Made { page: n, from, tokens, place: launch.pages.len() });
            }
            launch.pages.push(Page { first: page.first + from as i32, tokens: tokens as i32, ..page });
        }
    }
    all
}

/// Kernels count in 32 bits. Axes that are expanded may have any length without any memory.
fn numbers(q: &TensorRef, kv_len: usize) -> Result<()> {
    let [batch, q_heads, q_len, _] = q.shape();
    for (name, n) in [("batch", batch), ("q_heads", q_heads), ("q_len", q_len), ("kv_len", kv_len)] {
        if n > 1 << 30 {
            return Err(Error::value(name, "at most 2^30 on a GPU", n));
        }
    }
    Ok(())
}

/// Bytes of workspace that [`attention`] wants for q over these keys.
///
/// # Errors
/// When the path does not serve the call.
pub fn workspace_bytes(q: &TensorRef, kv: &KvRef, out_f32: bool, path: Path, device: &Device) -> Result<usize> {
    let _ = out_f32; // makes no difference to the kernels that there are
    numbers(q, kv.shape()[2])?;
    // Whatever else about the call makes `auto` fall back: there is room for that, too.
    let fallback = Plan::new(q, kv, Path::Any).bytes();
    let path = path.settle(q, kv, device)?;
    let wanted =
        if path == Path::Decode { decode::Plan::new(q, kv, device).bytes() } else { Plan::new(q, kv, path).bytes() };
    Ok(wanted.max(fallback))
}

/// Exact attention of q over the visible keys. Memory is the device's; `workspace`: address and bytes.
///
/// # Errors
/// When the call is too large for a launch, the workspace too small, or the driver refuses.
///
/// # Safety
/// All views, bounds and the workspace are memory of `cx.device`, valid until the stream has come to its end.
pub unsafe fn attention(
    p: &Problem,
    bounds: Bounds,
    workspace: Option<(u64, usize)>,
    path: Path,
    cx: &Context,
) -> Result<()> {
    if p.batch * p.q_heads * p.q_len == 0 {
        return Ok(());
    }
    numbers(&p.q, p.kv_len)?;
    if let Some(lse) = &p.lse
        && !lse.is_contiguous()
    {
        return Err(Error::value("lse", "a contiguous tensor", format!("strides of {:?} bytes", lse.byte_strides())));
    }
    let call = views::attn(p, bounds);
    let mut kernel = path.settle(&p.q, &p.kv, cx.device)?;
    let align = if kernel == Path::Decode { 16 } else { 4 };
    if kernel != Path::Any && !(call.scale > 0.0 && views::aligned(&call.out, align)) {
        if path != Path::Auto {
            let want = format!(
                "auto or any for a softmax_scale that is not positive, or rows of out off multiples of {align} bytes"
            );
            return Err(Error::value("path", want, format!("{path:?}")));
        }
        kernel = Path::Any;
    }
    let (at, given) = workspace.unwrap_or_default();
    let check = |bytes: usize| {
        let want = format!("{bytes} bytes at a multiple of {ALIGN}");
        let fits = given >= bytes && (at as usize).is_multiple_of(ALIGN);
        if fits { Ok(()) } else { Err(Error::value("workspace", want, format!("{given} bytes at {at:#x}"))) }
    };
    if kernel == Path::Decode {
        let plan = decode::Plan::new(&p.q, &p.kv, cx.device);
        check(plan.bytes())?;
        // SAFETY: the caller's promise.
        return unsafe { decode::decode(p, &call, &plan, at, cx) };
    }
    let plan = Plan::new(&p.q, &p.kv, kernel);
    check(plan.bytes())?;
    let outs = at;
    let lses = outs + (plan.partials * plan.out_bytes) as u64;
    let total = lses + (plan.partials * plan.lse_bytes) as u64;
    let made = [total + plan.total_bytes as u64, total + (plan.total_bytes + plan.made_bytes) as u64];
    let place = |n: usize| (outs + (n * plan.out_bytes) as u64, lses + (n * plan.lse_bytes) as u64);
    let mut old = 0; // the place of what is merged so far: 0 or 2, beside the new partial's, which is 1
    for (n, launch) in plan.launches.iter().enumerate() {
        let mut call = Attn { pages: launch.pages.len() as i32, ..call };
        call.page[..launch.pages.len()].copy_from_slice(&launch.pages);
        if let Some(m) = &launch.made {
            // SAFETY: the caller's promise; the workspace has room for both.
            unsafe { make_dense(p, m, made, plan.made_tokens, &mut call.page[m.place], cx)? }
        }
        if plan.total_bytes > 0 {
            call.total = total;
        }
        if plan.partials > 0 {
            let (out, lse) = place(usize::from(n > 0));
            (call.out, call.lse, call.out_f32) = (views::contiguous(out, p.q_heads, p.q_len, p.head_dim), lse, 1);
        }
        // SAFETY: the caller's promise; the parameter is what the kernels' signature says.
        unsafe {
            match kernel {
                Path::Sm80 => sm80(p, &call, cx)?,
                Path::Sm90 => sm90(p, &call, cx)?,
                Path::Any | Path::Auto | Path::Decode => any(p, &call, cx)?,
            }
        }
        if n == 0 {
            continue;
        }
        let (first_out, first_lse) = place(old / 2);
        let parts = Splits {
            outs: first_out,
            lses: first_lse,
            count: 2,
            out_stride: plan.out_bytes,
            lse_stride: plan.lse_bytes,
        };
        if n + 1 == plan.launches.len() {
            // SAFETY: as above; the partials are in the workspace.
            unsafe { merge_splits(&parts, p.out, p.lse, cx)? }
        } else {
            old = 2 - old;
            let (out, lse) = place(old);
            // SAFETY: as above; this place is not among the two that are read.
            unsafe { merge_splits(&parts, rows_at(p, out, p.head_dim)?, Some(rows_at(p, lse, 1)?), cx)? }
        }
    }
    Ok(())
}

/// Where compact keys or values of a stretch of a page stand for themselves: in the workspace.
///
/// # Safety
/// As [`attention`]; `at` has room for `room` tokens each.
unsafe fn make_dense(p: &Problem, m: &Made, at: [u64; 2], room: usize, page: &mut Page, cx: &Context) -> Result<()> {
    let Some((k, v, ..)) = p.kv.pages().nth(m.page) else { return Ok(()) };
    let shape = [p.batch, p.kv_heads, m.tokens, p.head_dim];
    let stride = crate::tensor::contiguous([p.batch, p.kv_heads, room, p.head_dim]);
    let bytes = p.batch * p.kv_heads * room * p.head_dim * p.q.dtype().size();
    for (name, side, at, to) in [("k", k, at[0], &mut page.k), ("v", v, at[1], &mut page.v)] {
        if to.format == 0 {
            to.rows.ptr = to.rows.ptr.wrapping_add_signed(m.from as i64 * to.rows.row_stride);
            continue;
        }
        // SAFETY: the workspace, by the caller's promise.
        let out = unsafe { TensorMut::from_raw(name, at as *mut u8, bytes, p.q.dtype(), shape, stride)? };
        *to = Side { rows: (&out).into(), ..Side::default() };
        // SAFETY: the caller's promise.
        unsafe { kv_read(name, *side, m.from, out, cx)? }
    }
    Ok(())
}

/// float32 rows `[batch, q_heads, q_len, width]` of the workspace, one after the other.
fn rows_at<'a>(p: &Problem, at: u64, width: usize) -> Result<TensorMut<'a>> {
    let shape = [p.batch, p.q_heads, p.q_len, width];
    let bytes = 4 * shape.iter().product::<usize>();
    // SAFETY: the workspace, as `attention` was promised; only kernels of its stream touch it.
    unsafe {
        TensorMut::from_raw("workspace", at as *mut u8, bytes, DType::F32, shape, crate::tensor::contiguous(shape))
    }
}

fn shape(p: &Problem) -> String {
    format!("q [{}, {}, {}, {}], {} keys of {} heads", p.batch, p.q_heads, p.q_len, p.head_dim, p.kv_len, p.kv_heads)
}

unsafe fn any(p: &Problem, call: &Attn, cx: &Context) -> Result<()> {
    let tiles = p.q_len.div_ceil(kernels::ANY_QUERIES);
    let grid = [tiles, p.q_heads, p.batch].map(|n| n as u32);
    // SAFETY: the caller's promise.
    unsafe { cx.launch(kernels::ATTENTION_ANY.of(p.q.dtype()), grid, &mut [param(call)], &|| shape(p)) }
}

unsafe fn sm80(p: &Problem, call: &Attn, cx: &Context) -> Result<()> {
    let tiles = p.q_len.div_ceil(kernels::SM80_QUERIES);
    let grid = [tiles * p.group, p.kv_heads, p.batch].map(|n| n as u32);
    let kernel = kernels::attention_sm80(p.q.dtype(), p.head_dim)?;
    // SAFETY: the caller's promise.
    unsafe { cx.launch(kernel, grid, &mut [param(call)], &|| shape(p)) }
}

unsafe fn sm90(p: &Problem, call: &Attn, cx: &Context) -> Result<()> {
    let tiles = p.q_len.div_ceil(kernels::sm90_queries(p.head_dim));
    let grid = [tiles * p.group, p.kv_heads, p.batch].map(|n| n as u32);
    let kernel = kernels::attention_sm90(p.q.dtype(), p.head_dim)?;
    let maps = Maps::new(call, p.q.dtype())?;
    // SAFETY: the caller's promise.
    unsafe { cx.launch(kernel, grid, &mut [param(call), param(&maps)], &|| shape(p)) }
}
