"""Ctrl-C and SIGTERM during a run: never within an optimizer's step, and one more ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to end, and did, with a checkpoint.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = number


class Signals:
    """Takes the signals for the time of a `with`.

    Args:
        wait: never interrupt, but say so in `pending`: several processes must end after the same step.
    """

    def __init__(self, wait: bool = False) -> None:
        self.pending: int | None = None
        self._held, self._wait = False, wait
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done in here is done to its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come while it was held."""
        if self.pending is not None and not self._wait:
            raise Interrupted("interrupted", self.pending)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:  # the second time
            for known, handler in self._before.items():
                signal.signal(known, handler)
            raise KeyboardInterrupt
        self.pending = number
        if not (self._held or self._wait):
            raise Interrupted("interrupted", number)
