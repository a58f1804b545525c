"""A build under way, on disk: what is needed to go on after it was killed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .packer import Packer
from .shards import Shards, sync_folder, write_json

STATE = "progress.json"
_LOCK = "lock"
_OURS = re.compile(
    r"(lock|(progress|statistics|state|dataset_info|llama1m)\.json|lengths\.png|data-\d+\.arrow|waiting-\d+\.npz)(\.part)?"
)
"""All that a build ever has in its folder."""


class Journal:
    """The folder `OUT.partial`: finished Arrow files, and the state as it was when the last of them was finished.

    Args:
        target: the folder to be.
        options: all that the rows depend on; whoever goes on must have the same.
    """

    def __init__(self, target: Path, options: Mapping[str, Any]) -> None:
        self.target, self.options = target, json.loads(json.dumps(options))
        self.folder = target.with_name(f"{target.name}.partial")
        self._lock: int | None = None

    def begin(self, resume: bool) -> dict[str, Any] | None:
        """Makes the folder, or takes it over.

        Returns:
            The state to go on from, if there is one.

        Raises:
            FileExistsError: it is there, and not to be gone on with, or has something in it that isn't a build's.
            ValueError: it was begun with other options, or a file of it is not as it was.
            BlockingIOError: another process is at it.
        """
        if not resume and os.path.lexists(self.folder):
            raise FileExistsError(f"{self.folder}: a build was begun there; resume it, or remove the folder")
        self.folder.mkdir(exist_ok=resume)
        there = sorted(path.name for path in self.folder.iterdir())
        strange = [name for name in there if _LOCK not in there or not _OURS.fullmatch(name)]
        if strange:  # what a killed build began is removed, and nothing else
            raise FileExistsError(f"{self.folder}: expected what a build has left there, got {strange[0]} in it")
        self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise BlockingIOError(f"{self.folder}: another process is building there") from None
        try:
            state = self._state()
        except BaseException:
            self.release()
            raise
        if state is None or not state["complete"]:
            keep = {_LOCK, STATE, *state["names"], state["packer"]} if state else {_LOCK}
            for path in self.folder.iterdir():
                if path.name not in keep:  # begun after the state was written
                    path.unlink()
        return state

    def _state(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        if not path.is_file():
            return None
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        other = difference(state["options"], self.options, "begun")
        if other:
            raise ValueError(f"{self.folder}: {other}")
        for name, size in state["sizes"].items():
            file = self.folder / name
            there = file.stat().st_size if file.is_file() else None
            if there != size:
                raise ValueError(f"{file}: expected {size} bytes as they were written, got {there}")
        return state

    def note(self, shards: Shards, packer: Packer, state: Mapping[str, Any]) -> None:
        """All that was put into finished files, and all that waits, is safe when this returns."""
        name = f"waiting-{len(shards.names):05d}.npz"
        packer.save(self.folder / name)
        self._write(shards, {"packer": name, **state}, [*shards.names, name])
        for old in self.folder.glob("waiting-*.npz"):
            if old.name != name:
                old.unlink()

    def complete(self, shards: Shards) -> None:
        """Only the name is missing. A kill at any point from here on costs nothing."""
        self._write(shards, {"packer": None, "complete": True}, shards.names)

    def end(self) -> None:
        """The folder gets its name.

        Raises:
            FileExistsError: it was given to something else since the start.
        """
        for path in [*self.folder.glob("waiting-*.npz"), *self.folder.glob("*.part")]:
            path.unlink()
        if os.path.lexists(self.target):  # os.rename would replace an empty folder
            raise FileExistsError(f"{self.target}: it is there already; the rows are in {self.folder}")
        os.rename(self.folder, self.target)
        sync_folder(self.target.absolute().parent)
        tidy(self.target)
        self.release()

    def _write(self, shards: Shards, state: Mapping[str, Any], names: list[str]) -> None:
        sizes = {name: (self.folder / name).stat().st_size for name in names}
        always = {"options": self.options, "names": shards.names, "sizes": sizes, "complete": False}
        write_json(self.folder / STATE, {**always, **state})

    def release(self) -> None:
        """Others may go on. A folder without a state has nothing to lose."""
        if self._lock is not None:
            if self.folder.is_dir() and not (self.folder / STATE).exists():
                shutil.rmtree(self.folder)
            os.close(self._lock)
            self._lock = None


def tidy(folder: Path) -> None:
    """What a build leaves in its folder if it is killed right after giving it its name."""
    for name in (STATE, _LOCK):
        (folder / name).unlink(missing_ok=True)


def difference(then: Mapping[str, Any], now: Mapping[str, Any], when: str) -> str:
    """The first option that is another one, in words."""
    for name in sorted(now.keys() | then.keys()):
        a, b = then.get(name), now.get(name)
        if a != b:
            return f"{name}: expected {_short(a)} as it was {when}, got {_short(b)}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
