"""A long text as tokens, from any place on, and where its sentences end."""

from __future__ import annotations

import functools
import random
import re
from typing import Any

import numpy as np

from llama1m_ext.demo.book import load_book

SEAM = 32
"""Tokens at a cut that may be others than in the whole text, and are not used."""
_CLOSING = "[.!?][\"'\u201d\u2019)\\]]*"
_END = re.compile(_CLOSING + r"\s*$")
BREAK = re.compile(r"(?<!Mr)(?<!Mrs)(?<!Dr)(?<!St)" + _CLOSING + r"\s+(?=\S)")
"""The end of a sentence, and the white space to the next one."""
_TITLES = frozenset("mr mrs ms dr st messrs".split())


@functools.cache
def book() -> str:
    """The book that ships with the package, unpacked once."""
    return load_book()


class Haystack:
    """Real text to hide needles in.

    Args:
        text: None: the book that ships with the package.
        tokenizer: of transformers.
        repeat: a text that is too short begins again; without it, that is an error.
        name: what errors call the text.

    Raises:
        ValueError: no text but white space.
    """

    def __init__(self, text: str | None, tokenizer: Any, *, repeat: bool = False, name: str = "hay") -> None:
        self.text = book() if text is None else text.strip()
        if not self.text.strip():
            raise ValueError(f"{name}: expected some text, got none")
        self.tokenizer, self.repeat, self.name = tokenizer, repeat, name
        self._start, self._ids, self._whole = -1, np.empty(0, dtype=np.int64), False
        self._ends: dict[int, tuple[bool, bool]] = {}

    def place(self, draw: random.Random) -> int:
        """Where to begin reading: the beginning of a sentence, as a character's number."""
        found = BREAK.search(self.text, draw.randrange(len(self.text)))
        return found.end() if found else 0

    def tokens(self, count: int, start: int = 0) -> np.ndarray:
        """`count` tokens of the text from character `start` on, int64; where the text ends it goes on from its beginning,
        once around.

        Raises:
            ValueError: the text has fewer tokens, and is not to be repeated.
        """
        if self._start != start:
            self._start, self._ids, self._whole = start, np.empty(0, dtype=np.int64), False
        chars = 5 * count + 400
        while len(self._ids) < count and not self._whole:
            around = self.text if start == 0 else f"{self.text[start:]}\n\n{self.text[:start]}"
            part = around[:chars].rstrip()
            found = np.asarray(self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
            self._whole = chars >= len(around)
            self._ids = found if self._whole else found[:-SEAM]
            chars = max(2 * chars, chars * (count + 2 * SEAM) // max(1, len(self._ids)))
        if len(self._ids) < count:
            if not self.repeat or not len(self._ids):
                raise ValueError(
                    f"{self.name}: expected a text of at least {count} tokens, got one of {len(self._ids)}; repeat=True (--repeat) reads "
                    "it again where it ends"
                )
            return np.resize(self._ids, count)
        return self._ids[:count]

    def sentence_ends(self, ids: np.ndarray) -> np.ndarray:
        """The places between tokens, 1 to `len(ids) - 1`, at which a sentence ends: int64, growing."""
        unique, back = np.unique(ids, return_inverse=True)
        for token in unique.tolist():
            if token not in self._ends:
                word = self.tokenizer.decode([token])
                self._ends[token] = bool(_END.search(word)), word.strip().lower() in _TITLES
        ends = np.array([self._ends[token][0] for token in unique.tolist()], dtype=bool)[back]
        title = np.array([self._ends[token][1] for token in unique.tolist()], dtype=bool)[back]
        ends[1:] &= ~title[:-1]
        return np.flatnonzero(ends[:-1]) + 1


def cut_at(ends: np.ndarray, length: int, depth: float) -> int:
    """Where a needle goes that is to be `depth` of the way into `length` tokens: 0, the end, or the last end of a sentence
    that is not beyond; where there is none, the place itself.

    Args:
        ends: of `Haystack.sentence_ends`.
    """
    place = round(depth * length)
    if place == 0 or place == length:
        return place
    before = int(np.searchsorted(ends, place, side="right"))
    return int(ends[before - 1]) if before else place


def insert(hay: np.ndarray, pieces: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """The hay with pieces at places of it; those at one place in the order given."""
    parts, at = [], 0
    for place, piece in sorted(pieces, key=lambda pair: pair[0]):
        parts += [hay[at:place], piece]
        at = place
    return np.concatenate([*parts, hay[at:]])
