"""What ranks do in tests of what goes wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama1m_ext.ring import Layout, blocks, ring_attention


def tensors(n: int, q_heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, heads, n, 16).to(dtype) for heads in (q_heads, kv_heads, kv_heads)]


def outcome(do: Callable[[], Any]) -> tuple[str, str, float]:
    """(the error's type, its message, seconds)."""
    start = time.monotonic()
    try:
        do()
    except Exception as e:
        return type(e).__name__, str(e), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def differing(group: Any, odd: int, layouts: dict[str, Any], calls: dict[str, Any], shapes: dict[str, Any]) -> Any:
    """One rank calls otherwise than the others."""
    is_odd = dist.get_rank(group) == odd
    layout = Layout(group, timeout=30, **(layouts if is_odd else {}))
    q, k, v = tensors(**{"n": 16, **(shapes if is_odd else {})})
    found = outcome(lambda: ring_attention(q, k, v, layout, **(calls if is_odd else {})))
    # Nothing is left behind: the next call is served.
    again = ring_attention(*tensors(16), Layout(group, timeout=30))
    return found, tuple(again.shape), layout.links.sent


def version(group: Any, odd: int) -> Any:
    import llama1m_ext

    if dist.get_rank(group) == odd:
        llama1m_ext.__dict__["__version__"] = "0.0.1"
    try:
        return outcome(lambda: ring_attention(*tensors(16), Layout(group, timeout=30)))
    finally:
        llama1m_ext.__dict__.pop("__version__", None)


def stopping(group: Any, who: int, passes: str, how: str, timeout: float) -> Any:
    """One rank dies after the first block of a pass, or sleeps at it."""
    layout = Layout(group, timeout=timeout)
    q, k, v = (t.requires_grad_() for t in tensors(32))
    if layout.rank == who:
        kind = blocks.Merged if passes == "forward" else blocks.Sums
        add, calls = kind.add, []

        def stop(*args: Any) -> None:
            calls.append(1)
            if len(calls) > (how == "dies"):
                if how == "dies":
                    os._exit(1)
                time.sleep(3 * timeout)
            add(*args)

        kind.add = stop  # type: ignore[method-assign]

    def both() -> None:
        out = ring_attention(q, k, v, layout, length=32 * layout.world_size)
        assert isinstance(out, Tensor)
        out.sum().backward()

    return outcome(both)


def absent(group: Any, who: int, timeout: float) -> Any:
    """One rank never calls."""
    if dist.get_rank(group) == who:
        return None
    return outcome(lambda: ring_attention(*tensors(8), Layout(group, timeout=timeout)))
