"""How an answer is scored: as RULER does it (arXiv 2404.06654), by strings that are in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(answer: str) -> str:
    """Without control characters and white space around it."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def match_all(answer: str, expected: Sequence[str]) -> float:
    """The share of the expected strings that are in the answer, small letters or capital: 0 to 1."""
    said = cleaned(answer).lower()
    return sum(one.lower() in said for one in expected) / len(expected)


def match_any(answer: str, expected: Sequence[str]) -> float:
    """1 where one of the expected strings is in the answer, otherwise 0."""
    said = cleaned(answer).lower()
    return float(any(one.lower() in said for one in expected))
