"""Perplexity by position: how well a model predicts the token at each distance from the beginning of its context.

The decoder reads each row as a whole (a long one layer by layer, in chunks: `llama1m_ext.prefill`); the output layer then
goes over the hidden states some positions at a time. The logits of all positions, which a million tokens and a vocabulary of
128,256 would make 480 GiB of, are never there together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .reader import Show, bar, call, evaluating, new_cache, served, warn_beyond

LOGITS_BYTES = 128 << 20
"""Of the float32 logits that are there at one time."""
CHUNK = 512
"""Queries at a time of models that this package does not serve."""
FIRST_EDGE = 64


@dataclass(frozen=True)
class Bucket:
    """Predictions of tokens that have `start` to `end - 1` tokens before them.

    Attributes:
        nll: mean negative log likelihood, nats a token.
        tokens: how many predictions.
    """

    start: int
    end: int
    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return _exp(self.nll)


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` found.

    Attributes:
        nll: mean negative log likelihood over all predictions, nats a token.
        perplexity: exp(nll).
        tokens: predictions: one less than tokens, of each row.
        buckets: the same by position, in order.
        per_token: float64 `[rows, n - 1]` on the CPU: nats of the token at position 1, 2, ...
    """

    nll: float
    perplexity: float
    tokens: int
    buckets: list[Bucket]
    per_token: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite is None."""
        return {
            "nll": _finite(self.nll),
            "perplexity": _finite(self.perplexity),
            "tokens": self.tokens,
            "buckets": [
                {
                    "start": bucket.start,
                    "end": bucket.end,
                    "nll": _finite(bucket.nll),
                    "perplexity": _finite(bucket.perplexity),
                    "tokens": bucket.tokens,
                }
                for bucket in self.buckets
            ],
        }

    def table(self) -> str:
        """As text, a line for each bucket."""
        lines = [f"{'tokens before':>21}  {'predictions':>11}  {'nats/token':>10}  {'perplexity':>12}"]
        for bucket in self.buckets:
            where = f"{bucket.start:,} to {bucket.end - 1:,}"
            lines.append(f"{where:>21}  {bucket.tokens:>11,}  {bucket.nll:>10.4f}  {bucket.perplexity:>12,.4f}")
        lines.append(f"{'all':>21}  {self.tokens:>11,}  {self.nll:>10.4f}  {self.perplexity:>12,.4f}")
        return "\n".join(lines)

    def plot(self, path: str | Path, label: str = "perplexity") -> None:
        """Draws perplexity over position; see `draw`."""
        draw({label: self}, path)


def draw(curves: Mapping[str, Perplexity], path: str | Path) -> None:
    """Draws one or more of them into one picture (the suffix decides the format), each with its name.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra that brings it.
    """
    from . import plot

    plot.curves(
        {
            name: [(math.sqrt(b.start * max(b.start, b.end - 1)), b.perplexity) for b in found.buckets if b.tokens]
            for name, found in curves.items()
        },
        path,
        x="tokens before the predicted one",
        y="perplexity",
    )


def edges_for(length: int, buckets: int | Sequence[int] | None = None) -> list[int]:
    """The bounds of the buckets for rows of `length` tokens: bucket i has positions `edges[i]` to `edges[i + 1] - 1`.

    Args:
        length: at least 2.
        buckets: None: powers of two from 64 on, where a last bucket that would be less than a quarter as long as the one
            before is joined to it; a number: about so many, evenly spaced in the logarithm; or the bounds themselves,
            growing, from 1 to at most `length`.

    Raises:
        ValueError: bounds that don't grow, or reach beyond the row.
    """
    if buckets is None:
        inner, edge = [], FIRST_EDGE
        while edge < length:
            inner.append(edge)
            edge *= 2
        edges = [1, *inner, length]
        while len(edges) > 2 and 4 * (edges[-1] - edges[-2]) < edges[-2] - edges[-3]:
            del edges[-2]
        return edges
    if isinstance(buckets, int):
        if isinstance(buckets, bool) or buckets < 1:
            raise ValueError(f"buckets: expected at least 1, got {buckets!r}")
        return sorted({round(math.exp(math.log(length) * i / buckets)) for i in range(buckets + 1)})
    edges = [int(edge) for edge in buckets]
    if len(edges) < 2 or edges[0] < 1 or edges[-1] > length or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"buckets: expected bounds that grow from 1 to at most {length}, got {list(buckets)}")
    return edges


def perplexity(
    model: Any,
    input_ids: Tensor | Sequence[int],
    *,
    buckets: int | Sequence[int] | None = None,
    progress: Show = "auto",
) -> Perplexity:
    """Negative log likelihood of a text under a model, by position. Exact: every token is predicted from all before it.

    Args:
        model: a causal language model of transformers. Those that this package serves read a long row layer by layer; others
            read it in chunks over a cache.
        input_ids: int64 `[n]` or `[rows, n]`, n at least 2, without padding. Rows are read one after the other.
        buckets: see `edges_for`.
        progress: a bar; "auto": for rows from 16384 tokens on.

    Returns:
        A `Perplexity`. Log softmax and sums are made in float32 and float64.

    Raises:
        ValueError: a shape that makes no sense, ids outside the vocabulary, or bounds that don't fit.
        DoesNotFit: the memory does not hold it; before the start.
    """
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids) or ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise ValueError(
            f"input_ids: expected ints [n] or [rows, n] with n of at least 2, got {ids.dtype} {tuple(ids.shape)}"
        )
    ids = ids.long().cpu()
    rows, n = ids.shape
    edges = edges_for(n, buckets)
    vocab = model.get_input_embeddings().num_embeddings
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab:
        raise ValueError(f"input_ids: expected ids from 0 to {vocab - 1}, got {least if least < 0 else most}")
    warn_beyond(model, n)
    found = torch.empty((rows, n - 1), dtype=torch.float64)
    measure = _served_row if served(model) is not None else _other_row
    with evaluating(model, progress):
        for row, out in zip(ids, found, strict=True):
            measure(model, row, out, progress)
    sums = found.sum(0)
    nll = float(sums.sum()) / found.numel()
    parts = [
        Bucket(a, b, float(sums[a - 1 : b - 1].sum()) / ((b - a) * rows), (b - a) * rows) for a, b in pairwise(edges)
    ]
    return Perplexity(nll, _exp(nll), found.numel(), parts, found)


def _served_row(model: Any, ids: Tensor, out: Tensor, progress: Show) -> None:
    """Nats of each token but the first: int64 `[n]` to float64 `[n - 1]`."""
    both = served(model)
    assert both is not None
    inner, head = both
    hidden = inner(ids[None].to(inner.device), use_cache=False).last_hidden_state[0]
    n, step = len(out), max(16, LOGITS_BYTES // (4 * inner.config.vocab_size))
    with bar("output layer", "tokens", progress, n, n) as shown:
        for a in range(0, n, step):
            b = min(a + step, n)
            out[a:b] = _nats(head(hidden[None, a:b])[0], ids[a + 1 : b + 1])
            shown.update(b - a)


def _other_row(model: Any, ids: Tensor, out: Tensor, progress: Show) -> None:
    """The same through the model's own forward, a chunk at a time over a cache: whatever it does to its logits is in."""
    cache, ids, n = new_cache(model), ids.to(model.device), len(out)
    with bar("perplexity", "tokens", progress, n, n) as shown:
        for a in range(0, n, CHUNK):
            b = min(a + CHUNK, n)
            logits = call(model, ids[None, a:b], cache)[0]
            if a == 0 and b < n and cache.get_seq_length() != b:
                raise ValueError(
                    f"model: expected one that keeps keys and values in a DynamicCache, got {type(model).__name__}"
                )
            out[a:b] = _nats(logits, ids[a + 1 : b + 1])
            shown.update(b - a)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Float64 `[n]` on the CPU, of logits `[n, vocab]` and targets `[n]`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, targets.to(logits.device), reduction="none").double().cpu()


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else nll if math.isnan(nll) else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
