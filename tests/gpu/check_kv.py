"""Pages, rotation and merges: the GPU's bits against the CPU engine's, and both against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import truth
from .machine import Machine
from .section import Report

FORMATS = ("model", "int8", "fp8", "int4")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def run(machine: Machine, report: Report) -> None:
    """append and read, decode and prefill over every format, rope, merge."""
    append_and_read(machine, report)
    attention_over_formats(machine, report)
    rope(machine, report)
    fused_rope(machine, report)
    merge(machine, report)


def page(machine: Machine, name: str, tokens: int, k: Tensor, v: Tensor, names: tuple[str, str] | None = None):
    """An empty page that holds NaN or codes that would show."""
    from llama1m_ext import formats

    of_k, of_v = names or (name, name)
    shape = (k.shape[0], k.shape[1], tokens, k.shape[3])
    made = formats.Page(formats.empty(of_k, "k", shape, k), formats.empty(of_v, "v", shape, v))
    for t in made.tensors().values():
        t.view(torch.uint8).fill_(0x7F) if t.dtype.itemsize == 1 else t.fill_(math.nan)
    return made


def to_cpu(found):
    """A page's tensors on the CPU, by name."""
    return {name: t.cpu() for name, t in found.tensors().items()}


def append_and_read(machine: Machine, report: Report) -> None:
    """Codes and scales as the CPU engine makes them, bit by bit, and dense rows as it reads them."""
    from llama1m_ext import ops

    for name in FORMATS:
        for dtype_name, dtype in DTYPES.items():
            for head_dim in (64, 128, 80):
                k, v = (
                    machine.randn(2, 2, 200, head_dim, seed=number)
                    .transpose(1, 2)
                    .contiguous()
                    .transpose(1, 2)
                    .to(dtype)
                    for number in (1, 2)
                )
                ours = page(machine, name, 330, k, v)
                theirs = page(machine, name, 330, k.cpu(), v.cpu())
                for at, a, b in ((64, 0, 64), (128, 64, 200)):
                    with machine.serving():
                        ops.kv_append(k[:, :, a:b], v[:, :, a:b], ours, at)
                    ops.kv_append(k[:, :, a:b].cpu(), v[:, :, a:b].cpu(), theirs, at)
                machine.wait()
                different = {
                    part: int((x.view(torch.uint8) != y.view(torch.uint8)).sum())
                    for (part, x), y in zip(to_cpu(ours).items(), to_cpu(theirs).values(), strict=True)
                }
                # The rest of a last group is room that nobody reads: only whole groups are compared byte by byte there.
                label = f"kv_append {name} {dtype_name} d{head_dim}"
                report.check(
                    f"{label}: the CPU engine's bytes", not any(different.values()), f"bytes that differ: {different}"
                )
                with machine.serving():
                    got = ops.kv_read(ours, 70, 264, head_dim, dtype)
                want = ops.kv_read(theirs, 70, 264, head_dim, dtype)
                machine.wait()
                same = all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
                report.check(f"kv_read {name} {dtype_name} d{head_dim}: the CPU engine's rows", same, "rows differ")
    report.note("kv_append and kv_read: byte by byte against the CPU engine")


def attention_over_formats(machine: Machine, report: Report) -> None:
    """Decode (codes in registers) and prefill (made dense on the way) against float64 over what the codes stand for."""
    from llama1m_ext import formats, ops, testing

    pairs = [(a, b) for a in FORMATS for b in FORMATS if a == b or not machine.dry]
    worst: dict[str, float] = {}
    for number, names in enumerate(pairs):
        for q_len in (1, 3, machine.size(150, 20)):
            for dtype_name in ("bf16", "f16"):
                for head_dim in (64, 128):
                    dtype = DTYPES[dtype_name]
                    tokens = machine.size(1500, 130)
                    k, v = (machine.randn(2, 2, tokens, head_dim, seed=2 * number + i).to(dtype) for i in (0, 1))
                    q = machine.randn(2, 8, q_len, head_dim, seed=99 + number).to(dtype)
                    kv_start = torch.tensor([0, 37], device=machine.device)
                    filled = page(machine, "", formats.rounded(tokens, 64) + 64, k, v, names)
                    with machine.serving():
                        ops.kv_append(k, v, filled, 0)
                        out, lse = ops.attention(
                            q, filled.k, filled.v, kv_len=tokens, kv_start=kv_start, return_lse=True
                        )
                    machine.wait()
                    meant = [
                        testing.dense_reference(
                            formats.Compact(*(t.cpu() for t in side)) if isinstance(side, formats.Compact) else side.cpu(),
                            which, head_dim,
                        )[:, :, :tokens].to(machine.device)
                        for side, which in ((filled.k, "k"), (filled.v, "v"))
                    ]  # fmt: skip
                    mask = truth.visible(
                        q_len,
                        tokens,
                        2,
                        machine.device,
                        causal=True,
                        q_start=tokens - q_len,
                        kv_start=kv_start,
                        kv_end=None,
                    )
                    want, want_lse = truth.attention(q, *meant, mask)
                    yardstick = truth.eager(q, *(x.to(dtype) for x in meant), mask)
                    # Scales are folded into q and P, and codes and offsets, which may be larger than what they add up to, meet
                    # P apart: several roundings, of larger numbers, where the yardstick has one.
                    compact = names != ("model", "model")
                    allowed = (6 if compact else 1) * truth.allowance(dtype, want, yardstick)
                    error, _ = truth.errors(out, want)
                    label = f"{'/'.join(names)} {dtype_name} d{head_dim} q_len {q_len}"
                    report.check(
                        f"attention over {label}", error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
                    )
                    lse_error = truth.errors(lse, want_lse)[0]
                    report.check(f"lse over {label}", lse_error <= 2**-7, f"error {lse_error:.3g}, allowed {2**-7:.3g}")
                    worst["/".join(names)] = max(worst.get("/".join(names), 0.0), error / allowed)
    for name, share in worst.items():
        report.table("attention over formats", K_V=name, **{"worst / allowed": share})


