//! The one validated description of an attention call. Engines trust it and check nothing again.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{self, Axis, Codes, CompactRef, GROUP};
use crate::tensor::{TensorMut, TensorRef};

/// Smallest and largest head_dim served.
pub const HEAD_DIM: std::ops::RangeInclusive<usize> = 8..=256;

/// Keys or values of a page.
#[derive(Debug, Clone, Copy)]
pub enum Side<'a> {
    /// `[batch, kv_heads, tokens, head_dim]` in q's dtype.
    Dense(TensorRef<'a>),
    /// Codes and scales, `[batch, kv_heads, tokens, width]`.
    Compact(CompactRef<'a>),
}

impl<'a> From<TensorRef<'a>> for Side<'a> {
    fn from(t: TensorRef<'a>) -> Self {
        Self::Dense(t)
    }
}

impl<'a> From<CompactRef<'a>> for Side<'a> {
    fn from(c: CompactRef<'a>) -> Self {
        Self::Compact(c)
    }
}

impl Side<'_> {
    /// `[batch, kv_heads, tokens, head_dim or width]`.
    pub fn shape(&self) -> [usize; 4] {
        match self {
            Self::Dense(t) => t.shape(),
            Self::Compact(c) => c.shape(),
        }
    }

    /// The dtype of dense rows.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            Self::Dense(t) => Some(t.dtype()),
            Self::Compact(_) => None,
        }
    }

    /// One element in float64, bounds checked; for the reference.
    pub fn get(&self, b: usize, h: usize, i: usize, d: usize) -> f64 {
        match self {
            Self::Dense(t) => f64::from(t.get(b, h, i, d)),
            Self::Compact(c) => c.get(b, h, i, d),
        }
    }

    /// Rows from token `i` on.
    pub fn rows(&self, b: usize, h: usize, i: usize) -> Rows {
        match self {
            Self::Dense(t) => Rows {
                ptr: t.row(b, h, i),
                stride: t.row_bytes(),
                codes: None,
                first: 0,
                params: std::ptr::null(),
                params_stride: 0,
            },
            Self::Compact(c) => match c.axis {
                Axis::Channel => Rows {
                    ptr: c.rows.row(b, h, i / GROUP),
                    stride: c.rows.row_bytes(),
                    codes: Some(c.codes),
                    first: i % GROUP,
                    params: c.params.row(b, h, i / GROUP).cast(),
                    params_stride: 0,
                },
                Axis::Token => Rows {
                    ptr: c.rows.row(b, h, i),
                    stride: c.rows.row_bytes(),
                    codes: Some(c.codes),
                    first: 0,
                    params: c.params.row(b, h, 0).cast::<u16>().wrapping_add(i),
                    params_stride: c.params.row_bytes(),
                },
            },
        }
    }
}

/// Where the keys and values of a call live: pages of tokens, each `[batch, kv_heads, tokens, head_dim]`, dense or
/// compact. Dense K/V is one page.
#[derive(Debug)]
pub struct KvRef<'a> {
    k: Vec<Side<'a>>,
    v: Vec<Side<'a>>,
    /// `start[p]` is the first token of page p; one more entry than pages.
    start: Vec<usize>,
    len: usize,
}

/// Rows of k or of v, a fixed stride apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// First row; of compact k the group of 64 tokens that all rows belong to.
    pub ptr: *const u8,
    /// Bytes between rows; of compact k between groups.
    pub stride: usize,
    /// What the rows are; None: dense.
    pub codes: Option<Codes>,
    /// Of compact k: which token of the group the first row is.
    pub first: usize,
    /// float16. k: the group's scales, then its offsets (`width` each). v: scales of the first 64 channels, from the first
    /// row's token on.
    pub params: *const u16,
    /// Bytes from the params of 64 channels of v to those of the next 64; after all scales come all offsets.
    pub params_stride: usize,
}

