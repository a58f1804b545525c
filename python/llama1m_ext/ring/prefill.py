"""Prefill over several ranks: each runs the layers over its shard of the prompt, one after the other, with ring attention.

What the cache holds already stays where it is: queries go there, and partials come back (`partials.of_everybody`). The last
layer is computed for the positions that somebody reads, by every rank, so that all have the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import llama, ops, prefill
from ..call import Call, NotServed
from ..pages import PagedLayer
from ..placement import device_of
from ..progress import Pace, Progress
from ..weights import loaded
from ..workspace import Workspace
from .blocks import Bounds, Merged
from .inside import RingCall, partial
from .journey import blocks
from .partials import Partial, last_rows, merged, of_everybody
from .schedule import schedule
from .shard_layer import ShardLayer

__all__ = ["sharded"]

FEW = 16
"""Positions, at most, that every rank computes the last layer for."""
ASKED = 4096
"""Queries of all ranks that ask a cache at a time."""


def sharded(call: Call, ids: Tensor | None, embeds: Tensor | None, keep: int) -> Tensor:
    """Runs the model over a call whose tokens are spread over the ranks; all of them call it.

    Args:
        call: from `inside.enter`; `begin` not called yet.
        ids: int64 `[batch, n]`, or None and
        embeds: `[batch, n, hidden]`.
        keep: only the last so many positions are wanted; 0: all.

    Returns:
        The normed hidden states, `[batch, n, hidden]`, or of the last `keep` positions: on every rank.

    Raises:
        NotServed: something that shows only on the way.
        LinkError: a rank died or hangs.
    """
    ring, model, n = call.ring, call.model, call.q_len
    assert ring is not None
    layout, chunk = ring.layout, prefill.chunk_of(call, embeds)
    places = layout.positions(n)
    index, m = places.to(call.position_ids.device), len(places)
    if embeds is None:
        assert ids is not None
        own = ids.index_select(1, index)
        first = model.embed_tokens(own[:, :chunk])
        call.begin(first.new_empty((call.batch, 0, first.shape[-1])))
        hidden = first.new_empty((call.batch, m, first.shape[-1]))
        hidden[:, :chunk] = first
        if m > chunk:
            prefill.embed(model.embed_tokens, own[:, chunk:], hidden[:, chunk:], chunk)
        del first
    else:
        call.begin(embeds[:, :0])
        hidden = embeds.index_select(1, index)
    whole, call.rope = call.rope, call.rope.at(index)
    keep = n if keep <= 0 else min(keep, n)
    few, last = keep <= FEW, len(call.layers) - 1
    layers = _Layers(call, ring, hidden, chunk)
    bar = call.options.progress if layout.rank == 0 else False
    with Progress(bar, call.batch * n, layers.work(last if few else last + 1)) as progress:
        layers.pace = Pace(progress)
        for i, layer in enumerate(call.layers):
            page = None if call.cache_layers is None else call.cache_layers[i]
            assert page is None or isinstance(page, ShardLayer)
            with loaded(layer):
                if few and i == last:
                    hidden = layers.last(layer, hidden, page, whole, keep)
                else:
                    layers.run(layer, hidden, page)
            if page is not None:
                assert ring.after is not None
                page.takes(layers.k, layers.v)
                page.spread = ring.after
                page.seal()
        layers.pace.finish()
        if not few:
            hidden = last_rows(layout, hidden, n, keep)
        hidden = hidden.to(device_of(model.norm, hidden.device))
        with loaded(model.norm):
            parts = [model.norm(hidden[:, a:b]) for a, b in prefill.chunks(0, keep, chunk)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Layers:
    """Layers over this rank's shard, with memory that serves one after the other.

    Args:
        hidden: `[batch, m, hidden]`, read for dtype and device.
        chunk: tokens of a shard that go through projections and the MLP at a time.
    """

    def __init__(self, call: Call, ring: RingCall, hidden: Tensor, chunk: int) -> None:
        self.call, self.ring, self.layout, self.chunk = call, ring, ring.layout, chunk
        config, attn, n = call.model.config, call.layers[0].self_attn, call.q_len
        self.m, self.past = hidden.shape[1], 0 if ring.before is None else ring.before.held[self.layout.rank]
        batch, head_dim = call.batch, attn.head_dim
        self.q = hidden.new_empty((batch, self.m, config.num_attention_heads, head_dim)).transpose(1, 2)
        self.k, self.v = hidden.new_empty((2, batch, config.num_key_value_heads, self.m, head_dim))
        self.plan = schedule(self.layout, n, True, None)
        bounds = call.bounds(hidden.device)
        ends = (None if b is None else (b - call.past_len).clamp(0, n) for b in (bounds.start, bounds.end))
        self.bounds = Bounds(self.layout.sharding, n, self.layout.ring_size, *ends)
        self.lengths = self.layout.lengths(n)
        self.space, self.scratch = Workspace(), PagedLayer(call.options.page_size)
        self.cost = prefill.Cost(call)
        self.pace: Pace | None = None
        self.pairs = call.batch * n * (call.past_len + n / 2) * self.cost.pair / self.layout.world_size

    def work(self, whole: int) -> float:
        """Floating-point operations of this rank, with so many whole layers."""
        each = self.call.batch * self.m * self.cost.linear + self.pairs
        return max(1.0, whole * each + (len(self.call.layers) - whole) * self.cost.keys(self.m))

    def run(self, layer: Any, hidden: Tensor, page: ShardLayer | None) -> None:
        """A layer over hidden, `[batch, m, hidden]`, updated in place; keys and values go to the page."""
        call, attn, space = self.call, layer.self_attn, self.space
        rope = call.rope_of(attn)
        for a, b in prefill.chunks(0, self.m, self.chunk):
            x = space.norm("x", layer.input_layernorm, hidden[:, a:b])
            q, k, v = llama.projected(attn, x, space.linear)
            into = self.q[:, :, a:b], self.k[:, :, a:b]
            if not (q.dtype == k.dtype == v.dtype == hidden.dtype and (page is None or page.fits(k, v))):
                raise NotServed(llama.DIFFERENT)
            rotated, turned = rope.apply(q, k, at=a, q_out=into[0], k_out=into[1])
            for made, place in ((rotated, into[0]), (turned, into[1])):
                if made is not place:
                    place.copy_(made)  # type: ignore[arg-type]
            self.v[:, :, a:b] = v
            self._did(self.cost.keys(b - a), hidden)
        out = self._attention(attn.scaling, page)
        call.served += 1
        if page is not None and self.m:
            self.ring.expect(page, self.m)
            page.append(self.k, self.v)
        for a, b in prefill.chunks(0, self.m, self.chunk):
            mine = out[:, :, a:b].transpose(1, 2).to(hidden.dtype).reshape(hidden.shape[0], b - a, -1)
            prefill.add(hidden[:, a:b], space.linear("x", attn.o_proj, mine))
            prefill.feed_forward(layer, hidden[:, a:b], call, space)
            self._did(call.batch * (b - a) * self.cost.linear - self.cost.keys(b - a), hidden)

    def last(self, layer: Any, hidden: Tensor, page: ShardLayer | None, whole: Any, keep: int) -> Tensor:
        """The last layer: keys and values of the shard, and the states of the last `keep` positions, `[batch, keep, hidden]`.

        Args:
            whole: the rotation of the whole call.
        """
        call, attn, n = self.call, layer.self_attn, self.call.q_len
        kept = last_rows(self.layout, hidden, n, keep)
        into: PagedLayer = self.scratch if page is None else page
        if self.m:
            into.expect(into.length + self.m, self.ring.local.scratch)
        for a, b in prefill.chunks(0, self.m, self.chunk):
            prefill.keys_only(layer, hidden[:, a:b], call, into, a, self.space)
            self._did(self.cost.keys(b - a), hidden)
        x = layer.input_layernorm(kept)
        q = llama.normed(attn, "q_norm", attn.q_proj(x).view(*x.shape[:2], -1, attn.head_dim)).transpose(1, 2)
        rope = whole if getattr(attn, "use_rope", True) else call.rope_of(attn)
        q = rope.apply(None, q, at=n - keep)[1].to(hidden.dtype)
        # Of the call's tokens here, those up to each query's position.
        places = self.layout.positions(n)
        seen = [self.past + int((places <= n - keep + j).sum()) for j in range(keep)]
        spread = self.ring.after
        if spread is None:
            start, end = self.bounds.of(self.layout.ring_rank)
            where: dict[str, Any] = {"kv_start": start, "kv_end": end}
        else:
            where = self.ring.bounds(call, spread)
        parts = [
            partial(q[:, :, j : j + 1], into, attn.scaling, seen[j], causal=False, q_start=0, **where)
            for j in range(keep)
        ]
        out, lse = (torch.cat(of, 2) for of in zip(*parts, strict=True))
        call.served += 1
        out = merged(self.layout, out, lse, "attention in the last layer").to(hidden.dtype)
        kept = kept + attn.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))
        return kept + layer.mlp(layer.post_attention_layernorm(kept))

    def _attention(self, scale: float, page: ShardLayer | None) -> Tensor:
        """float32 `[batch, q_heads, m, head_dim]`: this shard's queries over what the ranks have, and each other."""
        found, what = Merged(self.q, scale), "prefill, ring attention"
        for step, block in blocks(self.layout, self.plan, self.k, self.v, what):
            if step.pieces:
                assert block is not None
                found.add(*block, step.pieces, self.bounds.of(step.source))
            self._did(self.pairs / len(self.plan.steps), self.q)
        before = self.ring.before
        if page is not None and before is not None and before.length:
            where = self.ring.bounds(self.call, before)

            def over_mine(q: Tensor) -> Partial:
                return partial(q, page, scale, causal=False, q_start=0, **where)

            size, lse = max(1, ASKED // self.layout.world_size), found.lse
            for a in range(0, max(self.lengths), size):
                counts = [max(0, min(a + size, length) - a) for length in self.lengths]
                b = a + counts[self.layout.rank]
                past = of_everybody(
                    self.layout, self.q[:, :, a:b], counts, over_mine, "prefill, attention to the cache"
                )
                if a < b:
                    here = found.out[:, :, a:b]
                    here.copy_(ops.merge_partials([here, past[0]], [lse[:, :, a:b], past[1]])[0])
        return found.out

    def _did(self, work: float, like: Tensor) -> None:
        if self.pace is not None:
            self.pace.step(work, like.device)
