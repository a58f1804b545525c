"""Attention of a training step: forward with its log-sum-exps, and backward from them.

This pair is the seam where several devices come in: an `Attention` for a sequence that is spread over ranks (ring
attention) has the same two functions over each rank's queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import cuda, ops

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
        assert lse is not None
        dq, dk, dv = ops.attention_backward(grad, q, k, v, out, lse, softmax_scale=scale)
        assert isinstance(dk, Tensor) and isinstance(dv, Tensor)
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


class Apart:
    """Within documents only: rows are packed of several that don't see each other.

    Args:
        borders: of each row: where its documents begin, and where the last one ends, from 0 to n.
        inner: what computes each; None: as the dtype allows.

    Raises:
        ValueError: borders that don't rise.
    """

    def __init__(self, borders: Sequence[Sequence[int]], inner: Attention | None = None) -> None:
        for row in borders:
            if len(row) < 2 or row[0] != 0 or any(b <= a for a, b in itertools.pairwise(row)):
                raise ValueError(f"borders: expected positions from 0 on that rise, got {list(row)!r:.80}")
        self.borders, self.inner = borders, inner

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        self._check(q)
        kind = chosen(q.dtype, q.device) if self.inner is None else self.inner
        out, lse = _like(q), None
        for at in self._documents():
            part, sums = kind.forward(q[at], k[at], v[at], scale)
            out[at] = part
            if sums is not None:
                lse = torch.empty(q.shape[:3], dtype=sums.dtype, device=q.device) if lse is None else lse
                lse[at] = sums
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = chosen(q.dtype, q.device) if self.inner is None else self.inner
        made = _like(q), _like(k), _like(v)
        for at in self._documents():
            sums = None if lse is None else lse[at]
            parts = kind.backward(grad[at], q[at], k[at], v[at], out[at], sums, scale)
            for whole, part in zip(made, parts, strict=True):
                whole[at] = part
        return made

    def _documents(self) -> Iterator[tuple[slice, slice, slice]]:
        for i, row in enumerate(self.borders):
            for a, b in itertools.pairwise(row):
                yield slice(i, i + 1), slice(None), slice(a, b)

    def _check(self, q: Tensor) -> None:
        if len(self.borders) != len(q) or any(row[-1] != q.shape[2] for row in self.borders):
            ends = [row[-1] for row in self.borders]
            raise ValueError(f"borders: expected {len(q)} rows of {q.shape[2]} positions, got rows that end at {ends}")


def chosen(dtype: torch.dtype, device: torch.device) -> Attention:
    """What computes attention for tensors of this kind."""
    return Exact() if dtype in DTYPES and cuda.unserved(device) is None else Torch()


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


def _like(x: Tensor) -> Tensor:
    """`[batch, heads, n, head_dim]` over memory `[batch, n, heads, head_dim]`."""
    batch, heads, n, head_dim = x.shape
    return torch.empty((batch, n, heads, head_dim), dtype=x.dtype, device=x.device).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    grouped = group > 1 and q.device.type == "cuda"  # whose kernels need no copies of k and v
    if group > 1 and not grouped:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous().transpose(1, 2)
