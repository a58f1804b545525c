"""Builds a chat prompt of a wanted number of tokens from a long text with a needle in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .needle import Needle, hide, messages

MIN_TOKENS = 256


@dataclass(frozen=True)
class Prompt:
    """What the pipeline is given, and how it came about."""

    chat: list[dict[str, str]]
    tokens: int  # as the pipeline counts them: both begin-of-text tokens are in
    times_through: float  # how often the text is read: over 1 it was too short and began again


def build_prompt(tokenizer: Any, text: str, needle: Needle, depth: float, tokens: int) -> Prompt:
    """The longest prompt of at most `tokens` tokens (a few short of it), the needle `depth` of the way into the text.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        text: taken from its beginning; where it is too short it begins again.
        needle: what to hide.
        depth: 0 is the beginning of the text, 1 its end.
        tokens: at least 256.
    """
    if tokens < MIN_TOKENS:
        raise ValueError(f"tokens: expected at least {MIN_TOKENS}, got {tokens}")

    def count(body: str) -> tuple[list[dict[str, str]], int]:
        chat = messages(body, needle)
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return chat, len(tokenizer(rendered)["input_ids"])

    room = tokens - count(hide("", needle, 0.0))[1]
    chars = _chars_of(tokenizer, text, room)
    for _ in range(16):
        body = _spread(text, chars)
        chat, used = count(hide(body, needle, depth))
        if used <= tokens:
            return Prompt(chat=chat, tokens=used, times_through=chars / len(text))
        chars -= 8 * (used - tokens)  # the cut and the needle's neighbours were tokenised differently
    raise ValueError(f"tokens: found no part of the text that fits {tokens} tokens")


def _spread(text: str, chars: int) -> str:
    """The first `chars` characters of the text, which begins again where it ends."""
    whole, rest = divmod(chars, len(text))
    return text * whole + text[:rest]


def _chars_of(tokenizer: Any, text: str, room: int) -> int:
    """How many characters make `room` tokens."""
    chars = 4 * room
    while True:
        offsets = tokenizer(_spread(text, chars), add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        if len(offsets) >= room:
            return offsets[room - 1][1]
        chars = chars * room // len(offsets) + 64
