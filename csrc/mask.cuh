// Which keys a query sees: src/args.rs, Problem::visible.
#pragma once
#include "params.h"
#include "ptx.cuh"

// Keys lo <= j < hi of a batch row, whatever the query.
struct Interval {
    int lo, hi;
};

PRIM int clamp_(int64_t x, int lo, int hi) { return x < lo ? lo : x > hi ? hi : (int)x; }

template <class Call>
PRIM Interval row_interval(const Call& p, int b) {
    const int lo = p.kv_start ? clamp_(((const int64_t*)p.kv_start)[b], 0, p.kv_len) : 0;
    const int hi = p.kv_end ? clamp_(((const int64_t*)p.kv_end)[b], 0, p.kv_len) : p.kv_len;
    return {lo, hi < lo ? lo : hi};
}

// One past the last key that query i sees, inside the interval of its batch row.
template <class Call>
PRIM int query_end(const Call& p, Interval row, int i) {
    return p.causal ? clamp_(p.q_start + i + 1, row.lo, row.hi) : row.hi;
}
