"""Checkpoints of a training run: written whole or not at all, checked when they are read, the last few of them kept.

A checkpoint is a folder `checkpoints/<stage>-<step>` (or `...-ended`) with one file of tensors for each rank. What is in it
goes on to the same bits: float32 weights, both moments, the states of the random generators, and how far the run was.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import folders, tensorfile
from ..stored import CacheDamaged, PageSource, Span, as_bytes, checksum
from .devices import Devices

KEY = "llama1m.train"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class At:
    """How far a run was: `step` steps of stage `stage` are done (from 0), `ended` if the stage ended there, before its last
    step perhaps."""

    stage: int
    step: int
    ended: bool = False

    @property
    def name(self) -> str:
        """The last one of a stage beside the one of its last step, which may be there already: none is ever replaced."""
        return f"{self.stage + 1:02d}-{self.step:07d}{'-ended' if self.ended else ''}"


class Damaged(ValueError):
    """No checkpoint can be read; the message names each and what is wrong with it."""


def write(out: Path, at: At, tensors: Iterable[tuple[str, Tensor]], facts: dict[str, Any], devices: Devices) -> Path:
    """Writes a checkpoint. All ranks call it.

    Raises:
        OSError: there is no room, or it can't be written. Nothing of it is left, and those before are as they were.
    """
    parent = out / FOLDER
    target = parent / at.name
    body = {**facts, "stage": at.stage, "step": at.step, "ended": at.ended, "world_size": devices.world_size}
    mine = [_entry(name, t) for name, t in tensors]

    def write_mine(made: Path) -> None:
        file = made / f"rank-{devices.rank}.safetensors"
        tensorfile.write(file, mine, tensorfile.described(KEY, {**body, "rank": devices.rank}))

    if devices.is_first:
        parent.mkdir(exist_ok=True)
        if target.exists():  # one that could not be read, or the run would have gone on from it
            shutil.rmtree(target)
    if devices.world_size == 1:
        with folders.becoming(target) as made:
            write_mine(made)
        return target
    if devices.is_first:
        with folders.becoming(target) as made:
            devices.tell(str(made))
            devices.each("the checkpoint", lambda: write_mine(made))
        devices.each("the checkpoint", lambda: None)
    else:
        path = devices.hear()
        devices.each("the checkpoint", lambda: write_mine(Path(path)))
        devices.each("the checkpoint", lambda: None)
    return target


def prune(out: Path, keep: int, at: At) -> None:
    """Removes all but the newest `keep` up to `at`: those of later steps could not be read, and count for nothing."""
    for path in [path for path in found(out) if path.name <= at.name][keep:]:
        shutil.rmtree(path, ignore_errors=True)


def found(out: Path) -> list[Path]:
    """All there are, the newest first."""
    parent = out / FOLDER
    if not parent.is_dir():
        return []
    return sorted(
        (p for p in parent.iterdir() if re.fullmatch(r"\d+-\d{7}(-ended)?", p.name)), key=lambda p: p.name, reverse=True
    )


class Save:
    """A checkpoint of this rank that was read and is whole.

    Attributes:
        at: how far the run was.
        facts: what was written beside the tensors.
    """

    def __init__(self, path: Path, devices: Devices) -> None:
        self.path = path
        # Where all ranks hold everything, the first one has written it for all.
        self._files = [_File(path / f"rank-{rank}.safetensors") for rank in dict.fromkeys((devices.rank, 0))]
        self.facts = self._files[0].facts
        try:
            self.at = At(int(self.facts["stage"]), int(self.facts["step"]), bool(self.facts["ended"]))
            world_size = int(self.facts["world_size"])
        except (KeyError, TypeError, ValueError) as e:
            raise CacheDamaged(f"{path}: the metadata make no sense: {e!r}") from None
        if world_size != devices.world_size:
            raise CacheDamaged(
                f"{path}: expected a checkpoint of {devices.world_size} processes, got one of {world_size}"
            )

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of a name, None where there is none."""
        return next((t for t in (file.tensor(name) for file in self._files) if t is not None), None)


class _File:
    """A file of tensors that was read once, and is whole."""

    def __init__(self, path: Path) -> None:
        self._source = PageSource.open(path)
        metadata, self._spans = tensorfile.read(self._source)
        self.facts = tensorfile.description(metadata, KEY, str(path))
        for name, (span, expected) in self._spans.items():
            if expected is None or checksum(as_bytes(self._read(span))) != expected:
                raise CacheDamaged(f"{path}: {name} is not what was written: the file is damaged")

    def tensor(self, name: str) -> Tensor | None:
        at = self._spans.get(name)
        return None if at is None else self._read(at[0])

    def _read(self, span: Span) -> Tensor:
        made = torch.empty(span.shape, dtype=span.dtype)
        self._source.read(span.offset, as_bytes(made))
        return made


def newest(out: Path, devices: Devices, say: Any) -> Save | None:
    """The newest checkpoint that is whole on all ranks; None: there is none at all.

    Args:
        say: is told of each that is damaged.

    Raises:
        Damaged: there are some, and none is whole.
    """
    wrong = []
    for path in found(out):
        save: Save | None = None
        try:
            save = Save(path, devices)
            why = ""
        except (CacheDamaged, OSError) as e:
            why = str(e)
        if devices.all_agree(save is not None):
            return save
        wrong.append(f"{path.name}: {why or 'damaged on another rank'}")
        say(f"checkpoint {wrong[-1]}; trying the one before")
    if wrong:
        raise Damaged(f"{out / FOLDER}: expected a whole checkpoint, got {len(wrong)} damaged: {'; '.join(wrong)}")
    return None


def room(out: Path, needed: int, what: str) -> None:
    """Before the work.

    Raises:
        OSError: the disk has no room.
    """
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{what} takes {needed} bytes, and {free} are free", os.fspath(out))


def _entry(name: str, t: Tensor) -> tensorfile.Entry:
    t = t.detach()
    local: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return name, local.dtype, tuple(local.shape), tensorfile.rows(local.contiguous())
