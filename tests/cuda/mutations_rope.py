"""Bugs to plant in csrc/rope.cu and phase.cuh: (file, text that occurs once, instead, what)."""

MUTATIONS = [
    (
        "phase.cuh",
        "(uint32_t)((uint64_t)position * turns >> 32)",
        "(uint32_t)((uint64_t)(uint32_t)position * turns >> 32)",
        "positions beyond 2^32 are cut",
    ),
    ("phase.cuh", "(turn + (1u << 29)) >> 30", "turn >> 30", "quarters rounded down: the series leaves its range"),
    ("phase.cuh", "(quarter + 1) & 2", "quarter & 2", "the sign of the cosine"),
    ("phase.cuh", "s = fma_rn(y, s, 8.3333333e-3f);", "s = fma_rn(y, s, 8.333e-3f);", "a coefficient with four digits"),
    (
        "phase.cuh",
        "if (position < 0 || position >= MAX_POSITION) scaling = INF - INF;",
        "",
        "a position that is not served passes as right",
    ),
    ("phase.cuh", "b * r.position_stride + i", "i", "all batch rows take the first one's positions"),
    ("rope.cu", "phases[t * pairs + d + e]", "phases[t * pairs + d]", "one phase for a whole access"),
    ("rope.cu", "if (from.ptr == to.ptr) return;", "return;", "what does not rotate is not copied"),
    ("rope.cu", "p.len - i0 < TOKENS ? p.len - i0 : TOKENS", "TOKENS", "tokens beyond the last one"),
    (
        "rope.cu",
        "turns[f] = r.turns[f];\n    block_sync();",
        "turns[f] = r.turns[f];",
        "phases before the turns are there",
    ),
    ("rope.cu", "r.scaling);\n    block_sync();", "r.scaling);", "rows before the phases are there"),
]
