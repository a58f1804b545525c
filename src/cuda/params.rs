//! `csrc/params.h`, byte for byte: what a kernel is told.

use crate::dtype::DType;

/// Pages of one launch, at most: more are several launches, merged.
pub const MAX_PAGES: usize = 12;
/// Keys whose outputs are summed in registers, at most.
pub const SEGMENT: usize = 65_536;

/// Memory `[batch, heads, len, ...]`; strides in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct View {
    /// Device address of the first element.
    pub ptr: u64,
    /// Bytes between batch rows.
    pub batch_stride: i64,
    /// Bytes between heads.
    pub head_stride: i64,
    /// Bytes between rows.
    pub row_stride: i64,
}

/// K or V of a page.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Side {
    /// Tokens; of compact K groups of 64 tokens.
    pub rows: View,
    /// Scales and offsets of compact rows.
    pub params: View,
    /// 0 dense, 1 int8, 2 int4, 3 fp8.
    pub format: i32,
    /// Padding.
    pub reserved: i32,
}

/// Keys and values of a run of tokens.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Page {
    /// Keys.
    pub k: Side,
    /// Values.
    pub v: Side,
    /// First token, in the call's numbering.
    pub first: i32,
    /// Tokens in use.
    pub tokens: i32,
}

/// A call of attention.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Attn {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: View,
    /// Likewise; q's dtype, or float32 where `out_f32`.
    pub out: View,
    /// float32 `[batch, q_heads, q_len]`, contiguous; 0: not wanted.
    pub lse: u64,
    /// float32 `[batch, q_heads, q_len, head_dim]`, contiguous, where `kv_len > SEGMENT`.
    pub total: u64,
    /// int64 `[batch]` on the device; 0: none.
    pub kv_start: u64,
    /// Likewise.
    pub kv_end: u64,
    /// Position of query 0.
    pub q_start: i64,
    /// Batch rows.
    pub batch: i32,
    /// Query heads.
    pub q_heads: i32,
    /// Key heads.
    pub kv_heads: i32,
    /// Queries.
    pub q_len: i32,
    /// Keys.
    pub kv_len: i32,
    /// Elements of a row.
    pub head_dim: i32,
    /// Whether keys after the query are hidden.
    pub causal: i32,
    /// Whether `out` is float32.
    pub out_f32: i32,
    /// `softmax_scale * log2(e)`.
    pub scale: f32,
    /// How many of `page` are in use.
    pub pages: i32,
    /// Decode: keys of a split.
    pub split_len: i32,
    /// Decode: splits.
    pub splits: i32,
    /// Decode: float32 `[splits, batch, q_heads, q_len, head_dim]`.
    pub part_out: u64,
    /// Decode: float32 `[splits, batch, q_heads, q_len]`.
    pub part_lse: u64,
    /// The pages.
    pub page: [Page; MAX_PAGES],
}

/// Partials of one list, at most; splits of a workspace may be any number.
pub const MAX_PARTIALS: usize = 32;
/// Pairs of elements that rotate, at most.
pub const MAX_PAIRS: usize = 128;

/// A call of `merge`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Merge {
    /// `[batch, heads, len, head_dim]`.
    pub out: View,
    /// float32; 0: not wanted.
    pub lse: u64,
    /// Bytes between its batch rows, heads and queries.
    pub lse_stride: [i64; 3],
    /// Batch rows.
    pub batch: i32,
    /// Heads.
    pub heads: i32,
    /// Queries.
    pub len: i32,
    /// Elements of a row.
    pub head_dim: i32,
    /// See [`dtype`].
    pub out_dtype: i32,
    /// Partials.
    pub count: i32,
    /// Whether all of `outs` and `lses` are in use; else partials lie `split_stride` apart.
    pub is_list: i32,
    /// Whether 4 elements of any row begin at a multiple of their size.
    pub wide: i32,
    /// Bytes between outs.
    pub split_stride: i64,
    /// Bytes between lses.
    pub lse_split_stride: i64,
    /// The partials, or the first of them.
    pub outs: [View; MAX_PARTIALS],
    /// float32 `[batch, heads, len]`.
    pub lses: [View; MAX_PARTIALS],
    /// Of the partials, or of the first; see [`dtype`].
    pub in_dtype: [i32; MAX_PARTIALS],
}

/// How positions become phases.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Rotation {
    /// int64 `[len]` or `[batch, len]` on the device.
    pub positions: u64,
    /// Elements from batch row to batch row: len or 0.
    pub position_stride: i64,
    /// Pairs that rotate; 0: no rotation.
    pub pairs: i32,
    /// Multiplies cos and sin.
    pub scaling: f32,
    /// Of a token, in 2^-64 turns.
    pub turns: [u64; MAX_PAIRS],
}

