"""Counts of what was served and what was not: the way to see whether the patch does anything for a model."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .options import llama_models

ATTRIBUTE = "_llama1m_stats"
_SUMS = ("served", "layer_major", "computed", "reused")
_lock = threading.Lock()


@dataclass(frozen=True)
class Stats:
    """Calls of a model's attention layers so far.

    Attributes:
        served: attention calls that our kernel computed (a chunk of a layer-major prefill is one call).
        stock: attention calls that transformers' own code computed, by the reason why.
        layer_major: prefills that ran one layer after the other.
        computed: tokens that went through the model on our path, of all batch rows.
        reused: tokens whose keys and values were taken from a prompt that was remembered.
    """

    served: int = 0
    stock: dict[str, int] = field(default_factory=dict)
    layer_major: int = 0
    computed: int = 0
    reused: int = 0


def stats(model: Any, *, reset: bool = False) -> Stats:
    """What our path served of a model's attention calls, and why the rest took the stock path.

    Calls inside `torch.compile` are not counted: a counter there would make every call a recompilation.

    Args:
        model: a Llama of transformers, or something that holds one.
        reset: start again from zero after reading.
    """
    total, stock = dict.fromkeys(_SUMS, 0), dict[str, int]()
    with _lock:
        for inner in llama_models(model):
            counts = inner.__dict__.get(ATTRIBUTE)
            if counts is None:
                continue
            for name in _SUMS:
                total[name] += counts.get(name, 0)
            for reason, n in counts["stock"].items():
                stock[reason] = stock.get(reason, 0) + n
            if reset:
                inner.__dict__[ATTRIBUTE] = _fresh(counts.get("warned", ()))
    return Stats(stock=stock, **total)


def count(llama_model: Any, *, stock: str | None = None, calls: int = 0, **more: int) -> bool:
    """Adds to a model's counts. True if its stock path was never taken for this reason.

    Args:
        stock, calls: a reason, and how many attention calls took the stock path for it.
        more: what to add to the other counts of `Stats`, by name.
    """
    with _lock:
        # Builtins on the model: they are copied and pickled with it, and need no package to be loaded.
        counts = llama_model.__dict__.setdefault(ATTRIBUTE, _fresh())
        for name, n in more.items():
            counts[name] = counts.get(name, 0) + n
        if stock is None:
            return False
        counts["stock"][stock] = counts["stock"].get(stock, 0) + calls
        warned = counts.setdefault("warned", [])
        if stock in warned:
            return False
        warned.append(stock)
        return True


def _fresh(warned: Iterable[str] = ()) -> dict[str, Any]:
    """Nothing counted. warned: reasons for the stock path that were told before, which `reset` does not forget."""
    return {**dict.fromkeys(_SUMS, 0), "stock": {}, "warned": list(warned)}
