"""A temporary file that pages are written to in the background, and the thread that does it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from .dense import page_to
from .formats import Page, rounded
from .stored import ALIGN, PageSource, Span, StoredPage, as_bytes, checksum, write_bytes

_BLOCK = 4096
"""Pages begin at a multiple of so many bytes in the file."""
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}
# Forks of this process so far. A forked process reads what its parent wrote before: that room must not be written again.
_forks = [0]
os.register_at_fork(before=lambda: _forks.__setitem__(0, _forks[0] + 1))


def is_memory(folder: str) -> bool:
    """Whether a folder's files lie in memory (tmpfs), as those of /tmp do on some systems."""
    try:
        device = os.stat(folder).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == number:
                return rest.split()[0] in _MEMORY_FILE_SYSTEMS
    except (OSError, IndexError):
        pass  # not Linux: nobody says
    return False


def default_folder() -> str:
    """Where temporary files go, unless that is memory and there is a folder on a disk."""
    folder = tempfile.gettempdir()
    if "TMPDIR" not in os.environ and is_memory(folder) and os.access("/var/tmp", os.W_OK | os.X_OK):
        return folder if is_memory("/var/tmp") else "/var/tmp"
    return folder


def free_bytes(folder: str | None = None) -> int:
    """Bytes that a file in a folder can still take.

    Raises:
        OSError: there is no such folder.
    """
    return shutil.disk_usage(folder or default_folder()).free


class Worker:
    """One thread for what is done in the background, in the order in which it was submitted; started when there is something
    to do, anew in a forked process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._alone = False

    @property
    def lock(self) -> threading.Lock:
        """For whoever submits. In a forked process a new one: who held the old one did not come along."""
        if self._pid != os.getpid():
            self._lock = threading.Lock()
            self._pid, self._pool, self._alone = os.getpid(), None, False
        return self._lock

    def submit(self, do: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs `do(*args)` after what was submitted before; at once, here, where no thread can be had."""
        if self._pool is None and not self._alone:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
            try:
                self._pool.submit(int)
            except RuntimeError:
                self._pool, self._alone = None, True  # no room for another thread
        if self._pool is not None:
            try:
                return self._pool.submit(do, *args)
            except RuntimeError:
                self._pool, self._alone = None, True  # the interpreter is on its way out
        done: Future[Any] = Future()
        try:
            done.set_result(do(*args))
        except Exception as e:
            done.set_exception(e)
        return done


class _Room:
    """A run of bytes in the file, free for another page when nothing refers to it any more."""

    __slots__ = ("forks", "free", "offset")

    def __init__(self, offset: int, free: list[int]) -> None:
        self.offset, self.free, self.forks = offset, free, _forks[0]

    def __del__(self, forks: list[int] = _forks) -> None:  # a default is there to the end, when globals are gone
        if self.forks == forks[0]:
            self.free.append(self.offset)  # no lock: this may run at any moment, in any thread


