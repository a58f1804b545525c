// Long sequences: outputs are summed in registers over at most SEGMENT keys, then folded into float32 memory, and begun anew.
// Tensor cores may cut off their sums' last bits instead of rounding them, always toward zero; over a million keys that adds up.
//
// A thread folds what it holds itself and reads back what it wrote: no barrier anywhere. Fragments are those of mma and wgmma
// alike: element i of a thread's o is in its row (i >> 1) & 1 (rows lane / 4 and 8 after that), column (i >> 2) * 8 + lane % 4 * 2
// + (i & 1).
#pragma once
#include "ptx.cuh"

// A thread's two rows of `total`, at its first column; 0 where the row is beyond the last query.
struct TotalRows {
    float* row[2];
};

PRIM TotalRows total_rows(uint64_t total, int64_t first_row, int row, int rows, int head_dim, int lane) {
    TotalRows at;
    UNROLL for (int r = 0; r < 2; r++) {
        const int i = row + lane / 4 + 8 * r;
        at.row[r] = i < rows ? (float*)total + (first_row + i) * head_dim + lane % 4 * 2 : nullptr;
    }
    return at;
}

// total = total * keep + o, and o = 0. `begun`: total holds something yet.
template <int N>
PRIM void fold(float (&o)[N], const TotalRows& at, const float (&keep)[2], bool begun) {
    UNROLL for (int r = 0; r < 2; r++) {
        if (at.row[r] && begun) {
            UNROLL for (int i = 0; i < N; i += 4) UNROLL for (int c = 0; c < 2; c++)
                at.row[r][i * 2 + c] = fma_rn(at.row[r][i * 2 + c], keep[r], o[i + 2 * r + c]);
        } else if (at.row[r]) {
            UNROLL for (int i = 0; i < N; i += 4) UNROLL for (int c = 0; c < 2; c++)
                at.row[r][i * 2 + c] = o[i + 2 * r + c];
        }
    }
    UNROLL for (int i = 0; i < N; i++) o[i] = 0.f;
}

// o = total * keep + o: the last segment with all those before.
template <int N>
PRIM void unfold(float (&o)[N], const TotalRows& at, const float (&keep)[2]) {
    UNROLL for (int r = 0; r < 2; r++)
        if (at.row[r])
            UNROLL for (int i = 0; i < N; i += 4) UNROLL for (int c = 0; c < 2; c++)
                o[i + 2 * r + c] = fma_rn(at.row[r][i * 2 + c], keep[r], o[i + 2 * r + c]);
}
