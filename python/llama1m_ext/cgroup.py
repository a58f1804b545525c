"""What the control groups of this process leave it of memory: those of containers, batch systems and systemd's units, each
inside of others (cgroups(7); Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux)."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LIMITS = {"cgroup2": ("memory.max", "memory.high"), "cgroup": ("memory.limit_in_bytes",)}
"""Files of a group, by the type of its file system. Who takes more than `high` is slowed down until he swaps."""
_UNLIMITED = 1 << 60
"""The first version has a number of this size, in whole pages of memory, where there is no limit."""
_USED = {"cgroup2": "memory.current", "cgroup": "memory.usage_in_bytes"}


class _Mount(NamedTuple):
    """Where a tree of groups is seen.

    Attributes:
        kind: of its file system: cgroup2, or cgroup with the memory controller.
        top: the group that is its root there.
        folder: of the file system.
    """

    kind: str
    top: str
    folder: str


def available_bytes(root: str | os.PathLike[str] = "/") -> int | None:
    """Memory that this process can still have within the limits of its group and of all those around it; None: no limit, or
    no groups.

    Args:
        root: of the file system: where /proc and /sys are looked for.
    """
    found = [_left(kind, folder) for kind, folder in folders(root)]
    return min((n for n in found if n is not None), default=None)


def folders(root: str | os.PathLike[str] = "/") -> tuple[tuple[str, Path], ...]:
    """The folders of the group and of those around it, the innermost first, each with the type of its file system."""
    try:
        mine = Path(root, "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ()  # not Linux
    return _folders(os.fspath(root), mine)


@functools.lru_cache(maxsize=8)
def _folders(root: str, mine: str) -> tuple[tuple[str, Path], ...]:
    """As `folders`. Mounts are taken to stay as they are as long as the process is in the same group."""
    paths = {}
    for line in mine.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    found: dict[Path, str] = {}
    for mount in _mounts(root):
        if mount.kind in paths:
            top = Path(root, mount.folder.lstrip("/"))
            inside = _inside(paths[mount.kind], mount.top)
            for folder in (top / inside, *(top / inside).parents):
                found.setdefault(folder, mount.kind)
                if folder == top:
                    break
    return tuple((kind, folder) for folder, kind in found.items())


def _inside(path: str, top: str) -> str:
    """Where a group is below the one that a mount shows as its root; that one itself where it is not: a container sees its
    own group there, whatever the path says that it has outside."""
    if top == "/" and ".." not in path.split("/"):
        return path.strip("/")
    return path[len(top) :].strip("/") if f"{path}/".startswith(f"{top}/") else ""


def _mounts(root: str) -> Iterator[_Mount]:
    try:
        lines = Path(root, "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(kinds) < 3:
            continue
        kind = kinds[0]
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in kinds[2].split(",")):
            yield _Mount(kind, _unescaped(fields[3]), _unescaped(fields[4]))


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def _left(kind: str, folder: Path) -> int | None:
    """What a group's own limit leaves; None: it has none."""
    limits = [n for n in (_number(folder / name) for name in _LIMITS[kind]) if n is not None and n < _UNLIMITED]
    used = _number(folder / _USED[kind]) if limits else None
    if used is None:
        return None
    return max(0, min(limits) - max(0, used - _given_up(folder)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # not there, or "max"


def _given_up(folder: Path) -> int:
    """Bytes of files' pages, which count as used, and are given up when memory is wanted: those of an offloaded cache, for
    one. Of the group and of all inside of it, as what is used."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = {name: int(n) for name, _, n in (line.partition(" ") for line in lines)}
    except (OSError, ValueError):
        return 0
    names = ("inactive_file", "active_file")
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)  # v1 has its own ones beside
