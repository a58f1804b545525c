//! What attention over one sequence costs on a cluster, for one layout: seconds and bytes, by arithmetic.
//!
//! The model. A GPU sustains `flops`; a message takes `latency` and its bytes over the link. Work is even (zigzag or striped
//! shards), so a step of the ring takes the longer of its attention and its transfer, and a lap of the inner ring takes the longest of
//! its steps, of the transfer on the outer ring that it hides, and of what its messages ask of a kind of link together. Heads are
//! exchanged (DeepSpeed-Ulysses, 2309.14509) before and after, hidden by nothing. In the backward pass attention is 2.5 times the work
//! (Dao, 2307.08691), and the gradients of keys and values travel too, in float32. Not in the model: memory, other traffic, how the
//! speed of a kernel depends on its lengths, messages that are delayed by others elsewhere in the network.

use crate::error::{Error, Result};

/// Backward over forward work.
const BACKWARD: f64 = 2.5;
/// Bytes of an element of a gradient on its way.
const GRADIENT: u64 = 4;
/// Most GPUs.
pub const MAX_GPUS: u64 = 1 << 15;

/// GPUs and the links between them.
#[derive(Debug, Clone, Copy)]
pub struct Cluster {
    /// Nodes; GPUs `n x gpus ..` are node n.
    pub nodes: u64,
    /// GPUs of a node.
    pub gpus: u64,
    /// Bytes/s that a GPU sends to others of its node, while it receives as much.
    pub intra: f64,
    /// Bytes/s that one link of a node carries to other nodes, and as much back.
    pub inter: f64,
    /// Such links of a node; one message uses one of them.
    pub rails: u64,
    /// Seconds that a message takes beside its bytes.
    pub latency: f64,
    /// FLOP/s that a GPU sustains in attention.
    pub flops: f64,
}

/// One layer's attention over one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Tokens.
    pub length: u64,
    /// Query heads.
    pub q_heads: u64,
    /// Heads of keys and values, dividing `q_heads`.
    pub kv_heads: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Bytes of an element.
    pub itemsize: u64,
    /// Whether a query sees no later key.
    pub causal: bool,
}

/// GPU = (outer rank x inner + inner rank) x heads + place among those that share heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Layout {
    /// Degree of head parallelism.
    pub heads: u64,
    /// Ranks of the inner ring.
    pub inner: u64,
    /// Ranks of the outer ring.
    pub outer: u64,
}

/// One pass, forward or backward.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pass {
    /// In all.
    pub seconds: f64,
    /// Of these, attention itself.
    pub compute: f64,
    /// Exchanging heads.
    pub exchange: f64,
    /// Bytes that all GPUs together send within nodes.
    pub within: u128,
    /// And across nodes.
    pub across: u128,
    /// The ring's share of `within`.
    pub ring_within: u128,
    /// The ring's share of `across`.
    pub ring_across: u128,
}

/// A layout and what it costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Which.
    pub layout: Layout,
    /// Forward.
    pub forward: Pass,
    /// Backward, without the recomputation of anything.
    pub backward: Pass,
    /// Heads of keys and values that GPUs hold, over `kv_heads`: above 1 where some are held twice.
    pub replication: f64,
    /// Messages that a GPU sends in a forward pass.
    pub messages: u64,
}

/// A kind of message that every GPU sends at the same time.
#[derive(Debug, Clone, Copy)]
struct Hop {
    /// GPUs whose message stays in the node, and others.
    staying: u64,
    leaving: u64,
    /// The most that leave one node.
    crowd: u64,
}

impl Cluster {
    /// All GPUs.
    pub fn ranks(&self) -> u64 {
        self.nodes * self.gpus
    }

    /// # Errors
    /// A number that is none of what its field says.
    pub fn check(&self) -> Result<()> {
        for (name, n) in [("nodes", self.nodes), ("gpus", self.gpus), ("rails", self.rails)] {
            if n == 0 || n > MAX_GPUS {
                return Err(Error::value(name, format!("1 to {MAX_GPUS}"), n));
            }
        }
        if self.ranks() > MAX_GPUS {
            return Err(Error::value("nodes x gpus", format!("at most {MAX_GPUS} GPUs"), self.ranks()));
        }
        for (name, x) in [("intra", self.intra), ("inter", self.inter), ("flops", self.flops)] {
            if !(1.0..=1e21).contains(&x) {
                return Err(Error::value(name, "a rate from 1 to 1e21 a second", x));
            }
        }
        if !(0.0..=3600.0).contains(&self.latency) {
            return Err(Error::value("latency", "0 to 3600 seconds", self.latency));
        }
        Ok(())
    }

