"""Prefill: causal squares, and chunks of queries against a long history, beside torch's scaled_dot_product_attention.

Torch is asked in its best way: K and V per kv head with `enable_gqa` where that is as fast, else repeated to the q
heads outside the timer. A chunk against a history needs a mask in torch; the call without one is shown too, as the
bound of what torch could do if it were allowed to compute something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

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
    reference_rows,
    reported,
    sample_rows,
    sizes,
)

QUICK_SQUARES, QUICK_CHUNKS, QUICK_ROUNDS = "512", "64x1024", 3
PEERS = ("onnxruntime",)


@dataclass(frozen=True)
class Plan:
    """What to measure. `heads` is (q_heads, kv_heads, head_dim); a shape is (q_len, kv_len), a square if equal."""

    dtypes: list[str]
    shapes: list[tuple[int, int]]
    heads: tuple[int, int, int]
    peers: list[str]
    threads: int | None
    rounds: int
    clock: Clock


def plan(
    dtypes: str = "bf16,f32",
    squares: str = "4096,8192,16384",
    chunks: str = "512x32768,2048x32768",
    heads: str = "4x1x128",
    peers: str = "",
    threads: int | None = None,
    rounds: int = 7,
    quick: bool = False,
    clock: str = "wall",
) -> Plan:
    """The command line's words as a plan.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    if quick:
        squares, chunks, rounds = QUICK_SQUARES, QUICK_CHUNKS, QUICK_ROUNDS
    shapes = [(n, n) for (n,) in sizes(squares, 1, "squares")]
    for q_len, kv_len in sizes(chunks, 2, "chunks"):
        if q_len > kv_len:
            raise ValueError(f"chunks: expected q_len <= kv_len, got {q_len}x{kv_len}")
        shapes.append((q_len, kv_len))
    named = [name.strip() for name in peers.split(",") if name.strip()]
    unknown = [name for name in named if name not in PEERS]
    if unknown:
        raise ValueError(f"peers: expected some of {', '.join(PEERS)}, got {peers!r}")
    return Plan(chosen_dtypes(dtypes), shapes, parse_heads(heads), named, threads, rounds, chosen_clock(clock, threads))


def parse_heads(text: str) -> tuple[int, int, int]:
    """`"4x1x128"` as (q_heads, kv_heads, head_dim), with kv_heads dividing q_heads."""
    found = sizes(text, 3, "heads")
    if len(found) != 1:
        raise ValueError(f"heads: expected one q_heads x kv_heads x head_dim, got {text!r}")
    q_heads, kv_heads, head_dim = found[0]
    if q_heads % kv_heads:
        raise ValueError(f"heads: expected kv_heads to divide q_heads={q_heads}, got {kv_heads}")
    return q_heads, kv_heads, head_dim


def run(plan: Plan) -> dict[str, Any]:
    """Measure, print, and return the report (JSON-able)."""
    with reported("attention", plan.threads, plan.rounds, plan.clock) as report:
        for dtype in plan.dtypes:
            for q_len, kv_len in plan.shapes:
                add(report, case(dtype, q_len, kv_len, plan.heads, report["threads"], plan.peers), plan.clock)
    return report


def case(
    dtype: str, q_len: int, kv_len: int, heads: tuple[int, int, int], threads: int, peers: list[str] | None = None
) -> Case:
    """The last `q_len` of `kv_len` positions as queries, all causal. Random normal data, seed 0."""
    from llama1m_ext import ops

    q_heads, kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, length: int) -> torch.Tensor:
        return torch.empty(1, count, length, head_dim, dtype=DTYPES[dtype]).normal_(generator=generator)

    q, k, v = draw(q_heads, q_len), draw(kv_heads, kv_len), draw(kv_heads, kv_len)
    q_start = kv_len - q_len
    flop_per_pair = 4 * head_dim * q_heads
    causal_flop = flop_per_pair * (q_len * q_start + q_len * (q_len + 1) / 2)
    calls = [Call(OURS, lambda: ops.attention(q, k, v, causal=True), causal_flop)]
    if q_start == 0:
        calls.append(
            Call(
                "torch is_causal, enable_gqa",
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
                causal_flop,
            )
        )
    else:
        wide_k, wide_v = (_to_q_heads(x, q_heads) for x in (k, v))
        mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril_(q_start)
        calls.append(
            Call(
                "torch bool mask, K/V repeated untimed",
                lambda: F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask),
                causal_flop,
            )
        )
        calls.append(
            Call(
                "torch no mask (not causal: an upper bound)",
                lambda: F.scaled_dot_product_attention(q, wide_k, wide_v),
                flop_per_pair * q_len * kv_len,
                yardstick=False,
            )
        )
    if "onnxruntime" in (peers or []) and dtype == "f32" and q_start == 0:
        from llama1m_ext.bench import peers as outside

        calls.append(outside.onnxruntime_call(q, k, v, threads, causal_flop))
    rows = sample_rows(q_len)
    name = f"square {q_len}" if q_start == 0 else f"chunk {q_len} x {kv_len}"
    return Case(
        name=f"{name}, {q_heads} q heads, {kv_heads} kv heads, head_dim {head_dim}",
        dtype=dtype,
        unit="GFLOP/s",
        shape={"q_len": q_len, "kv_len": kv_len, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim},
        calls=calls,
        limit=Limit("measured peak", lambda clock: peak_flops(dtype, threads, clock)),
        reference=reference_rows(q, k, v, rows, q_start=q_start),
        rows=rows,
    )


def peak_flops(dtype: str, threads: int, clock: Clock, duration: float = 0.2) -> float:
    """FLOP/s of the active ISA level's multiply-add for `dtype`, from registers."""
    from llama1m_ext import _core

    wall, own = Clock("wall").now(), clock.now()
    rate = _core.peak_flops(str(DTYPES[dtype]).removeprefix("torch."), threads, duration)
    wall, own = Clock("wall").now() - wall, clock.now() - own
    # The core divides by wall time; on the CPU clock, time that others took from us does not count.
    return rate * wall / own if clock.name == "cpu" else rate


def _to_q_heads(x: torch.Tensor, q_heads: int) -> torch.Tensor:
    batch, kv_heads, length, head_dim = x.shape
    wide = x[:, :, None].expand(batch, kv_heads, q_heads // kv_heads, length, head_dim)
    return wide.reshape(batch, q_heads, length, head_dim)
