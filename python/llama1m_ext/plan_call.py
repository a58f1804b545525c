"""The plan of one call, made just before it runs: the format and the place of its pages, and whether it fits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from . import final_length, plan_bytes, plan_choice
from .limit import Limit
from .memory import address_space, available_bytes, free_bytes
from .options import parse_bytes
from .placement import chunk_len, device_of
from .plan_bytes import Storage, Work
from .plan_shape import SIZES, Shape, dtype_name, of_config
from .weights import brought_bytes, unpacked_bytes

if TYPE_CHECKING:
    from .call import Call
    from .pages import PagedLayer

SMALL = 64 << 20
"""Calls whose pages and hidden states take less are not planned: they keep the model's own format, and run."""


def storage_of(call: Call) -> Storage:
    """How the pages of a call's cache are to be kept: what it is kept in already, what the options say, or what "auto"
    makes of them. Microseconds for small calls, and for those with nothing to choose."""
    kept, options = _kept(call), call.options
    if kept is not None and (kept.offload is not None or options.offload != "auto" or call.q_len == 1):
        return kept
    decided = next((layer.format.name for layer in call.pages or () if layer.decided), None)
    kv = decided or getattr(call.cache, "kv", None) or options.kv
    if _is_small(call) and options.offload not in ("disk", "host"):
        return Storage("model" if kv == "auto" else kv)
    chunk = options.chunk
    if chunk == "auto":
        chunk = chunk_len(call.model.config, call.batch, call.model.dtype.itemsize, call.devices)
    pages = None if options.kv_memory == "auto" else parse_bytes("kv_memory", options.kv_memory)
    found = []
    for device, layers in call.devices.items():
        shape, work, used = _reckoned(call, 1, chunk, device, layers)
        free, mine = _free(device), None if pages is None else pages * layers // len(call.layers)
        if work.gpu:
            host = available_bytes()
            choice = plan_choice.choose_on_gpu(shape, work, free, host, kv, options.offload, mine, used)
        else:
            choice = plan_choice.choose(shape, work, free, kv, options.offload, mine, used)
        found.append(choice.storage)
    return _for_all(found)


def _for_all(found: list[Storage]) -> Storage:
    """What serves where each device has chosen for itself: the smallest format, the farthest place."""
    if len(found) == 1:
        return found[0]
    order = (*plan_bytes.LADDER, *(storage.kv for storage in found))
    kv = max((storage.kv for storage in found), key=order.index)
    offload = max((storage.offload for storage in found), key=(None, "host", "disk").index)
    held = [storage.kv_memory for storage in found if storage.kv_memory is not None]
    return Storage(kv, offload, len(found) * min(held) if held and offload else None)


def _free(device: torch.device) -> int | None:
    return free_bytes(device) if device.type == "cuda" else available_bytes()


