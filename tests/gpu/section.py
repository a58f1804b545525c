"""A section: one question to the card, answered in a process of its own, row by row, so that a kill loses only what comes after."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """What is run, how long it may take, and for what it is worth."""

    name: str
    title: str
    seconds: int  # its limit
    run: Callable[[Any, Report], None]  # (machine, report)
    dry: bool = True  # has something to do without a GPU
    quick: bool = True  # belongs to --quick


class Report:
    """What a section has found. Each row is in the file before the next is measured."""

    def __init__(self, file: Path, section: str):
        self.file = file
        self.section = section
        self.failed = 0
        self.passed = 0
        if file.exists() and file.read_bytes()[-1:] not in (b"\n", b""):
            with file.open("a", encoding="utf-8") as open_file:
                open_file.write("\n")  # after a line that a kill cut short

    def table(self, name: str, /, **columns: Any) -> None:
        """A row of a table; tables are told by their name."""
        self._write("row", table=name, columns=columns)
        print(f"  {name}: " + "  ".join(f"{key} {shown(value)}" for key, value in columns.items()), flush=True)

    def check(self, name: str, good: bool, detail: str) -> None:
        """A verdict. Those that fail are shown one by one, the others are counted."""
        good = bool(good)
        self.passed += good
        self.failed += not good
        self._write("check", name=name, good=good, detail=detail)
        if not good:
            print(f"  FAILED {name}: {detail}", flush=True)

    def bound(self, name: str, value: float, least: float | None = None, most: float | None = None) -> None:
        """A verdict on a figure."""
        good = (least is None or value >= least) and (most is None or value <= most)
        wanted = " and ".join(
            f"{sign} {shown(limit)}" for sign, limit in ((">=", least), ("<=", most)) if limit is not None
        )
        self.check(name, good, f"{shown(value)}, wanted {wanted}")
        if good:
            print(f"  ok {name}: {shown(value)}, wanted {wanted}", flush=True)

    def note(self, text: str) -> None:
        """Something to know beside the tables."""
        self._write("note", text=text)
        print(f"  {text}", flush=True)

    def begin(self, **facts: Any) -> None:
        """From here on; an earlier run of the same section is superseded."""
        self._write("begin", **facts)

    def end(self, **facts: Any) -> None:
        self._write("end", **facts)

    def _write(self, kind: str, **content: Any) -> None:
        line = json.dumps({"section": self.section, "kind": kind, "time": round(time.time(), 3), **content})
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def shown(value: Any) -> str:
    """A figure as people read it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")) or value == 0:
            return str(value)
        if 0.001 <= abs(value) < 100000:
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        return f"{value:.2e}"
    return str(value)
