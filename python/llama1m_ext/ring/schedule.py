"""A rank's schedule, as the core makes it, and the bytes that it predicts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _core
from .layout import Layout
from .runs import size

__all__ = ["Bytes", "Piece", "Schedule", "Step", "predicted", "schedule"]


class Piece(NamedTuple):
    """Queries `q_lo .. q_hi` of a shard against keys `k_lo .. k_hi` of a block, in local indices; `q_start` counts from `k_lo`."""

    q_lo: int
    q_hi: int
    k_lo: int
    k_hi: int
    causal: bool
    q_start: int


class Step(NamedTuple):
    """Whose block is at hand, what is attended, and where the block goes; all ranks are those of the ring."""

    step: int
    source: int
    pieces: tuple[Piece, ...]
    receive_from: int | None
    inner_to: int | None
    outer_to: int | None


class Schedule(NamedTuple):
    """Of one rank.

    Attributes:
        inner: steps of a lap.
        lengths: positions of each ring shard.
        steps: as many as there are ranks.
        exchanges: after each step, and once after all: gradients `(sends, receives)`, each of (ring rank, source).
    """

    inner: int
    lengths: tuple[int, ...]
    steps: tuple[Step, ...]
    exchanges: tuple[tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]], ...]


class Bytes(NamedTuple):
    """What a rank sends, by the kind of the link."""

    forward: dict[str, int]
    backward: dict[str, int]


def schedule(layout: Layout, length: int, causal: bool, documents: Sequence[int] | None) -> Schedule:
    """This rank's schedule.

    Raises:
        TypeError, ValueError: documents that are none; the message names them.
    """
    starts = None if documents is None else tuple(documents)
    return _schedule(layout.sharding, length, layout.inner, layout.outer, layout.ring_rank, causal, starts)


@functools.lru_cache(maxsize=64)
def _schedule(
    sharding: str, length: int, inner: int, outer: int, rank: int, causal: bool, documents: tuple[int, ...] | None
) -> Schedule:
    where = (sharding, length, inner, outer, rank, causal, documents)
    steps = tuple(
        Step(step, source, tuple(Piece(*p) for p in pieces), *ways)
        for step, source, _, pieces, *ways in _core.ring_schedule(*where)
    )
    exchanges = tuple((tuple(sends), tuple(receives)) for sends, receives in _core.ring_gradients(*where))
    lengths = tuple(size(_core.ring_shard(sharding, length, inner * outer, r)) for r in range(inner * outer))
    return Schedule(inner, lengths, steps, exchanges)


def predicted(
    layout: Layout,
    length: int,
    batch: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    causal: bool = True,
    documents: Sequence[int] | None = None,
) -> Bytes:
    """The bytes that this rank sends in `ring_attention` and its backward pass, exactly; what ranks agree by is not in it.

    Args:
        length: of the whole sequence.
        batch, q_heads, kv_heads, head_dim, dtype: of q, k and v, before heads are shared out.
    """
    own = torch.empty((), dtype=dtype).element_size()
    kv_share = max(1, kv_heads // layout.heads)
    row = 2 * batch * kv_share * head_dim  # of keys and values
    token, group = layout.kv_format.block_bytes(batch * kv_share, head_dim, own)
    ring = _core.ring_bytes(
        layout.sharding,
        length,
        layout.inner,
        layout.outer,
        per_node=max(1, layout.ranks_per_node // layout.heads),
        kv_bytes=token,
        kv_group_bytes=group,
        gradient_bytes=row * 4,
        causal=causal,
        documents=None if documents is None else list(documents),
    )[layout.ring_rank]
    forward = {"within": ring[0], "across": ring[1]}
    backward = {"within": ring[2], "across": ring[3]}
    if layout.heads > 1:
        cuts = layout.cuts(layout.ring_lengths(length)[layout.ring_rank])
        q_row = batch * (q_heads // layout.heads) * head_dim
        out_row = q_row * own + 4 * q_row // head_dim  # and lse
        gradient = 4 if layout.heads > kv_heads else own
        mine = cuts[layout.head_rank]
        for place, theirs in enumerate(cuts):
            if place != layout.head_rank:
                kind = layout.kind(layout.rank, layout.rank_of(layout.ring_rank, place))
                forward[kind] += mine * (q_row + row) * own + theirs * out_row
                backward[kind] += mine * out_row + theirs * (q_row * own + row * gradient)
    return Bytes(*({kind: n for kind, n in of.items() if n} for of in (forward, backward)))
