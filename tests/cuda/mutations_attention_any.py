"""Bugs for check_attention_any.cpp to see."""

ANY, MASK, ELEMENTS = "attention_any.cu", "mask.cuh", "elements.cuh"
MUTATIONS = [
    (ANY, "            block_sync();  // nobody reads the values", "            // nobody reads the values", "values are overwritten while they are read"),
    (ANY, "            block_sync();\n            UNROLL for (int r = 0; r < PER_WARP; r++) {", "            UNROLL for (int r = 0; r < PER_WARP; r++) {", "keys are used before they are there"),
    (ANY, "            block_sync();\n            for (int e = thread; e < n * d_len", "            for (int e = thread; e < n * d_len", "keys are overwritten while they are read"),
    (ANY, "            block_sync();\n            UNROLL for (int r = 0; r < QUERIES; r++) {\n                const float keep", "            UNROLL for (int r = 0; r < QUERIES; r++) {\n                const float keep", "values are used before they are there"),
    (ANY, "    block_sync();\n    UNROLL for (int r = 0; r < QUERIES; r++) {\n        if (q0 + r >= p.q_len) break;", "    UNROLL for (int r = 0; r < QUERIES; r++) {\n        if (q0 + r >= p.q_len) break;", "sums are used before they are there"),
    (ANY, "lane < n && ", "", "keys beyond the last one"),
    (ANY, "j0 + lane < query_end(p, row, q0 + query)", "j0 + lane < query_end(p, row, q0)", "one diagonal for all queries of a tile"),
    (ANY, "base = most == -INF ? 0.f : most", "base = most", "NaN where nothing is seen yet"),
    (ANY, "l[r] = l[r] * keep + sum;", "l[r] = l[r] + sum;", "sums are not rescaled"),
    (ANY, "fma_rn(o[r][c], keep, sum)", "o[r][c] + sum", "o is not rescaled"),
    (ANY, "m[r] * LN2 + logf(l[r])", "m[r] + logf(l[r])", "lse in two bases"),
    (ANY, "first = row.lo > at.first ? row.lo : at.first", "first = at.first", "keys before kv_start are seen"),
    (MASK, "return {lo, hi < lo ? lo : hi};", "return {lo, p.kv_len};", "keys after kv_end are seen"),
    (ELEMENTS, "b * v.batch_stride", "0 * v.batch_stride", "the first batch row for all"),
]  # fmt: skip
