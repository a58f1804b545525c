//! Schedules of rings against every pair, one by one, and their transfers against a network that is simulated.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use llama1m_ext::ring::{MAX_LENGTH, Piece, Ring, Sharding, TokenBytes, balance, documents_of, shard, work};

const SHARDINGS: [Sharding; 3] = [Sharding::Contiguous, Sharding::Zigzag, Sharding::Striped];
const RINGS: [(u64, u64); 12] =
    [(1, 1), (2, 1), (1, 2), (3, 1), (4, 1), (2, 2), (5, 1), (1, 5), (2, 3), (4, 2), (2, 4), (8, 1)];

fn positions(sharding: Sharding, length: u64, ranks: u64, rank: u64) -> Vec<u64> {
    let runs = shard(sharding, length, ranks, rank).unwrap();
    runs.iter().flat_map(|r| (r.start..r.stop).step_by(r.step as usize)).collect()
}

fn documents(kind: usize, length: u64) -> Option<Vec<u64>> {
    let starts: Vec<u64> = match kind {
        0 => return None,
        1 => vec![0, 1, 2, length / 3, length / 2, length - length.min(1)],
        2 => (0..length).step_by(5).collect(),
        _ => (0..length).collect(),
    };
    let kept: BTreeSet<u64> = starts.into_iter().filter(|&s| s < length).chain([0]).collect();
    Some(kept.into_iter().collect())
}

fn each_case(mut check: impl FnMut(Sharding, u64, (u64, u64), bool, Option<Vec<u64>>)) {
    for sharding in SHARDINGS {
        for (inner, outer) in RINGS {
            let ranks = inner * outer;
            for length in BTreeSet::from([0, 1, ranks - 1, ranks, ranks + 1, 2 * ranks + 1, 23, 48, 61]) {
                for (causal, kind) in [(true, 0), (false, 0), (true, 1), (true, 2), (false, 2), (true, 3)] {
                    check(sharding, length, (inner, outer), causal, documents(kind, length));
                }
            }
        }
    }
}

fn visible(q: u64, k: u64, causal: bool, starts: &[u64]) -> bool {
    let of = |p: u64| starts.iter().filter(|&&s| s <= p).count();
    (!causal || k <= q) && of(q) == of(k)
}

fn pairs_of(p: &Piece) -> impl Iterator<Item = (u64, u64)> {
    let p = *p;
    (p.q_lo..p.q_hi).flat_map(move |i| {
        (p.k_lo..p.k_hi).filter(move |j| !p.causal || j - p.k_lo <= p.q_start + i - p.q_lo).map(move |j| (i, j))
    })
}

#[test]
fn shards_are_ascending_and_partition_the_sequence() {
    for sharding in SHARDINGS {
        for ranks in [1, 2, 3, 4, 5, 8, 64] {
            for length in [0, 1, ranks - 1, ranks, 2 * ranks - 1, 2 * ranks, 1000, 1023] {
                let mut all = vec![];
                for rank in 0..ranks {
                    let own = positions(sharding, length, ranks, rank);
                    assert!(own.is_sorted(), "{sharding:?} {length} {rank}/{ranks}");
                    assert!(own.len() as u64 <= length.div_ceil(ranks) + 1 && own.len() as u64 + 2 > length / ranks);
                    all.extend(own);
                }
                all.sort_unstable();
                assert_eq!(all, (0..length).collect::<Vec<_>>(), "{sharding:?} {length} on {ranks}");
            }
        }
    }
}

