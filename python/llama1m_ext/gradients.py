"""Gradients of `ops`: what autograd calls, in eager code and inside `torch.compile`.

`attention` keeps q, k, v, out and lse, and its backward pass computes the weights again, a block at a time (Dao, 2307.08691,
section 3.1.2): no memory grows with q_len x kv_len, unless gradients of gradients are asked for. Partials are merged, and
positions turned back, by formulas that can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _core, cuda, memory

_DEVICES = ("cpu", "cuda")


def like(x: Tensor, dtype: torch.dtype | None = None, length: int | None = None) -> Tensor:
    """A result for x: `[batch, heads, len, head_dim]` over memory `[batch, len, heads, head_dim]`."""
    if x.dim() != 4:
        return torch.empty_like(x)  # the core names the argument and refuses
    batch, heads, own, head_dim = x.shape
    shape = (batch, own if length is None else length, heads, head_dim)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device).transpose(1, 2)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | int | None,
    kv_end: Tensor | int | None,
    kv_len: int | None,
    grad_lse: Tensor | None,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, the latter over the tokens of all pages; see `ops.attention_backward`."""
    held = sum(page.shape[2] for page in v)
    dq, dk, dv = like(q, grad_dtype), like(k[0], grad_dtype, held), like(v[0], grad_dtype, held)
    where: dict[str, Any] = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "q_start": q_start,
        "kv_start": kv_start,
        "kv_end": kv_end,
        "kv_len": kv_len,
        "grad_lse": grad_lse,
    }
    grad_out = grad_out.resolve_neg()
    where["grad_lse"] = None if grad_lse is None else grad_lse.resolve_neg()
    if grad_out.dim() == 4 and grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()  # of a sum: one number, expanded
    if cuda.serves(q):
        cuda.attention_backward(grad_out, q, list(k), list(v), out, lse, dq, dk, dv, **where)
    else:
        threads = torch.get_num_threads()
        _core.attention_backward(grad_out, q, list(k), list(v), out, lse, dq, dk, dv, **where, threads=threads)
    return dq, dk, dv


