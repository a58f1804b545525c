"""Messages between ranks, under way while the caller computes; counted, and never waited for without end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Exchange", "LinkError", "Links"]


class LinkError(RuntimeError):
    """A rank died, or a link hangs. The process group is of no use any more: end the process, and let torchrun restart."""


@dataclass
class Links:
    """The links of this rank to the others of a process group.

    Attributes:
        group: the process group; None: the default one.
        rank, world_size: this rank in it, and how many there are.
        kind: the kind of the link from one rank to another, such as "within" (a node) or "across" (nodes).
        timeout: seconds that a message on the CPU is waited for. On GPUs nobody waits: there it is the group's own
            (`init_process_group(timeout=...)`), by which NCCL's watchdog ends the process.
        second: another process group of the same ranks. NCCL does one batch of messages after the other: those on slow links
            have a communicator of their own, where there are two rings.
        sent: bytes of keys, values, queries, results and gradients that this rank has sent, by kind.
        control: bytes of what ranks agree by.
        waited: seconds that this rank has stood still in `Exchange.wait` (on the CPU).
    """

    group: Any
    rank: int
    world_size: int
    kind: Callable[[int, int], str]
    timeout: float
    second: Any = None
    sent: dict[str, int] = field(default_factory=dict)
    control: int = 0
    waited: float = 0.0

    def exchange(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        what: str,
        *,
        control: bool = False,
        lane: int = 0,
    ) -> Exchange:
        """Starts messages, each a contiguous tensor and the other rank. Empty ones are not sent, and not awaited.

        Nobody may write to what is sent, nor read what is received, before `wait`.

        Args:
            what: said in errors: what this is.
            control: they are no part of `sent`.
            lane: messages of different lanes don't wait for each other, where the layout has made a second one.

        Raises:
            LinkError: a link is down already.
        """
        ops, peers = list[dist.P2POp](), list[tuple[str, int]]()
        group = self.second if lane == 1 and self.second is not None else self.group
        # By the other's number: each pair starts its messages in the same order, whatever each rank had in mind.
        for tensor, peer, is_send in sorted(
            [(t, p, True) for t, p in sends] + [(t, p, False) for t, p in receives], key=lambda m: m[1]
        ):
            if tensor.numel() == 0:
                continue
            other = peer if self.group is None else dist.get_global_rank(self.group, peer)
            # As bytes: gloo knows fewer dtypes than torch does.
            raw = tensor.view(-1).view(torch.uint8)
            ops.append(dist.P2POp(dist.isend if is_send else dist.irecv, raw, other, group))
            peers.append(("to" if is_send else "from", peer))
            if is_send:
                self._count(peer, raw.numel(), control)
        if not ops:
            return Exchange(self, [], [], what)
        if ops[0].tensor.device.type != "cpu":
            try:
                batch = dist.batch_isend_irecv(ops)
            except RuntimeError as e:
                said = f"no message to or from ranks {sorted({peer for _, peer in peers})} could be started"
                raise LinkError(f"rank {self.rank}: {what}: {said}; {_first_line(e)}") from e
            return Exchange(self, batch, peers, what, [op.tensor for op in ops])
        works: list[Any] = []
        for op, (way, peer) in zip(ops, peers, strict=True):
            try:
                works.append(op.op(op.tensor, op.peer, group=op.group))
            except RuntimeError as e:
                said = f"no message {way} rank {peer} could be started (timeout {self.timeout:g} s): that rank died, or gave up"
                raise LinkError(f"rank {self.rank}: {what}: {said}; {_first_line(e)}") from e
        return Exchange(self, works, peers, what, [op.tensor for op in ops])

    def gather(self, mine: Tensor, room: Callable[[int], Tensor], what: str, *, control: bool = False) -> list[Tensor]:
        """Every rank's tensor, this one's own among them; all ranks call it.

        Args:
            mine: contiguous.
            room: for that of another rank, by its number.
            what, control: as `exchange`.

        Raises:
            LinkError: a rank is silent.
        """
        others = [r for r in range(self.world_size) if r != self.rank]
        found = [mine if r == self.rank else room(r) for r in range(self.world_size)]
        self.exchange([(mine, r) for r in others], [(found[r], r) for r in others], what, control=control).wait()
        return found

    def from_first(self, tensors: Sequence[Tensor], what: str) -> None:
        """Rank 0's numbers come into every rank's tensors, contiguous and of the same shapes; all ranks call it. Control.

        Raises:
            LinkError: a rank is silent.
        """
        others = range(1, self.world_size)
        sends = [(t, r) for t in tensors for r in others] if self.rank == 0 else []
        receives = [(t, 0) for t in tensors] if self.rank else []
        self.exchange(sends, receives, what, control=True).wait()

    def _count(self, peer: int, size: int, control: bool) -> None:
        if control:
            self.control += size
            return
        kind = self.kind(self.rank, peer)
        self.sent[kind] = self.sent.get(kind, 0) + size


class Exchange:
    """Messages under way."""

    def __init__(
        self,
        links: Links,
        works: list[Any],
        peers: list[tuple[str, int]],
        what: str,
        tensors: list[Tensor] | None = None,
    ) -> None:
        self._links, self._works, self._peers, self._what = links, works, peers, what
        self._tensors = tensors or []  # alive until the messages are through

    def wait(self) -> None:
        """Until all is sent and received; on a GPU, the current stream does.

        Raises:
            LinkError: not within the timeout; with the ranks that were silent.
        """
        works, self._works = self._works, []
        if not works:
            return
        links, start = self._links, time.monotonic()
        if self._tensors[0].device.type != "cpu":
            for work in works:
                work.wait()
            self._tensors = []
            return
        failed = list[tuple[str, str]]()
        for i, work in enumerate(works):
            # A moment for those behind a silent one: they may be through already.
            left = max(links.timeout - (time.monotonic() - start), 0.05)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as e:
                way, peer = self._peers[i]
                failed.append((f"{way} rank {peer}", _first_line(e)))
        links.waited += time.monotonic() - start
        self._tensors = []
        if failed:
            who = ", ".join(name for name, _ in failed)
            raise LinkError(
                f"rank {links.rank}: {self._what}: no message {who} within {time.monotonic() - start:.1f} s (timeout "
                f"{links.timeout:g} s): that rank died, is stuck, or does something else; {failed[0][1]}"
            )


def _first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return lines[0][:300] if lines else type(e).__name__
