"""Time and memory of one call."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any


def reset_peak_rss() -> bool:
    """Starts a new peak of resident memory (Linux). False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int:
    """The most resident memory since `reset_peak_rss`, or since the process began where that is not offered."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """A streamer for `generate()` that keeps the moments at which tokens came."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        """Called once with the prompt and once for each new token."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""

    @property
    def first_token_s(self) -> float:
        """Seconds from the prompt to the first new token: the prefill."""
        if len(self.moments) < 2:
            raise RuntimeError(
                f"expected the prompt and at least one token from generate(), got {len(self.moments)} calls"
            )
        return self.moments[1] - self.moments[0]

    @property
    def decode_s(self) -> float:
        """Seconds from the first new token to the last."""
        return self.moments[-1] - self.moments[1]


def gib(size: float) -> str:
    """1.25 GiB"""
    return f"{size / 2**30:.2f} GiB"
