"""A rank's share of one layer's keys and values, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import _compat
from ..cache import LongCache
from ..dense import Kind, Stored, part_of
from ..formats import GROUP, KvFormat, Page
from ..pages import PagedLayer, PageSize
from .spread import Spread

__all__ = ["ShardLayer", "adopt", "shard_layers"]


class ShardLayer(PagedLayer):
    """A `PagedLayer` whose pages hold the tokens of one rank; `length` counts these.

    To transformers it is as long as all ranks' tokens together, and it is cut, reordered and repeated as any other. Keys and
    values of all tokens are nowhere: code that asks for them gets an error.

    Args:
        rank: whose tokens.
        spread: who holds which; no tokens yet.
        page_size, kv: as `PagedLayer`.

    Attributes:
        spread: who holds which tokens.
    """

    def __init__(self, rank: int, spread: Spread, page_size: PageSize = "auto", kv: KvFormat | None = None) -> None:
        self.rank, self.spread = rank, spread
        super().__init__(page_size, kv)

    def cut(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self.spread = self.spread.truncated(length)
        self.truncate(self.spread.held[self.rank])

    def takes(self, k: Tensor, v: Tensor) -> None:
        """All ranks' new keys and values are like these, `[batch, kv_heads, n, head_dim]`, also where none comes to this one."""
        if self.kind is None:
            self._note(Kind.of(k, v))

    def take_rows(self, rows: Sequence[int]) -> None:
        super().take_rows(rows)
        if self.kind is not None and not self.length:
            self._note(self.kind._replace(batch=len(rows)))

    def _refuse(self) -> TypeError:
        return TypeError(
            f"cache: its {self.spread.length} tokens are spread over {self.spread.ranks} ranks, and no rank has keys and values of "
            "them all; expected a model that these ranks share: llama1m_ext.distributed(model)"
        )

    # -- what transformers and other people's code call ----------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        if self.spread.length:
            raise self._refuse()
        return torch.tensor([], dtype=self.dtype, device=self.device) if self.is_initialized else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._set(value)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.keys

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._set(value)

    def _set(self, value: Tensor | None) -> None:
        if value is not None and value.numel():
            raise self._refuse()

    def dense(self, start: int = 0) -> tuple[Tensor, Tensor]:
        raise self._refuse()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise self._refuse()

    def get_seq_length(self, *args: Any) -> int:
        return self.spread.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        n = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.spread.length + n, 0

    def crop(self, tokens: int) -> None:
        self.cut(_compat.cropped_length(tokens, self.spread.length))

    def reset(self) -> None:
        super().reset()
        self.spread = Spread(self.spread.ranks)


def shard_layers(cache: Any, n_layers: int, page_size: PageSize, rank: int, ranks: int) -> list[ShardLayer] | str:
    """The first layers of a cache, as shards from now on; or why this cache can't be one of several ranks.

    Raises:
        ValueError: a `LongCache` with tokens in more layers than the model has.
    """
    if type(cache) is not DynamicCache and not isinstance(cache, LongCache):
        return f"the cache is a {type(cache).__name__}"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    if isinstance(cache, LongCache):
        cache._check_layers(n_layers)
    layers = cache.layers
    for layer in layers[:n_layers]:
        if type(layer) is ShardLayer:
            if (layer.rank, layer.spread.ranks) != (rank, ranks):
                return f"the cache is that of rank {layer.rank} of {layer.spread.ranks}, and this is rank {rank} of {ranks}"
        elif type(layer) not in (PagedLayer, DynamicLayer):
            return f"the cache has a {type(layer).__name__}"
    grows = isinstance(cache, LongCache) or getattr(cache, "layer_class_to_replicate", None) is DynamicLayer
    if len(layers) < n_layers and not grows:
        return f"the cache has {len(layers)} layers, the model {n_layers}"
    while len(layers) < n_layers:
        layers.append(ShardLayer(rank, Spread(ranks), page_size))
    for i in range(n_layers):
        if type(layers[i]) is DynamicLayer:
            layers[i] = PagedLayer.adopt(layers[i], page_size)
    adopt(cache, rank, ranks)
    found: list[ShardLayer] = layers[:n_layers]
    if any(layer.spread != found[0].spread for layer in found):
        return "the cache's layers have different tokens"
    return found


def adopt(cache: Any, rank: int, ranks: int) -> None:
    """Makes shards of a cache's layers that are none yet. What is in them each rank has whole, and keeps its share of: nothing is
    copied."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is PagedLayer:
            layer._settle()
            parts = shares(layer.share(layer.length), ranks)
            made = ShardLayer(rank, spread_of(parts), layer.page_size, layer._kv)
            made._asked = layer._asked
            if layer.kind is not None:
                made.begin_with(parts[rank], made.spread.held[rank], layer.kind)
            cache.layers[i] = made


def shares(pages: Sequence[Page | Stored], ranks: int) -> list[list[Page | Stored]]:
    """Pages that every rank has, as each rank's share: neighbours, cut at whole groups of 64 tokens of a page."""
    length = sum(page.size for page in pages)
    found: list[list[Page | Stored]] = [[] for _ in range(ranks)]
    at = 0
    for page in pages:
        cuts = {0, page.size}
        cuts.update((length * r // ranks - at) // GROUP * GROUP for r in range(1, ranks))
        edges = sorted(cut for cut in cuts if 0 <= cut <= page.size)
        for a, b in zip(edges, edges[1:], strict=False):
            # By the middle of the piece: no cut lies within it, but for less than a group.
            found[min(ranks - 1, (at + (a + b) // 2) * ranks // length)].append(part_of(page, a, b))
        at += page.size
    return found


def spread_of(parts: Sequence[Sequence[Page | Stored]]) -> Spread:
    """Who holds which tokens, of shares."""
    made = Spread(len(parts))
    for rank, pages in enumerate(parts):
        n = sum(page.size for page in pages)
        made = made.given(n, rank) if n else made
    return made
