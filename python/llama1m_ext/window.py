"""Sliding windows: each query sees its own key and the `window - 1` keys before it.

A window is two triangles. For up to `window - 1` queries one after the other, the keys of these queries are hidden by
causality as ever; of the keys before them, the later a query the fewer it sees, and read backwards, keys and queries both, that
is causality again. Two calls of the one kernel, merged as partials in float32, on any device: no mask, and no work on pairs
that are not seen, beyond a block's edge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .cache import PagedLayer

__all__ = ["SlidingLayer", "attention", "matrix"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    softmax_scale: float,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
) -> Tensor:
    """Exact attention within a sliding window: query i, at position p, sees the keys `p - window < j <= p`.

    Args:
        q: `[batch, q_heads, n, head_dim]`, the last n positions of k.
        k, v: `[batch, kv_heads, kv_len, head_dim]`: at least the last `window - 1 + n` keys, or all.
        window: 2 or more.
        kv_start, kv_end: visible keys of each batch row, int64 `[batch]`, counted as k is.

    Returns:
        `[batch, q_heads, n, head_dim]`, laid out as `ops.attention` does.
    """
    n, kv_len = q.shape[2], k.shape[2]
    if kv_len <= window:
        bounds: dict[str, Any] = {"kv_start": _moved(kv_start, 0, kv_len), "kv_end": _moved(kv_end, 0, kv_len)}
        return ops.attention(q, k, v, softmax_scale=softmax_scale, **bounds)  # type: ignore[return-value]
    if n == 1:
        first = kv_len - window
        bounds = {"kv_start": _moved(kv_start, first, window), "kv_end": _moved(kv_end, first, window)}
        return ops.attention(q, k[:, :, first:], v[:, :, first:], softmax_scale=softmax_scale, **bounds)  # type: ignore[return-value]
    out = torch.empty((q.shape[0], n, *q.shape[1::2]), dtype=q.dtype, device=q.device).transpose(1, 2)
    step = min(n, window - 1)
    for a in range(0, n, step):
        b = min(a + step, n)
        at = kv_len - n + a  # where the first of these queries has its key
        out[:, :, a:b] = _block(q[:, :, a:b], k, v, window, at, softmax_scale, kv_start, kv_end)
    return out


def _block(
    q: Tensor, k: Tensor, v: Tensor, window: int, at: int, scale: float, start: Tensor | None, end: Tensor | None
) -> Tensor:
    n = q.shape[2]
    own, first = slice(at, at + n), max(0, at - window + 1)
    more: dict[str, Any] = {"softmax_scale": scale, "return_lse": True, "out_dtype": torch.float32}
    bounds: dict[str, Any] = {"kv_start": _moved(start, at, n), "kv_end": _moved(end, at, n)}
    near = ops.attention(q, k[:, :, own], v[:, :, own], **bounds, **more)
    if first == at:
        return near[0]
    before, c = slice(first, at), at - first
    starts, ends = _moved(start, first, c), _moved(end, first, c)
    far = ops.attention(
        q.flip(2),
        k[:, :, before].flip(2),
        v[:, :, before].flip(2),
        q_start=window - 1 - n,
        kv_start=None if ends is None else c - ends,  # read backwards, an end is a start
        kv_end=None if starts is None else c - starts,
        **more,
    )
    outs, lses = [near[0], far[0].flip(2)], [near[1], far[1].flip(2)]
    return ops.merge_partials(outs, lses)[0]


def _moved(bound: Tensor | None, first: int, n: int) -> Tensor | None:
    """Bounds as they are among the n keys from `first` on."""
    return None if bound is None else (bound - first).clamp(0, n)


def matrix(mask: Tensor | None, q_len: int, kv_len: int, q_start: int, window: int, device: torch.device) -> Tensor:
    """A mask `[.., q_len, kv_len]` (None: the causal one) with a window, for code that wants a matrix."""
    keys = torch.arange(kv_len, device=device)
    queries = torch.arange(q_start, q_start + q_len, device=device)[:, None]
    seen = ((keys <= queries) & (keys > queries - window))[None, None]
    return seen if mask is None else mask & seen


class SlidingLayer:
    """A layer of the cache that keeps no more than its window: transformers' own `DynamicSlidingWindowLayer`, with the
    face that our prefill expects of a layer. It stays where it is in the cache: stock code goes on with it at any time.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.all: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Tokens seen, those that are gone included.

        Assisted generation in transformers 5.15 to 5.17 crops by a tensor, which makes the layer's own count a tensor that
        `update` then adds to in place.
        """
        return int(self.layer.get_seq_length())

    def get_seq_length(self) -> int:
        return self.length

    def fits(self, k: Tensor, v: Tensor) -> bool:
        """Whether these can follow what is there."""
        mine = self.layer.keys if self.layer.is_initialized else None
        if mine is None or not mine.numel():
            return True
        return (mine.dtype, mine.shape[:2], mine.shape[3]) == (k.dtype, k.shape[:2], k.shape[3]) and k.dtype == v.dtype

    def append(self, k: Tensor, v: Tensor) -> None:
        self.all = self.layer.update(k, v)

    def last(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the last append, and those before them that their queries may see."""
        assert self.all is not None
        return self.all

    def expect(self, length: int, scratch: Any = None) -> None:
        """What will come is made room for one by one: there is never much."""

    def seal(self) -> None:
        self.all = None

    def snapshot(self) -> dict[str, Any]:
        # update() makes new tensors, and leaves these; but for the count, see `length`.
        return {**self.layer.__dict__, "cumulative_length": self.length}

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.all = None
        self.layer.__dict__.clear()
        self.layer.__dict__.update(snapshot)


def last(layer: PagedLayer | SlidingLayer, tokens: int) -> tuple[Tensor, Tensor]:
    """At least the last so many keys and values of a layer, `[batch, kv_heads, n, head_dim]`, as far as there are."""
    if isinstance(layer, SlidingLayer):
        return layer.last()
    return layer.dense(max(0, layer.length - tokens))
