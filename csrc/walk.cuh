// The keys that a block of queries goes over, BLOCK at a time, page by page.
#pragma once
#include "params.h"
#include "ptx.cuh"

template <int BLOCK>
struct Walk {
    int page, key, stop;  // in which page; the first key of the block; one past the last one that is wanted from that page
    int n;                // keys of this block; 0: there are no more

    // The first block of the keys lo <= j < end.
    MEMBER void begin(const Attn& p, int lo, int end) {
        page = 0;
        enter(p, lo, end);
    }
    MEMBER void next(const Attn& p, int lo, int end) {
        key += BLOCK;
        if (key < stop) {
            settle(p);
        } else {
            page++;
            enter(p, lo, end);
        }
    }

  private:
    MEMBER void enter(const Attn& p, int lo, int end) {
        for (; page < p.pages; page++) {
            const int first = p.page[page].first, last = first + p.page[page].tokens;
            key = lo > first ? lo : first;
            stop = end < last ? end : last;
            if (key < stop) break;
        }
        settle(p);
    }
    MEMBER void settle(const Attn& p) { n = page == p.pages ? 0 : stop - key < BLOCK ? stop - key : BLOCK; }
};
