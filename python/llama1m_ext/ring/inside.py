"""One forward call of a model that several ranks share: what they agree on before it, and attention over their shards."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import llama, offload, plan_call, prefill
from ..call import Call
from ..plan_bytes import LADDER
from ..rope import Rope, Still
from ..stored import checksum
from . import agreement
from .call import _versions
from .layout import Layout
from .partials import Partial, merged
from .shard_layer import ShardLayer
from .spread import Spread

__all__ = ["RingCall", "enter"]

SHARED_ROWS = 128
"""From so many tokens for each rank on a call is spread over the ranks; of a shorter one each rank computes all but the attention
to what others hold."""
MOST = 4096
"""Tokens of a call, at most, that each rank computes whole because somebody watches the modules."""


class Sharing:
    """How ranks share a call, as far as its plan asks.

    Attributes:
        layout: the ranks.
        sharded: whether the call's tokens are spread over them; otherwise each rank computes them all, and one keeps their keys and
            values.
        total: tokens in the cache after the call, of all ranks.
    """

    __slots__ = ("layout", "sharded", "total")

    def __init__(self, layout: Layout, sharded: bool, total: int) -> None:
        self.layout, self.sharded, self.total = layout, sharded, total


class RingCall(Sharing):
    """What several ranks make of a call.

    Attributes:
        before, after: who holds which tokens of the cache; None without a cache.
        owner: the rank that keeps the new tokens, where they are not spread.
        local: the call in numbers of this rank, which its pages are planned by.
    """

    __slots__ = ("_bounds", "after", "before", "local", "owner")

    def __init__(self, layout: Layout, call: Call, sharded: bool) -> None:
        super().__init__(layout, sharded, call.past_len + call.q_len)
        self._bounds: dict[int, dict[str, Any]] = {}
        self.before = self.after = None
        self.owner: int | None = None
        held, n = 0, layout.lengths(call.q_len)[layout.rank] if sharded else call.q_len
        if call.cache_layers is not None:
            first = call.cache_layers[0]
            assert isinstance(first, ShardLayer)
            self.before, held = first.spread, first.length
            if sharded:
                self.after = self.before.shared(call.q_len, layout.sharding)
            else:
                self.owner = self.before.next_rank()
                self.after = self.before.given(call.q_len, self.owner)
        call.ring = self
        self.local = copy.copy(call)
        self.local.q_len, self.local.past_len = n, held
        # Not itself: a cycle would keep the cache alive until somebody collects garbage.
        self.local.ring = Sharing(layout, sharded, self.total)  # type: ignore[assignment]

    @property
    def is_owner(self) -> bool:
        """Whether the new tokens' keys and values go to this rank's pages, all of them."""
        return self.owner == self.layout.rank

    def expect(self, layer: ShardLayer, n: int) -> None:
        """So many of the new tokens will be written to a layer here."""
        layer.expect(layer.length + n, self.local.scratch)

    def bounds(self, call: Call, spread: Spread) -> dict[str, Any]:
        """Visible keys of each batch row as they are among this rank's, of which `spread` says which they are."""
        found = self._bounds.get(id(spread))
        if found is None:
            ends = {"kv_start": call.intervals.start, "kv_end": call.intervals.end}
            found = {name: None if b is None else spread.before(self.layout.rank, b) for name, b in ends.items()}
            self._bounds[id(spread)] = found
        return found

    def attention(
        self, attn: Any, q: Tensor, k: Tensor, v: Tensor, layer: ShardLayer, rope: Rope | Still, call: Call
    ) -> Tensor:
        """Attention of a call's tokens, which every rank has, to all keys so far and their own; one rank appends these.

        Args:
            q, k, v: `[batch, heads, n, head_dim]`, not rotated.

        Returns:
            `[batch, q_heads, n, head_dim]`, the same bits on every rank.
        """
        assert self.after is not None
        n = q.shape[2]
        if self.is_owner:
            rotated = llama.store(layer, q, k, v, rope, 0)
        else:
            rotated, _ = rope.apply(q, k)
        layer.takes(k, v)
        layer.spread = self.after
        assert rotated is not None
        where = {"causal": False, "q_start": 0}
        if self.is_owner:
            where = {"causal": True, "q_start": layer.length - n}
        out, lse = partial(rotated.to(v.dtype), layer, attn.scaling, **where, **self.bounds(call, self.after))
        return merged(self.layout, out, lse, "attention over the ranks' caches").to(v.dtype)


def partial(q: Tensor, layer: Any, scale: float, kv_len: int | None = None, **where: Any) -> Partial:
    """float32 (out, lse) of queries over this rank's pages.

    Args:
        kv_len: over the first so many of its tokens; None: all.
        where: as in `ops.attention`.
    """
    kv_len = layer.length if kv_len is None else kv_len
    if kv_len == 0 or q.shape[2] == 0:
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        return out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    for name in ("kv_start", "kv_end"):
        if where.get(name) is not None:
            where[name] = where[name].clamp(0, kv_len)
    found = offload.attention(
        q, layer, softmax_scale=scale, kv_len=kv_len, return_lse=True, out_dtype=torch.float32, **where
    )
    return found[0], found[1]


