"""Bugs to plant in csrc/merge.cu: (file, text that occurs once, instead, what)."""

MUTATIONS = [
    ("merge.cu", "return b > a || b != b ? b : a;", "return b > a ? b : a;", "a NaN is hidden behind a number"),
    ("merge.cu", "return weight != 0.f;", "return true;", "a partial that saw no key is read"),
    (
        "merge.cu",
        "const bool empty = top == -INF;",
        "const bool empty = false;",
        "-inf minus -inf where no partial saw a key",
    ),
    ("merge.cu", "empty ? -INF : top + logf(sum)", "empty ? -INF : logf(sum)", "the sum without its base"),
    (
        "merge.cu",
        "for (int n = lane; n < p.count; n += 32) top",
        "for (int n = lane; n < 32 && n < p.count; n += 32) top",
        "the largest of the first 32 only",
    ),
    ("merge.cu", "(p.is_list ? 0 : n * p.lse_split_stride)", "0", "all splits take the first one's lse"),
    (
        "merge.cu",
        "if (warp != 0) continue;\n            UNROLL for (int w = 1;",
        "if (warp != 0) continue;\n            UNROLL for (int w = 2;",
        "a warp's share is left out",
    ),
    (
        "merge.cu",
        "shared[threadIdx.x * N + e] = acc[e];\n            block_sync();",
        "shared[threadIdx.x * N + e] = acc[e];",
        "sums are read before they are written",
    ),
    (
        "merge.cu",
        "block_sync();  // the sums of the last round have been read",
        "",
        "sums are overwritten before they are read",
    ),
    ("merge.cu", "p.in_dtype[p.is_list ? n : 0]", "p.in_dtype[0]", "all of a list in the first one's dtype"),
    ("merge.cu", "if (d < p.head_dim) store_any", "store_any", "elements beyond the row"),
]
