"""Pages streamed in from files: a thread loads while another one computes."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from .formats import Page
from .pagefile import Worker
from .stored import StoredPage

BUFFERS = 2


@dataclass
class Traffic:
    """What was streamed so far. Seconds of the loading thread and of the computing one run side by side.

    Attributes:
        pages, nbytes: loaded.
        load_seconds: spent loading, in the background.
        wait_seconds: that computing stood still for a page to come.
        compute_seconds: spent on partials.
    """

    pages: int = 0
    nbytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0


class Stream:
    """Two buffers, and a thread that fills one while the other is computed over.

    Layers take turns, the same with each token: when one is done, the first pages of the one that followed it last time
    are loaded, while the model is busy with something else.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._buffers: list[Tensor] = []
        self._worker = Worker("llama1m-read")
        self._coming: deque[tuple[StoredPage, Future[Page]]] = deque()
        self._pid = os.getpid()  # a forked process has none of what its parent is loading
        # The first pages of a call, by the first page of the call before.
        self._next: weakref.WeakKeyDictionary[StoredPage, list[weakref.ref[StoredPage]]] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[StoredPage] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(b.numel() for b in self._buffers)

    @contextlib.contextmanager
    def load(self, wanted: Sequence[StoredPage]) -> Iterator[Iterator[Page]]:
        """Begins to load pages, and gives them in their order. A page is good until the next one is asked for."""
        if not wanted:
            yield iter(())
            return
        with self._worker.lock:
            self._begin(wanted)
            done = False
            try:
                yield self._pages(wanted)
                done = not self._coming
            finally:
                self._give_up()
            if done:
                self._look_ahead(wanted)

    def _begin(self, wanted: Sequence[StoredPage]) -> None:
        """Loads the first pages, as far as nobody has begun to."""
        ahead = [page for page, _ in self._coming]
        if self._pid != os.getpid() or any(a is not b for a, b in zip_longest(ahead, wanted[: len(ahead)])):
            self._give_up()
        size = max(page.nbytes for page in wanted)
        if not self._buffers or self._buffers[0].numel() < size:
            self._give_up()
            self._buffers = []  # let go of the old ones first
            with torch.inference_mode(False):
                self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(BUFFERS)]
        # What was given up and is being loaded still comes to its end before: one thread, one thing after the other.
        self._pid = os.getpid()
        for i in range(len(self._coming), min(BUFFERS, len(wanted))):
            self._coming.append((wanted[i], self._worker.submit(self._load, wanted[i], self._buffers[i])))

    def _pages(self, wanted: Sequence[StoredPage]) -> Iterator[Page]:
        for i in range(len(wanted)):
            begin = time.perf_counter()
            page = self._coming[0][1].result()
            self._coming.popleft()
            self.traffic.pages += 1
            self.traffic.nbytes += wanted[i].nbytes
            self.traffic.wait_seconds += time.perf_counter() - begin
            yield page
            if i + BUFFERS < len(wanted):
                coming = wanted[i + BUFFERS]
                self._coming.append((coming, self._worker.submit(self._load, coming, self._buffers[i % BUFFERS])))

    def _load(self, page: StoredPage, buffer: Tensor) -> Page:
        begin = time.perf_counter()
        loaded = page.load(buffer)
        self.traffic.load_seconds += time.perf_counter() - begin
        return loaded

    def _look_ahead(self, wanted: Sequence[StoredPage]) -> None:
        last = None if self._last is None else self._last()
        if last is not None:
            self._next[last] = [weakref.ref(page) for page in wanted[:BUFFERS]]
        self._last = weakref.ref(wanted[0])
        pages = [ref() for ref in self._next.get(wanted[0], ())]
        found = [page for page in pages if page is not None]
        if found and len(found) == len(pages):
            self._begin(found)

    def _give_up(self) -> None:
        for _, future in self._coming:
            future.cancel()
        self._coming.clear()
