"""Which theta to try next, and why: a function of what was tried before, and of nothing else.

First come the laws' thetas and a grid around the critical base; the grid grows where its edge is best; then the best is refined
between its neighbours in ln(theta), by parabola and golden section.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..theta import real, whole

GOLDEN = (3 - math.sqrt(5)) / 2
WIDENING = 2.0
"""By what factor the grid grows at its edge, where its own steps are smaller."""
APART = math.log(1.02)
"""Thetas closer than this are the same to a search."""
CENTRE = "critical-base"
AS_IT_IS = "as it is"
_PARABOLA, _SECTION = "parabola", "golden section"


@dataclass(frozen=True)
class Trial:
    """A theta, and what came of it.

    Attributes:
        nll: nats a token, over the second half of the positions.
        accuracy: the share of needles found; None: none were hidden.
        objective: what is minimised; infinite where the model computed no number.
        why: it was tried.
    """

    theta: float
    nll: float
    accuracy: float | None
    objective: float
    why: str


@dataclass(frozen=True)
class Search:
    """How thetas are chosen. Another choice can go on with what was evaluated under this one.

    Attributes:
        span: the grid's ends, as multiples of the critical base.
        points: of the grid, evenly spaced in ln(theta).
        widen: how often the grid grows where its edge is best.
        refine: evaluations between the neighbours of the best, at most.
        tolerance: the refinement ends when these are closer than this in ln(theta).
        needle_weight: nats that finding all needles instead of none is worth.

    Raises:
        TypeError, ValueError: a value that makes no sense.
    """

    span: tuple[float, float] = (0.5, 2.0)
    points: int = 5
    widen: int = 3
    refine: int = 5
    tolerance: float = 0.05
    needle_weight: float = 1.0

    def __post_init__(self) -> None:
        low, high = (real("span", one) for one in self.span)
        if not 0 < low <= 1 <= high or low == high:
            raise ValueError(f"span: expected multiples of the critical base around 1, got {low:g} and {high:g}")
        for name, least in (("points", 2), ("widen", 0), ("refine", 0)):
            if whole(name, getattr(self, name)) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if real("tolerance", self.tolerance) <= 0:
            raise ValueError(f"tolerance: expected more than 0, got {self.tolerance:g}")
        if real("needle_weight", self.needle_weight) < 0:
            raise ValueError(f"needle_weight: expected at least 0, got {self.needle_weight:g}")

    def objective(self, nll: float, accuracy: float | None) -> float:
        """`nll + needle_weight * (1 - accuracy)`."""
        found = nll + (0.0 if accuracy is None else self.needle_weight * (1 - accuracy))
        return found if math.isfinite(found) else math.inf

    @property
    def evaluations(self) -> int:
        """Of one length, about."""
        return 3 + self.points + self.refine


def thetas(trials: Sequence[Trial], now: float, laws: Mapping[str, int], search: Search) -> Iterator[tuple[float, str]]:
    """What to try next, and why. None is tried twice; all are whole numbers but the model's own.

    Args:
        trials: what came of those before, in order. The caller appends to it before it asks for the next.
        now: the model's own theta.
        laws: theirs for this length; the grid lies around the critical base, or around `now` where there is none.
    """
    low, high = search.span
    step = (high / low) ** (1 / (search.points - 1))
    around = (CENTRE, float(laws[CENTRE])) if CENTRE in laws else ("its own", now)
    seeds = [(now, AS_IT_IS), *((float(theta), name) for name, theta in laws.items())]
    seeds += [(_whole(around[1] * low * step**i), f"{low * step**i:.3g} x {around[0]}") for i in range(search.points)]
    for theta, why in seeds:
        if all(abs(math.log(theta / trial.theta)) >= APART for trial in trials):
            yield theta, why
    grow = max(step, WIDENING)
    for _ in range(search.widen):
        order = sorted(trials, key=lambda trial: trial.theta)
        if order[-1] is best(trials):
            yield _whole(order[-1].theta * grow), "wider"
        elif order[0] is best(trials) and order[0].theta / grow >= 2:
            yield _whole(order[0].theta / grow), "wider"
        else:
            break
    for _ in range(search.refine):
        proposed = between(trials, search.tolerance)
        if proposed is None:
            break
        yield proposed


def best(trials: Sequence[Trial]) -> Trial:
    """Of two that are as good, the smaller theta: it is the smaller change."""
    return min(trials, key=lambda trial: (trial.objective, trial.theta))


def between(trials: Sequence[Trial], tolerance: float) -> tuple[float, str] | None:
    """A step of the refinement, or None: done. The vertex of the parabola through the best and its neighbours, unless it is
    none of the wider side's or the last step was one in vain; else a golden section of the wider side."""
    order = sorted(trials, key=lambda trial: trial.theta)
    at = order.index(best(trials))
    if not 0 < at < len(order) - 1:
        return None
    a, b, c = ((math.log(trial.theta), trial.objective) for trial in order[at - 1 : at + 2])
    wide = c[0] - b[0] if c[0] - b[0] >= b[0] - a[0] else a[0] - b[0]
    if c[0] - a[0] <= tolerance or abs(GOLDEN * wide) < APART:
        return None
    vertex = _vertex(a, b, c)
    in_vain = trials[-1].why == _PARABOLA and trials[-1] is not order[at]
    if vertex is not None and not in_vain and min(abs(vertex - x) for x in (a[0], b[0], c[0])) >= APART:
        return _whole(math.exp(vertex)), _PARABOLA
    return _whole(math.exp(b[0] + GOLDEN * wide)), _SECTION


def _vertex(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float | None:
    """Where the parabola through three points is least; None where it is flat, or a value is infinite."""
    if not all(math.isfinite(y) for _, y in (a, b, c)):
        return None
    left, right = (b[0] - a[0]) * (b[1] - c[1]), (b[0] - c[0]) * (b[1] - a[1])
    if left == right:
        return None
    found = b[0] - 0.5 * ((b[0] - a[0]) * left - (b[0] - c[0]) * right) / (left - right)
    return found if a[0] < found < c[0] else None


def _whole(theta: float) -> float:
    return float(max(2, round(theta)))
