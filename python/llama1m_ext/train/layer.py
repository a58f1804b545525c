"""A decoder layer in training: what is kept between forward and backward, and what is made again.

A layer is three pieces: `front` (norm, projections to q, k, v) and `tail` (output projection, norm, MLP, both residuals) look at each
position alone and run in chunks; between them are the rotation and attention. What is kept of each token is one of

- "all": nothing is made again, as autograd does without checkpoints (but of the rotation, exact both ways);
- "attention": the layer's input, and attention's output and log-sum-exps: all but attention is made again, which at length
  is nearly all the time (DistFlashAttn's rematerialisation-aware checkpoints, 2310.03294);
- "inputs": the layer's input only; attention's forward runs twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..rope import Rope, Still
from . import attention as attentions
from .attention import Attention
from .kept import Here, Kept, Place
from .rows import Around, backward_rows, forward_rows, is_random, trainable

KEEP = ("all", "attention", "inputs")


@dataclass
class How:
    """How layers are run.

    Attributes:
        keep: one of `KEEP`.
        place: where what is kept waits.
        chunk: positions of a chunk.
        attention: what computes it; None: as the dtype allows.
    """

    keep: str = "attention"
    place: Place = field(default_factory=Here)
    chunk: int = 2048
    attention: Attention | None = None


class Layer(nn.Module):
    """A decoder layer of transformers', run piece by piece. Its modules are called, so adapters in them work.

    Args:
        inner: the decoder layer.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, rope: Rope | Still, how: How) -> Tensor:
        """`[batch, n, hidden]` to the next layer's input."""
        params = trainable(self.inner)
        if not torch.is_grad_enabled() or not (x.requires_grad or params):
            return self._run(x, rope, how)[0]
        if how.keep == "all":
            return self._plain(x, rope, how)
        made: Tensor = _Again.apply(x, self, rope, how, *params)
        return made

    def front(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[batch, n, hidden]` to q, k, v, each `[batch, n, heads, head_dim]`, not rotated yet."""
        inner: Any = self.inner
        attn = inner.self_attn
        h = inner.input_layernorm(x)
        shape = (*x.shape[:2], -1, attn.head_dim)
        q, k, v = (getattr(attn, name)(h).view(shape) for name in ("q_proj", "k_proj", "v_proj"))
        if getattr(attn, "q_norm", None) is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)
        return q, k, v

    def tail(self, x: Tensor, out: Tensor) -> tuple[Tensor]:
        """The layer's input and attention's output, `[batch, n, q_heads, head_dim]`, to the layer's output."""
        inner: Any = self.inner
        x = x + inner.self_attn.o_proj(out.flatten(2))
        return (x + inner.mlp(inner.post_attention_layernorm(x)),)

    @property
    def scale(self) -> float:
        inner: Any = self.inner
        return float(inner.self_attn.scaling)

    def front_params(self) -> list[Tensor]:
        inner: Any = self.inner
        norms = [m for m in (getattr(inner.self_attn, name, None) for name in ("q_norm", "k_norm")) if m is not None]
        attn = inner.self_attn
        return trainable(inner.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj, *norms)

    def tail_params(self) -> list[Tensor]:
        inner: Any = self.inner
        return trainable(inner.self_attn.o_proj, inner.post_attention_layernorm, inner.mlp)

    def qkv(self, x: Tensor, rope: Rope | Still, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each `[batch, heads, n, head_dim]`, rotated; no gradients."""
        q, k, v = (t.transpose(1, 2) for t in forward_rows(self.front, (x,), chunk))
        q, k = turn(rope, q, k)
        return q, k, v

    def _run(self, x: Tensor, rope: Rope | Still, how: How) -> tuple[Tensor, Tensor, Tensor | None, list[Around]]:
        """(output, attention's output, log-sum-exps, what was around front and tail)."""
        random = is_random(self.inner)
        around = [Around(x, random)]
        with torch.no_grad():
            q, k, v = self.qkv(x, rope, how.chunk)
            out, lse = _kind(how, q).forward(q, k, v, self.scale)
            del q, k, v
            around.append(Around(x, random))
            (y,) = forward_rows(self.tail, (x, out.transpose(1, 2)), how.chunk)
        return y, out, lse, around

    def _plain(self, x: Tensor, rope: Rope | Still, how: How) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.front(x))
        q, k = _Turn.apply(rope, q, k)
        out = attentions.attend(_kind(how, q), q, k, v, self.scale)
        return self.tail(x, out.transpose(1, 2))[0]


class _Again(torch.autograd.Function):
    """A layer, most of which runs again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, rope: Rope | Still, how: How, *params: Tensor) -> Tensor:
        y, out, lse, around = layer._run(x, rope, how)
        ctx.layer, ctx.rope, ctx.how, ctx.around, ctx.params = layer, rope, how, around, params
        ctx.x = how.place.put(x)
        ctx.kept = None
        if how.keep == "attention":
            ctx.kept = how.place.put(out.transpose(1, 2)), None if lse is None else how.place.put(lse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, rope, how = ctx.layer, ctx.rope, ctx.how
        front, tail = ctx.around
        if ctx.x is None:
            raise RuntimeError("backward: expected one pass through a layer that is made again, got a second one")
        x = ctx.x.get()
        ctx.x = None
        found: dict[int, Tensor | None] = {}
        qkv = lse = None
        if ctx.kept is None:
            with front.again():
                qkv = layer.qkv(x, rope, how.chunk)
                out, lse = _kind(how, qkv[0]).forward(qkv[0], qkv[1], qkv[2], layer.scale)
            out = out.transpose(1, 2)
        else:
            out, lse = _got(ctx.kept[0]), _got(ctx.kept[1])
            ctx.kept = None
        params = layer.tail_params()
        with tail.again():
            (g_x, g_out), sums = backward_rows(layer.tail, (x, out), (True, True), (grad,), params, how.chunk)
        del grad
        found.update((id(p), g) for p, g in zip(params, sums, strict=True))
        assert g_x is not None and g_out is not None
        if qkv is None:
            with front.again():
                qkv = layer.qkv(x, rope, how.chunk)
        q, k, v = qkv
        del qkv
        grads = _kind(how, q).backward(g_out.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, layer.scale)
        del q, k, v, out, lse, g_out
        g_q, g_k = turn_back(rope, grads[0], grads[1])
        rows = [g.transpose(1, 2) for g in (g_q, g_k, grads[2])]
        del grads, g_q, g_k
        params = layer.front_params()
        with front.again():
            (more,), sums = backward_rows(layer.front, (x,), (ctx.needs_input_grad[0],), rows, params, how.chunk)
        found.update((id(p), g) for p, g in zip(params, sums, strict=True))
        into = g_x.add_(more) if more is not None else None
        return (into, None, None, None, *(found.get(id(p)) for p in ctx.params))


def _got(kept: Kept | None) -> Any:
    return None if kept is None else kept.get()


def _kind(how: How, q: Tensor) -> Attention:
    return attentions.chosen(q.dtype, q.device) if how.attention is None else how.attention


# -- rotation -----------------------------------------------------------------------------------------------------------


def turn(rope: Rope | Still, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q and k, `[batch, heads, n, head_dim]`, in their own memory where it can be."""
    dtype = k.dtype
    if rope.inv_freq is None or q.dtype == torch.float64:
        rotated, k = _by_tables(rope, q, k, 1)
        return rotated.to(dtype), k.to(dtype)
    rotated_q, rotated_k = rope.apply(q, k, k_out=k, q_out=q)
    assert rotated_q is not None
    return rotated_q, rotated_k


def turn_back(rope: Rope | Still, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of `turn`: gradients of what went in, from those of what came out; in their memory.

    With the sign of the second half changed before and after, the same rotation goes the other way.
    """
    if rope.inv_freq is None or q.dtype == torch.float64:
        return _by_tables(rope, q, k, -1)
    half = rope.inv_freq.numel()
    for g in (q, k):
        g[..., half : 2 * half].neg_()
    turned, k = rope.apply(q, k, k_out=k, q_out=q)
    assert turned is not None
    for g in (turned, k):
        g[..., half : 2 * half].neg_()
    return turned, k


def _by_tables(rope: Rope | Still, q: Tensor, k: Tensor, way: int) -> tuple[Tensor, Tensor]:
    if isinstance(rope, Still):
        return q, k
    cos, sin = (table.to(q.device) for table in rope.tables)
    return rope.module.apply_rotary_pos_emb(q, k, cos, sin * way)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rope: Rope | Still, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        ctx.rope = rope
        return turn(rope, q.clone(), k.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *turn_back(ctx.rope, q.clone(), k.clone()))
