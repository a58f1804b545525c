"""A report drawn: one group of bars per case, the machine's limit as a line over each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama1m_ext.bench.harness import OURS


def blank(width: float, height: float) -> Any:
    """A figure of so many inches that needs no display.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra that brings it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'llama1m-ext[bench]'") from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the report of a bench to `path` (the suffix decides the format). Needs matplotlib.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra that brings it.
    """
    cases = report["cases"]
    figure = blank(9, 1 + 1.1 * len(cases) + 0.2 * sum(len(one["candidates"]) for one in cases))
    axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axis, record in zip(axes, cases, strict=True):
        bars = list(reversed(record["candidates"]))
        colours = ["#1f6f8b" if one["name"].startswith(OURS) else "#b8b8b8" for one in bars]
        drawn = axis.barh([one["name"] for one in bars], [one["rate"] for one in bars], color=colours)
        axis.bar_label(drawn, [f"{one['rate']:.1f}" for one in bars], padding=3, fontsize=8)
        axis.axvline(record["limit"]["rate"], color="black", linestyle="--", linewidth=1)
        axis.set_xlim(0, 1.12 * max(record["limit"]["rate"], *(one["rate"] for one in bars)))
        void = " (VOID: the raw read varied)" if record["void"] else ""
        axis.set_title(f"{record['name']}, {record['dtype']}{void}", fontsize=9, loc="left")
        axis.set_xlabel(f"{record['unit']}; dashed: {record['limit']['name']}", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(
        f"{report['bench']}, {report['environment']['cpu']['model']}, {report['threads']} threads", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
