"""What ranks do in tests of ring attention, and what a single process would have made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama1m_ext import _core, ops
from llama1m_ext.formats import KvFormat, Page, empty
from llama1m_ext.ring import Layout, predicted, ring_attention


@dataclass(frozen=True)
class Case:
    """A problem: shapes, visibility, and how it is spread."""

    ranks: int
    length: int
    layout: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = True
    scale: float | None = None
    documents: tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None
    end: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def kv_format(self) -> KvFormat:
        return KvFormat.parse(self.layout.get("kv_format", "model"))

    @property
    def ring_size(self) -> int:
        return self.ranks // self.layout.get("heads", 1)

    def inputs(self) -> list[Tensor]:
        """q, k, v, the gradients of out and lse: whole, rounded to the dtype."""
        g = torch.Generator().manual_seed(self.seed)
        shape = self.batch, self.length, self.head_dim
        made = [
            torch.randn(shape[0], heads, *shape[1:], generator=g).to(self.dtype)
            for heads in (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        ]
        return [*made, torch.randn(self.batch, self.q_heads, self.length, generator=g)]

    def options(self) -> dict[str, Any]:
        bounds = {"kv_start": self.start, "kv_end": self.end}
        return {
            "causal": self.causal,
            "softmax_scale": self.scale,
            "documents": None if self.documents is None else list(self.documents),
            **{name: None if b is None else torch.tensor(b) for name, b in bounds.items()},
        }

    def seen(self) -> Tensor:
        """`[batch, 1, length, length]`: which key is visible to which query."""
        at = torch.arange(self.length)
        seen = torch.ones(self.batch, 1, self.length, self.length, dtype=torch.bool)
        if self.causal:
            seen &= at <= at[:, None]
        if self.documents is not None:
            of = torch.bucketize(at, torch.tensor(self.documents), right=True)
            seen &= of == of[:, None]
        if self.start is not None:
            seen &= at >= torch.tensor(self.start).view(-1, 1, 1, 1)
        if self.end is not None:
            seen &= at < torch.tensor(self.end).view(-1, 1, 1, 1)
        return seen


def on_rank(group: Any, cases: list[Case], with_length: bool = True) -> list[dict[str, Any]]:
    """Each case on this rank: its positions, results, gradients, and bytes."""
    return [_one(group, case, with_length) for case in cases]


def _one(group: Any, case: Case, with_length: bool) -> dict[str, Any]:
    layout = Layout(group, timeout=60, **case.layout)
    *tensors, grad, grad_lse = (layout.shard(t, 2) for t in case.inputs())
    q, k, v = (t.requires_grad_() for t in tensors)
    length = case.length if with_length else None
    out, lse = ring_attention(q, k, v, layout, length=length, return_lse=True, **case.options())
    forward = dict(layout.links.sent)
    dead = lse == -torch.inf
    torch.autograd.backward([out, lse.masked_fill(dead, 0.0)], [grad, grad_lse])
    backward = {kind: n - forward.get(kind, 0) for kind, n in layout.links.sent.items() if n != forward.get(kind, 0)}
    shapes = case.length, case.batch, case.q_heads, case.kv_heads, case.head_dim, case.dtype
    want = predicted(layout, *shapes, causal=case.causal, documents=case.documents)
    assert out.transpose(1, 2).is_contiguous() and q.grad is not None and q.grad.dtype == case.dtype
    return {
        "positions": layout.positions(case.length),
        "results": [t.detach() for t in (out, lse, q.grad, k.grad, v.grad)],
        "sent": (forward, backward),
        "predicted": (want.forward, want.backward),
        "agreed": layout.links.control,
    }


def whole(case: Case, answers: list[dict[str, Any]]) -> list[Tensor]:
    """out, lse, dq, dk and dv of the sequence, from those of all ranks."""
    made = []
    for i in range(5):
        parts = [a["results"][i] for a in answers]
        positions = torch.cat([a["positions"] for a in answers])
        assert positions.sort().values.tolist() == list(range(case.length))
        made.append(torch.cat(parts, 2)[:, :, positions.argsort()])
    return made


def compacted(form: KvFormat, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of keys and values in a format, in their dtype."""
    if form.is_model or not k.shape[2]:
        return k, v
    shape = tuple(k.shape)
    page = Page(empty(form.k, "k", shape, k), empty(form.v, "v", shape, v))
    ops.kv_append(k, v, page, 0)
    return ops.kv_read(page, 0, shape[2], shape[3], k.dtype)


