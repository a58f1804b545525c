//! The backward pass against the float64 reference, and the reference against finite differences.
//! The whole file runs once per instruction-set level in CI (`LLAMA1M_ISA`).

mod common;

use common::{Case, Real, Rng};
use half::{bf16, f16};
use llama1m_ext::attention::{attention_backward, attention_forward};
use llama1m_ext::gradients::Gradients;
use llama1m_ext::reference;
use llama1m_ext::{AttnArgs, BackwardArgs, Context, KvRef, TensorMut, TensorRef};

/// The numbers of a call, in memory that is NaN wherever nothing may be read.
struct Data<T> {
    q: Vec<T>,
    k: Vec<Vec<T>>,
    v: Vec<Vec<T>>,
    sizes: Vec<usize>,
    grad_out: Vec<T>,
    grad_lse: Option<Vec<f32>>,
    out: Vec<T>,
    lse: Vec<f32>,
    /// Elements from one row to the next.
    row: usize,
}

impl<T: Real> Data<T> {
    fn new(c: &Case, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let row = c.head_dim + rng.below(3) * 8;
        let nan = <T as Real>::from(f32::NAN);
        let sizes = if c.pages.is_empty() { vec![c.kv_len] } else { c.pages.clone() };
        let mut fill = |heads: usize, len: usize, seen: &dyn Fn(usize, usize) -> bool| -> Vec<T> {
            let mut x = vec![nan; c.batch * heads * len * row];
            for (n, r) in x.chunks_mut(row).enumerate() {
                if seen(n / (heads * len), n % len) {
                    r[..c.head_dim].iter_mut().for_each(|y| *y = <T as Real>::from(rng.normal()));
                }
            }
            x
        };
        let q = fill(c.q_heads, c.q_len, &|_, _| true);
        let grad_out = fill(c.q_heads, c.q_len, &|_, _| true);
        let (mut k, mut v, mut at) = (vec![], vec![], 0usize);
        // What nobody sees must not be read: keys beyond kv_len and outside of a batch row's interval.
        let ends = |b: usize| {
            let lo = c.kv_start.as_ref().map_or(0, |x| x[b] as usize);
            let hi = c.kv_end.as_ref().map_or(c.kv_len, |x| c.kv_len.min(x[b] as usize));
            let last = c.q_start.unwrap_or(c.kv_len as i64 - c.q_len as i64) + c.q_len as i64;
            (lo, if c.causal { hi.min(last.max(0) as usize) } else { hi })
        };
        for s in &sizes {
            let seen = |b: usize, i: usize| (ends(b).0..ends(b).1).contains(&(at + i));
            k.push(fill(c.kv_heads, *s, &seen));
            v.push(fill(c.kv_heads, *s, &seen));
            at += s;
        }
        let rows = c.batch * c.q_heads * c.q_len;
        let grad_lse = (rng.below(2) == 0).then(|| rng.normals(rows));
        let mut made = Self {
            q,
            k,
            v,
            sizes,
            grad_out,
            grad_lse,
            out: vec![nan; rows * c.head_dim],
            lse: vec![f32::NAN; rows],
            row,
        };
        let (mut out, mut lse) = (std::mem::take(&mut made.out), std::mem::take(&mut made.lse));
        let args = AttnArgs {
            q: made.view(&made.q, c, c.q_heads, c.q_len),
            kv: made.kv(c),
            out: TensorMut::dense("out", &mut out, [c.batch, c.q_heads, c.q_len, c.head_dim]).unwrap(),
            lse: Some(TensorMut::dense("lse", &mut lse, [c.batch, c.q_heads, c.q_len, 1]).unwrap()),
            causal: c.causal,
            softmax_scale: c.scale,
            q_start: c.q_start,
            kv_start: c.kv_start.as_deref(),
            kv_end: c.kv_end.as_deref(),
        };
        attention_forward(args, &Context::new(c.threads)).unwrap();
        (made.out, made.lse) = (out, lse);
        made
    }

