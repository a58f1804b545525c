"""Blocks on their way around the ring: the next one comes and this one leaves while this one is computed on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..formats import Page
from . import wire
from .blocks import Sums
from .layout import Layout
from .schedule import Schedule, Step
from .transfer import Exchange

__all__ = ["Homeward", "blocks"]


def blocks(
    layout: Layout, plan: Schedule, k: Tensor, v: Tensor, what: str
) -> Iterator[tuple[Step, tuple[Tensor, Tensor] | None]]:
    """The steps of a rank, each with the keys and values to compute on, `[batch, kv_heads, tokens, head_dim]` (None: no queries
    here see any).

    Messages of a step start before the caller computes on its block, and are waited for when it asks for the next step. Blocks
    travel in the layout's `kv_format`; this rank's own is as it was given.

    Args:
        k, v: this rank's own, `[batch, kv_heads, n, head_dim]`.
        what: said in errors.

    Raises:
        LinkError: a rank is silent.
    """
    batch, heads, _, head_dim = k.shape
    form, travels = layout.kv_format, plan.steps[0].inner_to is not None or plan.steps[0].outer_to is not None
    page = wire.leaving(form, k, v) if travels else None
    # Blocks that are on their way here, by the step that they are for.
    coming: dict[int, Page] = {}
    under_way: dict[int, list[Exchange]] = {}
    for step in plan.steps:
        for messages in under_way.pop(step.step, ()):
            messages.wait()
        if step.step > 0:
            page = coming.pop(step.step, None)
        lap_begins = step.step % plan.inner == 0
        for ahead, to, is_outer in ((1, step.inner_to, False), (plan.inner, step.outer_to, True)):
            target = step.step + ahead
            if (is_outer and not lap_begins) or (not is_outer and (target % plan.inner == 0)):
                continue
            later = plan.steps[target] if target < len(plan.steps) else None
            sends, receives = list[tuple[Tensor, int]](), list[tuple[Tensor, int]]()
            if later is not None and later.receive_from is not None:
                coming[target] = wire.room(form, (batch, heads, plan.lengths[later.source], head_dim), k)
                receives += [(t, layout.rank_of(later.receive_from)) for t in coming[target].tensors().values()]
            if to is not None:
                assert page is not None
                sends += [(t, layout.rank_of(to)) for t in page.tensors().values()]
            if sends or receives:
                said = f"{what}, step {step.step + 1} of {len(plan.steps)}, keys and values"
                sent = layout.links.exchange(sends, receives, said, lane=int(is_outer))
                # What is sent only is waited for then, too: the block's memory is free after it.
                under_way.setdefault(min(target, len(plan.steps)), []).append(sent)
        if step.step == 0:
            yield step, (k, v)
        else:
            yield step, wire.arrived(page, head_dim, k.dtype) if page is not None and step.pieces else None
    for messages in under_way.pop(len(plan.steps), ()):
        messages.wait()


class Homeward:
    """Gradients of blocks on their way to the ranks that the blocks belong to."""

    def __init__(self, layout: Layout, plan: Schedule, sums: Sums, what: str) -> None:
        self._layout, self._plan, self._sums, self._what = layout, plan, sums, what
        self._under_way: tuple[list[Exchange], list[tuple[Tensor, int]]] = ([], [])

    def after(self, step: int) -> None:
        """Adds what has come, and sends what goes on after a step; call it after each, and once after all."""
        self.settle()
        sends, receives = self._plan.exchanges[step]
        came = [(self._sums.empty(source), source) for _, source in receives]
        away = [(self._sums.take(source), peer) for peer, source in sends]
        by_lane: dict[int, tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]] = {0: ([], []), 1: ([], [])}
        for tensor, peer in away:
            by_lane[self._lane(peer)][0].append((tensor, self._layout.rank_of(peer)))
        for (tensor, _), (peer, _) in zip(came, receives, strict=True):
            by_lane[self._lane(peer)][1].append((tensor, self._layout.rank_of(peer)))
        said = f"{self._what}, after step {step} of {len(self._plan.steps)}, gradients of keys and values"
        messages = [self._layout.links.exchange(*of, said, lane=lane) for lane, of in by_lane.items() if any(of)]
        self._under_way = messages, came

    def settle(self) -> None:
        """Waits for what is under way, and adds it."""
        messages, came = self._under_way
        self._under_way = [], []
        for each in messages:
            each.wait()
        for tensor, source in came:
            self._sums.of(source).add_(tensor)

    def _lane(self, peer: int) -> int:
        """Of the inner ring or of the outer one: slow links don't hold up fast ones."""
        return int(peer // self._plan.inner != self._layout.ring_rank // self._plan.inner)
