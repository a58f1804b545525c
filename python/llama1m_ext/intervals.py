"""Attention masks as intervals of keys, one per batch row: what padding is, in O(batch) memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intervals:
    """Key j is visible in batch row b when `start[b] <= j < end[b]`; None: all of them.

    Attributes:
        start: int64 `[batch]`, or None.
        end: int64 `[batch]`, or None.
    """

    start: Tensor | None = None
    end: Tensor | None = None

    def on(self, device: torch.device) -> Intervals:
        """The same on another device; itself where it is there."""
        if all(x is None or x.device == device for x in (self.start, self.end)):
            return self
        moved = [None if x is None else x.to(device, non_blocking=True) for x in (self.start, self.end)]
        return Intervals(*moved)

    def matrix(self, q_len: int, kv_len: int, q_start: int, device: torch.device) -> Tensor | None:
        """The causal mask that these intervals mean, bool `[batch, 1, q_len, kv_len]` (or batch 1): for code that wants
        one. None where that is what transformers' sdpa path passes for it."""
        if self.start is None and self.end is None and (q_len == 1 or q_start == 0):
            return None
        keys = torch.arange(kv_len, device=device)
        queries = torch.arange(q_start, q_start + q_len, device=device)
        mask = (keys <= queries[:, None])[None, None]
        if self.start is not None:
            mask = mask & (keys >= self.start.to(device)[:, None, None, None])
        if self.end is not None:
            mask = mask & (keys < self.end.to(device)[:, None, None, None])
        return mask


ALL = Intervals()


def from_mask(mask: Tensor | None, batch: int, kv_len: int) -> Intervals | str:
    """The intervals that a 2-D attention mask means, or why it means none.

    Args:
        mask: `[batch, kv_len]`, zero where a key is hidden; None hides nothing.
        batch, kv_len: the shape that fits the call.
    """
    if mask is None:
        return ALL
    wrong = misfit(mask, batch, kv_len)
    if wrong is not None:
        return wrong
    if bool(mask.all()):  # before any conversion: every decoded token asks this of a mask as long as the context
        return ALL
    start, end, facts = ends(mask)
    return judged(start, end, facts.tolist())


def misfit(mask: object, batch: int, kv_len: int) -> str | None:
    """Why this can be no mask of the call; None: it can."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return "attention_mask is not 2-D"
    if mask.shape != (batch, kv_len):
        return "attention_mask has another shape than the keys"
    return None


def ends(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(start, end, facts) of a mask `[batch, kv_len]`, all on its device: nothing here waits for the device.

    start and end are int64 `[batch]`, facts bool `[3]`: whether there are holes between them, whether any start hides a
    key, and whether any end does.
    """
    kv_len = mask.shape[1]
    mask = mask.bool()
    counts = mask.sum(-1)
    flags = mask.to(torch.uint8)  # argmax gives the first of equal values
    start = flags.argmax(-1)
    end = kv_len - flags.flip(-1).argmax(-1)
    # A row that hides every key: an empty interval, and the kernel gives out 0.
    start = torch.where(counts == 0, 0, start)
    end = torch.where(counts == 0, 0, end)
    return start, end, torch.stack([(end - start != counts).any(), (start != 0).any(), (end < kv_len).any()])


def judged(start: Tensor, end: Tensor, facts: list[bool]) -> Intervals | str:
    """What `ends` found, once the facts are known."""
    holes, starts, stops = facts
    if holes:
        return "attention_mask has holes"
    if not (starts or stops):
        return ALL
    return Intervals(start if starts else None, end if stops else None)
