//! `csrc/params.h`, byte for byte: what a kernel is told.

/// Tokens that share a scale of K; channels that share a scale of V.
pub use crate::quant::GROUP;

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
