//! The steps of a rank: whose block is at hand, what is attended, where the block goes next.

use super::pieces::{Piece, pieces, touches};
use super::shard::{MAX_RANKS, Run, Sharding, check, check_parts, runs};
use crate::error::{Error, Result};

/// Most pieces of a rank's schedule: packed documents under striped shards have one for each document and step.
const MAX_PIECES: usize = 1 << 22;

/// A ring, or a double ring, over one sequence.
#[derive(Debug, Clone)]
pub struct Ring {
    inner: u64,
    outer: u64,
    causal: bool,
    documents: Vec<u64>,
    shards: Vec<Vec<Run>>,
}

/// One step of a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// From 0 on.
    pub step: u64,
    /// Whose block it is the turn of.
    pub source: u64,
    /// What is attended. None: the block is only passed on, or does not even come here.
    pub pieces: Vec<Piece>,
    /// Whom the block came from; None for the rank's own, and for a block that does not come.
    pub receive_from: Option<u64>,
    /// Whom it is sent to on the inner ring, there for the next step.
    pub inner_to: Option<u64>,
    /// Whom it is sent to on the outer ring, there `inner` steps later.
    pub outer_to: Option<u64>,
}

/// How far a block goes from the rank that a lap begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reach {
    /// The lap is at hand at all.
    pub here: bool,
    /// Hops on the inner ring.
    pub hops: u64,
    /// It goes on to the next lap.
    pub onward: bool,
}

impl Ring {
    /// A ring of `inner x outer` ranks; `documents` are start positions, as [`super::documents_of`] checks them.
    ///
    /// # Errors
    /// Numbers that are 0 or too large; more documents than striped shards of so many ranks can be asked for.
    pub fn new(
        sharding: Sharding,
        length: u64,
        inner: u64,
        outer: u64,
        causal: bool,
        documents: Vec<u64>,
    ) -> Result<Self> {
        for (name, n) in [("inner", inner), ("outer", outer)] {
            if n == 0 || n > MAX_RANKS {
                return Err(Error::value(name, format!("1 to {MAX_RANKS}"), n));
            }
        }
        let ranks = inner * outer;
        if ranks > MAX_RANKS {
            return Err(Error::value("inner x outer", format!("at most {MAX_RANKS} ranks"), ranks));
        }
        check(length, ranks, 0)?;
        check_parts(sharding, ranks, &documents)?;
        let shards = (0..ranks).map(|rank| runs(sharding, length, ranks, rank)).collect();
        Ok(Self { inner, outer, causal, documents, shards })
    }

    /// Ranks of the inner ring.
    pub fn inner(&self) -> u64 {
        self.inner
    }

    /// Ranks of the outer ring.
    pub fn outer(&self) -> u64 {
        self.outer
    }

    /// All ranks.
    pub fn ranks(&self) -> u64 {
        self.inner * self.outer
    }

    /// Positions that a rank holds.
    pub fn tokens(&self, rank: u64) -> u64 {
        self.shards[rank as usize].iter().map(Run::count).sum()
    }

    /// The rank `laps` on along the outer ring and `turns` on along the inner one; negative numbers go back.
    pub(super) fn moved(&self, rank: u64, laps: i64, turns: i64) -> u64 {
        let (outer, inner) = ((rank / self.inner) as i64, (rank % self.inner) as i64);
        let outer = (outer + laps).rem_euclid(self.outer as i64) as u64;
        outer * self.inner + (inner + turns).rem_euclid(self.inner as i64) as u64
    }

    fn touches(&self, rank: u64, source: u64) -> bool {
        touches(&self.shards[rank as usize], &self.shards[source as usize], &self.documents, self.causal)
    }

    /// Hops on the inner ring to the farthest rank that needs the block of `source` in a lap.
    fn farthest(&self, source: u64, lap: u64) -> Option<u64> {
        let head = self.moved(source, lap as i64, 0);
        (0..self.inner).rev().find(|&turn| self.touches(self.moved(head, 0, turn as i64), source))
    }

    /// Where the block of `source` goes in a lap: no farther than somebody needs it.
    pub(super) fn reach(&self, source: u64, lap: u64) -> Reach {
        let hops = self.farthest(source, lap);
        let onward = (lap + 1..self.outer).rev().any(|later| self.farthest(source, later).is_some());
        Reach { here: lap == 0 || hops.is_some() || onward, hops: hops.unwrap_or(0), onward }
    }

    /// [`Self::reach`] of each lap.
    pub(super) fn reaches(&self, source: u64) -> Vec<Reach> {
        let mut onward = false;
        let mut found = Vec::with_capacity(self.outer as usize);
        for lap in (0..self.outer).rev() {
            let hops = self.farthest(source, lap);
            let here = lap == 0 || hops.is_some() || onward;
            found.push(Reach { here, hops: hops.unwrap_or(0), onward });
            onward = here;
        }
        found.reverse();
        found
    }

    /// The steps of a rank, `ranks` of them.
    ///
    /// # Errors
    /// `rank` too large; packed documents that make too many pieces.
    pub fn steps(&self, rank: u64) -> Result<Vec<Step>> {
        check(0, self.ranks(), rank)?;
        let mut steps = Vec::with_capacity(self.ranks() as usize);
        let mut count = 0;
        for step in 0..self.ranks() {
            let (lap, turn) = (step / self.inner, step % self.inner);
            let source = self.moved(rank, -(lap as i64), -(turn as i64));
            let reach = self.reach(source, lap);
            let here = reach.here && turn <= reach.hops;
            let found = if here {
                pieces(&self.shards[rank as usize], &self.shards[source as usize], &self.documents, self.causal)
            } else {
                vec![]
            };
            count += found.len();
            if count > MAX_PIECES {
                let expected = format!("few enough for {MAX_PIECES} pieces of attention in a rank's schedule");
                return Err(Error::value("documents", expected, self.documents.len()));
            }
            let came_from = if turn > 0 { self.moved(rank, 0, -1) } else { self.moved(rank, -1, 0) };
            steps.push(Step {
                step,
                source,
                pieces: found,
                receive_from: (here && step > 0).then_some(came_from),
                inner_to: (here && turn < reach.hops).then(|| self.moved(rank, 0, 1)),
                outer_to: (here && turn == 0 && reach.onward).then(|| self.moved(rank, 1, 0)),
            });
        }
        Ok(steps)
    }
}