#[test]
fn pieces_cover_every_visible_pair_once() {
    each_case(|sharding, length, (inner, outer), causal, starts| {
        let starts = documents_of(starts, length).unwrap();
        let ring = Ring::new(sharding, length, inner, outer, causal, starts.clone()).unwrap();
        let mut seen = BTreeMap::new();
        for rank in 0..ring.ranks() {
            let own = positions(sharding, length, ring.ranks(), rank);
            let mut sources = BTreeSet::new();
            let mut pairs = 0;
            for step in ring.steps(rank).unwrap() {
                let theirs = positions(sharding, length, ring.ranks(), step.source);
                assert!(sources.insert(step.source));
                for piece in &step.pieces {
                    let inside: Vec<_> = pairs_of(piece).collect();
                    assert_eq!(piece.pairs(), inside.len() as u128, "{piece:?}");
                    pairs += piece.pairs();
                    // No row and no column of a piece is for nothing, and no mask hides nothing.
                    assert!(piece.q_lo < piece.q_hi && piece.k_lo < piece.k_hi);
                    assert!((piece.q_lo..piece.q_hi).all(|i| inside.iter().any(|p| p.0 == i)), "{piece:?}");
                    assert!((piece.k_lo..piece.k_hi).all(|j| inside.iter().any(|p| p.1 == j)), "{piece:?}");
                    let area = (piece.q_hi - piece.q_lo) * (piece.k_hi - piece.k_lo);
                    assert_eq!(piece.causal, (inside.len() as u64) < area, "{piece:?}");
                    for (i, j) in inside {
                        *seen.entry((own[i as usize], theirs[j as usize])).or_insert(0) += 1;
                    }
                }
            }
            assert_eq!(sources.len() as u64, ring.ranks());
            assert_eq!(pairs, work(sharding, length, ring.ranks(), rank, causal, &starts).unwrap());
        }
        for q in 0..length {
            for k in 0..length {
                let expected = i32::from(visible(q, k, causal, &starts));
                assert_eq!(
                    seen.get(&(q, k)).copied().unwrap_or(0),
                    expected,
                    "{sharding:?} {length} {inner}x{outer} causal {causal} documents {starts:?}: {q} {k}"
                );
            }
        }
    });
}

#[test]
#[allow(clippy::needless_range_loop)] // step t of every rank
fn blocks_that_steps_use_have_come() {
    each_case(|sharding, length, (inner, outer), causal, starts| {
        let starts = documents_of(starts, length).unwrap();
        // Of striped shards the rule does not look into documents that are shorter than the ring.
        let exact = sharding != Sharding::Striped || starts.len() == 1;
        let ring = Ring::new(sharding, length, inner, outer, causal, starts).unwrap();
        let steps: Vec<_> = (0..ring.ranks()).map(|rank| ring.steps(rank).unwrap()).collect();
        // What lies in a rank's letter box: (rank, step it is for) -> (source, sender).
        let mut mail = HashMap::new();
        let mut sent = vec![(0u64, 0u64); ring.ranks() as usize];
        for t in 0..ring.ranks() as usize {
            for rank in 0..ring.ranks() {
                let step = &steps[rank as usize][t];
                assert_eq!(step.step, t as u64);
                let came = mail.remove(&(rank, t as u64));
                assert_eq!(came, step.receive_from.map(|from| (step.source, from)), "{ring:?} {rank} {t}");
                let here = came.is_some() || t == 0;
                assert!(here || step.pieces.is_empty());
                assert!(t > 0 || step.source == rank);
                for (to, when) in [(step.inner_to, 1), (step.outer_to, inner)] {
                    if let Some(to) = to {
                        assert!(here && to != rank);
                        assert!(mail.insert((to, t as u64 + when), (step.source, rank)).is_none());
                        let (tokens, groups) = &mut sent[rank as usize];
                        *tokens += ring.tokens(step.source);
                        *groups += (0..ring.tokens(step.source)).step_by(64).count() as u64;
                    }
                }
                // The last of a lap that has a block uses it: nothing travels for nothing.
                if step.inner_to.is_none() && step.step % inner > 0 && step.receive_from.is_some() && exact {
                    assert!(!step.pieces.is_empty(), "{ring:?} {rank} {t}");
                }
            }
        }
        assert!(mail.is_empty());
        let bytes = ring.sent(inner, TokenBytes { kv: 6, kv_group: 1000, gradients: 0 }).unwrap();
        for (rank, (tokens, groups)) in sent.iter().enumerate() {
            let expected = u128::from(*tokens) * 6 + u128::from(*groups) * 1000;
            assert_eq!(bytes[rank].forward_within + bytes[rank].forward_across, expected);
        }
    });
}

/// (source, sum) of each, in order.
type Messages = Vec<(u64, Vec<u64>)>;