/// A run of tokens that lie in one page; where its k is compact, in one group of 64 tokens.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Rows of k.
    pub k: Rows,
    /// Rows of v.
    pub v: Rows,
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

    /// K and V as pages, of which the first `kv_len` tokens are in use. Pages may differ in size and in format.
    ///
    /// # Errors
    /// When pages disagree in batch, heads, head_dim or dtype, k and v pages differ, or `kv_len` exceeds the pages.
    pub fn paged<S: Into<Side<'a>>>(k: Vec<S>, v: Vec<S>, kv_len: usize) -> Result<Self> {
        let k: Vec<Side> = k.into_iter().map(Into::into).collect();
        let v: Vec<Side> = v.into_iter().map(Into::into).collect();
        if k.is_empty() || k.len() != v.len() {
            return Err(Error::value("v", format!("as many pages as k, at least one (k has {})", k.len()), v.len()));
        }
        let dtype = k.iter().chain(&v).find_map(Side::dtype);
        let mut start = Vec::with_capacity(k.len() + 1);
        let mut at = 0usize;
        let first = k[0].shape();
        // Dense rows have head_dim elements, compact ones a width; all must be of one kind each.
        let head_dim = k.iter().chain(&v).find(|s| s.dtype().is_some()).map(|s| s.shape()[3]);
        let wide = |s: &Side| match (s, head_dim) {
            (Side::Dense(t), Some(d)) => t.shape()[3] == d,
            (Side::Dense(_), None) => true,
            (Side::Compact(c), Some(d)) => c.shape()[3] == quant::width(d),
            (Side::Compact(c), None) => c.shape()[3] == first[3],
        };
        for (i, (kp, vp)) in k.iter().zip(&v).enumerate() {
            let v_name = || if k.len() == 1 { "v".into() } else { format!("v page {i}") };
            for (s, name, of) in [(kp, format!("k page {i}"), ""), (vp, v_name(), "the dtype of k, ")] {
                if let (Some(is), Some(want)) = (s.dtype(), dtype)
                    && is != want
                {
                    return Err(Error::type_(name, format!("{of}{}", want.name()), is.name()));
                }
            }
            let (ks, vs) = (kp.shape(), vp.shape());
            if [ks[0], ks[1]] != [first[0], first[1]] || !wide(kp) {
                return Err(Error::value(
                    format!("k page {i}"),
                    format!("[{}, {}, any, {}] as page 0", first[0], first[1], first[3]),
                    format!("{ks:?}"),
                ));
            }
            // Compact keys come in whole groups: how many tokens a page has, its values say.
            let tokens = if kp.dtype().is_none() { vs[2].next_multiple_of(GROUP) } else { vs[2] };
            if [vs[0], vs[1], tokens] != ks[..3] || !wide(vp) {
                return Err(Error::value(v_name(), format!("the shape of k, {ks:?}"), format!("{vs:?}")));
            }
            for (s, axis, name) in [(kp, Axis::Channel, "k"), (vp, Axis::Token, "v")] {
                if let Side::Compact(c) = s
                    && c.axis != axis
                {
                    let got = format!("{:?}", c.axis);
                    return Err(Error::value(format!("{name} page {i}"), format!("scales by {axis:?}"), got));
                }
            }
            start.push(at);
            at = at.checked_add(vs[2]).ok_or_else(|| Error::value("k", "fewer tokens", "more than 2^64"))?;
        }
        start.push(at);
        if kv_len > at {
            return Err(Error::value("kv_len", format!("at most the {at} tokens that the pages hold"), kv_len));
        }
        Ok(Self { k, v, start, len: kv_len })
    }

    /// `[batch, kv_heads, kv_len, head_dim]`; the last is the width where every page is compact.
    pub fn shape(&self) -> [usize; 4] {
        let s = self.k[0].shape();
        let all = self.k.iter().chain(&self.v);
        let d = all.clone().find(|s| s.dtype().is_some()).map_or(s[3], |s| s.shape()[3]);
        [s[0], s[1], self.len, d]
    }

    /// Tokens that the pages hold, in use or not.
    pub fn held(&self) -> usize {
        self.start[self.k.len()]
    }

    /// Element type of dense k and v; None where every page is compact.
    pub fn dtype(&self) -> Option<DType> {
        self.k.iter().chain(&self.v).find_map(Side::dtype)
    }

    /// Pages that hold tokens in use: k, v, the first token, and how many are in use.
    pub fn pages(&self) -> impl Iterator<Item = (&Side<'a>, &Side<'a>, usize, usize)> {
        let used = move |p: usize| self.start[p + 1].min(self.len).saturating_sub(self.start[p]);
        (0..self.k.len()).map(move |p| (&self.k[p], &self.v[p], self.start[p], used(p))).filter(|page| page.3 > 0)
    }

    /// Whether any page is compact.
    pub fn is_compact(&self) -> bool {
        self.k.iter().chain(&self.v).any(|s| s.dtype().is_none())
    }

    /// The longest run that starts at token `j` and stays within a page (and a group of compact k) and below `end`
    /// (`j < end <= kv_len`).
    pub fn run(&self, b: usize, h: usize, j: usize, end: usize) -> Run {
        debug_assert!(j < end && end <= self.len);
        // The last page that starts at or before j and is not empty there.
        let p = self.start.partition_point(|&s| s <= j) - 1;
        let i = j - self.start[p];
        let (k, v) = (self.k[p].rows(b, h, i), self.v[p].rows(b, h, i));
        let len = self.start[p + 1].min(end) - j;
        Run { k, v, len: if k.codes.is_some() { len.min(GROUP - i % GROUP) } else { len } }
    }

    /// k and v elements in float64, bounds checked; for the reference.
    pub fn get(&self, b: usize, h: usize, j: usize, d: usize) -> (f64, f64) {
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
    /// What is compared with what.
    pub scores: Scores<'a>,
    /// Output.
    pub out: TensorMut<'a>,
    /// Optional log-sum-exp.
    pub lse: Option<TensorMut<'a>>,
}

