//! Shared by the integration tests: numbers, and the judge.
#![allow(dead_code)] // each test file uses its part

use half::{bf16, f16};
use llama1m_ext::args::Problem;
use llama1m_ext::reference::attention_row;
use llama1m_ext::{AttnArgs, Context, KvRef, Result, TensorMut, TensorRef};

/// A small reproducible generator (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// About normal, by the sum of uniforms.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32).sum::<f32>() - 6.0
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// Float types under test, with how far off an output of order 1 may be.
pub trait Real: llama1m_ext::dtype::Element {
    const TOLERANCE: f64;
    fn from(x: f32) -> Self;
    fn to(self) -> f64;
}

impl Real for f32 {
    const TOLERANCE: f64 = 4e-6;
    fn from(x: f32) -> Self {
        x
    }
    fn to(self) -> f64 {
        f64::from(self)
    }
}
impl Real for bf16 {
    const TOLERANCE: f64 = 2.5e-2;
    fn from(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn to(self) -> f64 {
        f64::from(self.to_f32())
    }
}
impl Real for f16 {
    const TOLERANCE: f64 = 3e-3;
    fn from(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn to(self) -> f64 {
        f64::from(self.to_f32())
    }
}

/// One attention problem with its numbers.
#[derive(Debug, Clone)]
pub struct Case {
    pub batch: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    pub causal: bool,
    pub q_start: Option<i64>,
    pub kv_start: Option<Vec<i64>>,
    pub kv_end: Option<Vec<i64>>,
    pub scale: Option<f64>,
    /// Page sizes; empty for dense.
    pub pages: Vec<usize>,
    pub threads: usize,
    /// Multiplies the dtype's tolerance: large scores are rounded in proportion.
    pub slack: f64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            batch: 1,
            q_heads: 4,
            kv_heads: 1,
            q_len: 16,
            kv_len: 16,
            head_dim: 64,
            causal: true,
            q_start: None,
            kv_start: None,
            kv_end: None,
            scale: None,
            pages: vec![],
            threads: 2,
            slack: 1.0,
        }
    }
}

pub type Verb = fn(AttnArgs, &Context) -> Result<()>;

impl Case {
    fn args<'a>(
        &'a self,
        q: TensorRef<'a>,
        k: &[TensorRef<'a>],
        v: &[TensorRef<'a>],
        out: TensorMut<'a>,
        lse: Option<TensorMut<'a>>,
    ) -> AttnArgs<'a> {
        AttnArgs {
            q,
            kv: KvRef::paged(k.to_vec(), v.to_vec(), self.kv_len).unwrap(),
            out,
            lse,
            causal: self.causal,
            softmax_scale: self.scale,
            q_start: self.q_start,
            kv_start: self.kv_start.as_deref(),
            kv_end: self.kv_end.as_deref(),
        }
    }

    /// Runs `verb` and compares every row (or, in large problems, some rows) with the float64 reference. Memory that
    /// is not in use is NaN: gaps between rows, and pages beyond kv_len.
    pub fn check<T: Real>(&self, verb: Verb, seed: u64) {
        let mut rng = Rng(seed);
        let c = self;
        let gap = rng.below(3) * 8;
        let row = c.head_dim + gap;
        let nan = <T as Real>::from(f32::NAN);
        let mut fill = |heads: usize, len: usize, used: usize| -> Vec<T> {
            let mut x = vec![nan; c.batch * heads * len * row];
            for (i, r) in x.chunks_mut(row).enumerate() {
                if i % len < used {
                    r[..c.head_dim].iter_mut().for_each(|y| *y = <T as Real>::from(rng.normal()));
                }
            }
            x
        };
        let sizes = if c.pages.is_empty() { vec![c.kv_len] } else { c.pages.clone() };
        let q = fill(c.q_heads, c.q_len, c.q_len);
        let (mut ks, mut vs, mut at) = (vec![], vec![], 0usize);
        for s in &sizes {
            let used = c.kv_len.saturating_sub(at).min(*s);
            ks.push(fill(c.kv_heads, *s, used));
            vs.push(fill(c.kv_heads, *s, used));
            at += s;
        }
        let view = |x: &'static str, data: &'static [T], heads: usize, len: usize| {
            TensorRef::new(x, data, [c.batch, heads, len, c.head_dim], [heads * len * row, len * row, row, 1]).unwrap()
        };
        // Leaked so that views are 'static; a test's few megabytes.
        let leak = |x: Vec<T>| -> &'static [T] { Box::leak(x.into_boxed_slice()) };
        let q = view("q", leak(q), c.q_heads, c.q_len);
        let k: Vec<_> = ks.into_iter().zip(&sizes).map(|(x, s)| view("k", leak(x), c.kv_heads, *s)).collect();
        let v: Vec<_> = vs.into_iter().zip(&sizes).map(|(x, s)| view("v", leak(x), c.kv_heads, *s)).collect();
        let mut out = vec![nan; c.batch * c.q_heads * c.q_len * c.head_dim];
        let mut lse = vec![f32::NAN; c.batch * c.q_heads * c.q_len];
        let shape = [c.batch, c.q_heads, c.q_len, c.head_dim];
        {
            let o = TensorMut::dense("out", &mut out, shape).unwrap();
            let l = TensorMut::dense("lse", &mut lse, [shape[0], shape[1], shape[2], 1]).unwrap();
            verb(self.args(q, &k, &v, o, Some(l)), &Context::new(c.threads)).unwrap();
        }
        let mut spare = vec![nan; out.len()];
        let p: Problem =
            self.args(q, &k, &v, TensorMut::dense("out", &mut spare, shape).unwrap(), None).validate().unwrap();
        let rows = c.batch * c.q_heads * c.q_len;
        let step = (rows * c.kv_len * c.head_dim / 3_000_000).max(1);
        for n in (0..rows).step_by(step) {
            let (b, h, i) = (n / (c.q_heads * c.q_len), n / c.q_len % c.q_heads, n % c.q_len);
            let (want, want_lse) = attention_row(&p, b, h, i);
            let got = &out[n * c.head_dim..][..c.head_dim];
            for (d, (g, w)) in got.iter().zip(&want).enumerate() {
                let e = (g.to() - w).abs();
                assert!(
                    e <= c.slack * T::TOLERANCE * (1.0 + w.abs()),
                    "out[{b}, {h}, {i}, {d}] = {} not {w}: {c:?}",
                    g.to()
                );
            }
            let e = (f64::from(lse[n]) - want_lse).abs();
            let ok = lse[n] as f64 == want_lse || e <= c.slack * T::TOLERANCE * (1.0 + want_lse.abs());
            assert!(ok, "lse[{b}, {h}, {i}] = {} not {want_lse}: {c:?}", lse[n]);
        }
    }
}
