"""Attention of a training step: forward with its log-sum-exps, and backward from them.

This pair is the seam where several devices come in: an `Attention` for a sequence that is spread over ranks (ring
attention) has the same two functions over each rank's queries.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Attention(Protocol):
    """Causal attention of whole rows, or of this rank's share of them.

    q `[batch, q_heads, n, head_dim]`; k, v `[batch, kv_heads, n, head_dim]`; out as q; lse float32 `[batch, q_heads, n]`,
    or None where backward needs none.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """(out, lse), out over memory `[batch, n, q_heads, head_dim]`."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), each over memory `[batch, n, heads, head_dim]`."""
        ...


class Exact:
    """By this package's kernels."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        out, lse = ops.attention(q, k, v, softmax_scale=scale, return_lse=True)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = ops.attention_backward(grad, q, k, v, out, lse, softmax_scale=scale)  # type: ignore[attr-defined]
        return dq, dk, dv


class Torch:
    """By `scaled_dot_product_attention`: for float64, and where our kernels have no backward. Its forward runs again in
    backward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        return _sdpa(q, k, v, scale), None

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            given = [t.detach().requires_grad_() for t in (q, k, v)]
            again = _sdpa(given[0], given[1], given[2], scale)
        dq, dk, dv = torch.autograd.grad(again, given, grad)
        return dq, dk, dv


def chosen(dtype: torch.dtype, device: torch.device) -> Attention:
    """What computes attention for tensors of this kind."""
    served = device.type == "cpu" and dtype in DTYPES and hasattr(ops, "attention_backward")
    return Exact() if served else Torch()


def attend(kind: Attention, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention with gradients."""
    return _Attend.apply(kind, scale, q, k, v)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Attention, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = kind.forward(q, k, v, scale)
        ctx.kind, ctx.scale = kind, scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return (None, None, *ctx.kind.backward(grad, q, k, v, out, lse, ctx.scale))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)
