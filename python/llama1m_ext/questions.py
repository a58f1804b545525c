"""Yes-or-no questions about the tensors of a call, answered together."""

from __future__ import annotations

import torch
from torch import Tensor


class Questions:
    """Bools on a device that the host wants to know.

    Reading one from a GPU waits for all the work that was given to it before: so they are gathered, and read at once.
    """

    def __init__(self) -> None:
        self._asked: list[Tensor] = []

    def ask(self, answer: Tensor) -> None:
        """`answer`: bool, any shape."""
        self._asked.append(answer.reshape(-1))

    def answers(self) -> list[bool]:
        """All of them in the order in which they were asked."""
        if not self._asked:
            return []
        device = self._asked[0].device
        return torch.cat([t.to(device) for t in self._asked]).tolist()
