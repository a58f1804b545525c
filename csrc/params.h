// What a kernel is told: plain structs, passed by value. src/cuda/params.rs mirrors them byte for byte.
//
// Strides are in bytes. q, k, v and out are [batch, heads, len, head_dim] with a contiguous last axis.
#pragma once
#include "ptx.cuh"

constexpr int GROUP = 64;        // tokens that share a scale of K; channels that share a scale of V
constexpr int MAX_PAGES = 12;    // of one launch: more are several launches, merged
constexpr int SEGMENT = 65536;   // keys whose outputs are summed in registers; segments are merged in float32

enum Format : int { DENSE = 0, INT8 = 1, INT4 = 2, FP8 = 3 };
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };

struct View {                    // [batch, heads, len, ...]
    uint64_t ptr;
    int64_t batch_stride, head_stride, row_stride;
};

struct Side {                    // K or V of a page
    View rows;                   // a row: a token; of compact K a group of 64 tokens (layout: python/llama1m_ext/formats.py)
    View params;                 // compact, float16. K: a row is a group's scales, then offsets. V: a row is a block of 64 channels
                                 // (all scales' blocks, then all offsets'), its elements the tokens.
    int32_t format;              // Format
    int32_t reserved;
};

struct Page {
    Side k, v;
    int32_t first;               // first token of the page, in the call's numbering
    int32_t tokens;              // in use
};

struct Attn {                    // attention_any, attention_sm80, attention_sm90, decode
    View q, out;                 // out: q's dtype, or float32 where out_f32
    uint64_t lse;                // float32 [batch, q_heads, q_len] contiguous, natural logarithm; or 0
    uint64_t total;              // prefill: float32 [batch, q_heads, q_len, head_dim] contiguous, where kv_len > SEGMENT; or 0
    uint64_t kv_start, kv_end;   // int64 [batch] on the device; or 0
    int64_t q_start;             // position of query 0; key j is hidden from query i when causal and j > q_start + i
    int32_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
    int32_t causal, out_f32;
    float scale;                 // softmax_scale * log2(e): scores are in base 2
    int32_t pages;               // in use of `page`
    // decode: each page is cut into splits of split_len keys (a multiple of 64); split s writes a partial in base e to
    // part_out [splits, batch, q_heads, q_len, head_dim] float32 and part_lse [splits, batch, q_heads, q_len]
    int32_t split_len, splits;
    uint64_t part_out, part_lse;
    Page page[MAX_PAGES];
};

constexpr int MAX_PARTIALS = 32;  // of one list; splits of a workspace may be any number
constexpr int MAX_PAIRS = 128;    // of elements that rotate: head_dim / 2

// `wide` below: whether every row begins at a multiple of 16 bytes, and consists of whole ones.

struct Merge {                    // merge
    View out;                     // [batch, heads, len, head_dim]
    uint64_t lse;                 // float32, or 0
    int64_t lse_stride[3];        // of batch rows, heads and queries, in bytes
    int32_t batch, heads, len, head_dim;
    int32_t out_dtype;
    int32_t count;                // partials
    int32_t is_list;              // whether all of `outs` and `lses` are in use; else partials lie `split_stride` apart
    int32_t wide;                 // whether 4 elements of any row begin at a multiple of their size
    int64_t split_stride, lse_split_stride;
    View outs[MAX_PARTIALS];      // is_list 0: the first of them
    View lses[MAX_PARTIALS];      // float32 [batch, heads, len]; row_stride: of queries
    int32_t in_dtype[MAX_PARTIALS];
};
static_assert(sizeof(Merge) == 112 + 2 * 32 * MAX_PARTIALS + 4 * MAX_PARTIALS, "src/cuda/params.rs has the same");

struct Rotation {                 // elements d and d + pairs of a row turn by position * turns[d]
    uint64_t positions;           // int64 [len] or [batch, len], contiguous, on the device
    int64_t position_stride;      // from batch row to batch row, in elements: len or 0
    int32_t pairs;                // 0: no rotation
    float scaling;                // multiplies cos and sin
    uint64_t turns[MAX_PAIRS];    // of a token, in 2^-64 turns (src/rope.rs)
};

struct Rope {                     // rope_*
    View q, k, q_out, k_out;      // [batch, heads, len, head_dim]; k: kv_heads 0 where there is none
    int32_t q_heads, kv_heads, len;
    int32_t q_dim, k_dim;         // head_dim of q and of k
    int32_t wide;                 // here also the second half of what rotates, and what does not
    Rotation rotation;
};

struct Backward {                 // attention_backward_*
    View q, k, v, grad_out;       // [batch, heads, len, head_dim] of one dtype
    View out;                     // that dtype, or float32 where out_f32
    View lse, grad_lse;           // float32 [batch, q_heads, q_len], natural logarithm; grad_lse.ptr 0: none
    View dq, dk, dv;              // that dtype, or float32 where dq_f32, dk_f32, dv_f32
    uint64_t kv_start, kv_end;    // int64 [batch] on the device; or 0
    int64_t q_start;              // as in Attn
    uint64_t stats;               // float32 pairs [batch, q_heads, stats_len]: see stats.cuh
    uint64_t total;               // float32 [batch, heads of the launch, rows of the gradient, head_dim], for keys two; or 0
    int32_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
    int32_t stats_len;            // q_len, rounded up to a multiple of STATS
    int32_t key_rows;             // rows of dk and dv: those from kv_len on become 0
    int32_t causal, out_f32, dq_f32, dk_f32, dv_f32;
    int32_t first_head, heads;    // key heads of this launch
    int32_t wide;                 // whether 4 elements of any row of out and grad_out begin at a multiple of their size
    float scale, softmax_scale;   // softmax_scale * log2(e), and itself
};

constexpr int STATS = 128;        // no step over queries is longer

struct Append {                   // kv_append
    View k, v;                    // [batch, heads, len, head_dim]: token i becomes token at + i of the page
    Side page_k, page_v;
    int32_t heads, len, head_dim, at;
    int32_t wide;                 // here also the second half of what rotates, and rows of dense pages
    int32_t dtype;                // of rows
    Rotation rotation;            // of k
};

struct Read {                     // kv_read
    View out;                     // [batch, heads, len, head_dim]: token i is token start + i of the page
    Side side;
    int32_t heads, len, head_dim, start;
    int32_t is_key, wide;
    int32_t dtype;                // of out, and of a dense side
    int32_t reserved;
};
