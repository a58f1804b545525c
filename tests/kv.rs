//! Compact pages: what is written, what is read back, and attention over pages of all formats against float64.
//! The whole file runs once per instruction-set level in CI (`LLAMA1M_ISA`).

mod common;

use common::{Real, Rng};
use half::{bf16, f16};
use llama1m_ext::args::{AttnArgs, KvRef, Side};
use llama1m_ext::attention::{attention_decode, attention_forward};
use llama1m_ext::cpu::kv::{SideMut, kv_append, kv_read};
use llama1m_ext::quant::{Axis, Codes, CompactMut, CompactRef, GROUP, width};
use llama1m_ext::reference::attention_row;
use llama1m_ext::tensor::{BytesMut, BytesRef};
use llama1m_ext::{Context, TensorMut, TensorRef};

const FORMATS: [Option<Codes>; 4] = [None, Some(Codes::Int8), Some(Codes::Int4), Some(Codes::Fp8)];

/// Keys or values of one page, in one format; memory that nobody wrote is 0xff (NaN).
struct Stored<T> {
    dense: Vec<T>,
    rows: Vec<u8>,
    params: Vec<f16>,
    codes: Option<Codes>,
    axis: Axis,
    shape: [usize; 4],
}

impl<T: Real> Stored<T> {
    /// A page for `[batch, heads, tokens, head_dim]`.
    fn new(codes: Option<Codes>, axis: Axis, shape: [usize; 4]) -> Self {
        let [b, h, n, d] = shape;
        let (w, groups) = (width(d), n.div_ceil(GROUP));
        let (mut rows, mut params, mut dense) = (0, 0, 0);
        match (codes, axis) {
            (None, _) => dense = b * h * n * d,
            (Some(c), Axis::Channel) => (rows, params) = (b * h * groups * c.bytes(w) * GROUP, b * h * groups * 2 * w),
            (Some(c), Axis::Token) => (rows, params) = (b * h * n * c.bytes(w), b * h * 2 * w / GROUP * n),
        }
        Self {
            dense: vec![<T as Real>::from(f32::NAN); dense],
            rows: vec![0xff; rows],
            params: vec![f16::NAN; params],
            codes,
            axis,
            shape,
        }
    }

    fn shapes(&self) -> ([usize; 4], [usize; 4]) {
        let [b, h, n, d] = self.shape;
        let (w, groups, c) = (width(d), n.div_ceil(GROUP), self.codes.unwrap_or(Codes::Int8));
        match self.axis {
            Axis::Channel => ([b, h, groups, c.bytes(w) * GROUP], [b, h, groups, 2 * w]),
            Axis::Token => ([b, h, n, c.bytes(w)], [b, h, 2 * w / GROUP, n]),
        }
    }

    fn side(&self) -> Side<'_> {
        let (rows, params) = self.shapes();
        match self.codes {
            None => Side::Dense(TensorRef::dense("x", &self.dense, self.shape).unwrap()),
            Some(c) => {
                let rows = BytesRef::dense("x", &self.rows, rows).unwrap();
                let params = TensorRef::dense("x", &self.params, params).unwrap();
                Side::Compact(CompactRef::new("x", c, self.axis, rows, params).unwrap())
            }
        }
    }

    fn append(&mut self, x: &[T], at: usize, n: usize) -> llama1m_ext::Result<()> {
        let (rows, params) = self.shapes();
        let [b, h, _, d] = self.shape;
        let source = TensorRef::dense("x", x, [b, h, n, d]).unwrap();
        let side = match self.codes {
            None => SideMut::Dense(TensorMut::dense("x", &mut self.dense, self.shape).unwrap()),
            Some(c) => {
                let rows = BytesMut::dense("x", &mut self.rows, rows).unwrap();
                let params = TensorMut::dense("x", &mut self.params, params).unwrap();
                SideMut::Compact(CompactMut::new("x", c, self.axis, rows, params).unwrap())
            }
        };
        kv_append("x", source, side, at, &Context::new(2))
    }
}

/// Keys with a few large channels, as Llama's are.
fn keys<T: Real>(rng: &mut Rng, rows: usize, d: usize) -> Vec<T> {
    let means: Vec<f32> = (0..d).map(|c| if c % 21 == 3 { 10.0 * rng.normal() } else { 0.0 }).collect();
    (0..rows * d).map(|i| <T as Real>::from(rng.normal() + means[i % d])).collect()
}

