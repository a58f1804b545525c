"""Checkpoints of a layer-major prefill: what a prefill that was killed needs to go on after its last finished layer.

In the folder of the option `checkpoint` each prefill has a folder of its own, named after all that decides what is
computed (the model, the tokens, what is in the cache already, the options):

    layer-00000.safetensors   keys and values of a finished layer, in the format that they are kept in
    state.safetensors         the hidden states after the last of them, and which one that is

Every file is replaced as a whole, `state` after the layers that it counts, so a kill at any moment leaves a valid state
or none. All of it is removed when the prefill is done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import _core, tensorfile
from .call import Call
from .dense import Kind, loaded
from .fingerprint import fingerprint
from .placement import device_of
from .sealed import SealedList
from .stored import CacheDamaged, PageSource, StoredPage, as_bytes, checksum

VERSION = 1
SHARE = 0.04
"""At most this share of the time goes into checkpoints: layers that are computed faster than that are left out, and are
written together with a later one."""
RATE = 500e6
"""Bytes a second that are assumed to be written, until it is known."""
LATENCY = 0.05
"""Seconds that are assumed to go by however little is written."""
_STATE = "state.safetensors"
_META = "llama1m.checkpoint"


class Checkpoint:
    """The checkpoints of one prefill; without a folder, none at all. Leaving the context without an exception means that
    the prefill is done.

    Nothing that goes wrong with a file ends the prefill: there is one warning, and no more checkpoints.

    Args:
        call: begun.
        ids, embeds: its tokens, `[batch, n]` or `[batch, n, hidden]`.
        chunk: queries of a chunk.

    Attributes:
        chunk: queries of a chunk; of a prefill that goes on, those that it was begun with.
    """

    def __init__(self, call: Call, ids: Tensor | None, embeds: Tensor | None, chunk: int) -> None:
        self.call, self.chunk = call, chunk
        self.folder: Path | None = None
        self._state: dict[str, Any] | None = None
        self._lock: int | None = None
        self._past = [(list(page.pages), page.length) for page in call.pages or ()]
        self._run = uuid.uuid4().hex
        self._written = 0  # layers on disk
        self._failed = False
        self._since, self._rate = time.monotonic(), RATE
        if call.options.checkpoint is None or len(call.layers) < 2:
            return
        if call.slides:
            _warn("no checkpoints of this prefill: layers of its cache keep no more than a sliding window")
            return
        try:
            self._key = identity(call, ids, embeds)
        except (
            ValueError,
            TypeError,
            RuntimeError,
        ) as e:  # weights that are elsewhere, or somebody's own kind of tensors
            _warn(f"no checkpoints of this prefill: {e}")
            return
        try:
            folder = Path(call.options.checkpoint).expanduser() / self._key[:32]
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder / "lock")
        except BlockingIOError:
            _warn(f"another process is at the same prefill, in {str(folder)!r}: no checkpoints of this one")
            return
        except OSError as e:
            _warn(f"no checkpoints of this prefill: {e}")
            return
        self.folder = folder
        self._find()

    # -- going on --------------------------------------------------------------------------------------------------------

    def _find(self) -> None:
        """Looks whether there is a state to go on from."""
        assert self.folder is not None
        path = self.folder / _STATE
        if not path.exists():
            return
        try:
            state = tensorfile.description(tensorfile.read(path)[0], _META, str(path))
            if state.get("version") != VERSION or state["key"] != self._key:
                raise CacheDamaged(f"{path}: expected version {VERSION} of prefill {self._key}")
            done, chunk = state["done"], state["chunk"]
            if not (type(done) is int and 0 < done < len(self.call.layers) and type(chunk) is int and chunk > 0):
                raise CacheDamaged(f"{path}: expected 1 to {len(self.call.layers) - 1} layers, got {done!r}")
        except (OSError, ValueError, KeyError, TypeError) as e:
            self._start_over(e)
            return
        self._state, self.chunk = state, chunk

    def resume(self, hidden: Tensor) -> int:
        """Puts back what is there, if something is: hidden states, keys and values.

        Args:
            hidden: `[batch, n, hidden]`, contiguous: memory for the states after the layers that are done.

        Returns:
            So many layers are done. If none is, there is nothing useful in `hidden`.
        """
        if self._state is None or self.folder is None:
            return 0
        done: int = self._state["done"]
        pages = self.call.pages or []
        before = [page.snapshot() for page in pages]
        try:
            for i in range(done if pages else 0):
                self._refill(i, pages[i])
            self._read_hidden(hidden)
        except (OSError, ValueError, KeyError, TypeError) as e:
            for page, snapshot in zip(pages, before, strict=True):
                page.restore(snapshot)
            self._start_over(e)
            return 0
        here = _environment() | _gpus(self.call)
        if self._state["environment"] != here:
            _warn(
                f"the prefill goes on with {here}, and was begun with {self._state['environment']}: its last bits may "
                "differ from those of one that was not interrupted"
            )
        self._run, self._written = self._state["run"], done
        return done

    def _refill(self, i: int, layer: SealedList) -> None:
        assert self.folder is not None and self._state is not None
        path = self.folder / _layer_name(i)
        source = PageSource.open(path, mapped=True)
        metadata, spans = tensorfile.read(source)
        body = tensorfile.description(metadata, _META, str(path))
        past, _ = self._past[i]
        kept, sizes, rooms = body["kept"], body["sizes"], body["rooms"]
        if body["run"] != self._state["run"] or body["layer"] != i or not 0 <= kept <= len(past):
            raise CacheDamaged(f"{path}: expected layer {i} of prefill {self._state['run']}")
        pages = []
        for j in range(len(sizes)):
            mine = {name.partition(".")[2]: entry for name, entry in spans.items() if name.split(".")[0] == str(j)}
            sums = {name: value for name, (_, value) in mine.items() if value is not None}
            page = StoredPage(source, {name: span for name, (span, _) in mine.items()}, sums)
            if page.size != sizes[j] or rooms[j] < sizes[j] or len(sums) != len(mine):
                raise CacheDamaged(f"{path}: page {j}: expected {sizes[j]} tokens, got {page.size}")
            pages.append((page, rooms[j]))
        if sum(sizes) + sum(page.size for page in past[:kept]) != self.call.past_len + self.call.q_len:
            raise CacheDamaged(f"{path}: expected {self.call.past_len + self.call.q_len} tokens")
        k_dtype, v_dtype = (tensorfile.dtype_of(name) for name in body["dtypes"])
        batch, kv_heads, k_dim, v_dim = (int(n) for n in body["kind"])
        device = device_of(self.call.layers[i], self.call.position_ids.device)
        kind = Kind(batch, kv_heads, k_dim, v_dim, k_dtype, v_dtype, device)
        if layer.kind is not None and layer.kind != kind:
            raise CacheDamaged(f"{path}: expected keys and values like {layer.kind}, got {kind}")
        layer.refill(kept, pages, kind)

    def _read_hidden(self, hidden: Tensor) -> None:
        assert self.folder is not None
        path = self.folder / _STATE
        source = PageSource.open(path)
        span, expected = tensorfile.read(source)[1]["hidden"]
        if span.shape != hidden.shape or span.dtype != hidden.dtype:
            raise CacheDamaged(
                f"{path}: expected hidden states {tuple(hidden.shape)} of {hidden.dtype}, got {span.shape} of {span.dtype}"
            )
        here = hidden if hidden.device.type == "cpu" else torch.empty_like(hidden, device="cpu")
        source.read(span.offset, as_bytes(here))
        if checksum(here) != expected:
            raise CacheDamaged(f"{path}: the hidden states are not what was written: the file is damaged")
        if here is not hidden:
            hidden.copy_(here)

    def _start_over(self, why: Exception) -> None:
        _warn(f"the prefill starts from the beginning, because its checkpoint can't be read: {why}")
        self._state = None
        self._remove()

    # -- writing ---------------------------------------------------------------------------------------------------------

    def layer_done(self, i: int, hidden: Tensor) -> None:
        """Layer i is finished: writes what a prefill needs to go on after it, or leaves it to a later one.

        Args:
            hidden: `[batch, n, hidden]` after it.
        """
        if self.folder is None or self._failed or i + 1 == len(self.call.layers):
            return
        pages = self.call.pages or []
        waiting = [self._parts(j) for j in range(self._written, i + 1)] if pages else []
        size = hidden.numel() * hidden.element_size()
        size += sum(part.nbytes for parts, _ in waiting for part, _ in parts)
        began = time.monotonic()
        if LATENCY + size / self._rate > SHARE * (began - self._since):
            return
        try:
            for j, (parts, kept) in enumerate(waiting, self._written):
                self._write_layer(j, parts, kept)
            state = {
                "version": VERSION,
                "key": self._key,
                "run": self._run,
                "done": i + 1,
                "chunk": self.chunk,
                "environment": _environment() | _gpus(self.call),
            }
            entry = ("hidden", hidden.dtype, tuple(hidden.shape), tensorfile.rows(hidden))
            tensorfile.write(self.folder / _STATE, [entry], tensorfile.described(_META, state))
        except (OSError, ValueError) as e:
            # What is there stays valid, and may be gone on from.
            _warn(f"no more checkpoints of this prefill: {e}")
            self._failed = True
            return
        self._written = i + 1
        self._since = time.monotonic()
        self._rate = size / max(self._since - began, 1e-3)

    def _parts(self, j: int) -> tuple[Sequence[tuple[Any, int]], int]:
        """A layer's pages that are not the past's, each with its room, and how many of the past's come before."""
        assert self.call.pages is not None
        layer, (past, past_len) = self.call.pages[j], self._past[j]
        kept = at = 0
        for mine, old in zip(layer.pages, past, strict=False):
            at += old.size
            if mine is not old or at > past_len:
                break
            kept += 1
        return layer.parts()[kept:], kept

    def _write_layer(self, j: int, parts: Sequence[tuple[Any, int]], kept: int) -> None:
        assert self.call.pages is not None and self.folder is not None
        kind = self.call.pages[j].kind
        assert kind is not None
        body = {
            "run": self._run,
            "layer": j,
            "kept": kept,
            "sizes": [part.size for part, _ in parts],
            "rooms": [room for _, room in parts],
            "kind": list(kind[:4]),
            "dtypes": [tensorfile.dtype_name(dtype) for dtype in (kind.k_dtype, kind.v_dtype)],
        }
        tensors = [
            (f"{p}.{name}", tensor.dtype, tuple(tensor.shape), tensorfile.rows(tensor))
            for p, (part, _) in enumerate(parts)
            for name, tensor in loaded(part).tensors().items()
        ]
        tensorfile.write(self.folder / _layer_name(j), tensors, tensorfile.described(_META, body))

    # -- the end ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.folder is not None:
            self._remove()
            with contextlib.suppress(OSError):
                (self.folder / "lock").unlink(missing_ok=True)
                self.folder.rmdir()
        self._release()

    def _remove(self) -> None:
        """The files, the state first: without it the others mean nothing."""
        assert self.folder is not None
        with contextlib.suppress(OSError):
            (self.folder / _STATE).unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink(missing_ok=True)

    def _release(self) -> None:
        self.folder = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


