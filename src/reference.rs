//! Float64 attention, one row at a time: slow, obvious, and the judge of every engine.

use crate::args::Problem;

/// `(out, lse)` of query `i` of query head `h` of batch row `b`, all arithmetic in float64.
/// `out` has head_dim elements; a row that sees no key gives zeros and -inf.
pub fn attention_row(p: &Problem, b: usize, h: usize, i: usize) -> (Vec<f64>, f64) {
    let (lo, hi) = p.visible(b, i);
    let kv_head = h / p.group;
    let q: Vec<f64> = (0..p.head_dim).map(|d| f64::from(p.q.get(b, h, i, d))).collect();
    let scores: Vec<f64> = (lo..hi)
        .map(|j| {
            let dot: f64 = q.iter().enumerate().map(|(d, x)| x * p.kv.get(b, kv_head, j, d).0).sum();
            dot * p.softmax_scale
        })
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; p.head_dim];
    if scores.is_empty() {
        return (out, f64::NEG_INFINITY);
    }
    let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
    for (s, j) in scores.iter().zip(lo..hi) {
        let w = (s - top).exp() / sum;
        for (d, o) in out.iter_mut().enumerate() {
            *o += w * p.kv.get(b, kv_head, j, d).1;
        }
    }
    (out, top + sum.ln())
}
