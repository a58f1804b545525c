"""Which token ids a cache's keys and values were made of."""

from __future__ import annotations

import torch
from torch import Tensor


class Seen:
    """The ids of the first tokens of a cache, as far as they are known.

    Whoever writes tokens whose ids are not known says nothing: then `length` is less than the cache's.

    Attributes:
        length: tokens whose ids are known, from the first on.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self.length = 0

    def append(self, ids: Tensor, at: int) -> None:
        """Tokens `at` to `at + n` are these ids, `[batch, n]`; what was there from `at` on is gone."""
        self.truncate(at)
        if self.length == at:
            if self._parts and self._parts[0].device != ids.device:
                self._parts = [part.to(ids.device) for part in self._parts]
            # A copy: generate() gives views of all ids so far, one for each token.
            self._parts.append(ids.detach().clone())
            self.length += ids.shape[1]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        while self.length > length:
            last = self._parts.pop()
            self.length -= last.shape[1]
            if self.length < length:
                self._parts.append(last[:, : length - self.length].clone())
                self.length = length

    def take_rows(self, rows: Tensor) -> None:
        """Batch row i becomes what row `rows[i]` was; `rows` may be a mask, too."""
        if self.length:
            self._parts = [self.ids[rows.to(self.ids.device)]]

    def repeat_rows(self, repeats: int) -> None:
        """Each batch row so many times, one after the other."""
        if self.length:
            self._parts = [self.ids.repeat_interleave(repeats, 0)]

    @property
    def ids(self) -> Tensor:
        """`[batch, length]`, int64."""
        if not self._parts:
            return torch.empty((1, 0), dtype=torch.long)
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, 1)]
        return self._parts[0]
