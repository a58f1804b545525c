//! Ring attention: who holds which positions, who attends to whose, in which order blocks travel. Pure functions: nothing
//! here knows a network or a tensor.
//!
//! A *rank* holds a *shard* of the sequence, its positions in ascending order. Queries stay; the keys and values of a shard
//! (its *block* here) travel around the ring, one hop in a *step* (Liu et al., 2310.01889). A *double ring* (LoongTrain, 2406.18485)
//! has `inner x outer` ranks, rank = outer rank x inner + inner rank: blocks go around the inner ring, a *lap* of `inner`
//! steps, while the block that a lap began with already goes on along the outer ring.

mod balance;
mod cost;
mod gradients;
mod pieces;
mod schedule;
mod shard;
mod topology;
mod traffic;

pub use balance::{balance, work};
pub use cost::{Cluster, Cost, Layout, MAX_GPUS, Pass, Work, cost};
pub use gradients::Exchange;
pub use pieces::Piece;
pub use schedule::{Ring, Step};
pub use shard::{MAX_LENGTH, MAX_RANKS, Run, Sharding, documents_of, shard};
pub use topology::layouts;
pub use traffic::{Sent, TokenBytes};
