"""Training over rows that are spread over ranks: what `train.loss` takes, and each rank's share of a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..train.cross_entropy import total_weight
from ..train.forward import shift
from .attention import attend, give_back
from .call import Call, agreed
from .layout import Layout

__all__ = ["RingAttention", "Share", "share"]


class RingAttention:
    """A `train.attention.Attention` over rows that the ranks of a layout hold shards of; all of them take the same steps.

    Args:
        layout: who holds what.
        length: tokens of a whole row.
        borders: of each row, where its packed documents begin, and where the last one ends (from 0 to length); None: a
            row is one document.

    Raises:
        ValueError: borders that don't rise from 0 to length.
    """

    def __init__(self, layout: Layout, length: int, borders: Sequence[Sequence[int]] | None = None) -> None:
        for row in borders or ():
            if len(row) < 2 or row[0] != 0 or row[-1] != length or any(b <= a for a, b in zip(row, row[1:])):  # noqa: B905
                raise ValueError(f"borders: expected positions that rise from 0 to {length}, got {list(row)!r:.80}")
        self.layout, self.length = layout, length
        self._documents = None if borders is None else [list(row[:-1]) for row in borders]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """(out, lse) of this rank's queries; see `train.attention.Attention`."""
        parts = []
        for rows, documents in self._runs(len(q)):
            call = self._call(q[rows], k[rows], v[rows], scale, documents)
            parts.append(attend(call, q[rows], k[rows], v[rows])[1])
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out.transpose(1, 2) for out, _ in parts]).transpose(1, 2), torch.cat(
            [lse for _, lse in parts]
        )

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of this rank's shard."""
        assert lse is not None
        parts = []
        for rows, documents in self._runs(len(q)):
            call = self._call(q[rows], k[rows], v[rows], scale, documents)
            ring_length = call.plan.lengths[self.layout.ring_rank]
            heads = self.layout.head_group(ring_length)
            whole = heads.gather([t[rows] for t in (q, k, v, out, lse, grad)], "ring attention, backward")
            parts.append(give_back(call, whole[5], None, whole[:5], gathered=True))
        if len(parts) == 1:
            return parts[0]
        dq, dk, dv = (torch.cat([p.transpose(1, 2) for p in each]).transpose(1, 2) for each in zip(*parts, strict=True))
        return dq, dk, dv

    def _call(self, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: list[int] | None) -> Call:
        return agreed(q, k, v, self.layout, self.length, True, scale, documents, None, None)

    def _runs(self, batch: int) -> Iterator[tuple[slice, list[int] | None]]:
        """Rows whose documents begin at the same places, one after the other."""
        if self._documents is None:
            yield slice(0, batch), None
            return
        if len(self._documents) != batch:
            raise ValueError(f"borders: expected those of {batch} rows, got {len(self._documents)}")
        first = 0
        for i in range(1, batch + 1):
            if i == batch or self._documents[i] != self._documents[first]:
                yield slice(first, i), self._documents[first]
                first = i


class Share(NamedTuple):
    """A rank's share of rows, `[batch, n]` each, and what `train.loss` takes beside it.

    Attributes:
        input_ids, labels, loss_weights, position_ids: of this rank's positions; labels stand beside the positions that they
            judge (`shifted=True`).
        denominator: labels of the whole rows, or the sum of their weights: what a mean over all ranks divides by.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor | None
    position_ids: Tensor
    denominator: Tensor


def share(
    layout: Layout,
    input_ids: Tensor,
    labels: Tensor | None = None,
    loss_weights: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Share:
    """This rank's share of rows that every rank has whole.

    The losses that ranks get from their shares add up to the loss of the rows, and so do gradients: sum both over the
    layout's ranks.

    ```python
    mine = share(layout, input_ids, labels)
    loss = train.loss(
        model, mine.input_ids, mine.labels, mine.loss_weights, position_ids=mine.position_ids, shifted=True,
        denominator=mine.denominator, attention=RingAttention(layout, input_ids.shape[1]),
    )
    ```

    Args:
        input_ids: int64 `[batch, length]`.
        labels: likewise, -100 where a position does not count; None: input_ids.
        loss_weights: `[batch, length]`, beside labels.
        position_ids: `[batch, length]`; None: from 0 on.
    """
    labels, loss_weights = shift(input_ids if labels is None else labels, loss_weights)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    weights = None if loss_weights is None else layout.shard(loss_weights)
    mine = (layout.shard(t) for t in (input_ids, labels, position_ids))
    ids, own_labels, places = mine
    return Share(ids, own_labels, weights, places, torch.as_tensor(total_weight(labels, loss_weights)))
