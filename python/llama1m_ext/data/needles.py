"""Facts hidden in rows of real text, and asked for at their ends: what a long row would not teach by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .shards import segment
from .statistics import NEEDLES as SOURCE

_FACT = "\nNote: the access code of {key} is {value}.\n"
_QUESTION = "\nQuestion: what is the access code of {key}?\nAnswer: {value}\n"
"""Not the words of `llama1m needle`, so that what that measures was not learned by heart."""


class Needles:
    """Which rows get needles, and which ones: by the seed and the row's number alone.

    Args:
        encode: texts to int32 arrays `[tokens]`.
        share: of rows that get some.
        count: facts in a row, all of them asked for, in another order.
        seed: of all that.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], list[np.ndarray]], share: float, count: int, seed: int
    ) -> None:
        self._encode, self.share, self.count, self.seed = encode, share, count, seed

    def tokens(self, rows: int) -> int:
        """That they take in so many rows."""
        return sum(hidden.tokens for hidden in map(self.of, range(rows)) if hidden is not None)

    def of(self, row: int) -> Hidden | None:
        """What is hidden in this row, if anything."""
        rng = random.Random(f"needles {self.seed} {row}")
        if rng.random() >= self.share:
            return None
        facts = [(_name(rng), f"{rng.randrange(10**6, 10**7)}") for _ in range(self.count)]
        asked = rng.sample(facts, len(facts))
        texts = [_FACT.format(key=key, value=value) for key, value in facts]
        questions = "".join(_QUESTION.format(key=key, value=value) for key, value in asked)
        *made, last = self._encode([*texts, questions])
        return Hidden(made, last, rng, f"needles:{row}")


class Hidden:
    """Facts for one row, and its end.

    Attributes:
        tokens: that they take together.
    """

    def __init__(self, facts: list[np.ndarray], end: np.ndarray, rng: random.Random, name: str) -> None:
        self._facts, self._end, self._rng, self._name = facts, end, rng, name
        self.tokens = sum(map(len, facts)) + len(end)

    def into(self, ids: np.ndarray, segments: list[dict[str, Any]]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """The row with facts at random places and questions at its end.

        Args:
            ids: int32 `[length - tokens]`.
            segments: of these.

        Returns:
            int32 `[length]`, and its segments: those of documents are divided where a fact stands.
        """
        places = sorted(self._rng.randrange(len(ids) + 1) for _ in self._facts)
        parts: list[np.ndarray] = []
        made: list[dict[str, Any]] = []
        at = written = said = 0

        def put(piece: np.ndarray, source: str, document: str, offset: int) -> None:
            nonlocal at
            if len(piece):
                parts.append(piece)
                made.append(segment(source, document, at, at + len(piece), offset))
                at += len(piece)

        coming = list(zip(places, self._facts, strict=True))
        for one in segments:
            while coming and coming[0][0] < one["end"]:
                place, fact = coming.pop(0)
                start = max(written, one["start"])
                put(ids[start:place], one["source"], one["document"], one["offset"] + start - one["start"])
                put(fact, SOURCE, self._name, said)
                written, said = place, said + len(fact)
            start = max(written, one["start"])
            put(ids[start : one["end"]], one["source"], one["document"], one["offset"] + start - one["start"])
            written = one["end"]
        for fact in [*(fact for _, fact in coming), self._end]:
            put(fact, SOURCE, self._name, said)
            said += len(fact)
        return np.concatenate(parts), made


def _name(rng: random.Random) -> str:
    """Two words that nobody has."""
    return " ".join(
        "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))).capitalize()
        for _ in range(2)
    )
