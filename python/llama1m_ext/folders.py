"""Folders that are made whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import tensorfile


@contextlib.contextmanager
def becoming(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which becomes it in the end. A failure, or Ctrl-C, removes it; what a process
    that was killed has left goes when the next one begins."""
    sweep(target)
    made = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    made.mkdir()
    held = os.open(made, os.O_RDONLY)
    try:
        tensorfile.lock(held)  # nobody sweeps it away as long as this process lives
        yield made
        for path in made.iterdir():
            sync(path)
        sync(made)
        if os.path.lexists(target):  # since the start; os.rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, "somebody else made it meanwhile", str(target))
        os.rename(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        os.close(held)
    sync(target.parent)


def sweep(target: Path) -> None:
    """Removes what writers of this folder that were killed have left beside it."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY)
                try:
                    if tensorfile.lock(fd):
                        shutil.rmtree(path)
                finally:
                    os.close(fd)


def sync(path: Path) -> None:
    """On the disk before the name is: a crash of the machine leaves no hollow file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not all systems can, for folders
            os.fsync(fd)
    finally:
        os.close(fd)
