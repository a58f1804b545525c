//! The one validated description of an attention call. Engines trust it and check nothing again.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{TensorMut, TensorRef};

/// Smallest and largest head_dim served.
pub const HEAD_DIM: std::ops::RangeInclusive<usize> = 8..=256;

/// Where the keys and values of a call live: pages of tokens, each `[batch, kv_heads, tokens, head_dim]`.
/// Dense K/V is one page.
#[derive(Debug)]
pub struct KvRef<'a> {
    k: Vec<TensorRef<'a>>,
    v: Vec<TensorRef<'a>>,
    /// `start[p]` is the first token of page p; one more entry than pages.
    start: Vec<usize>,
    len: usize,
}

/// A run of tokens that lie in one page, so that rows are a fixed stride apart.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// First row of k.
    pub k: *const u8,
    /// First row of v.
    pub v: *const u8,
    /// Bytes between k rows.
    pub k_stride: usize,
    /// Bytes between v rows.
    pub v_stride: usize,
    /// Rows in the run.
    pub len: usize,
}

impl<'a> KvRef<'a> {
    /// K and V as one view each.
    ///
    /// # Errors
    /// When the two disagree in shape or dtype.
    pub fn dense(k: TensorRef<'a>, v: TensorRef<'a>) -> Result<Self> {
        let len = k.shape()[2];
        Self::paged(vec![k], vec![v], len)
    }

    /// K and V as pages, of which the first `kv_len` tokens are in use. Pages may differ in size.
    ///
    /// # Errors
    /// When pages disagree in batch, heads, head_dim or dtype, k and v pages differ, or `kv_len` exceeds the pages.
    pub fn paged(k: Vec<TensorRef<'a>>, v: Vec<TensorRef<'a>>, kv_len: usize) -> Result<Self> {
        if k.is_empty() || k.len() != v.len() {
            return Err(Error::value("v", format!("as many pages as k, at least one (k has {})", k.len()), v.len()));
        }
        let mut start = Vec::with_capacity(k.len() + 1);
        let mut at = 0usize;
        let first = k[0].shape();
        for (i, (kp, vp)) in k.iter().zip(&v).enumerate() {
            let (ks, vs) = (kp.shape(), vp.shape());
            if kp.dtype() != k[0].dtype() {
                return Err(Error::type_(format!("k page {i}"), k[0].dtype().name(), kp.dtype().name()));
            }
            if vp.dtype() != k[0].dtype() {
                let name = if k.len() == 1 { "v".into() } else { format!("v page {i}") };
                return Err(Error::type_(name, format!("the dtype of k, {}", k[0].dtype().name()), vp.dtype().name()));
            }
            if [ks[0], ks[1], ks[3]] != [first[0], first[1], first[3]] {
                return Err(Error::value(
                    format!("k page {i}"),
                    format!("[{}, {}, any, {}] as page 0", first[0], first[1], first[3]),
                    format!("{ks:?}"),
                ));
            }
            if ks != vs {
                let name = if k.len() == 1 { "v".into() } else { format!("v page {i}") };
                return Err(Error::value(name, format!("the shape of k, {ks:?}"), format!("{vs:?}")));
            }
            start.push(at);
            at = at.checked_add(ks[2]).ok_or_else(|| Error::value("k", "fewer tokens", "more than 2^64"))?;
        }
        start.push(at);
        if kv_len > at {
            return Err(Error::value("kv_len", format!("at most the {at} tokens that the pages hold"), kv_len));
        }
        Ok(Self { k, v, start, len: kv_len })
    }

