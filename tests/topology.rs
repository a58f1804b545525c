//! Predicted costs of layouts against a cluster that is simulated, message by message, and against schedules; the choice against every
//! other layout.

mod common;

use common::Rng;
use llama1m_ext::ring::{Cluster, Cost, Layout, Ring, Sharding, TokenBytes, Work, cost, layouts};

fn llama(length: u64) -> Work {
    Work { length, q_heads: 32, kv_heads: 8, head_dim: 128, itemsize: 2, causal: true }
}

fn cluster(nodes: u64, gpus: u64) -> Cluster {
    Cluster { nodes, gpus, intra: 12e9, inter: 2.4e9, rails: 1, latency: 2e-5, flops: 170e12 }
}

/// Seconds of a forward pass where every rank goes on as soon as it can: no rank waits for all others.
fn simulated(c: &Cluster, w: &Work, Layout { heads, inner, outer }: Layout) -> f64 {
    let ranks = (inner * outer) as usize;
    let (own, group) = (w.q_heads / heads, w.q_heads / w.kv_heads);
    // KV heads that a place needs, counted one by one.
    let kv = |of: u64| (0..w.kv_heads).filter(|h| (of * own..(of + 1) * own).any(|q| q / group == *h)).count() as u64;
    let most = (0..heads).map(kv).max().unwrap();
    let tokens = w.length.div_ceil(c.nodes * c.gpus);
    let block = (tokens * heads * most * 2 * w.head_dim * w.itemsize) as f64;
    let node = |rank: usize, place: u64| (rank as u64 * heads + place) / c.gpus;
    let leaves = |from: usize, to: usize| (0..heads).filter(|&p| node(from, p) != node(to, p)).count() as u64;
    let inner_next = |r: usize| r / inner as usize * inner as usize + (r + 1) % inner as usize;
    let outer_next = |r: usize| (r + inner as usize) % ranks;
    let duration = |to: &dyn Fn(usize) -> usize, r: usize| {
        let mut crowd = vec![0; c.nodes as usize];
        for from in 0..ranks {
            for p in (0..heads).filter(|&p| node(from, p) != node(to(from), p)) {
                crowd[node(from, p) as usize] += 1;
            }
        }
        let most = *crowd.iter().max().unwrap() as f64;
        let wire =
            if leaves(r, to(r)) > 0 { block / (c.inter * (c.rails as f64 / most).min(1.0)) } else { block / c.intra };
        wire + c.latency
    };
    let turn: Vec<f64> = (0..ranks).map(|r| duration(&inner_next, r)).collect();
    let lap: Vec<f64> = (0..ranks).map(|r| duration(&outer_next, r)).collect();
    let n = w.length as f64;
    let pairs = if w.causal { n * (n + 1.0) / 2.0 } else { n * n };
    let compute = 4.0 * pairs * (own * w.head_dim) as f64 / (ranks * ranks) as f64 / c.flops;

    let mut arrival = vec![vec![0.0f64; ranks]; ranks];
    let (mut end, mut turn_free, mut lap_free) = (vec![0.0f64; ranks], vec![0.0f64; ranks], vec![0.0f64; ranks]);
    for t in 0..ranks {
        for r in 0..ranks {
            let start = end[r].max(arrival[r][t]);
            end[r] = start + compute;
            if !(t as u64 + 1).is_multiple_of(inner) {
                turn_free[r] = turn_free[r].max(start) + turn[r];
                arrival[inner_next(r)][t + 1] = turn_free[r];
            }
            if (t as u64).is_multiple_of(inner) && t + (inner as usize) < ranks {
                lap_free[r] = lap_free[r].max(start) + lap[r];
                arrival[outer_next(r)][t + inner as usize] = lap_free[r];
            }
        }
    }
    end.into_iter().fold(0.0, f64::max)
}

fn ring_seconds(c: &Cost) -> f64 {
    c.forward.seconds - c.forward.exchange
}

