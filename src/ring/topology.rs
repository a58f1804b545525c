//! The layout for a cluster: every way to split GPUs into head parallel x inner ring x outer ring, and the fastest of them.

use super::cost::{Cluster, Cost, Layout, Work, cost};
use super::shard::MAX_RANKS;
use crate::error::Result;

/// Layouts whose times differ by less are equal, for the model is no better: then fewer bytes between nodes decide, then fewer messages.
const EQUAL: f64 = 2e-2;

fn divisors(n: u64) -> impl Iterator<Item = u64> {
    (1..=n).filter(move |d| n.is_multiple_of(*d))
}

/// Every layout, the best first, the others by time. The degree of head parallelism divides the query heads, and it divides the GPUs of a
/// node or is a multiple of them; above the KV heads (or where it does not divide them) some of these are held more than once, which is counted.
///
/// # Errors
/// As [`cost`].
pub fn layouts(cluster: &Cluster, work: &Work, training: bool) -> Result<Vec<Cost>> {
    cluster.check()?;
    work.check()?;
    let mut found = vec![];
    for heads in divisors(work.q_heads) {
        if !cluster.ranks().is_multiple_of(heads)
            || !(cluster.gpus.is_multiple_of(heads) || heads.is_multiple_of(cluster.gpus))
            || cluster.ranks() / heads > MAX_RANKS
        {
            continue;
        }
        let ring = cluster.ranks() / heads;
        for inner in divisors(ring) {
            found.push(cost(cluster, work, Layout { heads, inner, outer: ring / inner })?);
        }
    }
    let seconds = |c: &Cost| c.forward.seconds + if training { c.backward.seconds } else { 0.0 };
    found.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)).then_with(|| a.layout.cmp(&b.layout)));
    let Some(fastest) = found.first().map(seconds) else { return Ok(found) };
    let equal = found.iter().take_while(|c| seconds(c) <= fastest * (1.0 + EQUAL)).enumerate();
    let best = equal.min_by_key(|(_, c)| {
        let across = c.forward.across + if training { c.backward.across } else { 0 };
        (across, c.messages, c.layout)
    });
    if let Some((at, _)) = best {
        let best = found.remove(at);
        found.insert(0, best);
    }
    Ok(found)
}
