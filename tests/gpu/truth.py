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
