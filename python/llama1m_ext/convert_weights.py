"""Weights of an original Llama-3 checkpoint: `consolidated.NN.pth`, one file for each rank of model parallelism.

Files are mapped, not read. Each tensor is put together from its shards in parts, so that no more of it is in memory than
a head's rows or some megabytes at a time.
"""

from __future__ import annotations

import errno
import math
import mmap
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .convert_params import ConvertError, Params

_PART = 32 << 20
"""Bytes that are put together at a time."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Made by the program when it starts; some checkpoints have it all the same.
_IGNORED = {"rope.freqs"}
_LAYER = (
    ("attention.wq", "self_attn.q_proj", 0),
    ("attention.wk", "self_attn.k_proj", 0),
    ("attention.wv", "self_attn.v_proj", 0),
    ("attention.wo", "self_attn.o_proj", 1),
    ("feed_forward.w1", "mlp.gate_proj", 0),
    ("feed_forward.w2", "mlp.down_proj", 1),
    ("feed_forward.w3", "mlp.up_proj", 0),
    ("attention_norm", "input_layernorm", None),
    ("ffn_norm", "post_attention_layernorm", None),
)
"""Names there and here, and the axis along which shards are cut."""


@dataclass(frozen=True)
class Weight:
    """A tensor of the new checkpoint.

    Attributes:
        name: in transformers' layout.
        shape, dtype: of the whole.
        shards: its parts, along `axis`; one if all ranks have the same.
        axis: 0 or 1.
        head_dim: of a query or key projection, whose rows change their order; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: tuple[Tensor, ...]
    axis: int
    head_dim: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def parts(self) -> Iterator[Tensor]:
        """Its elements in order, in contiguous parts."""
        if self.head_dim is not None:
            for shard in self.shards:
                for rows in shard.split(self.head_dim):
                    # Pairs (2i, 2i + 1) are rotated there, (i, i + head_dim / 2) here.
                    yield rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1).contiguous()
            return
        step = max(1, _PART // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        if self.axis == 0:
            for shard in self.shards:
                yield from (part.contiguous() for part in shard.split(step))
            return
        for a in range(0, self.shape[0], step):
            yield torch.cat([shard[a : a + step] for shard in self.shards], dim=1)


def shard_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in the order of their ranks.

    Raises:
        ConvertError: there are none, or one is missing.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("consolidated.*.pth"):
        match = re.fullmatch(r"consolidated\.(\d+)\.pth", path.name)
        if match is not None:
            rank = int(match[1])
            if rank in found:
                raise ConvertError(
                    f"{folder}: expected one file of rank {rank}, got {found[rank].name} and {path.name}"
                )
            found[rank] = path
    if not found:
        raise ConvertError(f"{folder}: expected consolidated.00.pth, got no such file")
    for rank in range(max(found) + 1):
        if rank not in found:
            raise ConvertError(f"{folder}: expected consolidated.{rank:02}.pth, as there is {found[max(found)].name}")
    return [found[rank] for rank in sorted(found)]


def open_shard(path: Path) -> dict[str, Tensor]:
    """A file's tensors, mapped.

    Raises:
        ConvertError: it is damaged, holds anything but plain tensors by name, or was written before torch 1.6.
        OSError: it can't be read.
    """
    try:
        found: Any = _load(path)
    except pickle.UnpicklingError as e:
        why = next((line for line in str(e).splitlines() if "Unsupported" in line or "GLOBAL" in line), str(e)[:200])
        raise ConvertError(f"{path}: expected weights and nothing else: {why.strip()}") from None
    except OSError:
        raise
    except Exception as e:  # torch has no one exception for what is not its file
        raise ConvertError(f"{path}: expected a checkpoint in torch's zip format: {str(e)[:200]}") from None
    if not isinstance(found, dict):
        raise ConvertError(f"{path}: expected tensors by name, got {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str):
            raise ConvertError(f"{path}: expected names, got a {type(name).__name__}")
        if name in _IGNORED:
            continue
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ConvertError(f"{path}: {name}: expected a dense tensor, got {_what(tensor)}")
        if tensor.dtype not in _DTYPES:
            raise ConvertError(f"{path}: {name}: expected bfloat16, float16 or float32, got {tensor.dtype}")
        if tensor.is_neg():
            raise ConvertError(f"{path}: {name}: expected numbers as they are, got a view of their negatives")
        _check_storage(path, name, tensor)
    return {name: tensor.detach() for name, tensor in found.items() if name not in _IGNORED}


def _load(path: Path) -> Any:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as e:
        if "unable to mmap" not in str(e) or "memory" not in str(e):
            raise
    # Linux allows no private mapping larger than memory and swap together, unless told to overcommit. A shared one is not
    # counted, but torch makes it writable, as the file must be then; nobody writes to it.
    try:
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as e:
        what = f"a file larger than memory can't be mapped, unless it is writable: {str(e)[:200]}"
        raise OSError(errno.ENOMEM, what, str(path)) from None


def is_tied(shards: list[dict[str, Tensor]]) -> bool:
    """Whether the output layer and the embedding are the same memory in every file, as those of Llama 3.2's small ones."""
    pairs = [(shard.get("output.weight"), shard.get("tok_embeddings.weight")) for shard in shards]
    return all(
        a is not None
        and b is not None
        and (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())
        for a, b in pairs
    )


def plan(
    paths: list[Path], shards: list[dict[str, Tensor]], params: Params, vocab_size: int, tied: bool
) -> list[Weight]:
    """The tensors of the new checkpoint, each checked.

    Args:
        paths, shards: from `shard_files`, `open_shard`.
        params: the model.
        vocab_size: rows of the embedding.
        tied: whether the output layer is the embedding: then it is not there, or has the same numbers.

    Raises:
        ConvertError: a tensor is missing, is one too many, or has another shape or dtype than expected.
    """
    left = [set(shard) for shard in shards]
    if params.n_kv_heads % len(shards):
        raise ConvertError(
            f"{paths[0].parent}: expected a number of shards that divides n_kv_heads={params.n_kv_heads}, got {len(shards)}"
        )

    def weight(old: str, new: str, shape: tuple[int, ...], axis: int | None, turned: bool = False) -> Weight:
        name = f"{old}.weight"
        parts: list[Tensor] = []
        # The embedding was cut along its other axis by Llama 2's program: the first shard tells which.
        if old == "tok_embeddings" and name in shards[0] and tuple(shards[0][name].shape) != _share(shape, 0, shards):
            axis = 1
        expected = _share(shape, axis, shards)
        for path, shard, rest in zip(paths, shards, left, strict=True):
            if name not in shard:
                raise ConvertError(f"{path}: {name}: expected shape {expected}, got no such tensor")
            tensor = shard[name]
            if tuple(tensor.shape) != expected:
                of = "" if len(shards) == 1 or axis is None else f", one of {len(shards)} shards of {shape}"
                raise ConvertError(f"{path}: {name}: expected shape {expected}{of}, got {tuple(tensor.shape)}")
            if parts and tensor.dtype != parts[0].dtype:
                raise ConvertError(
                    f"{path}: {name}: expected {parts[0].dtype} as in {paths[0].name}, got {tensor.dtype}"
                )
            if parts and axis is None and not torch.equal(tensor, parts[0]):
                raise ConvertError(f"{path}: {name}: expected the numbers that {paths[0].name} has, got others")
            rest.discard(name)
            parts.append(tensor)
        kept = tuple(parts[:1] if axis is None else parts)
        return Weight(new, shape, parts[0].dtype, kept, axis or 0, params.head_dim if turned else None)

    dim, kv_dim, hidden = params.dim, params.n_kv_heads * params.head_dim, params.hidden_dim
    shapes = {
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    weights = [weight("tok_embeddings", "model.embed_tokens.weight", (vocab_size, dim), 0)]
    for i in range(params.n_layers):
        for old, new, axis in _LAYER:
            turned = old in ("attention.wq", "attention.wk")
            weights.append(weight(f"layers.{i}.{old}", f"model.layers.{i}.{new}.weight", shapes[old], axis, turned))
    weights.append(weight("norm", "model.norm.weight", (dim,), None))
    if not tied:
        weights.append(weight("output", "lm_head.weight", (vocab_size, dim), 0))
    else:
        for path, shard, rest in zip(paths, shards, left, strict=True):
            output, table = shard.get("output.weight"), shard["tok_embeddings.weight"]
            if output is not None and not (output.dtype == table.dtype and torch.equal(output, table)):
                raise ConvertError(
                    f"{path}: output.weight: expected the numbers of tok_embeddings.weight, as the output is to be the "
                    "embedding, got others"
                )
            rest.discard("output.weight")
    for path, rest in zip(paths, left, strict=True):
        if rest:
            raise ConvertError(
                f"{path}: expected the tensors of a Llama 3 of {params.n_layers} layers, got {min(rest)} as well"
                + (f", and {len(rest) - 1} more" if len(rest) > 1 else "")
            )
    return weights


def _share(shape: tuple[int, ...], axis: int | None, shards: list[Any]) -> tuple[int, ...]:
    """A shard's shape. An axis that can't be cut evenly gives a shape that no tensor has."""
    if axis is None:
        return shape
    size = shape[axis] // len(shards) if shape[axis] % len(shards) == 0 else -1
    return (*shape[:axis], size, *shape[axis + 1 :])


def _check_storage(path: Path, name: str, tensor: Tensor) -> None:
    """A view that shows the same memory again and again, or more than there is, is no weight."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    held = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize - tensor.storage_offset()
    if tensor.numel() == 0 or reach > held or tensor.numel() > held:
        raise ConvertError(f"{path}: {name}: expected {tuple(tensor.shape)} elements, got {held} in memory")


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.layout} on {value.device.type}"
    return type(value).__name__
