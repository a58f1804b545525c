//! Decode on a GPU: the keys cut into splits that fill the card, and their partials joined.

use super::driver::Device;
use super::kernels;
use super::launch::{Context, param};
use super::merge::{Splits, merge_splits};
use super::params::{Attn, MAX_PAGES, Page, Side, View};
use super::views;
use crate::args::{KvRef, Problem};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::TensorRef;

/// Rows (queries times heads of a group) up to which decode is the faster path: each 16 read all keys once more.
pub const ROWS: usize = 64;
/// Rows of a tile.
const TILE: usize = 16;
/// Keys that the 4 warps of a block take at a time, 64 each: splits of fewer, or of a few more, would leave warps idle.
const STEP: usize = 256;
/// What a block takes beside its keys (its start, its end, its partial), as so many keys. A guess; only ties depend on it.
const OVERHEAD: usize = 256;
/// Rounds of blocks that are weighed against each other.
const ROUNDS: usize = 6;
/// Blocks that an SM has at a time: as many as its shared memory has room for, 1 KiB of each the system's own.
fn blocks_per_sm(device: &Device, head_dim: usize) -> usize {
    let Ok(kernel) = kernels::decode(DType::BF16, head_dim) else { return 1 };
    ((device.smem as usize + 1024) / (kernel.smem as usize + 1024)).max(1)
}

/// Why `decode` does not serve these tensors; None: it does.
pub fn unserved(q: &TensorRef, kv: &KvRef) -> Option<String> {
    let head_dim = q.shape()[3];
    if q.dtype() == DType::F32 || !(head_dim == 64 || head_dim == 128) {
        return Some(format!("{} of head_dim {head_dim}", q.dtype().name()));
    }
    if !views::aligned(&View::from(q), 16) {
        return Some("rows of q that begin off multiples of 16 bytes".into());
    }
    for (k, v, ..) in kv.pages() {
        let (k, v) = (Side::from(k), Side::from(v));
        let odd = [k.rows, v.rows, k.params, v.params].into_iter().find(|view| !views::aligned(view, 16));
        if let Some(odd) = odd {
            return Some(format!("rows that begin off multiples of 16 bytes ({odd:?})"));
        }
    }
    None
}

/// Keys of a split: pages of `tokens`, each split taken by `tasks` blocks, so that the blocks fill the card, which has
/// `at_a_time` of them at a time.
///
/// All blocks stream at one rate, so time is rounds times the longest split. A round that is hardly begun costs as much as a full
/// one: hence the largest number of splits that still fits, for each number of rounds, and the best of these.
fn split_len(tokens: &[usize], tasks: usize, at_a_time: usize) -> usize {
    let splits = |len: usize| tokens.iter().map(|t| t.div_ceil(len)).sum::<usize>();
    let longest = tokens.iter().copied().max().unwrap_or(0).max(1).next_multiple_of(STEP);
    let mut best = (usize::MAX, longest); // what it costs; where nothing fits, pages are not cut
    for rounds in 1..=ROUNDS {
        let most = rounds * at_a_time / tasks.max(1);
        if splits(longest) > most {
            continue;
        }
        let (mut low, mut high) = (1, longest / STEP); // high always fits
        while low < high {
            let middle = usize::midpoint(low, high);
            if splits(middle * STEP) <= most { high = middle } else { low = middle + 1 }
        }
        best = best.min((rounds * (high * STEP + OVERHEAD), high * STEP));
    }
    best.1
}

/// Launches of a call, and how many splits they leave.
pub struct Plan {
    launches: Vec<(Vec<Page>, usize)>,
    split_len: usize,
    tiles: usize,
    /// Of all launches.
    pub splits: usize,
    out_bytes: usize,
    lse_bytes: usize,
}

impl Plan {
    /// For q over these keys.
    pub fn new(q: &TensorRef, kv: &KvRef, device: &Device) -> Self {
        let [batch, q_heads, q_len, head_dim] = q.shape();
        let kv_heads = kv.shape()[1];
        let group = q_heads.checked_div(kv_heads).unwrap_or(1).max(1);
        let tiles = (group * q_len).div_ceil(TILE);
        let at_a_time = blocks_per_sm(device, head_dim) * device.sms.max(1) as usize;
        let tokens: Vec<usize> = kv.pages().map(|(.., tokens)| tokens).collect();
        let split_len = split_len(&tokens, batch * kv_heads * tiles, at_a_time);
        let of = |pages: &[Page]| pages.iter().map(|p| (p.tokens as usize).div_ceil(split_len)).sum::<usize>().max(1);
        let pages = views::pages(kv);
        let mut launches: Vec<(Vec<Page>, usize)> = pages.chunks(MAX_PAGES).map(|c| (c.to_vec(), of(c))).collect();
        if launches.is_empty() {
            launches.push((Vec::new(), 1)); // nothing to see: out is to become 0
        }
        let splits = launches.iter().map(|l| l.1).sum();
        let rows = batch * q_heads * q_len;
        let (out_bytes, lse_bytes) = if splits > 1 { (rows * head_dim * 4, rows * 4) } else { (0, 0) };
        Self { launches, split_len, tiles, splits, out_bytes, lse_bytes }
    }

