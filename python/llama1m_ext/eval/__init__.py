"""Does a long context work? Perplexity by position, needles in a haystack, RULER's synthetic tasks.

Nothing heavy is imported before it is asked for: `eval.ppl`, `eval.needle` and `eval.ruler` are modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import needle, ppl, ruler

__all__ = ["needle", "ppl", "ruler"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
