//! Float64 attention and its gradients, one row at a time: slow, obvious, and the judge of every engine.

use crate::args::Scores;
use crate::gradients::Gradients;

/// `(out, lse)` of query `i` of query head `h` of batch row `b`, all arithmetic in float64.
/// `out` has head_dim elements; a row that sees no key gives zeros and -inf.
pub fn attention_row(p: &Scores, b: usize, h: usize, i: usize) -> (Vec<f64>, f64) {
    let (lo, hi) = p.visible(b, i);
    let head = Head::new(p, b, h / p.group, lo, hi);
    let (weights, lse) = head.weights(p, b, h, i);
    let mut out = vec![0.0; p.head_dim];
    for (w, v) in weights.iter().zip(&head.v) {
        for (o, x) in out.iter_mut().zip(v) {
            *o += w * x;
        }
    }
    (out, lse)
}

/// Gradients of q `[batch, q_heads, q_len, head_dim]` and of k and v `[batch, kv_heads, kv_len, head_dim]`, contiguous, from
/// q, k, v and the gradients of out and lse: what the forward pass left is not looked at.
pub fn attention_backward(g: &Gradients) -> [Vec<f64>; 3] {
    let p = &g.scores;
    let d = p.head_dim;
    let mut dq = vec![0.0; p.batch * p.q_heads * p.q_len * d];
    let mut dk = vec![0.0; p.batch * p.kv_heads * p.kv_len * d];
    let mut dv = dk.clone();
    for (b, h) in (0..p.batch).flat_map(|b| (0..p.q_heads).map(move |h| (b, h))) {
        if p.q_len == 0 {
            continue;
        }
        // The last query sees all that the others see.
        let (lo, hi) = p.visible(b, p.q_len - 1);
        let head = Head::new(p, b, h / p.group, lo, hi);
        for i in 0..p.q_len {
            let (weights, _) = head.weights(p, b, h, i);
            let row: Vec<f64> = (0..d).map(|e| f64::from(g.grad_out.get(b, h, i, e))).collect();
            let q: Vec<f64> = (0..d).map(|e| f64::from(p.q.get(b, h, i, e))).collect();
            // The gradient of each weight, and its mean under the weights.
            let dp: Vec<f64> = weights.iter().zip(&head.v).map(|(_, v)| dot(&row, v)).collect();
            let mean = dot(&weights, &dp);
            let of_lse = g.grad_lse.as_ref().map_or(0.0, |l| f64::from(l.get(b, h, i, 0)));
            let at_q = ((b * p.q_heads + h) * p.q_len + i) * d;
            for (j, (w, x)) in weights.iter().zip(&dp).enumerate() {
                let ds = w * (x - mean + of_lse) * p.softmax_scale;
                let at_k = ((b * p.kv_heads + h / p.group) * p.kv_len + lo + j) * d;
                for e in 0..d {
                    dq[at_q + e] += ds * head.k[j][e];
                    dk[at_k + e] += ds * q[e];
                    dv[at_k + e] += w * row[e];
                }
            }
        }
    }
    [dq, dk, dv]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Keys and values of a head from some token on.
struct Head {
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
}

impl Head {
    fn new(p: &Scores, b: usize, kv_head: usize, lo: usize, hi: usize) -> Self {
        let row = |j: usize| -> (Vec<f64>, Vec<f64>) { (0..p.head_dim).map(|d| p.kv.get(b, kv_head, j, d)).unzip() };
        let (k, v) = (lo..hi).map(row).unzip();
        Self { k, v }
    }

    /// Softmax of the scores of one query over the keys that it sees, and the log-sum-exp.
    fn weights(&self, p: &Scores, b: usize, h: usize, i: usize) -> (Vec<f64>, f64) {
        let (lo, hi) = p.visible(b, i);
        let q: Vec<f64> = (0..p.head_dim).map(|d| f64::from(p.q.get(b, h, i, d))).collect();
        let scores: Vec<f64> = self.k[..hi - lo].iter().map(|k| dot(&q, k) * p.softmax_scale).collect();
        if scores.is_empty() {
            return (scores, f64::NEG_INFINITY);
        }
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        (scores.iter().map(|s| (s - top).exp() / sum).collect(), top + sum.ln())
    }
}
