"""Devices that share rows: each computes a part of a row's positions, and attention goes around the ring of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .attention import Apart, Attention
from .devices import Devices

if TYPE_CHECKING:
    from ..ring import Layout


@dataclass(frozen=True)
class Team:
    """The processes that share this one's rows; one alone is the simplest case.

    Attributes:
        number, teams: which team this is, and how many there are.
        size: its processes.
        layout: who holds which positions; None: one process.
    """

    number: int
    teams: int
    size: int
    layout: Layout | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the team, where something is counted once."""
        return self.layout is None or self.layout.rank == 0

    def share(
        self, batch: Mapping[str, Tensor], labels: Tensor, weights: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """This process's positions of whole rows `[rows, length]`, whose labels are shifted already."""
        layout = self.layout
        if layout is None:
            return dict(batch), labels, weights
        mine = {name: layout.shard(t) for name, t in batch.items()}
        if "position_ids" not in mine:
            mine["position_ids"] = layout.positions(labels.shape[1])[None]
        return mine, layout.shard(labels), None if weights is None else layout.shard(weights)

    def attention(self, length: int, borders: Sequence[Sequence[int]] | None) -> Attention | None:
        """What computes attention in rows of so many tokens; None: as the dtype allows."""
        if self.layout is not None:
            from ..ring.training import RingAttention

            return RingAttention(self.layout, length, borders)
        return None if borders is None else Apart(borders)


def team_of(devices: Devices, size: int) -> Team:
    """Teams of processes that follow each other.

    On several nodes (`LOCAL_WORLD_SIZE`, which torchrun sets), a team that is whole nodes has a double ring.

    Raises:
        ValueError: a size that does not divide the number of processes.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or devices.world_size % size:
        raise ValueError(
            f"sequence_parallel: expected a divisor of the {devices.world_size} processes (torchrun starts them), got {size!r}"
        )
    teams, number = devices.world_size // size, devices.rank // size
    if size == 1:
        return Team(number, teams, 1)
    import torch.distributed as dist

    from ..ring import Layout

    groups: list[Any] = [dist.group.WORLD]
    if teams > 1:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, devices.world_size, size)]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or size
    outer = size // local if size > local and size % local == 0 else 1
    per_node = min(local, size) if size % local == 0 or local % size == 0 else None
    return Team(number, teams, size, Layout(groups[number], outer=outer, ranks_per_node=per_node))
