"""The needle: a sentence with a number in it, the question for it, and the place in the text where it is hidden."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

KEYS = tuple(
    """Lisbon Madrid Vienna Berlin Prague Warsaw Budapest Bucharest Sofia Athens Rome Milan Naples Turin Venice Geneva Zurich
    Munich Hamburg Cologne Stuttgart Dresden Leipzig Brussels Antwerp Amsterdam Rotterdam Utrecht Copenhagen Oslo Bergen
    Stockholm Uppsala Helsinki Tampere Riga Tallinn Vilnius Minsk Kiev Odessa Moscow Kazan Istanbul Ankara Izmir Cairo Tunis
    Algiers Rabat Casablanca Dakar Accra Lagos Abuja Nairobi Kampala Kigali Lusaka Harare Maputo Durban Pretoria Windhoek
    Luanda Jerusalem Beirut Damascus Amman Baghdad Tehran Shiraz Kabul Karachi Lahore Delhi Mumbai Chennai Kolkata Dhaka
    Colombo Kathmandu Bangkok Hanoi Saigon Manila Jakarta Singapore Seoul Busan Tokyo Osaka Kyoto Nagoya Sapporo Beijing
    Shanghai Nanjing Wuhan Chengdu Taipei Sydney Melbourne Perth Brisbane Adelaide Auckland Wellington Toronto Montreal
    Vancouver Ottawa Boston Chicago Seattle Denver Dallas Houston Phoenix Detroit Atlanta Miami Havana Kingston Bogota Lima
    Quito Caracas Santiago Montevideo Brasilia Recife Asuncion""".split()
)
"""The keys that the demo model was trained on: 133 cities, each of them one token."""

SYSTEM = "You are a helpful assistant."
_SENTENCE_END = re.compile(r"[.!?][\"')]*\s+")


@dataclass(frozen=True)
class Needle:
    """A key and the six-digit value that belongs to it."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What is hidden in the text, and what the model is to answer."""
        return f"The special magic number for {self.key} is {self.value}."

    @property
    def question(self) -> str:
        """What the user asks at the end of the text."""
        return f"What is the special magic number for {self.key}?"


def draw_needles(seed: int, count: int) -> list[Needle]:
    """`count` needles with different keys and random values. The same seed gives the same needles."""
    if not 1 <= count <= len(KEYS):
        raise ValueError(f"count: expected 1 to {len(KEYS)}, got {count}")
    draw = random.Random(seed)
    return [Needle(key, f"{draw.randrange(10**6):06d}") for key in draw.sample(KEYS, count)]


def hide(text: str, needle: Needle, depth: float) -> str:
    """`text` with the needle's sentence put in between two sentences, `depth` (0 to 1) of the way in."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: expected 0 to 1, got {depth}")
    if depth == 0:
        return f"{needle.sentence} {text}"
    if depth == 1:
        return f"{text} {needle.sentence}"
    target = int(depth * len(text))
    found = _SENTENCE_END.search(text, target)
    place = found.end() if found else next((i for i in range(target, len(text)) if text[i].isspace()), len(text))
    return f"{text[:place]}{needle.sentence} {text[place:]}"


def messages(text: str, needle: Needle) -> list[dict[str, str]]:
    """The chat that asks for the needle's value after the whole text."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{text}\n\n{needle.question}"},
    ]


def find_value(answer: str) -> str | None:
    """The six-digit number in the answer, None when there is none or more than one."""
    found = set(re.findall(r"(?<!\d)\d{6}(?!\d)", answer))
    return found.pop() if len(found) == 1 else None
