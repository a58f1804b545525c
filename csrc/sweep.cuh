// The gradients of attention, as two sweeps of one kind. With weights P, scores S = softmax_scale Q K^T, O = P V:
//
//   dV = P^T dO      dP = dO V^T      dS = P (dP - delta), delta = sum(dO O) - dlse by row      dQ = dS K, dK = dS^T Q  (softmax_scale)
//
// P is worked out again from lse. A block owns rows and goes over columns: keys with all queries that see them, of each head of the
// group in turn (dK, dV), or queries with the keys that they see (dQ). So every sum is one block's own, in one order: the same bits
// each time, and no memory beside the gradients. The price: Q K^T and dO V^T are computed in both sweeps, 7 products in place of 5.
// FlashAttention-2 adds dQ by atomics instead, in float32: 16 GiB for a million tokens of 32 heads, and other bits in each run.
#pragma once
#include "elements.cuh"
#include "mask.cuh"

// What is known of a query before: its lse in base 2 (for float32 in base e), and delta. A query that sees no key, or is none: inf and 0, so that P is 0.
struct alignas(8) Stat {
    float lse, delta;
};

// Those of a head, from query 0 on.
PRIM const Stat* stats_of(const Backward& p, int b, int head) {
    return (const Stat*)p.stats + ((int64_t)b * p.q_heads + head) * p.stats_len;
}

// As far as causality goes, this query and those after it see a key.
PRIM int first_query(const Backward& p, int key) { return p.causal ? clamp_(key - p.q_start, 0, p.q_len) : 0; }

// The columns that the rows of a block meet, STEP at a time.
template <bool KEYS, int STEP>
struct Sweep {
    int first, stop;     // columns
    int head, last_head; // query heads, whose rows they are (KEYS), or who the rows are
    int at;              // the first column of the step

    // Rows row0 <= i < row0 + rows of key head `of` (KEYS) or of query head `of`.
    MEMBER void begin(const Backward& p, Interval seen, int row0, int rows, int of) {
        if (KEYS) {
            const int group = p.q_heads / p.kv_heads;
            head = of * group;
            last_head = head + group - 1;
            first = first_query(p, row0 > seen.lo ? row0 : seen.lo) / STEP * STEP;
            stop = row0 < seen.hi && row0 + rows > seen.lo ? p.q_len : 0;
        } else {
            head = last_head = of;
            first = seen.lo;
            stop = query_end(p, seen, row0 + rows < p.q_len ? row0 + rows - 1 : p.q_len - 1);
        }
        if (first >= stop) head = last_head + 1;
        at = first;
    }
    // Columns of this step; 0: there are no more.
    MEMBER int n() const { return head > last_head ? 0 : stop - at < STEP ? stop - at : STEP; }
    MEMBER void next() {
        at += STEP;
        if (at < stop) return;
        at = first;
        head++;
    }
};
