"""The model card's pipeline at Llama-3-8B's true shape: time to first token, decode, memory; ours, and stock as far as it gets."""

from __future__ import annotations

from typing import Any

import torch

from .machine import GIB, Machine
from .model import Clock, build, prompt_of
from .section import Report

BOUND = 1.15  # of the floor: attention at the kernel's own measured rate, linear layers at torch's
NEW_TOKENS = 24
M = 8192  # rows of the products that the matmul rate is measured with


def ours(length: int):
    """A section's work at one length."""

    def run(machine: Machine, report: Report) -> None:
        tokens = machine.size(length, 200 + 40 * (length > 8192)) - NEW_TOKENS * (length >= 1 << 20 and not machine.dry)
        model = build(machine, getattr(machine.options, "layers", None))
        floor = floor_seconds(machine, report, model.config, tokens)
        warm_up(machine, model)
        found = measure(machine, report, model, tokens, "llama1m_ext")
        if found is None:
            report.check(f"{tokens} tokens", False, "did not run")
            return
        served(report, model)
        share = found["first"] / floor
        report.table(
            "time to first token against the floor", tokens=tokens, seconds=found["first"], floor=floor, ratio=share
        )
        if not machine.dry and length >= 131072:
            report.bound(f"{tokens} tokens: time to first token over the floor", share, most=BOUND)

    return run


def stock(attn: str, lengths: tuple[int, ...]):
    """A section's work: transformers without us, until memory or time ends it."""

    def run(machine: Machine, report: Report) -> None:
        import llama1m_ext

        llama1m_ext.disable()
        try:
            model = build(machine, getattr(machine.options, "layers", None), attn)
        except (ImportError, ValueError) as error:
            report.note(f"stock with {attn} is not to be had here: {str(error).splitlines()[0][:200]}")
            return
        warm_up(machine, model)
        for length in lengths if not machine.dry else (200,):
            if measure(machine, report, model, length, f"stock, {attn}") is None:
                break

    return run


def pipeline_of(model: Any) -> Any:
    import transformers

    from llama1m_ext import testing

    return transformers.pipeline("text-generation", model=model, tokenizer=testing.tiny_tokenizer())