impl<'a> std::ops::Deref for Problem<'a> {
    type Target = Scores<'a>;

    fn deref(&self) -> &Scores<'a> {
        &self.scores
    }
}

/// Queries, and the keys and values that each of them sees: what a forward and a backward pass share.
#[derive(Debug)]
pub struct Scores<'a> {
    /// `[batch, q_heads, q_len, head_dim]`.
    pub q: TensorRef<'a>,
    /// Keys and values.
    pub kv: KvRef<'a>,
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
        let (out, lse) = (self.out, self.lse);
        let scores = ScoreArgs {
            q: self.q,
            kv: self.kv,
            causal: self.causal,
            softmax_scale: self.softmax_scale,
            q_start: self.q_start,
            kv_start: self.kv_start,
            kv_end: self.kv_end,
        }
        .validate()?;
        as_q("out", &scores, out.shape(), out.dtype())?;
        if let Some(lse) = &lse {
            per_query("lse", &scores, lse.shape(), lse.dtype())?;
        }
        Ok(Problem { scores, out, lse })
    }
}

/// A tensor of q's shape, in q's dtype or float32.
pub(crate) fn as_q(name: &str, s: &Scores, shape: [usize; 4], dtype: DType) -> Result<()> {
    if shape != s.q.shape() {
        return Err(Error::value(name, format!("the shape of q, {:?}", s.q.shape()), format!("{shape:?}")));
    }
    if dtype != s.q.dtype() && dtype != DType::F32 {
        let want = format!("the dtype of q, {}, or float32", s.q.dtype().name());
        return Err(Error::type_(name, want, dtype.name()));
    }
    Ok(())
}

/// One float32 for each query of each head.
pub(crate) fn per_query(name: &str, s: &Scores, shape: [usize; 4], dtype: DType) -> Result<()> {
    if dtype != DType::F32 {
        return Err(Error::type_(name, "float32", dtype.name()));
    }
    let (batch, q_heads, q_len) = (s.batch, s.q_heads, s.q_len);
    if shape != [batch, q_heads, q_len, 1] {
        return Err(Error::value(name, format!("[{batch}, {q_heads}, {q_len}]"), format!("{:?}", &shape[..3])));
    }
    Ok(())
}

/// The part of a call that says which query sees which key; fields as in [`AttnArgs`].
#[derive(Debug)]
pub(crate) struct ScoreArgs<'a> {
    pub q: TensorRef<'a>,
    pub kv: KvRef<'a>,
    pub causal: bool,
    pub softmax_scale: Option<f64>,
    pub q_start: Option<i64>,
    pub kv_start: Option<&'a [i64]>,
    pub kv_end: Option<&'a [i64]>,
}

impl<'a> ScoreArgs<'a> {
    /// Checks everything once.
    pub fn validate(self) -> Result<Scores<'a>> {
        let [batch, q_heads, q_len, head_dim] = self.q.shape();
        let [kb, kv_heads, kv_len, kd] = self.kv.shape();
        if let Some(dtype) = self.kv.dtype().filter(|d| *d != self.q.dtype()) {
            return Err(Error::type_("k", format!("the dtype of q, {}", self.q.dtype().name()), dtype.name()));
        }
        let fits = kd == if self.kv.dtype().is_some() { head_dim } else { quant::width(head_dim) };
        if kb != batch || !fits {
            let want = format!("[{batch}, kv_heads, kv_len, {head_dim}] to go with q {:?}", self.q.shape());
            return Err(Error::value("k", want, format!("{:?}", self.kv.shape())));
        }
        if !HEAD_DIM.contains(&head_dim) {
            return Err(Error::value("q", "head_dim from 8 to 256", format!("head_dim {head_dim}")));
        }
        if q_heads > 0 && (kv_heads == 0 || q_heads % kv_heads != 0) {
            return Err(Error::value("k", format!("kv_heads to divide q_heads={q_heads}"), kv_heads));
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
        Ok(Scores {
            q: self.q,
            kv: self.kv,
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

impl Scores<'_> {
    /// Whether keys after a query's own position are hidden.
    pub fn causal(&self) -> bool {
        self.causal
    }

    /// Position of the first query.
    pub fn q_start(&self) -> i64 {
        self.q_start
    }

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
