"""Pages' memory: made, read in runs of tokens, copied by batch rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from .formats import GROUP, MODEL, Compact, KvFormat, Page, Side, empty, name_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Stored(Protocol):
    """A page that lives elsewhere, as `stored.StoredPage`. It is full, and nobody writes to it."""

    @property
    def size(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def dtypes(self) -> dict[str, torch.dtype]: ...

    def load(self) -> Page: ...

    def narrow(self, start: int, end: int) -> Stored: ...

    def with_rows(self, rows: list[int]) -> Stored: ...


class Kind(NamedTuple):
    """What all keys and values of a layer have in common."""

    batch: int
    kv_heads: int
    k_dim: int
    v_dim: int
    k_dtype: torch.dtype
    v_dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Kind:
        """Of keys and values `[batch, kv_heads, n, head_dim]`."""
        return cls(k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype, v.dtype, k.device)

    @property
    def can_be_compact(self) -> bool:
        """Whether `ops.kv_append` takes such keys and values."""
        same = self.k_dim == self.v_dim and self.k_dtype == self.v_dtype
        return same and 8 <= self.k_dim <= 256 and self.k_dtype in _DTYPES and self.device.type in ("cpu", "cuda")


def new_page(kv: KvFormat, size: int, k: Tensor, v: Tensor) -> Page:
    """A page of `size` tokens, not initialised, for keys and values like k and v `[batch, kv_heads, n, head_dim]`."""
    (batch, heads, _, k_dim), v_dim = k.shape, v.shape[3]
    return Page(empty(kv.k, "k", (batch, heads, size, k_dim), k), empty(kv.v, "v", (batch, heads, size, v_dim), v))


def page_like(page: Page, size: int, kind: Kind) -> Page:
    """A page of `size` tokens, not initialised, in the format of another one."""

    def side(of: Side, which: Literal["k", "v"], head_dim: int, dtype: torch.dtype) -> Side:
        like = torch.empty(0, dtype=dtype, device=kind.device)
        return empty(name_of(of), which, (kind.batch, kind.kv_heads, size, head_dim), like)

    return Page(side(page.k, "k", kind.k_dim, kind.k_dtype), side(page.v, "v", kind.v_dim, kind.v_dtype))


class DensePage(Page):
    """What `is_dense` tells a type checker: keys and values in the model's dtype. None is ever made."""

    k: Tensor
    v: Tensor


def is_dense(page: Page | Stored) -> TypeGuard[DensePage]:
    """Whether a page is in memory, keys and values in the model's dtype."""
    return isinstance(page, Page) and isinstance(page.k, Tensor) and isinstance(page.v, Tensor)


def loaded(page: Page | Stored, device: torch.device | None = None) -> Page:
    """The page in memory, on a device; None: where its memory is."""
    page = page if isinstance(page, Page) else page.load()
    return page if device is None else page_to(page, device)


def page_to(page: Page, device: torch.device) -> Page:
    """The page on a device; itself where it is there."""

    def moved(side: Side) -> Side:
        return Compact(*(t.to(device) for t in side)) if isinstance(side, Compact) else side.to(device)

    return page if all(t.device == device for t in page.tensors().values()) else Page(moved(page.k), moved(page.v))


def part_of(page: Page | Stored, start: int, end: int) -> Page | Stored:
    """Tokens `start` to `end` of a page, a view; the page itself where that is all of it."""
    return page if start == 0 and end == page.size else page.narrow(start, end)


def pieces(run: Sequence[Page], start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (k, v) of tokens `start` to `end` of a run of dense pages."""
    at = 0
    for page in run:
        a, b = max(start - at, 0), min(end - at, page.size)
        if a < b:
            part = page.narrow(a, b)
            yield part.k, part.v  # type: ignore[misc]  # dense
        at += page.size


def groups(run: Sequence[Page], start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens `start` to `end` of a run of dense pages, a multiple of 64, as (k, v) of whole groups of 64 tokens: views,
    and copies of the groups that lie across two pages."""
    torn: list[tuple[Tensor, Tensor]] = []
    have = 0
    for k, v in pieces(run, start, end):
        at = 0
        if have:
            at = min(GROUP - have, k.shape[2])
            torn.append((k[:, :, :at], v[:, :, :at]))
            have += at
            if have == GROUP:
                yield torch.cat([k for k, _ in torn], 2), torch.cat([v for _, v in torn], 2)
                torn, have = [], 0
        whole = at + (k.shape[2] - at) // GROUP * GROUP
        if whole > at:
            yield k[:, :, at:whole], v[:, :, at:whole]
        if whole < k.shape[2]:
            torn.append((k[:, :, whole:], v[:, :, whole:]))
            have += k.shape[2] - whole


def gathered(run: Sequence[Page], start: int, end: int, size: int) -> Page:
    """A new dense page of `size` tokens that begins with tokens `start` to `end` of a run of dense pages."""
    page = new_page(MODEL, size, run[0].k, run[0].v)  # type: ignore[arg-type]
    at = 0
    for k, v in pieces(run, start, end):
        slot = page.narrow(at, at + k.shape[2])
        slot.k.copy_(k)  # type: ignore[union-attr]
        slot.v.copy_(v)  # type: ignore[union-attr]
        at += k.shape[2]
    return page


def indexable(page: Page, used: int) -> list[Tensor]:
    """A page's tensors, `used` tokens of a dense one, in dtypes that torch can index."""
    return [_bytes_of(t) for t in (page.narrow(0, used) if is_dense(page) else page).tensors().values()]


def _bytes_of(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def with_rows(page: Page, rows: list[int], used: int) -> Page:
    """A copy with these batch rows; of a dense page `used` tokens, with its room."""

    def taken(side: Side, which: Literal["k", "v"]) -> Side:
        if isinstance(side, Compact):
            return Compact(*(_bytes_of(t)[rows].view(t.dtype) for t in side))
        new = empty("model", which, (len(rows), *side.shape[1:]), side)  # type: ignore[arg-type]
        for i, row in enumerate(rows):
            new[i, :, :used] = side[row, :, :used]  # type: ignore[index]
        return new

    # No inference tensors, even inside inference_mode: they could not be written outside of it later.
    with torch.inference_mode(False), torch.no_grad():
        return Page(taken(page.k, "k"), taken(page.v, "v"))


class Scratch:
    """Dense memory for the new keys and values of one layer after the other: the same memory for all of them."""

    def __init__(self) -> None:
        self._page: Page | None = None
        self._taken = False

    def take(self, tokens: int, k: Tensor, v: Tensor) -> Page:
        """A page of so many tokens, in shape and dtype like k and v. Whoever has it gives it back."""
        if self._taken:
            return new_page(MODEL, tokens, k, v)
        page = self._page
        if page is None or page.size < tokens or Kind.of(page.k, page.v) != Kind.of(k, v):  # type: ignore[arg-type]
            self._page = None  # before its successor is made
            self._page = page = new_page(MODEL, tokens, k, v)
        self._taken = True
        return page.narrow(0, tokens)

    def give_back(self) -> None:
        """What was taken is free for the next layer."""
        self._taken = False