    /// `[batch, kv_heads, kv_len, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        let s = self.k[0].shape();
        [s[0], s[1], self.len, s[3]]
    }

    /// Element type of k and v.
    pub fn dtype(&self) -> DType {
        self.k[0].dtype()
    }

    /// The longest run that starts at token `j` and stays within a page and below `end` (`j < end <= kv_len`).
    pub fn run(&self, b: usize, h: usize, j: usize, end: usize) -> Run {
        debug_assert!(j < end && end <= self.len);
        // The last page that starts at or before j and is not empty there.
        let p = self.start.partition_point(|&s| s <= j) - 1;
        let (k, v) = (&self.k[p], &self.v[p]);
        Run {
            k: k.row(b, h, j - self.start[p]),
            v: v.row(b, h, j - self.start[p]),
            k_stride: k.row_bytes(),
            v_stride: v.row_bytes(),
            len: self.start[p + 1].min(end) - j,
        }
    }

    /// k and v elements as float32, bounds checked; for the reference.
    pub fn get(&self, b: usize, h: usize, j: usize, d: usize) -> (f32, f32) {
        assert!(j < self.len);
        let p = self.start.partition_point(|&s| s <= j) - 1;
        let i = j - self.start[p];
        (self.k[p].get(b, h, i, d), self.v[p].get(b, h, i, d))
    }
}

/// What a caller asks for; [`AttnArgs::validate`] makes the [`Problem`] that engines take.
#[derive(Debug)]
pub struct AttnArgs<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: TensorRef<'a>,
    /// Keys and values.
    pub kv: KvRef<'a>,
    /// `[batch, q_heads, q_len, head_dim]`, q's dtype or float32.
    pub out: TensorMut<'a>,
    /// `[batch, q_heads, q_len, 1]` float32, natural logarithm; rows that see no key get -inf.
    pub lse: Option<TensorMut<'a>>,
    /// Key j is hidden from query i when `j > q_start + i`.
    pub causal: bool,
    /// Multiplies q k^T; None is `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f64>,
    /// Absolute position of the first query; None is `kv_len - q_len`.
    pub q_start: Option<i64>,
    /// First visible key of each batch row.
    pub kv_start: Option<&'a [i64]>,
    /// One past the last visible key of each batch row.
    pub kv_end: Option<&'a [i64]>,
}

/// A call that has been checked: every engine's input.
#[derive(Debug)]
pub struct Problem<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: TensorRef<'a>,
    /// Keys and values.
    pub kv: KvRef<'a>,
    /// Output.
    pub out: TensorMut<'a>,
    /// Optional log-sum-exp.
    pub lse: Option<TensorMut<'a>>,
    /// Batch rows.
    pub batch: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// `q_heads / kv_heads`.
    pub group: usize,
    /// Queries.
    pub q_len: usize,
    /// Keys.
    pub kv_len: usize,
    /// Elements of one row.
    pub head_dim: usize,
    /// Finite multiplier of q k^T.
    pub softmax_scale: f64,
    causal: bool,
    q_start: i64,
    kv_start: Option<&'a [i64]>,
    kv_end: Option<&'a [i64]>,
}

