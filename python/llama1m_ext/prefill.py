"""Layer-major prefill: one layer runs over the whole prompt before the next begins.

Beside weights and KV pages, the hidden states (one buffer, updated in place) and one chunk's activations are all that
lives. Norms, projections, rotation, attention and MLP all run chunk by chunk. Where layers are on several GPUs, the hidden
states go from one to the next together; a layer that accelerate keeps elsewhere is brought once, for all its chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from . import _compat, llama, plan_call
from .cache import PagedLayer
from .call import Call, NotServed, own_forward
from .checkpoint import Checkpoint
from .placement import chunk_len, device_of
from .progress import Pace, Progress
from .weights import hooks_of, loaded, only_brings
from .window import SlidingLayer
from .workspace import Workspace


def is_long(call: Call, embeds: Tensor | None) -> bool:
    """Whether this call should run layer by layer, and whether nobody would notice that modules are called in chunks."""
    n, limit = call.q_len, call.options.min_layer_major_len
    if n == 1:
        return False
    if n < limit if limit != "auto" else n <= chunk_of(call, embeds):
        return False
    return not watched(call)


def layer_major(call: Call, ids: Tensor | None, embeds: Tensor | None, keep: int) -> Tensor:
    """Runs the model.

    Args:
        call: from `open_call`; `begin` not called yet.
        ids: int64 `[batch, n]`, or None and
        embeds: `[batch, n, hidden]`, which stay as they are.
        keep: only the last so many positions are wanted; 0: all.

    Returns:
        The normed hidden states, `[batch, n, hidden]`, or of the last `keep` positions.

    Raises:
        NotServed: something that shows only on the way; the cache is to be rewound then.
    """
    model, n = call.model, call.q_len
    chunk = chunk_of(call, embeds)
    plan_call.check(call, keep, chunk)
    if embeds is None:
        assert ids is not None
        first = model.embed_tokens(ids[:, :chunk])
        call.begin(first.new_empty((call.batch, 0, first.shape[-1])))  # which is kept, as an example
        hidden = first.new_empty((call.batch, n, first.shape[-1]))
    else:
        first = embeds[:, :0]
        call.begin(embeds)
        hidden = torch.empty_like(embeds, memory_format=torch.contiguous_format)
    keep = n if keep <= 0 else min(keep, n)
    scratch, space = PagedLayer(call.options.page_size), Workspace()
    cost = Cost(call)
    total = cost.total(n, n - keep)
    with (
        Checkpoint(call, ids, embeds, chunk) as checkpoint,
        Progress(call.options.progress, call.batch * n, total) as progress,
    ):
        pace = Pace(progress)
        done = checkpoint.resume(hidden)
        if done:
            chunk = checkpoint.chunk  # other ones would give other last bits
            progress.skip(done * cost.chunk(0, n))
        elif embeds is not None:
            hidden.copy_(embeds)
        else:
            hidden[:, :chunk] = first
            if n > chunk:
                embed(model.embed_tokens, ids[:, chunk:], hidden[:, chunk:], chunk)  # type: ignore[index]  # one is given
        del first
        for i, layer in enumerate(call.layers[done:], done):
            hidden = hidden.to(device_of(layer, hidden.device))
            page: PagedLayer | SlidingLayer
            if call.cache_layers is None:
                page = scratch
                scratch.length = 0  # the same memory again
            else:
                page = call.cache_layers[i]
            page.expect(call.past_len + n, call.scratch)
            silent = n - keep if i == len(call.layers) - 1 else 0
            if silent:
                space = Workspace()  # less is needed now, and all pages are there
            with loaded(layer):
                for a, b in chunks(0, silent, chunk):
                    # Nobody will look at these positions of the last layer: their keys and values are all that matters.
                    keys_only(layer, hidden[:, a:b], call, page, a, space)
                    pace.step(cost.keys(b - a), hidden.device)
                for a, b in chunks(silent, n, chunk):
                    _layer(layer, hidden[:, a:b], call, page, a, space)
                    pace.step(cost.chunk(a, b), hidden.device)
            page.seal()
            checkpoint.layer_done(i, hidden)
        pace.finish()
        if keep < n:
            return model.norm(hidden[:, n - keep :])
        out = hidden = hidden.to(device_of(model.norm, hidden.device))
        with loaded(model.norm):
            for a, b in chunks(0, n, chunk):
                normed = model.norm(hidden[:, a:b])
                if normed.dtype != out.dtype:
                    out = hidden.to(normed.dtype)
                out[:, a:b] = normed
        return out


def embed(table: Any, ids: Tensor, hidden: Tensor, chunk: int) -> None:
    """Embeddings of ids `[batch, n]`, into hidden `[batch, n, hidden]`."""
    ids = ids.to(device_of(table, ids.device))
    with loaded(table):
        for a, b in chunks(0, ids.shape[1], chunk):
            hidden[:, a:b] = table(ids[:, a:b])


def _layer(layer: Any, hidden: Tensor, call: Call, page: PagedLayer | SlidingLayer, at: int, space: Workspace) -> None:
    """A decoder layer over one chunk, `[batch, n, hidden]`, updated in place."""
    out = llama.attend(layer.self_attn, space.norm("x", layer.input_layernorm, hidden), call, page, at, space)
    if isinstance(out, str):
        raise NotServed(out)
    add(hidden, out)
    del out
    feed_forward(layer, hidden, call, space)


def feed_forward(layer: Any, hidden: Tensor, call: Call, space: Workspace) -> None:
    """What a decoder layer does after attention, `[batch, n, hidden]`, updated in place."""
    x = space.norm("x", layer.post_attention_layernorm, hidden)
    add(hidden, space.mlp(layer.mlp, x) if call.kind.family.plain_mlp else layer.mlp(x))


def add(hidden: Tensor, out: Tensor) -> None:
    if torch.promote_types(hidden.dtype, out.dtype) != hidden.dtype:
        raise NotServed(f"a layer gives {out.dtype} for {hidden.dtype}")
    hidden.add_(out)


def keys_only(
    layer: Any, hidden: Tensor, call: Call, page: PagedLayer | SlidingLayer, at: int, space: Workspace
) -> None:
    attn = layer.self_attn
    x = space.norm("x", layer.input_layernorm, hidden)
    shape = (*x.shape[:2], -1, attn.head_dim)
    k = llama.normed(attn, "k_norm", space.linear("b", attn.k_proj, x).view(shape)).transpose(1, 2)
    v = space.linear("c", attn.v_proj, x).view(shape).transpose(1, 2)
    if k.dtype != v.dtype or not page.fits(k, v):
        raise NotServed(llama.DIFFERENT)
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise NotServed(llama.GRADIENTS)
    llama.store(page, None, k, v, call.rope_of(attn), at)


def chunks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(start, end, size):
        yield a, min(a + size, end)


def chunk_of(call: Call, embeds: Tensor | None) -> int:
    if call.options.chunk != "auto":
        return call.options.chunk
    dtype = call.model.dtype if embeds is None else embeds.dtype
    return chunk_len(call.model.config, call.batch, dtype.itemsize, call.devices)


def watched(call: Call) -> bool:
    """Whether something would notice chunks: hooks, or modules that are not the ones whose work we know."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    for layer in call.layers:
        if type(layer).forward is not call.kind.layer_forward or not _is_open(layer) or not _is_open(layer.self_attn):
            return True
        if type(layer.mlp) is not call.kind.mlp:
            return True
    for top in (call.model.embed_tokens, call.model.norm, *call.layers):
        for module in top.modules():
            if module._forward_pre_hooks:
                return True
            if not all(_compat.is_capturing_hook(hook) for hook in module._forward_hooks.values()):
                return True
            if hooks_of(module) is None or ("_hf_hook" not in module.__dict__ and own_forward(module) is not None):
                return True
    return False


