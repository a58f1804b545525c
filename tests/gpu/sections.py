"""All sections, the most worth first: a lease that ends early has then lost the least."""

from __future__ import annotations

from . import (
    bench_backward,
    bench_decode,
    bench_prefill,
    check_attention,
    check_backward,
    check_kv,
    check_long,
    check_runtime,
    end_to_end,
    environment,
    sanitize,
)
from .section import Section

SECTIONS = [
    Section("environment", "The machine, the package, the compiler", 60, environment.run),
    Section("attention", "Attention kernels against float64", 240, check_attention.run),
    Section("gradients", "Gradients of attention against float64", 240, check_backward.run),
    Section("kv", "Pages in every format, rope, merges", 180, check_kv.run),
    Section("runtime", "Graphs, streams, threads, errors, compiling on first use", 180, check_runtime.run),
    Section("prefill", "Prefill beside torch's kernels", 240, bench_prefill.run),
    Section("backward", "Gradients of attention beside torch's kernels", 240, bench_backward.run, quick=False),
    Section("decode", "Decode against copy bandwidth", 180, bench_decode.run),
    Section("long", "A million keys against float64", 120, check_long.run),
    Section("verbs", "Appending, reading, rotating, merging against copy bandwidth", 60, bench_decode.run_verbs),
    Section("8k", "The pipeline at 8,192 tokens", 120, end_to_end.ours(8192)),
    Section("128k", "The pipeline at 131,072 tokens", 180, end_to_end.ours(131072), quick=False),
    Section("logits", "Logits at 4,096 tokens against float32", 120, end_to_end.logits),
    Section("stock", "Stock transformers, sdpa", 240, end_to_end.stock("sdpa", (8192, 131072, 524288)), quick=False),
    Section("offload", "262,144 tokens with most pages in host memory", 240, end_to_end.offload, quick=False),
    Section("sanitize", "compute-sanitizer on a small set", 500, sanitize.run, dry=False, quick=False),
    Section("512k", "The pipeline at 524,288 tokens", 500, end_to_end.ours(524288), quick=False),
    Section("stock-flash", "Stock transformers, flash_attention_2", 240, end_to_end.stock("flash_attention_2", (8192, 131072)), quick=False),
    Section("1m", "The pipeline at 1,048,576 tokens", 1500, end_to_end.ours(1048576), quick=False),
]  # fmt: skip
BY_NAME = {section.name: section for section in SECTIONS}
