"""Every kernel once or twice under compute-sanitizer: memory, races, barriers, reads of what nobody wrote."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .machine import Machine
from .section import Report

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OURS = ("attention", "backward", "decode", "kv_", "rope", "merge")
SMALL = """
import torch, llama1m_ext
from llama1m_ext import cuda, formats, ops
def randn(*shape): return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
q, k, v = randn(2, 8, 150, 128), randn(2, 2, 300, 128), randn(2, 2, 300, 128)
start = torch.tensor([0, 37], device="cuda")
paths = ["any", "sm80"] + (["sm90"] if torch.cuda.get_device_capability() == (9, 0) else [])
for head_dim in (64, 128):
    a = [x[..., :head_dim].contiguous() for x in (q, k, v)]
    for path in paths:
        out, lse = torch.empty_like(a[0]), torch.empty(2, 8, 150, device="cuda")
        cuda.attention(*a, out, lse, causal=True, softmax_scale=None, q_start=None, kv_start=start, kv_end=None, kv_len=290, path=path)
        a0, a1, a2 = a[0], a[1][:, :, :290].contiguous(), a[2][:, :, :290].contiguous()
        grads = [torch.empty_like(x) for x in (a0, a1, a2)]
        cuda.attention_backward(a0, a0, a1, a2, out, lse, *grads, causal=True, softmax_scale=None, q_start=None, kv_start=start, kv_end=None, kv_len=None, path=path)
    for name in formats.NAMES:
        page = formats.Page(*(formats.empty(name, w, (2, 2, 320, head_dim), a[1]) for w in ("k", "v")))
        inv_freq = 500000.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
        ops.kv_append(a[1], a[2], page, 0, positions=torch.arange(300, device="cuda"), inv_freq=inv_freq)
        for q_len in (1, 3):
            out, lse = ops.attention(a[0][:, :, :q_len], page.k, page.v, kv_len=299, kv_start=start, return_lse=True)
        ops.kv_read(page, 64, 299, head_dim, torch.bfloat16)
    ops.rope_apply(a[0], a[1][:, :, :150], torch.arange(150, device="cuda"), inv_freq)
    ops.merge_partials(torch.stack([out, out]), torch.stack([lse, lse]))
torch.cuda.synchronize()
print("small set done")
"""


def tool() -> str | None:
    """compute-sanitizer from PATH or from a toolkit."""
    found = shutil.which("compute-sanitizer")
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), reverse=True)
    return found or (str(places[0]) if places else None)


def run(machine: Machine, report: Report) -> None:
    """One process for each tool."""
    program = tool()
    if program is None:
        report.note("not run: there is no compute-sanitizer here")
        return
    only = [part for name in OURS for part in ("--kernel-regex", f"kns={name}")]
    for name in TOOLS:
        command = [
            program,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            "--print-limit",
            "20",
            *only,
            sys.executable,
            "-c",
            SMALL,
        ]
        try:
            answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240)
        except subprocess.TimeoutExpired:
            report.check(f"compute-sanitizer {name}", False, "took more than 240 s")
            continue
        said = (answer.stdout + answer.stderr).strip()
        print(said, flush=True)
        good = answer.returncode == 0 and "small set done" in said
        report.check(f"compute-sanitizer {name}", good, said[-1500:])
        report.table("compute-sanitizer", tool=name, verdict=said.splitlines()[-1][:120] if said else "silent")
