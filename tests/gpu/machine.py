"""The card, or what stands in for it in a dry run: time, memory, synchronisation, and random data made in place."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

GIB = 2**30


class Machine:
    """Where a section runs. `dry`: kernels are emulated by a driver on the CPU, at tiny sizes; times then say nothing."""

    def __init__(self, dry: bool = False, options: Any = None):
        self.dry = dry
        self.options = options
        self.device = torch.device("cpu" if dry else "cuda")
        if not dry:
            properties = torch.cuda.get_device_properties(0)
            self.name = properties.name
            self.capability = torch.cuda.get_device_capability(0)
            self.l2_bytes = getattr(properties, "L2_cache_size", 50 * 2**20)
            self.memory_bytes = properties.total_memory
        else:
            self.name, self.capability, self.l2_bytes, self.memory_bytes = "fake driver", (9, 0), 0, 0

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, `ops` sends this machine's tensors to the CUDA kernels."""
        if not self.dry:
            yield
            return
        from llama1m_ext import cuda

        with cuda.over_host_memory():
            yield

    def size(self, full: int, dry: int) -> int:
        """A size for the card, and one for the emulation."""
        return dry if self.dry else full

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Normal numbers, made on the device; in the dtype itself, so that a large tensor needs no copy of another."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        if dtype == torch.float64:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=dtype) * scale
        made = torch.randn(*shape, generator=generator, device=self.device, dtype=dtype)
        return made.mul_(scale) if scale != 1 else made

    def free(self) -> None:
        """Gives cached memory back, so that the next candidate finds it."""
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Fills in the peak of torch's memory inside the block, in bytes."""
        found = [0]
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        yield found
        if not self.dry:
            torch.cuda.synchronize()
            found[0] = torch.cuda.max_memory_allocated()

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one call, events around it."""
        if self.dry:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def batch(self, run: Callable[[int], Any], times: int) -> float:
        """Seconds of one call out of many in a row, each given its number: launches overlap, gaps between them don't count."""
        if self.dry:
            start = time.perf_counter()
            run(0)
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(times):
            run(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    def compare(
        self, candidates: dict[str, Callable[[int], Any]], *, rounds: int = 5, seconds: float = 0.2
    ) -> dict[str, Timing]:
        """Candidates in turn, A B C A B C: medians of rounds, each round long enough to fill `seconds`."""
        times: dict[str, int] = {}
        for name, run in candidates.items():
            for i in range(1 if self.dry else 3):
                run(i)
            self.wait()
            one = self.batch(run, 1)
            times[name] = 1 if self.dry else max(1, min(1000, int(seconds / max(one, 1e-6))))
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(1 if self.dry else rounds):
            for name, run in candidates.items():
                samples[name].append(self.batch(run, times[name]))
        return {name: Timing(values) for name, values in samples.items()}


class Timing:
    """Seconds of one call, round by round."""

    def __init__(self, samples: list[float]):
        self.samples = samples
        self.median = statistics.median(samples)
        self.spread = max(samples) / min(samples)

    @property
    def ms(self) -> float:
        return self.median * 1e3


def commit() -> str:
    """The commit of the tree that this runs from, "+" where it has changes; empty where there is no git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, encoding="utf-8", check=True
        )
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
