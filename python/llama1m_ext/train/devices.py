"""The processes of a run, one for each device, as torchrun starts them; one process is the simplest case.

Each computes its own rows. Either all of them hold everything and add up their gradients ("replicate"), or weights,
gradients and optimizer states are spread over them and come together a layer at a time ("shard": torch's FSDP2, ZeRO-3).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .stages import Settings


@dataclass(frozen=True)
class Devices:
    """This process among the others.

    Attributes:
        rank, world_size: its number, and how many there are.
        device: where it computes.
        on_node: how many of them are on this machine, whose memory they share.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_node: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Each becomes the sum over all ranks, in place."""
        if self.world_size > 1:
            for t in tensors:
                torch.distributed.all_reduce(t)

    def total(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        if self.world_size == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(t)
        return t.tolist()

    def all_agree(self, yes: bool) -> bool:
        """Whether all say so."""
        return yes if self.world_size == 1 else self.total(float(yes))[0] == self.world_size

    def any_says(self, yes: bool) -> bool:
        """Whether one says so."""
        return yes if self.world_size == 1 else self.total(float(yes))[0] > 0

    def first_says(self, yes: bool) -> bool:
        """Whether the first rank says so; before it goes on. Of files that it writes the others may see either state."""
        return self.any_says(yes and self.is_first)

    def tell(self, text: str) -> None:
        """The first rank tells all others, which `hear` it."""
        if self.world_size > 1:
            torch.distributed.broadcast_object_list([text], 0)

    def hear(self) -> str:
        told: list[Any] = [None]
        torch.distributed.broadcast_object_list(told, 0)
        return str(told[0])

    def each(self, what: str, do: Callable[[], None]) -> None:
        """All ranks do something, and all fail where one does.

        Raises:
            OSError: what it was, on the rank where it was; on others that it was.
        """
        error: Exception | None = None
        try:
            do()
        except Exception as e:
            error = e
        if self.all_agree(error is None):
            return
        if error is not None:
            raise error
        raise OSError(f"{what} failed on another rank")


def spread(trainee: Any, settings: Settings) -> Any:
    """Spreads a `Trainee`'s weights over all ranks, layer by layer (FSDP2), in place. Shards are float32, and come together in the
    dtype that computes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.no_grad():
        for p in trainee.parameters():
            p.data = p.data.float()
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, settings.dtype), reduce_dtype=torch.float32)
    for layer in trainee.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(trainee, mp_policy=policy)


def join(device: str | torch.device | None = None) -> Devices:
    """This process as torchrun has set it up, or alone.

    Args:
        device: where to compute; None: a GPU of its own, where torch sees one, else the CPU.

    Raises:
        ValueError: no such device.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local, on_node = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        at = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    else:
        try:
            at = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
        if at.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: expected one that torch sees, got {device}")
        if at.type == "cuda" and at.index is None:
            at = torch.device("cuda", local)
    if at.type == "cuda":
        torch.cuda.set_device(at)
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if at.type == "cuda" else "gloo")
    return Devices(rank, world_size, at, on_node)
