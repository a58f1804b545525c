"""Bugs for check_attention_backward_sm80.cpp to see."""

SM80, SWEEP, TILES, SEGMENT, MASK = "attention_backward_sm80.cu", "sweep.cuh", "tiles.cuh", "segment.cuh", "mask.cuh"
MUTATIONS = [
    # What is waited for.
    (SM80, "        cp_async_wait<0>();\n        block_sync();", "        block_sync();", "columns are used before their copy has come"),
    (SM80, "        block_sync();  // this step is there", "        // this step is there", "no barrier between copies and their use by other warps"),
    (SM80, "            named_bar_sync(1 + warp / S::SHARE, 32 * S::SHARE);  // the other half", "            // the other half", "the other warp's half is used before it is there"),
    (SM80, "named_bar_sync(1 + warp / S::SHARE", "named_bar_sync(1 + warp % S::SHARE", "the wrong warps wait for each other"),
    (SM80, "next = stage ^ 1;", "next = stage;", "a step's columns are overwritten while they are read"),
    # Layouts.
    (SM80, "(warp ^ 1) * S::HANDED", "warp * S::HANDED", "a warp takes its own half twice"),
    (SM80, "other = (share ^ 1) * S::OWN", "other = share * S::OWN", "the other half's weights with its own columns"),
    (SM80, "hand_over(mine + S::HANDED / 2, w, lane)", "hand_over(mine, w, lane)", "P where dS is handed over"),
    (SM80, "(k * TILES + t) * 512 + lane * 16) = x", "(k * TILES) * 512 + lane * 16) = x", "one tile of two is handed over"),
    (SM80, "b_row = share * S::OWN + ", "b_row = ", "both warps have the first half of the columns"),
    (SM80, "a_row = warp / S::SHARE * 32", "a_row = warp * 32 % S::ROWS", "rows of another warp"),
    (SM80, "lane / 16) + share * 128;", "lane / 16);", "both warps sum the first channels"),
    (SM80, "lane / 16 * 8 + lane % 8", "lane / 16 * 8 + lane % 4", "fragments of columns: half of them"),
    (SM80, "channels_at(a_place, d) + t * 16 * D * 2", "channels_at(a_place, d)", "the second tile of rows is the first"),
    (SM80, "x[t][2 * k + i / 2][i % 2 * 2 + 1]", "x[t][2 * k + i / 2][i % 2 * 2]", "weights of neighbours"),
    (TILES, "row + i < n ? 16 : 0", "16", "rows beyond the last one are read"),
    (TILES, "(d & 3) << 5", "(d & 1) << 5", "channels of fragments by half"),
    # Which rows and columns.
    (SM80, "y + S::Y, row_address(y1", "y + S::Y, row_address(y0", "Y1 is Y0"),
    (SM80, "x1, row_address(v1", "x1, row_address(v0", "X1 is X0"),
    (SM80, "head = KEYS ? sweep.head : kv_head, n", "head = KEYS ? kv_head : kv_head, n", "queries of another head"),
    (SM80, "stats_of(p, b, head) + sweep.at)", "stats_of(p, b, head))", "stats of the first queries"),
    (SM80, "kv_head = p.first_head + blockIdx.y", "kv_head = blockIdx.y", "the launch's first head is forgotten"),
    (SM80, "own[t][r] = stats_of(p, b, head)[row + t * 16 + r * 8]", "own[t][r] = stats_of(p, b, head)[row + t * 16]", "stats of rows 8 to 15"),
    (SWEEP, "/ STEP * STEP;", ";", "a step's stats begin between 16 bytes, or queries are left out"),
    (SWEEP, "last_head = head + group - 1;", "last_head = head;", "one head of a group"),
    (SWEEP, "row0 > seen.lo ? row0 : seen.lo", "row0 + rows", "keys miss the first queries that see them"),
    # Masks.
    (SM80, "KEYS ? r <= c + offset", "KEYS ? r < c + offset", "a query does not see its own key (keys)"),
    (SM80, ": c <= r + offset && c < at + n", ": c < r + offset && c < at + n", "a query does not see its own key (queries)"),
    (SM80, "c <= r + offset && c < at + n", "c <= r + offset", "keys beyond the last one"),
    (SM80, "KEYS ? row0 + S::ROWS - 1 <= at + offset", "KEYS ? row0 <= at + offset", "no mask where a tile of keys crosses the diagonal"),
    (SM80, "at + S::COLUMNS - 1 <= row0 + offset", "at <= row0 + offset", "no mask where a step of keys crosses the diagonal"),
    (SM80, "n == S::COLUMNS && ", "", "no mask beyond the last key"),
    (SM80, "const bool has = !KEYS || (i >= seen.lo && i < seen.hi);", "const bool has = true;", "gradients of hidden keys are what is there"),
    (SM80, "i >= (KEYS ? p.key_rows : p.q_len)", "i >= (KEYS ? p.kv_len : p.q_len)", "gradients of rows that are not in use are left as they were"),
    (MASK, "return {lo, hi < lo ? lo : hi};", "return {lo, p.kv_len};", "keys after kv_end are seen"),
    # Arithmetic.
    (SM80, "stat[part + m * 8 + i % 2].lse : own", "stat[part + m * 8].lse : own", "lse of the neighbour"),
    (SM80, "weight[t][m][i] * (slope[t][m][i] - delta)", "weight[t][m][i] * slope[t][m][i]", "delta is left out"),
    (SM80, "p.dq_f32, sum0, p.softmax_scale", "p.dq_f32, sum0, 1.f", "dQ and dK without the scale"),
    # Segments.
    (SM80, "    if (p.total && steps > FOLD) {", "    if (p.total && steps < 0) {", "folded segments are forgotten"),
    (SM80, "(int64_t)sum * p.batch", "(int64_t)0 * p.batch", "sums of two kinds share a place"),
    (SM80, "p.total + warp % S::SHARE * 256", "p.total", "two warps share a place of total"),
    (SEGMENT, "if (at.row[r] && begun)", "if (at.row[r])", "total is read before it is written"),
    (SEGMENT, "o[i] = 0.f;", "(void)o[i];", "a segment begins with what was folded"),
]  # fmt: skip
