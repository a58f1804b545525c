"""Backward: gradients of causal squares, beside those of torch's scaled_dot_product_attention.

Both sides are asked through autograd, for the backward pass alone: `torch.autograd.grad` on a graph that is kept. Torch is
asked in both of its ways: with `enable_gqa`, and with K and V repeated to the q heads outside of what is timed (its
gradients are then those of the repeated ones, and nobody adds them up).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama1m_ext.bench.attention import parse_heads, peak_flops
from llama1m_ext.bench.harness import (
    DTYPES,
    OURS,
    Call,
    Case,
    Clock,
    Limit,
    add,
    chosen_clock,
    chosen_dtypes,
    reported,
    sizes,
)

QUICK_SQUARES, QUICK_ROUNDS = "512", 3
FLOP = 10
"""Of head_dim, for each query head, query and key that it sees: q k^T and g v^T again, then dq, dk and dv."""
ROWS = 256
"""Queries at a time in float64."""


@dataclass(frozen=True)
class Plan:
    """What to measure; `heads` is (q_heads, kv_heads, head_dim)."""

    dtypes: list[str]
    lengths: list[int]
    heads: tuple[int, int, int]
    threads: int | None
    rounds: int
    clock: Clock


def plan(
    dtypes: str = "bf16,f32",
    squares: str = "2048,4096,8192,16384",
    heads: str = "4x1x128",
    threads: int | None = None,
    rounds: int = 5,
    quick: bool = False,
    clock: str = "wall",
) -> Plan:
    """The command line's words as a plan.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    if quick:
        squares, rounds = QUICK_SQUARES, QUICK_ROUNDS
    lengths = [n for (n,) in sizes(squares, 1, "squares")]
    return Plan(chosen_dtypes(dtypes), lengths, parse_heads(heads), threads, rounds, chosen_clock(clock, threads))


def run(plan: Plan) -> dict[str, Any]:
    """Measure, print, and return the report (JSON-able)."""
    with reported("backward", plan.threads, plan.rounds, plan.clock) as report:
        for dtype in plan.dtypes:
            for length in plan.lengths:
                add(report, case(dtype, length, plan.heads, report["threads"]), plan.clock)
    return report


def case(dtype: str, length: int, heads: tuple[int, int, int], threads: int) -> Case:
    """Random normal data, seed 0. Errors are the largest of dq, dk and dv, from float64."""
    from llama1m_ext import ops

    q_heads, kv_heads, head_dim = heads
    group = q_heads // kv_heads
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.empty(1, count, length, head_dim, dtype=DTYPES[dtype]).normal_(generator=generator)

    q, k, v = (draw(count).requires_grad_() for count in (q_heads, kv_heads, kv_heads))
    grad = draw(q_heads)
    flop = FLOP * head_dim * q_heads * length * (length + 1) / 2

    def backward(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def stacked(grads: tuple[Tensor, ...]) -> Tensor:
        dq, *rest = grads
        rest = [x.float().unflatten(1, (kv_heads, -1)).sum(2) for x in rest]
        return torch.cat([dq.float(), *rest], 1)

    wide_k, wide_v = (x.detach().repeat_interleave(group, 1).requires_grad_() for x in (k, v))
    out = ops.attention(q, k, v)
    assert isinstance(out, Tensor)
    calls = [Call(OURS, partial(backward, out, (q, k, v)), flop, output=stacked)]
    with_gqa = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    calls.append(Call("torch is_causal, enable_gqa", partial(backward, with_gqa, (q, k, v)), flop, output=stacked))
    if group > 1:
        repeated = F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True)
        call = partial(backward, repeated, (q, wide_k, wide_v))
        calls.append(Call("torch is_causal, K/V repeated untimed", call, flop, output=stacked))
    return Case(
        name=f"backward of square {length}, {q_heads} q heads, {kv_heads} kv heads, head_dim {head_dim}",
        dtype=dtype,
        unit="GFLOP/s",
        shape={"q_len": length, "kv_len": length, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim},
        calls=calls,
        limit=Limit("measured peak", lambda clock: peak_flops(dtype, threads, clock)),
        reference=reference(q.detach(), k.detach(), v.detach(), grad),
        rows=torch.arange(length),
    )


def reference(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    """dq, dk and dv of causal attention in float64, one after the other by heads, some queries at a time:
    `[1, q_heads + 2 kv_heads, length, head_dim]`."""
    _, q_heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    group, scale = q_heads // kv_heads, 1 / math.sqrt(head_dim)
    dq = torch.empty(q_heads, length, head_dim, dtype=torch.float64)
    dk, dv = torch.zeros(2, kv_heads, length, head_dim, dtype=torch.float64)
    for head in range(q_heads):
        keys, values = k[0, head // group].double(), v[0, head // group].double()
        for first in range(0, length, ROWS):
            last = min(first + ROWS, length)
            rows, g = q[0, head, first:last].double(), grad[0, head, first:last].double()
            seen = slice(0, last)
            scores = (rows @ keys[seen].T).mul_(scale)
            scores.masked_fill_(torch.arange(last) > torch.arange(first, last)[:, None], -math.inf)
            weights = scores.softmax(-1)
            dv[head // group, seen] += weights.T @ g
            slopes = g @ values[seen].T
            slopes = (slopes - (slopes * weights).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
            dq[head, first:last] = slopes @ keys[seen]
            dk[head // group, seen] += slopes.T @ rows
    return torch.cat([dq, dk, dv])[None]
