"""Bugs for check_attention_sm90.cpp to see.

Not among them: fences between proxies, for the emulation orders all writes; and K given back too early, which does no harm as long as
the stage is only filled again after V of the block before, which is given back later.
"""

SM90, SEGMENT, MASK, WALK = "attention_sm90.cu", "segment.cuh", "mask.cuh", "walk.cuh"
MUTATIONS = [
    # What is waited for.
    (SM90, "    mbar_wait(at.q_full, 0);\n", "", "Q is used before it has come"),
    (SM90, "        mbar_wait(at.k_full, 0);\n", "", "the first K is used before it has come"),
    (SM90, "if (walk.n) mbar_wait(at.k_full + 8 * k_ring.stage, k_ring.parity);\n            wgmma_wait<0>();", "wgmma_wait<0>();", "K of later blocks is used before it has come"),
    (SM90, "mbar_wait(at.v_full + 8 * v_ring.stage, v_ring.parity);\n            start_outputs", "start_outputs", "V is used before it has come"),
    (SM90, "        mbar_wait(at.v_full + 8 * v_ring.stage, v_ring.parity);\n        if", "        if", "the last V is used before it has come"),
    (SM90, "wgmma_wait<1>();", "wgmma_wait<2>();", "scores are read while they are computed"),
    (SM90, "wgmma_wait<0>();\n            pin(o);\n", "", "outputs are rescaled while they are computed"),
    (SM90, "        wgmma_wait<0>();\n        pin(o);\n    }", "    }", "outputs are stored while they are computed"),
    # The ring.
    (SM90, "            release(at.k_empty + 8 * k_ring.stage, lane);\n", "", "K is never given back"),
    (SM90, "            wgmma_wait<0>();\n            pin(o);\n            release(at.v_empty + 8 * v_ring.stage, lane);", "            release(at.v_empty + 8 * v_ring.stage, lane);\n            wgmma_wait<0>();", "V is given back while it is read"),
    (SM90, "if (!first_round) mbar_wait(at.k_empty + barrier, ring.parity ^ 1);\n", "", "K is overwritten while it is read"),
    (SM90, "if (!first_round) mbar_wait(at.v_empty + barrier, ring.parity ^ 1);\n", "", "V is overwritten while it is read"),
    (SM90, "mbar_wait(at.k_empty + barrier, ring.parity ^ 1)", "mbar_wait(at.k_empty + barrier, ring.parity)", "the parity of an empty stage"),
    (SM90, "            parity ^= 1;\n", "", "a ring's parity stays"),
    (SM90, "            v_ring.advance();\n", "", "V's stage stays"),
    (SM90, "mbar_init(at.k_empty + 8 * s, CONSUMERS<D> * 4)", "mbar_init(at.k_empty + 8 * s, CONSUMERS<D>)", "a stage of K is empty when some warps are done"),
    (SM90, "mbar_init(at.v_empty + 8 * s, CONSUMERS<D> * 4)", "mbar_init(at.v_empty + 8 * s, 4)", "a stage of V is empty when one warpgroup is done"),
    (SM90, "mbar_expect_tx(barrier, ROWS * D * 2)", "mbar_expect_tx(barrier, ROWS * D)", "half of a tile is waited for"),
    (SM90, "    block_sync();\n", "", "barriers are used before they are there"),
    # Turns.
    (SM90, "        if (group == CONSUMERS<D> - 1) give_turn<D>(group);\n", "", "nobody has the first turn"),
    (SM90, "group + 1 == CONSUMERS<D> ? 1 : 2 + group", "2 + group", "the last warpgroup hands its turn to nobody"),
    # Layouts.
    (SM90, "k_step = d / 4 * BLOCK_KV * 128 + d % 4 * 32", "k_step = d / 4 * BLOCK_KV * 128 + d % 4 * 16", "K's descriptor: 16 channels"),
    (SM90, "q_step = d / 4 * BLOCK_Q<D> * 128", "q_step = d / 4 * BLOCK_KV * 64", "Q's descriptor: channels from 64 on"),
    (SM90, "wgmma_desc_sw128(q, 16, 1024)", "wgmma_desc_sw128(q, 16, 512)", "Q's descriptor: groups of 8 rows"),
    (SM90, "wgmma_desc_sw128(v, BLOCK_KV * 128, 1024)", "wgmma_desc_sw128(v, BLOCK_KV * 64, 1024)", "V's descriptor: channels from 64 on"),
    (SM90, "v_tile + k * 16 * 128 / 16", "v_tile + k * 8 * 128 / 16", "V's descriptor: 16 keys"),
    (SM90, "at.q + group * 64 * 128", "at.q", "all warpgroups have the first one's queries"),
    (SM90, "pack<BF16_>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1])", "pack<BF16_>(s[8 * k + 2 * i + 1], s[8 * k + 2 * i])", "weights of neighbours change places"),
    (SM90, "tile + c * ROWS * 128, map", "tile + c * ROWS * 64, map", "a tile's second box lies on the first"),
    # Which rows.
    (SM90, "walk.key - p.page[walk.page].first", "walk.key", "rows of later pages"),
    (SM90, "&maps.v[walk.page]", "&maps.v[0]", "values of the first page"),
    (SM90, "&maps.k[walk.page]", "&maps.k[walk.page + 1]", "keys of the next page"),
    (SM90, "at.q_full, q0, head, b)", "at.q_full, 0, head, b)", "every tile has the first queries"),
    (SM90, "head = blockIdx.y * group + blockIdx.x % group", "head = blockIdx.x % group * gridDim.y + blockIdx.y", "heads of a group interleaved"),
    (SM90, "q0 + BLOCK_Q<D> - 1 :", "q0 + BLOCK_Q<D> - 2 :", "the last query of a tile does not see its own key"),
    # Masks.
    (SM90, "const int seen = reach + 8 * r - key", "const int seen = reach - key", "the diagonal of rows 8 to 15"),
    (SM90, "(seen < n ? seen : n)", "seen", "keys beyond the block under causality"),
    (SM90, "k_ring.advance();\n            if (n < BLOCK_KV || key + BLOCK_KV > whole)", "k_ring.advance();\n            if (n < BLOCK_KV || key > whole)", "no mask where the diagonal crosses a block"),
    (SM90, "k_ring.advance();\n            if (n < BLOCK_KV || ", "k_ring.advance();\n            if (", "no mask beyond the last key"),
    (SM90, "        if (n < BLOCK_KV) {\n            clear_values", "        if (n < 0) {\n            clear_values", "values that kv_end hides are NaN"),
    (SM90, "            group_sync<D>(group);\n", "", "values are read while others clear them"),
    (MASK, "p.q_start + i + 1", "p.q_start + i", "a query does not see its own key (the last of a tile)"),
    (WALK, "key = lo > first ? lo : first;", "key = first;", "keys before kv_start are seen"),
    # Softmax.
    (SM90, "keep[0] != 1.f || keep[1] != 1.f", "keep[0] != 1.f", "outputs are rescaled for the first row only"),
    (SM90, "o[i] *= keep[i >> 1 & 1];", "o[i] *= keep[i & 1];", "outputs are rescaled by the other row's factor"),
    (SM90, "rows.l[r] = rows.l[r] * keep[r] +", "rows.l[r] = rows.l[r] +", "sums are not rescaled"),
    (SM90, "base = most == -INF ? 0.f : most * scale", "base = most * scale", "NaN where nothing is seen yet"),
    (SM90, "to == -INF ? 1.f :", "", "NaN where nothing has been seen"),
    (SM90, "most = fmax_(most, shfl_xor(most, 2));", "", "maximum of half a row"),
    (SM90, "sum += shfl_xor(sum, 2);", "", "sum of half a row"),
    # Segments.
    (SM90, "                begun = true;\n", "", "folded segments are forgotten"),
    (SM90, "                m_total[1] = rows.m[1];\n", "", "the maximum of a folded segment is forgotten"),
    (SM90, "        unfold(o, total_rows", "        if (!p.total) unfold(o, total_rows", "the last segment stands for all"),
    (SEGMENT, "if (at.row[r] && begun)", "if (at.row[r])", "total is read before it is written"),
]  # fmt: skip
