"""A cache that is spread over ranks, to one file that any number of ranks reads: rank 0 writes it and asks the others, page by page."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, saved
from ..dense import Kind, Stored, loaded, part_of
from ..formats import GROUP, OF_DTYPE, Compact, Page
from ..saved_file import shapes
from ..tensorfile import Entry
from . import agreement
from .layout import Layout
from .shard_layer import ShardLayer

__all__ = ["save"]

_GO, _DONE, _FAILED = 1, 2, 3
_DTYPES = {str(dtype): dtype for dtype in (*OF_DTYPE, torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class _Piece(NamedTuple):
    """A page of the file that one rank has.

    Attributes:
        at: position of its first token.
        size: tokens.
        dtypes: of its tensors, by name.
    """

    at: int
    size: int
    dtypes: dict[str, str]


def save(layout: Layout, cache: Any, path: str | os.PathLike[str], inner: Any) -> None:
    """As `saved.save`; all ranks call it, and rank 0 writes.

    Args:
        layout: of the ranks that share the cache.
        inner: the `LlamaModel` that made it.

    Raises:
        CacheMismatch, ValueError, OSError: as `saved.save`, on the rank where it is so; on the others
        DisagreementError: one of them can't, or they differ in the cache, the model or the path.
        OSError: rank 0 could not write.
        LinkError: a rank is silent.
    """
    links, device = layout.links, layout.control_device()
    problem: Exception | None = None
    same: dict[str, object] = {}
    mine: list[list[tuple[int, Page | Stored]]] = []
    maker: dict[str, Any] = {}
    try:
        layers, maker = _checked(layout, cache, inner), saved.maker_of(cache, inner).as_dict()
        same = {"path": os.fspath(path), "parts": layers[0].spread.parts, "kv": layers[0].format.name, "model": maker}
        mine = [list(_in_order(layer)) for layer in layers]
    except (ValueError, TypeError, RuntimeError, OSError) as e:
        problem = e
    agreement.agree(links, same, 0, problem, device)
    told = [[_Piece(at, part.size, _dtypes(part)) for at, part in layer] for layer in mine]
    kinds = [layer.kind for layer in layers]
    sheets = [json.loads(b) for b in _everybody(layout, json.dumps([told, _kind(kinds)]).encode())]
    if layout.rank:
        _serve(layout, [part for layer in mine for _, part in layer], path)
        return
    kind = next((_kind_of(sheet[1], device) for sheet in sheets if sheet[1] is not None), None)
    assert kind is not None  # somebody has a token
    pieces = [
        sorted((_Piece(*piece), rank) for rank, sheet in enumerate(sheets) for piece in sheet[0][i])
        for i in range(len(layers))
    ]
    try:
        saved.write_cache(path, cache, maker, [
            ([piece.size for piece, _ in of], layers[0].format.name, kind) for of in pieces
        ], _entries(layout, pieces, mine, kind))  # fmt: skip
    except BaseException:
        _tell(layout, _FAILED)
        raise
    _tell(layout, _DONE)


def _checked(layout: Layout, cache: Any, inner: Any) -> list[ShardLayer]:
    layers = list(getattr(cache, "layers", ()))
    for layer in layers:
        if type(layer) is not ShardLayer:
            raise ValueError(f"cache: expected layers that the ranks share, got a {type(layer).__name__}")
        if (layer.rank, layer.spread.ranks) != (layout.rank, layout.world_size):
            raise ValueError(
                f"cache: expected that of rank {layout.rank} of {layout.world_size}, got one of {layer.rank} of {layer.spread.ranks}"
            )
    if not layers or any(layer.spread != layers[0].spread for layer in layers) or not layers[0].spread.length:
        raise ValueError("cache: expected at least one token, and the same ones in each layer")
    if len(layers) != inner.config.num_hidden_layers:
        raise ValueError(
            f"model: expected the one that made the cache, of {len(layers)} layers, got one of {inner.config.num_hidden_layers}"
        )
    for part in layers[0].spread.parts:
        if part.how == "striped":
            raise ValueError(
                "cache: expected runs of neighbouring tokens on each rank, got sharding='striped', which one file can't hold; use "
                "'zigzag'"
            )
    return layers


def _in_order(layer: ShardLayer) -> Iterator[tuple[int, Page | Stored]]:
    """This rank's tokens as pages that follow the runs of their positions, each with its first position.

    Compact keys share scales over 64 tokens, which may lie on both sides of a gap: those after it become dense.
    """
    kind = layer.kind
    if not layer.length or kind is None:
        return
    parts, at = layer.share(layer.length), 0
    places = list[tuple[int, int, Page | Stored]]()
    for part in parts:
        places.append((at, at + part.size, part))
        at += part.size
    begin = 0
    for start, stop, _ in layer.spread.runs(layer.rank):
        end = begin + stop - start
        for a, b, part in places:
            lo, hi = max(begin, a), min(end, b)
            if lo >= hi:
                continue
            for first, last, found in _cut(part, lo - a, hi - a, kind):
                for piece in saved.bounded([found], kind):
                    yield start + a + first - begin, piece
                    first += piece.size
                assert first == last
        begin = end


def _cut(part: Page | Stored, a: int, b: int, kind: Kind) -> Iterator[tuple[int, int, Page | Stored]]:
    """Tokens `a` to `b` of a page, as (first, last, page)."""
    if a % GROUP and "k" not in _dtypes(part):
        whole, stop = loaded(part), min(b, a + GROUP - a % GROUP)
        group = a // GROUP * GROUP
        k, v = ops.kv_read(whole.narrow(group, stop), 0, stop - group, kind.k_dim, kind.k_dtype)
        yield a, stop, Page(k[:, :, a - group :].contiguous(), v[:, :, a - group :].contiguous())
        a = stop
    if a < b:
        yield a, b, part_of(part, a, b)


def _dtypes(part: Page | Stored) -> dict[str, str]:
    held = {name: t.dtype for name, t in part.tensors().items()} if isinstance(part, Page) else part.dtypes
    return {name: str(dtype) for name, dtype in held.items()}


def _kind(kinds: Sequence[Kind | None]) -> list[Any] | None:
    kind = kinds[0]
    return None if kind is None else [*kind[:4], str(kind.k_dtype), str(kind.v_dtype)]


def _kind_of(told: Sequence[Any], device: torch.device) -> Kind:
    batch, kv_heads, k_dim, v_dim, k_dtype, v_dtype = told
    return Kind(batch, kv_heads, k_dim, v_dim, _DTYPES[k_dtype], _DTYPES[v_dtype], device)


def _entries(
    layout: Layout, pieces: list[list[tuple[_Piece, int]]], mine: list[list[tuple[int, Page | Stored]]], kind: Kind
) -> Iterator[Entry]:
    """What is written, of all ranks."""
    for i, (of, own) in enumerate(zip(pieces, mine, strict=True)):
        here = iter(own)
        for j, (piece, rank) in enumerate(of):
            if rank == layout.rank:
                yield from saved.entries(f"{i}.{j}", next(here)[1], kind)
                continue
            dtypes = {name: _DTYPES[dtype] for name, dtype in piece.dtypes.items()}
            for name, (shape, dtype) in shapes(dtypes, piece.size, kind).items():
                yield f"{i}.{j}.{name}", dtype, shape, _asked(layout, rank, shape, dtype)


def _asked(layout: Layout, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor of another rank, when its turn comes."""
    got = torch.empty(shape, dtype=dtype, device=layout.control_device())
    go = torch.tensor([_GO], device=got.device)
    layout.links.exchange([(go, rank)], [(got, rank)], "saving a cache: a page", control=True).wait()
    yield got.cpu()


