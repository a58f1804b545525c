"""Attention in float64, and in the dtype itself: what is true, and how wrong an ordinary implementation may be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 65536


def visible(
    q_len: int, kv_len: int, batch: int, device: torch.device, *, causal: bool, q_start: int, **rows: Any
) -> Tensor:
    """bool `[batch, 1, q_len, kv_len]`. rows: kv_start and kv_end, int64 `[batch]` or None."""
    i = torch.arange(q_len, device=device)[:, None] + q_start
    j = torch.arange(kv_len, device=device)[None, :]
    seen = (j <= i) if causal else torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    seen = seen.expand(batch, 1, q_len, kv_len)
    if rows.get("kv_start") is not None:
        seen = seen & (j >= rows["kv_start"].reshape(-1, 1, 1, 1))
    if rows.get("kv_end") is not None:
        seen = seen & (j < rows["kv_end"].reshape(-1, 1, 1, 1))
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse in float64. NaN in keys that a row does not see does not spread, nor does what stands in their values."""
    group = q.shape[1] // k.shape[1]
    q64 = q.double()
    k64, v64 = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q64 @ k64.transpose(-1, -2)) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(~mask, -math.inf)
    seen = mask.any(2).expand(q.shape[0], 1, k.shape[2])  # a key that nobody sees may be anything
    v64 = v64.masked_fill(~seen[..., None], 0.0)
    return torch.nan_to_num(scores.softmax(-1)) @ v64, scores.logsumexp(-1)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As transformers' eager attention: products in the dtype, softmax in float32, probabilities in the dtype again."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    seen = mask.any(2).expand(q.shape[0], 1, k.shape[2])
    v = v.masked_fill(~seen[..., None], 0.0)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(~mask, -math.inf)
    return torch.nan_to_num(scores.float().softmax(-1)).to(q.dtype) @ v


def gradients(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor, grad_out: Tensor, grad_lse: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Those of q, k and v by autograd of eager attention: products in the dtype, softmax in float32, or all in float64. What no query
    of its batch row sees gets 0, whatever it is."""
    q, k, v = (x.detach().to(dtype) for x in tensors)
    hidden = ~mask.any(2).expand(q.shape[0], 1, k.shape[2])[..., None]
    leaves = [x.requires_grad_() for x in (q.clone(), k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0))]
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in leaves[1:])
    wide = torch.promote_types(dtype, torch.float32)
    empty = ~mask.any(-1, keepdim=True)
    scores = ((leaves[0] @ wide_k.transpose(-1, -2)) / math.sqrt(q.shape[3])).to(wide)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    out = scores.softmax(-1).masked_fill(empty, 0.0).to(dtype) @ wide_v
    loss = (out.to(wide) * grad_out.to(wide)).sum()
    if grad_lse is not None:
        loss = loss + (scores.logsumexp(-1) * grad_lse.masked_fill(empty[..., 0].expand_as(grad_lse), 0.0)).sum()
    return list(torch.autograd.grad(loss, leaves))


def sampled_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, rows: Tensor, *, causal: bool
) -> list[Tensor]:
    """dq, dk and dv at a few positions (as many queries as keys) in float64, a block of the others at a time, from out and lse as they
    are given."""
    batch, q_heads, length, head_dim = q.shape
    kv_heads, scale = k.shape[1], 1 / math.sqrt(head_dim)
    split = (batch, kv_heads, q_heads // kv_heads)

    def by_group(x: Tensor) -> Tensor:
        return x.double().reshape(*split, *x.shape[2:])

    of_rows = [by_group(x[:, :, rows]) for x in (q, grad_out, out)]
    row_lse = by_group(lse[:, :, rows])
    row_k, row_v = (x[:, :, rows].double() for x in (k, v))
    dq, dk, dv = torch.zeros_like(of_rows[0]), torch.zeros_like(row_k), torch.zeros_like(row_v)

    def slopes(
        q: Tensor, g: Tensor, o: Tensor, lse: Tensor, k: Tensor, v: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = ((q @ k[:, :, None].transpose(-1, -2)) * scale - lse[..., None]).exp().masked_fill(~seen, 0.0)
        return weights, weights * (g @ v[:, :, None].transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale

    step = 4096
    for start in range(0, length, step):
        at = torch.arange(start, min(length, start + step), device=q.device)
        here = slice(start, start + step)
        keys, values = k[:, :, here].double(), v[:, :, here].double()
        seen = (
            (at[None, :] <= rows[:, None])
            if causal
            else torch.ones(len(rows), len(at), dtype=torch.bool, device=q.device)
        )
        _, slope = slopes(*of_rows, row_lse, keys, values, seen)
        dq += slope @ keys[:, :, None]
        some = [by_group(x[:, :, here]) for x in (q, grad_out, out)]
        seen = (rows[None, :] <= at[:, None]) if causal else seen.transpose(0, 1)
        weights, slope = slopes(*some, by_group(lse[:, :, here]), row_k, row_v, seen)
        dk += (slope.transpose(-1, -2) @ some[0]).sum(2)
        dv += (weights.transpose(-1, -2) @ some[1]).sum(2)
    return [dq.reshape(batch, q_heads, len(rows), head_dim), dk, dv]


def long_rows(q: Tensor, k: Tensor, v: Tensor, *, last: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse in float64 of a few queries over very many keys, a block of keys at a time. `last`: the last key that each
    query sees, int64 `[q_len]`."""
    batch, q_heads, q_len, head_dim = q.shape
    group = q_heads // k.shape[1]
    q64 = q.double().reshape(batch, k.shape[1], group * q_len, head_dim) / math.sqrt(head_dim)
    top = torch.full((batch, k.shape[1], group * q_len), -math.inf, dtype=torch.float64, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros_like(q64)
    for start in range(0, k.shape[2], BLOCK):
        keys, values = k[:, :, start : start + BLOCK].double(), v[:, :, start : start + BLOCK].double()
        hidden = torch.arange(start, start + keys.shape[2], device=q.device)[None, :] > last[:, None]
        scores = (q64 @ keys.transpose(-1, -2)).reshape(batch, k.shape[1], group, q_len, keys.shape[2])
        scores = scores.masked_fill(hidden, -math.inf).flatten(2, 3)
        new = torch.maximum(top, scores.amax(-1))
        shift = torch.where(torch.isneginf(new), 0.0, new)
        weights = (scores - shift[..., None]).exp()
        fade = (top - shift).exp()
        total = total * fade + weights.sum(-1)
        out = out * fade[..., None] + weights @ values
        top = new
    lse = (top + total.log()).reshape(batch, q_heads, q_len)
    out = torch.nan_to_num(out / total[..., None])
    return out.reshape(batch, q_heads, q_len, head_dim), lse


def errors(out: Tensor, want: Tensor) -> tuple[float, float]:
    """(largest error, norm of the error over norm of the truth); NaN counts as infinite."""
    difference = torch.nan_to_num(out.double() - want, nan=math.inf, posinf=math.inf, neginf=math.inf)
    largest = difference.abs().max().item() if difference.numel() else 0.0
    norm = want.norm().item()
    return largest, (difference.norm().item() / norm if norm else largest)


HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def allowance(dtype: torch.dtype, want: Tensor, yardstick: Tensor) -> float:
    """The largest error that is let pass: the yardstick's own in the same dtype, and never less than rounding the truth costs
    twice (P and the output are both rounded)."""
    rounding = 2 * HALF_ULP[dtype] * max(1.0, want.abs().max().item() if want.numel() else 1.0)
    return max(errors(yardstick, want)[0], rounding)
