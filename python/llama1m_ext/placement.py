"""Where the layers of a model compute: one device, or several where accelerate has spread it (`device_map`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from . import memory
from .weights import hooks_of


def device_of(module: Any, default: torch.device) -> torch.device:
    """The device that a layer computes on: what accelerate's hook says, or where its parameters are.

    Args:
        default: of a module that has neither.
    """
    # Of several in a sequence the last one moves last.
    moves = [getattr(hook, "execution_device", None) for hook in hooks_of(module) or (module.__dict__.get("_hf_hook"),)]
    where = next((device for device in reversed(moves) if device is not None), None)
    if where is not None:
        return torch.device(where if not isinstance(where, int) else f"cuda:{where}")
    first = next(module.parameters(), None)
    return default if first is None or first.device.type == "meta" else first.device


def spread(layers: Iterable[Any], default: torch.device) -> dict[torch.device, int]:
    """How many layers are on each device.

    Args:
        default: as `device_of`.
    """
    found: dict[torch.device, int] = {}
    for layer in layers:
        device = device_of(layer, default)
        found[device] = found.get(device, 0) + 1
    return found


def chunk_len(config: Any, batch: int, element_size: int, devices: Iterable[torch.device]) -> int:
    """Queries of a chunk that goes through layers on these devices: `memory.chunk_len`."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return memory.chunk_len(config, batch, element_size)
    free = min(n for n in map(memory.free_bytes, gpus) if n is not None)
    return memory.chunk_len(config, batch, element_size, free, gpu=True)
