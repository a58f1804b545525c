"""A million keys: one pass over an accumulator that truncates, against partials merged in float32, against float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import truth
from .machine import Machine
from .section import Report

# Toward zero. Simulated for wgmma: 1.4e-3 to 5.5e-3 in one pass over 2^20 keys, 9e-5 with partials of 64k keys.
BIAS = 3e-4
# Of the norm. P is rounded to bf16 before it meets V: that is random, and seen most where values have a mean of 0.
ERROR = {"mean 1": 5e-4, "mean 0.1": 1e-3, "mean 0": 3e-3}


def run(machine: Machine, report: Report) -> None:
    """Flat attention (every key counts alike) shows the bias most; also attention as sharp as random data makes it."""
    from llama1m_ext import cuda, ops

    kv_len, q_len, page = machine.size(1 << 20, 1024), machine.size(128, 16), machine.size(65536, 256)
    paths = [p for p in ("sm90", "sm80", "decode") if machine.capability == (9, 0) or p != "sm90"]
    for values, scale in (("mean 1", 0.01), ("mean 0.1", 0.01), ("mean 0", 0.01), ("mean 1", 1.0)):
        k = machine.randn(1, 2, kv_len, 128, dtype=torch.bfloat16, seed=1)
        v = machine.randn(1, 2, kv_len, 128, seed=2).add_(float(values.split()[1])).to(torch.bfloat16)
        q = machine.randn(1, 8, q_len, 128, dtype=torch.bfloat16, seed=3, scale=scale)
        last = torch.full((q_len,), kv_len - 1, device=machine.device)
        want, want_lse = truth.long_rows(q, k, v, last=last)
        data = f"V of {values}, scores x {scale}"

        def tell(
            name: str, out: Tensor, lse: Tensor | None, bound: float | None, data=data, want=want, want_lse=want_lse
        ) -> None:
            machine.wait()
            norm = truth.errors(out, want)[1]
            bias = ((out.double() - want) * want.sign()).mean().item() / want.abs().mean().item()
            off = truth.errors(lse, want_lse)[0] if lse is not None else ""
            report.table(
                f"{kv_len} keys against float64",
                data=data,
                kernel=name,
                **{"relative error": norm, "bias": bias, "lse": off},
            )
            if bound is not None:
                report.bound(f"{data}: {name}: relative error", norm, most=bound)
                report.bound(f"{data}: {name}: bias toward zero", abs(bias), most=BIAS)

        with machine.serving():
            for path in paths:
                # Written in float32: what rounding to bf16 would cover is to be seen.
                out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
                lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
                one = q if path != "decode" else q[:, :, :1]
                target, sums = (out, lse) if path != "decode" else (out[:, :, :1].clone(), lse[:, :, :1].clone())
                cuda.attention(
                    one, k, v, target, sums, causal=False, softmax_scale=None, q_start=None, kv_start=None, kv_end=None,
                    kv_len=None, path=path,
                )  # fmt: skip
                if path == "decode":
                    tell(
                        "decode, one query",
                        target,
                        sums,
                        ERROR[values],
                        want=want[:, :, :1],
                        want_lse=want_lse[:, :, :1],
                    )
                else:
                    tell(f"{path}, one call", out, lse, ERROR[values])
            parts = [
                ops.attention(
                    q,
                    k[:, :, a : a + page],
                    v[:, :, a : a + page],
                    causal=False,
                    return_lse=True,
                    out_dtype=torch.float32,
                )
                for a in range(0, kv_len, page)
            ]
            out, lse = ops.merge_partials([o for o, _ in parts], [e for _, e in parts])
            tell(f"{len(parts)} partials, merged", out, lse, ERROR[values])
        if not machine.dry:
            _peers(q, k, v, tell, report)


def _peers(q: Tensor, k: Tensor, v: Tensor, tell, report: Report) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                tell(f"{name} (torch)", scaled_dot_product_attention(q, wide_k, wide_v), None, None)
        except RuntimeError as error:
            report.note(f"{name} does not run here: {str(error).splitlines()[0][:150]}")
