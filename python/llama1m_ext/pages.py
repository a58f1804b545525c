"""One layer's keys and values in pages, with the face of transformers' `DynamicLayer`.

Code that knows nothing of pages sees `keys`, `values` and `update()` as it knows them.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from . import _compat, ops
from .dense import Kind, is_dense, loaded, page_to
from .formats import GROUP, KvFormat, Page
from .page_list import PageSize
from .sealed import SealedList

__all__ = ["PageSize", "PagedLayer"]
_READ = 64 * GROUP
"""Tokens of compact pages that are made dense at a time."""


class PagedLayer(SealedList, DynamicLayer):
    """Keys and values of one layer in pages, each `[batch, kv_heads, tokens, head_dim]`: a list of pages that serves where
    transformers and other people's code expect a `DynamicLayer`.

    `keys` and `values` are dense, whatever the format: of a compact one, new tensors with what its codes stand for.
    Tensors assigned to them are kept as they are, dense, until the next `seal`.

    Args:
        page_size, kv: as `PageList`.
    """

    def __init__(self, page_size: PageSize = "auto", kv: KvFormat | None = None, **kwargs: Any) -> None:
        # Keys and values that foreign code has set one after the other, and that don't fit each other yet.
        self._apart: tuple[Tensor | None, Tensor | None] | None = None
        self.is_initialized = False
        self._asked = kv
        super().__init__(page_size, kv, **kwargs)

    @classmethod
    def adopt(cls, layer: DynamicLayer, page_size: PageSize, kv: KvFormat | None = None) -> PagedLayer:
        """A paged layer with what a `DynamicLayer` holds, without copying it."""
        made = cls(page_size, kv)
        if layer.is_initialized and layer.keys is not None and layer.keys.numel():
            made._replace(layer.keys, layer.values)
        return made

    # -- keys and values -----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys, `[batch, kv_heads, length, head_dim]`: a view if they lie in one dense page, else a new tensor."""
        return self._whole("k")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(value, self.values)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values, likewise."""
        return self._whole("v")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(self.keys, value)

    def dense(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """All keys and values, as `keys` and `values`, in one go where they are compact; or those from a token on.

        Raises:
            ValueError: there are none.
        """
        self._settle()
        if not 0 <= start < self.length or self.kind is None:
            raise ValueError(f"cache: expected more than {start} tokens, got {self.length}")
        if all(map(is_dense, self.pages)) and (not start or len(self.pages) == 1):
            keys, values = self.keys, self.values
            assert keys is not None and values is not None
            return keys[:, :, start:], values[:, :, start:]
        kind, device = self.kind, self.kind.device
        keys = torch.empty((*kind[:2], self.length - start, kind.k_dim), dtype=kind.k_dtype, device=device)
        values = torch.empty((*kind[:2], self.length - start, kind.v_dim), dtype=kind.v_dtype, device=device)
        at = -start
        for part in self._used(self.length):
            if at + part.size <= 0:
                at += part.size
                continue
            page = loaded(part, device)
            step = page.size if is_dense(page) else _READ
            first = max(0, -at)
            for a in range(first, page.size, step):
                b = min(a + step, page.size)
                if is_dense(page):
                    k, v = page.k[:, :, a:b], page.v[:, :, a:b]
                else:
                    k, v = ops.kv_read(page, a, b, kind.k_dim, kind.k_dtype)
                keys[:, :, at + a : at + b] = k
                values[:, :, at + a : at + b] = v
            at += page.size
        return keys, values

    def _whole(self, which: Literal["k", "v"]) -> Tensor | None:
        if self._apart is not None:
            return self._apart[which == "v"]
        if not self.is_initialized:
            return None
        if not self.length:
            return torch.tensor([], dtype=self.dtype, device=self.device)
        if not all(map(is_dense, self.pages)):
            return self.dense()[which == "v"]
        views = [getattr(page, which) for page in self._used(self.length)]
        if len(views) > 1:
            return torch.cat(views, dim=2)
        self._lent = max(self._lent, self.length)
        return views[0]

    def _assign(self, keys: Tensor | None, values: Tensor | None) -> None:
        keys = None if keys is None or not keys.numel() else keys
        values = None if values is None or not values.numel() else values
        self._clear()
        if keys is not None and values is not None and keys.shape[:3] == values.shape[:3]:
            self._replace(keys, values)
        elif keys is not None or values is not None:
            self._apart = (keys, values)
            self.length = self.capacity = 0 if keys is None else keys.shape[2]

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        """These tensors, `[batch, kv_heads, n, head_dim]`, are all there is: a full page, that nothing is written to."""
        self._clear()
        self.pages = [Page(_last_axis_contiguous(keys), _last_axis_contiguous(values))]
        self.length = self.capacity = self._lent = keys.shape[2]
        self._note(Kind.of(keys, values))

    def _clear(self) -> None:
        if self._borrowed and self._scratch is not None:
            self._scratch.give_back()
        self.pages, self._open, self._apart = [], None, None
        self.length = self.capacity = self._lent = self._expected = 0
        self._borrowed, self._scratch = False, None

    def _note(self, kind: Kind) -> None:
        super()._note(kind)
        self.dtype, self.device, self.is_initialized = kind.k_dtype, kind.device, True

    def _settle(self) -> None:
        """Keys and values that foreign code has set must fit each other by now."""
        if self._apart is not None:
            keys, values = self._apart
            raise ValueError(
                "cache: expected keys and values of one length, got "
                f"{None if keys is None else tuple(keys.shape)} and {None if values is None else tuple(values.shape)}"
            )

    # -- what transformers and other people's code call ------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends, and returns all keys and values: transformers' own semantics, for code that wants dense tensors.

        In a compact format the new tokens are as they came in what is returned, and may be compact afterwards.
        """
        self._settle()
        grad = torch.is_grad_enabled() and (
            key_states.requires_grad
            or value_states.requires_grad
            or any(isinstance(p, Page) and any(t.requires_grad for t in p.tensors().values()) for p in self.pages)
        )
        if grad or torch.compiler.is_compiling() or not self.fits(key_states, value_states):
            # Out of place, as autograd and tracing need it; also what says best why shapes don't fit.
            if self.length:
                keys, values = self.dense()
                key_states = torch.cat([keys, key_states], dim=-2)
                value_states = torch.cat([values, value_states], dim=-2)
            self._replace(key_states, value_states)
            return self.dense()
        self.append(key_states, value_states)
        found = self.dense()
        self.seal()
        return found

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
        """Forgets everything, memory included, and a format that a model chose."""
        self._clear()
        self.kind, self.store, self.limit, self._kv = None, None, None, self._asked
        self.is_initialized = False

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self.kind is None or self.kind.device == torch.device(device):
            return
        self._settle()
        self.pages = [page_to(p, torch.device(device)) if isinstance(p, Page) else p for p in self.pages]
        self.kind, self._open = self.kind._replace(device=torch.device(device)), None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kind is not None:
            self.take_rows([row for row in range(self.kind.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kind is not None:
            self.take_rows(torch.arange(self.kind.batch)[indices.cpu()].tolist())

    # -- copies ----------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedLayer:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__getstate__().items():
            # Pages are clones already; others may share state with what is copied beside us.
            made.__dict__[name] = value if name == "pages" else copy.deepcopy(value, memo)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Only what is written: tensors are copied and pickled with all their storage, so used parts are cloned."""
        # Nobody writes to a page that lives elsewhere; pickled, it becomes one in memory.
        pages = [_clone(part) if isinstance(part, Page) else part for part in self._used(self.length)]
        mine = {"pages": pages, "capacity": self.length, "_lent": 0, "_expected": 0}
        return {**self.__dict__, **mine, "_open": None, "_scratch": None, "_borrowed": False}


def _clone(page: Page) -> Page:
    def clone(side: Any) -> Any:
        return side.detach().clone() if isinstance(side, Tensor) else type(side)(*(t.clone() for t in side))

    return Page(clone(page.k), clone(page.v))


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
