//! Which positions a rank holds.

use std::str::FromStr;

use crate::error::{Error, Result};

/// Longest sequence: pairs of positions then count in 128 bits with room.
pub const MAX_LENGTH: u64 = 1 << 40;
/// Most ranks of a ring: a schedule looks at pairs of them.
pub const MAX_RANKS: u64 = 4096;

/// How a sequence is dealt out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharding {
    /// Rank r holds the r-th of R chunks: under a causal mask the last rank does twice the mean.
    Contiguous,
    /// Rank r holds chunks r and 2R-1-r of 2R: every rank has the same work under a causal mask.
    Zigzag,
    /// Rank r holds positions r, r + R, r + 2R, ... (Striped Attention, Brandon et al., 2311.09431).
    Striped,
}

impl FromStr for Sharding {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "contiguous" => Ok(Self::Contiguous),
            "zigzag" => Ok(Self::Zigzag),
            "striped" => Ok(Self::Striped),
            _ => Err(Error::value("sharding", "contiguous, zigzag or striped", format!("{name:?}"))),
        }
    }
}

/// Positions `start, start + step, ...` below `stop`; at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First position.
    pub start: u64,
    /// Bound that no position reaches.
    pub stop: u64,
    /// Distance of neighbours.
    pub step: u64,
}

impl Run {
    /// How many positions.
    pub fn count(&self) -> u64 {
        self.below(self.stop)
    }

    /// How many positions lie before `position`.
    pub fn below(&self, position: u64) -> u64 {
        position.min(self.stop).saturating_sub(self.start).div_ceil(self.step)
    }

    /// The i-th position.
    pub fn at(&self, i: u64) -> u64 {
        self.start + i * self.step
    }

    /// The last position.
    pub fn last(&self) -> u64 {
        self.at(self.count() - 1)
    }
}

/// Most documents times ranks of striped shards, where every rank may hold a part of every document: seconds of work.
const MAX_PARTS: u64 = 1 << 28;

/// Refuses documents that would take minutes.
pub(super) fn check_parts(sharding: Sharding, ranks: u64, documents: &[u64]) -> Result<()> {
    let most = MAX_PARTS / ranks;
    if sharding == Sharding::Striped && documents.len() as u64 > most {
        let expected = format!("at most {most} documents in striped shards of {ranks} ranks");
        return Err(Error::value("documents", expected, documents.len()));
    }
    Ok(())
}

/// Checks what every function here is given.
pub(super) fn check(length: u64, ranks: u64, rank: u64) -> Result<()> {
    if length > MAX_LENGTH {
        return Err(Error::value("length", "0 to 2^40", length));
    }
    if ranks == 0 || ranks > MAX_RANKS {
        return Err(Error::value("ranks", format!("1 to {MAX_RANKS}"), ranks));
    }
    if rank >= ranks {
        return Err(Error::value("rank", format!("0 to {} of {ranks} ranks", ranks - 1), rank));
    }
    Ok(())
}

/// The runs of positions that a rank holds, ascending. Lengths need not divide: shards then differ by a position or two, and
/// some may be empty.
///
/// # Errors
/// `length` above [`MAX_LENGTH`], `ranks` not from 1 to [`MAX_RANKS`], `rank` not below `ranks`.
pub fn shard(sharding: Sharding, length: u64, ranks: u64, rank: u64) -> Result<Vec<Run>> {
    check(length, ranks, rank)?;
    Ok(runs(sharding, length, ranks, rank))
}

/// As [`shard`], of arguments that were checked.
pub(super) fn runs(sharding: Sharding, length: u64, ranks: u64, rank: u64) -> Vec<Run> {
    // At most 2^40 x 2^13: no overflow.
    let chunk = |i: u64, of: u64| Run { start: i * length / of, stop: (i + 1) * length / of, step: 1 };
    let runs = match sharding {
        Sharding::Contiguous => vec![chunk(rank, ranks)],
        Sharding::Zigzag => {
            let (low, high) = (chunk(rank, 2 * ranks), chunk(2 * ranks - 1 - rank, 2 * ranks));
            if low.stop == high.start { vec![Run { stop: high.stop, ..low }] } else { vec![low, high] }
        }
        Sharding::Striped => vec![Run { start: rank, stop: length, step: ranks }],
    };
    runs.into_iter().filter(|r| r.start < r.stop).collect()
}

/// Checks the start positions of packed documents: ascending, the first 0, all below `length`. None is one document.
///
/// # Errors
/// Anything else.
pub fn documents_of(starts: Option<Vec<u64>>, length: u64) -> Result<Vec<u64>> {
    let Some(starts) = starts else { return Ok(vec![0]) };
    match starts.first() {
        Some(0) => {}
        Some(first) => return Err(Error::value("documents[0]", "0, where the first document starts", first)),
        None => return Err(Error::value("documents", "start positions, the first 0", "an empty list")),
    }
    for (i, pair) in starts.windows(2).enumerate() {
        if pair[1] <= pair[0] {
            let expected = format!("a position after {}, the start before it", pair[0]);
            return Err(Error::value(format!("documents[{}]", i + 1), expected, pair[1]));
        }
    }
    let last = starts[starts.len() - 1];
    if last > 0 && last >= length {
        return Err(Error::value(
            format!("documents[{}]", starts.len() - 1),
            format!("a position below length={length}"),
            last,
        ));
    }
    Ok(starts)
}
