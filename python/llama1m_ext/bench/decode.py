"""Decode: one query per head against a long history. Every byte of K and V is read once, so bandwidth is the limit.

Torch is asked in three ways: `enable_gqa`, which is what transformers calls; the heads of a group folded into rows by
hand; and bmm, softmax, bmm. The fastest of them is the yardstick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llama1m_ext.bench.attention import parse_heads
from llama1m_ext.bench.harness import (
    DTYPES,
    OURS,
    RAW_SPREAD_VOID,
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
    seconds,
    sizes,
)

QUICK_KV_LEN, QUICK_ROUNDS = "4096", 3
ENABLE_GQA = "torch enable_gqa (what transformers calls)"


@dataclass(frozen=True)
class Plan:
    """What to measure. `heads` is (q_heads, kv_heads, head_dim); `page_size` 0 leaves the paged candidate out."""

    dtypes: list[str]
    kv_lens: list[int]
    heads: tuple[int, int, int]
    batch: int
    page_size: int
    threads: int | None
    rounds: int
    clock: Clock


def plan(
    dtypes: str = "bf16",
    kv_len: str = "131072",
    heads: str = "32x8x128",
    batch: int = 1,
    page_size: int = 0,
    threads: int | None = None,
    rounds: int = 9,
    quick: bool = False,
    clock: str = "wall",
) -> Plan:
    """The command line's words as a plan.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    if quick:
        kv_len, rounds = QUICK_KV_LEN, QUICK_ROUNDS
    lengths = [n for (n,) in sizes(kv_len, 1, "kv_len")]
    names, sized, timed = chosen_dtypes(dtypes), parse_heads(heads), chosen_clock(clock, threads)
    return Plan(names, lengths, sized, batch, page_size, threads, rounds, timed)


def run(plan: Plan) -> dict[str, Any]:
    """Measure, print, and return the report (JSON-able)."""
    with reported("decode", plan.threads, plan.rounds, plan.clock) as report:
        for dtype in plan.dtypes:
            for kv_len in plan.kv_lens:
                one = case(dtype, kv_len, plan.heads, report["threads"], batch=plan.batch, page_size=plan.page_size)
                add(report, one, plan.clock)
    return report


def case(
    dtype: str, kv_len: int, heads: tuple[int, int, int], threads: int, *, batch: int = 1, page_size: int = 0
) -> Case:
    """One query at the end of `kv_len` positions. Random normal data, all of it distinct, seed 0."""
    from llama1m_ext import _core, ops

    q_heads, kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    q = torch.empty(batch, q_heads, 1, head_dim, dtype=DTYPES[dtype]).normal_(generator=generator)
    # K and V in one allocation, so that one raw read covers exactly the bytes that a candidate must read.
    kv = torch.empty(2, batch, kv_heads, kv_len, head_dim, dtype=DTYPES[dtype]).normal_(generator=generator)
    k, v = kv[0], kv[1]
    kv_bytes = float(kv.numel() * kv.element_size())
    calls = [Call(OURS, lambda: ops.attention(q, k, v), kv_bytes)]
    if page_size:
        k_pages, v_pages = _pages(k, page_size), _pages(v, page_size)
        paged = lambda: ops.attention(q, k_pages, v_pages, kv_len=kv_len)  # noqa: E731
        calls.append(Call(f"{OURS}, pages of {page_size}", paged, kv_bytes, yardstick=False))
    calls += torch_calls(q, k, v, kv_bytes)

    def raw_read(clock: Clock) -> float:
        return kv_bytes / seconds(lambda: _core.read_seconds(kv, threads), clock)

    rows = sample_rows(1)
    return Case(
        name=f"decode {kv_len} keys, batch {batch}, {q_heads} q heads, {kv_heads} kv heads, head_dim {head_dim}",
        dtype=dtype,
        unit="GB/s",
        shape={
            "q_len": 1,
            "kv_len": kv_len,
            "batch": batch,
            "q_heads": q_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        },
        calls=calls,
        limit=Limit("raw read", raw_read, void_spread=RAW_SPREAD_VOID),
        reference=reference_rows(q, k, v, rows, q_start=kv_len - 1),
        rows=rows,
    )


def torch_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, work: float) -> list[Call]:
    """The three ways to ask torch for a decode step, each with `work` bytes to read."""
    batch, q_heads, _, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    folded_q = q.reshape(batch, kv_heads, group, head_dim)
    flat_q = q.reshape(batch * kv_heads, group, head_dim)
    flat_k = k.reshape(batch * kv_heads, kv_len, head_dim)
    flat_v = v.reshape(batch * kv_heads, kv_len, head_dim)
    scale = 1 / math.sqrt(head_dim)

    def by_bmm() -> torch.Tensor:
        scores = torch.bmm(flat_q, flat_k.transpose(1, 2)) * scale
        return torch.bmm(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), flat_v)

    def unfold(out: torch.Tensor) -> torch.Tensor:
        return out.reshape(batch, q_heads, 1, head_dim)

    return [
        Call(ENABLE_GQA, lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), work),
        Call(
            "torch, heads folded into rows by hand",
            lambda: F.scaled_dot_product_attention(folded_q, k, v),
            work,
            output=unfold,
        ),
        Call("torch bmm + softmax + bmm", by_bmm, work, output=unfold),
    ]


def _pages(x: torch.Tensor, page_size: int) -> list[torch.Tensor]:
    """`x` cut into pages of their own memory, as a cache holds them; what the last one does not use is NaN."""
    pages = []
    for piece in x.split(page_size, dim=2):
        page = torch.full((*x.shape[:2], page_size, x.shape[3]), math.nan, dtype=x.dtype)
        page[:, :, : piece.shape[2]] = piece
        pages.append(page)
    return pages
