"""What ranks do in tests of models that they share, and what a single process does."""

from __future__ import annotations

import contextlib
import gc
import io
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import llama1m_ext
from llama1m_ext import LongCache, set_options, testing


@dataclass(frozen=True)
class Talk:
    """Calls of a model over one cache.

    Attributes:
        turns: tokens of each call.
        keep: `logits_to_keep` of each call.
        pads: tokens that are padding at the beginning of each row; empty: no mask.
        tails: tokens that are padding at the end of each row of the first call, likewise.
        model, layout, options: arguments of `tiny_model`, `distributed` and `set_options`.
        crops: tokens that are forgotten after each call.
    """

    turns: tuple[int, ...] = (50,)
    batch: int = 1
    keep: int = 0
    pads: tuple[int, ...] = ()
    tails: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    cached: bool = True
    crops: int = 0
    embeds: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def ids(self) -> Tensor:
        return testing.random_ids(self.batch, sum(self.turns), 7)

    def mask(self, length: int) -> Tensor | None:
        if self.tails:
            return (torch.arange(length) < length - torch.tensor(self.tails)[:, None]).long()
        if not self.pads:
            return None
        return (torch.arange(length) >= torch.tensor(self.pads)[:, None]).long()


def said(group: Any, talk: Talk, truth: bool = False) -> tuple[list[Tensor], dict[str, Any]]:
    """Logits of each call; and what the rank holds then.

    Args:
        group: None: this process alone.
        truth: in float64.
    """
    model = testing.tiny_model(3, talk.dtype, **talk.model)
    if truth:
        model = model.double()
    set_options(model, progress=False, **talk.options)
    if group is not None:
        layout = llama1m_ext.distributed(model, group, **talk.layout)
    cache = LongCache() if talk.cached else None
    whole, at, made = talk.ids(), 0, []
    with torch.no_grad():
        for n in talk.turns:
            ids = whole[:, at : at + n]
            mask = talk.mask(at + n)
            places = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, at:]
            given = {"inputs_embeds": model.model.embed_tokens(ids)} if talk.embeds else {"input_ids": ids}
            out = model(
                **given,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                logits_to_keep=talk.keep,
                use_cache=talk.cached,
            )
            made.append(out.logits)
            at += n
            if talk.crops:
                cache.crop(-talk.crops)
                at -= talk.crops
    if talk.pads or talk.tails:  # nobody asks what padding says
        for logits, n in zip(made, talk.turns, strict=True):
            for row in range(talk.batch):
                if talk.keep == 0 and n == talk.turns[0]:
                    logits[row, : (talk.pads or [0] * talk.batch)[row]] = 0
                    logits[row, n - (talk.tails or [0] * talk.batch)[row] :] = 0
    facts: dict[str, Any] = {"stats": llama1m_ext.stats(model)}
    if group is not None:
        facts["sent"] = dict(layout.links.sent)
    if cache is not None:
        facts["length"] = cache.get_seq_length()
        facts["held"] = [layer.length for layer in cache.layers]
        facts["format"] = cache.format and cache.format.name
        facts["tokens"] = cache.tokens
    return made, facts


@dataclass(frozen=True)
class Ask:
    """A `generate`."""

    length: int = 40
    batch: int = 1
    pads: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0


def answered(group: Any, ask: Ask) -> Tensor:
    """Tokens; group None: this process alone. With noise tokens are equally likely in pairs, and all ranks but the first one compute
    other logits."""
    model = testing.tiny_model(3, ask.dtype, **ask.model)
    set_options(model, progress=False, **ask.options)
    rank = 0
    if group is not None:
        rank = llama1m_ext.distributed(model, group, **ask.layout).rank
    if ask.noise:
        with torch.no_grad():
            model.lm_head.weight[:-1:2] = model.lm_head.weight[1::2]
    if rank and ask.noise:
        rng = torch.Generator().manual_seed(rank)  # not the one that samples
        model.lm_head.register_forward_hook(lambda _, __, out: out + ask.noise * torch.randn(out.shape, generator=rng))
    torch.manual_seed(ask.seed + 1000 * rank)  # rank 0's counts
    ids = testing.random_ids(ask.batch, ask.length, 5)
    mask = torch.ones_like(ids)
    for row, n in enumerate(ask.pads):
        mask[row, :n] = 0
    with torch.no_grad():
        found = model.generate(ids, attention_mask=mask, pad_token_id=0, **{"eos_token_id": None, **ask.more})
    assert not llama1m_ext.stats(model).stock
    return found


