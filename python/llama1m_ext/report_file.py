"""Files that commands of `llama1m` write their figures to."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["JsonFile", "has_a_place", "makes_a_folder", "write_json"]


def has_a_place(path: Path | None) -> Path | None:
    """Said before the work, which may take hours."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise typer.BadParameter(f"expected a file in a folder that can be written to, got {path}")
    return path


def makes_a_folder(path: Path | None) -> Path | None:
    """Said before the work, too: whether results have a folder, or can get one."""
    if path is not None:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise typer.BadParameter(f"expected a folder that can be written to, got {path}")
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.", callback=has_a_place)
]


def write_json(path: Path | None, report: Any) -> None:
    """Nothing, where no file was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