fn written_and_read<T: Real>(codes: Option<Codes>, axis: Axis, d: usize, n: usize) {
    let (b, h) = (2, 3);
    let mut rng = Rng(d as u64 * 1000 + n as u64);
    let x: Vec<T> = keys(&mut rng, b * h * n, d);
    let mut page = Stored::<T>::new(codes, axis, [b, h, n, d]);
    page.append(&x, 0, n).unwrap();
    let side = page.side();
    let at = |i: usize, t: usize, c: usize| x[(i * n + t) * d + c].to();
    for i in 0..b * h {
        for t in 0..n {
            for c in 0..d {
                let Some(codes) = codes else { continue };
                // What shares a scale, and how far apart its codes are.
                let span: Vec<f64> = match axis {
                    Axis::Channel => {
                        (t / GROUP * GROUP..(t / GROUP * GROUP + GROUP).min(n)).map(|t| at(i, t, c)).collect()
                    }
                    Axis::Token => {
                        (c / GROUP * GROUP..(c / GROUP * GROUP + GROUP).min(d)).map(|c| at(i, t, c)).collect()
                    }
                };
                let least = span.iter().copied().fold(f64::INFINITY, f64::min);
                let most = span.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                // e4m3 keeps 4 bits of what is at most half the range.
                let step = if codes == Codes::Fp8 {
                    (most - least) / 28.0
                } else {
                    (most - least) / f64::from(codes.range().1)
                };
                let off = (side.get(i / h, i % h, t, c) - at(i, t, c)).abs();
                let rounding = (most.abs().max(least.abs())) / 1024.0;
                assert!(off <= step * 0.51 + rounding, "{codes:?} {axis:?} {d} {n}: {off} with steps of {step}");
            }
        }
    }
    for (start, end) in [(0, n), (n / 3, n), (n / 2, n / 2 + 1), (n - 1, n)] {
        let shape = [b, h, end - start, d];
        let mut out = vec![<T as Real>::from(f32::NAN); b * h * (end - start) * d];
        let to = TensorMut::dense("out", &mut out, shape).unwrap();
        kv_read("x", side, start, to, &Context::new(2)).unwrap();
        for (n, got) in out.iter().enumerate() {
            let (c, t, i) = (n % d, n / d % (end - start) + start, n / d / (end - start));
            let want = side.get(i / h, i % h, t, c);
            // Rounded once, to the dtype.
            assert!((got.to() - want).abs() <= T::TOLERANCE * 0.2 * want.abs() + 1e-6, "{} not {want}", got.to());
        }
    }
}

#[test]
fn what_is_written_is_read_back() {
    for codes in FORMATS {
        for axis in [Axis::Channel, Axis::Token] {
            for (d, n) in [(64, 64), (128, 130), (8, 5), (80, 63), (256, 65), (100, 1)] {
                written_and_read::<f32>(codes, axis, d, n);
                written_and_read::<bf16>(codes, axis, d, n);
                written_and_read::<f16>(codes, axis, d, n);
            }
        }
    }
}

#[test]
fn numbers_that_scales_cannot_hold_are_loud() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e6] {
        for axis in [Axis::Channel, Axis::Token] {
            let mut page = Stored::<f32>::new(Some(Codes::Int4), axis, [1, 1, 64, 64]);
            let mut x = keys(&mut Rng(1), 64, 64);
            x[5 * 64 + 7] = bad;
            page.append(&x, 0, 64).unwrap();
            assert!(page.side().get(0, 0, 5, 7).is_nan());
            assert!(page.side().get(0, 0, 6, 8).is_finite());
        }
    }
}

#[test]
fn groups_are_written_whole() {
    let mut page = Stored::<f32>::new(Some(Codes::Int8), Axis::Channel, [1, 1, 192, 64]);
    let x = vec![1.0; 64 * 64];
    page.append(&x, 64, 64).unwrap();
    let e = page.append(&x, 32, 64).unwrap_err().to_string();
    assert!(e.contains("multiple of 64") && e.contains("32"), "{e}");
    let e = page.append(&x, 192, 64).unwrap_err().to_string();
    assert!(e.contains("room for 64 tokens"), "{e}");
    let mut values = Stored::<f32>::new(Some(Codes::Int4), Axis::Token, [1, 1, 192, 64]);
    values.append(&x[..64 * 3], 31, 3).unwrap();
}

#[allow(clippy::too_many_arguments)] // a problem is what it is
fn problem<'a, T: Real>(
    q: &'a [T],
    shape: [usize; 4],
    ks: &'a [Stored<T>],
    vs: &'a [Stored<T>],
    kv_len: usize,
    kv_start: Option<&'a [i64]>,
    out: TensorMut<'a>,
    lse: Option<TensorMut<'a>>,
) -> AttnArgs<'a> {
    let sides = |x: &'a [Stored<T>]| x.iter().map(Stored::side).collect::<Vec<_>>();
    AttnArgs {
        q: TensorRef::dense("q", q, shape).unwrap(),
        kv: KvRef::paged(sides(ks), sides(vs), kv_len).unwrap(),
        out,
        lse,
        causal: true,
        softmax_scale: None,
        q_start: None,
        kv_start,
        kv_end: None,
    }
}

