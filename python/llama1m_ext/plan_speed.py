"""What this machine does in a second, measured in half a second, and what follows for a prefill and a decoded token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .plan_shape import Shape

OF_PEAK = 0.85
"""Share of the rate of multiply-adds in registers that the attention kernel reaches in a prefill (`llama1m bench attention`)."""
OF_READ = 0.8
"""Share of one raw read's rate that decode reaches (`llama1m bench decode`)."""


@dataclass(frozen=True)
class Machine:
    """Rates measured.

    Attributes:
        threads: that they were measured with.
        flops: multiply-adds in registers, FLOP/s, in the operand type of the attention kernel.
        matmul: torch's matrix product at the layers' sizes, FLOP/s.
        read: memory read, bytes/s.
    """

    threads: int
    flops: float
    matmul: float
    read: float


@dataclass(frozen=True)
class Speed:
    """Estimates, not promises.

    Attributes:
        machine: what they follow from.
        prefill_seconds: of the whole prompt.
        token_seconds: of one decoded token behind it, of one row or all rows of the batch; without what is read from a disk.
    """

    machine: Machine
    prefill_seconds: float
    token_seconds: float


def measure(shape: Shape, threads: int | None = None) -> Machine:
    """Measures this machine, in about half a second and 64 MiB."""
    import torch

    from . import _core

    before = torch.get_num_threads()
    threads = before if threads is None else threads
    dtype = getattr(torch, shape.dtype)
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            a = torch.ones(512, min(shape.hidden, 4096), dtype=dtype)
            b = torch.ones(min(shape.intermediate, 4096), a.shape[1], dtype=dtype)
            matmul = 2 * a.numel() * b.shape[0] / _best(lambda: torch.nn.functional.linear(a, b))
            memory = torch.ones(48 << 20, dtype=torch.uint8)
            read = memory.numel() / min(_core.read_seconds(memory, threads) for _ in range(5))
            flops = _core.peak_flops(shape.dtype, threads, 0.1)
    finally:
        torch.set_num_threads(before)
    return Machine(threads, flops, matmul, read)


def _best(run: Callable[[], object], seconds: float = 0.15) -> float:
    run()
    end, found = time.perf_counter() + seconds, []
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def estimate(shape: Shape, machine: Machine, tokens: int, batch: int, kv_bytes: int) -> Speed:
    """Times that these rates make likely.

    Args:
        tokens: of the prompt.
        kv_bytes: of all pages behind it.
    """
    attention = batch * shape.attention_flops(tokens) / (OF_PEAK * machine.flops)
    linear = batch * shape.linear_flops(tokens) / machine.matmul
    return Speed(machine, attention + linear, (shape.read_bytes + kv_bytes) / (OF_READ * machine.read))
