"""Caches in files: written atomically, bound to the model that made them, opened without being read.

A saved cache is a safetensors file. `"3.7.k"` is K of the eighth page of the fourth layer (`"3.7.k.codes"` and so on where it is
compact), `"tokens"` the ids; the metadata say how they belong together. Pages are of a bounded size, so that each can
be checked and streamed alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .cache import LongCache
from .dense import Kind, Stored, loaded, page_to
from .fingerprint import Identity, identity
from .formats import GROUP, Page
from .memory import free_bytes
from .options import llama_models
from .options import read as read_options
from .pages import PagedLayer
from .placement import device_of
from .saved_file import (
    META,
    VERSION,
    CacheMismatch,
    Info,
    StoredLayer,
    ids_of,
    info,
    layers_of,
    opened,
    shapes,
    stored_pages,
    uncollected,
    verified_with_bar,
    verify,
)
from .sealed import TAIL
from .stored import CacheDamaged, PageSource, StoredPage, page_of
from .tensorfile import Entry, described, dtype_name, rows, write

if TYPE_CHECKING:
    from .ring.layout import Layout

__all__ = [
    "CacheDamaged",
    "CacheMismatch",
    "Info",
    "info",
    "load",
    "save",
    "stored_pages",
    "verified_with_bar",
    "verify",
]

PAGE_BYTES = 16 << 20
"""Bytes of a page in a file, about: one checksum each, and the unit that is streamed."""


def save(cache: Any, path: str | os.PathLike[str], model: Any) -> None:
    """Writes a cache to a file, or replaces it: a kill at any moment leaves the old one or the new one.

    Args:
        cache: a `LongCache`, or the cache that `generate()` made, with at least one token.
        path: the file; its folder must be there.
        model: the one that made it, or something that holds it.

    Raises:
        TypeError: no Llama of transformers inside the model.
        CacheMismatch: the model is not what it was when it made the cache, or not the only one that did.
        ValueError: there is nothing in the cache, or it is not one that this package keeps.
        OSError: there is no room, or the folder can't be written to. The old file is as it was.
    """
    inner = llama_models(model)[0]
    layout = _shared(cache, inner)
    if layout is not None:
        from .ring import saving

        saving.save(layout, cache, path, inner)
        return
    layers = [_paged(layer) for layer in getattr(cache, "layers", ())]
    lengths = {layer.length for layer in layers}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"cache: expected at least one token, as many in each layer, got lengths {sorted(lengths)}")
    for layer in layers:
        assert layer.kind is not None  # as there are tokens
        found, expected = (len(layers), *layer.kind[1:4]), _axes(inner.config)
        if found != expected:
            raise ValueError(
                f"model: expected the one that made the cache, with layers, kv_heads, k_dim and v_dim {found}, got {expected}"
            )
    described_layers, written = list[tuple[list[int], str, Kind]](), list[Entry]()
    for i, layer in enumerate(layers):
        kind, sizes = layer.kind, list[int]()
        assert kind is not None  # as there are tokens
        for part in bounded(layer.share(layer.length), kind):
            sizes.append(part.size)
            written.extend(entries(f"{i}.{len(sizes) - 1}", part, kind))
        described_layers.append((sizes, layer.format.name, kind))
    write_cache(path, cache, maker_of(cache, inner).as_dict(), described_layers, written)


def _shared(cache: Any, inner: Any) -> Layout | None:
    """The layout of the ranks that a cache is spread over; None: it is not.

    Raises:
        ValueError: they don't share this model.
    """
    if not any(hasattr(layer, "spread") for layer in getattr(cache, "layers", ())):
        return None
    from .ring.membership import layout_of

    layout = layout_of(inner)
    if layout is None:
        raise ValueError(
            "model: expected one that the ranks of this cache share, llama1m_ext.distributed(model); got this process's own"
        )
    return layout


def write_cache(
    path: str | os.PathLike[str],
    cache: Any,
    maker: dict[str, Any],
    layers: Sequence[tuple[list[int], str, Kind]],
    written: Iterable[Entry],
) -> None:
    """Writes the file.

    Args:
        maker: the identity of the model.
        layers: of each layer, the tokens of its pages, its format and its kind.
        written: the tensors of all pages.

    Raises:
        OSError: as `save`.
    """
    body: dict[str, Any] = {"version": VERSION, "length": sum(layers[0][0]), "model": maker, "layers": []}
    for sizes, kv, kind in layers:
        body["layers"].append({
            "sizes": sizes,
            "kv": kv,
            "kind": list(kind[:4]),
            "dtypes": [dtype_name(kind.k_dtype), dtype_name(kind.v_dtype)],
        })  # fmt: skip
    ids = getattr(cache, "tokens", None)
    first: list[Entry] = [] if ids is None else [("tokens", ids.dtype, tuple(ids.shape), rows(ids))]
    write(path, [*first, *written], described(META, body))


def load(path: str | os.PathLike[str], model: Any, *, mapped: bool = True, placed: bool = True) -> LongCache:
    """Opens a saved cache. Keys and values are not read before they are used, and checked when they are.

    A model that several ranks share gets a cache of which each rank has its share, whoever wrote it; the file must be there for each.

    Those of a model on a GPU go there at once, layer by layer, as far as there is room; the rest stays in the file, and
    is streamed to the GPU whenever it is used.

    Args:
        path: the file. Nobody may write to it as long as the cache is in use; `save` replaces it as a whole.
        model: a `LlamaModel`, or something that holds one: the one that made the cache.
        mapped: see pages through a memory map; False: read them into memory that is given back after use.
        placed: bring them to the model's GPU; False: leave that to others.

    Raises:
        CacheMismatch: the cache is another model's; the message says what differs.
        CacheDamaged: the file is not what `save` writes.
        OSError: it can't be read.
    """
    inner = llama_models(model)[0]
    with uncollected():
        cache = _load(PageSource.open(path, mapped=mapped), inner)
    if read_options(inner).ring is not None:
        from .ring import membership, shard_layer

        layout = membership.layout_of(inner)
        assert layout is not None
        shard_layer.adopt(cache, layout.rank, layout.world_size)
    if placed:
        _place(cache, inner)
    return cache


def _place(cache: LongCache, inner: Any) -> None:
    """Brings keys and values to the devices of their layers, as far as there is room."""
    home = inner.embed_tokens.weight.device
    devices = [device_of(layer, home) for layer in list(inner.layers)[: len(cache.layers)]]
    gpus = {device: (free_bytes(device) or 0) * 9 // 10 for device in devices if device.type == "cuda"}
    for layer, device in zip(cache.layers, devices, strict=True):
        if device not in gpus:
            continue
        need = sum(page.nbytes for page in layer.pages)
        if need <= gpus[device]:
            gpus[device] -= need
            layer.pages = [loaded(page, device) for page in layer.pages]
        else:  # those in memory are few, and still to be appended to
            layer.pages = [page_to(page, device) if isinstance(page, Page) else page for page in layer.pages]
        layer._note(layer.kind._replace(device=device))


def _load(source: PageSource, inner: Any) -> LongCache:
    path = source.name
    body, spans = opened(source)
    theirs, mine = Identity.from_dict(body["model"]), identity(inner)
    difference = theirs.difference(mine)
    if difference:
        raise CacheMismatch(f"{path}: the cache was made by another model: {'; '.join(difference)}")
    layers = layers_of(path, body)
    _check_fit(path, layers, inner.config)
    cache = LongCache(kv=layers[0].kv)
    for layer, stored in zip(layers, stored_pages(source, spans, layers), strict=True):
        pages: list[Page | Stored] = [*stored] if layer.kv.is_model else _with_tail(stored)
        cache.layers.append(PagedLayer.of_pages(pages, body["length"], layer.kv, cache.page_size, layer.kind))
    entry = spans.get("tokens")
    if entry is not None:
        cache.tokens = ids_of(source, entry, (layers[0].kind.batch, body["length"]))
    cache._made_by(inner)
    return cache


def maker_of(cache: Any, inner: Any) -> Identity:
    """The identity of the model that made a cache, which this one is said to be.

    Raises:
        CacheMismatch: it is not.
    """
    mine, maker = identity(inner), getattr(cache, "_maker", None)
    if maker is None:
        return mine
    if maker.mixed is not None:
        raise CacheMismatch(f"cache: expected keys and values of one model, but {maker.mixed}")
    change = maker.changed()
    if change is not None:
        raise CacheMismatch(f"model: expected it as it was when it made the keys and values, but this is not: {change}")
    for other in maker.others(inner):
        difference = identity(other).difference(mine)
        if difference:
            raise CacheMismatch(f"model: expected the one that made all keys and values: {'; '.join(difference)}")
    return mine


def _paged(layer: Any) -> PagedLayer:
    """A layer of any cache that holds nothing but keys and values; nothing is copied."""
    if type(layer) is DynamicLayer:
        return PagedLayer.adopt(layer, "auto")
    if type(layer) is not PagedLayer:
        raise ValueError(f"cache: expected layers of keys and values, got a {type(layer).__name__}")
    return layer


def bounded(parts: Sequence[Page | Stored], kind: Kind) -> Iterator[Page | Stored]:
    """The same tokens in pages of about `PAGE_BYTES` at most, cut at whole groups."""
    for part in parts:
        step = max(GROUP, int(PAGE_BYTES * part.size / max(1, part.nbytes)) // GROUP * GROUP)
        for a in range(0, part.size, step):
            yield part if step >= part.size else part.narrow(a, min(a + step, part.size))


def entries(name: str, part: Page | Stored, kind: Kind) -> Iterator[Entry]:
    """What is written of a page; one that lives elsewhere is loaded when its turn comes."""
    if isinstance(part, Page):
        for of, tensor in part.tensors().items():
            yield f"{name}.{of}", tensor.dtype, tuple(tensor.shape), rows(tensor)
    else:
        for of, (shape, dtype) in shapes(part.dtypes, part.size, kind).items():
            yield f"{name}.{of}", dtype, shape, _later(part, of)


def _later(part: Stored, of: str) -> Iterator[Tensor]:
    yield from rows(part.load().tensors()[of])


def _with_tail(pages: list[StoredPage]) -> list[Page | Stored]:
    """In a compact format the newest tokens are dense, in memory: they become compact some day, together with what comes."""
    have, index = 0, len(pages)
    while index and {"k", "v"} == pages[index - 1].dtypes.keys():
        index -= 1
        have += pages[index].size
        if have > 2 * TAIL:
            return [*pages]  # dense for another reason, and too many to be read now
    tail = (page.load().tensors() for page in pages[index:])
    return [*pages[:index], *(page_of({name: tensor.clone() for name, tensor in found.items()}) for found in tail)]


def _axes(config: Any) -> tuple[int, int, int, int]:
    """Layers, kv_heads, k_dim and v_dim of a model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head_dim, head_dim


def _check_fit(path: str, layers: Sequence[StoredLayer], config: Any) -> None:
    """The layers are those of a model with this config, whatever else the file says of itself."""
    expected = _axes(config)
    for layer in layers:
        found = (len(layers), *layer.kind[1:4])
        if found != expected:
            raise CacheDamaged(f"{path}: expected layers, kv_heads, k_dim and v_dim {expected}, got {found}")
