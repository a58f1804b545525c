//! How evenly the work lies.

use super::shard::{Run, Sharding, check, check_parts, runs};
use crate::error::Result;

/// Visible (query, key) pairs of the queries that a rank holds: arithmetic series, nothing is counted one by one.
///
/// # Errors
/// As [`super::shard`].
pub fn work(sharding: Sharding, length: u64, ranks: u64, rank: u64, causal: bool, documents: &[u64]) -> Result<u128> {
    check(length, ranks, rank)?;
    Ok(runs(sharding, length, ranks, rank).iter().map(|run| of_run(run, length, causal, documents)).sum())
}

fn of_run(run: &Run, length: u64, causal: bool, documents: &[u64]) -> u128 {
    let first = documents.partition_point(|&start| start <= run.start) - 1;
    let mut pairs = 0;
    for (i, &start) in documents.iter().enumerate().skip(first) {
        if start > run.last() {
            break;
        }
        let end = documents.get(i + 1).copied().unwrap_or(length);
        let (lo, hi) = (run.below(start), run.below(end));
        let n = u128::from(hi - lo);
        if n == 0 {
            continue;
        }
        pairs += if causal {
            n * u128::from(run.at(lo) - start + 1) + u128::from(run.step) * (n * (n - 1) / 2)
        } else {
            n * u128::from(end - start)
        };
    }
    pairs
}

/// Largest work of a rank over the mean: 1.0 is even, and where there is no work.
///
/// # Errors
/// As [`super::shard`], and as [`super::Ring::new`] of documents.
pub fn balance(sharding: Sharding, length: u64, ranks: u64, causal: bool, documents: &[u64]) -> Result<f64> {
    check(length, ranks, 0)?;
    check_parts(sharding, ranks, documents)?;
    let (mut most, mut total) = (0, 0);
    for rank in 0..ranks {
        let of_rank = work(sharding, length, ranks, rank, causal, documents)?;
        most = most.max(of_rank);
        total += of_rank;
    }
    Ok(if total == 0 { 1.0 } else { most as f64 * ranks as f64 / total as f64 })
}
