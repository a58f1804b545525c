//! How a prefill is cut into tasks: queries per task, and splits of the key axis when there are few tasks.

/// What the cut depends on.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// batch x kv_heads: independent problems.
    pub heads: usize,
    /// Queries of each.
    pub q_len: usize,
    /// Query heads folded into rows.
    pub group: usize,
    /// Keys that the first query sees.
    pub first: usize,
    /// Keys that the last query sees.
    pub last: usize,
    /// Threads.
    pub threads: usize,
    /// Rows of the kernel's panel.
    pub panel_rows: usize,
    /// Keys of the kernel's block.
    pub block_kv: usize,
    /// Rows that fit the cache beside each other.
    pub max_rows: usize,
}

/// The cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Queries per task.
    pub block_q: usize,
    /// Shares of the key axis per task.
    pub splits: usize,
}

/// Cost of packing a block of keys, in rows of arithmetic (measured: 1 to 3% at 384 rows).
const PACK_ROWS: f64 = 8.0;
/// Cost of a split: its partial is written, read and merged; in keys per row.
const SPLIT_KEYS: f64 = 64.0;

impl Shape {
    /// Rows that `queries` make, padded to whole panels.
    fn rows(&self, queries: usize) -> usize {
        (queries * self.group).next_multiple_of(self.panel_rows)
    }

    /// Time until the last thread is done when tasks are taken longest first, in key-rows.
    fn makespan(&self, t: Tiling) -> f64 {
        let blocks = self.q_len.div_ceil(t.block_q);
        let mut load = vec![0.0f64; self.threads];
        for b in (0..blocks).rev() {
            let queries = t.block_q.min(self.q_len - b * t.block_q);
            let end = b * t.block_q + queries;
            // Keys grow evenly from first to last over the queries.
            let keys = self.first as f64 + (self.last - self.first) as f64 * end as f64 / self.q_len as f64;
            let keys = (keys / self.block_kv as f64).ceil() * self.block_kv as f64;
            let mut cost = (self.rows(queries) as f64 + PACK_ROWS) * keys / t.splits as f64;
            if t.splits > 1 {
                cost += self.rows(queries) as f64 * SPLIT_KEYS;
            }
            for _ in 0..self.heads * t.splits {
                let least = load.iter_mut().min_by(|a, b| a.total_cmp(b)).expect("at least one thread");
                *least += cost;
            }
        }
        load.into_iter().fold(0.0, f64::max)
    }

    /// The cut with the least predicted time.
    pub fn choose(&self) -> Tiling {
        let most = (self.max_rows / self.group).clamp(1, self.q_len);
        let fewest_blocks = self.q_len.div_ceil(most);
        // Plenty of tasks: evenness comes by itself, and simulating thousands would cost more than it finds.
        if fewest_blocks * self.heads >= 64 * self.threads {
            return Tiling { block_q: self.round(most), splits: 1 };
        }
        let mut best = (f64::INFINITY, Tiling { block_q: most, splits: 1 });
        for blocks in fewest_blocks..=(fewest_blocks * 4).max(4 * self.threads).min(self.q_len) {
            let block_q = self.round(self.q_len.div_ceil(blocks)).min(most);
            for splits in 1..=self.threads {
                // At most 4 partials a thread, each worth its merge.
                if splits > 1
                    && (blocks * self.heads * splits > 4 * self.threads || self.last / splits < 8 * self.block_kv)
                {
                    break;
                }
                let t = Tiling { block_q, splits };
                let cost = self.makespan(t);
                if cost < best.0 * 0.995 {
                    best = (cost, t);
                }
            }
        }
        best.1
    }

    /// Rounds queries up so that their rows fill whole panels, where that is possible within the cache.
    fn round(&self, queries: usize) -> usize {
        let step = self.panel_rows / gcd(self.panel_rows, self.group);
        let up = queries.next_multiple_of(step);
        if up * self.group <= self.max_rows.max(step * self.group) { up.min(self.q_len.max(1)) } else { queries }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(q_len: usize, heads: usize, group: usize, threads: usize) -> Shape {
        Shape {
            heads,
            q_len,
            group,
            first: 32768,
            last: 32768 + q_len,
            threads,
            panel_rows: 6,
            block_kv: 64,
            max_rows: 1152,
        }
    }

    #[test]
    fn few_queries_still_use_all_threads() {
        for threads in [1, 2, 4, 16] {
            for q_len in [9, 64, 500, 512, 2048] {
                let s = shape(q_len, 1, 4, threads);
                let t = s.choose();
                let even = (s.rows(q_len) as f64) * s.last as f64 / threads as f64;
                assert!(s.makespan(t) < even * 1.35, "{q_len} on {threads}: {t:?}, {} of even", s.makespan(t) / even);
            }
        }
    }

    #[test]
    fn blocks_stay_within_the_cache_and_the_queries() {
        for q_len in [1, 2, 7, 100, 4096, 1 << 20] {
            for (group, threads) in [(1, 1), (4, 2), (8, 3), (71, 2), (2000, 2)] {
                let t = shape(q_len, 2, group, threads).choose();
                assert!(t.block_q >= 1 && t.block_q <= q_len && t.splits >= 1, "{t:?}");
                assert!(t.block_q == 1 || t.block_q * group <= 1152 + 6 * group, "{t:?}");
            }
        }
    }
}
