"""What the miniature's variants can do, measured, and shown as tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama1m_ext.demo.needle import SYSTEM
from llama1m_ext.eval import plot
from llama1m_ext.eval.needle import Cell, NeedleReport, needle
from llama1m_ext.eval.ppl import perplexity

DEPTHS = 11


def measure(
    model: Any, tokenizer: Any, text: str, folder: Path, *, samples: Mapping[int, int], row: int, rows: int
) -> dict[str, Any]:
    """Needles by length and depth, and perplexity by position. What is in `folder` is not measured again.

    Args:
        text: neither trained on nor shorter than `row * rows` tokens.
        samples: for each length in tokens, the samples of each of its cells.
        row, rows: tokens of a row for perplexity, and how many rows from the beginning of the text.
    """
    cells: list[Cell] = []
    for length, count in samples.items():
        report = needle(
            model,
            tokenizer,
            lengths=length,
            depths=DEPTHS,
            kind="sentence",
            hay=text,
            samples=count,
            seed=1,
            out=folder / f"needle-{length}",
            system=SYSTEM,
            repeat=True,
        )
        cells += report.cells
    file = folder / "perplexity.json"
    if not file.is_file():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: row * rows])
        found = perplexity(model, ids.view(rows, row)).to_dict()
        write_json(file, found)
    return {"needle": [dict(cell.__dict__) for cell in cells], "perplexity": json.loads(file.read_text("utf-8"))}


def write_json(file: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def report_of(variant: Mapping[str, Any]) -> NeedleReport:
    """The needles of a variant of the results."""
    return NeedleReport("sentence", "shared", 1, False, [Cell(**cell) for cell in variant["needle"]])


def tables(results: Mapping[str, Any]) -> str:
    """Two tables in Markdown: needles found by length, perplexity by position."""
    variants: Mapping[str, Any] = results["variants"]
    lengths = report_of(next(iter(variants.values()))).lengths
    shares = {
        name: [f"{100 * report_of(variant).accuracy(n):.0f}%" for n in lengths] for name, variant in variants.items()
    }
    buckets = next(iter(variants.values()))["perplexity"]["buckets"]
    places = {
        name: [_number(bucket["perplexity"]) for bucket in variant["perplexity"]["buckets"]]
        for name, variant in variants.items()
    }
    return (
        "Needles found, by tokens of the prompt:\n\n"
        + _table(variants, [f"{n:,}" for n in lengths], shares)
        + "\nPerplexity of held-out text, by the position of the predicted token:\n\n"
        + _table(variants, [f"to {bucket['end']:,}" for bucket in buckets], places)
    )


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """A heat map of each variant, `needle-NAME.png`, and `perplexity.png`."""
    lines = {}
    for name, variant in results["variants"].items():
        label, report = variant["label"], report_of(variant)
        report.plot(folder / f"needle-{name}.png", title=f"{label}: {100 * report.accuracy():.0f}% found")
        buckets = variant["perplexity"]["buckets"]
        lines[label] = [(bucket["end"], bucket["perplexity"]) for bucket in buckets]
    plot.curves(lines, folder / "perplexity.png", x="position, up to", y="perplexity")


def _table(variants: Mapping[str, Any], head: Sequence[str], cells: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| model | theta | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    lines += [f"| {v['label']} | {v['theta']:,.0f} | {' | '.join(cells[name])} |" for name, v in variants.items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "over 1e300" if value is None else f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"