    fn view<'a>(&self, data: &'a [T], c: &Case, heads: usize, len: usize) -> TensorRef<'a> {
        let r = self.row;
        TensorRef::new("x", data, [c.batch, heads, len, c.head_dim], [heads * len * r, len * r, r, 1]).unwrap()
    }

    fn kv<'a>(&'a self, c: &Case) -> KvRef<'a> {
        let pages = |x: &'a [Vec<T>]| -> Vec<TensorRef<'a>> {
            x.iter().zip(&self.sizes).map(|(x, s)| self.view(x, c, c.kv_heads, *s)).collect()
        };
        KvRef::paged(pages(&self.k), pages(&self.v), c.kv_len).unwrap()
    }

    fn args<'a, G: Real>(&'a self, c: &'a Case, [dq, dk, dv]: &'a mut [Vec<G>; 3]) -> BackwardArgs<'a> {
        let of_q = [c.batch, c.q_heads, c.q_len, c.head_dim];
        let of_k = [c.batch, c.kv_heads, self.sizes.iter().sum(), c.head_dim];
        let sums = [c.batch, c.q_heads, c.q_len, 1];
        BackwardArgs {
            grad_out: self.view(&self.grad_out, c, c.q_heads, c.q_len),
            q: self.view(&self.q, c, c.q_heads, c.q_len),
            kv: self.kv(c),
            out: TensorRef::dense("out", &self.out, of_q).unwrap(),
            lse: TensorRef::dense("lse", &self.lse, sums).unwrap(),
            grad_lse: self.grad_lse.as_ref().map(|x| TensorRef::dense("grad_lse", x, sums).unwrap()),
            dq: TensorMut::dense("dq", dq, of_q).unwrap(),
            dk: TensorMut::dense("dk", dk, of_k).unwrap(),
            dv: TensorMut::dense("dv", dv, of_k).unwrap(),
            causal: c.causal,
            softmax_scale: c.scale,
            q_start: c.q_start,
            kv_start: c.kv_start.as_deref(),
            kv_end: c.kv_end.as_deref(),
        }
    }

    /// dq, dk, dv, from memory that was NaN.
    fn gradients<G: Real>(&self, c: &Case) -> [Vec<G>; 3] {
        let nan = |heads: usize, len: usize| vec![<G as Real>::from(f32::NAN); c.batch * heads * len * c.head_dim];
        let held = self.sizes.iter().sum();
        let mut made = [nan(c.q_heads, c.q_len), nan(c.kv_heads, held), nan(c.kv_heads, held)];
        attention_backward(self.args(c, &mut made), &Context::new(c.threads)).unwrap();
        made
    }
}

/// Compares with the reference; an element may be off by the dtype's tolerance, in proportion to the terms that it is a sum
/// of: gradients of scores are differences of numbers of order 1, and as many are added as make the tensor as large as it is.
fn check<T: Real, G: Real>(c: &Case, seed: u64) {
    let data = Data::<T>::new(c, seed);
    let got: [Vec<G>; 3] = data.gradients(c);
    let mut spare = got.clone();
    let g: Gradients = data.args(c, &mut spare).validate().unwrap();
    let want = reference::attention_backward(&g);
    let held: usize = data.sizes.iter().sum();
    for (name, got, want, len, whole) in [
        ("dq", &got[0], &want[0], c.q_len, c.q_len),
        ("dk", &got[1], &want[1], c.kv_len, held),
        ("dv", &got[2], &want[2], c.kv_len, held),
    ] {
        let square: f64 = want.iter().map(|x| x * x).sum();
        // Keys of many rows add many roundings.
        let many =
            if name == "dq" { 1.0 } else { (c.q_heads * c.q_len) as f64 / (c.kv_heads * c.kv_len).max(1) as f64 };
        let typical = (square / want.len().max(1) as f64).sqrt();
        for (n, got) in got.iter().enumerate() {
            let (row, d) = (n / c.head_dim, n % c.head_dim);
            let (head, i) = (row / whole.max(1), row % whole.max(1));
            let want = if i < len { want[(head * len + i) * c.head_dim + d] } else { 0.0 };
            let e = (got.to() - want).abs();
            let most = c.slack * T::TOLERANCE * (many.max(1.0).sqrt() + typical + want.abs());
            assert!(e <= most, "{name}[{head}, {i}, {d}] = {} not {want}, off by more than {most}: {c:?}", got.to());
        }
    }
}

fn all_dtypes(c: &Case, seed: u64) {
    check::<f32, f32>(c, seed);
    check::<bf16, bf16>(c, seed + 1);
    check::<f16, f16>(c, seed + 2);
    check::<bf16, f32>(c, seed + 3);
}

#[test]
fn lengths_around_every_block_boundary() {
    // Blocks have 96 rows (24 queries of 4 heads) and 96 keys.
    for (n, q_len) in [1, 2, 23, 24, 25, 48, 49, 97].into_iter().enumerate() {
        for kv_len in [1, 31, 32, 33, 95, 96, 97, 193] {
            let c = Case { q_len, kv_len, causal: n % 2 == 0, head_dim: 32, ..Case::default() };
            all_dtypes(&c, (n * 1000 + kv_len) as u64);
        }
    }
}

