"""What went in and what came out: documents, tokens, lengths, shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BINS_PER_OCTAVE = 4
NEEDLES = "needles"
"""The source of what was put between the documents."""
_FIRST_RATIO = 4.0
"""Characters per token, until some were counted."""


class Statistics:
    """Counts by source; its size doesn't grow with the data.

    Lengths before the selection are estimated for documents that were passed over without being tokenised, from
    characters and from what was tokenised so far.
    """

    def __init__(self) -> None:
        self.sources: dict[str, dict[str, Any]] = {}
        self.empty = self.bad = self.unlisted = 0

    def of(self, source: str) -> dict[str, Any]:
        """The counts of a source; lengths are counted in bins, `bin_of`."""
        if source not in self.sources:
            self.sources[source] = {
                "documents_read": 0,
                "documents_taken": 0,
                "tokens_taken": 0,
                "tokens_written": 0,
                "characters_counted": 0,
                "tokens_counted": 0,
                "lengths_read": {},
                "lengths_taken": {},
            }
        return self.sources[source]

    def read(self, source: str, chars: int, tokens: int | None) -> None:
        """A document was read, and tokenised or not."""
        counts = self.of(source)
        counts["documents_read"] += 1
        if tokens is None:
            counted = counts["tokens_counted"]
            ratio = counts["characters_counted"] / counted if counted else _FIRST_RATIO
            tokens = round(chars / ratio)
        else:
            counts["characters_counted"] += chars
            counts["tokens_counted"] += tokens
        _count(counts["lengths_read"], tokens)

    def taken(self, source: str, tokens: int, length: int) -> None:
        """A document was taken, with so many tokens, borders included; `length` without them."""
        counts = self.of(source)
        counts["documents_taken"] += 1
        counts["tokens_taken"] += tokens
        _count(counts["lengths_taken"], length)

    def written(self, segments: list[dict[str, Any]]) -> None:
        """A row was written."""
        for one in segments:
            self.of(one["source"])["tokens_written"] += one["end"] - one["start"]

    def state(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {"empty": self.empty, "bad": self.bad, "unlisted": self.unlisted, "sources": self.sources}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As `state` gave it."""
        self.empty, self.bad, self.unlisted = state["empty"], state["bad"], state["unlisted"]
        self.sources = {source: dict(counts) for source, counts in state["sources"].items()}


def report(statistics: Statistics, mixture: Mapping[str, float] | None) -> dict[str, Any]:
    """The figures, as they are kept beside the rows.

    Returns:
        `sources`: by name what `Statistics.of` counts, `share` of the documents' tokens written and, with a mixture, `wanted`;
        `median_read`, `median_taken`: tokens, to a quarter of an octave. `lengths_read`, `lengths_taken`: documents by
        length, the keys are where a bin begins, in tokens.
    """
    total = sum(counts["tokens_written"] for counts in statistics.sources.values())
    of_documents = total - statistics.sources.get(NEEDLES, {}).get("tokens_written", 0)
    names = [*(mixture or {}), *sorted(set(statistics.sources) - set(mixture or {}))]
    sources: dict[str, Any] = {}
    for name in names:
        counts = dict(statistics.of(name))
        for key in ("characters_counted", "tokens_counted"):
            del counts[key]
        share = counts["tokens_written"] / of_documents if of_documents else 0.0
        made: dict[str, Any] = {"share": round(share, 6)}
        if mixture is not None and name != NEEDLES:
            made["wanted"] = mixture.get(name, 0.0)
        for which in ("read", "taken"):
            bins = counts.pop(f"lengths_{which}")
            counts[f"median_{which}"] = _median(bins)
            counts[f"lengths_{which}"] = {str(start_of(int(b))): bins[b] for b in sorted(bins, key=int)}
        sources[name] = {**made, **counts}
    passed_over = {"empty": statistics.empty, "bad": statistics.bad, "not_in_the_mixture": statistics.unlisted}
    return {"tokens_written": total, "passed_over": passed_over, "sources": sources}


def table(figures: Mapping[str, Any]) -> str:
    """The figures of `report` as text."""
    head = ("source", "read", "taken", "tokens", "share", "wanted", "median read", "median taken")
    lines = [head]
    for name, one in figures["sources"].items():
        wanted = f"{one['wanted']:.2%}" if "wanted" in one else "-"
        lines.append(
            (
                name or "-",
                f"{one['documents_read']:,}",
                f"{one['documents_taken']:,}",
                f"{one['tokens_written']:,}",
                f"{one['share']:.2%}",
                wanted,
                f"{one['median_read']:,}",
                f"{one['median_taken']:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """Histograms of document lengths, before and after, by documents and by tokens, as a PNG.

    Returns:
        Whether matplotlib is there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharex=True)
    for which, label in (("read", "before"), ("taken", "after")):
        bins: dict[int, int] = {}
        for one in figures["sources"].values():
            for start, count in one[f"lengths_{which}"].items():
                bins[int(start)] = bins.get(int(start), 0) + count
        octaves = range(bin_of(max(min(bins, default=1), 1)), bin_of(max(bins, default=1)) + 2)
        starts = sorted({start_of(b) for b in octaves} | set(bins))
        for axes, weights in (
            (left, [bins.get(s, 0) for s in starts]),
            (right, [bins.get(s, 0) * max(s, 1) for s in starts]),
        ):
            total = sum(weights) or 1
            axes.step([max(s, 1) for s in starts], [w / total for w in weights], where="post", label=label)
    for axes, what in ((left, "documents"), (right, "tokens")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of a document")
        axes.set_ylabel(f"share of the {what}")
        axes.legend()
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})  # the same bytes each time
    return True


def bin_of(tokens: int) -> int:
    """A quarter of an octave."""
    return math.floor(BINS_PER_OCTAVE * math.log2(tokens)) if tokens > 0 else -1


def start_of(which: int) -> int:
    """The fewest tokens in a bin."""
    return math.ceil(2 ** (which / BINS_PER_OCTAVE)) if which >= 0 else 0


def _count(bins: dict[str, int], tokens: int) -> None:
    key = str(bin_of(tokens))  # as JSON gives it back
    bins[key] = bins.get(key, 0) + 1


def _median(bins: Mapping[str, int]) -> int:
    half, seen = sum(bins.values()) / 2, 0
    for key in sorted(bins, key=int):
        seen += bins[key]
        if seen >= half:
            return start_of(int(key))
    return 0
