"""Gradients of attention beside torch's own kernels, in turn, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import truth
from .bench_prefill import warnings_kept_quiet
from .machine import Machine, Timing
from .section import Report

PUBLISHED = 561.0  # TFLOP/s: FlashAttention-3 backward, head_dim 128, 16k, bf16 on an H100 (2407.08608): an ambition
Grads = tuple[Tensor, ...]
Run = Callable[[int], Grads]


def run(machine: Machine, report: Report) -> None:
    """16k causal at head_dim 128 first."""
    shapes = [
        (16384, 128, 1, True),
        (16384, 64, 1, True),
        (2048, 128, 8, True),
        (16384, 128, 1, False),
        (131072, 128, 1, True),
    ]
    for length, head_dim, batch, causal in shapes if not machine.dry else [(70, 128, 1, True), (50, 64, 2, False)]:
        one_shape(machine, report, length, head_dim, batch, causal)


def one_shape(machine: Machine, report: Report, length: int, head_dim: int, batch: int, causal: bool) -> None:
    """All candidates of one shape; each judged at a few positions against float64 before it is timed."""
    from llama1m_ext import ops

    heads, kv_heads = machine.size(32, 4), machine.size(8, 2)
    q, grad_out = (machine.randn(batch, heads, length, head_dim, dtype=torch.bfloat16, seed=s) for s in (1, 4))
    k, v = (machine.randn(batch, kv_heads, length, head_dim, dtype=torch.bfloat16, seed=s) for s in (2, 3))
    # 5 products of 2 operations, as papers count, whoever computes 7.
    flops = 10 * batch * heads * head_dim * length * length / (2 if causal else 1)
    shape = f"{batch}x{length} d{head_dim} {heads}/{kv_heads} heads bf16 {'causal' if causal else 'full'} backward"
    rows = torch.linspace(0, length - 1, 33, device=machine.device).round().long()
    candidates: dict[str, Run] = {}
    errors: dict[str, float] = {}
    memory: dict[str, float] = {}
    with machine.serving():
        out, lse = ops.attention(q, k, v, causal=causal, return_lse=True)
        want = truth.sampled_gradients(q, k, v, out, lse, grad_out, rows, causal=causal)
        for name, make in everybody(machine, length).items():
            try:
                candidate = make(q, k, v, out, lse, grad_out, causal)
                candidate(0)
                machine.free()
                with machine.peak() as peak:
                    held = torch.cuda.memory_allocated() if not machine.dry else 0
                    grads = candidate(0)
            except Exception as error:  # a peer that this torch or card does not have is told, not hidden
                if name.startswith("ours"):
                    raise
                report.note(
                    f"{shape}: {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:150]}"
                )
                continue
            candidates[name] = candidate
            memory[name] = (peak[0] - held) / 2**30
            errors[name] = max(
                truth.errors(narrow(g, x.shape[1])[:, :, rows], x)[1] for g, x in zip(grads, want, strict=True)
            )
            del grads
        timings = machine.compare(candidates, rounds=5 if length < 100000 else 3, seconds=0.3)
    for name, timing in timings.items():
        report.table(
            shape, kernel=name, ms=timing.ms, **{"TFLOP/s": flops / timing.median / 1e12, "spread": timing.spread},
            **{"relative error": errors[name], "peak GiB beside what was there": memory[name]},
        )  # fmt: skip
    judge(machine, report, shape, flops, timings, errors)


def narrow(grad: Tensor, heads: int) -> Tensor:
    """The gradient of a key head, from those of its copies."""
    if grad.shape[1] == heads:
        return grad
    return grad.double().unflatten(1, (heads, -1)).sum(2)


def judge(
    machine: Machine, report: Report, shape: str, flops: float, timings: dict[str, Timing], errors: dict[str, float]
) -> None:
    """The goals of the issue, as far as the peers run here."""
    peers = {name: error for name, error in errors.items() if not name.startswith("ours")}
    if peers:
        report.bound(f"{shape}: error over the best peer's", errors["ours"] / min(peers.values()), most=1.1)
    if machine.dry:
        return
    rate = flops / timings["ours"].median / 1e12
    if "d128" in shape and machine.capability == (9, 0):
        report.note(f"{shape}: {rate:.0f} TFLOP/s; FlashAttention-3 published {PUBLISHED:.0f} (not causal)")
    for peer in ("flash", "cudnn"):
        if peer in timings:
            times = timings[peer].median / timings["ours"].median
            if peer == "flash":
                report.bound(f"{shape}: times as fast as {peer}", times, least=1.0)
            else:
                report.note(f"{shape}: {times:.2f} times as fast as {peer}")


Make = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Run]


def everybody(machine: Machine, length: int) -> dict[str, Make]:
    """Makers of candidates."""
    from torch.nn.attention import SDPBackend

    found = {"ours": _ours("auto"), "ours, sm80": _ours("sm80")}
    if length <= 2048:
        found["ours, any"] = _ours("any")
    if machine.dry:
        found["sdpa"] = _sdpa(None)
        return found
    found["flash"] = _sdpa(SDPBackend.FLASH_ATTENTION)
    found["cudnn"] = _sdpa(SDPBackend.CUDNN_ATTENTION)
    found["efficient"] = _sdpa(SDPBackend.EFFICIENT_ATTENTION)
    return found


def _ours(path: str) -> Make:
    from llama1m_ext import cuda

    def make(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, causal: bool) -> Run:
        def run(i: int) -> Grads:
            grads = tuple(torch.empty_like(x) for x in (q, k, v))
            cuda.attention_backward(
                grad_out, q, k, v, out, lse, *grads, causal=causal, softmax_scale=None, q_start=None, kv_start=None,
                kv_end=None, kv_len=None, path=path,
            )  # fmt: skip
            return grads

        return run

    return make


def _sdpa(backend: Any) -> Make:
    """The backward pass alone, of a graph that was made before."""
    import contextlib

    from torch.nn.attention import sdpa_kernel

    def make(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, causal: bool) -> Run:
        def forward(k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, list[Tensor]]:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return scaled_dot_product_attention(*leaves, is_causal=causal, **more), leaves

        with warnings_kept_quiet():
            try:
                made, leaves = forward(k, v, enable_gqa=True)
            except RuntimeError:
                # This backend has no groups: it gets the keys repeated, and their gradients are not added up in what is timed.
                group = q.shape[1] // k.shape[1]
                made, leaves = forward(*(x.repeat_interleave(group, 1) for x in (k, v)))
        return lambda i: torch.autograd.grad(made, leaves, grad_out, retain_graph=True)

    return make