def on_their_way(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as ranks that don't hold them see them; and the ring rank of each position."""
    _, k, v, _, _ = case.inputs()
    seen_k, seen_v, owner = k.clone(), v.clone(), torch.zeros(case.length, dtype=torch.int64)
    for rank in range(case.ring_size):
        runs = _core.ring_shard(case.layout.get("sharding", "zigzag"), case.length, case.ring_size, rank)
        places = torch.tensor([p for run in runs for p in range(*run)], dtype=torch.int64)
        owner[places] = rank
        seen_k[:, :, places], seen_v[:, :, places] = compacted(case.kv_format, k[:, :, places], v[:, :, places])
    return seen_k, seen_v, owner


def by_torch(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The same by torch, in one process. In a compact format: over all keys twice, as they are for their rank's own queries and as
    the others see them, whose gradients are given to what they were made from."""
    *tensors, grad, grad_lse = case.inputs()
    q, k, v = (t.to(dtype).requires_grad_() for t in tensors)
    group, seen = case.q_heads // case.kv_heads, case.seen()
    every_k, every_v = k, v
    if not case.kv_format.is_model:
        *theirs, owner = on_their_way(case)
        straight_k, straight_v = (t.to(dtype) + (o - o.detach()) for t, o in zip(theirs, (k, v), strict=True))
        every_k, every_v = torch.cat([k, straight_k], 2), torch.cat([v, straight_v], 2)
        own = owner[:, None] == owner
        seen = torch.cat([seen & own, seen & ~own], -1)
    keys, values = (t.repeat_interleave(group, 1) for t in (every_k, every_v))
    dead = ~seen.any(-1)
    mask = (seen | dead[..., None]).expand(-1, case.q_heads, -1, -1)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    out = out.masked_fill(dead[..., None], 0.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = (q @ keys.transpose(2, 3) * scale).to(wide).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1).masked_fill(dead, 0.0)
    torch.autograd.backward([out, lse], [grad.to(dtype), grad_lse.to(wide)])
    lse = lse.detach().masked_fill(dead, -torch.inf)
    return [out.detach(), lse, *(t.grad for t in (q, k, v) if t.grad is not None)]


def of_training(group: Any, layout: dict[str, Any], borders: list[list[int]], seed: int) -> dict[str, Any]:
    """A training step's attention on this rank, and its share of rows."""
    from llama1m_ext.ring.training import RingAttention, share

    spread, length = Layout(group, timeout=60, **layout), borders[0][-1]
    whole = packed(len(borders), length, seed)
    q, k, v, grad = (spread.shard(t, 2) for t in whole)
    kind = RingAttention(spread, length, borders)
    out, lse = kind.forward(q, k, v, 0.25)
    grads = kind.backward(grad, q, k, v, out, lse, 0.25)
    ids = torch.arange(2 * length).view(2, length)
    mine = share(spread, ids, loss_weights=ids.float())
    names = ("input_ids", "labels", "loss_weights", "position_ids")
    return {
        "results": [spread.gather(t, length, 2) for t in (out, *grads)],
        "share": [spread.gather(getattr(mine, name), length) for name in names],
        "denominator": float(mine.denominator),
    }


def packed(batch: int, length: int, seed: int) -> list[Tensor]:
    """q, k, v and the gradient of out, of whole rows."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, 16, generator=g) for heads in (4, 2, 2, 4)]