def enter(
    layout: Layout, model: Any, open_it: Callable[[], Call | str], given: Mapping[str, Any], keep: int, watch: bool
) -> Call:
    """A call that all ranks have agreed on; all of them call this.

    Args:
        model: a `LlamaModel`.
        open_it: opens the call, as `call.open_call`.
        given: the forward's arguments by name.
        keep: so many last positions will be read; 0: all.
        watch: the states after every layer are wanted.

    Raises:
        ValueError, TypeError, DoesNotFit: this rank can't serve it; every other one raises, too.
        DisagreementError: ranks differ in what they are asked, or another one can't serve it.
        LinkError: a rank is silent.
    """
    problem: Exception | None = None
    same: dict[str, object] = {}
    step, call = 0, None
    try:
        call = _opened(layout, open_it(), keep, watch)
        assert call.ring is not None
        same = _same(call, given, keep)
        plan_call.check(call.ring.local, keep, _planned_chunk(call))
        same["kv"] = call.options.kv
        if call.options.kv == "auto" and call.pages and not call.pages[0].decided:
            step = LADDER.index(plan_call.storage_of(call.ring.local).kv)
    except Exception as e:  # whatever it is: the others wait to be told
        problem = e
    if layout.world_size == 1:
        if problem is not None:
            raise problem
    else:  # for every token: ranks that sample different ones would go on with nonsense
        step = max(agreement.agree(layout.links, same, step, problem, layout.control_device()))
    assert call is not None and call.ring is not None
    if call.options.kv == "auto" and call.pages and not call.pages[0].decided:
        local = call.ring.local
        local.options = dataclasses.replace(local.options, kv=LADDER[step])
    return call


def _opened(layout: Layout, call: Call | str, keep: int, watch: bool) -> Call:
    """The call, if ranks can serve it together.

    Raises:
        ValueError, TypeError: they can't.
    """
    if isinstance(call, str):
        raise ValueError(
            f"ring: expected a call that {layout.world_size} ranks can serve together, got one with {call}"
        )
    options = call.options
    if call.gradients:
        raise ValueError(
            "ring: expected a call without gradients, under torch.no_grad(), got one that needs them; for training over several "
            "ranks see llama1m_ext.ring.ring_attention"
        )
    for name in ("checkpoint", "remember"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: expected None where several ranks share a model, got {getattr(options, name)!r}")
    if any(width is not None for width in call.windows):
        raise ValueError(f"ring: expected attention to all keys in every layer, got windows of {call.windows}")
    if len(call.devices) != 1:
        raise ValueError(
            f"ring: expected a model on one device in each process, got {list(call.devices)}; with several GPUs: "
            'device_map={"": int(os.environ["LOCAL_RANK"])}'
        )
    layout.check_device(next(iter(call.devices)))
    watched_by = (
        "output_hidden_states" if watch else "hooks, or modules of somebody else's" if prefill.watched(call) else None
    )
    limit = options.min_layer_major_len
    long = call.q_len >= (SHARED_ROWS * layout.world_size if limit == "auto" else limit) and call.q_len > 1
    if long and watched_by is not None and call.q_len > MOST:
        raise ValueError(
            f"ring: expected at most {MOST} tokens with {watched_by}, which each rank computes whole, got {call.q_len}"
        )
    RingCall(layout, call, long and watched_by is None)
    return call


def _same(call: Call, given: Mapping[str, Any], keep: int) -> dict[str, object]:
    """What must be the same on all ranks."""
    ring, config = call.ring, call.model.config
    assert ring is not None
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
    bounds = (call.intervals.start, call.intervals.end)
    return {
        **_versions(),
        **ring.layout.same(),
        "model": (type(call.model).__name__, *(getattr(config, name) for name in names)),
        "dtype": call.model.dtype,
        "device": call.position_ids.device.type,
        "batch": call.batch,
        "tokens": call.q_len,
        "cache": None
        if ring.before is None
        else (ring.before.length, ring.before.held, zlib.crc32(repr(ring.before.parts).encode())),
        "input": _digest(given.get("input_ids")),
        "inputs_embeds": given.get("inputs_embeds") is not None,
        "position_ids": _digest(call.position_ids),
        "attention_mask": [None if b is None else b.tolist() for b in bounds],
        "logits_to_keep": keep,
        "sharded": ring.sharded,
    }


def _digest(ids: Any) -> int | None:
    return checksum(ids.detach().cpu().contiguous()) if isinstance(ids, Tensor) else None


def _planned_chunk(call: Call) -> int:
    assert call.ring is not None
    return prefill.chunk_of(call, None) if call.ring.sharded else call.q_len
