"""KV formats side by side: bytes, error of the attention output, speed of a decode step and of writing.

A decode step reads every byte of K and V once, so a format is as fast as it is small, as long as unpacking it hides behind
the memory: "of its bytes" says how much of that is reached. Peers from transformers (`QuantizedCache`) are measured at a
length of their own, since they make all of the cache dense at each step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama1m_ext.bench.attention import parse_heads
from llama1m_ext.bench.decode import torch_calls
from llama1m_ext.bench.harness import (
    DTYPES,
    RAW_SPREAD_VOID,
    Clock,
    alternate,
    chosen_clock,
    reference_rows,
    reported,
    seconds,
    sizes,
    spread,
)
from llama1m_ext.dense import new_page
from llama1m_ext.formats import KvFormat, Page

FORMATS = "model,int8,fp8,int8/int4,int4"
QUICK_KV_LEN, QUICK_ROUNDS = "2048", 3
PEERS = ("quanto", "hqq")
TORCH = "torch bmm + softmax + bmm"
PEER_ERRORS = (ImportError, RuntimeError, ValueError, OSError, AssertionError, AttributeError, TypeError)
"""What other packages raise where they don't run: no compiler, no GPU, another version's names."""


@dataclass(frozen=True)
class Plan:
    """What to measure. `heads` is (q_heads, kv_heads, head_dim); `peers` are backends of `QuantizedCache`."""

    formats: list[KvFormat]
    dtype: str
    kv_lens: list[int]
    heads: tuple[int, int, int]
    peers: list[str]
    peer_len: int
    threads: int | None
    rounds: int
    clock: Clock


def plan(
    formats: str = FORMATS,
    dtype: str = "bf16",
    kv_len: str = "131072",
    heads: str = "32x8x128",
    peers: str = "",
    peer_len: int = 4096,
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
        kv_len, rounds, peer_len = QUICK_KV_LEN, QUICK_ROUNDS, min(peer_len, 512)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    named = [KvFormat.parse(name.strip()) for name in formats.split(",") if name.strip()]
    if not named or not named[0].is_model:
        raise ValueError(f'formats: expected "model" first, which the others are measured by, got {formats!r}')
    wanted = [name.strip() for name in peers.split(",") if name.strip()]
    if unknown := set(wanted) - set(PEERS):
        raise ValueError(f"peers: expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    lengths = [n for (n,) in sizes(kv_len, 1, "kv_len")]
    return Plan(
        named, dtype, lengths, parse_heads(heads), wanted, peer_len, threads, rounds, chosen_clock(clock, threads)
    )


def run(plan: Plan) -> dict[str, Any]:
    """Measure, print, and return the report (JSON-able)."""
    with reported("kv", plan.threads, plan.rounds, plan.clock) as report:
        for kv_len in plan.kv_lens:
            record = case(plan, kv_len, report["threads"])
            report["cases"].append(record)
            print("\n".join(lines(record)), flush=True)
        if plan.peers:
            report["peers"] = peers(plan)
            print("\n".join(peer_lines(report["peers"])), flush=True)
    return report


def llama_like(kv_heads: int, kv_len: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, kv_heads, kv_len, head_dim]` with what makes Llama's hard to round: 6 channels of each head's
    keys with a mean of about 10 (all else normal), and values of which one token in 200 is 4 times as large."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.empty(1, kv_heads, kv_len, head_dim, dtype=dtype).normal_(generator=generator)
    v = torch.empty(1, kv_heads, kv_len, head_dim, dtype=dtype).normal_(generator=generator)
    means = torch.zeros(kv_heads, head_dim)
    for head in range(kv_heads):
        channels = torch.randperm(head_dim, generator=generator)[: min(6, head_dim)]
        means[head, channels] = 10 * torch.empty(len(channels)).normal_(generator=generator)
    k += means[None, :, None].to(dtype)
    v[:, :, torch.rand(kv_len, generator=generator) < 0.005] *= 4
    return k, v


def case(plan: Plan, kv_len: int, threads: int) -> dict[str, Any]:
    """One query at the end of `kv_len` positions, over a page in each format."""
    from llama1m_ext import _core, ops

    q_heads, kv_heads, head_dim = plan.heads
    k, v = llama_like(kv_heads, kv_len, head_dim, DTYPES[plan.dtype])
    q = torch.empty(1, q_heads, 1, head_dim, dtype=k.dtype).normal_(generator=torch.Generator().manual_seed(1))
    row = torch.zeros(1, dtype=torch.int64)
    truth = reference_rows(q, k, v, row, q_start=kv_len - 1)
    dense_bytes = k.numel() * k.element_size() * 2
    room = torch.empty(dense_bytes, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(2))
    samplers: dict[str, Callable[[], float]] = {
        "raw read": partial(seconds, lambda: _core.read_seconds(room, threads), plan.clock)
    }
    rows: list[dict[str, Any]] = []
    for fmt in plan.formats:
        page = new_page(fmt, kv_len, k, v)
        ops.kv_append(k, v, page, 0)  # once untimed: the memory is new
        written = statistics.median(
            seconds(partial(ops.kv_append, k, v, page, 0), plan.clock) for _ in range(min(3, plan.rounds))
        )
        out = ops.attention(q, [page.k], [page.v], kv_len=kv_len, out_dtype=torch.float32)
        assert isinstance(out, Tensor)
        held = _made_dense(page, kv_len, head_dim)
        own = reference_rows(q.float(), *held, row, q_start=kv_len - 1)
        rows.append(
            {
                "format": fmt.name,
                "bytes_per_token": page.nbytes / kv_len,
                "error": _relative(out, truth),  # of the format and the kernel, against float64 on the exact data
                "kernel_error": _relative(out, own),  # of the kernel alone, against float64 on what the codes stand for
                "write_tokens_per_s": kv_len / written,
            }
        )
        del held
        samplers[fmt.name] = partial(seconds, partial(ops.attention, q, [page.k], [page.v], kv_len=kv_len), plan.clock)
    by_torch = next(call for call in torch_calls(q, k, v, float(dense_bytes)) if call.name == TORCH)
    samplers[TORCH] = partial(seconds, by_torch.run, plan.clock)
    samples = alternate(samplers, plan.rounds)
    raw = dense_bytes / statistics.median(samples["raw read"])
    first = statistics.median(samples[plan.formats[0].name])
    for row_ in rows:
        median = statistics.median(samples[row_["format"]])
        smaller = rows[0]["bytes_per_token"] / row_["bytes_per_token"]
        row_ |= {
            "median_s": median,
            "rate": row_["bytes_per_token"] * kv_len / median / 1e9,
            "fraction": row_["bytes_per_token"] * kv_len / median / raw,
            "faster": first / median,
            "smaller": smaller,
            "of_bytes": first / median / smaller,
            "samples_s": samples[row_["format"]],
        }
    varied = spread(samples["raw read"])
    return {
        "name": f"decode {kv_len} keys, {q_heads} q heads, {kv_heads} kv heads, head_dim {head_dim}",
        "dtype": plan.dtype,
        "shape": {"kv_len": kv_len, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim},
        "limit": {"name": "raw read", "rate": raw / 1e9, "spread": varied},
        "void": varied > RAW_SPREAD_VOID,
        "torch": {"name": TORCH, "median_s": statistics.median(samples[TORCH])},
        "formats": rows,
    }


def _made_dense(page: Page, kv_len: int, head_dim: int) -> tuple[Tensor, Tensor]:
    from llama1m_ext import ops

    dense = page.k.dtype if isinstance(page.k, Tensor) else page.v.dtype if isinstance(page.v, Tensor) else None
    k, v = ops.kv_read(page, 0, kv_len, head_dim, dense or torch.float32)
    return k.float(), v.float()


def _relative(out: Tensor, truth: Tensor) -> float:
    """Root mean square of the error over that of the truth."""
    return float((out.double() - truth).pow(2).mean().sqrt() / truth.pow(2).mean().sqrt())


def lines(record: dict[str, Any]) -> list[str]:
    """A record of `case` as text."""
    limit, by_torch = record["limit"], record["torch"]
    out = [
        "",
        f"{record['name']}, {record['dtype']}  (raw read {limit['rate']:.1f} GB/s, spread {limit['spread']:.2f}x)",
        f"  {'format':<12} {'B/token':>8} {'decode':>11} {'GB/s':>6} {'of raw':>7} {'faster':>7} {'of its bytes':>12}"
        f" {'error':>8} {'kernel':>8} {'written':>14}",
    ]
    for row in record["formats"]:
        out.append(
            f"  {row['format']:<12} {row['bytes_per_token']:8.0f} {row['median_s'] * 1e3:8.3f} ms {row['rate']:6.1f}"
            f" {row['fraction'] * 100:6.1f}% {row['faster']:6.2f}x {row['of_bytes'] * 100:11.0f}%"
            f" {row['error']:8.1e} {row['kernel_error']:8.1e} {row['write_tokens_per_s']:8.2e} tok/s"
        )
    out.append(f"  {by_torch['name']}: {by_torch['median_s'] * 1e3:.3f} ms")
    if record["void"]:
        out.append(f"  VOID: raw read varied {limit['spread']:.2f}x (> {RAW_SPREAD_VOID}x): not one machine, ask again")
    return out


def peers(plan: Plan) -> list[dict[str, Any]]:
    """Steps of transformers' own caches beside ours: append a token, then attention over all of them.

    A peer that can't run here has `why` in the place of figures.
    """
    from llama1m_ext import LongCache

    found: list[dict[str, Any]] = []
    for fmt in plan.formats:
        found.append(_step(f"LongCache(kv={fmt.name!r})", partial(LongCache, kv=fmt.name), plan))
    for backend in plan.peers:
        for bits in (4, 8):
            found.append(_step(f"QuantizedCache {backend} {bits} bits", partial(_quantized, backend, bits, plan), plan))
    found.append(_step("DynamicCache(offloading=True)", partial(_offloaded, plan), plan))
    return found


def _config(plan: Plan) -> Any:
    from transformers import LlamaConfig

    q_heads, kv_heads, head_dim = plan.heads
    return LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=q_heads * head_dim,
    )


def _quantized(backend: str, bits: int, plan: Plan) -> Any:
    from transformers.cache_utils import QuantizedCache

    axis = 0 if backend == "quanto" else 1
    return QuantizedCache(backend, _config(plan), nbits=bits, axis_key=axis, axis_value=axis, q_group_size=64)


def _offloaded(plan: Plan) -> Any:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=_config(plan), offloading=True)


def _step(name: str, make: Callable[[], Any], plan: Plan) -> dict[str, Any]:
    from llama1m_ext import offload

    q_heads, kv_heads, head_dim = plan.heads
    n = plan.peer_len
    k, v = llama_like(kv_heads, n + plan.rounds + 1, head_dim, DTYPES[plan.dtype])
    q = torch.empty(1, q_heads, 1, head_dim, dtype=k.dtype).normal_(generator=torch.Generator().manual_seed(1))
    try:
        cache = make()
        fill = seconds(lambda: cache.update(k[:, :, :n], v[:, :, :n], 0), plan.clock)
        layer = cache.layers[0]
        ours = hasattr(layer, "pages")
        if ours:
            layer.seal()

        def step(at: int) -> Tensor:
            new_k, new_v = k[:, :, at : at + 1], v[:, :, at : at + 1]
            if ours:
                layer.append(new_k, new_v)
                out = offload.attention(q, layer)
                layer.seal()
                return out  # type: ignore[return-value]
            keys, values = cache.update(new_k, new_v, 0)
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

        step(n)
        taken = [seconds(partial(step, n + 1 + i), plan.clock) for i in range(plan.rounds - 1)]
        end = n + plan.rounds
        out = step(end)
    except PEER_ERRORS as error:
        if name.startswith("LongCache"):
            raise  # ours runs everywhere
        return {"name": name, "why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    truth = reference_rows(q, k[:, :, : end + 1], v[:, :, : end + 1], torch.zeros(1, dtype=torch.int64), q_start=end)
    return {
        "name": name,
        "kv_len": n,
        "fill_s": fill,
        "median_s": statistics.median(taken) if taken else math.nan,
        "error": _relative(out, truth),
    }


def peer_lines(found: list[dict[str, Any]]) -> list[str]:
    """Records of `peers` as text."""
    out = ["", "a step of one layer's cache: append a token, attention over all"]
    for one in found:
        if "why" in one:
            out.append(f"  {one['name']:<36} does not run here: {one['why'][:110]}")
        else:
            out.append(
                f"  {one['name']:<36} {one['kv_len']} keys {one['median_s'] * 1e3:10.3f} ms, written in"
                f" {one['fill_s']:7.3f} s, error {one['error']:.1e}"
            )
    return out