#[test]
fn head_dims_from_8_to_256() {
    for head_dim in (8..20).chain([31, 32, 33, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256]) {
        let c = Case { head_dim, q_len: 30, kv_len: 110, q_heads: 2, ..Case::default() };
        all_dtypes(&c, head_dim as u64);
    }
}

#[test]
fn every_group() {
    for group in [1, 2, 3, 4, 5, 7, 8, 12, 16, 71, 200] {
        for kv_heads in [1, 3] {
            let q_heads = group * kv_heads;
            let c = Case { q_heads, kv_heads, q_len: 21, kv_len: 100, batch: 2, head_dim: 16, ..Case::default() };
            all_dtypes(&c, group as u64);
        }
    }
}

#[test]
fn intervals_hide_keys_and_leave_empty_rows() {
    let base = Case { batch: 4, q_len: 170, kv_len: 170, head_dim: 16, ..Case::default() };
    let cases = [
        (Some(vec![0, 1, 64, 170]), None),
        (None, Some(vec![170, 169, 1, 0])),
        (Some(vec![3, 33, 65, 140]), Some(vec![170, 34, 166, 112])),
        (Some(vec![1000, 0, 0, 169]), Some(vec![1000, 1000, 5, 170])),
    ];
    for (n, (kv_start, kv_end)) in cases.into_iter().enumerate() {
        for causal in [true, false] {
            all_dtypes(&Case { kv_start: kv_start.clone(), kv_end: kv_end.clone(), causal, ..base.clone() }, n as u64);
        }
    }
}

#[test]
fn queries_may_stand_anywhere() {
    for q_start in [-100, -5, -1, 0, 1, 31, 32, 90, 99, 100, 5000, i64::from(i32::MAX) * 4] {
        let c = Case { q_len: 40, kv_len: 100, head_dim: 16, q_start: Some(q_start), ..Case::default() };
        all_dtypes(&c, q_start.unsigned_abs());
    }
}

#[test]
fn pages_of_any_size_read_as_one() {
    for pages in [vec![64, 64, 64], vec![1; 130], vec![7, 100, 3, 50], vec![0, 130, 0], vec![65, 65, 1000], vec![200]] {
        let c = Case { pages, kv_len: 130, q_len: 50, batch: 2, kv_heads: 2, head_dim: 16, ..Case::default() };
        all_dtypes(&c, 5);
    }
}

#[test]
fn any_finite_scale() {
    for scale in [0.0, 1.0, -0.3, 1e-30, 1e-280] {
        let c = Case {
            scale: Some(scale),
            slack: (8.0 * scale).abs().max(1.0),
            q_len: 33,
            kv_len: 65,
            head_dim: 16,
            ..Case::default()
        };
        all_dtypes(&c, 1);
    }
}