# -- what decides what is computed -------------------------------------------------------------------------------------


def identity(call: Call, ids: Tensor | None, embeds: Tensor | None) -> str:
    """A digest of all that decides the result of a prefill, but for what `_environment` has and the chunk that "auto"
    gives: model, tokens, positions, padding, what is in the cache, options.

    Args:
        call: begun.
        ids, embeds: its tokens, `[batch, n]` or `[batch, n, hidden]`.
    """
    digest = hashlib.blake2b(digest_size=32)
    options, where = call.options, call.position_ids.device.type
    words = {
        "version": VERSION,
        "model": fingerprint(call.model),
        "shape": [call.batch, call.q_len, call.past_len],
        "formats": None if call.pages is None else [page.format.name for page in call.pages],
        "chunk": options.chunk,
        "page_size": options.page_size,
        "autocast": str(torch.get_autocast_dtype(where)) if torch.is_autocast_enabled(where) else None,
        "precision": torch.get_float32_matmul_precision(),
    }
    digest.update(json.dumps(words, sort_keys=True).encode())
    for name, tensor in (
        ("ids", ids),
        ("embeds", embeds),
        ("positions", call.position_ids),
        ("start", call.intervals.start),
        ("end", call.intervals.end),
    ):
        digest.update(name.encode())
        if tensor is not None:
            _add(digest, tensor)
    for page in call.pages or ():
        for part, room in page.parts():
            digest.update(f"page {part.size} {room}".encode())
            for name, tensor in loaded(part).tensors().items():
                digest.update(name.encode())
                _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for block in tensorfile.rows(tensor):
        digest.update(checksum(block).to_bytes(8, "little"))


def _gpus(call: Call) -> dict[str, Any]:
    """What more may do so on a GPU."""
    gpus = sorted({torch.cuda.get_device_name(device) for device in call.devices if device.type == "cuda"})
    return {"gpus": gpus} if gpus else {}


def _environment() -> dict[str, Any]:
    """What may change the last bits of a result."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "llama1m_ext": _core.__version__,
        "isa": _core.isa(),
    }


# -- files -------------------------------------------------------------------------------------------------------------


def _layer_name(i: int) -> str:
    return f"layer-{i:05d}.safetensors"


def _locked(path: Path) -> int:
    """Opens a file that no other process has open this way.

    Raises:
        BlockingIOError: another one has.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    if tensorfile.lock(fd) is False:  # without locks, two processes at the same prefill write the same files in turn
        os.close(fd)
        raise BlockingIOError(errno.EAGAIN, "another process has it open", str(path))
    return fd


def _warn(text: str) -> None:
    warnings.warn(f"llama1m_ext: {text}", stacklevel=2)
