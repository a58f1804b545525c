"""A model and what it has read: prompts that begin alike are read once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llama1m_ext import _compat, families, set_options
from llama1m_ext.call import MARK
from llama1m_ext.options import options
from llama1m_ext.progress import AUTO_TOKENS

Show = bool | Literal["auto"]
WORTH_KEEPING = 64
"""A common beginning shorter than this is read again."""


def served(model: Any) -> tuple[Any, Any] | None:
    """The decoder and the output layer of a causal language model that this package serves, or None.

    Only where `lm_head(decoder(ids))` is all that the model's own forward computes: PEFT's layers are inside, its prompts
    are not.
    """
    base = model
    if hasattr(base, "peft_config") and hasattr(base, "get_base_model"):
        if getattr(getattr(base, "active_peft_config", None), "is_prompt_learning", True):
            return None
        base = base.get_base_model()
    inner, head = getattr(base, "model", None), getattr(base, "lm_head", None)
    if inner is None or head is None or not families.is_model(inner) or not hasattr(type(base).forward, MARK):
        return None
    if getattr(base, "_forward_hooks", None) or getattr(base, "_forward_pre_hooks", None):
        return None
    return inner, head


def bar(name: str, unit: str, progress: Show, tokens: int, total: int, done: int = 0) -> Any:
    """A bar over `total` units, of which some are done; in "auto" where there are so many tokens to read that it takes
    more than moments."""
    from tqdm.auto import tqdm

    show = tokens >= AUTO_TOKENS if progress == "auto" else progress
    return tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True, disable=not show)


@contextmanager
def evaluating(model: nn.Module, progress: Show = "auto") -> Iterator[None]:
    """No gradients, no dropout, and a prefill's bar as asked for; afterwards the model is as it was.

    Args:
        progress: "auto" leaves the model's own option alone.
    """
    training = [module for module in model.modules() if module.training]
    found = served(model)
    shown = None if found is None or progress == "auto" else options(found[0]).progress
    model.eval()
    try:
        if shown is not None and found is not None:
            set_options(found[0], progress=progress)
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
        if shown is not None and found is not None:
            set_options(found[0], progress=shown)


def warn_beyond(model: Any, longest: int) -> None:
    """Says once for a call that the model was not made for so long an input. What comes of it is the question asked."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        warnings.warn(
            f"length: {longest} tokens are more than the model's max_position_embeddings={most}; measured all the same",
            stacklevel=3,
        )


def new_cache(model: Any) -> Any:
    """An empty cache that the model takes: one that keeps every token and can be cut, where this package serves it."""
    if served(model) is not None:
        from llama1m_ext.cache import LongCache

        return LongCache()
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def call(model: Any, ids: Tensor, cache: Any, last: int = 0) -> Tensor:
    """Logits `[batch, n or last, vocab]` of ids `[batch, n]`, which go on from what is in the cache.

    Args:
        last: only those of the last so many positions; 0: all.
    """
    names = inspect.signature(model.forward).parameters
    given = {_compat.cache_name(): cache}
    whole = not last or ("logits_to_keep" not in names and not hasattr(model, "peft_config"))
    if not whole:
        given["logits_to_keep"] = last
    logits: Tensor = model(ids, use_cache=True, **given).logits
    return logits[:, -last:] if last else logits


class Reader:
    """Reads prompts one after the other. Of each, what it has in common with the one before is not read again.

    Args:
        model: a causal language model of transformers, in evaluation mode; see `evaluating`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.computed = 0
        """Tokens that went through the model."""
        self._ids = np.empty(0, dtype=np.int64)
        self._cache: Any = None

    def logits(self, ids: Sequence[int] | np.ndarray, last: int = 1) -> Tensor:
        """Logits of the last `last` tokens of a prompt, float32 `[last, vocab]` (float64 of a float64 model)."""
        wanted = np.asarray(ids, dtype=np.int64)
        if not 1 <= last <= len(wanted):
            raise ValueError(f"last: expected 1 to {len(wanted)}, the tokens of the prompt, got {last}")
        kept = self._keep(wanted, len(wanted) - last)
        try:
            if self._cache is None:
                self._cache = new_cache(self.model)
            turn = torch.from_numpy(wanted[None, kept:]).to(self.model.device)
            found = call(self.model, turn, self._cache, last)[0]
        except BaseException:
            self.forget()
            raise
        self._ids = wanted
        self.computed += len(wanted) - kept
        return found if found.dtype == torch.float64 else found.float()

    def greedy(self, ids: Sequence[int] | np.ndarray, limit: int, stop: frozenset[int] = frozenset()) -> list[int]:
        """The most probable continuation, token by token, at most `limit` of them; ends before a token of `stop`."""
        said: list[int] = []
        prompt = np.asarray(ids, dtype=np.int64)
        while len(said) < limit:
            token = int(self.logits(prompt).argmax(-1))
            if token in stop:
                break
            said.append(token)
            prompt = np.append(prompt, token)
        return said

    def forget(self) -> None:
        """Begins anew: the cache's memory is given back."""
        self._ids, self._cache = np.empty(0, dtype=np.int64), None

    def _keep(self, wanted: np.ndarray, most: int) -> int:
        """Cuts the cache to what it has in common with a prompt, at most so many tokens, and says how many these are."""
        n = min(len(self._ids), most)
        other = np.flatnonzero(self._ids[:n] != wanted[:n])
        kept = int(other[0]) if len(other) else n
        if kept < max(WORTH_KEEPING, len(wanted) // 16):
            self.forget()
            return 0
        if kept < len(self._ids):
            try:
                self._cache.crop(kept - len(self._ids))
            except (RuntimeError, ValueError):  # a sliding window has forgotten what would be needed
                self.forget()
                return 0
        return kept
