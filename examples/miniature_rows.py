"""Rows of the miniature: facts hidden in the book, questions about them, plain text; positions without gaps, one filler token
counts as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from demo_rows import Rows, Stage
from torch import Tensor

FIRST_LENGTH = 512
"""The length that the miniature is first trained at."""


def task(length: int, facts: int, repeats: int, questions: int, rows: int = 1, keys: int = 133) -> Stage:
    """A kind of row of the demo's, without what would already reach beyond its length."""
    return Stage(
        length=length,
        facts=facts,
        keys=keys,
        repeats=repeats,
        questions=questions,
        span=length,  # positions 0, 1, 2, ...
        weight=1,  # no filler token stands for several
        rows=rows,
        lr=2e-3,
    )


FIRST = [
    task(96, facts=3, repeats=5, questions=0, rows=21, keys=8),
    task(128, facts=4, repeats=5, questions=0, rows=16),
    task(160, facts=3, repeats=2, questions=2, rows=12),
    task(256, facts=4, repeats=2, questions=3, rows=8),
    task(FIRST_LENGTH, facts=6, repeats=1, questions=5, rows=4),
]
"""The curriculum of the first training, easy ones first."""
SHARP = task(FIRST_LENGTH, facts=16, repeats=4, questions=6, rows=4)
"""What ends the first training: more facts to confuse."""
TEXT_EVERY = 4
"""Of the rows of a longer stage every fourth is text alone."""
TEXT_WEIGHT = 0.2
"""Of a token of such a row as a target; with it, a row of text weighs about as much as one with questions."""


class MiniatureRows(Rows):
    """Draws rows. All randomness comes from the seed."""

    def text(self, length: int) -> np.ndarray:
        """Tokens of the book as it is, int64 `[length]`."""
        start = int(self.draw.integers(0, len(self.filler) - length))
        return self.filler[start : start + length]

    def first_batch(self, kind: Stage, texts: int) -> tuple[Tensor, Tensor]:
        """ids int64 and loss weights float32, `[kind.rows + texts, kind.length]` each; the last `texts` rows are text alone."""
        rows = [self.row(kind) for _ in range(kind.rows)]
        ids = [ids for ids, _, _, _ in rows] + [self.text(kind.length) for _ in range(texts)]
        weights = [weight for _, _, weight, _ in rows] + [np.ones(kind.length)] * texts
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(weights)).float()

    def long_rows(self, length: int, count: int) -> Iterator[dict[str, Any]]:
        """`count` rows of a longer stage, for `llama1m_ext.data.write`: up to a fact in 128 tokens and no more than 128, half as
        many of them a second time, and half as many questions at the end."""
        facts = min(128, max(2, length // 128))
        kind = task(length, facts=facts, repeats=facts // 2, questions=min(64, max(1, facts // 2)))
        for i in range(count):
            if i % TEXT_EVERY == TEXT_EVERY - 1:
                ids, weight = self.text(length), np.full(length, TEXT_WEIGHT)
            else:
                ids, _, weight, _ = self.row(kind)
            yield {"input_ids": ids, "loss_weights": weight}
