"""Where pages live that don't fit into memory, and attention over them.

History that lives in a file is streamed in: while one page is computed over, a thread loads the next; each gives
a partial, and partials are merged in float32. On the CPU memory is the nearest place there is, so "host" means what
None means there.

A page's place is chosen once: a fixed share of each layer stays in memory. An LRU would do worse, because each decoded token
reads all pages in turn, and of what is read in turn an LRU throws out just what comes next: it would never hit, and
the fixed share hits as often as can be.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from .dense import Stored, loaded, page_to
from .formats import GROUP, Page
from .pagefile import PageFile, default_folder, free_bytes
from .stored import CacheDamaged, PageSource, Span, StoredPage
from .stream import BUFFERS, Stream, Traffic

__all__ = [
    "CacheDamaged",
    "PageFile",
    "PageSource",
    "Span",
    "Store",
    "StoredPage",
    "Traffic",
    "attention",
    "default_folder",
    "free_bytes",
]

PAGE_BYTES = 16 << 20
"""A stored page, at most: large enough that a disk reads at its full speed, small enough that buffers are."""
IN_FLIGHT = 256 << 20
"""Bytes that may wait to be written, at most: they are written while the next layer computes."""
_WAITING = 4 << 20
"""Bytes of partials that may wait for their merge."""
_BOUNDS = "_llama1m_bounds"
"""Attribute of bounds of rows on a GPU: their least and largest."""


class Store:
    """Where the full pages of one cache live: a share of each layer in memory, the rest in a temporary file.

    Args:
        budget: bytes of memory that all pages of the cache may take, with the buffers that the others are streamed through.
        folder: of the file, which is made when the first page goes there; None: where temporary files go.
        layers: of the cache.

    Attributes:
        page_bytes: of a page, at most.
        share: bytes of pages in memory, of each layer; its last page, which is still written to, counts too.
    """

    where: Literal["host", "disk"] = "disk"

    def __init__(self, budget: int, folder: str | None = None, layers: int = 1) -> None:
        # Half of the budget or so for what is no choice: each layer's last page, the buffers, what waits to be written.
        self.page_bytes = max(1, min(PAGE_BYTES, budget // (2 * (layers + 2 * BUFFERS))))
        in_flight = max(BUFFERS * self.page_bytes, min(IN_FLIGHT, budget // 8))
        self._begin(budget, layers, BUFFERS * self.page_bytes + in_flight)
        self.folder = folder
        self.file = PageFile(folder, in_flight)
        self.stream = Stream()

    def _begin(self, budget: int, layers: int, taken: int) -> None:
        """Shares what the buffers and others leave of the budget among the layers."""
        self.budget, self.layers = budget, layers
        self.share = max(0, budget - taken) // layers
        self._seen: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], int]] = weakref.WeakKeyDictionary()

    @property
    def traffic(self) -> Traffic:
        """What was streamed so far."""
        return self.stream.traffic

    def page_tokens(self, token_bytes: float) -> int:
        """Tokens of a page of at most `page_bytes`, a multiple of 64 (at least 64).

        Args:
            token_bytes: of one token's K and V, in one layer, all batch rows.
        """
        return max(GROUP, int(self.page_bytes / token_bytes) // GROUP * GROUP)

    def check_room(self, token_bytes: float, tokens: int) -> None:
        """Before work starts: is there room in the folder for what will not stay in memory?

        Args:
            token_bytes: of one token's K and V, in one layer, all batch rows.
            tokens: that the cache will have.

        Raises:
            OSError: no, or there is no such folder.
        """
        need = self.layers * (token_bytes * tokens - self.share)
        if need > 0:
            self.file.check_room(int(need))

    def place(self, pages: Sequence[Any]) -> Page | Stored:
        """A place for the last page of a layer, which is full: itself, or one elsewhere to be put in its place.

        Raises:
            OSError: as `settle`.
        """
        page = pages[-1]
        if type(page) is not Page or sum(p.nbytes for p in pages if type(p) is Page) <= self.share:
            return page
        return self.put(page)

    def put(self, page: Page) -> Stored:
        """The page where it lives from now on.

        Raises:
            OSError: as `settle`.
        """
        return self.file.put(page)

    def settle(self, layer: Any) -> None:
        """Gives each page of a layer that is not written to any more its place: the first ones stay in memory, as far as
        the layer's share goes.

        Args:
            layer: with `pages`, `settled` (so many of the first are not written to any more), `replace(index, page)` and
                `split(index, size)`.

        Raises:
            OSError: the disk is full, or the folder is not there. The pages are in memory then.
        """
        pages, end = layer.pages, layer.settled
        if not end:
            return
        last, count = self._seen.get(layer, (None, 0))
        if last is not None and last() is pages[end - 1] and count == len(pages):
            return  # nothing new: each decoded token comes here
        taken = sum(page.nbytes for page in pages[end:] if type(page) is Page)
        i = 0
        while i < layer.settled:
            page = layer.pages[i]
            if type(page) is Page:
                if taken + page.nbytes <= self.share:
                    taken += page.nbytes
                else:
                    size = self.page_tokens(page.nbytes / page.size)
                    if page.size > 2 * size:  # from a time without a store
                        layer.split(i, size)
                        continue
                    layer.replace(i, self.put(page))
            i += 1
        self._seen[layer] = weakref.ref(layer.pages[end - 1]), len(layer.pages)

    def flush(self) -> None:
        """Waits until all pages are where they belong.

        Raises:
            OSError: some page could not be written.
        """
        self.file.flush()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.budget, self.folder, self.layers)  # a copy of a cache has a file of its own


def attention(
    q: Tensor,
    layer: Any,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_start: int | None = None,
    kv_start: Tensor | int | None = None,
    kv_end: Tensor | int | None = None,
    kv_len: int | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.attention` over the pages of a cache's layer, wherever they live.

    Args:
        q: `[batch, q_heads, q_len, head_dim]`.
        layer: with `pages`, a list of `Page` and `StoredPage`, `length` tokens in use, and `store`, a `Store` or None.
        others: as in `ops.attention`; `kv_len` defaults to the layer's length.

    Returns:
        As `ops.attention`.

    Raises:
        CacheDamaged: a page's file is not what was written.
        OSError: reading failed.
        TypeError, ValueError: as `ops.attention`.
    """
    pages = layer.pages
    kv_len = layer.length if kv_len is None else kv_len
    if all(_is_near(page, q.device) for page in pages):
        # In memory, or seen through a map: the same bits as if nothing were stored.
        pages = [page.load() if type(page) is StoredPage else page for page in pages]
        return ops.attention(
            q,
            [page.k for page in pages],
            [page.v for page in pages],
            causal=causal,
            softmax_scale=softmax_scale,
            q_start=q_start,
            kv_start=kv_start,
            kv_end=kv_end,
            kv_len=kv_len,
            return_lse=return_lse,
            out_dtype=out_dtype,
        )
    q_start = kv_len - q.shape[2] if q_start is None else q_start
    view = _View(q.shape[2], causal, q_start, kv_start, kv_end, kv_len)
    total = _Sum(q)

    def add(part: Sequence[Page], at: int | None, tokens: int) -> None:
        """The partial of some pages; `at`: the position of the first token, None where every query sees them all."""
        seen: dict[str, Any] = {"causal": False, "q_start": 0}
        if at is not None:
            seen = {
                "causal": causal,
                "q_start": q_start - at,
                "kv_start": _shifted(kv_start, at, tokens),
                "kv_end": _shifted(kv_end, at, tokens),
            }
        out, lse = ops.attention(
            q,
            [page.k for page in part],
            [page.v for page in part],
            softmax_scale=softmax_scale,
            kv_len=tokens,
            return_lse=True,
            out_dtype=torch.float32,
            **seen,
        )
        total.add(out, lse)

    near, elsewhere = view.split(pages, q.device)
    far = [(page, at, tokens) for page, at, tokens in elsewhere if isinstance(page, StoredPage)]
    hosted = [(page, at, tokens) for page, at, tokens in elsewhere if not isinstance(page, StoredPage)]
    stream = _stream(layer, far)
    with stream.load([page for page, _, _ in far]) as coming:
        begin = time.perf_counter()
        for part, at, tokens in near:
            add(part, at, tokens)
        stream.traffic.compute_seconds += time.perf_counter() - begin
        for (_, at, tokens), page in zip(far, coming, strict=True):
            begin = time.perf_counter()
            add([page_to(page, q.device)], at, tokens)
            stream.traffic.compute_seconds += time.perf_counter() - begin
    if hosted:  # of a GPU's layer: given to the GPU, and not waited for
        pinned = [page for page, _, _ in hosted]
        for (_, at, tokens), page in zip(hosted, pinned[0].lane.load(pinned), strict=True):
            add([page], at, tokens)
    out, lse = total.result()
    out = out.to(out_dtype or q.dtype)
    return (out, lse) if return_lse else out


