"""Caches in files: written atomically, bound to the model that made them, opened without being read.

A saved cache is a safetensors file. `"3.7.k"` is K of the eighth page of the fourth layer (`"3.7.k.codes"` and so on where it is
compact), `"tokens"` the ids; the metadata say how they belong together. Pages are of a bounded size, so that each can
be checked and streamed alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .cache import LongCache
from .dense import Kind, Stored, loaded, page_to
from .fingerprint import Identity, identity
from .formats import GROUP, OF_DTYPE, Compact, KvFormat, Page, Side, empty
from .memory import free_bytes
from .options import llama_models
from .pages import PagedLayer
from .placement import device_of
from .sealed import TAIL
from .stored import CacheDamaged, PageSource, Span, StoredPage, as_bytes, checksum, page_of
from .tensorfile import Entry, described, description, dtype_name, dtype_of, read, rows, write

VERSION = 1
PAGE_BYTES = 16 << 20
"""Bytes of a page in a file, about: one checksum each, and the unit that is streamed."""
_META = "llama1m.cache"
_AXES = ("batch", "kv_heads", "k_dim", "v_dim")


class CacheMismatch(ValueError):
    """A saved cache belongs to another model."""


@dataclass(frozen=True)
class Info:
    """What a saved cache is.

    Attributes:
        version: of the format of the file.
        tokens: of each batch row.
        batch, layers, kv_heads, head_dim: its shape.
        kv: the format of keys and values, as the option of that name.
        dtype: of the model.
        nbytes: of the file.
        has_ids: whether the ids of the tokens are in it.
        pages: of all layers.
        model: the identity of the model that made it.
    """

    version: int
    tokens: int
    batch: int
    layers: int
    kv_heads: int
    head_dim: int
    kv: str
    dtype: str
    nbytes: int
    has_ids: bool
    pages: int
    model: Identity

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "model": self.model.as_dict()}

    def render(self) -> str:
        """For people: a line per fact."""
        config = ", ".join(f"{name} {value}" for name, value in self.model.config.items() if value is not None)
        rope = ", ".join(f"{name} {value}" for name, value in self.model.rope.items() if name != "inv_freq")
        lines = {
            "tokens": f"{self.tokens:,} in each of {self.batch} rows, ids {'known' if self.has_ids else 'unknown'}",
            "format": f"{self.kv} (model: {self.dtype})",
            "shape": f"{self.layers} layers, {self.kv_heads} kv heads, head_dim {self.head_dim}",
            "bytes": f"{self.nbytes:,} ({self.nbytes / 2**30:.2f} GiB), {self.pages} pages",
            "model": config,
            "rope": rope,
            "weights": f"{self.model.weights} ({self.model.dtype})",
            "version": str(self.version),
        }
        # Words of a file, that may be anybody's.
        return "\n".join(
            f"{name:8} {''.join(c if c.isprintable() else '?' for c in text)}" for name, text in lines.items()
        )


@dataclass(frozen=True)
class StoredLayer:
    """One layer as a file has it: the tokens of its pages, the format they are in and will be in, and their kind."""

    sizes: list[int]
    kv: KvFormat
    kind: Kind


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
    layers = [_paged(layer) for layer in getattr(cache, "layers", ())]
    lengths = {layer.length for layer in layers}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"cache: expected at least one token, as many in each layer, got lengths {sorted(lengths)}")
    entries: list[Entry] = []
    ids = getattr(cache, "tokens", None)
    if ids is not None:
        entries.append(("tokens", ids.dtype, tuple(ids.shape), rows(ids)))
    for layer in layers:
        assert layer.kind is not None  # as there are tokens
        found, expected = (len(layers), *layer.kind[1:4]), _axes(inner.config)
        if found != expected:
            raise ValueError(
                f"model: expected the one that made the cache, with layers, kv_heads, k_dim and v_dim {found}, got {expected}"
            )
    body: dict[str, Any] = {
        "version": VERSION,
        "length": lengths.pop(),
        "model": _maker_of(cache, inner).as_dict(),
        "layers": [],
    }
    for i, layer in enumerate(layers):
        kind, sizes = layer.kind, list[int]()
        assert kind is not None  # as there are tokens
        for part in _bounded(layer.share(layer.length), kind):
            sizes.append(part.size)
            entries.extend(_entries(f"{i}.{len(sizes) - 1}", part, kind))
        body["layers"].append({
            "sizes": sizes,
            "kv": layer.format.name,
            "kind": list(kind[:4]),
            "dtypes": [dtype_name(kind.k_dtype), dtype_name(kind.v_dtype)],
        })  # fmt: skip
    write(path, entries, described(_META, body))


def load(path: str | os.PathLike[str], model: Any, *, mapped: bool = True, placed: bool = True) -> LongCache:
    """Opens a saved cache. Keys and values are not read before they are used, and checked when they are.

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
    with _uncollected():
        cache = _load(PageSource.open(path, mapped=mapped), inner)
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
    body, spans = _opened(source)
    theirs, mine = Identity.from_dict(body["model"]), identity(inner)
    difference = theirs.difference(mine)
    if difference:
        raise CacheMismatch(f"{path}: the cache was made by another model: {'; '.join(difference)}")
    layers = _layers(path, body)
    _check_fit(path, layers, inner.config)
    cache = LongCache(kv=layers[0].kv)
    for layer, stored in zip(layers, stored_pages(source, spans, layers), strict=True):
        pages: list[Page | Stored] = [*stored] if layer.kv.is_model else _with_tail(stored)
        cache.layers.append(PagedLayer.of_pages(pages, body["length"], layer.kv, cache.page_size, layer.kind))
    entry = spans.get("tokens")
    if entry is not None:
        cache.tokens = _ids(source, entry, (layers[0].kind.batch, body["length"]))
    cache._made_by(inner)
    return cache


