//! The verbs as callers know them: check once, choose the kernel family, compute.

use crate::args::{AttnArgs, Problem};
use crate::cpu::{self, Context};
use crate::error::Result;
use crate::gradients::BackwardArgs;

/// Exact attention of q over the visible keys; few rows go to decode, the rest to prefill.
///
/// # Errors
/// When the arguments don't fit together, or the work was interrupted.
pub fn attention(args: AttnArgs, cx: &Context) -> Result<()> {
    let p = args.validate()?;
    if p.group * p.q_len <= cpu::decode::ROWS {
        cpu::decode::attention_decode(&p, cx)
    } else {
        cpu::attention::attention_forward(&p, cx)
    }
}

/// Prefill, whatever the number of queries.
///
/// # Errors
/// As [`attention`].
pub fn attention_forward(args: AttnArgs, cx: &Context) -> Result<()> {
    let p: Problem = args.validate()?;
    cpu::attention::attention_forward(&p, cx)
}

/// Decode, whatever the number of queries.
///
/// # Errors
/// As [`attention`].
pub fn attention_decode(args: AttnArgs, cx: &Context) -> Result<()> {
    let p: Problem = args.validate()?;
    cpu::decode::attention_decode(&p, cx)
}

/// Gradients of q, k and v from what the forward pass left, blockwise: memory beyond the results is float32 dk and dv of a
/// few heads (see [`cpu::backward`]). The same bits on any number of threads.
///
/// # Errors
/// As [`attention`]; compact keys and values have no gradients.
pub fn attention_backward(args: BackwardArgs, cx: &Context) -> Result<()> {
    cpu::backward::attention_backward(&args.validate()?, cx)
}