def by_page(grad: Tensor, pages: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each page, from that of all tokens."""
    return list(grad.split([page.shape[2] for page in pages], dim=2))


@torch.library.custom_op("llama1m_ext::attention_backward", mutates_args=(), device_types=_DEVICES)
def _attention_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    kv_len: int | None,
    grad_lse: Tensor | None,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(
        grad_out, q, k, v, out, lse, causal, softmax_scale, q_start, kv_start, kv_end, kv_len, grad_lse, grad_dtype
    )


@_attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    kv_len: int | None,
    grad_lse: Tensor | None,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    held = sum(page.shape[2] for page in v)
    return like(q, grad_dtype), like(k[0], grad_dtype, held), like(v[0], grad_dtype, held)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    causal, softmax_scale, q_start, kv_start, kv_end, kv_len, _, _ = rest
    ctx.pages, ctx.options = len(k), (causal, softmax_scale, q_start)
    ctx.kv_len = kv_len
    ctx.save_for_backward(q, *k, *v, *output, kv_start, kv_end)
    ctx.set_materialize_grads(False)


def _of_attention(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, *rest = ctx.saved_tensors
    k, v = rest[: ctx.pages], rest[ctx.pages : 2 * ctx.pages]
    out, lse, kv_start, kv_end = rest[2 * ctx.pages :]
    places = (kv_start, kv_end, ctx.kv_len)
    if grad_out is None and grad_lse is None:
        return None, [None] * len(k), [None] * len(v), *(None,) * 8
    if lse.dim() != 3:  # the operator was called without `return_lse`
        _, lse = torch.ops.llama1m_ext.attention(q, k, v, *ctx.options, *places, True, None)
        grad_lse = None
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if torch.is_grad_enabled():  # `create_graph=True`: who asks will differentiate these again
        dq, of_k, of_v = _differentiable(grad_out, grad_lse, q, k, v, ctx.options, places)
        return dq, of_k, of_v, *(None,) * 8
    dq, dk, dv = torch.ops.llama1m_ext.attention_backward(
        grad_out, q, k, v, out, lse, *ctx.options, *places, grad_lse, None
    )
    return dq, by_page(dk, k), by_page(dv, v), *(None,) * 8


def _differentiable(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    options: tuple[bool, float | None, int | None],
    places: tuple[Tensor | None, Tensor | None, int | None],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """What backward gives, as a graph of torch's own operations that has gradients in its turn (gradient penalties, Hessian
    products): attention by its formula, in float32, with all its weights in memory.

    Raises:
        ValueError: memory does not hold them.
    """
    (causal, softmax_scale, q_start), (kv_start, kv_end, kv_len) = options, places
    held = sum(page.shape[2] for page in k)
    n, (batch, q_heads, q_len, head_dim) = held if kv_len is None else kv_len, q.shape
    need = 6 * 4 * batch * q_heads * q_len * n
    room = memory.available_bytes() if q.device.type == "cpu" else memory.free_bytes(q.device)
    if room is not None and need > room:
        raise ValueError(
            f"gradients of gradients of attention to {n} keys from {q_len} queries would need about {need / 2**30:.1f} GiB, and "
            f"{room / 2**30:.1f} GiB are available; first-order gradients (create_graph=False) need no such matrix"
        )
    with torch.enable_grad():
        # Views of their own: one tensor may be q, k and v at once, or be made of another.
        q, k, v = q.view_as(q), [page.view_as(page) for page in k], [page.view_as(page) for page in v]
        keys, values = (
            torch.cat(list(pages), 2)[:, :, :n].repeat_interleave(q_heads // k[0].shape[1], 1) for pages in (k, v)
        )
        j = torch.arange(n, device=q.device)
        seen = torch.ones(batch, 1, q_len, n, dtype=torch.bool, device=q.device)
        if causal:
            start = n - q_len if q_start is None else q_start
            seen = seen & (j <= (torch.arange(q_len, device=q.device) + start)[:, None])
        for bound, is_start in ((kv_start, True), (kv_end, False)):
            if bound is not None:
                rows = bound.to(q.device).view(-1, 1, 1, 1)
                seen = seen & (j >= rows if is_start else j < rows)
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        scores = (q.float() @ keys.float().transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        out = weights @ values.float()
        results, grads = [out], [grad_out.float()]
        if grad_lse is not None:
            results, grads = [out, lse.masked_fill(~seen.any(-1), 0.0)], [grad_out.float(), grad_lse]
        wanted = [t for t in (q, *k, *v) if t.requires_grad]
        given = iter(torch.autograd.grad(results, wanted, grads, create_graph=True, allow_unused=True))
    dq, *rest = (next(given) if t.requires_grad else None for t in (q, *k, *v))
    return dq, rest[: len(k)], rest[len(k) :]


def _keep_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.partials = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)
    ctx.set_materialize_grads(False)


def _of_merge(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[list[Tensor | None], ...]:
    """With weights `w_i = exp(lse_i - lse)`: `w_i grad_out` and `w_i (grad_lse + grad_out . (out_i - out))`, in float32. A
    partial that saw no key gets zeros, whatever its out is."""
    saved = ctx.saved_tensors  # once: under torch.utils.checkpoint each look recomputes
    outs, lses, (out, lse) = saved[: ctx.partials], saved[ctx.partials : -2], saved[-2:]
    grad = None if grad_out is None else grad_out.float()
    of_outs, of_lses = list[Tensor | None](), list[Tensor | None]()
    for o, s in zip(outs, lses, strict=True):
        dead = s == -torch.inf
        w = (s - lse).masked_fill(dead, -torch.inf).exp()
        of_lse = torch.zeros_like(w) if grad_lse is None else grad_lse
        if grad is None:
            of_outs.append(None)
        else:
            of_outs.append((w[..., None] * grad).to(o.dtype))
            of_lse = of_lse + (grad * (o.float().masked_fill(dead[..., None], 0.0) - out.float())).sum(-1)
        of_lses.append(w * of_lse)
    return of_outs, of_lses


def _keep_rope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, positions, inv_freq, ctx.attention_scaling = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(positions, inv_freq)
    ctx.set_materialize_grads(False)


def _of_rope(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
    """The turn back: by minus the angle, times the same scaling."""
    positions, inv_freq = ctx.saved_tensors
    given = [None if g is None or (i == 1 and not ctx.has_k) else _rows(g) for i, g in enumerate((grad_q, grad_k))]
    some = [g for g in given if g is not None]
    if not some:
        return None, None, None, None, None
    first, second = torch.ops.llama1m_ext.rope_apply(
        some[0], some[1] if len(some) > 1 else None, positions, -inv_freq, ctx.attention_scaling
    )
    turned = iter((first, second))
    return *(None if g is None else next(turned) for g in given), None, None, None


def _rows(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def register() -> None:
    """Tells torch the gradients of the operators, once those are there."""
    torch.library.register_autograd("llama1m_ext::attention", _of_attention, setup_context=_keep_attention)
    torch.library.register_autograd("llama1m_ext::merge_partials", _of_merge, setup_context=_keep_merge)
    torch.library.register_autograd("llama1m_ext::rope_apply", _of_rope, setup_context=_keep_rope)
