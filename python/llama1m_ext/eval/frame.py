"""What stands around a long document in a prompt: the chat template's words, or nothing but the beginning of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Chat = bool | Literal["auto"]
_HERE = "THE DOCUMENT IS HERE"
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True)
class Frame:
    """A prompt is `before`, the document, the question, and `after`; then comes the answer.

    Attributes:
        before: text up to the document.
        after: text from the end of the question to the answer.
        bos: ids that come first, where the tokenizer adds some and the text has none.
        chat: whether this is the chat template's.
    """

    tokenizer: Any
    before: str
    after: str
    bos: tuple[int, ...]
    chat: bool

    def encode(self, text: str) -> np.ndarray:
        """Ids of a part of a prompt, int64; special tokens are understood, none are added."""
        return np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    @property
    def head(self) -> np.ndarray:
        """The ids before the document."""
        return np.concatenate([np.asarray(self.bos, dtype=np.int64), self.encode(self.before)])


def frame_for(
    tokenizer: Any, chat: Chat = "auto", system: str | None = None, examples: Sequence[tuple[str, str]] = ()
) -> Frame:
    """The frame that a tokenizer's chat template makes, or a plain one.

    Args:
        chat: use the template; "auto": where there is one.
        system: the system message; None: none of ours.
        examples: earlier questions and their answers, as turns of the chat, or one after the other without one.

    Raises:
        ValueError: a chat was asked for, and there is no template; or the template changes what it is given.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat is True and not has:
        raise ValueError("chat: expected a tokenizer with a chat template, got one without")
    bos = first_ids(tokenizer)
    if chat is False or not has:
        before = "" if system is None else f"{system}\n\n"
        before += "".join(f"{question}{answer}\n" for question, answer in examples)
        return Frame(tokenizer, before, "\n", bos, False)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": _HERE})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    before, found, after = text.partition(_HERE)
    if not found or _HERE in after:
        raise ValueError(f"chat: expected a template that keeps the user's message as it is, got {text!r:.300}")
    if before and bos and list(tokenizer(before, add_special_tokens=False)["input_ids"][: len(bos)]) == list(bos):
        bos = ()
    return Frame(tokenizer, before, after, bos, True)


def stops(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: those of the generation config, of the tokenizer, and of usual chat templates."""
    found: set[int] = set()
    for one in (getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer.eos_token_id):
        found.update(one if isinstance(one, (list, tuple)) else [] if one is None else [one])
    vocabulary = tokenizer.get_vocab()
    found.update(vocabulary[word] for word in _ENDS_OF_TURN if word in vocabulary)
    return frozenset(found)


def first_ids(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before every text: the id of the beginning of text, or nothing."""
    first, ids = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
    return (first,) if first is not None and ids[:1] == [first] else ()
