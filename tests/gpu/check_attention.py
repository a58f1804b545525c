"""Every attention kernel on the same cases, against float64 on the card."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import truth
from .machine import Machine
from .section import Report

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
PATHS = ("any", "sm80", "sm90", "decode")


@dataclass(frozen=True)
class Problem:
    """One call."""

    q_len: int
    kv_len: int
    dtype: str = "bf16"
    head_dim: int = 128
    group: int = 4
    kv_heads: int = 2
    batch: int = 1
    causal: bool = True
    q_start: int | None = None
    kv_start: tuple[int, ...] | None = None
    kv_end: tuple[int, ...] | None = None
    cut: tuple[int, ...] = ()  # where pages end
    strided: bool = False  # [batch, len, heads, head_dim] in memory, inside something larger
    spare: int = 0  # tokens of the last page beyond kv_len: NaN
    poison: bool = False  # NaN in keys and values that kv_start and kv_end hide
    out_f32: bool = False

    def __str__(self) -> str:
        changed = [
            f"{name}={getattr(self, name)}"
            for name, field in self.__dataclass_fields__.items()
            if name not in ("q_len", "kv_len") and getattr(self, name) != field.default
        ]
        return f"{self.q_len}x{self.kv_len} " + " ".join(changed)


def problems(machine: Machine, path: str) -> Iterator[Problem]:
    """The cases of one kernel: every edge of its tiles, and every kind of mask, page and layout."""
    dtypes = ("bf16", "f16") if path != "any" else ("bf16", "f16", "f32")
    base = Problem(q_len=machine.size(333, 70), kv_len=machine.size(777, 150))
    if path == "decode":
        base = replace(base, q_len=1, kv_len=machine.size(3000, 200))
    for dtype in dtypes:
        for head_dim in (64, 128):
            yield replace(base, dtype=dtype, head_dim=head_dim)
    base_lengths = (1, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1025, 4097)
    for kv_len in base_lengths[: machine.size(99, 6)]:
        q_len = min(kv_len, 3) if path == "decode" else kv_len
        yield replace(base, q_len=q_len, kv_len=kv_len)
    for q_len in (1, 2, 4) if path == "decode" else (1, 63, 64, 65, 128, 129, 191, 193)[: machine.size(99, 4)]:
        yield replace(base, q_len=q_len, kv_len=machine.size(1500, 160), head_dim=64)
    for group in (1, 2, 3, 8, 16) if path == "decode" else (1, 5, 8):
        yield replace(base, group=group)
    two = replace(base, batch=2, kv_heads=2)
    yield replace(two, causal=False)
    yield replace(two, q_start=machine.size(500, 90))
    yield replace(two, q_start=-5)  # the first rows see nothing
    yield replace(two, kv_start=(0, 37), poison=True)
    yield replace(two, kv_start=(64, 130), kv_end=(base.kv_len, 140), poison=True)
    yield replace(two, kv_start=(10, 50), kv_end=(5, 50), causal=False)  # rows that see nothing at all
    yield replace(two, strided=True)
    yield replace(two, spare=77)
    yield replace(two, out_f32=True)
    for cut in ((64,), (1,), (100, 101, 128), tuple(range(10, 10 + 13 * 7, 7))):  # the last: more than one launch takes
        yield replace(base, cut=cut, spare=33)
        yield replace(two, cut=cut, kv_start=(3, 66), poison=True, strided=True, dtype="f16", head_dim=64)
    if path == "any":
        for head_dim in (8, 40, 80, 96, 192, 256):
            yield replace(base, head_dim=head_dim, dtype="f32" if head_dim % 16 else "bf16")


def run(machine: Machine, report: Report) -> None:
    """All kernels. A path that this card does not have is left out by name, never silently."""
    for path in PATHS:
        if path == "sm90" and machine.capability != (9, 0):
            report.note(f"sm90: not run, {machine.name} is of compute capability {machine.capability}")
            continue
        worst, over, count = 0.0, 0.0, 0
        for number, problem in enumerate(problems(machine, path)):
            error, allowed = one(machine, report, path, problem, seed=number)
            worst, over, count = max(worst, error), max(over, error / allowed), count + 1
        report.table("attention against float64", path=path, cases=count, worst=worst, **{"worst / allowed": over})


def one(machine: Machine, report: Report, path: str, problem: Problem, seed: int) -> tuple[float, float]:
    """Runs a case and judges it; (error, allowed error)."""
    from llama1m_ext import cuda

    dtype, device = DTYPES[problem.dtype], machine.device
    q, k, v, pages_k, pages_v = tensors(machine, problem, seed)
    rows = {
        name: None if bound is None else torch.tensor(bound, dtype=torch.int64, device=device)
        for name, bound in (("kv_start", problem.kv_start), ("kv_end", problem.kv_end))
    }
    q_start = problem.kv_len - problem.q_len if problem.q_start is None else problem.q_start
    out = torch.full_like(q, math.nan, dtype=torch.float32 if problem.out_f32 else dtype)
    lse = torch.full(q.shape[:3], math.nan, dtype=torch.float32, device=device)
    with machine.serving():
        cuda.attention(
            q, pages_k, pages_v, out, lse, causal=problem.causal, softmax_scale=None, q_start=q_start,
            kv_len=problem.kv_len, path=path, **rows,
        )  # fmt: skip
    machine.wait()
    mask = truth.visible(
        problem.q_len, problem.kv_len, problem.batch, device, causal=problem.causal, q_start=q_start, **rows
    )
    want, want_lse = truth.attention(q, k, v, mask)
    yardstick = truth.eager(q, k, v, mask)
    allowed = truth.allowance(dtype, want, yardstick)
    error, _ = truth.errors(out, want)
    seen = ~torch.isneginf(want_lse)
    lse_error = truth.errors(lse[seen], want_lse[seen])[0] if seen.any() else 0.0
    blind = ~seen
    name = f"{path} {problem}"
    report.check(name, error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}")
    lse_allowed = 2e-5 * max(1.0, want_lse[seen].abs().max().item() if seen.any() else 1.0)
    report.check(f"{name}: lse", lse_error <= lse_allowed, f"error {lse_error:.3g}, allowed {lse_allowed:.3g}")
    if blind.any():
        nothing = bool((out[blind] == 0).all()) and bool(torch.isneginf(lse[blind]).all())
        report.check(f"{name}: rows that see nothing", nothing, "expected out 0 and lse -inf")
    return error, allowed


def tensors(machine: Machine, problem: Problem, seed: int) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    """q, k, v whole for the reference, and k and v as the call gets them."""
    dtype = DTYPES[problem.dtype]
    heads = problem.kv_heads * problem.group

    def make(n: int, heads: int, number: int) -> Tensor:
        shape = (problem.batch, heads, n, problem.head_dim)
        x = machine.randn(*shape, seed=4 * seed + number).to(dtype)
        if not problem.strided:
            return x
        held = torch.full((problem.batch, n + 3, heads + 1, problem.head_dim), math.nan, dtype=dtype, device=x.device)
        view = held[:, 1 : n + 1, :heads].transpose(1, 2)
        view.copy_(x)
        return view

    q = make(problem.q_len, heads, 0)
    k, v = (make(problem.kv_len, problem.kv_heads, number) for number in (1, 2))
    if problem.poison:
        start = problem.kv_start or (0,) * problem.batch
        end = problem.kv_end or (problem.kv_len,) * problem.batch
        for b in range(problem.batch):
            for x in (k, v):
                x[b, :, : start[b]] = math.nan
                x[b, :, end[b] :] = math.nan

    def pages(x: Tensor) -> Any:
        edges = [0, *(c for c in problem.cut if c < problem.kv_len), problem.kv_len]
        parts = [x[:, :, a:b] for a, b in zip(edges, edges[1:], strict=False)]
        if problem.spare:
            last = parts[-1]
            room = torch.full(
                (*last.shape[:2], last.shape[2] + problem.spare, last.shape[3]), math.nan, dtype=dtype, device=x.device
            )
            room[:, :, : last.shape[2]] = last
            parts[-1] = room
        return parts if len(parts) > 1 else parts[0]

    return q, k, v, pages(k), pages(v)
