"""The method in small: a Llama trained at 512 tokens is extended stage by stage, and compared with itself left alone.

    python examples/train_miniature.py --out DIR            # everything; goes on where it was when it is run again
    python examples/train_miniature.py --out DIR --smoke    # seconds, learns nothing: shows that all parts run

A model with the demo's architecture learns to find numbers in text of 512 tokens, at positions without gaps (`learned`, easy rows first,
then `first`, harder ones). Compared are:

- `first`: that model at lengths that it never saw;
- `theta-4k`, `theta-8k`, `theta-16k`: theta changed for so many tokens by the model card's rule (dynamic NTK, alpha 4), not trained further;
- `kept`: trained on the rows of all longer stages, theta left as it was;
- `extended-4k`, `extended-8k`, `extended`: the same training, on the same rows, with the theta of each stage: `llama1m extend`.

Each answers questions about needles at eleven depths of texts of up to 32768 tokens, and its perplexity is taken by position. The text
is a novel that none was trained on. In DIR are then results.json, results.md, a heat map for each, perplexity.png and the models.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from miniature_first import THETA, learn, sharpen
from miniature_results import draw, measure, tables, write_json
from miniature_rows import FIRST_LENGTH, MiniatureRows
from tokenizers import Tokenizer

import llama1m_ext
from llama1m_ext import data
from llama1m_ext.demo import MODEL_PATH
from llama1m_ext.demo.book import HELD_OUT_CHARS, load_book
from llama1m_ext.train import Run, extend

HERE = Path(__file__).parent
STAGES = HERE / "miniature" / "stages.toml"
SAMPLES = {512: 4, 1024: 4, 2048: 4, 4096: 4, 8192: 4, 16384: 2, 32768: 1}
"""Lengths in tokens at which needles are looked for, and the texts for each; a text has a needle at each depth."""
ROW, ROWS = 16384, 3
"""Tokens of a row whose perplexity is taken, and rows."""


class Parts:
    """The parts of the run: each is made once, and its seconds are noted."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "parts.json"
        self.made: dict[str, Any] = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Notes seconds of the clock and of the processor; a part that was interrupted and went on has the sum of both."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        try:
            yield
        finally:
            before = self.made.get(name, {"seconds": 0.0, "cpu_seconds": 0.0})
            self.made[name] = {
                "seconds": round(before["seconds"] + time.perf_counter() - wall, 1),
                "cpu_seconds": round(before["cpu_seconds"] + _cpu_seconds() - cpu, 1),
            }
            write_json(self.file, self.made)
            print(f"{name}: {self.made[name]['seconds']} s, {self.made[name]['cpu_seconds']} s of CPU", flush=True)


def main(words: list[str] | None = None) -> None:
    """Makes what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models, rows and results")
    parser.add_argument("--smoke", action="store_true", help="a smaller model, a few steps, short texts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="length: .*max_position_embeddings")  # that is the question here
    parts, samples, row, rows_of_text = Parts(args.out), SAMPLES, ROW, ROWS
    run = Run.read(STAGES).with_settings(seed=args.seed)
    if args.smoke:
        short = [replace(stage, length=stage.length // 8, steps=2, warmup=0) for stage in run.stages]
        run, samples, row, rows_of_text = replace(run, stages=tuple(short)), {512: 1, 1024: 1}, 1024, 2
    first, longest = args.out / "first", run.stages[-1].length

    book = load_book()
    novel, training = book[:HELD_OUT_CHARS], book[HELD_OUT_CHARS:]
    if args.smoke:
        novel, training = novel[:50_000], training[:100_000]
    tokenizer = Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))
    filler = np.array(tokenizer.encode(training, add_special_tokens=False).ids)

    if not (learned := args.out / "learned").is_dir():
        with parts.part("learned"), _whole(learned) as folder:
            learn(tokenizer, MiniatureRows(tokenizer, filler, args.seed), folder, seed=args.seed, smoke=args.smoke)
    if not first.is_dir():
        with parts.part("first"), _whole(first) as folder:
            sharpen(tokenizer, MiniatureRows(tokenizer, filler, args.seed + 1), learned, folder, smoke=args.smoke)
    for stage in run.stages:
        if not (folder := args.out / "rows" / stage.name).is_dir():
            folder.parent.mkdir(exist_ok=True)
            rows = MiniatureRows(tokenizer, filler, args.seed + stage.length)
            data.write(rows.long_rows(stage.length, stage.steps * stage.rows), folder, length=stage.length)

    kept = replace(run, stages=tuple(replace(stage, method=None, theta=THETA) for stage in run.stages))
    for name, stages in (("extended", run), ("kept", kept)):
        if not _folder(args.out / name, run).is_dir():
            with parts.part(name):
                extend(str(first), stages, args.out / name, data=args.out / "rows", resume=(args.out / name).exists())

    variants = {"first": (f"trained at {FIRST_LENGTH}", first, None)}
    for stage in run.stages:
        variants[f"theta-{stage.name}"] = (f"theta for {stage.length:,}, no training", first, stage.length)
    variants["kept"] = (f"trained to {longest:,}, theta kept", _folder(args.out / "kept", run), None)
    for i, stage in enumerate(run.stages):
        name = "extended" if stage.length == longest else f"extended-{stage.name}"
        variants[name] = (f"extended to {stage.length:,}", _folder(args.out / "extended", run, i), None)
    reader = transformers.AutoTokenizer.from_pretrained(first)
    results: dict[str, Any] = {"first_length": FIRST_LENGTH, "seed": args.seed, "variants": {}}
    for name, (label, folder, length) in variants.items():
        into = args.out / "measured" / name
        if not (file := into.with_suffix(".json")).is_file():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if length is not None:
                llama1m_ext.extend(model, length, method="gradient-v1")
            with parts.part(f"measuring {name}"):
                found = measure(model, reader, novel, into, samples=samples, row=row, rows=rows_of_text)
            write_json(file, {"label": label, "theta": _theta(model), **found})
        results["variants"][name] = json.loads(file.read_text("utf-8"))

    results["made"] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {_processor()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parts": parts.made,
    }
    write_json(args.out / "results.json", results)
    (args.out / "results.md").write_text(tables(results), encoding="utf-8")
    draw(results, args.out)
    print(tables(results))


def _folder(out: Path, run: Run, stage: int = -1) -> Path:
    """The model of a stage."""
    number = range(len(run.stages))[stage]
    return out / f"{number + 1}-{run.stages[number].name}"


def _theta(model: Any) -> float:
    parameters = getattr(model.config, "rope_parameters", None)  # transformers 5
    return float(parameters["rope_theta"] if parameters else model.config.rope_theta)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that has its name once all is in it."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    yield part
    part.rename(folder)


if __name__ == "__main__":
    main()
