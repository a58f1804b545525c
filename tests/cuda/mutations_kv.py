"""Bugs to plant in csrc/kv.cu and encode.cuh: (file, text that occurs once, instead, what)."""

MUTATIONS = [
    (
        "encode.cuh",
        "float_to_half(div_rn(add_rn(most, -least), STEPS<FORMAT>))",
        "float_to_half(mul_rn(add_rn(most, -least), 1.f / STEPS<FORMAT>))",
        "a scale by a rounded reciprocal",
    ),
    (
        "encode.cuh",
        "quotient(add_rn(x, -s.offset), s)",
        "mul_rn(add_rn(x, -s.offset), s.inverse)",
        "codes by a rounded reciprocal",
    ),
    ("encode.cuh", "y = y < HIGHEST ? y : HIGHEST;", "", "codes beyond the highest wrap around"),
    ("encode.cuh", "0x7ffff + (bits >> 20 & 1)", "0x80000", "e4m3: ties away from zero"),
    (
        "encode.cuh",
        "finite ? scale_of(scale, offset)",
        "true ? scale_of(scale, offset)",
        "infinity passes as an offset",
    ),
    ("kv.cu", "r.sum = add_rn(r.sum, mul_rn(x, 0.f));", "", "a NaN among numbers is passed over"),
    (
        "kv.cu",
        "tile.at[t * tile.pitch + d + e] = rounded<DTYPE>(x[e])",
        "tile.at[t * tile.pitch + d + e] = x[e]",
        "rotated keys are not rounded as rope_apply rounds them",
    ),
    (
        "kv.cu",
        "const Side& page, int group, int n, int head_dim) {\n    uint16_t* const params",
        "const Side& page, int group, int, int head_dim) {\n    const int n = GROUP;\n    uint16_t* const params",
        "tokens that are not there take part in a scale",
    ),
    ("kv.cu", "4 * (i / 2) + 16 * (i % 2) : 8 * i", "4 * i : 8 * i", "int4: channels in their own order"),
    ("kv.cu", "c + GROUP / 2, head_dim) << 4", "c + 4, head_dim) << 4", "int4 values: neighbours share a byte"),
    ("kv.cu", "c + e < head_dim ? s.scale : 0.f", "s.scale", "channels beyond head_dim take codes"),
    ("kv.cu", "p.at + i0, blockIdx.y % 2 == 0", "p.at, blockIdx.y % 2 == 0", "every tile is the page's first"),
    (
        "kv.cu",
        "if (page.format == DENSE) return;\n    block_sync();",
        "if (page.format == DENSE) return;",
        "scales before the rows are there",
    ),
    (
        "kv.cu",
        "first / GROUP, n, head_dim);\n        block_sync();",
        "first / GROUP, n, head_dim);",
        "codes of keys before their scales are there",
    ),
    (
        "kv.cu",
        "scale_values<FORMAT>(tile, page, first, n, head_dim);\n        block_sync();",
        "scale_values<FORMAT>(tile, page, first, n, head_dim);",
        "codes of values before their scales are there",
    ),
    (
        "kv.cu",
        "turns[f] = p.rotation.turns[f];\n        block_sync();",
        "turns[f] = p.rotation.turns[f];",
        "phases before the turns are there",
    ),
    (
        "kv.cu",
        "        });\n    block_sync();\n    const int steps",
        "        });\n    const int steps",
        "rows out of the tile before the keys are there",
    ),
    (
        "kv.cu",
        "const int shift = FORMAT == INT4 && d % GROUP >= GROUP / 2 ? 4 : 0;",
        "const int shift = 0;",
        "int4 values: the high halves are never read",
    ),
    ("kv.cu", "t = span.lo + i - first;", "t = i;", "a start inside of a group is taken as its first token"),
    (
        "kv.cu",
        "((const uint16_t*)row_address(p.side.params, tile.b, tile.h, blocks + block))[token]",
        "((const uint16_t*)row_address(p.side.params, tile.b, tile.h, block + 1))[token]",
        "the next scale as an offset",
    ),
]
