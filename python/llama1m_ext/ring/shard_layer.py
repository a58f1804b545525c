"""A rank's share of one layer's keys and values, in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import _compat
from ..cache import LongCache
from ..formats import KvFormat
from ..pages import PagedLayer, PageSize
from .spread import Spread

__all__ = ["ShardLayer", "shard_layers"]


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
                return (
                    f"the cache is that of rank {layer.rank} of {layer.spread.ranks}, and this is rank {rank} of {ranks}"
                )
        elif type(layer) not in (PagedLayer, DynamicLayer):
            return f"the cache has a {type(layer).__name__}"
        elif layer.get_seq_length():
            return f"the cache has {layer.get_seq_length()} tokens of this process alone"
    if len(layers) < n_layers and not isinstance(cache, LongCache):
        if getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
            return f"the cache has {len(layers)} layers, the model {n_layers}"
    found = list[ShardLayer]()
    for i in range(n_layers):
        layer = layers[i] if i < len(layers) else None
        if type(layer) is not ShardLayer:
            size, kv = (layer.page_size, layer._asked) if type(layer) is PagedLayer else (page_size, None)
            layer = ShardLayer(rank, Spread(ranks), size, kv)
            if i < len(layers):
                layers[i] = layer
            else:
                layers.append(layer)
        found.append(layer)
    if any(layer.spread != found[0].spread for layer in found):
        return "the cache's layers have different tokens"
    return found
