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

from . import cuda, offload, ops
from .cache import PagedLayer
from .call import DTYPES, MARK, Call
from .formats import Page
from .stats import count
from .workspace import Workspace

Forward = Callable[..., Any]


def attention_forward(original: Forward, owner: type) -> Forward:
    """`LlamaAttention.forward`."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.get("attention_mask")
        if type(call) is not Call:
            return original(self, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if not torch.compiler.is_compiling():
            layer = None if cache is None else cache.layers[self.layer_idx]
            out = attend(self, hidden_states, call, layer)
            if out is not None:
                if layer is not None:
                    layer.seal()
                return out, None
            count(call.model, stock="q, k and v have gradients or different dtypes", calls=1)
        # LoRA's gradients show only here, where the mask was made already: stock attention, with a matrix.
        kwargs["attention_mask"] = call.matrix(hidden_states.device)
        kwargs["position_embeddings"] = call.rope.tables
        return original(self, *args, **kwargs)

    setattr(forward, MARK, True)
    return forward


def attend(
    attn: Any, x: Tensor, call: Call, layer: PagedLayer | None, at: int = 0, space: Workspace | None = None
) -> Tensor | None:
    """Attention of x, tokens `at` to `at + n` of the call, to all keys so far and their own; o_proj included.

    Args:
        attn: the `LlamaAttention`.
        x: `[batch, n, hidden]`, normed.
        layer: where keys and values are kept; None: x is all there is.
        space: memory for what is made on the way; x may be what was taken there as "x", and so is the result then.

    Returns:
        `[batch, n, hidden]`, or None where the kernel can't serve what the projections gave (nothing has happened then).
    """
    batch, n, _ = x.shape
    shape = (batch, n, -1, attn.head_dim)
    linear = _call if space is None else space.linear
    q = linear("a", attn.q_proj, x).view(shape).transpose(1, 2)
    k = linear("b", attn.k_proj, x).view(shape).transpose(1, 2)
    v = linear("c", attn.v_proj, x).view(shape).transpose(1, 2)
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES and (layer is None or layer.fits(k, v))):
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if layer is None:
        rotated, k = call.rope.apply(q, k, at=at)
    else:
        rotated = store(layer, q, k, v, call, at, None if space is None else q)
    assert rotated is not None
    rotated = rotated.to(v.dtype)  # tables of somebody else's may be wider
    bounds = call.bounds(x.device)
    where: dict[str, Any] = {
        "softmax_scale": attn.scaling,
        "q_start": call.past_len + at,
        "kv_start": bounds.start,
        "kv_end": bounds.end,
    }
    if layer is None:
        out = ops.attention(rotated, k.to(v.dtype), v, **where)
    else:
        out = offload.attention(rotated, layer, **where)
    call.served += 1
    return linear("x", attn.o_proj, out.transpose(1, 2).reshape(batch, n, -1))  # type: ignore[union-attr]


def _call(name: str, module: Any, x: Tensor) -> Tensor:
    return module(x)


def store(
    layer: PagedLayer, q: Tensor | None, k: Tensor, v: Tensor, call: Call, at: int, q_out: Tensor | None = None
) -> Tensor | None:
    """Rotates q and k, and appends k and v to the pages: k is rotated straight into them. Returns the rotated q.

    Args:
        q: `[batch, q_heads, n, head_dim]`, or None where nobody asks.
        k, v: `[batch, kv_heads, n, head_dim]`, tokens `at` to `at + n` of the call.
        q_out: where the rotated q may go; may be q itself.
    """
    slots, rope = layer.slots(k, v), call.rope
    if len(slots) == 1 and cuda.serves(k) and rope.inv_freq is not None:
        positions = rope.part(at, k.shape[2], k.device)
        if q is not None:
            q, _ = ops.rope_apply(q, None, positions, rope.inv_freq, attention_scaling=rope.scaling, q_out=q_out)
        ops.kv_append(
            k, v, Page(*slots[0]), 0, positions=positions, inv_freq=rope.inv_freq, attention_scaling=rope.scaling
        )
        layer.commit(k.shape[2])
    elif len(slots) == 1:
        k_slot, v_slot = slots[0]
        q, _ = rope.apply(q, k, k_out=k_slot, at=at, q_out=q_out)
        v_slot.copy_(v)
        layer.commit(k.shape[2])
    else:
        q, k = rope.apply(q, k, at=at, q_out=q_out)
        layer.append(k, v)
    return q