def info(path: str | os.PathLike[str]) -> Info:
    """What a saved cache is, from its header.

    Raises:
        CacheDamaged: the file is not what `save` writes.
        OSError: it can't be read.
    """
    with _uncollected():
        return _info(PageSource.open(path))


def _info(source: PageSource) -> Info:
    body, spans = _opened(source)
    layers = _layers(source.name, body)
    stored_pages(source, spans, layers)
    kind = layers[0].kind
    return Info(
        version=body["version"],
        tokens=body["length"],
        batch=kind.batch,
        layers=len(layers),
        kv_heads=kind.kv_heads,
        head_dim=kind.k_dim,
        kv=layers[0].kv.name,
        dtype=dtype_name(kind.k_dtype),
        nbytes=os.fstat(source.fd).st_size,
        has_ids="tokens" in spans,
        pages=sum(len(layer.sizes) for layer in layers),
        model=Identity.from_dict(body["model"]),
    )


def verify(path: str | os.PathLike[str], step: Callable[[int], object] = int) -> Info:
    """Reads all of a saved cache and checks it.

    Args:
        step: is told how many bytes more were checked.

    Raises:
        CacheDamaged: something is not what was written; the message says what.
        OSError: it can't be read.
    """
    source = PageSource.open(path)
    found = _info(source)
    body, spans = _opened(source)
    for pages in stored_pages(source, spans, _layers(path, body)):
        for page in pages:
            page.load()
            step(page.nbytes)
    if found.has_ids:
        _ids(source, spans["tokens"], (found.batch, found.tokens))
    return found


def _maker_of(cache: Any, inner: Any) -> Identity:
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


