"""A needle in a haystack: lengths by depths, with real text as hay.

Two ways. `"shared"`: the needles of all depths, with keys of their own, are in one document, which is read once; they are
asked for one after the other over the same cache, and each is a distractor of the others. `"alone"`: one needle in each
document, the classical way; going from the deepest up, what stands before two needles is read once.

An answer is right where the model's most probable token is the right one at each token of the value, given the lead (one
forward, as EasyContext does it); with `generate`, where the value is in what greedy decoding says, without a lead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cells import Cells, model_settings, text_digest, write_json
from .frame import Chat, Frame, frame_for, stops
from .haystack import Haystack, cut_at, insert
from .kinds import Kind, Needle, draw_needles, kind_of
from .reader import Reader, Show, bar, evaluating, warn_beyond

MODES = ("shared", "alone")
NEW_TOKENS = 64
"""Of an answer that is generated."""


@dataclass(frozen=True)
class Cell:
    """How often the needle was found at one length and depth.

    Attributes:
        length: tokens of the prompt, answer included.
        depth: 0 (beginning of the document) to 1 (its end).
        right: of `samples`.
    """

    length: int
    depth: float
    right: int
    samples: int


@dataclass(frozen=True)
class NeedleReport:
    """What `needle` found; cells in the order of lengths, then depths."""

    kind: str
    mode: str
    seed: int
    generated: bool
    cells: list[Cell]

    @property
    def lengths(self) -> list[int]:
        """In the order given."""
        return list(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def depths(self) -> list[float]:
        """Growing."""
        return sorted({cell.depth for cell in self.cells})

    def accuracy(self, length: int | None = None) -> float:
        """The share of right answers, of one length or of all.

        Raises:
            ValueError: nothing was measured at that length.
        """
        cells = [cell for cell in self.cells if length is None or cell.length == length]
        if not cells:
            raise ValueError(f"length: expected one of {self.lengths}, got {length}")
        return sum(cell.right for cell in cells) / sum(cell.samples for cell in cells)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "mode": self.mode,
            "seed": self.seed,
            "generated": self.generated,
            "accuracy": {"all": self.accuracy(), **{str(n): self.accuracy(n) for n in self.lengths}},
            "cells": [dict(cell.__dict__) for cell in self.cells],
        }

    def table(self) -> str:
        """As text: a row for each depth, a column for each length, in percent."""
        share = {(cell.length, cell.depth): 100 * cell.right / cell.samples for cell in self.cells}
        lengths = self.lengths
        lines = ["  depth" + "".join(f"{n:>11,}" for n in lengths)]
        for depth in self.depths:
            lines.append(f"{100 * depth:6.0f}%" + "".join(f"{share[n, depth]:>10.0f}%" for n in lengths))
        lines.append("    all" + "".join(f"{100 * self.accuracy(n):>10.1f}%" for n in lengths))
        return "\n".join(lines)

    def plot(self, path: str | Path, title: str | None = None) -> None:
        """Draws the heat map (the suffix decides the format).

        Raises:
            ModuleNotFoundError: without matplotlib, naming the extra that brings it.
        """
        from . import plot

        share = {(cell.length, cell.depth): cell.right / cell.samples for cell in self.cells}
        plot.heat_map(
            [[share.get((n, depth)) for n in self.lengths] for depth in self.depths],
            [f"{n:,}" for n in self.lengths],
            [f"{100 * depth:.0f}%" for depth in self.depths],
            path,
            title=title or f"needle ({self.kind}), {100 * self.accuracy():.1f}% found",
            x="tokens",
            y="depth",
        )


def depths_for(depths: int | Sequence[float]) -> list[float]:
    """Growing depths from 0 to 1: so many, evenly spaced (one is in the middle), or those given.

    Raises:
        ValueError: none, or some outside 0 to 1.
    """
    if isinstance(depths, int):
        if isinstance(depths, bool) or depths < 1:
            raise ValueError(f"depths: expected at least 1, got {depths!r}")
        return [0.5] if depths == 1 else [round(i / (depths - 1), 6) for i in range(depths)]
    found = sorted({float(depth) for depth in depths})
    if not found or not all(0 <= depth <= 1 for depth in found):
        raise ValueError(f"depths: expected numbers from 0 to 1, got {list(depths)}")
    return found


def lengths_for(lengths: int | Sequence[int]) -> list[int]:
    """Lengths without repetitions.

    Raises:
        ValueError: none, or less than a token.
    """
    found = list(dict.fromkeys([lengths] if isinstance(lengths, int) else lengths))
    if not found or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in found):
        raise ValueError(f"lengths: expected numbers of tokens, got {lengths!r}")
    return found


def needle(
    model: Any,
    tokenizer: Any,
    *,
    lengths: int | Sequence[int],
    depths: int | Sequence[float] = 11,
    kind: str | Kind = "passkey",
    hay: str | None = None,
    samples: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Show = "auto",
    mode: str = "shared",
    chat: Chat = "auto",
    system: str | None = None,
    generate: bool = False,
    repeat: bool = False,
) -> NeedleReport:
    """Hides needles in a long text and asks for them.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        lengths: tokens of the prompts, from the first to the last of the answer.
        depths: a number of evenly spaced ones, or each from 0 to 1.
        kind: "passkey" (random digits), "kv" (a UUID and a number, among others), "sentence" (what the demo model was trained
            on), or a `Kind` of your own.
        hay: the text to hide them in; None: the book that ships with the package.
        samples: for each cell, each with needles of its own, in hay that begins elsewhere.
        seed: of all that is random; the same seed gives the same prompts.
        out: a folder for the results; a run that ended early goes on there.
        progress: a bar; "auto": where there are 16384 tokens or more to read.
        mode: "shared" or "alone"; see the module's docstring.
        chat: ask through the tokenizer's chat template; "auto": where it has one.
        system: the system message of the chat.
        generate: judge what the model says, not the most probable tokens of the right answer.
        repeat: hay that is too short begins again.

    Raises:
        ValueError: arguments that make no sense, hay that is too short, a folder with other results; before the start.
    """
    sizes, places, what = lengths_for(lengths), depths_for(depths), kind_of(kind)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    stack, frame = Haystack(hay, tokenizer, repeat=repeat), frame_for(tokenizer, chat, system)
    shared = mode == "shared"
    room = NEW_TOKENS if generate else 0

    def prompts_of(size: int, sample: int) -> _Prompts:
        return _Prompts(frame, stack, what, size, places, shared, seed, sample, room)

    for size, sample in (*((min(sizes), i) for i in range(samples)), (max(sizes), 0)):
        prompts_of(size, sample)  # whether they can be made at all
    warn_beyond(model, max(sizes))
    settings: dict[str, Any] = {}
    if out is not None:
        settings = {
            "command": "needle",
            "model": model_settings(model, tokenizer),
            "kind": dict(what.__dict__),
            "mode": mode,
            "depths": places if shared else None,  # alone, each is for itself
            "hay": text_digest(stack.text),
            "repeat": repeat,
            "seed": seed,
            "chat": frame.chat,
            "system": system,
            "generate": generate,
        }
    cells = [(size, depth, sample) for size in sizes for sample in range(samples) for depth in places]
    inside: Show = False if progress is False else "auto"
    with Cells(out, settings, ("length", "depth", "sample")) as found, evaluating(model, inside):
        reader, ends = Reader(model), stops(model, tokenizer)
        missing = [cell for cell in cells if cell not in found]
        documents = list(dict.fromkeys((size, sample) for size, _, sample in missing))
        tokens = sum(one[0] for one in (documents if shared else missing))
        with bar("needles", "cells", progress, tokens, len(cells), len(cells) - len(missing)) as shown:
            for size, sample in documents:
                prompts = prompts_of(size, sample)
                for i in reversed(range(len(places))):
                    if (size, places[i], sample) in found:
                        continue
                    shown.set_postfix_str(f"{size:,} tokens, depth {100 * places[i]:.0f}%")
                    answer = _generated if generate else _forced
                    right, said = answer(reader, prompts, i, ends)
                    record = {"length": size, "depth": places[i], "sample": sample, "right": right}
                    found.add({**record, "expected": prompts.needles[i].value, "given": said})
                    shown.update()
                reader.forget()
        rights = {cell: bool(found.get(cell)["right"]) for cell in cells}
    made = [
        Cell(size, depth, sum(rights[size, depth, i] for i in range(samples)), samples)
        for size in sizes
        for depth in places
    ]
    report = NeedleReport(what.name, mode, seed, generate, made)
    if out is not None:
        write_json(Path(out) / "report.json", report.to_dict())
    return report


class _Prompts:
    """The prompts of one length and sample, one for each depth.

    Args:
        new_tokens: room for an answer that is generated; 0: for the right one.
    """

    def __init__(
        self,
        frame: Frame,
        stack: Haystack,
        kind: Kind,
        length: int,
        depths: Sequence[float],
        shared: bool,
        seed: int,
        sample: int,
        new_tokens: int,
    ) -> None:
        draw = random.Random(f"needle {kind.name} {seed} {sample} {length}")
        start = stack.place(random.Random(f"hay {seed} {sample}")) if seed or sample else 0
        drawn = draw_needles(kind, len(depths) + kind.distractors, draw)
        self.needles: list[Needle] = drawn[: len(depths)]
        self._frame, self._depths, self._shared = frame, depths, shared
        self._pieces = [frame.encode(one.text) for one in self.needles]
        others = [frame.encode(one.text) for one in drawn[len(depths) :]]
        self._turns = [self._turn(one, new_tokens) for one in self.needles]
        sizes = [len(piece) for piece in self._pieces]
        need = len(frame.head) + max(len(turn) + max(new_tokens, n) for turn, n in self._turns)
        need += (sum(sizes) if shared else max(sizes)) + sum(map(len, others))
        self._room = length - need
        if self._room < 1:
            raise ValueError(
                f"lengths: expected more than {need} tokens for {len(depths) if shared else 1} needles of kind {kind.name!r} "
                f"and the question, got {length}"
            )
        hay = stack.tokens(self._room, start)
        ends = stack.sentence_ends(hay)
        places = [(cut_at(ends, self._room, draw.random()), piece) for piece in others]
        self._cuts = [cut_at(ends, self._room, depth) for depth in depths]
        self._hay, self._others = hay, places

    def _turn(self, one: Needle, new_tokens: int) -> tuple[np.ndarray, int]:
        """What follows the document without the answer's last token, and how many tokens of it are predicted."""
        asked = f"\n\n{one.question}{self._frame.after}"
        if new_tokens:
            return self._frame.encode(asked), 0
        before = self._frame.encode(f"{asked}{one.lead}")
        whole = self._frame.encode(f"{asked}{one.lead}{one.answer}")
        n = min(len(before), len(whole) - 1)
        other = np.flatnonzero(before[:n] != whole[:n])
        return whole, len(whole) - (int(other[0]) if len(other) else n)

    def document(self, i: int) -> np.ndarray:
        """Everything before the question for needle i, int64."""
        own = list(zip(self._cuts, self._pieces, strict=True)) if self._shared else [(self._cuts[i], self._pieces[i])]
        return np.concatenate([self._frame.head, insert(self._hay, self._others + own)])

    def prompt(self, i: int) -> tuple[np.ndarray, int]:
        """The whole prompt for needle i, and how many tokens at its end are the answer's."""
        turn, answer = self._turns[i]
        return np.concatenate([self.document(i), turn]), answer


def _forced(reader: Reader, prompts: _Prompts, i: int, ends: frozenset[int]) -> tuple[bool, str]:
    ids, n = prompts.prompt(i)
    best = reader.logits(ids[:-1], n).argmax(-1).cpu().numpy()
    return bool((best == ids[-n:]).all()), prompts._frame.tokenizer.decode(best.tolist()).strip()


def _generated(reader: Reader, prompts: _Prompts, i: int, ends: frozenset[int]) -> tuple[bool, str]:
    ids, _ = prompts.prompt(i)
    said = prompts._frame.tokenizer.decode(reader.greedy(ids, NEW_TOKENS, ends), skip_special_tokens=True).strip()
    return prompts.needles[i].value in said, said
