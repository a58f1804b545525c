"""Long sequences for training: made from documents (`build`), written from rows (`write`), and read (`open`).

    from llama1m_ext import data

    data.build(["slimpajama/train"], "rows-65536", tokenizer="NAME", length=65536, tokens=62_914_560, mixture="slimpajama")
    rows = data.open("rows-65536")       # len(rows), rows[0]["input_ids"]

The folder is one of `datasets` (`datasets.load_from_disk`): Arrow files that are mapped, not loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builder import Built, Shortfall, build
    from .mixture import SLIMPAJAMA
    from .rows import Rows, collate, open
    from .shards import write

__all__ = ["SLIMPAJAMA", "Built", "Rows", "Shortfall", "build", "collate", "open", "write"]
_HOME = {
    "Built": "builder",
    "Rows": "rows",
    "SLIMPAJAMA": "mixture",
    "Shortfall": "builder",
    "build": "builder",
    "collate": "rows",
    "open": "rows",
    "write": "shards",
}


def __getattr__(name: str) -> Any:
    # Processes that only tokenise import neither torch nor Arrow (PEP 562).
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