def _stream(layer: Any, far: Sequence[tuple[StoredPage, int | None, int]]) -> Stream:
    """The buffers to stream through: of the layer's store, or of the file that its first page lies in."""
    found: Stream | None = getattr(getattr(layer, "store", None), "stream", None)
    if found is not None:
        return found
    if not far:
        return Stream()
    source = far[0][0].source
    if source.stream is None:
        source.stream = Stream()
    return source.stream


class _View:
    """Which pages a call's queries see."""

    def __init__(
        self,
        q_len: int,
        causal: bool,
        q_start: int,
        kv_start: Tensor | int | None,
        kv_end: Tensor | int | None,
        kv_len: int,
    ) -> None:
        first, all_from = (0, 0) if kv_start is None else _bounds(kv_start)
        all_to, last = (kv_len, kv_len) if kv_end is None else _bounds(kv_end)
        if causal:
            last, all_to = min(last, q_start + q_len), min(all_to, q_start + 1)
        self.kv_len = kv_len
        self.seen = max(first, 0), min(last, kv_len)  # by any query of any row
        self.by_all = all_from, all_to

    def split(
        self, pages: Sequence[Page | Stored], device: torch.device
    ) -> tuple[list[tuple[list[Page], int | None, int]], list[tuple[Any, int | None, int]]]:
        """What is seen: (runs of pages in memory, pages that live elsewhere), each with its position and its tokens.

        The position is None where every query sees every key: then order is nothing, and they all make one run.
        """
        runs: list[tuple[list[Page], int | None, int]] = []
        anywhere: list[Page] = []
        anywhere_tokens = 0
        far: list[tuple[Any, int | None, int]] = []
        a = next_at = 0
        for page in pages:
            at, a = a, a + page.size
            b = min(a, self.kv_len)
            if at >= self.seen[1]:
                break
            if b <= self.seen[0]:
                continue
            by_all = self.by_all[0] <= at and b <= self.by_all[1]
            if not _is_near(page, device):
                far.append((page, None if by_all else at, b - at))
                continue
            here = loaded(page)
            if by_all:
                anywhere.append(here)  # the one that is not full, if any, is the last
                anywhere_tokens += b - at
            elif runs and next_at == at:
                run, start, tokens = runs[-1]
                runs[-1] = [*run, here], start, tokens + b - at
                next_at = b
            else:
                runs.append(([here], at, b - at))
                next_at = b
        if anywhere:
            runs.append((anywhere, None, anywhere_tokens))
        return runs, far


