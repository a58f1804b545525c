"""Rotary embedding from positions: transformers' frequencies, our exact phases.

transformers multiplies position and inv_freq in float32, which is off by up to 4.6e-2 near position 2^20. What it takes
for inv_freq and attention scaling is kept, for each of its RoPE types, including those that change with the length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import ops
from .families import classes_of
from .theta import schedule, slow_pairs, theta_for

__all__ = ["Rope", "Still", "frequencies", "schedule", "slow_pairs", "theta_for"]

ATTRIBUTE = "_llama1m_inv_freq"


class Rope:
    """The rotation of one call's tokens, in the place of the (cos, sin) tables that decoder layers hand on.

    Unpacked as `cos, sin = rope`, it makes the tables as transformers does, for layers that don't know us.

    Args:
        module: transformers' module of the model's family, whose function applies tables.
        rotary: the model's rotary module.
        like: hidden states, or a part of them, of which device and dtype matter.
        position_ids: int64 `[batch, len]` or `[1, len]`.
        head_dim: of q and k.
    """

    __slots__ = ("_elsewhere", "_tables", "inv_freq", "like", "module", "positions", "rotary", "scaling")

    def __init__(self, module: Any, rotary: Any, like: Tensor, position_ids: Tensor, head_dim: int) -> None:
        self.module, self.rotary, self.like, self.positions = module, rotary, like, position_ids
        self.inv_freq: Tensor | None = None
        self.scaling = 1.0
        self._tables: tuple[Tensor, Tensor] | None = None
        self._elsewhere: dict[torch.device, Tensor] = {}
        found = frequencies(rotary, position_ids)
        if found is not None and 2 * found[0].numel() == head_dim:
            self.inv_freq, self.scaling = found

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        if self._tables is None:
            self._tables = self.rotary(self.like, position_ids=self.positions)
        return self._tables

    def at(self, index: Tensor) -> Rope:
        """The rotation of some of the call's tokens, int64 `[m]`, with frequencies as they are for all of them."""
        made = copy.copy(self)
        made.positions, made._elsewhere = self.positions.index_select(1, index), {}
        if self.inv_freq is None:
            cos, sin = self.tables
            made._tables = cos.index_select(1, index.to(cos.device)), sin.index_select(1, index.to(sin.device))
        else:
            made._tables = None
        return made

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tables)

    def __getitem__(self, i: int) -> Tensor:
        return self.tables[i]

    def __len__(self) -> int:
        return 2

    def apply(
        self, q: Tensor | None, k: Tensor, k_out: Tensor | None = None, at: int = 0, q_out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Rotates q and k, `[batch, heads, n, head_dim]`, tokens `at` to `at + n` of the call.

        Args:
            q: may be None: only k is wanted.
            k_out: where the rotated k goes, `[batch, kv_heads, n, head_dim]`; None: into new memory.
            q_out: where the rotated q may go, likewise; may be q itself.
        """
        n = k.shape[2]
        if self.inv_freq is None:
            cos, sin = (table.to(k.device) for table in self.tables)
            if n != cos.shape[1]:
                cos, sin = cos[:, at : at + n], sin[:, at : at + n]
            q, k = self.module.apply_rotary_pos_emb(k if q is None else q, k, cos, sin)
            return q, k if k_out is None else k_out.copy_(k)
        positions = self.part(at, n, k.device)
        if q is None:
            rotated, _ = ops.rope_apply(k, None, positions, self.inv_freq, attention_scaling=self.scaling, q_out=k_out)
            return None, rotated
        q, rotated_k = ops.rope_apply(
            q, k, positions, self.inv_freq, attention_scaling=self.scaling, q_out=q_out, k_out=k_out
        )
        assert rotated_k is not None
        return q, rotated_k

    def part(self, at: int, n: int, device: torch.device) -> Tensor:
        """Positions of tokens `at` to `at + n` of the call, on a layer's device."""
        positions = self.positions
        if positions.device != device:  # layers on several GPUs
            found = self._elsewhere.get(device)
            if found is None:
                found = self._elsewhere[device] = positions.to(device, non_blocking=True)
            positions = found
        return positions if n == positions.shape[1] else positions[:, at : at + n]


class Still:
    """What `Rope` is to a layer that rotates nothing (SmolLM3 has some)."""

    inv_freq = None

    def apply(
        self, q: Tensor | None, k: Tensor, k_out: Tensor | None = None, at: int = 0, q_out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """q and k as they are; k copied where it should go."""
        return q, k if k_out is None else k_out.copy_(k)


def frequencies(rotary: Any, position_ids: Tensor) -> tuple[Tensor, float] | None:
    """inv_freq, float64 `[rotary_dim / 2]` on the CPU, and the factor of cos and sin, for these positions.

    None where the module is not transformers' own, or somebody replaced the function that applies it: then the tables
    that they make are used.
    """
    kind = classes_of(rotary)
    if (
        kind is None
        or type(rotary) is not kind.rotary
        or type(rotary).forward is not kind.rotary_forward
        or kind.module.apply_rotary_pos_emb is not kind.apply_rotary
        or ("forward" in rotary.__dict__ and "_hf_hook" not in rotary.__dict__)
        or rotary._forward_hooks
        or rotary._forward_pre_hooks
    ):
        return None
    length = None
    if "dynamic" in rotary.rope_type or rotary.rope_type == "longrope":
        # transformers updates inv_freq in forward, by the largest position: the same update, for one position.
        last = position_ids.max().view(1, 1)
        kind.rotary_forward(rotary, torch.empty(0, device=position_ids.device), last)
        length = int(last) + 1
    buffer = rotary.inv_freq
    if buffer.device.type == "meta":
        return None
    scaling = float(rotary.attention_scaling)
    version = None if buffer.is_inference() else buffer._version
    known = rotary.__dict__.get(ATTRIBUTE)
    if known is not None and known[0] is buffer and known[1] == version and version is not None:
        return known[2], scaling
    inv_freq = _uncast(rotary, buffer, length).double()
    rotary.__dict__[ATTRIBUTE] = (buffer, version, inv_freq)
    return inv_freq, scaling


def _uncast(rotary: Any, buffer: Tensor, length: int | None) -> Tensor:
    """inv_freq as it was before `.to(bfloat16)` or `.half()` rounded it along with the weights.

    A logit is off by 0.23 of its spread at distance 1000 otherwise, and by 0.85 at 2^20. A float32 buffer is believed,
    unless it is what such a cast and one back leave.
    """
    from . import _compat  # transformers, which who asks for a theta need not wait for

    seq_len: int | None = None
    if "dynamic" in rotary.rope_type:
        grown = int(rotary.max_seq_len_cached)
        seq_len = grown if grown > rotary.original_max_seq_len else None
    elif rotary.rope_type == "longrope" and length is not None:
        limit = _compat.original_max_len(rotary)
        seq_len = limit + 1 if length > limit else None
    fresh = _compat.default_rope(rotary, seq_len)[0].to("cpu", torch.float32)
    buffer = buffer.detach().cpu()
    if fresh.shape != buffer.shape:
        return buffer.float()
    if buffer.dtype in (torch.bfloat16, torch.float16):
        return fresh
    buffer = buffer.float()
    for narrow in (torch.bfloat16, torch.float16):
        if not torch.equal(buffer, fresh) and torch.equal(buffer, fresh.to(narrow).float()):
            return fresh
    return buffer
