"""Every kernel of attention's gradients on the same cases, against float64 on the card."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from . import truth
from .check_attention import DTYPES, Problem, tensors
from .machine import Machine
from .section import Report

PATHS = ("any", "sm80", "sm90")


def problems(machine: Machine, path: str) -> Iterator[Problem]:
    """The cases of one kernel: every edge of its tiles and steps, and every kind of mask and layout."""
    dtypes = ("bf16", "f16") if path != "any" else ("bf16", "f16", "f32")
    heads = {"group": 2, "kv_heads": 1} if machine.dry else {}
    base = Problem(q_len=machine.size(333, 40), kv_len=machine.size(777, 70), **heads)
    for dtype in dtypes:
        for head_dim in (64, 128):
            yield replace(base, dtype=dtype, head_dim=head_dim)
    lengths = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1025, 2049)
    for length in lengths[: machine.size(99, 3)]:
        yield replace(base, q_len=length, kv_len=length)
    for q_len in (1, 31, 65, 128, 193)[: machine.size(99, 2)]:
        yield replace(base, q_len=q_len, kv_len=machine.size(1500, 90), head_dim=64)
    for group in (1, 5, 8)[: machine.size(99, 1)]:
        yield replace(base, group=group)
    two = replace(base, batch=2, kv_heads=machine.size(2, 1), head_dim=machine.size(128, 64))
    yield replace(two, causal=False)
    yield replace(two, q_start=machine.size(500, 50))
    yield replace(two, q_start=-5)  # the first rows see nothing
    yield replace(two, kv_start=(0, 37), poison=True)
    yield replace(two, kv_start=(64, 30), kv_end=(base.kv_len, 40), poison=True)
    yield replace(two, kv_start=(10, 50), kv_end=(5, 50), causal=False)  # rows that see nothing at all
    yield replace(two, strided=True)
    yield replace(two, spare=77)
    yield replace(two, out_f32=True)
    if path == "any":
        for head_dim in (8, 40, 80, 96, 192, 256)[: machine.size(99, 3)]:
            yield replace(base, head_dim=head_dim, dtype="f32" if head_dim % 16 else "bf16")


def run(machine: Machine, report: Report) -> None:
    """All kernels, and once the way through autograd."""
    for path in PATHS:
        if path == "sm90" and machine.capability != (9, 0):
            report.note(f"sm90: not run, {machine.name} is of compute capability {machine.capability}")
            continue
        over, count = 0.0, 0
        for number, problem in enumerate(problems(machine, path)):
            over, count = max(over, one(machine, report, path, problem, seed=number)), count + 1
        report.table("gradients against float64", path=path, cases=count, **{"worst / allowed": over})
    through_autograd(machine, report)


def one(machine: Machine, report: Report, path: str, problem: Problem, seed: int) -> float:
    """Runs a case twice and judges it; the worst error over what is allowed."""
    from llama1m_ext import cuda

    dtype, device = DTYPES[problem.dtype], machine.device
    q, k, v, given_k, given_v = tensors(machine, problem, seed)
    grad_out = machine.randn(*q.shape, seed=4 * seed + 3).to(dtype)
    grad_lse = machine.randn(*q.shape[:3], seed=4 * seed + 2) if seed % 2 else None
    rows: dict[str, Any] = {
        name: None if bound is None else torch.tensor(bound, dtype=torch.int64, device=device)
        for name, bound in (("kv_start", problem.kv_start), ("kv_end", problem.kv_end))
    }
    q_start = problem.kv_len - problem.q_len if problem.q_start is None else problem.q_start
    mask = truth.visible(
        problem.q_len, problem.kv_len, problem.batch, device, causal=problem.causal, q_start=q_start, **rows
    )
    out, lse = truth.attention(q, k, v, mask)
    want = truth.gradients((q, k, v), mask, grad_out, grad_lse, torch.float64)
    yardstick = truth.gradients((q, k, v), mask, grad_out, grad_lse, dtype)
    out, lse = out.to(torch.float32 if problem.out_f32 else dtype), lse.float()
    found: list[list[torch.Tensor]] = []
    for _ in range(2):
        grads = [torch.full(x.shape, math.nan, dtype=out.dtype, device=device) for x in (q, given_k, given_v)]
        with machine.serving():
            cuda.attention_backward(
                grad_out, q, given_k, given_v, out, lse, *grads, causal=problem.causal, softmax_scale=None, q_start=q_start,
                kv_len=problem.kv_len, grad_lse=grad_lse, path=path, **rows,
            )  # fmt: skip
        machine.wait()
        found.append(grads)
    over = 0.0
    for what, ours, again, true, theirs in zip(("dq", "dk", "dv"), *found, want, yardstick, strict=True):
        name = f"{path} {problem}: {what}"
        report.check(f"{name}: again", torch.equal(ours, again), "expected the same bits")
        if what != "dq":
            report.check(f"{name}: rows not in use", bool((ours[:, :, problem.kv_len :] == 0).all()), "expected 0")
            ours = ours[:, :, : problem.kv_len]
        # float32: lse is rounded once on the way, which moves all weights of a row alike; eager attention has none.
        allowed = truth.allowance(dtype, true, theirs) * (4 if dtype == torch.float32 else 1)
        error, _ = truth.errors(ours, true)
        report.check(name, error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}")
        over = max(over, error / allowed)
    return over


def through_autograd(machine: Machine, report: Report) -> None:
    """`ops.attention` under autograd, forward and backward ours."""
    from llama1m_ext import ops

    dtype, length = torch.bfloat16, machine.size(1000, 60)
    shapes = ((2, 8, length, 128), (2, 2, length, 128), (2, 2, length, 128))
    q, k, v = (machine.randn(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes))
    grad_out = machine.randn(*shapes[0], dtype=dtype, seed=7)
    start = torch.tensor([0, 21], device=machine.device)
    mask = truth.visible(length, length, 2, machine.device, causal=True, q_start=0, kv_start=start)
    want = truth.gradients((q, k, v), mask, grad_out, None, torch.float64)
    yardstick = truth.gradients((q, k, v), mask, grad_out, None, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with machine.serving():
        found = torch.autograd.grad(ops.attention(*leaves, kv_start=start), leaves, grad_out)
    machine.wait()
    for what, ours, true, theirs in zip(("dq", "dk", "dv"), found, want, yardstick, strict=True):
        error, allowed = truth.errors(ours, true)[0], truth.allowance(dtype, true, theirs)
        report.check(f"through autograd: {what}", error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}")
