"""Which rank holds which tokens of a cache, after any number of calls. All ranks know it, and no message says it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .. import _core
from .runs import Run, before, size

__all__ = ["Part", "Spread"]

BLOCK = 256
"""New tokens go to one rank until it has so many more than the rank with the fewest."""


class Part(NamedTuple):
    """Tokens that came together.

    Attributes:
        start: position of the first.
        length: how many there were when they were shared out.
        kept: how many of them are still there.
        how: the sharding that they were shared out by; or the rank that has them all.
    """

    start: int
    length: int
    kept: int
    how: str | int


@dataclass(frozen=True)
class Spread:
    """Tokens of a cache over ranks. Each rank keeps its own in the order of their positions.

    Attributes:
        ranks: how many.
        parts: in order.
        held: tokens of each rank.
    """

    ranks: int
    parts: tuple[Part, ...] = ()
    held: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.held:
            held = tuple(size(self.runs(rank)) for rank in range(self.ranks))
            object.__setattr__(self, "held", held)

    @property
    def length(self) -> int:
        """Tokens of all ranks."""
        return self.parts[-1].start + self.parts[-1].kept if self.parts else 0

    def runs(self, rank: int) -> list[Run]:
        """`(start, stop, step)` of the positions that a rank holds, rising."""
        return [run for part in self.parts for run in _runs(part, self.ranks, rank)]

    def before(self, rank: int, position: Tensor) -> Tensor:
        """How many of a rank's tokens are at smaller positions, int64 like `position`."""
        return before(self.runs(rank), position)

    def shared(self, n: int, sharding: str) -> Spread:
        """With n more tokens, shared out."""
        part = Part(self.length, n, n, sharding)
        more = (size(_runs(part, self.ranks, rank)) for rank in range(self.ranks))
        return Spread(self.ranks, (*self.parts, part), tuple(a + b for a, b in zip(self.held, more, strict=True)))

    def given(self, n: int, rank: int) -> Spread:
        """With n more tokens, all of them on one rank."""
        parts, last = self.parts, self.parts[-1] if self.parts else None
        if last is not None and last.how == rank:
            parts = (*parts[:-1], Part(last.start, last.kept + n, last.kept + n, rank))
        else:
            parts = (*parts, Part(self.length, n, n, rank))
        return Spread(self.ranks, parts, tuple(held + n * (r == rank) for r, held in enumerate(self.held)))

    def truncated(self, length: int) -> Spread:
        """The first so many tokens."""
        if length >= self.length:
            return self
        parts = [part for part in self.parts if part.start < length]
        if parts:
            parts[-1] = parts[-1]._replace(kept=min(parts[-1].kept, length - parts[-1].start))
        return Spread(self.ranks, tuple(parts))

    def next_rank(self) -> int:
        """The rank for tokens that are not shared out: the one with the fewest, but not another one for every token."""
        least = min(self.held)
        last = self.parts[-1].how if self.parts else None
        if isinstance(last, int) and self.held[last] < least + BLOCK:
            return last
        return self.held.index(least)


@functools.lru_cache(maxsize=256)
def _runs(part: Part, ranks: int, rank: int) -> tuple[Run, ...]:
    """Those of one part."""
    start, end = part.start, part.start + part.kept
    if isinstance(part.how, int):
        return ((start, end, 1),) if part.how == rank and part.kept else ()
    found = (
        (start + a, min(start + b, end), step) for a, b, step in _core.ring_shard(part.how, part.length, ranks, rank)
    )
    return tuple(run for run in found if run[0] < run[1])
