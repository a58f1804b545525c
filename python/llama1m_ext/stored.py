"""Pages in files: read into memory that is given, or seen through a memory map, and never trusted before they are checked."""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _core
from .formats import GROUP, Compact, Page, Side, rounded

ALIGN = 64
"""Tensors begin at a multiple of so many bytes: a line of the CPU's caches, and the longest vector."""
# Not accounted for as memory that might be written, however large the file: nobody writes to more than a few of its pages.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_BLOCK = 16 << 20
_AT_ONCE = 1 << 30
"""Bytes whose checksums are taken together."""


class CacheDamaged(ValueError):
    """A file does not hold what was written to it."""


class Span(NamedTuple):
    """Where a contiguous tensor lies in a file.

    Attributes:
        offset: of its first byte.
        nbytes: bytes that it takes.
        dtype, shape: what the bytes are.
    """

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def checksum(tensor: Tensor) -> int:
    """64 bits that change with any byte of a contiguous CPU tensor (xxh3)."""
    return _core.checksum(tensor)


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """`checksum` of each, on all threads; few are alive at a time where the iterable makes them."""
    found: list[int] = []
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        waiting.append(tensor)
        size += tensor.nbytes
        if size > _AT_ONCE:
            found += _core.checksums(waiting, threads=torch.get_num_threads())
            waiting, size = [], 0
    return found + _core.checksums(waiting, threads=torch.get_num_threads())


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, uint8 `[nbytes]`."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def write_bytes(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at a place of a file; in blocks, so that Ctrl-C gets through.

    Raises:
        OSError: the disk is full, or otherwise no good.
    """
    while data:
        n = os.pwrite(fd, data[:_BLOCK], offset)
        data, offset = data[n:], offset + n


def read_bytes(fd: int, into: memoryview, offset: int) -> int:
    """Reads from a place of a file until `into` is full or the file ends; returns how many bytes there were.

    Raises:
        OSError: reading failed.
    """
    done = 0
    while done < len(into):
        n = os.preadv(fd, [into[done:]], offset + done)
        if n == 0:
            break
        done += n
    return done


def page_of(tensors: Mapping[str, Tensor]) -> Page:
    """The opposite of `Page.tensors()`."""

    def side(name: str) -> Side:
        return tensors[name] if name in tensors else Compact(tensors[f"{name}.codes"], tensors[f"{name}.params"])

    return Page(side("k"), side("v"))


class PageSource:
    """An open file that pages are read from; closed when nothing refers to it any more.

    Reading is by position (`preadv`), so threads and forked processes may share it. What a memory map shows is gone when
    somebody truncates the file: then the operating system ends the process (SIGBUS), and no program can prevent it
    between a check and a use. So the size is checked before each use, and files that this package writes are
    replaced as a whole, never changed: their maps stay good.

    Args:
        fd: a file descriptor, owned from now on.
        name: what messages call the file.
        mapped: give views of a memory map, where the address space has room for it, instead of reading.
        watch: other programs may write to the file: when it changed, checksums are verified again.
    """

    def __init__(self, fd: int, name: str, *, mapped: bool = False, watch: bool = True) -> None:
        self.fd, self.name, self.mapped, self.watch = fd, name, mapped, watch
        self._close = weakref.finalize(self, os.close, fd)
        self.stream: Any = None  # buffers that its pages are streamed through, where no `Store` has any
        self._map: Tensor | None = None
        self._raw: mmap.mmap | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, mapped: bool = False) -> PageSource:
        """Opens a file for reading.

        Raises:
            OSError: it can't be, or is no file: a pipe, for one, which might never say anything.
        """
        # Without O_NONBLOCK opening a pipe waits for somebody who writes to it. Of files it changes nothing.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", os.fspath(path))
            raise OSError(errno.EINVAL, "expected a file, got a pipe or a device", os.fspath(path))
        return cls(fd, os.fspath(path), mapped=mapped)

    def state(self, end: int) -> tuple[int, int]:
        """Something that changes when the file does.

        Raises:
            CacheDamaged: there are fewer than `end` bytes.
        """
        found = os.fstat(self.fd)
        if found.st_size < end:
            raise CacheDamaged(f"{self.name}: expected at least {end} bytes, found {found.st_size}: it was truncated")
        return (found.st_size, found.st_mtime_ns) if self.watch else (0, 0)

    def read(self, offset: int, into: Tensor) -> None:
        """Reads as many bytes as `into`, uint8 `[nbytes]`, has room for.

        Raises:
            CacheDamaged: the file ends before.
            OSError: reading failed.
        """
        view = into.numpy().data
        try:
            done = read_bytes(self.fd, view, offset)
        except OSError as e:
            raise OSError(e.errno, f"{e.strerror} while reading {len(view)} bytes at {offset}", self.name) from e
        if done < len(view):
            raise CacheDamaged(
                f"{self.name}: expected {len(view)} bytes at offset {offset}, found {done}: it was truncated"
            )

    def view(self, end: int) -> Tensor | None:
        """The file's bytes, at least `end` of them, through a memory map (private: a write to it would stay in this
        process); None where that can't be had."""
        if not self.mapped:
            return None
        if self._map is None or self._map.numel() < end:
            size = os.fstat(self.fd).st_size
            try:
                self._raw = mmap.mmap(
                    self.fd, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            except (OSError, ValueError, OverflowError):
                self.mapped = False  # no room in the address space, or a file system without maps: it can be read
                return None
            self._map = torch.frombuffer(self._raw, dtype=torch.uint8)
        return self._map

    def will_need(self, offset: int, nbytes: int) -> None:
        """Lets the operating system read ahead what a map will show."""
        if self._raw is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._raw.madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)
        except OSError:
            pass  # only advice


