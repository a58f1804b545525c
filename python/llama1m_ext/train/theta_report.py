"""What a search for theta found: a table, JSON, a picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .theta_trials import CENTRE, Trial, best

_NLL, _ACCURACY, _LAW = "#1f6f8b", "#b8412f", "#8a8a8a"


@dataclass(frozen=True)
class Searched:
    """One length.

    Attributes:
        length: tokens.
        now: the model's own theta.
        laws: what they say; empty where the length is not beyond the model's own.
        trials: in the order in which they were made.
    """

    length: int
    now: float
    laws: dict[str, int]
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The one with the least objective."""
        return best(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite is None."""
        trials = [{k: None if v in (math.inf,) or v != v else v for k, v in asdict(t).items()} for t in self.trials]
        return {
            "length": self.length,
            "best_theta": self.best.theta,
            "now": self.now,
            "laws": self.laws,
            "trials": trials,
        }


@dataclass(frozen=True)
class ThetaSearch:
    """What `theta_search` found.

    Attributes:
        lengths: growing.
        needle_weight: of the objective.
        needles: hidden for each theta.
        kind: of them; None: there were none.
        windows: pieces of text read for each theta.
    """

    lengths: list[Searched]
    needle_weight: float
    needles: int
    kind: str | None
    windows: int

    @property
    def best(self) -> dict[int, float]:
        """Theta by length."""
        return {one.length: one.best.theta for one in self.lengths}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "objective": self.objective,
            "needle_weight": self.needle_weight,
            "needles": self.needles,
            "kind": self.kind,
            "windows": self.windows,
            "lengths": [one.to_dict() for one in self.lengths],
        }

    @property
    def objective(self) -> str:
        """In words."""
        nll = "mean NLL (nats/token) of the tokens with at least half the length before them"
        return f"{nll} + {self.needle_weight:g} * (1 - accuracy)" if self.needles else nll

    def table(self) -> str:
        """As text: for each length a line for each theta, growing."""
        lines = [f"objective: {self.objective}"]
        for one in self.lengths:
            lines.append(f"{one.length:,} tokens")
            base = one.laws.get(CENTRE)
            over = f"x {CENTRE}" if base else "x its own"
            lines.append(f"{'theta':>17}  {over:>15}  {'nats/token':>10}  {'needles':>7}  {'objective':>9}")
            for trial in sorted(one.trials, key=lambda trial: trial.theta):
                found = "" if trial.accuracy is None else f"{100 * trial.accuracy:.0f}%"
                mark = "  <- best" if trial is one.best else ""
                lines.append(
                    f"{trial.theta:>17,.0f}  {trial.theta / (base or one.now):>15.4g}  {trial.nll:>10.4f}  {found:>7}  "
                    f"{trial.objective:>9.4f}  {trial.why}{mark}"
                )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws NLL and accuracy over theta, one picture for each length, with the laws' thetas (the suffix decides the format).

        Raises:
            ModuleNotFoundError: without matplotlib, naming the extra that brings it.
        """
        from ..eval import plot

        figure, axes = plot.figure(8, 0.5 + 3.3 * len(self.lengths))
        axes.remove()
        for one, axis in zip(self.lengths, figure.subplots(len(self.lengths), 1, squeeze=False)[:, 0], strict=True):
            _draw(one, axis)
        figure.tight_layout()
        figure.savefig(path, dpi=plot.DOTS)


def _draw(one: Searched, axis: Any) -> None:
    trials = sorted(one.trials, key=lambda trial: trial.theta)
    x = [trial.theta for trial in trials]
    axis.set_xscale("log")
    axis.plot(x, [trial.nll for trial in trials], marker="o", markersize=4, color=_NLL)
    axis.set_ylabel("nats/token, second half", fontsize=8, color=_NLL)
    axis.set_xlabel("theta", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(f"{one.length:,} tokens: best theta {one.best.theta:,.0f}", fontsize=9, loc="left")
    if any(trial.accuracy is not None for trial in trials):
        right = axis.twinx()
        right.plot(x, [trial.accuracy for trial in trials], marker="s", markersize=4, linestyle=":", color=_ACCURACY)
        right.set_ylim(-0.05, 1.05)
        right.set_ylabel("needles found", fontsize=8, color=_ACCURACY)
        right.tick_params(labelsize=8)
    for name, theta in {"as it is": one.now, **one.laws}.items():
        axis.axvline(theta, color=_LAW, linewidth=0.8, linestyle="--")
        axis.annotate(
            name,
            (theta, 0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 4),
            textcoords="offset points",
            rotation=90,
            va="bottom",
            fontsize=7,
            color=_LAW,
        )
    axis.axvline(one.best.theta, color="black", linewidth=1)
