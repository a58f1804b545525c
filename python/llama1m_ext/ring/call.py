"""One call on all ranks: its arguments are checked, and agreed on, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cuda, ops
from . import agreement
from .blocks import Bounds
from .layout import Layout
from .schedule import Schedule, schedule

__all__ = ["Call", "agreed"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What is the same on all ranks in one call.

    Attributes:
        layout: who holds what.
        length: of the whole sequence.
        scale: of the scores.
        plan: this rank's schedule.
        bounds: visible keys.
        q_heads, kv_heads: before heads are shared out.
    """

    layout: Layout
    length: int
    scale: float
    plan: Schedule
    bounds: Bounds
    q_heads: int
    kv_heads: int


def agreed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    length: int | None,
    causal: bool,
    softmax_scale: float | None,
    documents: Sequence[int] | None,
    kv_start: Tensor | int | None,
    kv_end: Tensor | int | None,
) -> Call:
    """See `attention.ring_attention`."""
    problem: Exception | None = None
    same: dict[str, object] = {}
    start = end = None
    try:
        _check(q, k, v, layout, length, causal, softmax_scale)
        starts = None if documents is None else _documents(documents)
        start, end = _bound("kv_start", kv_start, q), _bound("kv_end", kv_end, q)
        same = {
            **_versions(),
            **layout.same(),
            "dtype": q.dtype,
            "device": q.device.type,
            "batch": q.shape[0],
            "q_heads": q.shape[1],
            "kv_heads": k.shape[1],
            "head_dim": q.shape[3],
            "length": length,
            "causal": causal,
            "softmax_scale": softmax_scale,
            "documents": starts,
            "kv_start": _told(start),
            "kv_end": _told(end),
            "gradients": torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)),
        }
    except (TypeError, ValueError, cuda.Missing) as e:
        problem, starts = e, None
    n = q.shape[2] if isinstance(q, Tensor) and q.dim() == 4 else -1
    lengths = _lengths(layout, same, n, problem, length is None or not isinstance(q, Tensor) or q.device.type == "cpu")
    whole = sum(lengths) if length is None else length
    expected = layout.lengths(whole)
    if lengths != expected:
        raise ValueError(
            f"q: expected shards of {_short(expected)} tokens, as {layout} has them, got {_short(lengths)}"
        )
    plan = schedule(layout, whole, causal, starts)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else float(softmax_scale)
    bounds = Bounds(layout.sharding, whole, layout.ring_size, start, end)
    return Call(layout, whole, scale, plan, bounds, q.shape[1], k.shape[1])


def _lengths(layout: Layout, same: dict[str, object], n: int, problem: Exception | None, every_time: bool) -> list[int]:
    """Tokens of each rank's shard, once all ranks have said the same."""
    if layout.world_size == 1:
        if problem is not None:
            raise problem
        return [n]
    key = (tuple(same.items()), n)
    if problem is None and not every_time and key in layout.agreed:
        return layout.agreed[key]
    lengths = agreement.agree(layout.links, same, n, problem, layout.control_device())
    if not every_time:
        if len(layout.agreed) >= 1024:  # on all ranks at once: they have agreed on the same things
            layout.agreed.clear()
        layout.agreed[key] = lengths
    return lengths


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, length: int | None, causal: bool, softmax_scale: float | None
) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        ops._tensors(name, [t])
        if t.dim() != 4:
            raise ValueError(f"{name}: expected [batch, heads, n, head_dim], got shape {tuple(t.shape)}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {t.dtype}")
        if (t.dtype, t.device) != (q.dtype, q.device):
            raise TypeError(
                f"{name}: expected q's dtype and device, {q.dtype} on {q.device}, got {t.dtype} on {t.device}"
            )
    batch, q_heads, n, head_dim = q.shape
    for name, t in (("k", k), ("v", v)):
        if (t.shape[0], *t.shape[2:]) != (batch, n, head_dim):
            want = f"[{batch}, kv_heads, {n}, {head_dim}], as q's shape is {tuple(q.shape)}"
            raise ValueError(f"{name}: expected {want}, got {tuple(t.shape)}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"v: expected kv_heads={k.shape[1]}, as k has, got {v.shape[1]}")
    kv_heads = k.shape[1]
    if batch < 1 or kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"k: expected kv_heads that divide q_heads={q_heads}, got {kv_heads} (batch {batch})")
    if not 8 <= head_dim <= 256:
        raise ValueError(f"q: expected head_dim from 8 to 256, got {head_dim}")
    if type(causal) is not bool:
        raise TypeError(f"causal: expected True or False, got {causal!r}")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale!r}")
    layout.check_heads(q_heads, kv_heads)
    layout.check_device(q.device)
    if cuda.serves(q):
        cuda.check(q.device)
    if length is not None:
        if type(length) is not int or length < 0:
            raise ValueError(f"length: expected a whole number from 0 on, got {length!r}")
        expected = layout.lengths(length)[layout.rank]
        if n != expected:
            raise ValueError(f"q: expected {expected} tokens of {length} on rank {layout.rank}, by {layout}, got {n}")


def _documents(documents: Sequence[int]) -> tuple[int, ...]:
    found = tuple(documents)
    if any(type(start) is not int for start in found):
        raise TypeError(f"documents: expected start positions, ints, got {found!r:.80}")
    return found


def _bound(name: str, bound: Tensor | int | None, q: Tensor) -> Tensor | None:
    if bound is None:
        return None
    if isinstance(bound, int):
        return torch.full((q.shape[0],), bound, dtype=torch.int64, device=q.device)
    if not isinstance(bound, Tensor) or bound.dtype != torch.int64 or bound.shape != (q.shape[0],):
        got = f"{bound.dtype} {tuple(bound.shape)}" if isinstance(bound, Tensor) else type(bound).__name__
        raise TypeError(f"{name}: expected an int, or int64 [{q.shape[0]}], one of each batch row, got {got}")
    return bound.to(q.device)


def _told(bound: Tensor | None) -> object:
    """What ranks compare of a bound: its numbers, where reading them waits for nobody."""
    return None if bound is None else bound.tolist() if bound.device.type == "cpu" else tuple(bound.shape)


def _versions() -> dict[str, object]:
    import llama1m_ext

    return {"llama1m_ext": llama1m_ext.__version__, "torch": torch.__version__}


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 16 else f"{str(numbers[:16])[:-1]}, ..]"
