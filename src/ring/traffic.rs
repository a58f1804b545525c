//! Bytes that ranks send, counted along the way of every block.

use super::schedule::Ring;
use crate::error::{Error, Result};
use crate::quant::GROUP;

/// Bytes of a token on the way.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenBytes {
    /// Its keys and values, as far as they are its alone.
    pub kv: u64,
    /// What each [`GROUP`] tokens of a block have together, the last ones rounded up: compact keys.
    pub kv_group: u64,
    /// Gradients of keys and values.
    pub gradients: u64,
}

impl TokenBytes {
    /// Keys and values of a block: at most 2^40 tokens x 2^65 bytes.
    fn of_block(&self, tokens: u64) -> u128 {
        let groups = tokens.div_ceil(GROUP as u64);
        u128::from(tokens) * u128::from(self.kv) + u128::from(groups) * u128::from(self.kv_group)
    }
}

/// Bytes that one rank sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Forward, to ranks of the same node.
    pub forward_within: u128,
    /// Forward, to other nodes.
    pub forward_across: u128,
    /// Backward, keys and values again and gradients, to ranks of the same node.
    pub backward_within: u128,
    /// Backward, to other nodes.
    pub backward_across: u128,
}

impl Ring {
    /// What each rank sends in all. Ranks `n x per_node ..` are node n.
    ///
    /// # Errors
    /// `per_node` 0.
    pub fn sent(&self, per_node: u64, bytes: TokenBytes) -> Result<Vec<Sent>> {
        if per_node == 0 {
            return Err(Error::value("per_node", "at least 1 rank", per_node));
        }
        let mut sent = vec![Sent::default(); self.ranks() as usize];
        let mut add = |from: u64, to: u64, forward: u128, backward: u128| {
            let s = &mut sent[from as usize];
            let (f, b) = if from / per_node == to / per_node {
                (&mut s.forward_within, &mut s.backward_within)
            } else {
                (&mut s.forward_across, &mut s.backward_across)
            };
            *f += forward;
            *b += backward;
        };
        for source in 0..self.ranks() {
            // At most 2^105 bytes x 2^13 messages.
            let kv = bytes.of_block(self.tokens(source));
            let gradients = u128::from(self.tokens(source)) * u128::from(bytes.gradients);
            for (lap, reach) in (0..).zip(self.reaches(source)).filter(|(_, reach)| reach.here) {
                let at = |turn: u64| self.moved(source, lap, turn as i64);
                let head = at(0);
                for turn in 0..reach.hops {
                    add(at(turn), at(turn + 1), kv, kv);
                    add(at(turn + 1), if turn + 1 < reach.hops { at(turn + 2) } else { head }, 0, gradients);
                }
                let next = self.moved(head, 1, 0);
                if reach.onward {
                    add(head, next, kv, kv);
                }
                if lap > 0 {
                    add(head, if reach.onward { next } else { source }, 0, gradients);
                }
            }
        }
        Ok(sent)
    }
}