def _is_open(module: Any) -> bool:
    """Whether nothing is lost where a module's parts are called past its own forward."""
    return own_forward(module) is None or only_brings(module)


class Cost:
    """Floating-point operations of a prefill: what the time left is predicted from."""

    def __init__(self, call: Call) -> None:
        config, attn = call.model.config, call.layers[0].self_attn
        q_dim = config.num_attention_heads * attn.head_dim
        kv_dim = config.num_key_value_heads * attn.head_dim
        hidden = config.hidden_size
        self.past, self.layers = call.past_len, len(call.layers)
        self.batch = call.batch
        self.of_keys = 4 * hidden * kv_dim
        self.linear = 4 * hidden * (q_dim + kv_dim) + 6 * hidden * config.intermediate_size
        self.pair = 4 * q_dim

    def keys(self, n: int) -> float:
        """n tokens of which only keys and values are made."""
        return float(self.batch * n * self.of_keys)

    def chunk(self, a: int, b: int) -> float:
        """Tokens a to b through one layer."""
        pairs = (b - a) * (self.past + (a + b) / 2)
        return self.batch * ((b - a) * self.linear + pairs * self.pair)

    def total(self, n: int, silent: int) -> float:
        """All layers; the last one makes only keys and values of the first `silent` tokens."""
        return (self.layers - 1) * self.chunk(0, n) + self.chunk(silent, n) + self.keys(silent)
