"""How much memory there is, and how many queries of a prompt fit into it at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

CHUNK_BYTES = 512 << 20
"""Activations of one chunk, at most. More makes nothing faster: the matrices are large enough long before."""
MIN_CHUNK, MAX_CHUNK = 128, 8192


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        try:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError, AttributeError):
            pass  # neither Linux nor a Unix that tells
    try:
        # A container's own limit, which /proc/meminfo does not know.
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        found.append(max(0, limit - used))
    except (OSError, ValueError):
        pass  # no cgroup, or "max"
    return min(found) if found else None


def chunk_len(config: Any, batch: int, element_size: int) -> int:
    """Queries of a chunk, so that one chunk's activations stay within `CHUNK_BYTES` and a sixteenth of what is free."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 4 * config.num_key_value_heads
    # gate, up, their product; norms in float32; q, out, k, v twice (before and after rotation)
    per_token = element_size * (3 * config.intermediate_size + 3 * config.hidden_size + heads * head_dim)
    per_token = batch * (per_token + 2 * 4 * config.hidden_size)
    available = available_bytes()
    budget = CHUNK_BYTES if available is None else min(CHUNK_BYTES, available // 16)
    fits = max(1, budget // per_token)
    return max(MIN_CHUNK, min(MAX_CHUNK, 1 << (fits.bit_length() - 1)))
