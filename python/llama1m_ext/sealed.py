"""What becomes of a layer's tokens that are no longer new: compact pages, and pages elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import ops
from .dense import Kind, Stored, gathered, groups, is_dense, loaded, new_page, page_like, pieces
from .formats import GROUP, MODEL, KvFormat, Page, rounded
from .page_list import PageList, PageSize, dense_bytes, spare

if TYPE_CHECKING:
    from .offload import Store

SINK = GROUP
"""So many of the first tokens always stay dense: attention leans on them, whatever the text (2309.17453)."""
KEPT = GROUP
"""So many of the newest tokens stay dense, at least."""
TAIL = KEPT + 4 * GROUP
"""Tokens of a tail: the dense page at the end of a layer in a compact format."""


class SealedList(PageList):
    """A `PageList` whose tokens are dense as long as they are new.

    In the model's own format they are appended to the last page, and that is all. In a compact one they go into dense
    memory at the end, and `seal` makes them compact once there are enough of them, all but the newest: so there is a
    dense page of 64 tokens, compact ones, and a dense tail. With a `store`, pages that are not written to any more go
    where it says.

    Args:
        page_size, kv: as `PageList`.

    Attributes:
        store: where full pages live, or None: in memory.
    """

    def __init__(self, page_size: PageSize = "auto", kv: KvFormat | None = None, **kwargs: Any) -> None:
        self.store: Store | None = None
        super().__init__(page_size, kv, **kwargs)

    def keep_in(self, store: Store) -> None:
        """From now on pages go where the store says, those that are there already at the next `seal`."""
        self.store, self._open = store, None
        if not self._compact and self.pages:
            last = self.pages[-1]
            if isinstance(last, Page) and last.nbytes > store.page_bytes:
                self._close()  # too large to wait until it is full

    @property
    def _compact(self) -> bool:
        return not self.format.is_model and self.kind is not None and self.kind.can_be_compact

    @property
    def settled(self) -> int:
        if not self._compact:
            return super().settled
        index = self._run()[0]
        has_room = self._open is not None and self._open.size > self.pages[index - 1].size
        return index - has_room

    def seal(self) -> None:
        """To be called when a call is done with the layer: where enough dense tokens are at the end (`TAIL`, or what a
        prefill left there), all but the newest become compact, and borrowed memory is given back.

        Raises:
            OSError: the store can't take a page. All of them are in memory then.
            DoesNotFit: the limit has no room for a page.
        """
        if self._compact:
            self._seal()
        elif self._borrowed:
            self._spread()
        self._scratch, self._expected = None, 0
        if self.store is not None:
            self.store.settle(self)

    def parts(self) -> list[tuple[Page | Stored, int]]:
        """The tokens in use, page by page, each with the number of tokens that the page has room for."""
        rooms = [page.size for page in self.pages]
        if self._open is not None:
            rooms[self._run()[0] - 1] = self._open.size
        return list(zip(self._used(self.length), rooms, strict=False))

    def refill(self, kept: int, parts: Iterable[tuple[Page | Stored, int]], kind: Kind) -> None:
        """Puts copies of pages in the place of all but the first ones, each with room for more as it had.

        Args:
            kept: so many of the first pages stay.
            parts: what `parts()` gave, from there on.
            kind: of all keys and values.

        Raises:
            OSError, CacheDamaged: a page can't be read, or the store can't take one.
        """
        pages, opened = self.pages[:kept], None
        length = sum(page.size for page in pages)
        for part, room in parts:
            source = loaded(part)
            page = page_like(source, room, kind)
            used = page.narrow(0, source.size)
            for name, tensor in source.tensors().items():
                used.tensors()[name].copy_(tensor)
            if not is_dense(page):
                opened = page if room > source.size else None
            pages.append(page if is_dense(page) else used)
            length += source.size
            if self.store is not None and room == source.size:
                pages[-1] = self.store.place(pages)
        self._note(kind)
        self.length = length
        self._sealed(pages, opened)
        if self.store is not None:
            self.store.settle(self)

    def _grow(self, n: int, k: Tensor, v: Tensor) -> None:
        if not self._compact:
            need = max(n, self._expected - self.length)
            if self.store is None:
                super()._grow(n, k, v)
            elif self.capacity + self._bounded(k, v) >= self.length + need:
                self.pages.append(new_page(MODEL, self._bounded(k, v), k, v))
                self.capacity += self.pages[-1].size
            else:
                self._borrow(need, k, v)
            return
        # A tail with room for all of them; or, where they are too many, dense memory until they are compact.
        self._close()
        index, start = self._run()
        used, need = self.length - start, max(n, self._expected - self.length)
        size = _tail_size(start)
        if used + need <= size:
            if self.limit is not None and self.store is None:
                taken = _memory(self.pages[:index])
                self.limit.tokens(size, size, taken, dense_bytes(k, v))
            run: Any = self.pages[index:]
            self.pages[index:] = [gathered(run, 0, used, size) if run else new_page(MODEL, size, k, v)]
            self.capacity = start + size
            self._lent = min(self._lent, start)
        else:
            self._borrow(need, k, v)

    def _borrow(self, n: int, k: Tensor, v: Tensor) -> None:
        """Room for n tokens until `seal`, in memory that the next layer may use again."""
        self._close()
        page = new_page(MODEL, n, k, v) if self._scratch is None else self._scratch.take(n, k, v)
        self._borrowed = True
        self.pages.append(page)
        self.capacity += n

    def _seal(self) -> None:
        index, start = self._run()
        used = self.length - start
        if used < _tail_size(start) and not self._borrowed:
            return
        self._close()
        run: Any = self.pages[index:]
        pages, opened = self.pages[:index], self._open
        sink = max(0, SINK - start)
        n = max(0, used - sink - KEPT) // GROUP * GROUP
        done = 0
        if n:
            if sink:
                # Memory of its own: a view would keep the whole prompt's.
                pages.append(gathered(run, 0, sink, sink))
                opened = None
            done = sink + n
            opened = self._append_pages(self.format, pages, opened, run, sink, done)
        if run:
            pages.append(gathered(run, done, used, _tail_size(start + done)))
        self._sealed(pages, opened)
        self._lent = min(self._lent, start)  # what came after lies elsewhere now

    def _spread(self) -> None:
        """In the model's own format with a store: borrowed memory becomes pages of the size that the store wants."""
        self._close()
        run: Any = self.pages[-1:]
        pages = self.pages[:-1]
        self._append_pages(MODEL, pages, None, run, 0, run[0].size)
        self._sealed(pages, None)
        self._lent = min(self._lent, self.length - run[0].size)

    def _sealed(self, pages: list[Page | Stored], opened: Page | None) -> None:
        # Only now, when nothing can fail any more.
        self.pages, self._open = pages, opened
        self.capacity = sum(page.size for page in pages)
        if self._borrowed and self._scratch is not None:
            self._scratch.give_back()
        self._borrowed = False

    def _append_pages(
        self,
        kv: KvFormat,
        pages: list[Page | Stored],
        page: Page | None,
        run: Sequence[Page],
        start: int,
        end: int,
    ) -> Page | None:
        """Appends tokens `start` to `end` of a dense run to the list, in pages of a format. Returns the one with room.

        Args:
            page: the page with room, of which the last one in `pages` is a view; or None.
        """
        used = 0 if page is None else pages[-1].size
        for k, v in pieces(run, start, end) if kv.is_model else groups(run, start, end):
            at = 0
            while at < k.shape[2]:
                if page is None or used == page.size:
                    page, used = new_page(kv, self._next_size(pages, end - start, k, v), k, v), 0
                    pages.append(page)
                n = min(k.shape[2] - at, page.size - used)
                ops.kv_append(k[:, :, at : at + n], v[:, :, at : at + n], page, used)
                at, used, start = at + n, used + n, start + n
                # A dense page keeps its room in the list, where the next tokens are written.
                pages[-1] = page if kv.is_model else page.narrow(0, used)
                if used == page.size and self.store is not None:
                    # At once, so that what goes to a file is never all in memory beside the run.
                    pages[-1], page = self.store.place(pages), None
        return page

    def _next_size(self, pages: Sequence[Page | Stored], n: int, k: Tensor, v: Tensor) -> int:
        """Tokens of the next page that is made of old tokens, of which there are n."""
        if self.page_size == "auto":
            size = n + spare(max(self.length, self._expected), all(map(is_dense, pages)))
        else:
            size = self.page_size
        size = rounded(size, GROUP)
        if self.store is not None:
            return min(size, self._bounded(k, v))
        if self.limit is not None:
            batch, heads, _, head_dim = k.shape
            each = batch * self.format.token_bytes(heads, head_dim, k.element_size())
            taken = _memory(pages) + TAIL * dense_bytes(k, v)
            size = self.limit.tokens(size, n, taken, each, GROUP)
        return size

    def _bounded(self, k: Tensor, v: Tensor) -> int:
        """Tokens of a page that the store takes, a multiple of 64."""
        assert self.store is not None
        batch, heads, _, head_dim = k.shape
        return self.store.page_tokens(batch * self.format.token_bytes(heads, head_dim, k.element_size()))

    def _run(self) -> tuple[int, int]:
        """Where the dense pages at the end begin: (index in `pages`, token)."""
        index, start = len(self.pages), self.capacity
        while index and is_dense(self.pages[index - 1]):
            index -= 1
            start -= self.pages[index].size
        return index, start


def _memory(pages: Sequence[Page | Stored]) -> int:
    """Bytes of those pages that are in memory."""
    return sum(page.nbytes for page in pages if isinstance(page, Page))


def _tail_size(start: int) -> int:
    """Tokens of a tail that begins at token `start`: the first tokens of all stay with it until it is full."""
    return TAIL + max(0, SINK - start)