#[test]
fn random_problems() {
    let mut rng = Rng(2027);
    for seed in 0..12 {
        let kv_heads = rng.pick(&[1, 2, 3]);
        let kv_len = 1 + rng.below(400);
        let batch = 1 + rng.below(3);
        let mut bounds = |n: usize| -> Option<Vec<i64>> {
            (rng.below(3) == 0).then(|| (0..batch).map(|_| rng.below(n + 20) as i64).collect())
        };
        let (kv_start, kv_end) = (bounds(kv_len / 2), bounds(kv_len));
        let c = Case {
            batch,
            kv_heads,
            q_heads: kv_heads * rng.pick(&[1, 2, 4, 5, 8]),
            q_len: 1 + rng.below(150),
            kv_len,
            head_dim: rng.pick(&[8, 20, 33, 64, 80]),
            causal: rng.below(4) > 0,
            q_start: (rng.below(3) == 0).then(|| rng.below(400) as i64 - 50),
            kv_start,
            kv_end,
            scale: None,
            pages: if rng.below(2) == 0 { vec![] } else { vec![80 + rng.below(100); 6] },
            threads: 1 + rng.below(4),
            slack: 1.0,
        };
        all_dtypes(&c, seed);
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    for (kv_heads, batch) in [(1, 1), (2, 2), (3, 1)] {
        let c =
            Case { q_heads: 2 * kv_heads, kv_heads, batch, q_len: 700, kv_len: 900, head_dim: 32, ..Case::default() };
        let data = Data::<f32>::new(&c, 3);
        let bits = |threads: usize| {
            let got: [Vec<f32>; 3] = data.gradients(&Case { threads, ..c.clone() });
            got.map(|x| x.iter().map(|y| y.to_bits()).collect::<Vec<_>>())
        };
        let want = bits(1);
        for threads in [2, 3, 5, 16, 2, 16] {
            assert!(bits(threads) == want, "{threads} threads, {kv_heads} kv heads");
        }
    }
}

#[test]
fn nothing_to_do_is_fine() {
    for c in [
        Case { kv_len: 0, ..Case::default() },
        Case { q_len: 0, ..Case::default() },
        Case { batch: 0, ..Case::default() },
        Case { q_heads: 0, kv_heads: 0, ..Case::default() },
        Case { q_heads: 0, kv_heads: 2, ..Case::default() },
    ] {
        check::<f32, f32>(&c, 0);
        check::<bf16, bf16>(&c, 0);
    }
}

#[test]
fn nan_in_one_query_stays_in_its_row_of_dq() {
    let c = Case { q_heads: 1, q_len: 250, kv_len: 250, head_dim: 16, ..Case::default() };
    let mut data = Data::<f32>::new(&c, 9);
    let row = data.row;
    data.grad_out[140 * row] = f32::NAN;
    let [dq, dk, _]: [Vec<f32>; 3] = data.gradients(&c);
    for (i, r) in dq.chunks(c.head_dim).enumerate() {
        assert!(r.iter().all(|x| x.is_nan() == (i == 140)), "row {i}");
    }
    assert!(dk[..141 * c.head_dim].iter().all(|x| x.is_nan()), "every key that it saw");
    assert!(dk[192 * c.head_dim..].iter().all(|x| !x.is_nan()), "and none of a block that it did not see");
}

#[test]
fn the_reference_is_the_slope_of_the_forward_pass() {
    // Central differences of the float64 reference itself, in inputs that float32 holds exactly.
    let c = Case { q_heads: 4, kv_heads: 2, q_len: 5, kv_len: 7, head_dim: 8, q_start: Some(1), ..Case::default() };
    let mut data = Data::<f32>::new(&c, 11);
    data.grad_lse = Some(Rng(1).normals(c.q_heads * c.q_len));
    let mut spare: [Vec<f32>; 3] = data.gradients(&c);
    let slopes = reference::attention_backward(&data.args(&c, &mut spare).validate().unwrap());
    let loss = |data: &Data<f32>| -> f64 {
        let mut spare = [spare[0].clone(), spare[1].clone(), spare[2].clone()];
        let g = data.args(&c, &mut spare).validate().unwrap();
        let mut sum = 0.0;
        for h in 0..c.q_heads {
            for i in 0..c.q_len {
                let (out, lse) = reference::attention_row(&g, 0, h, i);
                sum += (0..c.head_dim).map(|d| out[d] * f64::from(g.grad_out.get(0, h, i, d))).sum::<f64>();
                // A row that sees no key has no slope.
                let of_lse = f64::from(g.grad_lse.as_ref().unwrap().get(0, h, i, 0));
                sum += if lse.is_finite() { lse * of_lse } else { 0.0 };
            }
        }
        sum
    };
    let row = data.row;
    let mut worst = 0.0f64;
    for (which, heads, len) in [(0, c.q_heads, c.q_len), (1, c.kv_heads, c.kv_len), (2, c.kv_heads, c.kv_len)] {
        assert_eq!(slopes[which].len(), heads * len * c.head_dim);
        for (n, want) in slopes[which].iter().enumerate() {
            let at = n / c.head_dim * row + n % c.head_dim;
            fn tensor(data: &mut Data<f32>, which: usize) -> &mut Vec<f32> {
                [&mut data.q, &mut data.k[0], &mut data.v[0]].into_iter().nth(which).unwrap()
            }
            let x = tensor(&mut data, which)[at];
            if x.is_nan() {
                assert_eq!(*want, 0.0, "a key that nobody sees");
                continue;
            }
            let (more, less) = (x + 1e-3, x - 1e-3);
            tensor(&mut data, which)[at] = more;
            let up = loss(&data);
            tensor(&mut data, which)[at] = less;
            let down = loss(&data);
            tensor(&mut data, which)[at] = x;
            let slope = (up - down) / (f64::from(more) - f64::from(less));
            worst = worst.max((slope - want).abs());
        }
    }
    // The third derivative's share of a central difference: h^2 / 6 times numbers of order 10.
    assert!(worst < 2e-5, "{worst}");
}
