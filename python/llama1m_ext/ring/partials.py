"""Partials of ranks that hold different keys, brought together and merged: each rank has the same bits then.

Queries go to the keys, not keys to the queries (pass-Q: Yang et al., 2411.01783): what travels does not grow with the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from .layout import Layout

__all__ = ["last_rows", "merged", "of_everybody"]

Partial = tuple[Tensor, Tensor]


def merged(layout: Layout, out: Tensor, lse: Tensor, what: str) -> Tensor:
    """Attention of queries that every rank has: all ranks call it with the partial over their keys, and get the merge.

    Args:
        out: float32 `[batch, q_heads, n, head_dim]`.
        lse: float32 `[batch, q_heads, n]`.
        what: said in errors.

    Returns:
        float32, like out.

    Raises:
        LinkError: a rank is silent.
    """
    if layout.world_size == 1:
        return out
    mine = _packed(out, lse)
    return _merge(layout.links.gather(mine, lambda r: torch.empty_like(mine), what), out.shape)[0]


def of_everybody(
    layout: Layout, q: Tensor, lengths: Sequence[int], partial: Callable[[Tensor], Partial], what: str
) -> Partial:
    """Attention of this rank's queries over the keys of all ranks; all ranks call it, each with queries of its own.

    Args:
        q: `[batch, q_heads, n, head_dim]`, n as `lengths` says for this rank.
        lengths: queries of each rank.
        partial: float32 (out, lse) of such queries, any number of them, over this rank's keys, all of which they see.

    Returns:
        float32 (out, lse) of q.

    Raises:
        LinkError: a rank is silent.
    """
    batch, heads, _, head_dim = q.shape
    asked = layout.links.gather(
        q.contiguous(), lambda r: q.new_empty((batch, heads, lengths[r], head_dim)), f"{what}, queries"
    )
    out, lse = partial(torch.cat(asked, 2))
    answers = [_packed(o, s) for o, s in zip(out.split(list(lengths), 2), lse.split(list(lengths), 2), strict=True)]
    got = [a if r == layout.rank else torch.empty_like(answers[layout.rank]) for r, a in enumerate(answers)]
    others = [r for r in range(layout.world_size) if r != layout.rank]
    back = [(answers[r], r) for r in others], [(got[r], r) for r in others]
    layout.links.exchange(*back, f"{what}, results").wait()
    return _merge(got, q.shape)


def last_rows(layout: Layout, x: Tensor, length: int, keep: int) -> Tensor:
    """The last `keep` of `length` positions, of which each rank has its shard, on every rank.

    Args:
        x: this rank's shard, `[batch, n, width]`.

    Returns:
        `[batch, keep, width]`.

    Raises:
        LinkError: a rank is silent.
    """
    if layout.world_size == 1:
        return x[:, length - keep :]
    first = length - keep
    places = [p[p >= first] - first for p in (layout.positions(length, r) for r in range(layout.world_size))]
    mine = x[:, x.shape[1] - len(places[layout.rank]) :].contiguous()
    shapes = [(x.shape[0], len(p), x.shape[2]) for p in places]
    parts = layout.links.gather(mine, lambda r: x.new_empty(shapes[r]), "the last hidden states")
    made = x.new_empty((x.shape[0], keep, x.shape[2]))
    for part, place in zip(parts, places, strict=True):
        made.index_copy_(1, place.to(x.device), part)
    return made


def _packed(out: Tensor, lse: Tensor) -> Tensor:
    """One message."""
    return torch.cat([out.reshape(-1), lse.reshape(-1)])


def _merge(packed: Sequence[Tensor], shape: torch.Size) -> Partial:
    rows = shape[0] * shape[1] * shape[2]
    outs = [p[: rows * shape[3]].view(shape) for p in packed]
    lses = [p[rows * shape[3] :].view(shape[:3]) for p in packed]
    return ops.merge_partials(outs, lses) if rows else (outs[0], lses[0])