def rope(machine: Machine, report: Report) -> None:
    """Exact phases at positions up to the millions, against float64."""
    from llama1m_ext import ops

    for dtype_name, dtype in DTYPES.items():
        for head_dim, half in ((128, 64), (64, 32), (128, 32)):
            inv_freq = 3580165449.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            positions = torch.cat([torch.arange(50), torch.arange(1048500, 1048576), torch.tensor([2**24 - 1])])
            positions = positions.to(machine.device)
            q = machine.randn(2, 4, len(positions), head_dim, seed=5).to(dtype)
            k = machine.randn(2, 2, len(positions), head_dim, seed=6).to(dtype)
            with machine.serving():
                q_new, k_new = ops.rope_apply(q, k, positions, inv_freq, attention_scaling=1.25)
            machine.wait()
            for name, x, got in (("q", q, q_new), ("k", k, k_new)):
                want = rotated(x, positions, inv_freq, 1.25)
                allowed = 2.0 * want.abs().max().item() * truth.HALF_ULP[dtype] + 1e-6
                error, _ = truth.errors(got, want)
                report.check(
                    f"rope {name} {dtype_name} d{head_dim}/{2 * half}",
                    error <= allowed,
                    f"error {error:.3g}, allowed {allowed:.3g}",
                )
    report.note("rope_apply: positions to 2^24, theta 3580165449, against float64")


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float) -> Tensor:
    """RoPE in float64."""
    phase = positions.double()[:, None] * inv_freq.to(x.device)[None, :]
    cos, sin = phase.cos() * scaling, phase.sin() * scaling
    half = len(inv_freq)
    a, b, rest = x.double().split([half, half, x.shape[3] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def fused_rope(machine: Machine, report: Report) -> None:
    """kv_append with positions is rope_apply and then kv_append, to the last bit."""
    from llama1m_ext import ops

    inv_freq = 500000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    for name in FORMATS:
        k, v = (machine.randn(1, 2, 190, 128, seed=number).to(torch.bfloat16) for number in (7, 8))
        positions = torch.arange(1000000, 1000190, device=machine.device)
        fused, apart = page(machine, name, 256, k, v), page(machine, name, 256, k, v)
        with machine.serving():
            ops.kv_append(k, v, fused, 0, positions=positions, inv_freq=inv_freq)
            turned, _ = ops.rope_apply(k, None, positions, inv_freq)
            ops.kv_append(turned, v, apart, 0)
        machine.wait()
        same = all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(to_cpu(fused).values(), to_cpu(apart).values(), strict=True)
        )
        report.check(f"fused rope and append {name}", same, "bytes differ from rope_apply followed by kv_append")


def merge(machine: Machine, report: Report) -> None:
    """Partials far apart, empty ones with NaN inside, many of them."""
    from llama1m_ext import ops

    for dtype_name, dtype in DTYPES.items():
        for count in (1, 2, 17):
            outs = machine.randn(count, 2, 8, 33, 128, seed=3).to(dtype)
            lses = machine.randn(count, 2, 8, 33, seed=4) * 30
            empty = machine.randn(count, 2, 8, 33, seed=5) > 0.8
            lses = lses.masked_fill(empty, -math.inf)
            outs = outs.masked_fill(empty[..., None], math.nan)
            with machine.serving():
                out, lse = ops.merge_partials(outs, lses)
            machine.wait()
            want_lse = lses.double().logsumexp(0)
            weights = (lses.double() - torch.nan_to_num(want_lse, neginf=0.0)).exp()
            want = (weights[..., None] * outs.double().masked_fill(empty[..., None], 0.0)).sum(0)
            allowed = 2 * truth.HALF_ULP[dtype] * max(1.0, want.abs().max().item()) + 1e-6
            error, _ = truth.errors(out, want)
            label = f"merge_partials {count} of {dtype_name}"
            report.check(label, error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}")
            seen = ~torch.isneginf(want_lse)
            same = torch.equal(torch.isneginf(lse), ~seen)
            report.check(f"{label}: lse", same and truth.errors(lse[seen], want_lse[seen])[0] <= 2e-5, "lse is off")
