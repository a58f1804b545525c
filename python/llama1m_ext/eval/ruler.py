"""RULER's synthetic tasks (arXiv 2404.06654) at any length, scored as RULER does: 8 kinds of needles, variable tracking,
common and frequent words; questions about documents where a file of them is given.

A sample is as long as fits: prompt and room for the answer together take at most `length` tokens. Answers are what greedy
decoding says.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cells import Cells, model_settings, text_digest, write_json
from .frame import Chat, frame_for, stops
from .haystack import Haystack
from .needle import lengths_for
from .reader import Reader, Show, bar, evaluating, warn_beyond
from .ruler_tasks import TASKS, Question, Sample, Source, Task, read_squad

GROUPS = {
    "niah": tuple(name for name in TASKS if name.startswith("niah_")),
    "all": tuple(name for name in TASKS if name != "qa"),
}
NEAR = 0.01
"""A prompt is not made longer where less than this share of it is free."""


@dataclass(frozen=True)
class TaskCell:
    """The mean score of one task at one length, 0 to 100, over so many samples."""

    task: str
    length: int
    score: float
    samples: int


@dataclass(frozen=True)
class RulerReport:
    """What `ruler` found; cells in the order of lengths, then tasks."""

    seed: int
    cells: list[TaskCell]

    @property
    def lengths(self) -> list[int]:
        """In the order given."""
        return list(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def tasks(self) -> list[str]:
        """In RULER's order."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def average(self, length: int | None = None) -> float:
        """The mean over tasks, of one length or of all, 0 to 100.

        Raises:
            ValueError: nothing was measured at that length.
        """
        scores = [cell.score for cell in self.cells if length is None or cell.length == length]
        if not scores:
            raise ValueError(f"length: expected one of {self.lengths}, got {length}")
        return sum(scores) / len(scores)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seed": self.seed,
            "average": {"all": self.average(), **{str(n): self.average(n) for n in self.lengths}},
            "cells": [dict(cell.__dict__) for cell in self.cells],
        }

    def table(self) -> str:
        """As text: a row for each task, a column for each length."""
        scores, lengths = {(cell.task, cell.length): cell.score for cell in self.cells}, self.lengths
        wide = max(len(name) for name in (*self.tasks, "average"))
        lines = [" " * wide + "".join(f"{n:>11,}" for n in lengths)]
        lines += [f"{task:<{wide}}" + "".join(f"{scores[task, n]:>11.1f}" for n in lengths) for task in self.tasks]
        lines.append(f"{'average':<{wide}}" + "".join(f"{self.average(n):>11.1f}" for n in lengths))
        return "\n".join(lines)

    def plot(self, path: str | Path, title: str | None = None) -> None:
        """Draws tasks by lengths (the suffix decides the format).

        Raises:
            ModuleNotFoundError: without matplotlib, naming the extra that brings it.
        """
        from . import plot

        scores = {(cell.task, cell.length): cell.score / 100 for cell in self.cells}
        plot.heat_map(
            [[scores.get((task, n)) for n in self.lengths] for task in self.tasks],
            [f"{n:,}" for n in self.lengths],
            self.tasks,
            path,
            title=title or f"RULER, {self.average():.1f} on average",
            x="tokens",
            y="task",
        )


def tasks_for(tasks: str | Sequence[str], has_file: bool) -> list[Task]:
    """Tasks by their names or groups of them ("niah", "all"; "qa" is in "all" where there is a file), in RULER's order.

    Raises:
        ValueError: an unknown name, or "qa" without a file.
    """
    wanted: set[str] = set()
    for name in [tasks] if isinstance(tasks, str) else tasks:
        if name not in GROUPS and name not in TASKS:
            raise ValueError(f"tasks: expected some of {', '.join([*GROUPS, *TASKS])}, got {name!r}")
        wanted.update(GROUPS.get(name, (name,)))
        if name == "all" and has_file:
            wanted.add("qa")
    if "qa" in wanted and not has_file:
        raise ValueError("tasks: expected a file in SQuAD's form (qa=, --qa) for 'qa', got none")
    if not wanted:
        raise ValueError("tasks: expected at least one, got none")
    return [task for name, task in TASKS.items() if name in wanted]