impl<'a> AttnArgs<'a> {
    /// Checks everything once.
    ///
    /// # Errors
    /// Names the argument, what was expected and what came.
    pub fn validate(self) -> Result<Problem<'a>> {
        let [batch, q_heads, q_len, head_dim] = self.q.shape();
        let [kb, kv_heads, kv_len, kd] = self.kv.shape();
        if self.kv.dtype() != self.q.dtype() {
            return Err(Error::type_(
                "k",
                format!("the dtype of q, {}", self.q.dtype().name()),
                self.kv.dtype().name(),
            ));
        }
        if kb != batch || kd != head_dim {
            let want = format!("[{batch}, kv_heads, kv_len, {head_dim}] to go with q {:?}", self.q.shape());
            return Err(Error::value("k", want, format!("{:?}", self.kv.shape())));
        }
        if !HEAD_DIM.contains(&head_dim) {
            return Err(Error::value("q", "head_dim from 8 to 256", format!("head_dim {head_dim}")));
        }
        if q_heads > 0 && (kv_heads == 0 || q_heads % kv_heads != 0) {
            return Err(Error::value("k", format!("kv_heads to divide q_heads={q_heads}"), kv_heads));
        }
        if self.out.shape() != self.q.shape() {
            return Err(Error::value(
                "out",
                format!("the shape of q, {:?}", self.q.shape()),
                format!("{:?}", self.out.shape()),
            ));
        }
        if self.out.dtype() != self.q.dtype() && self.out.dtype() != DType::F32 {
            let want = format!("the dtype of q, {}, or float32", self.q.dtype().name());
            return Err(Error::type_("out", want, self.out.dtype().name()));
        }
        if let Some(lse) = &self.lse {
            if lse.dtype() != DType::F32 {
                return Err(Error::type_("lse", "float32", lse.dtype().name()));
            }
            if lse.shape() != [batch, q_heads, q_len, 1] {
                let got = &lse.shape()[..3];
                return Err(Error::value("lse", format!("[{batch}, {q_heads}, {q_len}]"), format!("{got:?}")));
            }
        }
        let scale = self.softmax_scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
        if !(scale as f32).is_finite() {
            return Err(Error::value("softmax_scale", "a finite float32 number", scale));
        }
        for (name, v) in [("kv_start", self.kv_start), ("kv_end", self.kv_end)] {
            if let Some(v) = v {
                if v.len() != batch {
                    return Err(Error::value(name, format!("one entry for each of {batch} batch rows"), v.len()));
                }
                if let Some(x) = v.iter().find(|x| **x < 0) {
                    return Err(Error::value(name, "numbers >= 0", x));
                }
            }
        }
        let q_start = match self.q_start {
            Some(s) if s.unsigned_abs() > 1 << 60 => return Err(Error::value("q_start", "|q_start| <= 2^60", s)),
            Some(s) => s,
            None => kv_len as i64 - q_len as i64,
        };
        Ok(Problem {
            q: self.q,
            kv: self.kv,
            out: self.out,
            lse: self.lse,
            batch,
            q_heads,
            kv_heads,
            group: q_heads.checked_div(kv_heads).unwrap_or(1).max(1),
            q_len,
            kv_len,
            head_dim,
            softmax_scale: scale,
            causal: self.causal,
            q_start,
            kv_start: self.kv_start,
            kv_end: self.kv_end,
        })
    }
}

impl Problem<'_> {
    /// The keys `lo..hi` that query `i` of batch row `b` sees; `lo == hi` when it sees none.
    #[inline]
    pub fn visible(&self, b: usize, i: usize) -> (usize, usize) {
        let len = self.kv_len as i64;
        let lo = self.kv_start.map_or(0, |s| s[b].min(len));
        let mut hi = self.kv_end.map_or(len, |e| e[b].min(len));
        if self.causal {
            hi = hi.min(self.q_start.saturating_add(i as i64 + 1));
        }
        (lo as usize, hi.max(lo) as usize)
    }

    /// How q k^T becomes scores in base 2: what each element of q is multiplied by when it is packed, and what the
    /// kernel multiplies the product by.
    ///
    /// Float32 operands take it all in q, in one rounding each: those average out over a row, where a rounded factor
    /// on the scores would tilt all of them alike. Pairs of bf16 must stay as they are: only the sign goes into q (and
    /// 0, so that a hidden key's -inf is never multiplied by 0).
    pub fn scaling(&self, pair: usize) -> (f64, f32) {
        let scale = self.softmax_scale * std::f64::consts::LOG2_E;
        match (pair, scale.abs() as f32) {
            (1, _) => (scale, 1.0),
            (_, 0.0) => (0.0, 1.0),
            (_, magnitude) => (scale.signum(), magnitude),
        }
    }

    /// The keys that any of the queries `i0..i1` of batch row `b` sees: the union of their intervals.
    pub fn visible_span(&self, b: usize, i0: usize, i1: usize) -> (usize, usize) {
        // hi grows with i and lo does not depend on it, so the last query sees the union.
        self.visible(b, i1.max(i0 + 1) - 1)
    }
}
