"""Words for tasks that need many, without a download: those of the book that ships with the package, then coined ones."""

from __future__ import annotations

import functools
import random
import re

from .haystack import book

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@functools.cache
def book_words() -> tuple[str, ...]:
    """All words of 4 to 12 small letters in the book, sorted: some ten thousand."""
    return tuple(sorted(set(re.findall(r"(?<![A-Za-z'\u2019-])[a-z]{4,12}(?![A-Za-z'\u2019-])", book()))))


def draw_words(count: int, draw: random.Random) -> list[str]:
    """`count` different words: of the book as long as it has them, otherwise all of those and coined ones such as
    "bafomi"."""
    known = book_words()
    if count <= len(known):
        return draw.sample(known, count)
    found = dict.fromkeys(known)
    while len(found) < count:
        word = "".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(draw.randint(2, 5)))
        found[word] = None
    words = list(found)
    draw.shuffle(words)
    return words


def draw_pair(draw: random.Random) -> str:
    """Two words with a hyphen between, as RULER's adjectives and nouns."""
    known = book_words()
    return f"{draw.choice(known)}-{draw.choice(known)}"


def draw_letters(length: int, alphabet: str, count: int, draw: random.Random) -> list[str]:
    """`count` different strings of random letters.

    Raises:
        ValueError: there are not that many.
    """
    if count > len(alphabet) ** length:
        raise ValueError(f"count: expected at most {len(alphabet) ** length} strings, got {count}")
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(alphabet, k=length))] = None
    return list(found)