/// Pages of all sizes and formats, one problem, both verbs.
fn attended<T: Real>(seed: u64) {
    let mut rng = Rng(seed);
    let (b, kv_heads, group) = (rng.pick(&[1, 2]), rng.pick(&[1, 2]), rng.pick(&[1, 2, 3, 4, 8]));
    let d = rng.pick(&[64, 128, 128, 80, 24, 256]);
    let q_len = rng.pick(&[1, 1, 2, 5, 40]);
    let sizes: Vec<usize> = (0..1 + rng.below(4)).map(|_| rng.pick(&[64, 1, 64, 130, 63, 200, 512])).collect();
    let total: usize = sizes.iter().sum();
    // Compact keys in the middle of the pages are whole groups; the last page may be cut anywhere.
    let kv_len = total - rng.below(sizes[sizes.len() - 1]);
    let (mut ks, mut vs) = (vec![], vec![]);
    for n in &sizes {
        let (fk, fv) = (rng.pick(&FORMATS), rng.pick(&FORMATS));
        let (x, y): (Vec<T>, Vec<T>) = (keys(&mut rng, b * kv_heads * n, d), keys(&mut rng, b * kv_heads * n, d));
        let mut k = Stored::<T>::new(fk, Axis::Channel, [b, kv_heads, *n, d]);
        let mut v = Stored::<T>::new(fv, Axis::Token, [b, kv_heads, *n, d]);
        k.append(&x, 0, *n).unwrap();
        v.append(&y, 0, *n).unwrap();
        ks.push(k);
        vs.push(v);
    }
    let starts: Vec<i64> = (0..b).map(|_| rng.below(kv_len.min(150)) as i64).collect();
    let kv_start = (rng.below(2) == 0).then_some(&starts[..]);
    let q: Vec<T> = (0..b * kv_heads * group * q_len * d).map(|_| <T as Real>::from(rng.normal() * 0.5)).collect();
    let shape = [b, kv_heads * group, q_len, d];
    for verb in [attention_decode, attention_forward] {
        let threads = rng.pick(&[1, 3]);
        let mut out = vec![0.0f32; q.len()];
        let mut lse = vec![0.0f32; q.len() / d];
        {
            let o = TensorMut::dense("out", &mut out, shape).unwrap();
            let l = TensorMut::dense("lse", &mut lse, [shape[0], shape[1], shape[2], 1]).unwrap();
            verb(problem(&q, shape, &ks, &vs, kv_len, kv_start, o, Some(l)), &Context::new(threads)).unwrap();
        }
        let mut spare = vec![0.0f32; q.len()];
        let o = TensorMut::dense("out", &mut spare, shape).unwrap();
        let p = problem(&q, shape, &ks, &vs, kv_len, kv_start, o, None).validate().unwrap();
        // Some of the rows, where all would take the reference long.
        let step = (q.len() * kv_len / 1_000_000).max(1);
        for n in (0..q.len() / d).step_by(step) {
            let (want, want_lse) = attention_row(&p, n / (shape[1] * q_len), n / q_len % shape[1], n % q_len);
            let what = || {
                format!(
                    "seed {seed}, row {n}, d {d}, {sizes:?}, {:?}",
                    ks.iter().zip(&vs).map(|(k, v)| (k.codes, v.codes)).collect::<Vec<_>>()
                )
            };
            // Scores are some tens here: a bf16 q times a scale is off by 2^-9 of them.
            for (got, want) in out[n * d..][..d].iter().zip(&want) {
                let off = (f64::from(*got) - want).abs();
                assert!(off <= 8.0 * T::TOLERANCE * (1.0 + want.abs()), "{got} not {want}: {}", what());
            }
            let off = (f64::from(lse[n]) - want_lse).abs();
            assert!(
                f64::from(lse[n]) == want_lse || off <= 8.0 * T::TOLERANCE * (1.0 + want_lse.abs()),
                "lse: {}",
                what()
            );
        }
    }
}

#[test]
fn attention_over_pages_of_all_formats() {
    for seed in 0..60 {
        attended::<f32>(seed);
        attended::<bf16>(seed + 1000);
        attended::<f16>(seed + 2000);
    }
}

#[test]
fn views_that_do_not_belong_together_are_refused() {
    let page = Stored::<f32>::new(Some(Codes::Int8), Axis::Channel, [1, 2, 128, 64]);
    let rows = BytesRef::dense("k", &page.rows, [1, 2, 2, 4096]).unwrap();
    let params = |shape| TensorRef::dense("k", &page.params, shape).unwrap();
    let text = |r: llama1m_ext::Result<CompactRef>| r.unwrap_err().to_string();
    assert!(CompactRef::new("k", Codes::Int8, Axis::Channel, rows, params([1, 2, 2, 128])).is_ok());
    assert!(text(CompactRef::new("k", Codes::Int8, Axis::Channel, rows, params([1, 2, 1, 128]))).contains("k params"));
    assert!(text(CompactRef::new("k", Codes::Int8, Axis::Token, rows, params([1, 2, 2, 128]))).contains("rows of 64"));
    let floats = [0.0f32; 512];
    let wrong = TensorRef::dense("k", &floats, [1, 2, 2, 128]).unwrap();
    assert!(text(CompactRef::new("k", Codes::Int8, Axis::Channel, rows, wrong)).contains("float16"));
    let odd = BytesRef::dense("k", &page.rows, [1, 2, 2, 4000]).unwrap();
    assert!(text(CompactRef::new("k", Codes::Int8, Axis::Channel, odd, params([1, 2, 2, 128]))).contains("4000"));
}
