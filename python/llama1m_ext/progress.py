"""The progress bar of a long prefill: it counts tokens, and its estimate of the time left knows that late tokens cost more."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any, Literal

import torch

AUTO_TOKENS = 16_384
"""In "auto", prompts from this length on get a bar: shorter ones are done in seconds."""
_FORMAT = "prefill {percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"


class Progress:
    """A bar over the work of a prefill, in any unit that is proportional to time; what it shows is tokens.

    A token at position p costs a constant and a share that grows with p, and each token passes every layer, so what is
    done of the work says how many tokens' worth is done and how much time is left. `TQDM_DISABLE=1` silences it as it
    does every other bar.

    Args:
        show: an option `progress`.
        tokens: length of the prompt, all batch rows together.
        work: sum of all that `step` will be given.
    """

    def __init__(self, show: bool | Literal["auto"], tokens: int, work: float) -> None:
        self.tokens, self.work, self.done, self.skipped = tokens, work, 0.0, 0.0
        self.bar: Any = None
        if show == "auto":
            show = tokens >= AUTO_TOKENS
        if show:
            from tqdm.auto import tqdm  # bars in notebooks too

            self.bar = tqdm(total=work, bar_format=_FORMAT, dynamic_ncols=True, mininterval=0.25)
            self.start = time.perf_counter()
            self._label()

    def skip(self, work: float) -> None:
        """So much was done before, by somebody else: it takes no time."""
        self.done += work
        self.skipped += work
        if self.bar is not None:
            self._label()
            self.bar.initial = self.done  # what the time left is predicted from
            self.bar.n = self.done
            self.bar.refresh()

    def step(self, work: float) -> None:
        """So much more is done."""
        self.done += work
        if self.bar is not None:
            self._label()
            self.bar.update(work)

    def _label(self) -> None:
        seconds = time.perf_counter() - self.start
        tokens = self.tokens * self.done / self.work
        computed = self.tokens * (self.done - self.skipped) / self.work
        rate = f", {computed / seconds:,.0f} tokens/s" if computed and seconds > 0 else ""
        self.bar.set_description_str(f"{tokens:,.0f}/{self.tokens:,} tokens{rate}", refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()


class Pace:
    """Tells a bar what has been computed. A GPU is given work much faster than it does it: so the host waits, one chunk
    behind. Then the bar shows what is done, Ctrl-C comes between chunks, and the GPU always has a chunk to do.

    Args:
        progress: the bar.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._given: deque[tuple[torch.cuda.Event, float]] = deque()

    def step(self, work: float, device: torch.device) -> None:
        """So much was given to a device."""
        if device.type != "cuda":
            self.progress.step(work)
            return
        event = torch.cuda.Event(blocking=True)  # the host sleeps as long as it waits
        event.record(torch.cuda.current_stream(device))
        self._given.append((event, work))
        while len(self._given) > 1:
            self._wait()

    def finish(self) -> None:
        """Waits for the rest of it."""
        while self._given:
            self._wait()

    def _wait(self) -> None:
        event, work = self._given[0]
        event.synchronize()
        self._given.popleft()
        self.progress.step(work)