#[test]
#[allow(clippy::needless_range_loop)] // exchange e of every rank, then of every rank again
fn gradients_come_home_whole() {
    each_case(|sharding, length, (inner, outer), causal, starts| {
        let starts = documents_of(starts, length).unwrap();
        let ring = Ring::new(sharding, length, inner, outer, causal, starts).unwrap();
        let ranks = ring.ranks();
        let steps: Vec<_> = (0..ranks).map(|rank| ring.steps(rank).unwrap()).collect();
        let exchanges: Vec<_> = (0..ranks).map(|rank| ring.exchanges(rank).unwrap()).collect();
        // Sums are lists of (rank that computed it): each has to arrive exactly once.
        let mut sums: Vec<BTreeMap<u64, Vec<u64>>> = vec![BTreeMap::new(); ranks as usize];
        let mut bytes = vec![(0u128, 0u128); ranks as usize];
        for e in 0..=ranks as usize {
            for rank in 0..ranks as usize {
                if let Some(step) = steps[rank].get(e)
                    && (step.receive_from.is_some() || e == 0)
                {
                    let own = if step.pieces.is_empty() { vec![] } else { vec![rank as u64] };
                    sums[rank].entry(step.source).or_default().extend(own);
                }
            }
            let mut mail: BTreeMap<(u64, u64), Messages> = BTreeMap::new();
            for rank in 0..ranks {
                for &(to, source) in &exchanges[rank as usize][e].sends {
                    assert!(to != rank && source != rank);
                    let sum = sums[rank as usize].remove(&source).expect("a sum that is sent is there, and sent once");
                    mail.entry((rank, to)).or_default().push((source, sum));
                    let n = u128::from(ring.tokens(source)) * 10;
                    if rank / 3 == to / 3 { bytes[rank as usize].0 += n } else { bytes[rank as usize].1 += n }
                }
            }
            for rank in 0..ranks {
                for &(from, source) in &exchanges[rank as usize][e].receives {
                    let (of, sum) = mail.get_mut(&(from, rank)).expect("a message from there").remove(0);
                    assert_eq!(of, source, "order of two ranks' messages");
                    sums[rank as usize].entry(source).or_default().extend(sum);
                }
            }
            assert!(mail.values().all(Vec::is_empty), "{ring:?}: messages that nobody takes");
        }
        for rank in 0..ranks {
            let mut expected: Vec<u64> = (0..ranks)
                .filter(|&r| steps[r as usize].iter().any(|s| s.source == rank && !s.pieces.is_empty()))
                .collect();
            let left = std::mem::take(&mut sums[rank as usize]);
            assert!(left.keys().all(|&source| source == rank), "{ring:?}: {left:?}");
            let mut home = left.into_values().next().unwrap_or_default();
            home.sort_unstable();
            expected.sort_unstable();
            assert_eq!(home, expected, "{ring:?} rank {rank}");
        }
        let sent = ring.sent(3, TokenBytes { kv: 4, gradients: 10, ..Default::default() }).unwrap();
        for (s, b) in sent.iter().zip(bytes) {
            assert_eq!((s.backward_within - s.forward_within, s.backward_across - s.forward_across), b);
        }
    });
}

#[test]
fn full_rings_send_what_the_papers_say() {
    let bytes = TokenBytes { kv: 4096, gradients: 8192, ..Default::default() };
    for (inner, outer) in [(8, 1), (1, 8), (4, 2), (2, 4)] {
        let ring = Ring::new(Sharding::Zigzag, 1 << 20, inner, outer, true, vec![0]).unwrap();
        let block = u128::from((1u64 << 20) / 8);
        for s in ring.sent(inner, bytes).unwrap() {
            // A lap has inner - 1 hops and begins with one along the outer ring, but the first.
            let (within, across) = (u128::from(outer * (inner - 1)), u128::from(outer - 1));
            assert_eq!((s.forward_within, s.forward_across), (within * block * 4096, across * block * 4096));
            let home = (u128::from(if inner > 1 { outer * (inner - 1) } else { 0 }), across);
            assert_eq!(s.backward_within - s.forward_within, home.0 * block * 8192);
            assert_eq!(s.backward_across - s.forward_across, home.1 * block * 8192);
        }
    }
}

#[test]
fn a_causal_ring_of_contiguous_shards_sends_half() {
    let sent = |causal| -> u128 {
        let ring = Ring::new(Sharding::Contiguous, 1 << 16, 16, 1, causal, vec![0]).unwrap();
        ring.sent(16, TokenBytes { kv: 1, ..Default::default() }).unwrap().iter().map(|s| s.forward_within).sum()
    };
    assert_eq!(2 * sent(true), sent(false));
}

#[test]
fn zigzag_and_striped_are_even() {
    for ranks in [2u64, 3, 8, 13, 512] {
        for sharding in [Sharding::Zigzag, Sharding::Striped] {
            for length in [ranks << 16, (ranks << 16) + 12345] {
                let b = balance(sharding, length, ranks, true, &[0]).unwrap();
                assert!((1.0..1.001).contains(&b), "{sharding:?} {length} {ranks}: {b}");
            }
        }
        let b = balance(Sharding::Contiguous, ranks << 16, ranks, true, &[0]).unwrap();
        assert!((b - (2.0 - 1.0 / ranks as f64)).abs() < 1e-4, "{b}");
        assert_eq!(balance(Sharding::Contiguous, ranks << 16, ranks, false, &[0]).unwrap(), 1.0);
    }
}