def _serve(layout: Layout, parts: Sequence[Page | Stored], path: str | os.PathLike[str]) -> None:
    """Sends rank 0 what it asks for, in order, until it is done."""
    waiting = (tensor for part in parts for tensor in _tensors(part))
    while True:
        said = torch.empty(1, dtype=torch.int64, device=layout.control_device())
        layout.links.exchange([], [(said, 0)], "saving a cache: waiting for rank 0", control=True).wait()
        if said.item() != _GO:
            if said.item() == _FAILED:
                raise OSError(f"{os.fspath(path)}: rank 0 could not write it; its error says why")
            return
        tensor = next(waiting).to(said.device).contiguous()
        layout.links.exchange([(tensor, 0)], [], "saving a cache: a page", control=True).wait()


def _tensors(part: Page | Stored) -> Iterator[Tensor]:
    page = loaded(part)
    for side in (page.k, page.v):
        yield from side if isinstance(side, Compact) else (side,)


def _tell(layout: Layout, code: int) -> None:
    said = torch.tensor([code], device=layout.control_device())
    messages = [(said, r) for r in range(1, layout.world_size)]
    layout.links.exchange(messages, [], "saving a cache: the end", control=True).wait()


def _everybody(layout: Layout, raw: bytes) -> list[bytes]:
    """Bytes of each rank, of any length."""
    links, device = layout.links, layout.control_device()
    size = struct.Struct("<q")
    lengths = agreement._all(links, size.pack(len(raw)), [size.size] * links.world_size, device)
    return agreement._all(links, raw, [size.unpack(n)[0] for n in lengths], device)
