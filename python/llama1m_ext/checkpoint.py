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
from .call import DTYPES, Call
from .dense import Kind, loaded
from .fingerprint import fingerprint
from .formats import GROUP, OF_DTYPE
from .memory import GPU_MAX_CHUNK
from .page_list import ROUND, spare
from .placement import device_of
from .saved_file import StoredLayer, stored_pages
from .sealed import SINK, TAIL, SealedList
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
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What a file may raise whose words are not ours. Not what memory does that is full: the file is good then."""


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
            done, chunk, asked = state["done"], state["chunk"], self.call.options.chunk
            if not (type(done) is int and 0 < done < len(self.call.layers)):
                raise CacheDamaged(f"{path}: expected 1 to {len(self.call.layers) - 1} layers, got {done!r:.80}")
            if type(chunk) is not int or not (0 < chunk <= GPU_MAX_CHUNK if asked == "auto" else chunk == asked):
                raise CacheDamaged(f"{path}: expected chunks as the option says, {asked}, got {chunk!r:.80}")
            if not isinstance(state["run"], str) or not isinstance(state["environment"], dict):
                raise CacheDamaged(f"{path}: expected a run and its environment")
        except DAMAGE as e:
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
                self._refill(i, pages[i], hidden.dtype)
            self._read_hidden(hidden)
        except DAMAGE as e:
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

    def _refill(self, i: int, layer: SealedList, dtype: torch.dtype) -> None:
        assert self.folder is not None and self._state is not None
        path = self.folder / _layer_name(i)
        source = PageSource.open(path, mapped=True)
        metadata, spans = tensorfile.read(source)
        body = tensorfile.description(metadata, _META, str(path))
        kept, sizes, rooms = body["kept"], body["sizes"], body["rooms"]
        past, past_len = self._past[i]
        for name, numbers in (("sizes", sizes), ("rooms", rooms)):
            if not isinstance(numbers, list) or not all(type(n) is int and n > 0 for n in numbers):
                raise CacheDamaged(f"{path}: {name}: expected numbers from 1 on, got {numbers!r:.80}")
        if body["run"] != self._state["run"] or body["layer"] != i or type(kept) is not int:
            raise CacheDamaged(f"{path}: expected layer {i} of prefill {self._state['run']}")
        before, total = sum(page.size for page in past[: max(0, kept)]), self.call.past_len + self.call.q_len
        if not 0 <= kept <= len(past) or before > past_len or before + sum(sizes) != total:
            raise CacheDamaged(f"{path}: expected {total} tokens, got {kept} pages from before and {sizes!r:.80}")
        kind = self._kind(i, dtype)
        described = (list(kind[:4]), [tensorfile.dtype_name(of) for of in (kind.k_dtype, kind.v_dtype)])
        if (body["kind"], body["dtypes"]) != described or layer.kind not in (None, kind):
            raise CacheDamaged(
                f"{path}: expected keys and values of {described}, got {body['kind']!r:.80} and {body['dtypes']!r:.80}"
            )
        # As a saved cache of one layer.
        named = {f"0.{name}": entry for name, entry in spans.items()}
        pages = stored_pages(source, named, [StoredLayer(sizes, layer.format, kind)])[0]
        compact = (_codes(layer.format.k), _codes(layer.format.v))
        for page in pages:
            if (page.dtypes.get("k.codes"), page.dtypes.get("v.codes")) not in ((None, None), compact):
                raise CacheDamaged(f"{path}: expected pages in the format {layer.format.name}, got {page.dtypes}")
        self._check_rooms(path, pages, rooms, layer)
        layer.refill(kept, list(zip(pages, rooms, strict=True)), kind)

    def _kind(self, i: int, dtype: torch.dtype) -> Kind:
        """Of the keys and values that layer i makes.

        Args:
            dtype: of the hidden states.
        """
        attn, here = self.call.layers[i].self_attn, device_of(self.call.layers[i], self.call.position_ids.device)
        weight = getattr(attn.k_proj, "weight", None)
        if torch.is_autocast_enabled(here.type):
            dtype = torch.get_autocast_dtype(here.type)
        elif isinstance(weight, Tensor) and weight.dtype in DTYPES:
            dtype = weight.dtype
        heads = self.call.model.config.num_key_value_heads
        return Kind(self.call.batch, heads, attn.head_dim, attn.head_dim, dtype, dtype, here)

    def _check_rooms(self, path: Path, pages: Sequence[StoredPage], rooms: Sequence[int], layer: SealedList) -> None:
        """Every page but the last is full; so is every compact one but the last of these. And no page has more room than
        this package gives."""
        if len(rooms) != len(pages):
            raise CacheDamaged(f"{path}: rooms: expected {len(pages)}, got {len(rooms)}")
        total = self.call.past_len + self.call.q_len
        most = (
            max(spare(total, False), SINK + TAIL, 0 if layer.page_size == "auto" else layer.page_size) + ROUND + GROUP
        )
        compact = [j for j, page in enumerate(pages) if page.dtypes.keys() != {"k", "v"}]
        for j, (page, room) in enumerate(zip(pages, rooms, strict=True)):
            last = j in compact[-1:] or (j == len(pages) - 1 and j not in compact)
            if not page.size <= room <= page.size + (most if last else 0):
                raise CacheDamaged(f"{path}: page {j}: expected room for {page.size} tokens or a few more, got {room}")

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
                self._write_layer(j, parts, kept, hidden.dtype)
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

    def _write_layer(self, j: int, parts: Sequence[tuple[Any, int]], kept: int, dtype: torch.dtype) -> None:
        assert self.call.pages is not None and self.folder is not None
        kind = self.call.pages[j].kind
        if kind is None or kind != self._kind(j, dtype):
            raise ValueError(f"expected keys and values of {self._kind(j, dtype)}, got {kind}")
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


def _codes(name: str) -> torch.dtype | None:
    """The dtype of the codes of a format; None: it has none."""
    return next((dtype for dtype, each in OF_DTYPE.items() if each == name), None)


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