#[test]
fn the_longest_sequences_do_not_overflow() {
    for sharding in SHARDINGS {
        for (inner, outer) in [(1, 1), (7, 3), (64, 8)] {
            let ranks = inner * outer;
            let total: u128 = (0..ranks).map(|rank| work(sharding, MAX_LENGTH, ranks, rank, true, &[0]).unwrap()).sum();
            let n = u128::from(MAX_LENGTH);
            assert_eq!(total, n * (n + 1) / 2);
            let ring = Ring::new(sharding, MAX_LENGTH, inner, outer, true, vec![0]).unwrap();
            let pairs =
                |rank| -> u128 { ring.steps(rank).unwrap().iter().flat_map(|s| &s.pieces).map(Piece::pairs).sum() };
            for rank in [0, ranks / 2, ranks - 1] {
                assert_eq!(pairs(rank), work(sharding, MAX_LENGTH, ranks, rank, true, &[0]).unwrap());
            }
            let most = TokenBytes { kv: u64::MAX, kv_group: u64::MAX, gradients: u64::MAX };
            assert_eq!(ring.sent(8, most).unwrap().len() as u64, ranks);
        }
    }
}

#[test]
fn whole_shards_are_one_piece() {
    let ring = Ring::new(Sharding::Zigzag, 64, 4, 1, true, vec![0]).unwrap();
    let piece = |q: (u64, u64), k: (u64, u64), causal| {
        vec![Piece { q_lo: q.0, q_hi: q.1, k_lo: k.0, k_hi: k.1, causal, q_start: 0 }]
    };
    let steps = ring.steps(1).unwrap();
    assert_eq!(steps[0].pieces, piece((0, 16), (0, 16), true)); // itself
    assert_eq!(steps[1].pieces, piece((0, 16), (0, 8), false)); // rank 0: all queries, its low chunk
    assert_eq!(steps[2].pieces, piece((8, 16), (0, 16), false)); // rank 3: high queries, all of it
}

#[test]
fn errors_name_the_value() {
    let text = |e: llama1m_ext::Error| e.to_string();
    assert_eq!(
        text("stripes".parse::<Sharding>().unwrap_err()),
        "sharding: expected contiguous, zigzag or striped, got \"stripes\""
    );
    assert_eq!(text(shard(Sharding::Striped, 8, 0, 0).unwrap_err()), "ranks: expected 1 to 4096, got 0");
    assert_eq!(text(shard(Sharding::Striped, 8, 4, 4).unwrap_err()), "rank: expected 0 to 3 of 4 ranks, got 4");
    assert!(
        text(shard(Sharding::Striped, MAX_LENGTH + 1, 4, 0).unwrap_err()).starts_with("length: expected 0 to 2^40")
    );
    assert!(text(documents_of(Some(vec![0, 5, 5]), 9).unwrap_err()).starts_with("documents[2]: expected"));
    assert!(text(documents_of(Some(vec![1]), 9).unwrap_err()).starts_with("documents[0]: expected 0"));
    assert!(
        text(documents_of(Some(vec![0, 9]), 9).unwrap_err()).starts_with("documents[1]: expected a position below")
    );
    assert!(text(documents_of(Some(vec![]), 9).unwrap_err()).starts_with("documents: expected"));
    let ring = |inner, outer| Ring::new(Sharding::Striped, 8, inner, outer, true, vec![0]);
    assert!(text(ring(0, 1).unwrap_err()).starts_with("inner: expected"));
    assert!(text(ring(1, 0).unwrap_err()).starts_with("outer: expected"));
    assert!(text(ring(1 << 10, 1 << 10).unwrap_err()).starts_with("inner x outer: expected at most 4096"));
    assert!(text(ring(2, 2).unwrap().steps(4).unwrap_err()).starts_with("rank: expected"));
    let many: Vec<u64> = (0..(1 << 16) + 1).collect();
    let packed = |sharding| Ring::new(sharding, 1 << 20, 64, 64, true, many.clone()).map(|_| ());
    let says = "documents: expected at most 65536 documents in striped shards of 4096 ranks, got 65537";
    assert_eq!(text(packed(Sharding::Striped).unwrap_err()), says);
    assert_eq!(text(balance(Sharding::Striped, 1 << 20, 4096, true, &many).unwrap_err()), says);
    packed(Sharding::Zigzag).unwrap();
    let bytes = TokenBytes { kv: 1, ..Default::default() };
    assert!(text(ring(2, 2).unwrap().sent(0, bytes).unwrap_err()).starts_with("per_node: expected"));
}
