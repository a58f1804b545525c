//! Partials merged are the same as one pass, in any order and grouping.

mod common;

use common::Rng;
use half::bf16;
use llama1m_ext::attention::attention_forward;
use llama1m_ext::cpu::merge::merge_partials;
use llama1m_ext::{AttnArgs, Context, KvRef, TensorMut, TensorRef};

const Q: usize = 20;
const D: usize = 64;

fn part(q: &[f32], k: &[f32], v: &[f32], scale: f64) -> (Vec<f32>, Vec<f32>) {
    let n = k.len() / D;
    let (mut out, mut lse) = (vec![f32::NAN; Q * D], vec![f32::NAN; Q]);
    let args = AttnArgs {
        q: TensorRef::dense("q", q, [1, 1, Q, D]).unwrap(),
        kv: KvRef::dense(
            TensorRef::dense("k", k, [1, 1, n, D]).unwrap(),
            TensorRef::dense("v", v, [1, 1, n, D]).unwrap(),
        )
        .unwrap(),
        out: TensorMut::dense("out", &mut out, [1, 1, Q, D]).unwrap(),
        lse: Some(TensorMut::dense("lse", &mut lse, [1, 1, Q, 1]).unwrap()),
        causal: false,
        softmax_scale: Some(scale),
        q_start: None,
        kv_start: None,
        kv_end: None,
    };
    attention_forward(args, &Context::new(1)).unwrap();
    (out, lse)
}

fn join(parts: &[(Vec<f32>, Vec<f32>)]) -> (Vec<f32>, Vec<f32>) {
    let outs: Vec<_> = parts.iter().map(|p| TensorRef::dense("out", &p.0, [1, 1, Q, D]).unwrap()).collect();
    let lses: Vec<_> = parts.iter().map(|p| TensorRef::dense("lse", &p.1, [1, 1, Q, 1]).unwrap()).collect();
    let (mut out, mut lse) = (vec![f32::NAN; Q * D], vec![f32::NAN; Q]);
    let o = TensorMut::dense("out", &mut out, [1, 1, Q, D]).unwrap();
    let s = TensorMut::dense("lse", &mut lse, [1, 1, Q, 1]).unwrap();
    merge_partials(&outs, &lses, o, Some(s), &Context::new(2)).unwrap();
    (out, lse)
}

fn close(a: &[f32], b: &[f32]) {
    close_by(a, b, 2e-6);
}

fn close_by(a: &[f32], b: &[f32], tolerance: f32) {
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!(x == y || (x - y).abs() < tolerance * (1.0 + y.abs()), "{i}: {x} {y}");
    }
}

#[test]
fn splits_merge_to_the_whole_in_any_order() {
    let mut rng = Rng(7);
    // At scale 4 scores reach 100, whose rounding in float32 moves probabilities by 1e-5.
    for (scale, tolerance) in [(0.125, 2e-6), (4.0, 3e-5)] {
        let (q, k, v) = (rng.normals(Q * D), rng.normals(300 * D), rng.normals(300 * D));
        let whole = part(&q, &k, &v, scale);
        let cuts = [0, 1, 90, 91, 200, 300];
        let mut parts: Vec<_> =
            cuts.windows(2).map(|w| part(&q, &k[w[0] * D..w[1] * D], &v[w[0] * D..w[1] * D], scale)).collect();
        let once = join(&parts);
        close_by(&once.0, &whole.0, tolerance);
        close_by(&once.1, &whole.1, tolerance);
        parts.reverse();
        close_by(&join(&parts).0, &whole.0, tolerance);
        // ((a b) (c d e)) = whole: associative.
        let (left, right) = (join(&parts[..2]), join(&parts[2..]));
        close_by(&join(&[left, right]).0, &whole.0, tolerance);
    }
}

#[test]
fn an_empty_partial_is_not_read() {
    let mut rng = Rng(8);
    let (q, k, v) = (rng.normals(Q * D), rng.normals(50 * D), rng.normals(50 * D));
    let real = part(&q, &k, &v, 0.125);
    let empty = (vec![f32::NAN; Q * D], vec![f32::NEG_INFINITY; Q]);
    let joined = join(&[empty.clone(), real.clone(), empty.clone()]);
    close(&joined.0, &real.0);
    close(&joined.1, &real.1);
    let none = join(&[empty.clone(), empty]);
    assert!(none.0.iter().all(|x| *x == 0.0) && none.1.iter().all(|x| *x == f32::NEG_INFINITY));
}

#[test]
fn far_apart_partials_do_not_overflow() {
    let a = (vec![1.0f32; Q * D], vec![300.0f32; Q]);
    let b = (vec![9.0f32; Q * D], vec![-300.0f32; Q]);
    let joined = join(&[b, a]);
    assert!(joined.0.iter().all(|x| *x == 1.0) && joined.1.iter().all(|x| *x == 300.0));
}

#[test]
fn shapes_and_dtypes_are_checked() {
    let x = vec![0.0f32; Q * D];
    let h = vec![bf16::ZERO; Q];
    let s = vec![0.0f32; Q];
    let view = TensorRef::dense("out", &x, [1, 1, Q, D]).unwrap();
    let sums = TensorRef::dense("lse", &s, [1, 1, Q, 1]).unwrap();
    let half = TensorRef::dense("lse", &h, [1, 1, Q, 1]).unwrap();
    let short = TensorRef::dense("lse", &s, [1, 1, Q - 1, 1]).unwrap();
    let mut y = vec![0.0f32; Q * D];
    let mut go = |outs: &[TensorRef], lses: &[TensorRef]| {
        let out = TensorMut::dense("out", &mut y, [1, 1, Q, D]).unwrap();
        merge_partials(outs, lses, out, None, &Context::new(1)).map_err(|e| e.to_string())
    };
    assert!(go(&[view], &[sums]).is_ok());
    assert!(go(&[], &[]).unwrap_err().contains("lses"));
    assert!(go(&[view, view], &[sums]).unwrap_err().contains("outs has 2"));
    assert!(go(&[view], &[half]).unwrap_err().contains("bfloat16"));
    assert!(go(&[view], &[short]).unwrap_err().contains("lses[0]"));
    assert!(go(&[view, sums], &[sums, sums]).unwrap_err().contains("outs[1]"));
}
