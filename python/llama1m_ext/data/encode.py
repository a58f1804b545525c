"""Text to tokens, and what stands between documents."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

AUTO, NONE = "auto", "none"


class Encoder:
    """Tokens of texts, with nothing added: what looks like a special token in a text is text.

    It can be pickled, and one made of a fast tokenizer needs neither torch nor transformers where it is unpickled.

    Args:
        tokenizer: transformers', fast or not. It is left as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
        self._fast: str | None = None if backend is None else backend.to_str()
        self._slow: bytes | None = pickle.dumps(tokenizer) if self._fast is None else None
        self._made: Any = None

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text an int32 array `[tokens]`."""
        if self._made is None:
            self._made = self._make()
        if self._fast is not None:
            encoded = self._made.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(one.ids, dtype=np.int32) for one in encoded]
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [np.array(self._made(text, **options)["input_ids"], dtype=np.int32) for text in texts]

    def digest(self) -> str:
        """Tells it from another one."""
        whole = self._fast.encode() if self._fast is not None else self._slow
        assert whole is not None
        return hashlib.blake2b(whole, digest_size=8).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"_fast": self._fast, "_slow": self._slow, "_made": None}

    def _make(self) -> Any:
        if self._slow is not None:
            return pickle.loads(self._slow)
        from tokenizers import Tokenizer

        assert self._fast is not None
        made = Tokenizer.from_str(self._fast)
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True
        return made


def load(tokenizer: Any) -> Any:
    """transformers' tokenizer of this name, or the one given.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(tokenizer))
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"tokenizer: expected a folder or a name that has one, got {tokenizer!r}: {first}") from None


def borders(tokenizer: Any, separator: str) -> tuple[list[int], list[int]]:
    """What stands before and after each document.

    Args:
        separator: "auto": the tokenizer's BOS, if it has one, and its EOS; "none": nothing; any other text: after each
            document its tokens, in which special tokens are such.

    Raises:
        ValueError: "auto" and no EOS, or a text without tokens.
    """
    if separator == NONE:
        return [], []
    if separator == AUTO:
        bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
        if not isinstance(eos, int):
            raise ValueError(f"tokenizer: expected one with an EOS token, got {eos}; or give a separator of your own")
        return ([bos] if isinstance(bos, int) else []), [eos]
    ids = list(tokenizer(separator, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"separator: expected a text with tokens, got {separator!r}")
    return [], ids