def kept(group: Any, talk: Talk, path: str) -> None:
    """Makes a cache with all turns but the last, and saves it."""
    model = testing.tiny_model(3, talk.dtype, **talk.model)
    set_options(model, progress=False, **talk.options)
    if group is not None:
        llama1m_ext.distributed(model, group, **talk.layout)
    cache, at = LongCache(), 0
    with torch.no_grad():
        for n in talk.turns[:-1]:
            model(talk.ids()[:, at : at + n], past_key_values=cache, logits_to_keep=1)
            at += n
    cache.save(path)


def resumed(group: Any, talk: Talk, path: str) -> tuple[Tensor, Tensor | None, list[int]]:
    """Logits of the last turn over a saved cache, the cache's tokens, and how many of them are here."""
    model = testing.tiny_model(3, talk.dtype, **talk.model)
    set_options(model, progress=False, **talk.options)
    if group is not None:
        llama1m_ext.distributed(model, group, **talk.layout)
    cache = LongCache.load(path, model)
    held = [layer.length for layer in cache.layers]
    with torch.no_grad():
        out = model(talk.ids()[:, -talk.turns[-1] :], past_key_values=cache)
    return out.logits, cache.tokens, held


def refused(group: Any, what: str) -> list[str]:
    """What goes wrong on this rank, as "Type: message", and once more what a good call gives."""
    model = testing.tiny_model(3)
    layout = llama1m_ext.distributed(model, group, timeout=20)
    ids, cache, alone = testing.random_ids(1, 40, 7), LongCache(), testing.tiny_model(3)
    found = list[str]()

    def attempt(call: Any) -> None:
        try:
            call()
        except Exception as e:
            found.append(f"{type(e).__name__}: {e}")
        else:
            found.append("nothing")

    if what == "gradients":
        attempt(lambda: model(ids))
    with torch.no_grad():
        if what == "output_attentions":
            attempt(lambda: model(ids, output_attentions=True))
        elif what == "checkpoint":
            set_options(model, checkpoint="somewhere")
            attempt(lambda: model(ids))
            set_options(model, checkpoint=None)
        elif what == "other tokens":
            attempt(lambda: model(ids + layout.rank))
        elif what == "one rank alone has no room":
            set_options(model, offload=None, kv_memory=1000 if layout.rank else 1 << 30)
            attempt(lambda: model(ids, past_key_values=LongCache()))
            set_options(model, kv_memory="auto")
        elif what == "max_time":
            attempt(lambda: model.generate(ids, max_time=100.0, max_new_tokens=2))
        elif what == "other settings":
            attempt(lambda: model.generate(ids, max_new_tokens=2 + layout.rank))
        elif what == "another model":
            model(ids, past_key_values=cache)
            attempt(lambda: alone(ids[:, :1], past_key_values=cache))
            attempt(lambda: cache.layers[0].keys)
        elif what == "a mask with holes":
            mask = torch.ones_like(ids)
            mask[0, 10] = 0
            attempt(lambda: model(ids, attention_mask=mask))
        good = model(ids, past_key_values=LongCache(), logits_to_keep=1).logits
        assert torch.allclose(good, alone(ids, logits_to_keep=1).logits, atol=1e-4)
    return found


def silent(group: Any) -> str:
    """Rank 1 leaves the others alone after the prefill."""
    model = testing.tiny_model(3)
    layout = llama1m_ext.distributed(model, group, timeout=2)
    ids, cache = testing.random_ids(1, 40, 7), LongCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        if layout.rank == 1:
            return "gone"
        try:
            model(ids[:, :1], past_key_values=cache)
        except Exception as e:
            assert cache.get_seq_length() == 40
            return f"{type(e).__name__}: {e}"
    return "nothing"


def formats(group: Any) -> list[str]:
    """The formats that "auto" chooses where rank 1 has less memory than rank 0."""
    model = testing.tiny_model(3, head_dim=64)
    layout = llama1m_ext.distributed(model, group)
    set_options(model, progress=False, kv_memory=1_500_000 if layout.rank else 1 << 30)
    cache = LongCache()
    with torch.no_grad():
        model(testing.random_ids(1, 2000, 7), past_key_values=cache, logits_to_keep=1)
    return [layer.format.name for layer in cache.layers]


def released(group: Any) -> bool:
    """Whether a cache is gone as soon as nobody refers to it, garbage collector or not."""
    model, cache = testing.tiny_model(3), LongCache()
    llama1m_ext.distributed(model, group)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for n in (400, 1):
                model(testing.random_ids(1, n, 7), past_key_values=cache, logits_to_keep=1)
        held = weakref.ref(cache.layers[0])
        del cache
        return held() is None
    finally:
        gc.enable()


def shown(group: Any) -> str:
    """What a prefill writes to the terminal."""
    model = testing.tiny_model(3)
    llama1m_ext.distributed(model, group)
    set_options(model, progress=True)
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()) as text:
        model(testing.random_ids(1, 400, 7), logits_to_keep=1)
    return text.getvalue()