class _Record:
    """What all parts of one stored page share."""

    __slots__ = ("checksums", "end", "nbytes", "page", "room", "size", "source", "spans", "verified", "views")

    def __init__(self, source: PageSource, spans: dict[str, Span], checksums: dict[str, int]) -> None:
        self.source, self.spans, self.checksums = source, spans, checksums
        self.page: Page | None = None  # while it is being written
        self.views: Page | None = None  # of the map
        self.verified: tuple[int, int] | None = None  # the file's state when its checksums were right
        self.room: Any = None  # keeps its room in a `PageFile` from being taken by another page
        self.end = max((span.offset + span.nbytes for span in spans.values()), default=0)
        self.nbytes = sum(rounded(span.nbytes, ALIGN) for span in spans.values())
        # Compact keys come in whole groups: values know how many tokens there are.
        self.size = spans["v" if "v" in spans else "v.codes"].shape[2]
        of_k, expected = (spans["k"], self.size) if "k" in spans else (spans["k.codes"], -(-self.size // GROUP))
        if of_k.shape[2] != expected:
            raise CacheDamaged(f"{source.name}: page: it has keys {of_k.shape} and values of {self.size} tokens")

    def load(self, buffer: Tensor | None) -> Page:
        source = self.source
        state = source.state(self.end)
        if self.views is not None and source.mapped and self.verified == state:
            return self.views
        if source.mapped and source.view(self.end) is not None:
            memory = source.view(self.end)
            assert memory is not None
            tensors = {name: _typed(memory, span.offset, span) for name, span in self.spans.items()}
            for span in self.spans.values():
                source.will_need(span.offset, span.nbytes)
            self._verify(tensors, state)
            self.views = page_of(tensors)
            return self.views
        if buffer is None:
            buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        elif buffer.numel() < self.nbytes:
            raise ValueError(f"buffer: expected at least {self.nbytes} bytes, got {buffer.numel()}")
        at, tensors = 0, {}
        for name, span in self.spans.items():
            source.read(span.offset, buffer[at : at + span.nbytes])
            tensors[name] = _typed(buffer, at, span)
            at += rounded(span.nbytes, ALIGN)
        self._verify(tensors, state)
        return page_of(tensors)

    def _verify(self, tensors: Mapping[str, Tensor], state: tuple[int, int]) -> None:
        if self.verified == state:
            return
        for name, expected in self.checksums.items():
            found = checksum(tensors[name])
            if found != expected:
                raise CacheDamaged(
                    f"{self.source.name}: tensor {name!r} at offset {self.spans[name].offset}: expected checksum "
                    f"{expected:016x}, found {found:016x}: the file is damaged"
                )
        self.verified = state


def _typed(memory: Tensor, at: int, span: Span) -> Tensor:
    flat = memory[at : at + span.nbytes]
    if (flat.data_ptr() | flat.storage_offset()) % span.dtype.itemsize:
        flat = flat.clone()  # somebody else's file, that aligns nothing
    return flat.view(span.dtype).view(span.shape)


def _with_rows(tensor: Tensor, rows: list[int]) -> Tensor:
    # Not by its dtype: torch can't index all of them.
    return tensor.view(torch.uint8)[rows].view(tensor.dtype)


class StoredPage:
    """A page in a file. It never changes, so copies of it are itself; it pickles as the page in memory.

    Args:
        source: the file.
        spans: where the tensors lie, by their names in `Page.tensors()`.
        checksums: of the tensors, as far as they are known: verified when the page is first loaded, and again when
            somebody has written to the file since.

    Attributes:
        size: tokens.

    Raises:
        CacheDamaged: spans that no page has.
    """

    __slots__ = ("__weakref__", "_record", "_rows", "size", "start")

    def __init__(
        self, source: PageSource, spans: Mapping[str, Span], checksums: Mapping[str, int] | None = None
    ) -> None:
        for name, span in spans.items():
            if len(span.shape) != 4 or min(span.offset, *span.shape) < 0:
                raise CacheDamaged(f"{source.name}: page: tensor {name!r}: expected 4 axes and an offset, got {span}")
            if span.nbytes != math.prod(span.shape) * span.dtype.itemsize:
                raise CacheDamaged(
                    f"{source.name}: page: tensor {name!r}: its shape does not take {span.nbytes} bytes: {span}"
                )
        for side in "kv":
            parts = {f"{side}.codes", f"{side}.params"}
            if not parts <= spans.keys() and not (side in spans and parts.isdisjoint(spans)):
                raise CacheDamaged(f"{source.name}: page: expected {side}, or {sorted(parts)}; it has {sorted(spans)}")
        self._record = _Record(source, dict(spans), dict(checksums or {}))
        self.start, self.size = 0, self._record.size
        self._rows: list[int] | None = None

    @property
    def source(self) -> PageSource:
        """The file."""
        return self._record.source

    @property
    def nbytes(self) -> int:
        """Bytes that `load` reads, and the least size of a buffer for it."""
        return self._record.nbytes

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of its tensors, by their names in `Page.tensors()`."""
        return {name: span.dtype for name, span in self._record.spans.items()}

    @property
    def at_hand(self) -> bool:
        """Whether `load` takes no memory: the page is still there, or seen through a memory map."""
        return self._rows is None and (self._record.page is not None or self._record.source.mapped)

    def load(self, buffer: Tensor | None = None) -> Page:
        """The page: views of a memory map, or read into memory.

        Args:
            buffer: uint8 `[at least nbytes]`, for a page that is read; it belongs to the page until the caller is done
                with it. Default: new memory.

        Raises:
            CacheDamaged: the file is not what was written.
            OSError: reading failed.
        """
        record = self._record
        page = record.page
        if page is None:
            page = record.load(buffer)
        if self.size != record.size:
            page = page.narrow(self.start, self.start + self.size)
        if self._rows is not None:
            page = page_of({name: _with_rows(tensor, self._rows) for name, tensor in page.tensors().items()})
        return page

    def narrow(self, start: int, end: int) -> StoredPage:
        """Tokens `start` to `end` of it; `start` a multiple of 64 where keys are compact. `load` still reads all of it."""
        if not 0 <= start <= end <= self.size:
            raise ValueError(f"start, end: expected 0 <= start <= end <= {self.size}, got {start} and {end}")
        return self._part(self.start + start, end - start, self._rows)

    def with_rows(self, rows: list[int]) -> StoredPage:
        """It with these batch rows in the place of its own: `load` copies them, so that nothing is written anew when
        beams change places."""
        return self._part(self.start, self.size, rows if self._rows is None else [self._rows[row] for row in rows])

    def _part(self, start: int, size: int, rows: list[int] | None) -> StoredPage:
        made = StoredPage.__new__(StoredPage)
        made._record, made.start, made.size, made._rows = self._record, start, size, rows
        return made

    def __copy__(self) -> StoredPage:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredPage:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        page = page_of({name: tensor.clone() for name, tensor in self.load().tensors().items()})
        return Page, (page.k, page.v)

    def __repr__(self) -> str:
        return f"StoredPage({self.size} tokens, {self.nbytes} bytes in {self.source.name})"
