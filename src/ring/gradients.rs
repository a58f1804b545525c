//! The way home of the gradients of keys and values.
//!
//! In the backward pass blocks travel as in the forward pass. What a rank adds to the gradient of a block follows the block
//! along the inner ring; the last rank that had it returns the sum to the one that the lap began with. Sums of laps follow along
//! the outer ring in the same way, from lap to lap, and the last returns it to the rank that the block belongs to. So every rank
//! sends the gradient of each block that came to it once.

use super::schedule::Ring;
use super::shard::check;
use crate::error::Result;

/// Gradients that a rank sends and receives after a step: (the other rank, whose block they are of).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exchange {
    /// In the order of the other side's `receives`.
    pub sends: Vec<(u64, u64)>,
    /// To be added to what this rank has of that block.
    pub receives: Vec<(u64, u64)>,
}

impl Ring {
    /// Exchange after which a lap's sum goes on along the outer ring. The sum is whole once the inner ring's return came, and the
    /// exchange after the next lap's first step hides behind that lap.
    fn handed_on(&self, lap: u64) -> u64 {
        if self.inner() == 1 { lap } else { (lap + 1) * self.inner() }
    }

    /// A rank's exchanges: number e comes after step e; the last, number `ranks`, after all. What an exchange receives has to be
    /// added before the next one begins.
    ///
    /// # Errors
    /// `rank` too large.
    pub fn exchanges(&self, rank: u64) -> Result<Vec<Exchange>> {
        check(0, self.ranks(), rank)?;
        let mut list = vec![Exchange::default(); self.ranks() as usize + 1];
        for step in 0..self.ranks() {
            let (lap, turn) = (step / self.inner(), step % self.inner());
            let source = self.moved(rank, -(lap as i64), -(turn as i64));
            let reach = self.reach(source, lap);
            if !reach.here || turn > reach.hops {
                continue;
            }
            if turn > 0 {
                let to = if turn < reach.hops { self.moved(rank, 0, 1) } else { self.moved(rank, 0, -(turn as i64)) };
                list[step as usize].sends.push((to, source));
                if turn > 1 {
                    list[step as usize - 1].receives.push((self.moved(rank, 0, -1), source));
                }
                continue;
            }
            if reach.hops > 0 {
                let from = self.moved(rank, 0, reach.hops as i64);
                list[(step + reach.hops) as usize].receives.push((from, source));
            }
            if lap > 0 {
                let to = if reach.onward { self.moved(rank, 1, 0) } else { source };
                list[self.handed_on(lap) as usize].sends.push((to, source));
            }
            if lap > 1 {
                list[self.handed_on(lap - 1) as usize].receives.push((self.moved(rank, -1, 0), source));
            }
        }
        // The rank's own block comes home from the last lap that it reached.
        if let Some(lap) = self.reaches(rank).iter().rposition(|reach| reach.here).filter(|&lap| lap > 0) {
            let lap = lap as u64;
            list[self.handed_on(lap) as usize].receives.push((self.moved(rank, lap as i64, 0), rank));
        }
        for exchange in &mut list {
            exchange.sends.sort_unstable_by_key(|&(_, source)| source);
            exchange.receives.sort_unstable_by_key(|&(_, source)| source);
        }
        Ok(list)
    }
}
