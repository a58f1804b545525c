"""Runs `(start, stop, step)` of positions, as the core names what a rank holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["Run", "before", "size"]

Run = tuple[int, int, int]


def size(runs: Iterable[Run]) -> int:
    """How many positions they are."""
    return sum(len(range(*run)) for run in runs)


def before(runs: Iterable[Run], position: Tensor) -> Tensor:
    """How many of them are before a position, int64 like `position`."""
    found = position.new_zeros(position.shape)
    for start, stop, step in runs:
        passed = (position - start + step - 1).div(step, rounding_mode="floor")
        found += passed.clamp(0, len(range(start, stop, step)))
    return found
