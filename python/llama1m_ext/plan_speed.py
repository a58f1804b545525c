"""What this machine or its GPU does in a second, measured in half a second or given, and what follows for a prefill and a
decoded token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .plan_shape import Shape

OF_PEAK = 0.85
"""Share of the rate of multiply-adds in registers that the attention kernel reaches in a prefill (`llama1m bench attention`)."""
OF_READ = 0.8
"""Share of one raw read's rate that decode reaches (`llama1m bench decode`)."""

GPU_READ = 256 << 20
GPU_ROOM = 2 << 30
"""Bytes that have to be free on a GPU that is measured."""


@dataclass(frozen=True)
class Machine:
    """Rates.

    Attributes:
        threads: that they were measured with; of a GPU 0.
        flops: multiply-adds in registers, FLOP/s, in the operand type of the attention kernel; of a GPU what attention
            reaches, or what somebody said.
        matmul: torch's matrix product at the layers' sizes, FLOP/s.
        read: memory read, bytes/s.
        where: "cpu" or "gpu".
        given: whether somebody said so; else it was measured.
    """

    threads: int
    flops: float
    matmul: float
    read: float
    where: str = "cpu"
    given: bool = False

    @property
    def attention(self) -> float:
        """Of the attention kernel in a prefill, FLOP/s."""
        return self.flops if self.where == "gpu" and not self.given else OF_PEAK * self.flops


@dataclass(frozen=True)
class Speed:
    """Estimates, not promises.

    Attributes:
        machine: what they follow from.
        prefill_seconds: of the whole prompt.
        token_seconds: of one decoded token behind it, of one row or all rows of the batch; without what comes from a disk,
            or from the host to a GPU.
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


def measure_gpu(
    shape: Shape, device: Any, queries: int = 2048, keys: int = 16384, rows: int = 4096, nbytes: int = GPU_READ
) -> Machine:
    """Measures a GPU: one matrix product at a layer's sizes, one attention of a chunk of a prompt, one copy of memory.

    Args:
        device: a `torch.device`.
        queries, keys: of the attention.
        rows: of the matrix product.
        nbytes: of the copy: more than caches hold.
    """
    import torch

    from . import ops

    dtype = getattr(torch, shape.dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        a = torch.ones(rows, shape.hidden, dtype=dtype, device=device)
        b = torch.ones(shape.intermediate, shape.hidden, dtype=dtype, device=device)
        matmul = 2 * a.numel() * b.shape[0] / _best(lambda: torch.nn.functional.linear(a, b), wait=wait)
        q = torch.ones(1, shape.heads, queries, shape.head_dim, dtype=dtype, device=device)
        k = torch.ones(1, shape.kv_heads, keys, shape.head_dim, dtype=dtype, device=device)
        pairs = queries * (keys - queries) + queries * (queries + 1) // 2
        seconds = _best(lambda: ops.attention(q, k, k, q_start=keys - queries), wait=wait)
        flops = 4 * shape.heads * shape.head_dim * pairs / seconds
        memory = torch.ones(nbytes, dtype=torch.uint8, device=device)
        read = 2 * nbytes / _best(memory.clone, wait=wait)  # each byte is read and written
    return Machine(0, flops, matmul, read, "gpu")


def _best(run: Callable[[], object], seconds: float = 0.15, wait: Callable[[], object] = int) -> float:
    """Seconds of the fastest of several runs.

    Args:
        wait: until what was begun is done.
    """
    run()
    wait()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - begin)
    return min(found)


def estimate(shape: Shape, machine: Machine, tokens: int, batch: int, kv_bytes: int, ranks: int = 1) -> Speed:
    """Times that these rates make likely.

    Args:
        tokens: of the prompt.
        kv_bytes: of all pages behind it; of one rank.
        ranks: processes that share the prompt, each on such a machine; their links cost nothing here.
    """
    attention = batch * shape.attention_flops(tokens) / machine.attention
    linear = batch * shape.linear_flops(tokens) / machine.matmul
    return Speed(machine, (attention + linear) / ranks, (shape.read_bytes + kv_bytes) / (OF_READ * machine.read))