    /// The message of every GPU to the same place of another ring rank.
    fn hop(&self, heads: u64, to: impl Fn(u64) -> u64) -> Hop {
        let mut leaving = vec![0u64; self.nodes as usize];
        for gpu in 0..self.ranks() {
            let other = to(gpu / heads) * heads + gpu % heads;
            if other / self.gpus != gpu / self.gpus {
                leaving[(gpu / self.gpus) as usize] += 1;
            }
        }
        let all: u64 = leaving.iter().sum();
        Hop { staying: self.ranks() - all, leaving: all, crowd: leaving.into_iter().max().unwrap_or(0) }
    }

    /// Seconds of bytes within a node, without latency.
    fn inside(&self, hop: &Hop, bytes: f64) -> f64 {
        if hop.staying > 0 { bytes / self.intra } else { 0.0 }
    }

    /// Seconds of a message of so many bytes from each GPU that sends to another node: one takes one link, many share them.
    fn between(&self, crowd: u64, bytes: f64) -> f64 {
        if crowd == 0 { 0.0 } else { bytes / self.inter * (crowd as f64 / self.rails as f64).max(1.0) }
    }
}

impl Work {
    /// # Errors
    /// A number that is none of what its field says.
    pub fn check(&self) -> Result<()> {
        if self.length == 0 || self.length > super::MAX_LENGTH {
            return Err(Error::value("length", "1 to 2^40", self.length));
        }
        for (name, n) in [("q_heads", self.q_heads), ("kv_heads", self.kv_heads)] {
            if n == 0 || n > 1 << 16 {
                return Err(Error::value(name, "1 to 65536", n));
            }
        }
        if !self.q_heads.is_multiple_of(self.kv_heads) {
            return Err(Error::value("kv_heads", format!("a divisor of q_heads={}", self.q_heads), self.kv_heads));
        }
        if self.head_dim == 0 || self.head_dim > 1 << 16 {
            return Err(Error::value("head_dim", "1 to 65536", self.head_dim));
        }
        if self.itemsize == 0 || self.itemsize > 8 {
            return Err(Error::value("itemsize", "1 to 8 bytes", self.itemsize));
        }
        Ok(())
    }

    /// Heads of keys and values that the queries of place `of` among `heads` need.
    fn kv_of(&self, heads: u64, of: u64) -> u64 {
        let (own, group) = (self.q_heads / heads, self.q_heads / self.kv_heads);
        ((of + 1) * own - 1) / group - of * own / group + 1
    }

    /// Visible pairs of one head.
    fn pairs(&self) -> f64 {
        let n = self.length as f64;
        if self.causal { n * (n + 1.0) / 2.0 } else { n * n }
    }

    /// Floating-point operations of the forward pass.
    pub fn flops(&self) -> f64 {
        4.0 * (self.q_heads * self.head_dim) as f64 * self.pairs()
    }
}

/// What a layout costs. Shards are taken to be even: `ceil(length / GPUs)` tokens for each.
///
/// # Errors
/// Arguments that [`Cluster::check`] or [`Work::check`] refuse; a layout that is not of these GPUs and heads.
pub fn cost(cluster: &Cluster, work: &Work, layout: Layout) -> Result<Cost> {
    cluster.check()?;
    work.check()?;
    let Layout { heads, inner, outer } = layout;
    let all = u128::from(heads) * u128::from(inner) * u128::from(outer);
    if all != u128::from(cluster.ranks()) {
        let expected = format!("heads x inner x outer of {} GPUs", cluster.ranks());
        return Err(Error::value("layout", expected, format!("{heads} x {inner} x {outer}")));
    }
    if !work.q_heads.is_multiple_of(heads) {
        return Err(Error::value("heads", format!("a divisor of q_heads={}", work.q_heads), heads));
    }
    if !cluster.gpus.is_multiple_of(heads) && !heads.is_multiple_of(cluster.gpus) {
        let expected = format!("a divisor or a multiple of {} GPUs of a node", cluster.gpus);
        return Err(Error::value("heads", expected, heads));
    }
    let held: u64 = (0..heads).map(|of| work.kv_of(heads, of)).sum();
    let most = (0..heads).map(|of| work.kv_of(heads, of)).max().unwrap_or(1);
    let tokens = work.length.div_ceil(cluster.ranks());
    let costs = Costs {
        cluster,
        work,
        layout,
        held,
        most,
        tokens,
        turn: cluster.hop(heads, |r| r / inner * inner + (r + 1) % inner),
        lap: cluster.hop(heads, |r| (r + inner) % (inner * outer)),
    };
    let messages = outer * (inner - 1) + outer - 1 + 2 * (heads - 1);
    let replication = held as f64 / work.kv_heads as f64;
    Ok(Cost { layout, forward: costs.pass(false), backward: costs.pass(true), replication, messages })
}