impl Default for Rotation {
    fn default() -> Self {
        Self { positions: 0, position_stride: 0, pairs: 0, scaling: 1.0, turns: [0; MAX_PAIRS] }
    }
}

/// A call of `rope_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Rope {
    /// `[batch, heads, len, head_dim]`.
    pub q: View,
    /// Likewise; `kv_heads` is 0 where there is none.
    pub k: View,
    /// Where to.
    pub q_out: View,
    /// Where to.
    pub k_out: View,
    /// Heads of q.
    pub q_heads: i32,
    /// Heads of k.
    pub kv_heads: i32,
    /// Tokens.
    pub len: i32,
    /// Elements of a row of q.
    pub q_dim: i32,
    /// Elements of a row of k.
    pub k_dim: i32,
    /// Whether rows, and their parts, begin at multiples of 16 bytes.
    pub wide: i32,
    /// Of both.
    pub rotation: Rotation,
}

/// A call of `backward_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Backward {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: View,
    /// `[batch, kv_heads, key_rows, head_dim]`.
    pub k: View,
    /// Likewise.
    pub v: View,
    /// As q.
    pub grad_out: View,
    /// As q; that dtype, or float32 where `out_f32`.
    pub out: View,
    /// float32 `[batch, q_heads, q_len]`.
    pub lse: View,
    /// Likewise; without an address: 0.
    pub grad_lse: View,
    /// As q, or float32.
    pub dq: View,
    /// As k, or float32.
    pub dk: View,
    /// Likewise.
    pub dv: View,
    /// int64 `[batch]` on the device; 0: none.
    pub kv_start: u64,
    /// Likewise.
    pub kv_end: u64,
    /// Position of query 0.
    pub q_start: i64,
    /// float32 pairs `[batch, q_heads, stats_len]`.
    pub stats: u64,
    /// float32 sums of segments; 0: there is one only.
    pub total: u64,
    /// Batch rows.
    pub batch: i32,
    /// Query heads.
    pub q_heads: i32,
    /// Key heads.
    pub kv_heads: i32,
    /// Queries.
    pub q_len: i32,
    /// Keys in use.
    pub kv_len: i32,
    /// Elements of a row.
    pub head_dim: i32,
    /// `q_len`, rounded up to a multiple of [`STATS`].
    pub stats_len: i32,
    /// Rows of k, in use or not.
    pub key_rows: i32,
    /// Whether keys after the query are hidden.
    pub causal: i32,
    /// Whether `out` is float32.
    pub out_f32: i32,
    /// Whether `dq` is.
    pub dq_f32: i32,
    /// Whether `dk` is.
    pub dk_f32: i32,
    /// Whether `dv` is.
    pub dv_f32: i32,
    /// First key head of the launch.
    pub first_head: i32,
    /// Key heads of the launch.
    pub heads: i32,
    /// Whether 4 elements of any row of `out` and `grad_out` begin at a multiple of their size.
    pub wide: i32,
    /// `softmax_scale * log2(e)`.
    pub scale: f32,
    /// `softmax_scale`.
    pub softmax_scale: f32,
}

/// Queries that the stats of a head are padded to a multiple of.
pub const STATS: usize = 128;

/// A call of `kv_append`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Append {
    /// `[batch, heads, len, head_dim]`.
    pub k: View,
    /// Likewise.
    pub v: View,
    /// Where keys go.
    pub page_k: Side,
    /// Where values go.
    pub page_v: Side,
    /// Heads.
    pub heads: i32,
    /// Tokens.
    pub len: i32,
    /// Elements of a row.
    pub head_dim: i32,
    /// Token of the page that the first one becomes.
    pub at: i32,
    /// Whether rows, and their parts, begin at multiples of 16 bytes.
    pub wide: i32,
    /// Of rows; see [`dtype`].
    pub dtype: i32,
    /// Of keys.
    pub rotation: Rotation,
}

/// A call of `kv_read`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Read {
    /// `[batch, heads, len, head_dim]`.
    pub out: View,
    /// What is read.
    pub side: Side,
    /// Heads.
    pub heads: i32,
    /// Tokens.
    pub len: i32,
    /// Elements of a row.
    pub head_dim: i32,
    /// Token of the page that becomes the first one.
    pub start: i32,
    /// Whether the side is K.
    pub is_key: i32,
    /// Whether rows begin at multiples of 16 bytes.
    pub wide: i32,
    /// Of `out`, and of a dense side; see [`dtype`].
    pub dtype: i32,
    /// Padding.
    pub reserved: i32,
}

/// The number of a dtype in `params.h`.
pub fn dtype(d: DType) -> i32 {
    match d {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
    }
}