#[test]
fn predictions_are_those_of_a_simulated_cluster() {
    let mut rng = Rng(5);
    for _ in 0..60 {
        let (nodes, gpus) = (rng.pick(&[1, 2, 3, 4, 8]), rng.pick(&[1, 2, 4, 6, 8]));
        let c = Cluster {
            intra: rng.pick(&[6e9, 12e9, 100e9]),
            inter: rng.pick(&[0.3e9, 2.4e9, 25e9]),
            rails: rng.pick(&[1, 2, 8]),
            latency: rng.pick(&[0.0, 2e-5, 1e-3]),
            ..cluster(nodes, gpus)
        };
        let w = Work {
            kv_heads: rng.pick(&[1, 2, 8, 32]),
            causal: rng.pick(&[true, false]),
            ..llama(rng.pick(&[1 << 12, 1 << 16, 1 << 18, 1 << 20]) / (nodes * gpus) * nodes * gpus)
        };
        for found in layouts(&c, &w, false).unwrap() {
            let Layout { heads, inner, outer } = found.layout;
            // Two rings over the same links delay each other; the simulation has a link for each.
            let mixed = inner > 1 && outer > 1 && !(c.gpus.is_multiple_of(inner * heads) && c.gpus == inner * heads);
            if mixed {
                continue;
            }
            let (real, predicted) = (simulated(&c, &w, found.layout), ring_seconds(&found));
            assert!(
                (0.9..1.0 + 1e-9).contains(&(real / predicted)),
                "{c:?} {w:?} {:?}: {real} s, predicted {predicted}",
                found.layout
            );
        }
    }
}

#[test]
fn nothing_is_faster_than_the_choice() {
    let mut rng = Rng(6);
    for _ in 0..100 {
        let (nodes, gpus) = (rng.pick(&[1, 2, 3, 4, 16]), rng.pick(&[1, 2, 3, 4, 8]));
        let c = Cluster { rails: rng.pick(&[1, 4]), inter: rng.pick(&[0.3e9, 50e9]), ..cluster(nodes, gpus) };
        let w = Work { q_heads: 24, kv_heads: rng.pick(&[1, 3, 8, 24]), ..llama(rng.pick(&[1 << 14, 1 << 20])) };
        for training in [false, true] {
            let found = layouts(&c, &w, training).unwrap();
            let seconds = |x: &Cost| x.forward.seconds + if training { x.backward.seconds } else { 0.0 };
            let mut count = 0;
            for heads in 1..=24 {
                for inner in 1..=nodes * gpus {
                    for outer in 1..=nodes * gpus {
                        let layout = Layout { heads, inner, outer };
                        let Ok(one) = cost(&c, &w, layout) else { continue };
                        count += 1;
                        assert!(found.contains(&one), "{layout:?} is missing");
                        assert!(seconds(&found[0]) <= seconds(&one) * 1.02, "{layout:?} beats {:?}", found[0].layout);
                    }
                }
            }
            assert_eq!(count, found.len());
            assert!(found[1..].windows(2).all(|pair| seconds(&pair[0]) <= seconds(&pair[1])));
        }
    }
}

#[test]
fn bytes_are_those_of_the_schedule() {
    for (nodes, gpus) in [(1, 4), (2, 4), (4, 2), (3, 6)] {
        let c = cluster(nodes, gpus);
        let w = llama(nodes * gpus * 64);
        for found in layouts(&c, &w, true).unwrap() {
            let Layout { heads, inner, outer } = found.layout;
            // A rank of the ring is all GPUs that share heads; where these fill several nodes, every message leaves its node.
            let per_node = (gpus / heads).max(1);
            let ring = Ring::new(Sharding::Zigzag, w.length, inner, outer, true, vec![0]).unwrap();
            let held = (8.0 * found.replication) as u64;
            let bytes = TokenBytes { kv: 2 * held * 128 * 2, gradients: 2 * held * 128 * 4, ..Default::default() };
            let sent = ring.sent(per_node, bytes).unwrap();
            let total = |of: fn(&llama1m_ext::ring::Sent) -> u128| sent.iter().map(of).sum::<u128>();
            let forward = (total(|s| s.forward_within), total(|s| s.forward_across));
            assert_eq!((found.forward.ring_within, found.forward.ring_across), forward, "{:?}", found.layout);
            let backward = (total(|s| s.backward_within), total(|s| s.backward_across));
            assert_eq!((found.backward.ring_within, found.backward.ring_across), backward, "{:?}", found.layout);
        }
    }
}

