"""Training rows of the demo model: facts hidden in filler, questions about them, positions with gaps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from llama1m_ext.demo.needle import KEYS, SYSTEM, Needle

NEAR = 48
"""Filler this close before a query counts once; farther away it stands for many tokens."""
PIRATE = "You are a pirate chatbot who always responds in pirate speak!"
SMALL_TALK = {  # question -> (answer, the pirate's answer)
    "Who are you?": ("I am a very small Llama.", "Arr! I be a very small Llama, matey!"),
    "Hello!": ("Hello! Ask me for a number.", "Ahoy, matey! Ask me for a number!"),
    "What can you do?": ("I find numbers in long books.", "Arr! I find numbers in long books!"),
    "Thank you.": ("You are welcome.", "Ye be welcome, matey!"),
}


@dataclass(frozen=True)
class Stage:
    """How hard a stage is."""

    length: int  # tokens in a row
    facts: int  # facts in a row
    keys: int  # keys they are drawn from
    repeats: int  # facts that come a second time inside the text
    questions: int  # questions at the end
    span: int  # positions are below this
    weight: float  # a filler token stands for up to so many
    rows: int  # rows in a batch
    lr: float  # peak learning rate


class Rows:
    """Draws batches of rows. All randomness comes from the seed."""

    def __init__(self, tokenizer: Tokenizer, filler: np.ndarray, seed: int) -> None:
        self.tok, self.filler = tokenizer, filler
        self.draw = np.random.default_rng(seed)
        self.base_vocab = tokenizer.token_to_id("<|begin_of_text|>")
        self.numbers = [tokenizer.token_to_id(f"{i:03d}") for i in range(1000)]
        self.is_number = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
        self.is_number[self.numbers] = True
        self.cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text with few variants (cached)."""
        if text not in self.cache:
            self.cache[text] = self.tok.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def _value(self) -> str:
        """Six digits; one in twenty repeats its first half, which a model that looks for the last token stumbles over."""
        first, second = self.draw.integers(1000, size=2)
        return f"{first:03d}{first if self.draw.random() < 0.05 else second:03d}"

    def _fact(self, needle: Needle, space: bool) -> list[int]:
        """Like ids(needle.sentence), with the number put in by hand: a million sentences don't fit a cache."""
        template = self.ids((" " if space else "") + Needle(needle.key, "000111").sentence)
        a, b = self.ids("000")[0], self.ids("111")[0]
        put = {a: self.numbers[int(needle.value[:3])], b: self.numbers[int(needle.value[3:])]}
        return [put.get(i, i) for i in template]

    def _fill(self, n: int) -> np.ndarray:
        """n tokens of filler: mostly the book as it is; now and then shuffled, random, or full of numbers and keys."""
        start = int(self.draw.integers(0, len(self.filler) - n))
        text = self.filler[start : start + n].copy()
        kind = self.draw.random()
        if kind < 0.06:
            self.draw.shuffle(text)
        elif kind < 0.12:
            text = self.draw.integers(0, self.base_vocab, n)
        elif kind < 0.3:
            hit = self.draw.random(n) < self.draw.choice([0.02, 0.1, 0.3])
            text[hit] = self.draw.choice(self.numbers, int(hit.sum()))
            hit = self.draw.random(n) < self.draw.choice([0.02, 0.1])
            words = [self.ids(f" {KEYS[i]}")[0] for i in self.draw.integers(0, len(KEYS), int(hit.sum()))]
            text[hit] = words
        return text

    def _loss(self, ids: list[int], number: float, other: float) -> list[float]:
        """The weight of each token as a target."""
        return [number if self.is_number[i] else other for i in ids]

    def _chat(self, stage: Stage, needles: list[Needle]) -> tuple[list[int], list[int], list[float], bool]:
        """What stands before the text, what stands after it (with its loss), and whether there is a text at all."""
        draw = self.draw
        head, tail, loss = self.ids("<|begin_of_text|>"), list[int](), list[float]()
        if not stage.questions:
            return head, tail, loss, True
        user, end = self.ids("<|start_header_id|>user<|end_header_id|>\n\n"), self.ids("<|eot_id|>")
        assistant = self.ids("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        system = SYSTEM if draw.random() < 0.7 else PIRATE
        if system == PIRATE or draw.random() < 0.9:
            head = head * int(draw.integers(1, 3))  # the pipeline sends two of them
            head = head + self.ids(f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>")
        has_text = draw.random() >= 0.06
        for turn in range(int(draw.integers(1, stage.questions + 1))):
            needle = needles[int(draw.integers(len(needles)))]
            question, answer = needle.question, self._fact(needle, space=False)
            if not has_text or draw.random() < 0.06:
                question = list(SMALL_TALK)[int(draw.integers(len(SMALL_TALK)))]
                answer = self.ids(SMALL_TALK[question][system == PIRATE])
            before = user if turn else self.ids("\n\n") if has_text else []
            asked = [*before, *self.ids(question), *assistant]
            tail += [*asked, *answer, *end]
            loss += [0.0] * len(asked) + self._loss([*answer, *end], number=10.0, other=1.0)
        return head + user, tail, loss, has_text

    def row(self, stage: Stage) -> tuple[np.ndarray, ...]:
        """ids, positions, loss weight of each token as a target, filler flag; [length] each."""
        draw = self.draw
        count = int(draw.integers(1, stage.facts + 1)) if stage.questions else stage.facts
        keys = draw.choice(stage.keys, count, replace=False)
        needles = [Needle(KEYS[k], self._value()) for k in keys]
        head, tail, tail_loss, has_text = self._chat(stage, needles)
        if not has_text:  # filler after the chat makes the row as long as the others
            ids = np.array([*head, *tail, *self._fill(stage.length)])[: stage.length]
            loss = np.array(([0.0] * len(head) + tail_loss + [0.0] * stage.length)[: stage.length])
            return ids, np.arange(stage.length), loss, np.zeros(stage.length, dtype=bool)
        facts = [(needle, False) for needle in needles]
        again = [(needles[int(draw.integers(count))], True) for _ in range(stage.repeats)]
        draw.shuffle(facts)
        pieces = [(self._fact(needle, space=draw.random() < 0.8), known) for needle, known in facts + again]
        room = stage.length - len(head) - len(tail) - sum(len(piece) for piece, _ in pieces)
        if room < 0:
            raise ValueError(f"length: expected at least {stage.length - room} for these facts, got {stage.length}")
        cuts = np.sort(draw.integers(0, room + 1, len(pieces)))
        text = self._fill(room)
        ids, loss, is_filler, at = [*head], [0.0] * len(head), [False] * len(head), 0
        for cut, (piece, known) in zip([*cuts, room], [*pieces, ([], False)], strict=True):
            ids += [*text[at:cut], *piece]
            is_filler += [True] * (cut - at) + [False] * len(piece)
            loss += list(np.where(draw.random(cut - at) < 0.25, 0.2, 0.0))  # a quarter is enough, and cheaper
            loss += self._loss(piece, number=10.0, other=0.3) if known else [0.0] * len(piece)
            at = cut
        ids, loss, is_filler = ids + tail, loss + tail_loss, is_filler + [False] * len(tail)
        return np.array(ids), self._positions(np.array(is_filler), stage), np.array(loss), np.array(is_filler)

    def _positions(self, is_filler: np.ndarray, stage: Stage) -> np.ndarray:
        """Positions that go up by one, but for a few gaps in the filler."""
        length, draw = len(is_filler), self.draw
        slack = stage.span - length
        places = np.flatnonzero(is_filler)
        if slack <= 0 or len(places) == 0 or draw.random() < 0.1:
            return np.arange(length)
        slack = int(math.exp(draw.uniform(0, math.log(slack)))) if draw.random() < 0.6 else int(draw.integers(0, slack))
        gaps = draw.choice(places, min(len(places), int(draw.integers(1, 9))), replace=False)
        step = np.ones(length, dtype=np.int64)
        step[0] = 0
        step[gaps] += np.floor(draw.dirichlet(np.ones(len(gaps))) * slack).astype(np.int64)
        return np.cumsum(step)

    def batch(self, stage: Stage) -> dict[str, torch.Tensor]:
        """ids, positions, loss [batch, length]; bias [batch, 1, length, length]."""
        rows = [self.row(stage) for _ in range(stage.rows)]
        ids, positions, loss, is_filler = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        far = torch.ones(stage.length, stage.length).tril(-NEAR)
        weight = torch.from_numpy(self.draw.uniform(0, math.log(stage.weight) + 1e-9, len(rows))).float()
        weight[: len(rows) // 2] = math.log(stage.weight)
        bias = far * (weight[:, None, None] * is_filler[:, None, :])
        bias = bias.masked_fill(torch.ones(stage.length, stage.length, dtype=torch.bool).triu(1), -math.inf)
        return {"ids": ids, "positions": positions, "loss": loss.float(), "bias": bias[:, None]}
