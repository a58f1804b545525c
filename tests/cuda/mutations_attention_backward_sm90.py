"""Bugs for check_attention_backward_sm90.cpp to see.

Not among them: fences between proxies, for the emulation orders all writes.
"""

SM90, SWEEP, SEGMENT, MASK = "attention_backward_sm90.cu", "sweep.cuh", "segment.cuh", "mask.cuh"
MUTATIONS = [
    # What is waited for.
    (SM90, "    if (sweep.n()) mbar_wait(at.x_full, 0);\n", "", "rows are used before they have come"),
    (SM90, "        mbar_wait(at.full + 8 * ring.stage, ring.parity);\n        start_product<BF16_, D, C>(weight, x0, at.y + ring.stage * 2 * Y<KEYS, D>);\n        for", "        start_product<BF16_, D, C>(weight, x0, at.y + ring.stage * 2 * Y<KEYS, D>);\n        for", "the first step is used before it has come"),
    (SM90, "            mbar_wait(at.full + 8 * ring.stage, ring.parity);\n", "", "a step is used before it has come"),
    (SM90, "            wgmma_wait<1>();\n            pin(weight);", "            pin(weight);", "scores are read while they are computed"),
    (SM90, "            wgmma_wait<0>();\n            pin(slope);", "            pin(slope);", "slopes are read while they are computed"),
    # The ring.
    (SM90, "            wgmma_wait<0>();\n            if (KEYS) pin(sum1);\n            pin(sum0);\n            release", "            release", "a stage is given back while it is read"),
    (SM90, "            release(at.empty + 8 * ring.stage, lane);\n", "", "stages are never given back"),
    (SM90, "        if (!first_round) mbar_wait(at.empty + 8 * ring.stage, ring.parity ^ 1);\n", "", "steps are overwritten while they are read"),
    (SM90, "at.empty + 8 * ring.stage, ring.parity ^ 1)", "at.empty + 8 * ring.stage, ring.parity)", "the parity of an empty stage"),
    (SM90, "            parity ^= 1;\n", "", "a ring's parity stays"),
    (SM90, "mbar_init(at.empty + 8 * s, GROUPS * 4)", "mbar_init(at.empty + 8 * s, 4)", "a stage is empty when one warpgroup is done"),
    (SM90, "2 * Y<KEYS, D> + (KEYS ? STAT<KEYS, D> : 0)", "2 * Y<KEYS, D>", "stats are not waited for"),
    (SM90, "mbar_expect_tx(at.x_full, 2 * X<D>)", "mbar_expect_tx(at.x_full, X<D>)", "half of the rows are waited for"),
    (SM90, "    block_sync();\n    if (threadIdx.x < 128)", "    if (threadIdx.x < 128)", "barriers are used before they are there"),
    # Layouts.
    (SM90, "x_step = d / 4 * ROWS * 128", "x_step = d / 4 * ROWS * 64", "X's descriptor: channels from 64 on"),
    (SM90, "y_step = d / 4 * C * 128 + d % 4 * 32", "y_step = d / 4 * C * 128 + d % 4 * 16", "Y's descriptor: 16 channels"),
    (SM90, "wgmma_desc_sw128(y, C * 128, 1024)", "wgmma_desc_sw128(y, C * 64, 1024)", "Y's descriptor of the sums: channels from 64 on"),
    (SM90, "y_tile + k * 16 * 128 / 16", "y_tile + k * 8 * 128 / 16", "Y's descriptor of the sums: 16 columns"),
    (SM90, "x0 = at.x0 + group * 64 * 128", "x0 = at.x0", "both warpgroups have the first one's rows"),
    (SM90, "x1 = at.x1 + group * 64 * 128", "x1 = at.x1", "both warpgroups have the first one's rows of X1"),
    (SM90, "tile + c * N * 128, map", "tile + c * N * 64, map", "a tile's second box lies on the first"),
    (SM90, "pack<BF16_>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1])", "pack<BF16_>(x[8 * k + 2 * i + 1], x[8 * k + 2 * i])", "weights of neighbours change places"),
    # Which rows and columns.
    (SM90, "load_tile<D, COLUMNS<KEYS, D>>(y + Y<KEYS, D>, &maps.y1", "load_tile<D, COLUMNS<KEYS, D>>(y + Y<KEYS, D>, &maps.y0", "Y1 is Y0"),
    (SM90, "whose = KEYS ? sweep.head : kv_head", "whose = KEYS ? head : kv_head", "queries of another head"),
    (SM90, "stats_of(p, b, whose) + sweep.at", "stats_of(p, b, whose)", "stats of the first queries"),
    (SM90, "kv_head = p.first_head + blockIdx.y", "kv_head = blockIdx.y", "the launch's first head is forgotten"),
    (SM90, "stats_of(p, b, head)[row + 8 * r]", "stats_of(p, b, head)[row]", "stats of rows 8 to 15"),
    (SWEEP, "last_head = head + group - 1;", "last_head = head;", "one head of a group"),
    (SWEEP, "row0 > seen.lo ? row0 : seen.lo", "row0 + rows", "keys miss the first queries that see them"),
    # Masks.
    (SM90, "KEYS ? r <= column + c + offset", "KEYS ? r < column + c + offset", "a query does not see its own key (keys)"),
    (SM90, ": column + c <= r + offset &&", ": column + c < r + offset &&", "a query does not see its own key (queries)"),
    (SM90, "KEYS ? row0 + ROWS - 1 <= sweep.at + offset", "KEYS ? row0 <= sweep.at + offset", "no mask where a tile of keys crosses the diagonal"),
    (SM90, "sweep.at + C - 1 <= row0 + offset", "sweep.at <= row0 + offset", "no mask where a step of keys crosses the diagonal"),
    (SM90, "                clear_rows<D, C>(smem + (y0 - at.x0), n, threadIdx.x % 128);\n", "", "keys that kv_end hides are NaN"),
    (SM90, "                named_bar_sync(1 + group, 128);\n", "", "keys are read while others clear them"),
    (SM90, "slope[i] = column + i / 4 * 8 + i % 2 < sweep.at + n ? slope[i] : 0.f;", "(void)0;", "slopes of keys that kv_end hides are NaN"),
    (SM90, "const bool has = !KEYS || (i >= seen.lo && i < seen.hi);", "const bool has = true;", "gradients of hidden keys are what is there"),
    (MASK, "return {lo, hi < lo ? lo : hi};", "return {lo, p.kv_len};", "keys after kv_end are seen"),
    # Arithmetic.
    (SM90, "bits_float(two.x[c % 2 * 2]) : own", "bits_float(two.x[0]) : own", "lse of the neighbour"),
    (SM90, "bits_float(two.x[c % 2 * 2 + 1]) : own", "bits_float(two.x[1]) : own", "delta of the neighbour"),
    (SM90, "own[c / 2].lse", "own[c % 2].lse", "lse of the other row"),
    (SM90, "p.dq_f32, sum0, p.softmax_scale", "p.dq_f32, sum0, 1.f", "dQ and dK without the scale"),
    # Segments.
    (SM90, "            begun = true;\n", "", "folded segments are forgotten"),
    (SM90, "(int64_t)sum * p.batch", "(int64_t)0 * p.batch", "sums of two kinds share a place"),
    (SEGMENT, "if (at.row[r] && begun)", "if (at.row[r])", "total is read before it is written"),
]  # fmt: skip
