"""Pages of a model on a GPU that live in main memory: pinned, and copied to the GPU while it computes over others.

Nothing here waits for the GPU but `HostPage.load`, for whoever wants a page on the host. Copies have a stream of their
own, and two buffers on the GPU: one is filled while the other is computed over, and events say when.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .formats import Page, rounded
from .memory import available_bytes
from .offload import Store
from .plan_choice import DoesNotFit, gib
from .stored import page_of
from .stream import Traffic

ALIGN = 256
"""Tensors of a page begin at a multiple of so many bytes, as torch's own on a GPU do."""
PAGE_BYTES = 64 << 20
"""A page on the host, at most: large enough that a copy reaches the link's full speed."""
SLAB = 256 << 20
"""Bytes that are pinned at a time: torch rounds what is pinned up to a power of two."""
BUFFERS = 2


class _Part(NamedTuple):
    """Where a tensor of a page lies in the page's memory."""

    name: str
    at: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Slabs:
    """Main memory in pieces that are given again when nobody has them any more.

    Args:
        pinned: so that a GPU copies from it by itself.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.nbytes = 0
        self._rest: Tensor | None = None
        self._free: dict[int, list[Tensor]] = {}

    def take(self, nbytes: int) -> _Room:
        """So many bytes, not initialised."""
        free = self._free.setdefault(nbytes, [])
        if free:
            return _Room(free.pop(), free)
        if self._rest is None or self._rest.numel() < nbytes:
            size = SLAB if nbytes <= SLAB else 1 << (nbytes - 1).bit_length()
            with torch.inference_mode(False):
                self._rest = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
            self.nbytes += size
        memory, self._rest = self._rest[:nbytes], self._rest[nbytes:]
        return _Room(memory, free)


class _Room:
    """A piece of a slab, free for another page when nothing refers to it any more."""

    __slots__ = ("free", "memory")

    def __init__(self, memory: Tensor, free: list[Tensor]) -> None:
        self.memory, self.free = memory, free

    def __del__(self) -> None:
        self.free.append(self.memory)


class Lane:
    """Copies between main memory and one device, in an order of their own.

    Args:
        device: a GPU; or the CPU, where copies are done at once, for tests.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.traffic = device, Traffic()
        self.slabs = Slabs(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor] = []
        # When what computed over a buffer is done with it.
        self._done: list[Any] = [None] * BUFFERS

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on the device."""
        return sum(b.numel() for b in self._buffers)

    def put(self, page: Page) -> HostPage:
        """A copy of a page on the host. The page itself may be forgotten at once."""
        parts, at = list[_Part](), 0
        for name, tensor in page.tensors().items():
            nbytes = tensor.numel() * tensor.element_size()
            parts.append(_Part(name, at, nbytes, tensor.dtype, tuple(tensor.shape)))
            at += rounded(nbytes, ALIGN)
        room = self.slabs.take(at)
        sources = [tensor.detach().contiguous() for tensor in page.tensors().values()]  # strided copies would wait
        with self._after_current():
            for part, source in zip(parts, sources, strict=True):
                into = room.memory[part.at : part.at + part.nbytes]
                into.copy_(source.reshape(-1).view(torch.uint8), non_blocking=True)
                if self._stream is not None:
                    source.record_stream(self._stream)
            copied = self._mark()
        return HostPage(_Record(self, room, tuple(parts), copied, page.size))

    def load(self, wanted: Sequence[HostPage]) -> Iterator[Page]:
        """Brings pages to the device, in their order. A page is good until the next one is asked for: for what is given
        to the current stream by then."""
        size = max((page.nbytes for page in wanted), default=0)
        if not self._buffers or self._buffers[0].numel() < size:
            self._make_buffers(size)
        coming = [self._copy(page, i) for i, page in enumerate(wanted[:BUFFERS])]
        for i, page in enumerate(wanted):
            buffer = i % BUFFERS
            self._wait_here(coming[i])
            self.traffic.pages += 1
            self.traffic.nbytes += page.nbytes
            try:
                yield page.over(self._buffers[buffer])
            finally:
                self._done[buffer] = self._mark_here()
            if i + BUFFERS < len(wanted):
                coming.append(self._copy(wanted[i + BUFFERS], buffer))

    def _make_buffers(self, size: int) -> None:
        self._buffers = []  # let go of the old ones first
        with torch.inference_mode(False):
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(BUFFERS)]
        for buffer in self._buffers:
            if self._stream is not None:
                buffer.record_stream(self._stream)  # whoever drops them, nobody gets them while a copy is under way
        # Whoever had this memory before may still be at work with it.
        self._done = [self._mark_here()] * BUFFERS

    def _copy(self, page: HostPage, buffer: int) -> Any:
        record = page._record
        if self._stream is None:
            self._buffers[buffer][: record.nbytes].copy_(record.room.memory)
            return None
        with torch.cuda.stream(self._stream):
            for event in (self._done[buffer], record.copied):
                if event is not None:
                    self._stream.wait_event(event)
            self._buffers[buffer][: record.nbytes].copy_(record.room.memory, non_blocking=True)
            return self._mark()

    @contextlib.contextmanager
    def _after_current(self) -> Iterator[None]:
        """In the lane's stream, after what was given to the current one."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def _mark(self) -> Any:
        return None if self._stream is None else self._stream.record_event()

    def _mark_here(self) -> Any:
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def _wait_here(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class _Record(NamedTuple):
    """What all parts of one page share."""

    lane: Lane
    room: _Room
    parts: tuple[_Part, ...]
    copied: Any
    size: int

    @property
    def nbytes(self) -> int:
        return self.room.memory.numel()


class HostPage:
    """A page in main memory, of a layer whose device is a GPU. It never changes, so copies of it are itself; it pickles as
    the page in memory.

    Attributes:
        size: tokens.
    """

    __slots__ = ("__weakref__", "_record", "_rows", "size", "start")

    def __init__(self, record: _Record) -> None:
        self._record, self.start, self.size = record, 0, record.size
        self._rows: list[int] | None = None

    @property
    def lane(self) -> Lane:
        """Which it comes through."""
        return self._record.lane

    @property
    def nbytes(self) -> int:
        """Bytes on the host, and the least size of a buffer."""
        return self._record.nbytes

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of its tensors, by their names in `Page.tensors()`."""
        return {part.name: part.dtype for part in self._record.parts}

    def load(self) -> Page:
        """The page in main memory, a copy: the room may be another page's once nobody has this one. Waits until it is there."""
        if self._record.copied is not None:
            self._record.copied.synchronize()
        return self.over(self._record.room.memory.clone())

    def over(self, memory: Tensor) -> Page:
        """The page as views of memory that has all of its bytes, uint8 `[at least nbytes]`."""
        page = page_of({
            part.name: memory[part.at : part.at + part.nbytes].view(part.dtype).view(part.shape)
            for part in self._record.parts
        })  # fmt: skip
        if self.size != self._record.size:
            page = page.narrow(self.start, self.start + self.size)
        if self._rows is not None:
            # Not by its dtype: torch can't index all of them.
            rows = torch.tensor(self._rows).to(memory.device, non_blocking=True)
            page = page_of({
                name: tensor.view(torch.uint8).index_select(0, rows).view(tensor.dtype)
                for name, tensor in page.tensors().items()
            })  # fmt: skip
        return page

    def narrow(self, start: int, end: int) -> HostPage:
        """Tokens `start` to `end` of it; `start` a multiple of 64 where keys are compact. All of it is still copied."""
        if not 0 <= start <= end <= self.size:
            raise ValueError(f"start, end: expected 0 <= start <= end <= {self.size}, got {start} and {end}")
        return self._part(self.start + start, end - start, self._rows)

    def with_rows(self, rows: list[int]) -> HostPage:
        """It with these batch rows in the place of its own, which are picked on the GPU each time."""
        return self._part(self.start, self.size, rows if self._rows is None else [self._rows[row] for row in rows])

    def _part(self, start: int, size: int, rows: list[int] | None) -> HostPage:
        made = HostPage(self._record)
        made.start, made.size, made._rows = start, size, rows
        return made

    def __copy__(self) -> HostPage:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HostPage:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        page = page_of({name: tensor.clone() for name, tensor in self.load().tensors().items()})
        return Page, (page.k, page.v)

    def __repr__(self) -> str:
        return f"HostPage({self.size} tokens, {self.nbytes} bytes)"


class HostStore(Store):
    """Where the full pages of the layers on one GPU live: a share of each layer there, the rest in main memory.

    Args:
        budget: bytes of the GPU's memory that all these pages may take, with the buffers that the others come through.
        layers: on that GPU.
    """

    where: Literal["host", "disk"] = "host"

    def __init__(self, budget: int, layers: int = 1) -> None:
        self.page_bytes = max(1, min(PAGE_BYTES, budget // (2 * (layers + 2 * BUFFERS))))
        self._begin(budget, layers, BUFFERS * self.page_bytes)
        self._lane: Lane | None = None
        self._put_bytes = 0

    @property
    def traffic(self) -> Traffic:
        """What came to the GPU so far: pages and bytes; when, the host doesn't know."""
        return Traffic() if self._lane is None else self._lane.traffic

    def check_room(self, token_bytes: float, tokens: int) -> None:
        """Before work starts: is there room in main memory for what will not stay on the GPU?

        Args, Raises:
            As `Store.check_room`, but `DoesNotFit`.
        """
        need = int(self.layers * (token_bytes * tokens - self.share)) - self._put_bytes
        room = available_bytes()
        if room is not None and need > room:
            raise DoesNotFit(
                f'offload="host": {gib(need)} of pages are to live in main memory, and {gib(room)} are available. Nothing '
                'was computed. Expected fewer tokens, a smaller format (kv="int4"), or offload="disk".',
                need,
                room,
            )

    def put(self, page: Page) -> HostPage:
        """The page in main memory."""
        if self._lane is None:
            self._lane = Lane(next(iter(page.tensors().values())).device)
        made = self._lane.put(page)
        self._put_bytes += made.nbytes
        return made

    def flush(self) -> None:
        """Nothing is to be waited for: whoever loads a page waits for it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return HostStore, (self.budget, self.layers)
