"""Llama's attention: `LlamaAttention.forward` as it is put in the place of transformers' own.

It serves calls whose `attention_mask` is a `Call`, which only our `LlamaModel.forward` makes; anything else goes to the
original, which is always at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _compat, cuda, offload, ops, stock_path, window
from .cache import PagedLayer
from .call import DTYPES, MARK, Call
from .formats import Page
from .rope import Rope, Still
from .window import SlidingLayer
from .workspace import Workspace

Forward = Callable[..., Any]
DIFFERENT = "q, k and v differ in dtype, or from what the cache holds"
GRADIENTS = "gradients of q, k and v"
"""Why a layer takes the stock path, where the model didn't see it coming."""


def attention_forward(original: Forward, owner: type) -> Forward:
    """`LlamaAttention.forward`."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.get("attention_mask")
        if type(call) is not Call:
            return original(self, *args, **kwargs)
        cache = _compat.given_cache(kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if not torch.compiler.is_compiling():
            layer = None if cache is None or call.cache_layers is None else call.cache_layers[self.layer_idx]
            out = attend(self, hidden_states, call, layer)
            if not isinstance(out, str):
                if layer is not None:
                    layer.seal()
                return out, None
            stock_path.tell(call.model, out, 1)
        # LoRA's gradients show only here, where the mask was made already: stock attention, with a matrix.
        kwargs["attention_mask"] = call.matrix(hidden_states.device, self.layer_idx)
        kwargs["position_embeddings"] = call.rope.tables
        return original(self, *args, **kwargs)

    setattr(forward, MARK, True)
    return forward


def projected(attn: Any, x: Tensor, linear: Callable[[str, Any, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of normed states `[batch, n, hidden]`, each `[batch, heads, n, head_dim]`; not rotated.

    Args:
        linear: applies a projection, as `Workspace.linear`.
    """
    shape = (*x.shape[:2], -1, attn.head_dim)
    q = normed(attn, "q_norm", linear("a", attn.q_proj, x).view(shape)).transpose(1, 2)
    k = normed(attn, "k_norm", linear("b", attn.k_proj, x).view(shape)).transpose(1, 2)
    return q, k, linear("c", attn.v_proj, x).view(shape).transpose(1, 2)


def attend(
    attn: Any,
    x: Tensor,
    call: Call,
    layer: PagedLayer | SlidingLayer | None,
    at: int = 0,
    space: Workspace | None = None,
) -> Tensor | str:
    """Attention of x, tokens `at` to `at + n` of the call, to all keys so far and their own; o_proj included.

    Args:
        attn: the `LlamaAttention`.
        x: `[batch, n, hidden]`, normed.
        layer: where keys and values are kept; None: x is all there is.
        space: memory for what is made on the way; x may be what was taken there as "x", and so is the result then.

    Returns:
        `[batch, n, hidden]`, or why the kernel can't serve what the projections gave (nothing has happened then).
    """
    batch, n, _ = x.shape
    linear = _call if space is None else space.linear
    q, k, v = projected(attn, x, linear)
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES and (layer is None or layer.fits(k, v))):
        return DIFFERENT
    if layer is not None and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return GRADIENTS  # pages are written in place
    rope = call.rope_of(attn)
    out: Any
    if call.ring is not None and layer is not None:
        out = call.ring.attention(attn, q, k, v, layer, rope, call)  # type: ignore[arg-type]  # a shard
        call.served += 1
        return linear("x", attn.o_proj, out.transpose(1, 2).reshape(batch, n, -1))
    if layer is None:
        rotated, k = rope.apply(q, k, at=at)
        if call.gradients and call.cache is not None:
            call.cache.update(k, v, attn.layer_idx)
    else:
        rotated = store(layer, q, k, v, rope, at, None if space is None else q)
    assert rotated is not None
    rotated = rotated.to(v.dtype)  # tables of somebody else's may be wider
    bounds, width = call.bounds(x.device), call.windows[attn.layer_idx]
    where: dict[str, Any] = {
        "softmax_scale": attn.scaling,
        "q_start": call.past_len + at,
        "kv_start": bounds.start,
        "kv_end": bounds.end,
    }
    if isinstance(layer, SlidingLayer) or (width is not None and call.past_len + at + n > width):
        assert width is not None
        k, v = (k.to(v.dtype), v) if layer is None else window.last(layer, width - 1 + n)
        gone = call.past_len + at + n - k.shape[2]  # keys that are not there any more, or not asked for
        where = {name: None if where[name] is None else where[name] - gone for name in ("kv_start", "kv_end")}
        out = window.attention(rotated, k, v, width, softmax_scale=attn.scaling, **where)
    elif layer is None:
        out = ops.attention(rotated, k.to(v.dtype), v, **where)
    else:
        out = offload.attention(rotated, layer, **where)
    call.served += 1
    return linear("x", attn.o_proj, out.transpose(1, 2).reshape(batch, n, -1))  # type: ignore[union-attr]


def _call(name: str, module: Any, x: Tensor) -> Tensor:
    return module(x)


def normed(attn: Any, name: str, x: Tensor) -> Tensor:
    """x `[batch, n, heads, head_dim]` through the norm of that name over head_dim, which some families have."""
    norm = getattr(attn, name, None)
    return x if norm is None else norm(x)


def store(
    layer: PagedLayer | SlidingLayer,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    rope: Rope | Still,
    at: int,
    q_out: Tensor | None = None,
) -> Tensor | None:
    """Rotates q and k, and appends k and v to the pages: k is rotated straight into them. Returns the rotated q.

    Args:
        q: `[batch, q_heads, n, head_dim]`, or None where nobody asks.
        k, v: `[batch, kv_heads, n, head_dim]`, tokens `at` to `at + n` of the call.
        rope: how they are rotated.
        q_out: where the rotated q may go; may be q itself.
    """
    slots = [] if isinstance(layer, SlidingLayer) else layer.slots(k, v)
    if isinstance(layer, SlidingLayer) or len(slots) != 1:
        q, k = rope.apply(q, k, at=at, q_out=q_out)
        layer.append(k.to(v.dtype), v)
    elif cuda.serves(k) and isinstance(rope, Rope) and rope.inv_freq is not None:
        positions = rope.part(at, k.shape[2], k.device)
        if q is not None:
            q, _ = ops.rope_apply(q, None, positions, rope.inv_freq, attention_scaling=rope.scaling, q_out=q_out)
        ops.kv_append(
            k, v, Page(*slots[0]), 0, positions=positions, inv_freq=rope.inv_freq, attention_scaling=rope.scaling
        )
        layer.commit(k.shape[2])
    else:
        k_slot, v_slot = slots[0]
        q, _ = rope.apply(q, k, k_out=k_slot, at=at, q_out=q_out)
        v_slot.copy_(v)
        layer.commit(k.shape[2])
    return q
