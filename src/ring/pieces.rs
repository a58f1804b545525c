//! Which rectangles of a (query shard, key shard) pair are attended, and which of them need a mask.

use super::shard::Run;

/// Queries `q_lo .. q_hi` of a shard against keys `k_lo .. k_hi` of a block, in local indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First query.
    pub q_lo: u64,
    /// One past the last query.
    pub q_hi: u64,
    /// First key.
    pub k_lo: u64,
    /// One past the last key.
    pub k_hi: u64,
    /// Whether key `k_lo + j` is hidden from query `q_lo + i` when `j > q_start + i`; else all see all.
    pub causal: bool,
    /// Place of the first query on the key axis, from `k_lo` on.
    pub q_start: u64,
}

impl Piece {
    fn queries(&self) -> u64 {
        self.q_hi - self.q_lo
    }

    fn keys(&self) -> u64 {
        self.k_hi - self.k_lo
    }

    /// Visible (query, key) pairs.
    pub fn pairs(&self) -> u128 {
        let (n, keys) = (u128::from(self.queries()), u128::from(self.keys()));
        if !self.causal {
            return n * keys;
        }
        // Rows grow by one key from q_start + 1 on, until a row sees all.
        let growing = (keys - u128::from(self.q_start)).min(n);
        growing * u128::from(self.q_start) + growing * (growing + 1) / 2 + (n - growing) * keys
    }

    /// Both as one, where the same queries see `self`'s keys and then those of `right`.
    fn beside(&self, right: &Self) -> Option<Self> {
        let same = (self.q_lo, self.q_hi, self.k_hi) == (right.q_lo, right.q_hi, right.k_lo);
        (same && !self.causal).then(|| Self {
            k_lo: self.k_lo,
            q_start: if right.causal { right.q_start + self.keys() } else { 0 },
            ..*right
        })
    }

    /// Both as one, where the queries of `below` follow those of `self` and see as much or more.
    fn above(&self, below: &Self) -> Option<Self> {
        if (self.q_hi, self.k_lo) != (below.q_lo, below.k_lo) {
            return None;
        }
        let joined = Self { q_lo: self.q_lo, q_start: self.q_start, causal: self.causal, ..*below };
        if !self.causal {
            return (!below.causal && self.k_hi == below.k_hi).then_some(joined);
        }
        let next = self.q_start + self.queries();
        let fits = if below.causal { below.q_start == next } else { next + 1 >= below.keys() };
        (fits && self.keys() >= below.keys().min(next)).then_some(joined)
    }
}

/// Positions `from .. to` of two runs with the same step: queries of one, keys of the other; indices count from the bases.
fn piece(q: (&Run, u64), k: (&Run, u64), (from, to): (u64, u64), causal: bool) -> Option<Piece> {
    let (mut q_lo, q_hi) = (q.0.below(from), q.0.below(to));
    let (k_lo, mut k_hi) = (k.0.below(from), k.0.below(to));
    if q_lo >= q_hi || k_lo >= k_hi {
        return None;
    }
    let mut q_start = 0;
    if causal {
        // Query i sees key j when k + j step <= q + i step: j <= i + floor((q - k) / step). Positions stay below 2^40.
        let ahead = (q.0.at(q_lo) as i64 - k.0.at(k_lo) as i64).div_euclid(q.0.step as i64);
        if ahead < 0 {
            q_lo += ahead.unsigned_abs();
        } else {
            q_start = ahead as u64;
        }
        if q_lo >= q_hi {
            return None;
        }
        k_hi = k_hi.min(k_lo + q_start + (q_hi - q_lo));
    }
    let masked = causal && q_start + 1 < k_hi - k_lo;
    Some(Piece {
        q_lo: q.1 + q_lo,
        q_hi: q.1 + q_hi,
        k_lo: k.1 + k_lo,
        k_hi: k.1 + k_hi,
        causal: masked,
        q_start: if masked { q_start } else { 0 },
    })
}

/// Runs with the local index of their first position.
fn based(runs: &[Run]) -> impl Iterator<Item = (&Run, u64)> {
    runs.iter().scan(0, |base, run| {
        let at = *base;
        *base += run.count();
        Some((run, at))
    })
}

/// Start and end of document `i`.
fn span(documents: &[u64], i: usize) -> (u64, u64) {
    (documents[i], documents.get(i + 1).copied().unwrap_or(u64::MAX))
}

/// First and last document that both runs might share, if any.
fn shared(q: &Run, k: &Run, documents: &[u64]) -> Option<(usize, usize)> {
    let of = |position: u64| documents.partition_point(|&start| start <= position) - 1;
    let (first, last) = (of(q.start.max(k.start)), of(q.last().min(k.last())));
    (first <= last).then_some((first, last))
}

/// All pieces of a pair of shards: disjoint, and together every visible pair. `documents` as [`super::documents_of`] gives them.
pub(super) fn pieces(q: &[Run], k: &[Run], documents: &[u64], causal: bool) -> Vec<Piece> {
    let mut found = vec![];
    let bounds = q.iter().flat_map(|a| k.iter().filter_map(|b| shared(a, b, documents)));
    let Some((first, last)) = bounds.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))) else { return found };
    for document in first..=last {
        let within = span(documents, document);
        let mut rows: Vec<Piece> = vec![];
        for a in based(q) {
            let mut row: Vec<Piece> = vec![];
            for right in based(k).filter_map(|b| piece(a, b, within, causal)) {
                join(&mut row, right, Piece::beside);
            }
            match row[..] {
                [one] if rows.len() == 1 => join(&mut rows, one, Piece::above),
                _ => rows.append(&mut row),
            }
        }
        found.append(&mut rows);
    }
    found
}

/// Adds a piece, as one with the last where they fit.
fn join(list: &mut Vec<Piece>, next: Piece, fit: impl Fn(&Piece, &Piece) -> Option<Piece>) {
    match list.last().and_then(|last| fit(last, &next)) {
        Some(both) => *list.last_mut().expect("there is a last") = both,
        None => list.push(next),
    }
}

/// Whether a block may be needed for the queries of a shard. Exact but for striped shards of documents shorter than the ring,
/// where it may say yes for a pair without pieces.
pub(super) fn touches(q: &[Run], k: &[Run], documents: &[u64], causal: bool) -> bool {
    q.iter().any(|a| {
        k.iter().any(|b| {
            let Some((first, last)) = shared(a, b, documents) else { return false };
            let within = (documents[first], span(documents, last).1);
            piece((a, 0), (b, 0), within, causal).is_some()
        })
    })
}
