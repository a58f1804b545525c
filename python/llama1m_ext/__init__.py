"""Exact attention for Llama in transformers, to 1,048,576 tokens. Importing this package is the whole integration.

The import patches transformers' Llama where it is loaded already, and otherwise when it gets loaded: it imports neither
transformers nor the compiled core itself. `disable()` undoes it, `LLAMA1M_DISABLE=1` keeps it from happening.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from . import patch as _patch
from .extension import Extension, extend
from .options import Options, options, set_options
from .patch import disable, enable, patch_model
from .plan import Plan, plan
from .plan_choice import DoesNotFit
from .remember import forget, remember
from .stats import Stats, stats

if TYPE_CHECKING:
    from . import cache, cuda, ops, ring, rope, saved
    from .cache import LongCache
    from .ring.membership import distributed

    __version__: str

__all__ = [
    "DoesNotFit",
    "Extension",
    "LongCache",
    "Options",
    "Plan",
    "Stats",
    "__version__",
    "cache",
    "cuda",
    "disable",
    "distributed",
    "enable",
    "extend",
    "forget",
    "ops",
    "options",
    "patch_model",
    "plan",
    "remember",
    "ring",
    "rope",
    "saved",
    "set_options",
    "stats",
]


def __getattr__(name: str) -> Any:
    # What imports torch, transformers or the core waits until it is asked for (PEP 562).
    if name in ("ops", "cache", "cuda", "data", "eval", "ring", "rope", "saved", "testing", "train"):
        return importlib.import_module(f"{__name__}.{name}")
    if name == "distributed":
        return importlib.import_module(f"{__name__}.ring.membership").distributed
    if name == "LongCache":
        return importlib.import_module(f"{__name__}.cache").LongCache
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("llama1m-ext")
    except metadata.PackageNotFoundError:  # run from the source tree
        from . import _core

        return _core.__version__


if os.environ.get("LLAMA1M_DISABLE", "").strip().lower() not in ("1", "true", "yes", "on"):
    _patch.enable()