def check(call: Call, keep: int, chunk: int) -> None:
    """Before a call's work. What `generate` is still to make counts as well.

    Args:
        keep: so many last positions get logits; 0: all.
        chunk: queries that go through a layer at a time.

    Raises:
        DoesNotFit: what it takes is more than there is.
    """
    _limit(call)
    if (call.q_len == 1 and call.past_len) or _is_small(call):
        return
    storage = storage_of(call)
    kv_from: plan_choice.KvFrom = "cache" if getattr(call.cache, "kv", None) not in (None, "auto") else "options"
    if any(layer.decided for layer in call.pages or ()):
        kv_from = None
    offload = call.options.offload
    for device, layers in call.devices.items():
        available = _free(device)
        if available is None:
            continue
        shape, work, used = _reckoned(call, keep, chunk, device, layers)
        share = storage
        if storage.kv_memory is not None:
            share = dataclasses.replace(storage, kv_memory=storage.kv_memory * layers // len(call.layers))
        room = None if work.gpu else address_space()
        plan_choice.check(shape, work, share, available, used, offload, room, kv_from)
    budget = call.options.kv_memory
    if call.pages is not None and storage.offload not in ("disk", "host") and budget != "auto":
        shape, work, _ = _reckoned(call, keep, chunk)
        plan_choice.check_pages(shape, work, storage, parse_bytes("kv_memory", budget), kv_from)


def _limit(call: Call) -> None:
    """Lets the layers know how much they may take, which they ask whenever they make a page. Where the next token has no
    room, and may have it elsewhere, this call is one with pages on the disk."""
    layers, said = call.pages, call.options.kv_memory
    if not layers or (said == "auto" and layers[0].limit is None):
        return
    limit = None if said == "auto" else Limit(parse_bytes("kv_memory", said), len(layers))
    for layer in layers:
        layer.limit = limit
    first = layers[0]
    # A compact format makes pages of a tail that is full, one token before it needs another.
    if limit is None or first.store is not None or call.q_len > 1 or first.capacity - first.length > 1:
        return
    if call.options.offload == "auto" and call.past_len:
        shape, _, _ = _reckoned(call, 1, 1)
        if plan_bytes.least_bytes(shape, first.format.name, call.past_len + 1, call.batch) > limit.nbytes:
            call.options = dataclasses.replace(call.options, offload="disk")


def _new(call: Call) -> int:
    """Tokens that are still to come in each row after this call, as far as somebody says."""
    final = None if call.pages is None else final_length.of(call.model)
    if final is None:
        return 0
    if call.ring is not None:
        return -(-max(0, final - call.ring.total) // call.ring.layout.world_size)
    return max(0, final - call.past_len - call.q_len)


def _is_small(call: Call) -> bool:
    if call.options.kv_memory != "auto":
        return False  # a limit may be small too
    config = call.model.config
    pages = 0 if call.pages is None else 2 * config.num_hidden_layers * _kv_dim(config)
    tokens = call.batch * (call.past_len + call.q_len + _new(call))
    return tokens * (pages + config.hidden_size) * call.model.dtype.itemsize < SMALL


def _kv_dim(config: Any) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim * config.num_key_value_heads


def _kept(call: Call) -> Storage | None:
    """How a cache that has tokens already is kept; None: it has none, or the first of them came from elsewhere."""
    if not call.pages or not call.past_len or not call.pages[0].decided:
        return None
    kv, store = call.pages[0].format.name, call.pages[0].store
    if store is not None:
        return Storage(kv, store.where, store.budget)
    return Storage(kv, "disk", _budget(call)) if call.options.offload == "disk" else Storage(kv)


def _is_on(layer: PagedLayer, device: torch.device) -> bool:
    return layer.kind is None or layer.kind.device == device


def _budget(call: Call) -> int:
    if call.options.kv_memory != "auto":
        return parse_bytes("kv_memory", call.options.kv_memory)
    least = min((n for n in map(_free, call.devices) if n is not None), default=0) or 2 << 30
    return len(call.devices) * least // plan_choice.DISK_SHARE


def _reckoned(
    call: Call, keep: int, chunk: int, device: torch.device | None = None, layers: int | None = None
) -> tuple[Shape, Work, int]:
    """(sizes, work, bytes that are taken already): weights, and the pages that the cache has.

    Args:
        device, layers: a device and how many of the layers are there; None: all of them.
    """
    dtype = str(call.model.dtype).removeprefix("torch.")
    shape = of_config(call.model.config, dtype_name(dtype) if dtype in SIZES else "float32")
    if call.pages is None:
        shape = dataclasses.replace(shape, layers=1)  # one layer's pages, again and again
    elif call.slides:  # what keeps no more than a window takes next to nothing
        shape = dataclasses.replace(shape, layers=max(1, len(call.pages)))
    elif layers is not None and layers < shape.layers:
        shape = dataclasses.replace(shape, layers=layers)
    work = Work(
        call.q_len,
        call.past_len,
        _new(call),
        batch=call.batch,
        keep=keep,
        chunk=chunk,
        threads=torch.get_num_threads(),
        logits=call.logits,
        gpu=device is not None and device.type == "cuda",
    )
    if call.ring is not None and call.ring.sharded:
        layout, prompt = call.ring.layout, call.ring.total - call.past_len
        work = dataclasses.replace(work, ranks=layout.world_size, whole=prompt, kv_format=layout.kv_format.name)
    used = shape.weight_bytes  # by arithmetic, here and in the plan: what is free now has those that stay off already
    mine = [layer for layer in call.layers if device is None or device_of(layer, device) == device]
    shape = dataclasses.replace(shape, brought=brought_bytes(mine, work.gpu), unpacked=unpacked_bytes(mine))
    if not work.gpu:  # the kernels keep theirs from call to call
        used += work.threads * (plan_bytes.SCRATCH + plan_bytes.MATMUL)
    if call.past_len:
        kv = _kept(call)
        held = min(
            plan_bytes.kv_bytes(shape, "model" if kv is None else kv.kv, call.past_len, call.batch),
            sum(layer.nbytes for layer in call.pages or () if device is None or _is_on(layer, device)),
        )
        work, used = dataclasses.replace(work, held=held), used + held
    return shape, work, used
