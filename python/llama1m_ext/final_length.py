"""How long a cache will be when `generate()` is done, for the plan of the calls on the way there."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any


class _Run:
    """A `generate()` that is running.

    Attributes:
        owner: whose it is.
        tokens: that its cache will have in each row; None: not known yet, or never.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.tokens: int | None = None


_run: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("llama1m_final_length", default=None)
"""Of this thread or task: that of an assistant lies over that of the model that it helps."""


@contextlib.contextmanager
def generating(owner: Any) -> Iterator[None]:
    """While it lasts, a model generates.

    Args:
        owner: the `LlamaForCausalLM`.
    """
    token = _run.set(_Run(owner))
    try:
        yield
    finally:
        _run.reset(token)


def note(owner: Any, tokens: int) -> None:
    """The `generate()` of this model will not make its cache longer than so many tokens."""
    run = _run.get()
    if run is not None and run.owner is owner:
        run.tokens = tokens


def of(inner: Any) -> int | None:
    """Tokens that the cache of a `LlamaModel` will have at most, in each row; None: nobody says, or it doesn't generate."""
    run = _run.get()
    return run.tokens if run is not None and getattr(run.owner, "model", None) is inner else None
