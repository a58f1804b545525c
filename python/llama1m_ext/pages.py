"""One layer's keys and values in pages that are appended to in place: never concatenated, never moved.

Code that knows nothing of pages sees `keys`, `values` and `update()` of transformers' `DynamicLayer` as it knows them.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from . import _compat

PageSize = int | Literal["auto"]
_ROUND = 128
"""Automatic pages are a multiple of this many tokens."""


class PagedLayer(DynamicLayer):
    """Keys and values of one layer in pages, each `[batch, kv_heads, page_size, head_dim]`.

    The first `length` tokens of the pages are in use; what lies beyond is memory that nobody has written or may read.

    Args:
        page_size: tokens of a page, or "auto": the first page has the prompt and 6% of room, later ones an eighth of
            the length, so that pages stay few and at most about 12% is unused.
    """

    def __init__(self, page_size: PageSize = "auto", **kwargs: Any) -> None:
        self.page_size = page_size
        self.k_pages: list[Tensor] = []
        self.v_pages: list[Tensor] = []
        self.length = 0
        self.capacity = 0
        self._expected = 0
        # So many of the first pages (none or one) belong to somebody else, or somebody holds a view of them: what is
        # written there must not change under its holder.
        self._lent = 0
        super().__init__(**kwargs)

    # -- what our own code uses ------------------------------------------------------------------------------------

    def expect(self, length: int) -> None:
        """Says how many tokens there will be soon, so that the next page is made large enough."""
        self._expected = length

    def fits(self, k: Tensor, v: Tensor) -> bool:
        """Whether k and v `[batch, kv_heads, n, head_dim]` can be written beside what is there."""
        if not self.k_pages:
            return True
        kp, vp = self.k_pages[0], self.v_pages[0]
        return (
            kp.dtype == k.dtype
            and vp.dtype == v.dtype
            and kp.device == k.device
            and kp.shape[:2] == k.shape[:2]
            and kp.shape[3] == k.shape[3]
            and vp.shape[3] == v.shape[3]
        )

    def slots(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Room for the next tokens, in shapes like k and v: views to be written, in order. `commit` makes them count.

        Args:
            k, v: `[batch, kv_heads, n, head_dim]`, read for shape, dtype and device only.
        """
        n = k.shape[2]
        if self.capacity - self.length < n:
            self._grow(self.length + n - self.capacity, k, v)
        end, at = self.length + n, self.capacity
        found: list[tuple[Tensor, Tensor]] = []
        for kp, vp in zip(reversed(self.k_pages), reversed(self.v_pages), strict=True):
            size = kp.shape[2]
            at -= size
            if at < end:
                a, b = max(self.length - at, 0), min(end - at, size)
                found.append((kp[:, :, a:b], vp[:, :, a:b]))
            if at <= self.length:
                break
        found.reverse()
        return found

    def commit(self, n: int) -> None:
        """The next n tokens are written."""
        self.length += n

    def append(self, k: Tensor, v: Tensor) -> None:
        """Writes the next tokens, `[batch, kv_heads, n, head_dim]`."""
        at = 0
        for k_slot, v_slot in self.slots(k, v):
            n = k_slot.shape[2]
            k_slot.copy_(k[:, :, at : at + n])
            v_slot.copy_(v[:, :, at : at + n])
            at += n
        self.commit(at)

    @property
    def k(self) -> Tensor | list[Tensor]:
        """What `ops.attention` takes as k, with `kv_len=length`."""
        return self.k_pages[0] if len(self.k_pages) == 1 else self.k_pages

    @property
    def v(self) -> Tensor | list[Tensor]:
        """What `ops.attention` takes as v."""
        return self.v_pages[0] if len(self.v_pages) == 1 else self.v_pages

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on."""
        if length >= self.length:
            return
        self.length = max(0, length)
        while self.k_pages and self.capacity - self.k_pages[-1].shape[2] >= self.length:
            self.capacity -= self.k_pages.pop().shape[2]
            self.v_pages.pop()
        self._lent = min(self._lent, len(self.k_pages))
        if self._lent == len(self.k_pages) and self.capacity > self.length:
            # Cut the page off, so that what comes next is written elsewhere.
            self.k_pages[-1] = self.k_pages[-1][:, :, : self.length]
            self.v_pages[-1] = self.v_pages[-1][:, :, : self.length]
            self.capacity = self.length

    @classmethod
    def adopt(cls, layer: DynamicLayer, page_size: PageSize) -> PagedLayer:
        """A paged layer with what a `DynamicLayer` holds, without copying it."""
        made = cls(page_size)
        if layer.is_initialized and layer.keys is not None and layer.keys.numel():
            made._replace(layer.keys, layer.values)
        return made

    def _grow(self, need: int, k: Tensor, v: Tensor) -> None:
        self._settle()
        if not self.is_initialized:
            self._note(k)
        batch, kv_heads, _, head_dim = k.shape
        if self.page_size == "auto":
            first = not self.k_pages
            total = max(self.length + k.shape[2], self._expected)
            room = max(_ROUND, total // (16 if first else 8))
            size = max(need, total - self.capacity) + room
            sizes = [-(-size // _ROUND) * _ROUND]
        else:
            sizes = [self.page_size] * -(-need // self.page_size)
        for size in sizes:
            self.k_pages.append(_page((batch, kv_heads, size, head_dim), k))
            self.v_pages.append(_page((batch, kv_heads, size, v.shape[3]), v))
            self.capacity += size

    def _used(self, pages: list[Tensor]) -> list[Tensor]:
        """Views of the pages, without what is not written."""
        at, views = 0, []
        for page in pages:
            n = min(page.shape[2], self.length - at)
            if n > 0:
                views.append(page[:, :, :n])
            at += page.shape[2]
        return views

    def _dense(self, pages: list[Tensor]) -> Tensor | None:
        if not self.is_initialized:
            return None
        views = self._used(pages)
        if not views:
            return torch.tensor([], dtype=self.dtype, device=self.device)
        if len(views) > 1:
            return torch.cat(views, dim=2)
        self._lent = 1
        return views[0]

    def _note(self, k: Tensor) -> None:
        self.dtype, self.device = k.dtype, k.device
        self.is_initialized = True

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        """These tensors, `[batch, kv_heads, n, head_dim]`, are all there is: full pages, that nothing is written to."""
        self.keys, self.values = keys, values
        self._note(keys)

    def _settle(self) -> None:
        """After foreign code has set `keys` or `values`: pages of k and v of one size again."""
        if [p.shape[2] for p in self.k_pages] != [p.shape[2] for p in self.v_pages]:
            keys, values = self.keys, self.values
            if keys is None or values is None or keys.shape[2] != values.shape[2]:
                raise ValueError(
                    f"cache: expected keys and values of one length, got {[tuple(p.shape) for p in self.k_pages]} "
                    f"and {[tuple(p.shape) for p in self.v_pages]}"
                )
            self._replace(keys, values)

    # -- what transformers and other people's code use ------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys, `[batch, kv_heads, length, head_dim]`: a view if they lie in one page, else a new tensor."""
        return self._dense(self.k_pages)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self.k_pages = [] if value is None or not value.numel() else [_last_axis_contiguous(value)]
        self.length = self.capacity = sum(p.shape[2] for p in self.k_pages)
        self._lent = len(self.k_pages)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values, likewise."""
        return self._dense(self.v_pages)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self.v_pages = [] if value is None or not value.numel() else [_last_axis_contiguous(value)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self._note(key_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends, and returns all keys and values: transformers' own semantics, for code that wants dense tensors."""
        self._settle()
        grad = torch.is_grad_enabled() and (
            key_states.requires_grad or value_states.requires_grad or any(p.requires_grad for p in self.k_pages)
        )
        if grad or torch.compiler.is_compiling() or not self.fits(key_states, value_states):
            # Out of place, as autograd and tracing need it; also what says best why shapes don't fit.
            keys, values = self.keys, self.values
            self._replace(
                key_states if keys is None or not keys.numel() else torch.cat([keys, key_states], dim=-2),
                value_states if values is None or not values.numel() else torch.cat([values, value_states], dim=-2),
            )
        else:
            self.append(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 4 gives the cache positions here, 5 their number.
        n = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.length + n, 0

    def crop(self, tokens: int) -> None:
        """As `DynamicLayer.crop` of the transformers installed: 4 takes the new length, or minus the tokens to remove;
        5 only minus the tokens to remove."""
        self.truncate(_compat.cropped_length(tokens, self.length))

    def reset(self) -> None:
        """Forgets everything, memory included."""
        self.k_pages, self.v_pages = [], []
        self.length = self.capacity = self._expected = self._lent = 0
        self.is_initialized = False

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self.k_pages = [p.to(device, non_blocking=True) for p in self.k_pages]
        self.v_pages = [p.to(device, non_blocking=True) for p in self.v_pages]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.k_pages:
            self._take([row for row in range(self.k_pages[0].shape[0]) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.k_pages:
            self._take(torch.arange(self.k_pages[0].shape[0])[indices.cpu()].tolist())

    def _take(self, rows: list[int]) -> None:
        """Batch row i becomes what row `rows[i]` was. Rows that stay where they are cost nothing."""
        if not self.length:
            return
        self._settle()
        batch = self.k_pages[0].shape[0]
        rows = [range(batch)[row] for row in rows]  # as index_select: IndexError for a row that is not there
        moved = [i for i, row in enumerate(rows) if i != row]
        if len(rows) == batch and not moved:
            return
        same_shape = len(rows) == batch
        for pages in (self.k_pages, self.v_pages):
            at = 0
            for i, page in enumerate(pages):
                n = min(page.shape[2], self.length - at)
                at += page.shape[2]
                if n <= 0:
                    continue
                if same_shape and i >= self._lent:
                    page[moved, :, :n] = page[[rows[j] for j in moved], :, :n]
                    continue
                new = _page((len(rows), *page.shape[1:]), page)
                for j, row in enumerate(rows):
                    new[j, :, :n] = page[row, :, :n]
                pages[i] = new
        self._lent = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__getstate__().items():
            # Pages are clones already; others may share state with what is copied beside us.
            made.__dict__[name] = value if name in ("k_pages", "v_pages") else copy.deepcopy(value, memo)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Only what is written: tensors are copied and pickled with all their storage, so used parts are cloned."""
        state = dict(self.__dict__)
        for name in ("k_pages", "v_pages"):
            state[name] = [p.detach().clone() for p in self._used(state[name])]
        state["capacity"] = self.length
        state["_lent"] = 0
        return state


def _page(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for a page, not initialised."""
    # Not an inference tensor, even inside inference_mode: it could not be written outside of it later.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
