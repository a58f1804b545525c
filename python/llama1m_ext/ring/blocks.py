"""What one rank computes in a step: its queries against one block of keys and values, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core, gradients, ops
from .runs import before
from .schedule import Piece

__all__ = ["Bounds", "Merged", "Sums"]

ROWS = 16384
"""Queries of a piece that are merged at a time: what bounds the float32 partial that is not merged yet."""


class Bounds:
    """Visible keys of each batch row, as they are in each rank's block.

    Args:
        sharding, length, ranks: whose positions they are.
        start, end: int64 `[batch]`, positions in the whole sequence; or None.
    """

    def __init__(self, sharding: str, length: int, ranks: int, start: Tensor | None, end: Tensor | None) -> None:
        self.sharding, self.length, self.ranks = sharding, length, ranks
        self.start, self.end = start, end

    def of(self, source: int) -> tuple[Tensor | None, Tensor | None]:
        """The first visible key of the block, and one past the last: its positions rise, so an interval stays one."""
        if self.start is None and self.end is None:
            return None, None
        runs = _core.ring_shard(self.sharding, self.length, self.ranks, source)
        start, end = (None if b is None else before(runs, b) for b in (self.start, self.end))
        return start, end


def _within(piece: Piece, bounds: tuple[Tensor | None, Tensor | None]) -> dict[str, Any]:
    names = zip(("kv_start", "kv_end"), bounds, strict=True)
    return {name: None if b is None else (b - piece.k_lo).clamp(0, piece.k_hi - piece.k_lo) for name, b in names}


class Merged:
    """Attention of a rank's queries, block after block: partials merged in float32.

    Args:
        q: `[batch, q_heads, n, head_dim]`.
        scale: of the scores.
    """

    def __init__(self, q: Tensor, scale: float) -> None:
        self.q, self.scale = q, scale
        self.out = gradients.like(q, torch.float32).zero_()
        # Partials are merged in float32; only the sums go on in float64, or each merge would round them again: they are what
        # all gradients are computed from.
        self._lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64, device=q.device)
        self._filled: list[tuple[int, int]] = []

    def add(self, k: Tensor, v: Tensor, pieces: Sequence[Piece], bounds: tuple[Tensor | None, Tensor | None]) -> None:
        """A block, `[batch, kv_heads, tokens, head_dim]` each."""
        for piece in pieces:
            k_of, v_of = k[:, :, piece.k_lo : piece.k_hi], v[:, :, piece.k_lo : piece.k_hi]
            seen = _within(piece, bounds)
            for lo in range(piece.q_lo, piece.q_hi, ROWS):
                hi = min(lo + ROWS, piece.q_hi)
                partial = ops.attention(
                    self.q[:, :, lo:hi],
                    k_of,
                    v_of,
                    causal=piece.causal,
                    softmax_scale=self.scale,
                    q_start=piece.q_start + lo - piece.q_lo,
                    return_lse=True,
                    out_dtype=torch.float32,
                    **seen,
                )
                self._merge(lo, hi, partial[0], partial[1])

    def _merge(self, lo: int, hi: int, out: Tensor, lse: Tensor) -> None:
        ours, before = self.out[:, :, lo:hi], self._lse[:, :, lo:hi]
        if any(a < hi and lo < b for a, b in self._filled):
            out, _ = ops.merge_partials([ours, out], [before.float(), lse])
        self._filled.append((lo, hi))
        ours.copy_(out)
        before.copy_(torch.logaddexp(before, lse.double()))

    @property
    def lse(self) -> Tensor:
        """Log-sum-exps so far, float32 `[batch, q_heads, n]`."""
        return self._lse.float()


class Sums:
    """Gradients of a rank's queries, and of each block's keys and values: float32.

    Args:
        grad: of out, `[batch, q_heads, n, head_dim]`.
        q, out, lse: of all keys, as `Merged` has them.
        grad_lse: the gradient of lse, or None.
        kv_shape: `(batch, kv_heads, head_dim)` of blocks.
        lengths: tokens of each block.
    """

    def __init__(
        self,
        grad: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
        scale: float,
        kv_shape: tuple[int, int, int],
        lengths: Sequence[int],
    ) -> None:
        self.grad, self.q, self.out, self.lse, self.grad_lse, self.scale = grad, q, out, lse, grad_lse, scale
        self.dq = gradients.like(q, torch.float32).zero_()
        self._kv_shape, self._lengths = kv_shape, lengths
        self._kv: dict[int, Tensor] = {}

    def add(
        self, source: int, k: Tensor, v: Tensor, pieces: Sequence[Piece], bounds: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """A block's share."""
        for piece in pieces:
            rows, keys = slice(piece.q_lo, piece.q_hi), slice(piece.k_lo, piece.k_hi)
            dq, dk, dv = ops.attention_backward(
                self.grad[:, :, rows],
                self.q[:, :, rows],
                k[:, :, keys],
                v[:, :, keys],
                self.out[:, :, rows],
                self.lse[:, :, rows],
                causal=piece.causal,
                softmax_scale=self.scale,
                q_start=piece.q_start,
                grad_lse=None if self.grad_lse is None else self.grad_lse[:, :, rows],
                grad_dtype=torch.float32,
                **_within(piece, bounds),
            )
            assert isinstance(dk, Tensor) and isinstance(dv, Tensor)
            self.dq[:, :, rows] += dq
            of = self.of(source)
            of[0][:, :, keys] += dk
            of[1][:, :, keys] += dv

    def of(self, source: int) -> Tensor:
        """A block's gradients so far, `[2, batch, kv_heads, tokens, head_dim]`: of keys and of values."""
        if source not in self._kv:
            self._kv[source] = self.empty(source).zero_()
        return self._kv[source]

    def take(self, source: int) -> Tensor:
        """A block's gradients, which are no more here then."""
        of = self.of(source)
        del self._kv[source]
        return of

    def empty(self, source: int) -> Tensor:
        """Room for a block's gradients."""
        batch, heads, head_dim = self._kv_shape
        shape = (2, batch, heads, self._lengths[source], head_dim)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)
