"""How much memory there is, and how many queries of a prompt fit into it at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import cgroup

CHUNK_BYTES = 512 << 20
"""Activations of one chunk, at most. More makes nothing faster: the matrices are large enough long before."""
MIN_CHUNK, MAX_CHUNK = 128, 8192
GPU_CHUNK_BYTES, GPU_MAX_CHUNK = 2 << 30, 16384
"""Likewise on a GPU: its work comes in few large pieces, so that it never waits for the next one."""


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    found = [_of_system(), cgroup.available_bytes(), *_of_limits()]
    return min((n for n in found if n is not None), default=None)


def free_bytes(device: Any = None) -> int | None:
    """Memory that can be had on a device, a `torch.device`; None: on the CPU."""
    return available_bytes() if device is None or device.type != "cuda" else _of_gpu(device)


def _of_gpu(device: Any) -> int:
    """What is free, and what torch keeps there without using it, within the share of it that this process may take."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    found = free + torch.cuda.memory_reserved(device) - used
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.7
    return found if share is None else max(0, min(found, int(share(device) * total) - used))


def address_space() -> int | None:
    """Bytes that may still be mapped, whether they are used or not (`ulimit -v`, `ulimit -d`); None: no limit."""
    return min(_of_limits(), default=None)


def _of_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # not Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None  # neither Linux nor a Unix that tells


def _of_limits() -> list[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    try:
        import resource

        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
        found = []
        for what, pages in ((resource.RLIMIT_AS, fields[0]), (resource.RLIMIT_DATA, fields[5])):
            limit = resource.getrlimit(what)[0]
            if limit != resource.RLIM_INFINITY:
                found.append(max(0, limit - int(pages) * resource.getpagesize()))
        return found
    except (ImportError, OSError, ValueError, IndexError):
        return []  # not Linux


def chunk_len(config: Any, batch: int, element_size: int, available: int | None = None, gpu: bool = False) -> int:
    """Queries of a chunk, so that one chunk's activations stay within `CHUNK_BYTES` (on a GPU `GPU_CHUNK_BYTES`) and a
    sixteenth of what is available (default: of what is free on the CPU)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    # As `plan_bytes.activation_bytes`: normed states, q or gate, k or up, v, attention's output.
    wide = max(q, config.intermediate_size) + max(kv, config.intermediate_size)
    per_token = batch * element_size * (config.hidden_size + wide + kv + q)
    most, longest = (GPU_CHUNK_BYTES, GPU_MAX_CHUNK) if gpu else (CHUNK_BYTES, MAX_CHUNK)
    available = available_bytes() if available is None and not gpu else available
    budget = most if available is None else min(most, available // 16)
    fits = max(1, budget // per_token)
    return max(MIN_CHUNK, min(longest, 1 << (fits.bit_length() - 1)))
