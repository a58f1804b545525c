"""A KV cache in pages, for `generate()` and for you.

`cache_layers` puts pages in the place of the layers of a `DynamicCache`, also of the one that `generate()` makes;
`LongCache` is a `DynamicCache` that has them from the start.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .formats import KvFormat
from .maker import Maker
from .pages import PagedLayer, PageSize
from .tokens import Seen

if TYPE_CHECKING:
    from .window import SlidingLayer

__all__ = ["LongCache", "PagedLayer", "cache_layers"]


class LongCache(DynamicCache):
    """A cache for long contexts, given as `past_key_values=` and handed from call to call.

    `generate()` and the model use the same pages without being asked; this class is for a cache of your own. It keeps all
    tokens, also of layers that see only a sliding window of them: it can be cut, saved and gone on with anywhere.

    Args:
        ddp_cache_data: pairs of keys and values, one for each layer, to begin with.
        config: the model's config; without it layers are made as they are needed.
        page_size: tokens of a page, or "auto".
        kv: the format of the keys and values, as the option of that name; None: what the option of the model says that
            first writes to it.

    Raises:
        TypeError, ValueError: a format that does not exist.
        ValueError: the config has layers that are no attention.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor, ...]] | None = None,
        config: Any = None,
        *,
        page_size: PageSize = "auto",
        kv: str | KvFormat | None = None,
    ) -> None:
        super().__init__(config=config)
        self._seen, self._maker = Seen(), Maker()
        self.page_size = page_size
        self.kv = kv.name if isinstance(kv, KvFormat) else kv
        fixed = None if self.kv is None or self.kv == "auto" else KvFormat.parse(self.kv)
        self._fixed = fixed
        for i, layer in enumerate(self.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"config: expected attention, full or in a sliding window, in every layer, got {layer!r} in layer {i}"
                )
            self.layers[i] = PagedLayer(page_size, fixed)
        for i, (keys, values, *_) in enumerate(ddp_cache_data or ()):
            self._fill(i + 1)
            self.layers[i].update(keys, values)

    def _fill(self, n: int) -> None:
        while len(self.layers) < n:
            self.layers.append(PagedLayer(self.page_size, self._fixed))

    @property
    def format(self) -> KvFormat | None:
        """The format that keys and values are kept in; None as long as no model has decided it."""
        found = next((layer.format for layer in self.layers if layer.decided), None)
        return self._fixed or found

    @property
    def tokens(self) -> Tensor | None:
        """The ids of the tokens that are in it, int64 `[batch, length]`; None where they are not known: of embeddings,
        of padded rows or positions of one's own, and of keys and values that somebody else wrote."""
        return self._seen.ids if self._seen.length == self.get_seq_length() else None

    @tokens.setter
    def tokens(self, ids: Tensor | None) -> None:
        self._seen = Seen()
        if ids is not None:
            if ids.dim() != 2 or ids.shape[1] != self.get_seq_length():
                raise ValueError(
                    f"tokens: expected ids [batch, {self.get_seq_length()}], as many as there are keys, got shape "
                    f"{tuple(ids.shape)}"
                )
            self._seen.append(ids, 0)

    def warn_of_other_tokens(self, input_ids: Any) -> None:
        """`generate` is about to go on from this cache, and takes what is in it for the beginning of these ids."""
        mine = self.tokens
        if mine is None or not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or len(mine) != len(input_ids):
            return
        n = min(mine.shape[1], input_ids.shape[1])
        other = (mine[:, :n].to(input_ids.device) != input_ids[:, :n]).any(0)
        if n and bool(other.any()):
            warnings.warn(
                f"past_key_values: expected the first {n} tokens of input_ids in the cache, got others from token "
                f"{int(other.int().argmax())} on: what is generated goes on from those in the cache",
                stacklevel=4,
            )

    def save(self, path: str | os.PathLike[str], model: Any = None) -> None:
        """Writes the cache to a file (safetensors), or replaces it: a kill at any moment leaves the old one or the new one.

        Args:
            path: the file; its folder must be there.
            model: the model that made the keys and values. Default: that it was last given to.

        Raises:
            saved.CacheMismatch: the model was changed since (weights, an adapter), or several have written to the cache that
                are not the same.
            ValueError: there is nothing in it, or it is not known which model made it.
            OSError: there is no room, or the folder can't be written to. The old file is as it was.
        """
        from . import saved
        from .options import llama_models

        inner = self._maker.model if model is None else llama_models(model)[0]
        if inner is None or (model is None and self._maker.gone):
            raise ValueError("model: expected the model that made the cache: none has written to it, or it is gone")
        saved.save(self, path, inner)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, *, mapped: bool = True) -> LongCache:
        """Opens a saved cache. Keys and values are not read before they are used, and checked when they are.

        Args:
            path: the file. Nobody may write to it as long as the cache is in use; `save` replaces it as a whole.
            model: the model that made it, or something that holds it.
            mapped: see pages through a memory map; False: read them into memory that is given back after use.

        Raises:
            ValueError: the cache is another model's (`saved.CacheMismatch`), or the file is damaged (`CacheDamaged`).
            OSError: it can't be read.
        """
        from . import saved

        return saved.load(path, model, mapped=mapped)

    def _made_by(self, model: Any) -> None:
        """A `LlamaModel` has written to it."""
        self._maker.wrote(model, self.get_seq_length())

    def _check_layers(self, n: int) -> None:
        """A model of n layers is about to write to it.

        Raises:
            ValueError: tokens in more layers, whose others would stay behind.
        """
        more = [i for i, layer in enumerate(self.layers) if i >= n and layer.get_seq_length()]
        maker = self._maker.model
        # The same model with fewer layers for a while: who drafts tokens that way knows what it does.
        if more and (maker is None or maker.config.num_hidden_layers != n):
            raise ValueError(
                f"past_key_values: expected a cache of {n} layers, as the model has, got {len(self.layers)} with "
                f"{self.get_seq_length()} tokens: another model made it"
            )

    def _note(self, ids: Tensor | None, at: int) -> None:
        """The tokens from `at` on are these, `[batch, n]`; None: it is not known which."""
        if ids is None:
            self._seen.truncate(0)
        else:
            self._seen.append(ids, at)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the pages take, room for more tokens included."""
        return sum(layer.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        name = "undecided format" if self.format is None else self.format.name
        return f"LongCache({self.get_seq_length()} tokens, {len(self.layers)} layers, {name}, {self.nbytes} bytes)"

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._seen.truncate(0)  # nobody says which tokens these are
        self._fill(layer_idx + 1)
        return self.layers[layer_idx].update(key_states, value_states)

    def reset(self) -> None:
        super().reset()
        self._seen.truncate(0)
        self._maker = Maker()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self._seen.truncate(self.get_seq_length())
        if not self.get_seq_length():
            self._maker = Maker()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._seen.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._seen.repeat_rows(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._seen.take_rows(indices)


def cache_layers(
    cache: Any, windows: Sequence[int | None], page_size: PageSize
) -> list[PagedLayer | SlidingLayer] | str:
    """The first layers of a cache, as pages from now on where they keep all tokens; or why this cache must be left alone.

    Nothing is copied: what is there becomes the first page.

    Args:
        windows: of each layer, how many keys a query sees; None: all before it.

    Raises:
        ValueError: a `LongCache` with tokens in more layers than the model has.
    """
    from .window import SlidingLayer

    n_layers = len(windows)
    if type(cache) is not DynamicCache and not isinstance(cache, LongCache):
        return f"the cache is a {type(cache).__name__}"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    layers = cache.layers
    if isinstance(cache, LongCache):
        cache._check_layers(n_layers)
    for layer, width in zip(layers, windows, strict=False):
        if type(layer) is PagedLayer:
            continue
        slides = type(layer) is DynamicSlidingWindowLayer
        if slides and layer.sliding_window != width:
            return f"the cache has a sliding window of {layer.sliding_window}, the model's layer one of {width}"
        if type(layer) is not DynamicLayer and not slides:
            return f"the cache has a {type(layer).__name__}"
        if torch.is_grad_enabled() and layer.is_initialized and layer.keys is not None and layer.keys.requires_grad:
            return "gradients"
        keys, values = layer.keys, layer.values
        if layer.is_initialized and keys is not None and (values is None or keys.shape[:3] != values.shape[:3]):
            return "the cache holds keys and values of different shapes"
    if len(layers) < n_layers and not isinstance(cache, LongCache):
        made = getattr(cache, "layer_class_to_replicate", None)
        if made is not DynamicLayer:
            return f"the cache has {len(layers)} layers, the model {n_layers}"
    while len(layers) < n_layers:
        layers.append(PagedLayer(page_size))
    found: list[PagedLayer | SlidingLayer] = []
    for i in range(n_layers):
        if type(layers[i]) is DynamicSlidingWindowLayer:
            found.append(SlidingLayer(layers[i]))
            continue
        if type(layers[i]) is not PagedLayer:
            layers[i] = PagedLayer.adopt(layers[i], page_size)
        layers[i]._settle()
        found.append(layers[i])
    if any(layer.length != found[0].length for layer in found):
        return "the cache's layers have different lengths"
    return found