struct Costs<'a> {
    cluster: &'a Cluster,
    work: &'a Work,
    layout: Layout,
    /// KV heads of all places together, and of the one that has most.
    held: u64,
    most: u64,
    /// Of a GPU's shard, before heads are exchanged.
    tokens: u64,
    turn: Hop,
    lap: Hop,
}

impl Costs<'_> {
    fn pass(&self, backward: bool) -> Pass {
        let (c, w, Layout { heads, inner, outer }) = (self.cluster, self.work, self.layout);
        let share = w.flops() / c.ranks() as f64 / c.flops;
        let compute = if backward { BACKWARD * share } else { share };
        let step = compute / (inner * outer) as f64;

        // A block: the tokens of all that share heads, the heads of one of them.
        let element = if backward { w.itemsize + GRADIENT } else { w.itemsize };
        let token = 2 * w.head_dim * element;
        let block = (self.tokens * heads * self.most * token) as f64;
        let hop = |h: &Hop| c.inside(h, block).max(c.between(h.crowd, block));
        let (turn, lap) = (hop(&self.turn) + c.latency, hop(&self.lap) + c.latency);
        let turns = (inner - 1) as f64;
        let steps = turns * step.max(turn) + step;
        let together = |f: &dyn Fn(&Hop) -> f64| turns * f(&self.turn) + f(&self.lap);
        let load = together(&|h| c.inside(h, block)).max(together(&|h| c.between(h.crowd, block)));
        let mut ring = (outer - 1) as f64 * steps.max(lap).max(load) + steps;
        if backward {
            // The last sums go home after the last step.
            let home = self.tokens as f64 * (heads * self.most * 2 * w.head_dim * GRADIENT) as f64;
            let last = |h: &Hop| c.inside(h, home).max(c.between(h.crowd, home)) + c.latency;
            ring += if inner > 1 { last(&self.turn) } else { 0.0 };
            ring += if outer > 1 { last(&self.lap) } else { 0.0 };
        }

        let (exchange, mut within, mut across) = self.exchange(backward);
        let bytes = u128::from(self.tokens * heads) * u128::from(self.held * token) / u128::from(heads);
        let sent = |gpus: fn(&Hop) -> u64| {
            let hops = |h: &Hop, n: u64| u128::from(gpus(h)) * u128::from(n) * bytes;
            hops(&self.turn, outer * (inner - 1)) + hops(&self.lap, outer - 1)
        };
        let (ring_within, ring_across) = (sent(|h| h.staying), sent(|h| h.leaving));
        within += ring_within;
        across += ring_across;
        Pass { seconds: exchange + ring, compute, exchange, within, across, ring_within, ring_across }
    }

    /// Heads against tokens among those that share heads, before and after: (seconds, bytes within nodes, bytes across).
    fn exchange(&self, backward: bool) -> (f64, u128, u128) {
        let (c, w, heads) = (self.cluster, self.work, self.layout.heads);
        let token = |elements: u64, size: u64| self.tokens * elements * w.head_dim * size;
        let q = w.q_heads / heads;
        // Bytes that a GPU sends to place `of`, and that place `of` sends to each, one after the other.
        let there =
            |of: u64| token(q, w.itemsize) + if backward { 0 } else { token(2 * w.kv_of(heads, of), w.itemsize) };
        let back = |of: u64| token(q, w.itemsize) + if backward { token(2 * w.kv_of(heads, of), GRADIENT) } else { 0 };
        let (near, far) = (heads.min(c.gpus) - 1, heads - heads.min(c.gpus));
        let most = (0..heads).map(|of| there(of).max(back(of))).max().unwrap_or(0) as f64;
        let mean = (0..heads).map(|of| u128::from(there(of) + back(of))).sum::<u128>() / u128::from(heads);
        let seconds = if heads == 1 {
            0.0
        } else {
            let wire = (near as f64 * most / c.intra).max(far as f64 * c.between(c.gpus, most));
            2.0 * (wire + (heads - 1) as f64 * c.latency)
        };
        let gpus = u128::from(c.ranks());
        (seconds, gpus * u128::from(near) * mean, gpus * u128::from(far) * mean)
    }
}
