"""Kinds of needles: what is hidden, what is asked, and what has to be answered."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass

from llama1m_ext.demo.needle import KEYS


@dataclass(frozen=True)
class Kind:
    """Texts with `{key}` and `{value}` in them.

    Attributes:
        name: of the kind.
        text: what is put into the hay, white space around it included.
        question: what the user asks after the document.
        lead: how the answer begins; the model is given it where answers are judged by their most probable tokens.
        answer: what it has to go on with: the value.
        keys: "city" (133 of them, each one word), or "uuid".
        digits: of the value.
        distractors: more needles of this kind, which nobody asks for.
    """

    name: str
    text: str
    question: str
    lead: str
    answer: str = " {value}"
    keys: str = "city"
    digits: int = 6
    distractors: int = 0


KINDS = {
    kind.name: kind
    for kind in (
        # The pass key of Mohtashami and Jaggi (arXiv 2305.16300), with a name, so that several fit into one document.
        Kind(
            "passkey",
            "\nThe pass key of {key} is {value}. Remember it: {value} is the pass key of {key}.\n",
            "What is the pass key of {key}?",
            "The pass key of {key} is",
            digits=5,
        ),
        # Pairs as in Lost in the Middle (arXiv 2307.03172), between real text.
        Kind(
            "kv",
            '\n"{key}": "{value}"\n',
            'The text has lines of JSON with keys and values. What is the value of "{key}"?',
            '"{key}": "',
            "{value}",
            keys="uuid",
            digits=7,
            distractors=8,
        ),
        # Those of the demo model, which was trained on them; likewise EasyContext's and RULER's.
        Kind(
            "sentence",
            " The special magic number for {key} is {value}.",
            "What is the special magic number for {key}?",
            "The special magic number for {key} is",
        ),
    )
}


@dataclass(frozen=True)
class Needle:
    """A kind with a key and a value put in."""

    kind: Kind
    key: str
    value: str

    def _fill(self, text: str) -> str:
        return text.replace("{key}", self.key).replace("{value}", self.value)

    @property
    def text(self) -> str:
        """What is hidden."""
        return self._fill(self.kind.text)

    @property
    def question(self) -> str:
        """What is asked."""
        return self._fill(self.kind.question)

    @property
    def lead(self) -> str:
        """How the answer begins."""
        return self._fill(self.kind.lead)

    @property
    def answer(self) -> str:
        """How it goes on."""
        return self._fill(self.kind.answer)


def kind_of(kind: str | Kind) -> Kind:
    """A kind by its name.

    Raises:
        ValueError: there is no such kind, or one that asks for no value.
    """
    if isinstance(kind, Kind):
        if "{value}" not in kind.text or "{value}" not in kind.answer:
            raise ValueError(f"kind: expected {{value}} in text and answer, got {kind.text!r} and {kind.answer!r}")
        if kind.keys not in ("city", "uuid") or kind.digits < 1 or kind.distractors < 0:
            raise ValueError(
                f'kind: expected keys "city" or "uuid", digits from 1 on, distractors from 0 on, got {kind}'
            )
        return kind
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind]


def draw_needles(kind: Kind, count: int, draw: random.Random) -> list[Needle]:
    """`count` needles with keys and values of their own.

    Raises:
        ValueError: more than there are keys.
    """
    if kind.keys == "city":
        if count > len(KEYS):
            raise ValueError(
                f"depths: expected at most {len(KEYS)} needles of this kind in one document, got {count}; "
                'mode="alone" puts one in each'
            )
        keys = draw.sample(KEYS, count)
    else:
        keys = [str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(count)]
    low = 10 ** (kind.digits - 1) if kind.digits > 1 else 0
    if count > 10**kind.digits - low:
        raise ValueError(f"kind: expected digits for {count} different values, got {kind.digits}")
    values: dict[str, None] = {}
    while len(values) < count:
        values[str(draw.randrange(low, 10**kind.digits))] = None
    return [Needle(kind, key, value) for key, value in zip(keys, values, strict=True)]
