"""Prefill attention beside torch's own kernels, in turn, on the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import truth
from .machine import Machine, Timing
from .section import Report

HEADS, KV_HEADS = 32, 8
PUBLISHED = 600.0  # TFLOP/s: FlashAttention-3 forward, causal, head_dim 128, 16k, bf16 on an H100 (2407.08608)
Run = Callable[[int], Tensor]


def run(machine: Machine, report: Report) -> None:
    """16k and 128k causal at head_dim 128 first: they are the goal."""
    matmul(machine, report)
    shapes = [
        (16384, 128, 1, True),
        (131072, 128, 1, True),
        (16384, 64, 1, True),
        (2048, 128, 8, True),
        (16384, 128, 1, False),
    ]
    for length, head_dim, batch, causal in shapes if not machine.dry else [(96, 128, 1, True), (80, 64, 2, False)]:
        one_shape(machine, report, length, head_dim, batch, causal)


def matmul(machine: Machine, report: Report) -> float:
    """TFLOP/s of a large bf16 product: what the card gives today."""
    n = machine.size(8192, 64)
    a, b = (machine.randn(n, n, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    timing = machine.compare({"matmul": lambda i: a @ b})["matmul"]
    rate = 2 * n**3 / timing.median / 1e12
    report.table(
        "the card", what=f"torch matmul {n}^3 bf16", **{"TFLOP/s": rate, "ms": timing.ms, "spread": timing.spread}
    )
    return rate


def one_shape(machine: Machine, report: Report, length: int, head_dim: int, batch: int, causal: bool) -> None:
    """All candidates of one shape; each judged on a few rows against float64 before it is timed."""
    q = machine.randn(batch, HEADS, length, head_dim, dtype=torch.bfloat16, seed=1)
    k, v = (machine.randn(batch, KV_HEADS, length, head_dim, dtype=torch.bfloat16, seed=s) for s in (2, 3))
    flops = 4 * batch * HEADS * head_dim * length * length / (2 if causal else 1)
    shape = f"{batch}x{length} d{head_dim} {HEADS}/{KV_HEADS} heads bf16 {'causal' if causal else 'full'}"
    rows = torch.linspace(0, length - 1, 33, device=machine.device).round().long()
    last = rows if causal else torch.full_like(rows, length - 1)
    want, _ = truth.long_rows(q[:, :, rows], k, v, last=last)
    candidates: dict[str, Run] = {}
    errors: dict[str, float] = {}
    with machine.serving():
        for name, make in everybody(machine, length, causal).items():
            try:
                candidate = make(q, k, v)
                out = candidate(0)
                machine.wait()
            except Exception as error:  # a peer that this torch or card does not have is told, not hidden
                if name.startswith("ours"):
                    raise
                report.note(
                    f"{shape}: {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:150]}"
                )
                continue
            candidates[name] = candidate
            errors[name] = truth.errors(out[:, :, rows], want)[1]
            del out
        timings = machine.compare(candidates, rounds=5 if length < 100000 else 3, seconds=0.3)
    for name, timing in timings.items():
        report.table(
            shape, kernel=name, ms=timing.ms, **{"TFLOP/s": flops / timing.median / 1e12, "spread": timing.spread},
            **{"relative error": errors[name]},
        )  # fmt: skip
    judge(machine, report, shape, flops, timings, errors)


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
    if "d128" in shape and "causal" in shape and machine.capability == (9, 0) and not shape.startswith("8x"):
        report.bound(f"{shape}: TFLOP/s", rate, least=PUBLISHED)
    for peer, least in (("cudnn", 1.0), ("flash", 1.0)):
        if peer in timings:
            report.bound(
                f"{shape}: times as fast as {peer}", timings[peer].median / timings["ours"].median, least=least
            )


def everybody(machine: Machine, length: int, causal: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Run]]:
    """Makers of candidates."""
    from torch.nn.attention import SDPBackend

    found = {"ours": _ours("auto", causal), "ours, sm80": _ours("sm80", causal)}
    if length <= 16384:
        found["ours, any"] = _ours("any", causal)
    if machine.dry:
        found["sdpa"] = lambda q, k, v: (
            lambda i: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        )
        return found
    found["cudnn"] = _sdpa(SDPBackend.CUDNN_ATTENTION, causal)
    found["flash"] = _sdpa(SDPBackend.FLASH_ATTENTION, causal)
    found["efficient"] = _sdpa(SDPBackend.EFFICIENT_ATTENTION, causal)
    if length <= 131072:
        found["flex_attention"] = _flex(causal)
    return found


def _ours(path: str, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Run]:
    from llama1m_ext import cuda, ops

    def make(q: Tensor, k: Tensor, v: Tensor) -> Run:
        if path == "auto":
            return lambda i: ops.attention(q, k, v, causal=causal)

        out = torch.empty_like(q)

        def run(i: int) -> Tensor:
            cuda.attention(
                q, k, v, out, None, causal=causal, softmax_scale=None, q_start=None, kv_start=None, kv_end=None,
                kv_len=None, path=path,
            )  # fmt: skip
            return out

        return run

    return make


def _sdpa(backend: Any, causal: bool) -> Callable[[Tensor, Tensor, Tensor], Run]:
    from torch.nn.attention import sdpa_kernel

    def make(q: Tensor, k: Tensor, v: Tensor) -> Run:
        def call(k: Tensor, v: Tensor, **more: Any) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, **more)

        with warnings_kept_quiet():
            try:
                call(k, v, enable_gqa=True)
            except RuntimeError:
                # This backend has no groups: it gets the keys repeated, outside of what is timed.
                group = q.shape[1] // k.shape[1]
                wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
                call(wide_k, wide_v)
                return lambda i: call(wide_k, wide_v)
        return lambda i: call(k, v, enable_gqa=True)

    return make


def _flex(causal: bool) -> Callable[[Tensor, Tensor, Tensor], Run]:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        mask = None
        if causal:
            mask = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device, _compile=True
            )
        return lambda i: compiled(q, k, v, block_mask=mask, enable_gqa=True)

    return make


@contextlib.contextmanager
def warnings_kept_quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says at length why a backend can't take groups
        yield