class Prompts:
    """Makes the prompts of samples.

    Args:
        tokenizer: of transformers.
        hay: the essays; None: the book that ships with the package.
        qa: a file in SQuAD's form, or None.
        seed: of all that is random.
        chat: see `ruler`.
        repeat: go on from the beginning of essays and documents that are too short.
    """

    def __init__(
        self, tokenizer: Any, hay: str | None, qa: str | Path | None, seed: int, chat: Chat, repeat: bool
    ) -> None:
        self.tokenizer, self.seed, self.chat, self.repeat = tokenizer, seed, chat, repeat
        self.stack = Haystack(hay, tokenizer, repeat=repeat)
        self.documents, self.questions = read_squad(qa) if qa is not None else (list[str](), list[Question]())
        self._hay: tuple[int, list[str]] = (-1, [])

    def source(self, length: int, index: int) -> Source:
        """What a sample takes its texts from."""
        start = self.stack.place(random.Random(f"hay {self.seed} {index}")) if self.seed or index else 0
        if self._hay[0] != start:
            text = self.stack.text
            self._hay = start, f"{text[start:]} {text[:start]}".split()
        return Source(self._hay[1], self.documents, self.questions, self.repeat, length, index)

    def ids(self, sample: Sample) -> np.ndarray:
        """The tokens of a prompt up to where the answer goes on, int64."""
        frame = frame_for(self.tokenizer, self.chat, examples=sample.examples)
        after = frame.after if frame.chat else ""
        return np.concatenate(
            [
                np.asarray(frame.bos, dtype=np.int64),
                frame.encode(f"{frame.before}{sample.user}{after}{sample.lead}"),
            ]
        )

    def sample(self, task: Task, length: int, index: int) -> tuple[Sample, np.ndarray]:
        """A sample of a task and its prompt's tokens, the longest that fits.

        Raises:
            ValueError: none fits, or there is not enough text for the length.
        """
        source, room = self.source(length, index), length - task.new_tokens

        def made(size: int) -> tuple[Sample, np.ndarray]:
            draw = random.Random(f"ruler {task.name} {self.seed} {length} {index}")
            one = task.make(size, draw, source)
            return one, self.ids(one)

        most = task.most(source)
        best = made(task.least)
        least = len(best[1])
        if least > room:
            raise ValueError(
                f"lengths: expected at least {least + task.new_tokens} tokens for a sample of {task.name}, got {length}"
            )
        # Tokens grow nearly in proportion to the size: guesses go along the line, and by halves where that does not end.
        fits, tokens, fails = task.least, least, math.inf if most is None else most + 1
        size: float = 2 * task.least + 20
        for guess in range(40):
            if tokens >= (1 - NEAR) * room or fails - fits <= 1:
                break
            size = int(max(fits + 1, min(size, fails - 1)))
            one = made(size)
            n = len(one[1])
            if n <= room:
                best, fits, tokens = one, size, n
            else:
                fails = size
            size = task.least + (size - task.least) * (0.998 * room - least) / max(1, n - least)
            if guess > 6 and fails < math.inf:
                size = (fits + fails) // 2
        if most is not None and fits >= most and tokens < 0.95 * room:
            raise ValueError(
                f"{'qa' if task.name == 'qa' else 'hay'}: expected text for {length} tokens, got enough for {tokens}; "
                "repeat=True (--repeat) reads it again where it ends"
            )
        return best


def ruler(
    model: Any,
    tokenizer: Any,
    *,
    lengths: int | Sequence[int],
    tasks: str | Sequence[str] = "all",
    samples: int = 10,
    seed: int = 0,
    hay: str | None = None,
    qa: str | Path | None = None,
    out: str | Path | None = None,
    progress: Show = "auto",
    chat: Chat = "auto",
    repeat: bool = False,
) -> RulerReport:
    """Scores a model on RULER's tasks.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        lengths: tokens of prompt and answer together.
        tasks: names, or "niah", or "all"; see `tasks_for`.
        samples: of each task and length; RULER takes 500.
        seed: of all that is random; the same seed gives the same prompts.
        hay: the text of the essays; None: the book that ships with the package (RULER has Paul Graham's essays).
        qa: a file in SQuAD's form, for the task "qa".
        out: a folder for the results; a run that ended early goes on there. Answers are in `cells.jsonl`.
        progress: a bar; "auto": where there are 16384 tokens or more to read.
        chat: ask through the tokenizer's chat template; "auto": where it has one.
        repeat: texts that are too short begin again.

    Raises:
        ValueError: arguments that make no sense, lengths that are too short for a task, texts that are too short, a folder
            with other results; before the start.
        FileNotFoundError: no such file.
    """
    sizes, wanted = lengths_for(lengths), tasks_for(tasks, qa is not None)
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    prompts = Prompts(tokenizer, hay, qa, seed, chat, repeat)
    if any(task.name == "qa" for task in wanted) and samples > len(prompts.questions):
        raise ValueError(
            f"samples: expected at most {len(prompts.questions)}, the questions of the file, for qa, got {samples}"
        )
    for task in wanted:
        prompts.sample(task, min(sizes), 0)
    for task in {task.most: task for task in wanted if task.most(prompts.source(max(sizes), 0)) is not None}.values():
        prompts.sample(task, max(sizes), 0)  # is there enough text?
    warn_beyond(model, max(sizes))
    settings: dict[str, Any] = {}
    if out is not None:
        settings = {
            "command": "ruler",
            "model": model_settings(model, tokenizer),
            "hay": text_digest(prompts.stack.text),
            "qa": None if qa is None else text_digest(Path(qa).read_text(encoding="utf-8")),
            "seed": seed,
            "chat": frame_for(tokenizer, chat).chat,
            "repeat": repeat,
        }
    keys = [(task.name, size, i) for size in sizes for task in wanted for i in range(samples)]
    inside: Show = False if progress is False else "auto"
    with Cells(out, settings, ("task", "length", "sample")) as found, evaluating(model, inside):
        reader, ends = Reader(model), stops(model, tokenizer)
        missing = [key for key in keys if key not in found]
        tokens = sum(size for _, size, _ in missing)
        with bar("RULER", "samples", progress, tokens, len(keys), len(keys) - len(missing)) as shown:
            for name, size, i in missing:
                shown.set_postfix_str(f"{name}, {size:,} tokens")
                task = TASKS[name]
                sample, ids = prompts.sample(task, size, i)
                said = tokenizer.decode(reader.greedy(ids, task.new_tokens, ends), skip_special_tokens=True)
                score = task.score(said, sample.answers)
                record = {"task": name, "length": size, "sample": i, "score": score, "tokens": len(ids)}
                found.add({**record, "expected": list(sample.answers), "said": said})
                shown.update()
        scores = {key: float(found.get(key)["score"]) for key in keys}
    made = [
        TaskCell(task.name, size, 100 * sum(scores[task.name, size, i] for i in range(samples)) / samples, samples)
        for size in sizes
        for task in wanted
    ]
    report = RulerReport(seed, made)
    if out is not None:
        write_json(Path(out) / "report.json", report.to_dict())
    return report