    /// Bytes of workspace.
    pub fn bytes(&self) -> usize {
        self.splits * (self.out_bytes + self.lse_bytes)
    }
}

/// Runs a planned call; `call` has everything but pages and splits, `workspace` is the address of [`Plan::bytes`].
///
/// What is launched depends on numbers of the host alone: captured in a CUDA graph it may be replayed while `kv_end` changes
/// on the device.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As `attention::attention`.
pub unsafe fn decode(p: &Problem, call: &Attn, plan: &Plan, workspace: u64, cx: &Context) -> Result<()> {
    let kernel = kernels::decode(p.q.dtype(), p.head_dim)?;
    let lses = workspace + (plan.splits * plan.out_bytes) as u64;
    let shape = || {
        let [keys, splits] = [p.kv_len, plan.splits];
        format!("q [{}, {}, {}, {}], {keys} keys, {splits} splits", p.batch, p.q_heads, p.q_len, p.head_dim)
    };
    let mut first = 0;
    for (pages, splits) in &plan.launches {
        let mut call = Attn {
            pages: pages.len() as i32,
            split_len: plan.split_len as i32,
            // The kernel leaves partials where there is more than one split, of whichever launch.
            splits: plan.splits as i32,
            part_out: workspace + (first * plan.out_bytes) as u64,
            part_lse: lses + (first * plan.lse_bytes) as u64,
            ..*call
        };
        call.page[..pages.len()].copy_from_slice(pages);
        let grid = [plan.tiles * splits, p.kv_heads, p.batch].map(|n| n as u32);
        // SAFETY: the caller's promise; the parameter is what the kernel's signature says.
        unsafe { cx.launch(kernel, grid, &mut [param(&call)], &shape)? }
        first += splits;
    }
    if plan.splits == 1 {
        return Ok(());
    }
    let parts =
        Splits { outs: workspace, lses, count: plan.splits, out_stride: plan.out_bytes, lse_stride: plan.lse_bytes };
    // SAFETY: as above; the partials are in the workspace.
    unsafe { merge_splits(&parts, p.out, p.lse, cx) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks over those that whole rounds of them would have room for.
    fn filled(tokens: &[usize], tasks: usize, at_a_time: usize) -> f64 {
        let len = split_len(tokens, tasks, at_a_time);
        let blocks = tokens.iter().map(|t| t.div_ceil(len)).sum::<usize>() * tasks;
        blocks as f64 / blocks.next_multiple_of(at_a_time) as f64
    }

    #[test]
    fn splits_fill_the_card() {
        for sms in [108, 132, 142] {
            for blocks in [1, 2, 3] {
                for tasks in [1, 2, 8, 16] {
                    let f = filled(&[1 << 20], tasks, sms * blocks);
                    assert!(f > 0.85, "{sms} multiprocessors of {blocks} blocks, {tasks} tasks: {f} full");
                }
            }
        }
        let f = filled(&[40_000, 100, 90_000, 65_536], 8, 396);
        assert!(f > 0.85, "pages of several lengths: {f} full");
    }

    #[test]
    fn no_round_is_hardly_begun() {
        for keys in (1000..400_000).step_by(777) {
            let len = split_len(&[keys], 8, 396);
            let blocks = 8 * keys.div_ceil(len);
            let f = blocks as f64 / blocks.next_multiple_of(396) as f64;
            assert!(blocks <= 396 || f > 0.85, "{keys} keys: {blocks} blocks of {len}: {f} full");
        }
    }

    #[test]
    fn splits_are_whole_steps() {
        for (tokens, tasks) in [(vec![], 1), (vec![1], 1), (vec![300, 5], 8), (vec![100_000], 5000), (vec![1 << 30], 1)]
        {
            let len = split_len(&tokens, tasks, 396);
            assert!(len >= STEP && len.is_multiple_of(STEP), "{tokens:?}, {tasks} tasks: {len}");
        }
    }
}
