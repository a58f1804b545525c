"""Who holds which positions of a sequence: ranks as head parallel x inner ring x outer ring, and shards of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _core
from ..formats import KvFormat
from .heads import HeadGroup
from .runs import size
from .transfer import Links

__all__ = ["SHARDINGS", "Layout"]

SHARDINGS = ("zigzag", "striped", "contiguous")


class Layout:
    """How a sequence is spread over the ranks of a process group.

    A rank's number in the group is `(outer_rank * inner + inner_rank) * heads + head_rank`. Ranks of a ring hold shards of positions
    by `sharding`; the `heads` ranks that share a ring shard cut it into runs. All orders rise: a shard's tokens are in the order
    of their positions. All ranks of the group make theirs, one layout for all calls.

    Args:
        group: the process group (gloo for tensors on the CPU, NCCL for those on GPUs); None: the default one.
        sharding: "zigzag" (2R chunks, rank r holds chunks r and 2R-1-r), "striped" (rank r holds r, r+R, ..: 2311.09431),
            "contiguous" (unbalanced where attention is causal). R: ranks of the ring.
        heads: head-parallel degree: a part of a node's ranks, or whole nodes.
        inner: ranks of the inner ring; None: all that heads and outer leave.
        outer: ranks of the outer ring, across nodes (double ring: LoongTrain, 2406.18485).
        ranks_per_node: which links are within a node: those between ranks with the same `rank // ranks_per_node`; None: `heads * inner`.
        kv_format: in which format blocks of keys and values travel around the ring: "model" (their own dtype), or a compact one
            that is an option of caches as well: "int8", "fp8", "int4", K and V apart as "int8/int4" (`formats`). It is then the
            rank that holds a block who makes it compact, and who computes on the block as it was: what doesn't travel is not
            rounded, so that errors are those of a compact cache at most, however many ranks there are, and none on one. All
            others see the same bits, in both passes. Gradients travel in float32; those of compact keys and values count as
            gradients of what these were made from. Messages between ranks that share heads stay in the model's dtype.
            Numbers that float16 can't hold (65504) become NaN, with the 64 that share their scale.
        timeout: seconds that a silent rank is waited for, on CPUs; None: as long as torch's default for gloo, 1800. On GPUs it is the
            process group's own.

    Attributes:
        rank, world_size: this rank in the group, and how many there are.
        ring_rank, ring_size, head_rank: its place.
        links: counts the bytes sent (`links.sent`).

    Raises:
        TypeError, ValueError: numbers that don't multiply to the group's size, an unknown sharding or format; or this rank is not in
            the group.
        RuntimeError: torch.distributed is not initialised, and a group is needed.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        sharding: str = "zigzag",
        heads: int = 1,
        inner: int | None = None,
        outer: int = 1,
        ranks_per_node: int | None = None,
        kv_format: str = "model",
        timeout: float | None = None,
    ) -> None:
        if sharding not in SHARDINGS:
            raise ValueError(f"sharding: expected one of {', '.join(SHARDINGS)}, got {sharding!r}")
        if group is None and not (dist.is_available() and dist.is_initialized()):
            rank, world_size = 0, 1
        else:
            rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("group: expected a process group that this rank is in, got one without it")
        for name, value in (("heads", heads), ("outer", outer), ("inner", inner), ("ranks_per_node", ranks_per_node)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: expected a whole number from 1 on, got {value!r}")
        if inner is None:
            inner = world_size // (heads * outer)
        if heads * inner * outer != world_size:
            raise ValueError(
                f"heads, inner, outer: expected factors of the group's {world_size} ranks, got {heads} x {inner} x {outer}"
            )
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
        self.kv_format = KvFormat.parse(kv_format, "kv_format")
        self.group, self.sharding = group, sharding
        self.heads, self.inner, self.outer = heads, inner, outer
        self.rank, self.world_size = rank, world_size
        self.ring_size = inner * outer
        self.ring_rank, self.head_rank = divmod(rank, heads)
        self.ranks_per_node = heads * inner if ranks_per_node is None else ranks_per_node
        if self.ranks_per_node % heads and heads % self.ranks_per_node:
            raise ValueError(
                f"heads: expected a divisor or a multiple of ranks_per_node={self.ranks_per_node}, got {heads}"
            )
        self.timeout = 1800.0 if timeout is None else float(timeout)
        self.links = Links(group, rank, world_size, self.kind, self.timeout)
        self.agreed: dict[Any, list[int]] = {}
        self._backends = _backends(group) if world_size > 1 else {}
        if self._backends.get("cuda") == "nccl":
            self._connect()

    def _connect(self) -> None:
        """NCCL's communicators, which all ranks have to make together: later messages are between some of them."""
        groups = [self.group]
        if self.inner > 1 and self.outer > 1:
            ranks = dist.get_process_group_ranks(self.group or dist.group.WORLD)
            self.links.second = dist.new_group(
                ranks, use_local_synchronization=True, group_desc="llama1m_ext outer ring"
            )
            groups.append(self.links.second)
        for group in groups:
            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def __repr__(self) -> str:
        return (
            f"Layout(sharding={self.sharding!r}, heads={self.heads}, inner={self.inner}, outer={self.outer}, "
            f"ranks_per_node={self.ranks_per_node}, kv_format={self.kv_format.name!r}, rank={self.rank} of {self.world_size})"
        )

    def same(self) -> dict[str, object]:
        """What must be the same on all ranks, by name."""
        names = ("sharding", "heads", "inner", "outer", "ranks_per_node", "world_size")
        return {**{name: getattr(self, name) for name in names}, "kv_format": self.kv_format.name}

    def kind(self, a: int, b: int) -> str:
        """The kind of the link between two ranks: "within" a node or "across" nodes."""
        return "within" if a // self.ranks_per_node == b // self.ranks_per_node else "across"

    def rank_of(self, ring_rank: int, head_rank: int | None = None) -> int:
        """The rank at a place in the ring; by default that with this rank's heads."""
        return ring_rank * self.heads + (self.head_rank if head_rank is None else head_rank)

    def check_heads(self, q_heads: int, kv_heads: int) -> None:
        """Raises:
        ValueError: heads that can't be shared out evenly.
        """
        if q_heads % self.heads:
            raise ValueError(f"layout: expected heads that divide q_heads={q_heads}, got heads={self.heads}")
        if kv_heads % self.heads and self.heads % kv_heads:
            raise ValueError(
                f"layout: expected heads that divide kv_heads={kv_heads}, or a multiple of it, got heads={self.heads}"
            )

    def check_device(self, device: torch.device) -> None:
        """Raises:
        TypeError: the process group carries no tensors of this device.
        """
        if self.world_size == 1:
            return
        got = self._backends.get(device.type)
        wanted = {"cpu": "gloo", "cuda": "nccl"}.get(device.type)
        if wanted is None or got != wanted:
            raise TypeError(f"q: expected a device that the process group serves ({self._backends}), got {device}")

    def control_device(self) -> torch.device:
        """Where ranks' messages about what they do are: the CPU, unless the group has NCCL only."""
        return torch.device("cpu" if self.world_size == 1 or self._backends.get("cpu") == "gloo" else "cuda")

    # -- positions ------------------------------------------------------------------------------------------------------

    def ring_lengths(self, length: int) -> list[int]:
        """Positions of each ring shard, of a sequence of so many."""
        return [size(_core.ring_shard(self.sharding, length, self.ring_size, r)) for r in range(self.ring_size)]

    def cuts(self, ring_length: int) -> tuple[int, ...]:
        """Positions of each of the ranks that share a ring shard of so many."""
        return tuple(size(_core.ring_shard("contiguous", ring_length, self.heads, h)) for h in range(self.heads))

    def lengths(self, length: int) -> list[int]:
        """Positions that each rank holds, of a sequence of so many."""
        return [n for ring_length in self.ring_lengths(length) for n in self.cuts(ring_length)]

    def ring_positions(self, length: int, ring_rank: int | None = None) -> Tensor:
        """Positions of a ring shard, int64, rising; by default of this rank's."""
        at = self.ring_rank if ring_rank is None else ring_rank
        runs = _core.ring_shard(self.sharding, length, self.ring_size, at)
        if not runs:
            return torch.empty(0, dtype=torch.int64)
        return torch.cat([torch.arange(start, stop, step) for start, stop, step in runs])

    def positions(self, length: int, rank: int | None = None) -> Tensor:
        """Positions that a rank holds, by default this one: int64 `[n]` on the CPU, rising. As `position_ids`: `[None]`."""
        ring_rank, head_rank = divmod(self.rank if rank is None else rank, self.heads)
        ring = self.ring_positions(length, ring_rank)
        return ring.split(list(self.cuts(len(ring))))[head_rank]

    def head_group(self, ring_length: int) -> HeadGroup:
        """The ranks that share this rank's ring shard of so many positions."""
        return HeadGroup(self.links, self.ring_rank * self.heads, self.cuts(ring_length))

    # -- tensors --------------------------------------------------------------------------------------------------------

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank has whole, such as `input_ids`, along `dim`; differentiable."""
        return x.index_select(dim, self.positions(x.shape[dim]).to(x.device))

    def gather(self, x: Tensor, length: int, dim: int = 1) -> Tensor:
        """The whole of which each rank holds a shard along `dim`, on every rank. Without gradients. All ranks call it.

        Args:
            x: this rank's shard; other dimensions, dtype and device are the same on all ranks.
            length: of the whole.

        Raises:
            ValueError: a shard that is not as long as the layout says.
            TypeError: x needs a gradient, which gathering does not have: call on `x.detach()`.
            LinkError: a rank is silent.
        """
        lengths = self.lengths(length)
        if x.requires_grad and torch.is_grad_enabled():
            raise TypeError("x: expected a tensor without gradient, got requires_grad=True; gather x.detach()")
        if x.shape[dim] != lengths[self.rank]:
            raise ValueError(
                f"x: expected {lengths[self.rank]} positions of {length} on rank {self.rank}, got {x.shape[dim]}"
            )
        whole = list(x.shape)
        whole[dim] = length
        made, mine = x.new_empty(whole), x.contiguous()
        parts = self.links.gather(mine, lambda r: x.new_empty(_with(x.shape, dim, lengths[r])), "gather", control=True)
        for r, part in enumerate(parts):
            made.index_copy_(dim, self.positions(length, r).to(x.device), part)
        return made


def _backends(group: Any) -> dict[str, str]:
    """What carries tensors of each kind of device: {"cpu": "gloo", "cuda": "nccl"}."""
    found = str(dist.get_backend_config(group))
    return dict(pair.split(":", 1) for pair in found.split(",") if ":" in pair)


def _with(shape: torch.Size, dim: int, n: int) -> list[int]:
    made = list(shape)
    made[dim] = n
    return made
