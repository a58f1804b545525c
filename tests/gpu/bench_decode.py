"""Decode over 128k to 1M keys in every format, against the rate at which this card copies memory; and the small verbs likewise."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import truth
from .bench_prefill import warnings_kept_quiet
from .machine import GIB, Machine
from .section import Report

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
FORMATS = ("model", "int8", "fp8", "int4", "int8/int4")
GOAL = 0.9  # of the copy bandwidth


def copy_rate(machine: Machine, report: Report) -> float:
    """Bytes/s of a large device-to-device copy, read and written counted."""
    n = machine.size(4 * GIB, 1 << 20)
    source, target = (torch.empty(n, dtype=torch.uint8, device=machine.device).random_(0, 255) for _ in range(2))
    timing = machine.compare({"copy": lambda i: target.copy_(source)})["copy"]
    rate = 2 * n / timing.median
    report.table(
        "the card", what=f"copy of {n / GIB:.3g} GiB", **{"GB/s": rate / 1e9, "ms": timing.ms, "spread": timing.spread}
    )
    return rate


def run(machine: Machine, report: Report) -> None:
    """Longest worth first: 128k and 1M in every format."""
    rate = copy_rate(machine, report)
    for kv_len in (131072, 1048576, 262144, 524288) if not machine.dry else (320,):
        for name in FORMATS:
            one_shape(machine, report, rate, kv_len, name)


def filled(machine: Machine, name: str, kv_len: int, seed: int):
    """A page of random keys and values in a format, quantised by the GPU itself."""
    from llama1m_ext import formats, ops

    kv = formats.KvFormat.parse(name)
    like = torch.empty(0, dtype=torch.bfloat16, device=machine.device)
    shape = (1, KV_HEADS, kv_len, HEAD_DIM)
    page = formats.Page(formats.empty(kv.k, "k", shape, like), formats.empty(kv.v, "v", shape, like))
    for start in range(0, kv_len, 65536):
        n = min(65536, kv_len - start)
        k, v = (machine.randn(1, KV_HEADS, n, HEAD_DIM, dtype=torch.bfloat16, seed=seed + start + i) for i in (0, 1))
        ops.kv_append(k, v, page, start)
    return page


def one_shape(machine: Machine, report: Report, copy: float, kv_len: int, name: str) -> None:
    """One length in one format; several caches in turn, so that nothing is left of one in L2 when its turn comes again."""
    from llama1m_ext import formats, ops

    size = formats.KvFormat.parse(name).token_bytes(KV_HEADS, HEAD_DIM, 2) * kv_len
    caches = machine.size(max(1, math.ceil(6 * machine.l2_bytes / size)), 1)
    if not machine.dry and caches * size > 0.7 * machine.memory_bytes:
        report.note(f"{name} {kv_len}: {size / GIB:.1f} GiB does not fit")
        return
    with machine.serving():
        pages = [filled(machine, name, kv_len, 1000 * n) for n in range(caches)]
        q = machine.randn(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, seed=9)
        candidates = {"ours": lambda i: ops.attention(q, pages[i % caches].k, pages[i % caches].v)}
        if name == "model" and not machine.dry:
            candidates |= _peers(report, q, pages, caches, kv_len)
        errors = {}
        if name == "model":
            want, _ = truth.long_rows(q, pages[0].k, pages[0].v, last=torch.tensor([kv_len - 1], device=machine.device))
            errors = {label: truth.errors(call(0), want)[1] for label, call in candidates.items()}
        timings = machine.compare(candidates, rounds=5, seconds=0.1)
    for label, timing in timings.items():
        report.table(
            f"decode, one query, {HEADS}/{KV_HEADS} heads, d{HEAD_DIM}",
            keys=kv_len, format=name, kernel=label, microseconds=timing.median * 1e6,
            **{"GB/s": size / timing.median / 1e9, "of copy": size / timing.median / copy, "spread": timing.spread},
            **{"relative error": errors.get(label, "")},
        )  # fmt: skip
    if errors:
        report.bound(
            f"decode {kv_len} {name}: relative error", errors["ours"], most=max(4e-3, *(errors[p] for p in errors))
        )
    if not machine.dry:
        report.bound(
            f"decode {kv_len} {name}: share of copy bandwidth", size / timings["ours"].median / copy, least=GOAL
        )
    machine.free()


def _peers(report: Report, q, pages, caches: int, kv_len: int):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found = {}
    for label, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def call(i: int, backend=backend):
            with sdpa_kernel(backend):
                page = pages[i % caches]
                return scaled_dot_product_attention(q, page.k, page.v, enable_gqa=True)

        with warnings_kept_quiet():
            try:
                call(0)
            except RuntimeError as error:
                report.note(f"decode {kv_len}: {label} does not run here: {str(error).splitlines()[0][:150]}")
                continue
        found[label] = call
    return found


def run_verbs(machine: Machine, report: Report) -> None:
    """kv_append, kv_read, rope_apply, merge_partials against the bytes that they must move."""
    from llama1m_ext import formats, ops

    rate = copy_rate(machine, report)
    tokens = machine.size(65536, 128)
    copies = machine.size(3, 1)
    bf16 = torch.bfloat16
    ks, vs = (
        [machine.randn(1, KV_HEADS, tokens, HEAD_DIM, dtype=bf16, seed=s + 10 * n) for n in range(copies)]
        for s in (1, 2)
    )
    dense = 2 * ks[0].numel() * 2
    positions = torch.arange(tokens, device=machine.device) + 900000
    inv_freq = 3580165449.0 ** (-torch.arange(64, dtype=torch.float64) / 64)

    def of_pages(name: str):
        pages = [formats.Page(*(formats.empty(name, w, tuple(ks[0].shape), ks[0]) for w in ("k", "v"))) for _ in ks]
        size = dense + pages[0].nbytes
        turn = {"positions": positions, "inv_freq": inv_freq}
        return {
            "kv_append": (lambda i: ops.kv_append(ks[i % copies], vs[i % copies], pages[i % copies], 0), size),
            "kv_append with rope": (
                lambda i: ops.kv_append(ks[i % copies], vs[i % copies], pages[i % copies], 0, **turn),
                size,
            ),
            "kv_read": (lambda i: ops.kv_read(pages[i % copies], 0, tokens, HEAD_DIM, bf16), size),
        }

    with machine.serving():
        for name in ("model", "int8", "fp8", "int4"):
            verbs(machine, report, rate, name, of_pages(name))
        q = machine.randn(1, HEADS, tokens, HEAD_DIM, dtype=bf16, seed=3)
        size = 2 * 2 * (q.numel() + ks[0].numel())
        calls = {
            "rope_apply, in place": (
                lambda i: ops.rope_apply(q, ks[0], positions, inv_freq, q_out=q, k_out=ks[0]),
                size,
            )
        }
        verbs(machine, report, rate, f"{HEADS} + {KV_HEADS} heads", calls)
        partials = machine.size(8, 2)
        outs = machine.randn(partials, 1, HEADS, tokens // 8, HEAD_DIM, seed=4)
        lses = machine.randn(partials, 1, HEADS, tokens // 8, seed=5)
        size = 4 * (outs.numel() + lses.numel()) * (partials + 1) // partials
        verbs(
            machine,
            report,
            rate,
            f"{partials} of float32",
            {"merge_partials": (lambda i: ops.merge_partials(outs, lses), size)},
        )


def verbs(machine: Machine, report: Report, rate: float, what: str, calls) -> None:
    """Times calls, each with the bytes that it must move."""
    timings = machine.compare({name: call for name, (call, _) in calls.items()}, rounds=5, seconds=0.05)
    for name, timing in timings.items():
        share = calls[name][1] / timing.median / rate
        report.table(
            "verbs", verb=name, of=what, microseconds=timing.median * 1e6, spread=timing.spread,
            **{"GB/s": calls[name][1] / timing.median / 1e9, "of copy": share},
        )  # fmt: skip
        if not machine.dry:
            report.bound(f"{name} {what}: share of copy bandwidth", share, least=0.6)