def verified_with_bar(path: str | os.PathLike[str]) -> Info:
    """`verify` with a progress bar."""
    from tqdm.auto import tqdm

    with tqdm(total=os.stat(path).st_size, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        return verify(path, bar.update)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Many small objects are made that all stay: looking for garbage among them would take longer than all the rest."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# -- pages -------------------------------------------------------------------------------------------------------------


def _bounded(parts: Sequence[Page | Stored], kind: Kind) -> Iterator[Page | Stored]:
    """The same tokens in pages of about `PAGE_BYTES` at most, cut at whole groups."""
    for part in parts:
        step = max(GROUP, int(PAGE_BYTES * part.size / max(1, part.nbytes)) // GROUP * GROUP)
        for a in range(0, part.size, step):
            yield part if step >= part.size else part.narrow(a, min(a + step, part.size))


def _entries(name: str, part: Page | Stored, kind: Kind) -> Iterator[Entry]:
    """What is written of a page; one that lives elsewhere is loaded when its turn comes."""
    if isinstance(part, Page):
        for of, tensor in part.tensors().items():
            yield f"{name}.{of}", tensor.dtype, tuple(tensor.shape), rows(tensor)
    else:
        for of, (shape, dtype) in _shapes(part.dtypes, part.size, kind).items():
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


_SIDES = ("k", "v", "k.codes", "k.params", "v.codes", "v.params")
_Tensors = dict[str, tuple[Span, int | None]]


def stored_pages(source: PageSource, spans: _Tensors, layers: Sequence[StoredLayer]) -> list[list[StoredPage]]:
    """The pages of all layers, each of the shapes that it must have, and nothing in the file that belongs nowhere.

    Args:
        spans: what `tensorfile.read` found; the names are those of this module's docstring.

    Raises:
        CacheDamaged: something else is in the file.
    """
    tensors: dict[str, _Tensors] = {f"{i}.{j}": {} for i, layer in enumerate(layers) for j in range(len(layer.sizes))}
    for name, entry in spans.items():
        layer, _, rest = name.partition(".")
        page, _, side = rest.partition(".")
        if name != "tokens":
            if side not in _SIDES or f"{layer}.{page}" not in tensors:
                raise CacheDamaged(f"{source.name}: tensor {name!r:.80} belongs to no page")
            tensors[f"{layer}.{page}"][side] = entry
    return [
        [_page(source, f"{i}.{j}", tensors[f"{i}.{j}"], size, layer.kind) for j, size in enumerate(layer.sizes)]
        for i, layer in enumerate(layers)
    ]


def _page(source: PageSource, name: str, tensors: _Tensors, size: int, kind: Kind) -> StoredPage:
    page = StoredPage(source, {of: span for of, (span, _) in tensors.items()}, _known(source.name, name, tensors))
    expected = _expected(tuple(page.dtypes.items()), size, kind)
    for of, (span, _) in tensors.items():
        if (span.shape, span.dtype) != expected.get(of):
            raise CacheDamaged(
                f"{source.name}: tensor {name}.{of}: expected {expected.get(of)}, got {(span.shape, span.dtype)}"
            )
    return page


def _known(file: str, name: str, spans: Mapping[str, tuple[Span, int | None]]) -> dict[str, int]:
    found = {of: value for of, (_, value) in spans.items() if value is not None}
    if len(found) != len(spans):
        raise CacheDamaged(f"{file}: page {name}: expected a checksum of each tensor")
    return found


def _shapes(dtypes: Mapping[str, torch.dtype], size: int, kind: Kind) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a page's tensors, given the dtypes of its codes."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    sides: dict[str, Side] = {}
    for which, head_dim, dtype in (("k", kind.k_dim, kind.k_dtype), ("v", kind.v_dim, kind.v_dtype)):
        name = OF_DTYPE.get(dtypes.get(f"{which}.codes"), "model")  # type: ignore[arg-type]  # None is none of them
        like = torch.empty(0, dtype=dtype, device="meta")
        shape = (kind.batch, kind.kv_heads, size, head_dim)
        sides[which] = empty(name, which, shape, like)  # type: ignore[arg-type]  # of the names there are
    for which, side in sides.items():
        if isinstance(side, Compact):
            found[f"{which}.codes"] = (tuple(side.codes.shape), side.codes.dtype)
            found[f"{which}.params"] = (tuple(side.params.shape), side.params.dtype)
        else:
            found[which] = (tuple(side.shape), side.dtype)
    return found


@functools.lru_cache(maxsize=64)
def _expected(
    dtypes: tuple[tuple[str, torch.dtype], ...], size: int, kind: Kind
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return _shapes(dict(dtypes), size, kind)


# -- the header --------------------------------------------------------------------------------------------------------


def _opened(source: PageSource) -> tuple[dict[str, Any], dict[str, tuple[Span, int | None]]]:
    """The description in the metadata, its types checked, and the tensors."""
    path = source.name
    metadata, spans = read(source)
    body = description(metadata, _META, path)
    try:
        version = body["version"]
        if version != VERSION:
            raise CacheMismatch(f"{path}: expected version {VERSION} of the format, got {version!r}")
        if type(body["length"]) is not int or body["length"] < 1 or not isinstance(body["layers"], list):
            raise ValueError("expected a length and layers")
        Identity.from_dict(body["model"])
    except CacheMismatch:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CacheDamaged(f"{path}: the metadata make no sense: {e!r}") from None
    return body, spans


def _layers(path: str | os.PathLike[str], body: Mapping[str, Any]) -> list[StoredLayer]:
    try:
        found = [_layer(entry, body["length"]) for entry in body["layers"]]
        if not found or len({layer.kind.batch for layer in found}) != 1:
            raise ValueError("expected layers of one batch")
    except (ValueError, KeyError, TypeError) as e:
        raise CacheDamaged(f"{path}: the metadata make no sense: {e!r}") from None
    return found


def _layer(entry: Mapping[str, Any], length: int) -> StoredLayer:
    sizes, axes, dtypes = entry["sizes"], entry["kind"], entry["dtypes"]
    for name, numbers in (("sizes", sizes), ("kind", axes)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 < n < 1 << 40 for n in numbers):
            raise ValueError(f"{name}: expected numbers from 1 on, got {numbers!r:.80}")
    if sum(sizes) != length or len(axes) != len(_AXES) or len(dtypes) != 2:
        raise ValueError(f"expected pages with {length} tokens, {_AXES} and two dtypes")
    k_dtype, v_dtype = (dtype_of(name) for name in dtypes)
    batch, kv_heads, k_dim, v_dim = axes
    if (
        math.prod((batch, kv_heads, max(k_dim, v_dim), length)) >= 1 << 50
    ):  # also rounded up to groups, torch can count it
        raise ValueError(f"kind: expected what a file can hold, got {axes} for {length} tokens")
    return StoredLayer(
        sizes, KvFormat.parse(entry["kv"]), Kind(batch, kv_heads, k_dim, v_dim, k_dtype, v_dtype, torch.device("cpu"))
    )


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


def _ids(source: PageSource, entry: tuple[Span, int | None], shape: tuple[int, int]) -> Tensor:
    path, (span, expected) = source.name, entry
    if span.shape != shape or span.dtype != torch.int64:
        raise CacheDamaged(f"{path}: tokens: expected int64 {shape}, got {span.dtype} {span.shape}")
    ids = torch.empty(shape, dtype=torch.int64)
    source.read(span.offset, as_bytes(ids))
    if checksum(ids) != expected:
        raise CacheDamaged(f"{path}: tokens: the file is damaged")
    return ids