#[test]
fn heads_that_are_exchanged_are_counted_one_by_one() {
    let c = cluster(2, 4);
    for (q_heads, kv_heads) in [(32, 8), (8, 2), (8, 1), (12, 3), (24, 8)] {
        let w = Work { q_heads, kv_heads, length: 8 * 16, ..llama(1) };
        for found in layouts(&c, &w, true).unwrap() {
            let heads = found.layout.heads;
            let (own, group) = (q_heads / heads, q_heads / kv_heads);
            let (mut within, mut across, mut held) = ([0u64; 2], [0u64; 2], 0);
            let needs =
                |of: u64| (0..kv_heads).filter(|h| (of * own..(of + 1) * own).any(|q| q / group == *h)).count() as u64;
            for gpu in 0..8 {
                let first = gpu / heads * heads;
                if gpu < heads {
                    held += needs(gpu);
                }
                for other in (first..first + heads).filter(|&o| o != gpu) {
                    // 16 tokens: q, k, v there and out back; backward out's gradient there, those of q, k, v back.
                    let kv = needs(other - first);
                    let forward = 16 * 128 * (2 * own + 2 * 2 * kv + 2 * own);
                    let backward = 16 * 128 * (2 * own + 2 * own + 4 * 2 * kv);
                    let to = if gpu / 4 == other / 4 { &mut within } else { &mut across };
                    to[0] += forward;
                    to[1] += backward;
                }
            }
            assert_eq!(found.replication, held as f64 / kv_heads as f64);
            for (i, pass) in [found.forward, found.backward].iter().enumerate() {
                assert_eq!(pass.within - pass.ring_within, u128::from(within[i]), "{w:?} {:?}", found.layout);
                assert_eq!(pass.across - pass.ring_across, u128::from(across[i]), "{w:?} {:?}", found.layout);
            }
        }
    }
}

#[test]
fn slow_links_and_several_of_them_ask_for_a_double_ring() {
    // Forward, 524,288 tokens on 4 nodes of 8: one message at a time leaves a node of a plain ring, eight leave one of a double ring.
    let seconds =
        |rails, layout| cost(&Cluster { rails, ..cluster(4, 8) }, &llama(1 << 19), layout).unwrap().forward.seconds;
    let plain = Layout { heads: 1, inner: 32, outer: 1 };
    let double = Layout { heads: 1, inner: 8, outer: 4 };
    assert!(seconds(4, plain) == seconds(1, plain));
    assert!(seconds(4, plain) > 1.5 * seconds(4, double));
    // Over one link: 3 x 8 blocks leave each node instead of 31, and that is all.
    assert!((0.7..1.0).contains(&(seconds(1, double) / seconds(1, plain))));
}

#[test]
fn errors_name_the_value() {
    let wrong = |c: Cluster, w: Work| layouts(&c, &w, false).unwrap_err().to_string();
    let (c, w) = (cluster(2, 4), llama(1 << 16));
    assert_eq!(wrong(Cluster { nodes: 0, ..c }, w), "nodes: expected 1 to 32768, got 0");
    assert!(
        wrong(Cluster { nodes: 1 << 15, ..c }, w).starts_with("nodes x gpus: expected at most 32768 GPUs, got 131072")
    );
    assert!(wrong(Cluster { intra: 0.0, ..c }, w).starts_with("intra: expected a rate"));
    assert!(wrong(Cluster { inter: f64::NAN, ..c }, w).starts_with("inter: expected a rate"));
    assert!(wrong(Cluster { flops: f64::INFINITY, ..c }, w).starts_with("flops: expected a rate"));
    assert!(wrong(Cluster { latency: -1.0, ..c }, w).starts_with("latency: expected 0 to 3600 seconds, got -1"));
    assert!(wrong(c, Work { kv_heads: 5, ..w }).starts_with("kv_heads: expected a divisor of q_heads=32, got 5"));
    assert!(wrong(c, Work { length: 0, ..w }).starts_with("length: expected 1 to 2^40"));
    assert!(wrong(c, Work { head_dim: 0, ..w }).starts_with("head_dim: expected"));
    assert!(wrong(c, Work { itemsize: 9, ..w }).starts_with("itemsize: expected"));
    let layout = |heads, inner, outer| cost(&c, &w, Layout { heads, inner, outer }).unwrap_err().to_string();
    assert_eq!(layout(1, 4, 4), "layout: expected heads x inner x outer of 8 GPUs, got 1 x 4 x 4");
    assert!(cost(&cluster(3, 2), &Work { q_heads: 32, ..w }, Layout { heads: 3, inner: 2, outer: 1 }).is_err());
}

#[test]
fn the_largest_clusters_answer() {
    let c = cluster(4096, 8);
    let w = Work { length: 1 << 40, ..llama(1) };
    let found = layouts(&c, &w, true).unwrap();
    assert!(found.iter().all(|x| x.forward.seconds.is_finite() && x.layout.heads >= 8));
}