def _is_near(page: Page | Stored, device: torch.device) -> bool:
    """Whether a page can be computed over where it is."""
    if isinstance(page, StoredPage):
        return page.at_hand and device.type == "cpu"
    return isinstance(page, Page)


def _bounds(x: Tensor | int) -> tuple[int, int]:
    """The least and the largest."""
    if not isinstance(x, Tensor):
        return x, x
    known: tuple[int, int] | None = getattr(x, _BOUNDS, None)
    if known is None:
        known = tuple(torch.stack(x.aminmax()).tolist())  # type: ignore[assignment]  # two of them
        if x.device.type != "cpu":
            setattr(x, _BOUNDS, known)  # all layers of a call ask, and each answer would wait for the GPU
    return known


def _shifted(x: Tensor | int | None, at: int, tokens: int) -> Tensor | int | None:
    if x is None:
        return None
    return (x - at).clamp(0, tokens) if isinstance(x, Tensor) else min(max(x - at, 0), tokens)


class _Sum:
    """Partials, merged as they come, so that few are alive."""

    def __init__(self, q: Tensor) -> None:
        self.q = q
        self.outs: list[Tensor] = []
        self.lses: list[Tensor] = []

    def add(self, out: Tensor, lse: Tensor) -> None:
        self.outs.append(out)
        self.lses.append(lse)
        if len(self.outs) > 1 and len(self.outs) * out.numel() * out.element_size() > _WAITING:
            self._merge()

    def _merge(self) -> None:
        out, lse = ops.merge_partials(self.outs, self.lses)
        self.outs, self.lses = [out], [lse]

    def result(self) -> tuple[Tensor, Tensor]:
        if not self.outs:  # every key is hidden
            batch, heads, length, _ = self.q.shape
            out = torch.zeros_like(self.q.transpose(1, 2), dtype=torch.float32).transpose(1, 2)
            return out, torch.full((batch, heads, length), -torch.inf, device=out.device)
        if len(self.outs) > 1:
            self._merge()
        return self.outs[0], self.lses[0]
