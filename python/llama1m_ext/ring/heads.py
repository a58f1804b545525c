"""Head parallelism: ranks that each hold some positions of all heads come to hold all positions of some heads, and back.

All-to-all (DeepSpeed-Ulysses, 2309.14509), here among `heads` ranks that follow each other, of one node or of whole ones. Where there are more
of them than kv heads, several hold the same kv head, and its gradient is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import Links

__all__ = ["HeadGroup"]


@dataclass(frozen=True)
class HeadGroup:
    """The ranks that share the heads of one ring shard.

    Attributes:
        links: of this rank.
        first: the group's first rank; the others follow it.
        lengths: positions that each of them holds: cuts of one ring shard, in order.
    """

    links: Links
    first: int
    lengths: tuple[int, ...]

    @property
    def degree(self) -> int:
        return len(self.lengths)

    @property
    def me(self) -> int:
        return self.links.rank - self.first

    def share(self, heads: int, rank: int) -> slice:
        """The heads of `heads` that the group's rank works on; where there are fewer heads than ranks, one that others have too."""
        if heads >= self.degree:
            each = heads // self.degree
            return slice(rank * each, (rank + 1) * each)
        at = rank * heads // self.degree
        return slice(at, at + 1)

    def gather(self, tensors: list[Tensor], what: str) -> list[Tensor]:
        """All positions of this rank's heads.

        Args:
            tensors: each `[batch, heads, n, ..]`, n = this rank's positions; q, k, v, or such as have their shapes.

        Returns:
            each `[batch, this rank's heads, all positions, ..]`, in memory of its own.
        """
        if self.degree == 1:
            return tensors
        sends, receives, parts = [], [], []
        for rank in range(self.degree):
            size = self.lengths[rank]
            ours = [t[:, self.share(t.shape[1], self.me)] for t in tensors]
            if rank == self.me:
                parts.append([t.contiguous() for t in ours])
                continue
            sends += [(t[:, self.share(t.shape[1], rank)].contiguous(), self.first + rank) for t in tensors]
            got = [t.new_empty((*t.shape[:2], size, *t.shape[3:])) for t in ours]
            receives += [(t, self.first + rank) for t in got]
            parts.append(got)
        self.links.exchange(sends, receives, f"{what}, exchanging heads").wait()
        return [torch.cat([part[i] for part in parts], 2) for i in range(len(tensors))]

    def scatter(self, tensors: list[Tensor], heads: list[int], what: str) -> list[Tensor]:
        """The way back: this rank's positions of all heads.

        Args:
            tensors: each `[batch, this rank's heads, all positions, ..]`.
            heads: how many there are in all, of each. Those that several ranks have are added up.
        """
        if self.degree == 1:
            return tensors
        sends, receives, parts = [], [], []
        for rank in range(self.degree):
            if rank == self.me:
                parts.append([t.split(self.lengths, 2)[rank] for t in tensors])
                continue
            sends += [(t.split(self.lengths, 2)[rank].contiguous(), self.first + rank) for t in tensors]
            mine = self.lengths[self.me]
            got = [t.new_empty((*t.shape[:2], mine, *t.shape[3:])) for t in tensors]
            receives += [(t, self.first + rank) for t in got]
            parts.append(got)
        self.links.exchange(sends, receives, f"{what}, exchanging heads").wait()
        made = []
        for i, of in enumerate(heads):
            pieces = [part[i] for part in parts]
            shared = max(1, self.degree // of)
            if shared > 1:
                pieces = [
                    torch.stack(pieces[at : at + shared]).sum(0) for at in range(0, self.degree, shared)
                ]  # in the ranks' order: the same bits in every run
            made.append(torch.cat(pieces, 1))
        return made
