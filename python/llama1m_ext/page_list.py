"""Keys and values of one layer as a list of pages: appended to in place, cut, shared, taken back.

`sealed.SealedList` adds what becomes of tokens that are no longer new, `pages.PagedLayer` the face of transformers'
`DynamicLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from .dense import Kind, Scratch, Stored, indexable, is_dense, loaded, new_page, part_of, with_rows
from .formats import GROUP, MODEL, KvFormat, Page, rounded
from .limit import Limit

if TYPE_CHECKING:
    from typing_extensions import Self

PageSize = int | Literal["auto"]
ROUND = 128
"""Automatic pages are a multiple of this many tokens."""


class PageList:
    """Pages of keys and values, in order. The first `length` tokens are in use; what lies beyond is memory that nobody
    has written or may read. Every page but the last is full.

    A `Page` in the list is never changed, and a token in use stays where it was written. So a list of pages and a length
    stay valid whatever is appended later (`snapshot`).

    Args:
        page_size: tokens of a page, or "auto": the first page has the prompt and 6% of room, later ones an eighth of
            the length, so that pages stay few and at most about 12% is unused. Compact pages round it up to 64.
        kv: the format, or None: not decided yet, and dense until it is (`decide`).

    Attributes:
        pages: `Page`s, and what stands for those that live elsewhere (`Stored`).
        length: tokens in use.
        capacity: tokens that the pages have room for.
        kind: shapes and dtypes, once something is there.
        limit: what the pages of all layers may take, or None: whatever there is.
    """

    def __init__(self, page_size: PageSize = "auto", kv: KvFormat | None = None, **kwargs: Any) -> None:
        self.page_size = page_size
        self.pages: list[Page | Stored] = []
        self.length = 0
        self.capacity = 0
        self.kind: Kind | None = None
        self.limit: Limit | None = None
        self._kv = kv
        self._expected = 0
        # So many of the first tokens belong to somebody else, or somebody holds a view of them: what is written there
        # must not change under its holder.
        self._lent = 0
        # The compact page that is not full yet, with all its room: the last compact one in `pages` is a view of it.
        self._open: Page | None = None
        self._scratch: Scratch | None = None
        self._borrowed = False
        super().__init__(**kwargs)

    @classmethod
    def of_pages(
        cls,
        pages: Sequence[Page | Stored],
        length: int,
        kv: KvFormat | None = None,
        page_size: PageSize = "auto",
        kind: Kind | None = None,
    ) -> Self:
        """A list of somebody else's pages (a file's, another cache's), which are never written to.

        Args:
            pages: in order, with at least `length` tokens.
            kind: of the keys and values; default: as the first page, which must be dense then.

        Raises:
            ValueError: too few tokens, or no dense page to tell the kind from.
        """
        made = cls(page_size, kv)
        made.begin_with(pages, length, kind)
        return made

    def begin_with(self, pages: Sequence[Page | Stored], length: int, kind: Kind | None = None) -> None:
        """Somebody else's pages, which are never written to, are the first tokens of a list that has none yet.

        Args, Raises:
            As `of_pages`.
        """
        total = sum(page.size for page in pages)
        if not 0 <= length <= total:
            raise ValueError(f"length: expected 0 to {total}, the tokens of the pages, got {length}")
        self.pages = list(pages)
        self.capacity, self.length = total, length
        self._close()
        if kind is None and self.pages:
            first = loaded(self.pages[0])
            if not is_dense(first):
                raise ValueError("kind: expected it to be given where the first page is compact, got None")
            kind = Kind.of(first.k, first.v)
        if kind is not None:
            self._note(kind)
        self._lent = length

    # -- the format --------------------------------------------------------------------------------------------------

    @property
    def format(self) -> KvFormat:
        """The format of what is kept; the model's own as long as nothing is decided."""
        return self._kv or MODEL

    @property
    def decided(self) -> bool:
        """Whether the format is set."""
        return self._kv is not None

    def decide(self, kv: KvFormat) -> None:
        """Sets the format, unless it is set already. What is there becomes compact at the next `seal`."""
        if self._kv is None:
            self._kv = kv

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pages take, room included; those that live elsewhere count nothing."""
        here = [page for page in self.pages if isinstance(page, Page)]
        total = sum(page.nbytes for page in here)
        if self._open is not None:
            total += self._open.nbytes - next(page.nbytes for page in reversed(here) if not is_dense(page))
        return total

    # -- appending -----------------------------------------------------------------------------------------------------

    def expect(self, length: int, scratch: Scratch | None = None) -> None:
        """Says how many tokens there will be soon, so that the next page is made large enough.

        Args:
            scratch: where a compact format keeps them dense until `seal`.
        """
        self._expected = length
        self._scratch = scratch

    def fits(self, k: Tensor, v: Tensor) -> bool:
        """Whether k and v `[batch, kv_heads, n, head_dim]` can be written beside what is there."""
        return not self.pages or self.kind == Kind.of(k, v)

    def slots(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Room for the next tokens, in shapes like k and v: views to be written, in order. `commit` makes them count.

        Args:
            k, v: `[batch, kv_heads, n, head_dim]`, read for shape, dtype and device only.
        """
        n = k.shape[2]
        if self.capacity - self.length < n:
            self._settle()
            if not self.pages:
                self._note(Kind.of(k, v))
            self._grow(n, k, v)
        end, at = self.length + n, self.capacity
        found: list[tuple[Tensor, Tensor]] = []
        for page in reversed(self.pages):
            at -= page.size
            if at < end:
                a, b = max(self.length - at, 0), min(end - at, page.size)
                assert isinstance(page, Page)  # only dense pages have room
                slot = page.narrow(a, b)
                found.append((slot.k, slot.v))  # type: ignore[arg-type]
            if at <= self.length:
                break
        found.reverse()
        return found

    def commit(self, n: int) -> None:
        """The next n tokens are written."""
        self.length += n

    def append(self, k: Tensor, v: Tensor) -> None:
        """Writes the next tokens, `[batch, kv_heads, n, head_dim]`, as they are."""
        at = 0
        for k_slot, v_slot in self.slots(k, v):
            n = k_slot.shape[2]
            k_slot.copy_(k[:, :, at : at + n])
            v_slot.copy_(v[:, :, at : at + n])
            at += n
        self.commit(at)

    def _grow(self, n: int, k: Tensor, v: Tensor) -> None:
        """Makes room for n more tokens.

        Raises:
            DoesNotFit: the limit has none. Nothing has changed then.
        """
        need = max(self.length + n, self._expected) - self.capacity
        if self.page_size == "auto":
            size = rounded(need + spare(need + self.capacity, not self.pages), ROUND)
        else:
            need = self.length + n - self.capacity
            size = rounded(need, self.page_size)
        if self.limit is not None:
            size = self.limit.tokens(size, need, self.nbytes, dense_bytes(k, v))
        step = size if self.page_size == "auto" else self.page_size
        for at in range(0, size, step):
            self.pages.append(new_page(MODEL, min(step, size - at), k, v))
            self.capacity += self.pages[-1].size

    # -- forgetting, sharing -------------------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on."""
        if length >= self.length:
            return
        self.length = max(0, length)
        self._trim()
        if self.capacity > self.length:
            last = self.pages[-1]
            if not is_dense(last):
                # A group that is not whole can't be gone on with: it stays as it is, and what follows goes elsewhere.
                whole = (self.length - (self.capacity - last.size)) % GROUP == 0
                if self.length < self._lent or not whole:
                    self._open = None
                if not isinstance(last, Page):
                    self._lent = self.length  # a file's memory, to be read only
                self._close()
            elif self.length < self._lent:
                self._close()
        self._lent = min(self._lent, self.length)

    def _trim(self) -> None:
        """Drops pages that have no token in use."""
        while self.pages and self.capacity - self.pages[-1].size >= self.length:
            page = self.pages.pop()
            self.capacity -= page.size
            if not is_dense(page):
                self._open = None  # of which it was a view, if there was one

    def _close(self) -> None:
        """Cuts off what has no token in use, so that what comes next is written elsewhere."""
        self._trim()
        if self.capacity > self.length:
            last = self.pages[-1]
            self.pages[-1] = part_of(last, 0, last.size - (self.capacity - self.length))
            self.capacity = self.length

    def share(self, length: int) -> list[Page | Stored]:
        """The first `length` tokens, for somebody else to read: views, which nothing is written to from now on.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, the tokens there are, got {length}")
        self._settle()
        self._lent = max(self._lent, length)
        return self._used(length)

    def _used(self, length: int) -> list[Page | Stored]:
        """Views of the first `length` tokens."""
        at = 0
        found: list[Page | Stored] = []
        for page in self.pages:
            if at >= length:
                break
            found.append(part_of(page, 0, min(page.size, length - at)))
            at += page.size
        return found

    @property
    def settled(self) -> int:
        """So many of the first pages are full, and not written to any more: they may be moved elsewhere (`replace`)."""
        return len(self.pages) - (bool(self.pages) and self.capacity > self.length)

    def replace(self, index: int, page: Page | Stored) -> None:
        """Puts a page with the same tokens in the place of a settled one: where it lives now.

        Raises:
            ValueError: that page is still written to, or is of another size.
        """
        if not 0 <= index < self.settled:
            raise ValueError(f"index: expected 0 to {self.settled - 1}, the settled pages, got {index}")
        if page.size != self.pages[index].size:
            raise ValueError(f"page: expected {self.pages[index].size} tokens, got {page.size}")
        if not any(not is_dense(later) for later in self.pages[index + 1 :]):
            self._open = None
        self.pages[index] = page

    def split(self, index: int, size: int) -> None:
        """Cuts a settled page into pages of `size` tokens, a multiple of 64: views of its memory."""
        page = self.pages[index]
        self.replace(index, page)  # which checks, and closes it
        self.pages[index : index + 1] = [part_of(page, a, min(a + size, page.size)) for a in range(0, page.size, size)]

    def snapshot(self) -> dict[str, Any]:
        """The present state, for `restore`: valid until tokens that it has are forgotten, or rows are reordered."""
        return {**self.__dict__, "pages": list(self.pages)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Everything as it was at that snapshot, which may be used again."""
        lent = self._lent
        if self._borrowed and self._scratch is not None:
            self._scratch.give_back()
        self.__dict__.clear()
        self.__dict__.update(snapshot, pages=list(snapshot["pages"]))
        if lent > self.length:
            # Somebody holds what was written after the snapshot, in the same memory.
            self._close()
            self._open = None
        self._lent = max(self._lent, min(lent, self.length))

    def take_rows(self, rows: Sequence[int]) -> None:
        """Batch row i becomes what row `rows[i]` was. Rows that stay where they are cost nothing."""
        self._settle()
        if not self.length or self.kind is None:
            return
        batch = self.kind.batch
        rows = [range(batch)[row] for row in rows]  # as index_select: IndexError for a row that is not there
        moved = [i for i, row in enumerate(rows) if i != row]
        if len(rows) == batch and not moved:
            return
        self._trim()
        same_shape = len(rows) == batch
        start = 0
        for i, page in enumerate(self.pages):
            used = min(page.size, self.length - start)
            if same_shape and start >= self._lent and isinstance(page, Page):
                for t in indexable(page, used):
                    t[moved] = t[[rows[j] for j in moved]]
            else:
                self.pages[i] = with_rows(page, rows, used) if isinstance(page, Page) else page.with_rows(rows)
                if not is_dense(page):
                    self._open = None
            start += page.size
        self._lent = 0
        self._note(self.kind._replace(batch=len(rows)))

    # -- for subclasses --------------------------------------------------------------------------------------------------

    def _note(self, kind: Kind) -> None:
        """The kind of what is kept is known."""
        self.kind = kind

    def _settle(self) -> None:
        """Before anything is done with the pages."""


def dense_bytes(k: Tensor, v: Tensor) -> int:
    """Bytes of a token in keys and values like k and v `[batch, kv_heads, n, head_dim]`."""
    return sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (k, v))


def spare(total: int, first: bool) -> int:
    """Tokens that an automatic page has room for beyond what is known to come."""
    return max(ROUND, total // (16 if first else 8))
