"""The launch path on a real driver: graphs, streams, threads, contexts, errors, and the compiler of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading

import torch

from .machine import Machine
from .section import Report


def run(machine: Machine, report: Report) -> None:
    """What can go wrong between Python and the card."""
    errors(machine, report)
    many_threads(machine, report)
    if machine.dry:
        report.note("graphs, streams and just-in-time compiling need a GPU")
        return
    graph(machine, report)
    streams(machine, report)
    no_waiting(machine, report)
    just_in_time(machine, report)
    many_processes(machine, report)


def _decode_inputs(machine: Machine, kv_len: int = 4096, seed: int = 0):
    make = lambda heads, n, number: machine.randn(1, heads, n, 128, dtype=torch.bfloat16, seed=seed * 7 + number)  # noqa: E731
    return make(32, 1, 0), make(8, kv_len, 1), make(8, kv_len, 2)


def graph(machine: Machine, report: Report) -> None:
    """A decode step captured once and replayed over other numbers: rope, append, attention, merge."""
    from llama1m_ext import formats, ops

    q, k, v = _decode_inputs(machine)
    new_k, new_v = (machine.randn(1, 8, 64, 128, dtype=torch.bfloat16, seed=s) for s in (5, 6))
    inv_freq = 500000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    positions = torch.tensor([4095], device=machine.device)
    side = {
        name: formats.Page(*(formats.empty(name, w, tuple(k.shape), k) for w in ("k", "v")))
        for name in ("int8", "int4")
    }
    for page in side.values():
        ops.kv_append(k, v, page, 0)

    def step() -> list[torch.Tensor]:
        turned, _ = ops.rope_apply(q, None, positions, inv_freq)
        found = [ops.attention(turned, k, v, return_lse=True)]
        found += [ops.attention(turned, page.k, page.v, return_lse=True) for page in side.values()]
        for page in side.values():
            ops.kv_append(new_k, new_v, page, 64)
        return [*ops.merge_partials([o for o, _ in found], [e for _, e in found])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        held = step()
    good = True
    for seed in (11, 12, 13):
        q.copy_(machine.randn(1, 32, 1, 128, dtype=torch.bfloat16, seed=seed))
        new_k.copy_(machine.randn(1, 8, 64, 128, dtype=torch.bfloat16, seed=seed + 50))
        positions.fill_(4095 + seed)
        captured.replay()
        replayed = [t.clone() for t in held]
        want = step()
        machine.wait()
        good &= all(torch.equal(a, b) for a, b in zip(replayed, want, strict=True))
    report.check("a decode step in a CUDA graph", good, "replays differ from the calls themselves")


def streams(machine: Machine, report: Report) -> None:
    """Calls in torch's current stream, whichever it is, with torch's work before and after in the same order."""
    from llama1m_ext import ops

    inputs = [_decode_inputs(machine, 8192 + 100 * n, n) for n in range(4)]
    want = [ops.attention(*x) for x in inputs]
    machine.wait()
    sides = [torch.cuda.Stream() for _ in inputs]
    got: list[torch.Tensor] = []
    for side, (q, k, v) in zip(sides, inputs, strict=True):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # the copies come late: a call in another stream would read before them
            copies = [torch.empty_like(x).copy_(x) for x in (q, k, v)]
            got.append(ops.attention(*copies).clone())
    for side in sides:
        torch.cuda.current_stream().wait_stream(side)
    machine.wait()
    report.check("several streams", all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), "results differ")


def no_waiting(machine: Machine, report: Report) -> None:
    """A call returns while the card is still busy with what came before."""
    import time

    from llama1m_ext import ops

    q, k, v = _decode_inputs(machine)
    ops.attention(q, k, v)
    machine.wait()
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    ops.attention(q, k, v)
    host = time.perf_counter() - start
    machine.wait()
    whole = time.perf_counter() - start
    report.check("calls return without waiting", host < 0.1 * whole, f"{host * 1e3:.2f} ms of {whole * 1e3:.0f} ms")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.attention(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    many = 200
    start = time.perf_counter()
    for _ in range(many):
        ops.attention(q[:, :, :1], k[:, :, :128], v[:, :, :128])
    host = (time.perf_counter() - start) / many
    machine.wait()
    report.table("host side of a call", call="ops.attention, one query", microseconds=host * 1e6)


def many_threads(machine: Machine, report: Report) -> None:
    """Calls from several threads of one process."""
    from llama1m_ext import ops

    inputs = [_decode_inputs(machine, machine.size(3000, 80) + 9 * n, n) for n in range(4)]
    with machine.serving():
        want = [ops.attention(*x) for x in inputs]
        got: dict[int, torch.Tensor] = {}

        def work(n: int) -> None:
            for _ in range(machine.size(20, 2)):
                got[n] = ops.attention(*inputs[n])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    machine.wait()
    good = len(got) == len(inputs) and all(torch.equal(got[n], want[n]) for n in got)
    report.check("several threads", good, "results differ, or a thread died")


def errors(machine: Machine, report: Report) -> None:
    """What is wrong is said in words, the process lives on, and the next call is right."""
    from llama1m_ext import cuda, ops

    q, k, v = _decode_inputs(machine, 256)
    other = k.cpu() if not machine.dry else k.double()
    cases = {
        "tensors on two devices, or a dtype not served": lambda: ops.attention(q, other, v),
        "another number of heads": lambda: ops.attention(q[:, :7], k, v),
        "a head_dim out of range": lambda: ops.attention(*(x.repeat(1, 1, 1, 3) for x in (q, k, v))),
        "a workspace or path that there is not": lambda: cuda.attention(
            q, k, v, torch.empty_like(q), None, causal=True, softmax_scale=None, q_start=None, kv_start=None, kv_end=None,
            kv_len=None, path="sm10",
        ),
        "a kv_len beyond the pages": lambda: ops.attention(q, k, v, kv_len=257),
        "merging nothing": lambda: ops.merge_partials([], []),
    }  # fmt: skip
    with machine.serving():
        for name, call in cases.items():
            try:
                call()
            except (TypeError, ValueError, RuntimeError) as error:
                report.check(f"error: {name}", "panicked" not in str(error) and len(str(error)) > 10, str(error))
            else:
                report.check(f"error: {name}", False, "no exception")
        good = bool(torch.isfinite(ops.attention(q, k, v)).all())
    machine.wait()
    report.check("the next call after errors", good, "not finite")


JIT = """
import torch, llama1m_ext
from llama1m_ext import ops
g = torch.Generator(device="cuda").manual_seed(0)
q, k, v = (torch.randn(1, h, n, 128, generator=g, device="cuda", dtype=torch.bfloat16) for h, n in ((8, 200), (2, 500), (2, 500)))
out = ops.attention(q, k, v).float()
one = ops.attention(q[:, :, -1:], k, v).float()
print("sum", out.double().sum().item(), one.double().sum().item())
"""


def just_in_time(machine: Machine, report: Report) -> None:
    """The same bits from the kernels that this machine's NVRTC makes, as from those in the package."""
    from llama1m_ext import cuda

    report.note(f"cuda.info(): {cuda.info()}")
    with tempfile.TemporaryDirectory() as folder:
        packed = _python(JIT, LLAMA1M_CUDA_CACHE=folder)
        made = _python(JIT, LLAMA1M_CUDA_CACHE=folder, LLAMA1M_CUDA_CUBINS="0")
        files = os.listdir(folder)
        again = _python(JIT, LLAMA1M_CUDA_CACHE=folder, LLAMA1M_CUDA_CUBINS="0")
    report.check("kernels compiled here", packed.startswith("sum"), packed)
    report.check("kernels compiled here: same sums", made == again and made.startswith("sum"), f"{made!r}, {again!r}")
    report.check("kernels compiled here: left in the cache", len(files) > 0, f"files {files}")


def many_processes(machine: Machine, report: Report) -> None:
    """Eight processes that find an empty cache at the same moment."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LLAMA1M_CUDA_CACHE": folder, "LLAMA1M_CUDA_CUBINS": "0"}
        running = [
            subprocess.Popen(
                [sys.executable, "-c", JIT],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
            for _ in range(machine.size(8, 2))
        ]
        answers = [process.communicate(timeout=120)[0] for process in running]
    same = all(answer == answers[0] and answer.startswith("sum") for answer in answers)
    report.check("eight processes and one empty cache", same, f"{set(answers)}")


def _python(script: str, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, **environment},
    )
    return (answer.stdout if answer.returncode == 0 else answer.stdout + answer.stderr).strip()
