"""Attention over a sequence that is spread over ranks: exact, forward and backward (Liu et al., 2310.01889)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import Merged, Sums
from .call import Call, agreed
from .journey import Homeward, blocks
from .layout import Layout

__all__ = ["attend", "backward", "forward", "give_back", "ring_attention"]


@torch.compiler.disable
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout | None = None,
    *,
    length: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    documents: Sequence[int] | None = None,
    kv_start: Tensor | int | None = None,
    kv_end: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over a sequence of which each rank holds a shard; all ranks of the layout call it.

    Queries stay where they are; blocks of keys and values travel around the ring in q's dtype (or compact: the layout's
    `kv_format`), kv heads not repeated, and no farther than some query sees them. Partials are merged in float32. In the backward pass blocks travel again, their
    gradients follow them in float32 and end where the block began. The same bits in every run.

    Args:
        q: this rank's shard, `[batch, q_heads, n, head_dim]`, float32, bfloat16 or float16: the positions
            `layout.positions(length)`, in that order. Shards may be uneven, or empty.
        k, v: likewise, `[batch, kv_heads, n, head_dim]`, kv_heads dividing q_heads.
        layout: who holds what; None: a zigzag ring of the default process group, or this process alone.
        length: of the whole sequence; None: the ranks ask each other, which on GPUs waits for the device in every call. With
            it ranks on GPUs compare what they do only when it is something new.
        causal: hide keys after the query's own position.
        softmax_scale: multiplies the scores; default `1 / sqrt(head_dim)`.
        documents: start positions of packed documents, rising, the first 0: no query sees a key of another document.
        kv_start, kv_end: first visible position of each batch row, and one past the last: int64 `[batch]`, or one int for all.
            The same on all ranks (compared on CPUs; on GPUs nobody waits for them).
        return_lse: also return the natural log-sum-exp of the scores.

    Returns:
        out `[batch, q_heads, n, head_dim]` in q's dtype, laid out `[batch, n, q_heads, head_dim]` in memory; with `return_lse` also
        lse, float32 `[batch, q_heads, n]`. Both have gradients, once. A query that sees no key gets out 0 and lse -inf.

    Raises:
        agreement.DisagreementError: ranks differ in options, shapes, dtypes or versions, or one of them can't go on; on all
            ranks, before any work.
        TypeError, ValueError, cuda.Missing: arguments that don't fit, a GPU that isn't served; likewise on all ranks, of these
            types where the fault is.
        transfer.LinkError: a rank died or hangs; on every rank, within the layout's timeout.
    """
    layout = Layout() if layout is None else layout
    call = agreed(q, k, v, layout, length, causal, softmax_scale, documents, kv_start, kv_end)
    out, lse = _Ring.apply(call, q, k, v)
    return (out, lse) if return_lse else out


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """This ring rank's out (float32) and lse, where it holds whole ring shards of its heads."""
    merged, what = Merged(q, call.scale), "ring attention, forward"
    for step, block in blocks(call.layout, call.plan, k, v, what):
        if step.pieces:
            assert block is not None
            merged.add(*block, step.pieces, call.bounds.of(step.source))
    return merged.out, merged.lse


def backward(
    call: Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 dq, dk and dv of this ring rank's own shards, from what `forward` gave."""
    what = "ring attention, backward"
    sizes = k.shape[0], k.shape[1], k.shape[3]
    sums = Sums(grad, q, out, lse, grad_lse, call.scale, sizes, call.plan.lengths)
    home = Homeward(call.layout, call.plan, sums, what)
    for step, block in blocks(call.layout, call.plan, k, v, what):
        if step.pieces:
            assert block is not None
            sums.add(step.source, *block, step.pieces, call.bounds.of(step.source))
        home.after(step.step)
    home.after(len(call.plan.steps))
    home.settle()
    dk, dv = sums.of(call.layout.ring_rank)
    return sums.dq, dk, dv


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Forward from shards to shards.

    Returns:
        (q, k, v, out, lse as the ring has them, for backward), (out, lse).
    """
    heads = call.layout.head_group(call.plan.lengths[call.layout.ring_rank])
    what = "ring attention, forward"
    held = heads.gather([q, k, v], what)
    wide, lse = forward(call, held[0], held[1], held[2])
    out = _laid_out(wide, q.dtype)
    own = out, lse
    if heads.degree > 1:
        back = heads.scatter([out, lse], [call.q_heads, call.q_heads], what)
        own = _laid_out(back[0], q.dtype), back[1]
    return (*held, out, lse), own


def give_back(
    call: Call, grad: Tensor, grad_lse: Tensor | None, held: Sequence[Tensor], gathered: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from shards to shards; `held` as `attend` returns it.

    Args:
        gathered: grad and grad_lse are as the ring has them already.
    """
    q, k, v, out, lse = held
    heads = call.layout.head_group(call.plan.lengths[call.layout.ring_rank])
    what = "ring attention, backward"
    if heads.degree > 1 and not gathered:
        grad_lse = torch.zeros(grad.shape[:3], device=grad.device) if grad_lse is None else grad_lse
        grad, grad_lse = heads.gather([grad, grad_lse], what)
    dq, dk, dv = backward(call, grad, q, k, v, out, lse, grad_lse)
    dtype = q.dtype
    if heads.degree > 1:
        # Sums of several ranks are rounded once, after they are added.
        shared = heads.degree > call.kv_heads
        dk, dv = (t if shared else t.to(dtype) for t in (dk, dv))
        counts = [call.q_heads, call.kv_heads, call.kv_heads]
        dq, dk, dv = heads.scatter([dq.to(dtype), dk, dv], counts, what)
    return _laid_out(dq, dtype), _laid_out(dk, dtype), _laid_out(dv, dtype)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held, (out, lse) = attend(call, q, k, v)
        ctx.call = call
        ctx.save_for_backward(*held)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        # Ranks whose results nobody used take part all the same: others wait for them.
        q = ctx.saved_tensors[0]
        call = ctx.call
        n = call.layout.lengths(call.length)[call.layout.rank]
        shape = (q.shape[0], call.q_heads, n, q.shape[3])
        if grad is None:
            grad = q.new_zeros(shape)
        elif grad.stride(-1) != 1:
            grad = grad.contiguous()
        return (None, *give_back(call, grad, grad_lse, ctx.saved_tensors))


def _laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[batch, heads, n, head_dim]` over memory `[batch, n, heads, head_dim]`, in the dtype."""
    return x.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)
