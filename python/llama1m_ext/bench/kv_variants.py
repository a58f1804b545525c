"""Ways to round keys and values, plainly in torch: what the shipped formats were chosen among.

A variant maps dense keys and values to what would come back from a cache in that form. `bits` is what one element takes,
scales included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama1m_ext.formats import GROUP

Round = Callable[[Tensor], Tensor]
"""`[..., tokens, head_dim]` float32 to what it is rounded to."""


@dataclass(frozen=True)
class Variant:
    """How keys and how values are rounded; bits of one element of each."""

    name: str
    k: Round
    v: Round
    k_bits: float
    v_bits: float

    def token_bytes(self, kv_heads: int, head_dim: int) -> float:
        """Bytes of one token of one layer."""
        return kv_heads * head_dim * (self.k_bits + self.v_bits) / 8


def along(axis: int, bits: int, group: int) -> Round:
    """Scale and offset in float16 for each `group` neighbours along an axis: -2 tokens, -1 channels."""
    return _coded(axis, group, 0, 2**bits - 1, torch.round)


def e4m3(axis: int, group: int) -> Round:
    """fp8 with a scale and an offset, as `formats` has it."""
    return _coded(axis, group, -448, 448, lambda code: code.to(torch.float8_e4m3fn).float())


def _coded(axis: int, group: int, low: int, high: int, nearest: Callable[[Tensor], Tensor]) -> Round:
    """Codes from `low` to `high`, each the nearest that there is."""

    def rounded(x: Tensor) -> Tensor:
        parts = []
        for part in x.split(group, dim=axis):
            least, most = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
            scale = ((most - least) / (high - low)).half().float()
            offset = (least - low * scale).half().float()
            code = nearest(torch.where(scale > 0, (part - offset) / scale, 0).clamp(low, high))
            parts.append(code * scale + offset)
        return torch.cat(parts, dim=axis)

    return rounded


def hadamard(head_dim: int) -> Tensor:
    """The orthogonal Hadamard matrix of a power of two."""
    h = torch.ones(1, 1)
    while h.shape[0] < head_dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(head_dim)


def turned(inner: Round) -> Round:
    """Rounded after an orthogonal rotation, which q (or the output) would undo at no loss (QuaRot, 2404.00456)."""

    def rounded(x: Tensor) -> Tensor:
        h = hadamard(x.shape[-1])
        return inner(x @ h) @ h.T

    return rounded


def centred(inner: Round) -> Round:
    """Rounded after the mean key was taken off: it adds the same to every score of a query, which a softmax drops."""
    return lambda x: inner(x - x.mean(-2, keepdim=True)) + x.mean(-2, keepdim=True)


def per_element(bits: int, group: int) -> float:
    """Bits of an element where `group` of them share a scale and an offset of float16."""
    return bits + 32 / group


def variants() -> list[Variant]:
    """bf16 first, then what is shipped, then what was tried at 4 bits."""
    b8, b4, b4fine = per_element(8, GROUP), per_element(4, GROUP), per_element(4, GROUP // 2)
    by_token8, by_token4, fine = along(-1, 8, GROUP), along(-1, 4, GROUP), along(-1, 4, GROUP // 2)
    by_channel8, by_channel4 = along(-2, 8, GROUP), along(-2, 4, GROUP)
    exact: Round = lambda x: x  # noqa: E731
    return [
        Variant("bf16", exact, exact, 16, 16),
        Variant("int8 (shipped)", by_channel8, by_token8, b8, b8),
        Variant("fp8 (shipped)", e4m3(-2, GROUP), e4m3(-1, GROUP), b8, b8),
        Variant("int8/int4 (shipped)", by_channel8, by_token4, b8, b4),
        Variant("int4 (shipped): K per channel, V per token", by_channel4, by_token4, b4, b4),
        Variant("int4: K and V per token", by_token4, by_token4, b4, b4),
        Variant("int4: K and V per token, groups of 32", fine, fine, b4fine, b4fine),
        Variant("int4: K and V turned (Hadamard), per token", turned(by_token4), turned(by_token4), b4, b4),
        Variant("int4: K less its mean, per token", centred(by_token4), by_token4, b4, b4),
        Variant("int4: K per channel, V turned", by_channel4, turned(by_token4), b4, b4),
        Variant("int4: K per channel turned, V per token", turned(by_channel4), by_token4, b4, b4),
        Variant("int4: K and V per channel", by_channel4, by_channel4, b4, b4),
    ]


def errors(variant: Variant, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float]:
    """(root mean square error of the scores, relative error of the output), against float64.

    Args:
        q: `[kv_heads, group, head_dim]`, at the end of all keys.
        k, v: `[kv_heads, tokens, head_dim]`.
    """
    q, exact_k, exact_v = q.double(), k.double(), v.double()
    rounded_k, rounded_v = variant.k(k.float()).double(), variant.v(v.float()).double()
    scale = 1 / math.sqrt(q.shape[-1])
    truth, got = q @ exact_k.transpose(1, 2) * scale, q @ rounded_k.transpose(1, 2) * scale
    # What a query's scores have in common a softmax drops.
    off = got - truth
    off = off - off.mean(-1, keepdim=True)
    out, want = got.softmax(-1) @ rounded_v, truth.softmax(-1) @ exact_v
    return float(off.pow(2).mean().sqrt()), float((out - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())
