"""What is in the file of a saved cache, without a model: its header, its pages, whether it is what was written.

Nothing here needs transformers: who asks what a file is need not wait for it.
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

from .dense import Kind
from .fingerprint import Identity
from .formats import OF_DTYPE, Compact, KvFormat, Side, empty
from .stored import CacheDamaged, PageSource, Span, StoredPage, as_bytes, checksum
from .tensorfile import description, dtype_name, dtype_of, read

VERSION = 1
META = "llama1m.cache"
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


def info(path: str | os.PathLike[str]) -> Info:
    """What a saved cache is, from its header.

    Raises:
        CacheDamaged: the file is not what `save` writes.
        OSError: it can't be read.
    """
    with uncollected():
        return _info(PageSource.open(path))


def _info(source: PageSource) -> Info:
    body, spans = opened(source)
    layers = layers_of(source.name, body)
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
    body, spans = opened(source)
    for pages in stored_pages(source, spans, layers_of(path, body)):
        for page in pages:
            page.load()
            step(page.nbytes)
    if found.has_ids:
        ids_of(source, spans["tokens"], (found.batch, found.tokens))
    return found


def verified_with_bar(path: str | os.PathLike[str]) -> Info:
    """`verify` with a progress bar."""
    from tqdm.auto import tqdm

    with tqdm(total=os.stat(path).st_size, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        return verify(path, bar.update)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Many small objects are made that all stay: looking for garbage among them would take longer than all the rest."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# -- pages -------------------------------------------------------------------------------------------------------------
# -- pages -------------------------------------------------------------------------------------------------------------


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


def shapes(dtypes: Mapping[str, torch.dtype], size: int, kind: Kind) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
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
    return shapes(dict(dtypes), size, kind)


# -- the header --------------------------------------------------------------------------------------------------------


def opened(source: PageSource) -> tuple[dict[str, Any], dict[str, tuple[Span, int | None]]]:
    """The description in the metadata, its types checked, and the tensors."""
    path = source.name
    metadata, spans = read(source)
    body = description(metadata, META, path)
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


def layers_of(path: str | os.PathLike[str], body: Mapping[str, Any]) -> list[StoredLayer]:
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


def ids_of(source: PageSource, entry: tuple[Span, int | None], shape: tuple[int, int]) -> Tensor:
    path, (span, expected) = source.name, entry
    if span.shape != shape or span.dtype != torch.int64:
        raise CacheDamaged(f"{path}: tokens: expected int64 {shape}, got {span.dtype} {span.shape}")
    ids = torch.empty(shape, dtype=torch.int64)
    source.read(span.offset, as_bytes(ids))
    if checksum(ids) != expected:
        raise CacheDamaged(f"{path}: tokens: the file is damaged")
    return ids
