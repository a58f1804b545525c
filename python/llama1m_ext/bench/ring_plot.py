"""A report of `llama1m bench ring` drawn: how long each layout takes, and its speed-up over the plain ring, as links slow down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plot import blank


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw it to `path` (the suffix decides the format). Needs matplotlib.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra that brings it.
    """
    cases = sorted((c for c in report["cases"] if c["inter"] is not None), key=lambda c: c["inter"])
    figure = blank(9, 4)
    times, gains = figure.subplots(1, 2)
    layouts = {tuple(one["layout"]): one["name"] for case in cases for one in case["candidates"]}
    for layout, name in layouts.items():
        of = [(c["inter"] * 8e-6, one) for c in cases for one in c["candidates"] if tuple(one["layout"]) == layout]
        at = [x for x, _ in of]
        label = f"{name} ({' x '.join(map(str, layout))})"
        (line,) = times.plot(at, [one["seconds"] for _, one in of], marker=".", label=label)
        gains.plot(at, [one["speed_up"] for _, one in of], marker=".", color=line.get_color())
        planned = [(x, one) for x, one in of if one["chosen"]]
        for axis, key in ((times, "seconds"), (gains, "speed_up")):
            rings = {"s": 90, "facecolors": "none", "edgecolors": "black"}
            axis.scatter([x for x, _ in planned], [one[key] for _, one in planned], **rings)
    times.scatter([], [], s=90, facecolors="none", edgecolors="black", label="the planner's choice")
    times.set_yscale("log")
    times.set_ylabel("seconds")
    gains.set_ylabel("speed-up over the plain ring")
    for axis in (times, gains):
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.set_xlabel("Mb/s of a link between nodes")
        axis.grid(alpha=0.3)
    times.legend(fontsize=7)
    p = report["plan"]
    what = "forward and backward" if p["backward"] else "forward"
    figure.suptitle(
        f"ring attention, {p['nodes']} nodes of {p['ranks_per_node']} ranks, {p['rails']} links each, {p['length']} tokens, "
        f"{p['q_heads']}x{p['kv_heads']}x{p['head_dim']} {p['dtype']}, blocks as {p['kv_format']}, {what}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