class PageFile:
    """A temporary file of pages, gone when nothing refers to it or the process ends, however it ends.

    Pages are written by a thread of their own. Until a page is written it stays in memory, and if it can't be
    written it stays there for good: nothing is lost. The error comes out of the next `put` or `flush`.

    Args:
        folder: where; None: `default_folder()`.
        in_flight: bytes of pages that may wait to be written, at most (one page always may).

    Attributes:
        bytes_written: so far.
    """

    def __init__(self, folder: str | None = None, in_flight: int = 32 << 20) -> None:
        self.folder = None if folder is None else os.path.expanduser(folder)
        self.in_flight = in_flight
        self.bytes_written = 0
        self._pid = 0
        self._worker = Worker("llama1m-write")
        self._source: PageSource | None = None
        self._begin()

    def _begin(self) -> None:
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._waiting: deque[tuple[Future[Any], int]] = deque()
        self._errors: list[OSError] = []

    def check_room(self, nbytes: int) -> None:
        """Before work starts: can the file be made, and hold so many bytes?

        Raises:
            OSError: no, or there is no such folder.
        """
        with self._worker.lock:
            self._open()
            need, folder = nbytes - self._end, self.folder or default_folder()
            free = free_bytes(folder)
        if need > free:
            message = f"offload_dir: {need} bytes of pages are to be written, {free} bytes are free"
            raise OSError(errno.ENOSPC, message, folder)

    def put(self, page: Page) -> StoredPage:
        """Has a page written, from a GPU through main memory. The page belongs to the file now: nobody may write to it.

        Raises:
            OSError: an earlier page could not be written, or there is no file to write to. This page is as it was.
        """
        page = page_to(page, torch.device("cpu"))
        with self._worker.lock:
            source = self._open()
            while self._waiting and sum(n for _, n in self._waiting) + page.nbytes > self.in_flight:
                self._settle_one()
            self._settle_done()
            self._raise()
            tensors = page.tensors()
            spans, at = {}, 0
            for name, tensor in tensors.items():
                nbytes = tensor.numel() * tensor.element_size()
                spans[name] = Span(at, nbytes, tensor.dtype, tuple(tensor.shape))
                at += rounded(nbytes, ALIGN)
            size = rounded(at, _BLOCK)
            free = self._free.setdefault(size, [])
            try:
                room = _Room(free.pop(), free)
            except IndexError:
                room = _Room(self._end, free)
                self._end += size
            stored = StoredPage(
                source, {name: span._replace(offset=room.offset + span.offset) for name, span in spans.items()}
            )
            record = stored._record
            record.page, record.room = page, room
            self._waiting.append((self._worker.submit(self._write, record), page.nbytes))
            return stored

    def flush(self) -> None:
        """Waits until all pages are written.

        Raises:
            OSError: some page could not be.
        """
        with self._worker.lock:
            if self._pid == os.getpid():
                while self._waiting:
                    self._settle_one()
                self._raise()

    def _open(self) -> PageSource:
        if self._source is not None and self._pid == os.getpid():
            return self._source
        # In a forked process too: the old file goes on being read, and is written by the parent alone.
        folder = self.folder or default_folder()
        try:
            # Without a name from the beginning, or at once: nothing is left behind, whatever happens.
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                fd = os.dup(file.fileno())
        except OSError as e:
            raise _no_folder(e, folder) from e
        if is_memory(folder):
            message = f"offload_dir: {folder} lies in memory itself (tmpfs): pages that go there free none"
            warnings.warn(f"llama1m_ext: {message}; expected a folder on a disk", stacklevel=2)
        self._source = PageSource(fd, f"a temporary file in {folder}", watch=False)
        self._pid = os.getpid()
        self._begin()
        return self._source

    def _settle_one(self) -> None:
        future, _ = self._waiting[0]
        wait([future])
        self._settle_done()

    def _settle_done(self) -> None:
        while self._waiting and self._waiting[0][0].done():
            error = self._waiting.popleft()[0].exception()
            if isinstance(error, OSError):
                self._errors.append(error)
            elif error is not None:
                raise error

    def _raise(self) -> None:
        if self._errors:
            error, self._errors = self._errors[0], []
            raise error

    def _write(self, record: Any) -> None:
        """In the background: a page to its room in the file."""
        page, source = record.page, record.source
        checksums = {}
        try:
            for name, tensor in page.tensors().items():
                data = as_bytes(tensor.contiguous())
                checksums[name] = checksum(data)
                write_bytes(source.fd, data.numpy().data, record.spans[name].offset)
        except OSError as e:
            folder = self.folder or default_folder()
            try:
                free = f"{free_bytes(folder)} bytes are free"
            except OSError:
                free = "the folder is gone"
            raise OSError(
                e.errno, f"{e.strerror}: offload_dir: {page.nbytes} bytes of a page are to be written, {free}", folder
            ) from e
        record.checksums.update(checksums)
        self.bytes_written += page.nbytes
        record.page = None  # last: from here on the page is read


def _no_folder(e: OSError, folder: str) -> OSError:
    return OSError(e.errno, f"offload_dir: expected a folder that can be written to: {e.strerror}", folder)
