"""In which form keys and values are kept: the model's own dtype, or codes of 8 or 4 bits with scales.

A compact element is `scale * code + offset`. K has a scale and an offset for each channel of each 64 tokens (keys have
channels far larger than others, which must not set the step of the rest: KIVI, 2402.02750; KVQuant, 2401.18079), V for
each 64 channels of each token. Codes are int8 (-128 to 127), int4 (-8 to 7) or fp8 (e4m3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

GROUP = 64
"""Tokens that share a scale of K; channels that share a scale of V. Rows of codes are a multiple of so many channels."""

Name = Literal["model", "int8", "int4", "fp8"]
NAMES: tuple[Name, ...] = ("model", "int8", "int4", "fp8")
_SHORT: dict[str, Name] = {"16": "model", "8": "int8", "4": "int4", "f8": "fp8"}
_CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
OF_DTYPE: dict[torch.dtype, Name] = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}


class Compact(NamedTuple):
    """Codes of a page's K or V, and what they stand for. width = head_dim rounded up to 64.

    Keys lie channel by channel within each 64 tokens, so that a dot product with 64 of them needs no sum across the lanes
    of a vector; and they come in whole groups.

    Attributes:
        codes: int8, uint8 (int4, two in a byte, each plus 8) or float8_e4m3fn.
            K: `[batch, kv_heads, ceil(tokens / 64), 64 * row]`, row = width bytes, or half of that for int4. A group consists
            of units of 4 bytes of one token, `[width / 4, 64 tokens]` with 4 channels in a unit; int4 `[width / 8, 64]` with
            8 channels, 0 2 4 6 1 3 5 7 from the lowest bit on.
            V: `[batch, kv_heads, tokens, row]`; int4: within each 64 channels byte i has channel i in its low half and
            32 + i in its high half.
        params: float16. K: `[batch, kv_heads, ceil(tokens / 64), 2 * width]`, a group's scales, then its offsets.
            V: `[batch, kv_heads, 2 * width / 64, tokens]`, the scales of each 64 channels, then their offsets.
    """

    codes: Tensor
    params: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain pickle can't load float8 tensors.
        return _unpickled, (self.codes.view(torch.uint8), self.codes.dtype, self.params)


def _unpickled(codes: Tensor, dtype: torch.dtype, params: Tensor) -> Compact:
    return Compact(codes.view(dtype), params)


Side = Tensor | Compact
"""K or V of a page: dense `[batch, kv_heads, tokens, head_dim]`, or compact."""


def rounded(n: int, to: int) -> int:
    """n, up to the next multiple."""
    return -(-n // to) * to


def width(head_dim: int) -> int:
    """Channels of a row of codes."""
    return rounded(head_dim, GROUP)


@dataclass(frozen=True)
class KvFormat:
    """The formats of K and of V: "model" (the model's own dtype), "int8", "int4" or "fp8"."""

    k: Name
    v: Name

    @classmethod
    def parse(cls, spec: str, name: str = "kv") -> KvFormat:
        """From `"int8"` (both), `"int8/int4"` (K/V), or `"k8v4"` (16, 8, 4 and f8 bits). `name`: of the option, in errors.

        Raises:
            TypeError, ValueError: something else; the message lists what there is.
        """
        expected = f'{name}: expected one of {", ".join(NAMES)}, K and V apart as "int8/int4" or "k8v4"'
        if not isinstance(spec, str):
            raise TypeError(f"{expected}, got {spec!r}")
        k, _, v = spec.partition("/")
        if spec.startswith("k") and "v" in spec:
            a, _, b = spec[1:].partition("v")
            k, v = _SHORT.get(a, a), _SHORT.get(b, b)
        elif "/" not in spec:
            v = k
        if k not in NAMES or v not in NAMES:
            raise ValueError(f"{expected}, got {spec!r}")
        return cls(k, v)  # type: ignore[arg-type]  # just looked up

    @property
    def name(self) -> str:
        """What `parse` understands, as short as it gets."""
        return self.k if self.k == self.v else f"{self.k}/{self.v}"

    @property
    def is_model(self) -> bool:
        """Whether nothing is compact."""
        return self.k == self.v == "model"

    def token_bytes(self, kv_heads: int, head_dim: int, element_size: int) -> float:
        """Bytes that one token of one layer takes, scales included. `element_size`: of the model's dtype."""
        token, group = self.block_bytes(kv_heads, head_dim, element_size)
        return token + group / GROUP

    def block_bytes(self, kv_heads: int, head_dim: int, element_size: int) -> tuple[int, int]:
        """Bytes of each token of a page, and beside that of each 64 tokens that it begins, whose compact keys come together."""
        wide, dense = width(head_dim), head_dim * element_size
        row = {"int8": wide, "int4": wide // 2, "fp8": wide}
        params = 2 * 2 * wide // GROUP  # a scale and an offset of float16 for 64 elements
        token = dense if self.v == "model" else row[self.v] + params
        if self.k == "model":
            return kv_heads * (dense + token), 0
        return kv_heads * token, kv_heads * GROUP * (row[self.k] + params)


MODEL = KvFormat("model", "model")


def name_of(side: Side) -> Name:
    """The format of a page's K or V."""
    return OF_DTYPE[side.codes.dtype] if isinstance(side, Compact) else "model"


def tokens_of(side: Side, which: Literal["k", "v"]) -> int:
    """How many tokens a page's K or V has room for; of compact keys, rounded up to whole groups."""
    if not isinstance(side, Compact):
        return side.shape[2]
    return side.codes.shape[2] * (GROUP if which == "k" else 1)


def empty(name: Name, which: Literal["k", "v"], shape: tuple[int, int, int, int], like: Tensor) -> Side:
    """Memory for a page's K or V, not initialised.

    Args:
        shape: `[batch, kv_heads, tokens, head_dim]`.
        like: for the device, and the dtype where nothing is compact.
    """
    batch, kv_heads, tokens, head_dim = shape
    # Not inference tensors, even inside inference_mode: those could not be written outside of it later.
    with torch.inference_mode(False):
        if name == "model":
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        wide = width(head_dim)
        row, groups = wide // 2 if name == "int4" else wide, -(-tokens // GROUP)
        of_codes = (groups, GROUP * row) if which == "k" else (tokens, row)
        of_params = (groups, 2 * wide) if which == "k" else (2 * wide // GROUP, tokens)
        codes = torch.empty((batch, kv_heads, *of_codes), dtype=_CODES[name], device=like.device)
        return Compact(codes, torch.empty((batch, kv_heads, *of_params), dtype=torch.float16, device=like.device))


def narrow(side: Side, which: Literal["k", "v"], start: int, end: int) -> Side:
    """A view of tokens `start` to `end` of a page; `start` a multiple of 64 for compact K."""
    if not isinstance(side, Compact):
        return side[:, :, start:end]
    if which == "v":
        return Compact(side.codes[:, :, start:end], side.params[..., start:end])
    if start % GROUP:
        raise ValueError(f"start: expected a multiple of {GROUP} for compact keys, got {start}")
    groups = slice(start // GROUP, -(-end // GROUP))
    return Compact(side.codes[:, :, groups], side.params[:, :, groups])


def tensors_of(side: Side) -> tuple[Tensor, ...]:
    """The tensors that a page's K or V consists of."""
    return tuple(side) if isinstance(side, Compact) else (side,)


def nbytes_of(side: Side) -> int:
    """Bytes of a page's K or V."""
    return sum(t.numel() * t.element_size() for t in tensors_of(side))


@dataclass
class Page:
    """Keys and values of a run of tokens. Each tensor has the batch as its first axis."""

    k: Side
    v: Side

    @property
    def size(self) -> int:
        """Tokens that it has room for."""
        return tokens_of(self.v, "v")

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.k) + nbytes_of(self.v)

    def narrow(self, start: int, end: int) -> Page:
        """Views of tokens `start` to `end`."""
        return Page(narrow(self.k, "k", start, end), narrow(self.v, "v", start, end))

    def tensors(self) -> dict[str, Tensor]:
        """By name: "k" and "v", or "k.codes", "k.params", "v.codes", "v.params"."""
        found: dict[str, Tensor] = {}
        for name, side in (("k", self.k), ("v", self.v)):
            if isinstance(side, Compact):
                found[f"{name}.codes"], found[f"{name}.params"] = side
            else:
                found[name] = side
        return found