def warm_up(machine: Machine, model: Any) -> None:
    """Kernels loaded, libraries opened, clocks up."""
    pipeline = pipeline_of(model)
    with machine.serving(), torch.inference_mode():
        pipeline(
            prompt_of(pipeline.tokenizer, machine.size(3000, 150)), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    machine.free()


def measure(machine: Machine, report: Report, model: Any, tokens: int, who: str) -> dict[str, float] | None:
    """One prompt through the pipeline; None when it did not fit."""
    from transformers import LogitsProcessorList

    pipeline = pipeline_of(model)
    prompt = prompt_of(pipeline.tokenizer, tokens)
    ids = len(pipeline.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if ids != tokens:
        raise ValueError(f"prompt: expected {tokens} tokens, got {ids}")
    weights = torch.cuda.memory_allocated() if not machine.dry else 0
    machine.free()
    try:
        with machine.peak() as peak, machine.serving():
            clock = Clock(machine)
            pipeline(
                prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=None, do_sample=True,
                temperature=0.6, top_p=0.9, add_special_tokens=False, logits_processor=LogitsProcessorList([clock]),
            )  # fmt: skip
    except torch.OutOfMemoryError as error:
        report.table("pipeline", who=who, tokens=tokens, outcome=f"out of memory: {str(error).splitlines()[0][:90]}")
        machine.free()
        return None
    found = {"first": clock.first, "each": clock.each}
    report.table(
        "pipeline", who=who, tokens=tokens, outcome="done",
        **{
            "first token, s": clock.first,
            "prompt tokens/s": tokens / clock.first,
            "decode tokens/s": 1 / clock.each,
            "peak GiB": peak[0] / GIB,
            "of it weights": weights / GIB,
        },
    )  # fmt: skip
    machine.free()
    return found


def served(report: Report, model: Any) -> None:
    """That our path did it, and how it kept the cache."""
    import llama1m_ext

    counts = llama1m_ext.stats(model)
    report.check("served by llama1m_ext", counts.served > 0 and not counts.stock, f"{counts}")
    report.note(str(counts))


def floor_seconds(machine: Machine, report: Report, config: Any, tokens: int) -> float:
    """What the arithmetic of a prefill takes at rates measured here and now: attention by our kernel, products by torch."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    length = min(tokens, machine.size(131072, 64))
    attention = attention_seconds(machine, config, length)
    rate = 2 * heads * head_dim * length**2 / attention
    products = linear_seconds(machine, config)
    layers = config.num_hidden_layers
    of_attention = layers * 2 * heads * head_dim * tokens**2 / rate
    of_products = layers * products * tokens
    report.table(
        "the floor", tokens=tokens, layers=layers, **{"attention TFLOP/s": rate / 1e12},
        **{"matmul TFLOP/s": linear_flops(config) / products / 1e12, "attention, s": of_attention, "linear, s": of_products},
    )  # fmt: skip
    machine.free()
    return of_attention + of_products


def attention_seconds(machine: Machine, config: Any, length: int) -> float:
    """Seconds of our kernel on a prompt of that length, one layer."""
    from llama1m_ext import ops

    shapes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        machine.randn(1, heads, length, config.head_dim, dtype=torch.bfloat16, seed=seed)
        for seed, heads in enumerate(shapes)
    )
    with machine.serving():
        return machine.compare({"ours": lambda i: ops.attention(q, k, v)}, rounds=3)["ours"].median


def linear_shapes(config: Any) -> list[tuple[int, int, int]]:
    """(in, out, how many) of a layer's products."""
    hidden, inner = config.hidden_size, config.intermediate_size
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    return [(hidden, wide, 1), (hidden, narrow, 2), (wide, hidden, 1), (hidden, inner, 2), (inner, hidden, 1)]


def linear_flops(config: Any) -> float:
    """FLOP of a layer's products, a token."""
    return sum(2 * a * b * n for a, b, n in linear_shapes(config))


def linear_seconds(machine: Machine, config: Any) -> float:
    """Seconds of a layer's products, a token, by torch."""
    rows = machine.size(M, 64)
    total = 0.0
    for a, b, n in linear_shapes(config):
        x, w = machine.randn(rows, a, dtype=torch.bfloat16, seed=1), machine.randn(b, a, dtype=torch.bfloat16, seed=2)
        out = torch.empty(rows, b, dtype=torch.bfloat16, device=machine.device)
        run = lambda i, x=x, w=w, out=out: torch.mm(x, w.T, out=out)  # noqa: E731
        total += n * machine.compare({"mm": run}, rounds=3, seconds=0.05)["mm"].median
    return total / rows


def offload(machine: Machine, report: Report) -> None:
    """A cache of which the most lives in pinned host memory: a decode step should take what its bytes take over the bus."""
    import llama1m_ext

    model = build(machine, getattr(machine.options, "layers", None))
    warm_up(machine, model)
    config, tokens = model.config, machine.size(262144, 700)
    kept = machine.size(8 * GIB, 1 << 18)
    # In a dry run the host is where pages are already, and what has no room there is refused.
    llama1m_ext.set_options(model, kv="model", offload="disk" if machine.dry else "host", kv_memory=kept)
    found = measure(machine, report, model, tokens, "llama1m_ext, pages on the host")
    if found is None:
        report.check("offload", False, "did not run")
        return
    served(report, model)
    size = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    away, rate = max(0, size - kept), bus_rate(machine)
    least = away / rate
    report.table(
        "a decode step over pages on the host", tokens=tokens, **{"GiB on the host": away / GIB, "bus, GB/s": rate / 1e9},
        **{"seconds": found["each"], "bus alone, s": least, "ratio": found["each"] / least if least else 0.0},
    )  # fmt: skip
    if not machine.dry:
        report.bound("offload: a decode step over the time of its bytes", found["each"] / least, most=1.15)


def bus_rate(machine: Machine) -> float:
    """Bytes/s from pinned host memory to the device."""
    n = machine.size(2 * GIB, 1 << 20)
    host = torch.empty(n, dtype=torch.uint8, pin_memory=not machine.dry)
    there = torch.empty(n, dtype=torch.uint8, device=machine.device)
    return n / machine.compare({"copy": lambda i: there.copy_(host, non_blocking=True)}, rounds=3)["copy"].median


def logits(machine: Machine, report: Report) -> None:
    """Logits of a 4k prompt: ours in bf16 against a float32 run, beside stock's in bf16."""
    import llama1m_ext
    from llama1m_ext import testing

    model = build(machine, getattr(machine.options, "layers", None), "sdpa")
    llama1m_ext.set_options(model, replace_sdpa=True)
    tokens = machine.size(4096, 130)
    ids = testing.random_ids(1, tokens).to(machine.device)

    def forward(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            found = model(ids, use_cache=False).logits.float()
        machine.wait()
        return found

    with machine.serving():
        theirs_here = forward(model)
    counts = llama1m_ext.stats(model)
    report.check("logits: served by llama1m_ext", counts.served > 0 and not counts.stock, f"{counts}")
    llama1m_ext.disable()
    try:
        theirs = forward(model)
        truth = forward(model.float())
    finally:
        llama1m_ext.enable()
    scale = truth.double().square().mean().sqrt().item()
    rms = {
        name: (x.double() - truth.double()).square().mean().sqrt().item()
        for name, x in (("ours", theirs_here), ("stock", theirs))
    }
    agree = {
        name: (x.argmax(-1) == truth.argmax(-1)).double().mean().item()
        for name, x in (("ours", theirs_here), ("stock", theirs))
    }
    for name in rms:
        report.table(
            f"logits of {tokens} tokens, bf16, against float32", who=name, rms=rms[name], agree=agree[name],
            **{"relative": rms[name] / scale},
        )  # fmt: skip
    report.bound("logits: our error over stock's", rms["ours"] / rms["stock"], most=1.02)
