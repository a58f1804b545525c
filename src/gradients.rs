//! The one validated description of a backward call. Engines trust it and check nothing again.

use crate::args::{KvRef, ScoreArgs, Scores, as_q, per_query};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{TensorMut, TensorRef};

/// What a caller of the backward pass asks for; [`BackwardArgs::validate`] makes the [`Gradients`] that engines take.
#[derive(Debug)]
pub struct BackwardArgs<'a> {
    /// Gradient of `out`, `[batch, q_heads, q_len, head_dim]`, q's dtype or float32.
    pub grad_out: TensorRef<'a>,
    /// As in [`crate::AttnArgs`], and likewise below.
    pub q: TensorRef<'a>,
    /// Keys and values, all of them dense.
    pub kv: KvRef<'a>,
    /// What the forward pass wrote, q's dtype or float32.
    pub out: TensorRef<'a>,
    /// What the forward pass wrote, `[batch, q_heads, q_len, 1]` float32.
    pub lse: TensorRef<'a>,
    /// Gradient of `lse`, likewise; None: 0.
    pub grad_lse: Option<TensorRef<'a>>,
    /// Where the gradient of q goes, q's dtype or float32.
    pub dq: TensorMut<'a>,
    /// Where the gradient of k goes, `[batch, kv_heads, tokens, head_dim]` for all tokens that the pages hold, q's dtype
    /// or float32. Keys that nobody sees get zeros.
    pub dk: TensorMut<'a>,
    /// Where the gradient of v goes, likewise.
    pub dv: TensorMut<'a>,
    /// As in [`crate::AttnArgs`].
    pub causal: bool,
    /// As in [`crate::AttnArgs`].
    pub softmax_scale: Option<f64>,
    /// As in [`crate::AttnArgs`].
    pub q_start: Option<i64>,
    /// As in [`crate::AttnArgs`].
    pub kv_start: Option<&'a [i64]>,
    /// As in [`crate::AttnArgs`].
    pub kv_end: Option<&'a [i64]>,
}

/// A backward call that has been checked.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// What was compared with what.
    pub scores: Scores<'a>,
    /// Gradient of `out`.
    pub grad_out: TensorRef<'a>,
    /// What the forward pass wrote.
    pub out: TensorRef<'a>,
    /// What the forward pass wrote.
    pub lse: TensorRef<'a>,
    /// Gradient of `lse`; None: 0.
    pub grad_lse: Option<TensorRef<'a>>,
    /// Gradient of q.
    pub dq: TensorMut<'a>,
    /// Gradient of k.
    pub dk: TensorMut<'a>,
    /// Gradient of v.
    pub dv: TensorMut<'a>,
}

impl<'a> std::ops::Deref for Gradients<'a> {
    type Target = Scores<'a>;

    fn deref(&self) -> &Scores<'a> {
        &self.scores
    }
}

impl<'a> BackwardArgs<'a> {
    /// Checks everything once.
    ///
    /// # Errors
    /// Names the argument, what was expected and what came.
    pub fn validate(self) -> Result<Gradients<'a>> {
        if self.kv.is_compact() {
            return Err(Error::type_("k", "dense keys and values, which alone have gradients", "compact ones"));
        }
        let held = self.kv.held();
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
        as_q("grad_out", &scores, self.grad_out.shape(), self.grad_out.dtype())?;
        as_q("out", &scores, self.out.shape(), self.out.dtype())?;
        as_q("dq", &scores, self.dq.shape(), self.dq.dtype())?;
        per_query("lse", &scores, self.lse.shape(), self.lse.dtype())?;
        if let Some(g) = &self.grad_lse {
            per_query("grad_lse", &scores, g.shape(), g.dtype())?;
        }
        let shape = [scores.batch, scores.kv_heads, held, scores.head_dim];
        for (name, t) in [("dk", &self.dk), ("dv", &self.dv)] {
            if t.shape() != shape {
                return Err(Error::value(name, format!("the shape of k, {shape:?}"), format!("{:?}", t.shape())));
            }
            if t.dtype() != scores.q.dtype() && t.dtype() != DType::F32 {
                let want = format!("the dtype of q, {}, or float32", scores.q.dtype().name());
                return Err(Error::type_(name, want, t.dtype().name()));
            }
        }
        Ok(Gradients {
            scores,
            grad_out: self.grad_out,
            out: self.out,
            lse: self.lse,
            grad_lse: self.grad_lse,
            dq: self.dq,
            dk: self.dk,
            dv: self.dv,
        })
    }
}
