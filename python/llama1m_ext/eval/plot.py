"""Pictures: a heat map of lengths and depths, curves over position. matplotlib is loaded when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOTS = 150
_COLOURS = ("#b8412f", "#e8c15a", "#3a8f5c")


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes, without a window.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra that brings it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'llama1m-ext[method]'") from error
    made = Figure(figsize=(width, height))
    FigureCanvasAgg(made)
    return made, made.subplots()


def require() -> None:
    """Says before the work that a picture can't be drawn.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    figure(1, 1)


def heat_map(
    values: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    path: str | Path,
    *,
    title: str,
    x: str,
    y: str,
) -> None:
    """Draws shares from 0 (red) to 1 (green).

    Args:
        values: `values[row][column]`, 0 to 1; None: not measured.
        columns, rows: their names.
        path: the suffix decides the format.
    """
    made, axes = figure(2.5 + 0.75 * len(columns), 1.8 + 0.35 * len(rows))
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("accuracy", _COLOURS)
    axes.set_facecolor("#d8d8d8")  # where there is nothing
    shares = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=45 if len(columns) > 8 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_title(title, fontsize=9, loc="left")
    made.colorbar(image, ax=axes, ticks=[0, 0.5, 1]).ax.tick_params(labelsize=8)
    made.tight_layout()
    made.savefig(path, dpi=DOTS)


def curves(points: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, *, x: str, y: str) -> None:
    """Draws lines with both axes logarithmic.

    Args:
        points: for each line its name and its points.
        path: the suffix decides the format.
    """
    made, axes = figure(7, 4.2)
    for name, line in points.items():
        axes.plot([at for at, _ in line], [value for _, value in line], marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(which="major", linewidth=0.4, alpha=0.5)
    if len(points) > 1:
        axes.legend(fontsize=8)
    made.tight_layout()
    made.savefig(path, dpi=DOTS)
