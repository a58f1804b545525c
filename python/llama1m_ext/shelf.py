"""Prompts that were read, kept in a folder: each a saved cache in a file, which several processes may use.

A new prompt takes the longest beginning that it has in common with a kept one, token by token: as pages of the
file, seen through a memory map, which nobody copies.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import saved
from .cache import LongCache
from .call import Call, decide_format
from .dense import Stored, loaded
from .fingerprint import fingerprint as fingerprint_of
from .formats import KvFormat, Page
from .options import parse_bytes
from .pages import PagedLayer
from .placement import device_of
from .prefill import watched
from .remember import SUFFIX

LEAST = 256
"""Prompts with less in common are read again, and shorter ones are not kept: that takes as long as opening a file."""
GROWTH = 16
"""A prompt that goes on from a kept one is kept too if it adds a sixteenth: so what is written for a talk that grows
and grows stays within a multiple of its length, and ten questions about a book write it once."""
_lock = threading.Lock()
_shelves: weakref.WeakKeyDictionary[Any, dict[str, Shelf]] = weakref.WeakKeyDictionary()
"""The files that are open for a model. No state of a call: what is lost here is opened again."""


class _State(NamedTuple):
    """Of a file: changes when it is replaced."""

    inode: int
    size: int
    written: int


class _Kept(NamedTuple):
    """A prompt that was read.

    Attributes:
        cache: with its keys and values; None: the file can't be used.
        ids: int64 `[n]`.
    """

    state: _State
    cache: LongCache | None
    ids: Tensor


class Shelf:
    """The kept prompts of one model in one folder.

    Args:
        folder: made when the first prompt is kept.
        model: the `LlamaModel`.
        fingerprint: of the model.
    """

    def __init__(self, folder: Path, model: Any, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._model = weakref.ref(model)
        self._start = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
        self._kept: dict[str, _Kept] = {}

    def take(self, call: Call, ids: Tensor, keep: int) -> int:
        """Begins a call with what a kept prompt has in common with its tokens.

        Args:
            call: of one row, with an empty cache; its pages and positions are changed.
            ids: `[1, n]`.
            keep: so many tokens at the end are to be computed in any case.

        Returns:
            So many of the first tokens are in the cache now.
        """
        assert call.pages is not None
        decide_format(call)
        ids = ids.cpu()
        known = [(page.format, page.store is None) for page in call.pages]
        devices = [device_of(layer, call.position_ids.device) for layer in call.layers]
        most, best = 0, None
        with _lock:
            for name, kept in self._files():
                if kept.cache is not None and kept.cache.format == known[0][0]:
                    n = min(_common(kept.ids, ids[0]), ids.shape[1] - keep)
                    if n > most:
                        most, best = n, (name, kept.cache)
            if best is None or most < LEAST:
                return 0
            name, cache = best
            try:
                # Everything is checked now, before anything depends on it.
                found: list[Sequence[Page | Stored]] = []
                for layer, (_, here), device in zip(cache.layers, known, devices, strict=True):
                    parts = layer.share(most)
                    pages = [loaded(part, device if here else None) for part in parts]
                    found.append(pages if here else parts)
            except (OSError, ValueError) as e:
                self._refuse(name, e)
                return 0
        for page, parts, layer, device in zip(call.pages, found, cache.layers, devices, strict=True):
            assert layer.kind is not None  # as there are tokens
            page.begin_with(parts, most, layer.kind._replace(device=device))
        call.skip(most)
        self._touch(name)
        return most

    def keep(self, call: Call, ids: Tensor, taken: int) -> None:
        """Keeps a prompt that was read, unless most of it is kept already.

        Args:
            call: done.
            ids: `[1, n]`, all its tokens.
            taken: so many of them came from here.
        """
        n = ids.shape[1]
        if n - taken < max(LEAST, n / GROWTH):
            return
        assert call.pages is not None
        ids, kv = ids.cpu(), call.pages[0].format
        with _lock:
            for other, kept in self._files():
                if kept.cache is not None and kept.cache.format == kv and _common(kept.ids, ids[0]) == n:
                    return self._touch(other)
        name = f"{self._start}-{_digest(ids, kv)}{SUFFIX}"
        cache = LongCache(kv=kv)
        cache.layers = [PagedLayer.of_pages(layer.share(n), n, layer.format, kind=layer.kind) for layer in call.pages]
        cache.tokens = ids
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(name, cache, call.options.remember_bytes)
            saved.save(cache, self.folder / name, self._model())
        except OSError as e:
            warnings.warn(f"llama1m_ext: this prompt is not remembered: {e}", stacklevel=2)
            return
        with _lock:
            self._kept.pop(name, None)
            # What is the beginning of the new one is of no more use.
            for other, kept in list(self._files()):
                same = other != name and kept.cache is not None and kept.cache.format == kv
                if same and len(kept.ids) <= n and _common(kept.ids, ids[0]) == len(kept.ids):
                    (self.folder / other).unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[str, _Kept]]:
        """The files of this model, opened."""
        found = {}
        try:
            names = sorted(name for name in os.listdir(self.folder) if name.startswith(self._start))
        except OSError:
            names = []
        for name in names:
            if not name.endswith(SUFFIX):
                continue
            try:
                info = os.stat(self.folder / name)
            except OSError:
                continue  # removed meanwhile
            state = _State(info.st_ino, info.st_size, info.st_mtime_ns)
            kept = self._kept.get(name)
            if kept is None or kept.state != state:
                kept = self._open(name, state)
            found[name] = kept
        self._kept = found
        yield from found.items()

    def _open(self, name: str, state: _State) -> _Kept:
        nothing = torch.empty(0, dtype=torch.long)
        try:
            cache = saved.load(self.folder / name, self._model(), placed=False)
            if cache.tokens is None or len(cache.tokens) != 1:
                raise ValueError("expected the tokens of one prompt")
            return _Kept(state, cache, cache.tokens[0])
        except FileNotFoundError:
            return _Kept(state, None, nothing)
        except (OSError, ValueError) as e:
            warnings.warn(f"llama1m_ext: a remembered prompt can't be used: {e}", stacklevel=2)
            return _Kept(state, None, nothing)

    def _refuse(self, name: str, why: Exception) -> None:
        """Does not offer this file again."""
        warnings.warn(f"llama1m_ext: a remembered prompt can't be used: {why}", stacklevel=2)
        self._kept[name] = self._kept[name]._replace(cache=None)

    def _touch(self, name: str) -> None:
        """Notes that a file was used. Its time of writing stays."""
        path = self.folder / name
        try:
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
        except OSError:
            pass  # removed meanwhile, or somebody else's

    def _make_room(self, name: str, cache: LongCache, limit: int | str) -> None:
        """Removes the files that were not used for the longest time, until there is room for another one.

        Raises:
            OSError: there is not, even without them.
        """
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(SUFFIX) and entry.name != name:
                try:
                    info = entry.stat()
                except OSError:
                    continue
                files.append((info.st_atime_ns, info.st_size, entry.path))
        taken = sum(size for _, size, _ in files)
        if limit == "auto":
            room = (shutil.disk_usage(self.folder).free + taken) // 2
        else:
            room = parse_bytes("remember_bytes", limit)
        need = sum(part.nbytes for layer in cache.layers for part in layer.pages)
        if need > room:
            raise OSError(
                f"it takes {need / 2**30:.2f} GiB, and prompts in {str(self.folder)!r} may take {room / 2**30:.2f} GiB "
                "(option remember_bytes)"
            )
        for _, size, path in sorted(files):
            if taken + need <= room:
                return
            Path(path).unlink(missing_ok=True)
            taken -= size


def shelf_of(call: Call, ids: Tensor | None) -> Shelf | None:
    """Where the prompt of this call is kept, or None: it is not one that can be."""
    folder = call.options.remember
    if (
        folder is None
        or call.past_len
        or ids is None
        or not call.pages
        or call.slides
        or call.batch != 1
        or call.q_len < LEAST
    ):
        return None
    if not call.is_plain or watched(call) or torch.is_autocast_enabled(ids.device.type):
        return None
    kind = call.model.rotary_emb.rope_type
    if "dynamic" in kind or kind == "longrope":
        return None  # the keys of a prefix depend on what follows
    try:
        fingerprint = fingerprint_of(call.model)
    except (ValueError, TypeError, RuntimeError) as e:  # weights that are elsewhere, or tensors of somebody's own kind
        warnings.warn(f"llama1m_ext: prompts are not remembered: {e}", stacklevel=2)
        return None
    with _lock:
        mine = _shelves.setdefault(call.model, {})
        key = os.path.abspath(os.path.expanduser(folder))
        shelf = mine.get(key)
        if shelf is None or shelf.fingerprint != fingerprint:
            mine[key] = shelf = Shelf(Path(key), call.model, fingerprint)
    return shelf


def _common(a: Tensor, b: Tensor) -> int:
    """How many tokens are the same from the first on."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.to(torch.uint8).argmax()) if bool(different.any()) else n


def _digest(ids: Tensor, kv: KvFormat) -> str:
    digest = hashlib.blake2b(kv.name.encode(), digest_size=8)
    digest.update(ids.contiguous().numpy().tobytes())
    return digest.hexdigest()
