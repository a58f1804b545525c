"""Stock transformers on the demo's prompt, in a process of its own, with the extension switched off.

`child` is what runs there: it reads a job (JSON) from its standard input and writes one JSON line per length.
`measure_stock` starts it, watches its time and memory, and says what it would need for the whole prompt.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, TypedDict

from .measure import Clock, peak_rss_bytes, reset_peak_rss

_LIMIT = "its limit"


class StockRun(TypedDict):
    """One length that stock transformers finished."""

    prompt_tokens: int
    first_token_s: float
    peak_bytes: int  # above what was resident before the prompt
    correct: bool


class StockReport(TypedDict):
    """What stock transformers did within its limits, and what the whole prompt would take."""

    runs: list[StockRun]
    stopped: str  # why it got no further
    measured: bool  # the last run is the whole prompt: nothing is extrapolated
    first_token_s: float | None
    peak_bytes: float | None


def child() -> None:
    """Runs the lengths of the job, shortest first, until told to stop."""
    job = json.load(sys.stdin)
    from .needle import Needle
    from .prompt import build_prompt
    from .run import ask, load_pipeline, load_source

    text, _ = load_source(job["text"])
    pipeline = load_pipeline()
    print(json.dumps({"ready": True}), flush=True)
    needle = Needle(job["key"], job["value"])
    for tokens in job["lengths"]:
        prompt = build_prompt(pipeline.tokenizer, text, needle, job["depth"], tokens)
        reset_peak_rss()
        before, clock = peak_rss_bytes(), Clock()
        answer = ask(pipeline, prompt.chat, clock)
        run: StockRun = {
            "prompt_tokens": prompt.tokens,
            "first_token_s": clock.first_token_s,
            "peak_bytes": peak_rss_bytes() - before,
            "correct": needle.value in answer,
        }
        print(json.dumps(run), flush=True)


def measure_stock(
    *, text: str | Path | None, key: str, value: str, depth: float, tokens: int, limit_s: float, limit_bytes: int
) -> StockReport:
    """Runs stock transformers at 4k, 8k, 16k, ... tokens up to the whole prompt, for `limit_s` seconds at most.

    A length is not begun when the fit through the lengths before says that it would pass the limit. What the whole
    prompt would take is then extrapolated: time as a * n + b * n^2 (linear layers and attention), memory as the last
    run's bytes per token.
    """
    lengths = [n for n in (4096 * 2**i for i in range(20)) if n < tokens] + [tokens]
    job = {"text": None if text is None else str(text), "key": key, "value": value, "depth": depth, "lengths": lengths}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-c", "from llama1m_ext.demo.stock import child; child()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            encoding="utf-8",
            env={**os.environ, "LLAMA1M_DISABLE": "1"},
        )
        try:
            runs, stopped = _watch(process, job, limit_s, limit_bytes)
            if process.poll() and not stopped.endswith(_LIMIT):
                stopped += _last_line(complaints)
        finally:
            process.kill()
            process.wait()
    measured = len(runs) == len(lengths)
    seconds = size = None
    if measured:
        seconds, size = runs[-1]["first_token_s"], float(runs[-1]["peak_bytes"])
    elif runs:
        seconds = predict_s(runs, tokens)
        size = runs[-1]["peak_bytes"] / runs[-1]["prompt_tokens"] * tokens
    return {"runs": runs, "stopped": stopped, "measured": measured, "first_token_s": seconds, "peak_bytes": size}


def _watch(
    process: subprocess.Popen[str], job: dict[str, Any], limit_s: float, limit_bytes: int
) -> tuple[list[StockRun], str]:
    """The runs that came before a limit or the end, and why there are no more. Loading the model doesn't count."""
    stdin, stdout, lengths = process.stdin, process.stdout, job["lengths"]
    if stdin is None or stdout is None:
        raise RuntimeError("expected pipes to the stock process")
    runs: list[StockRun] = []
    with stdin:
        stdin.write(json.dumps(job))
    began = None
    with stdout, selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while len(runs) < len(lengths):
            at = f"{lengths[len(runs)]:,} tokens"
            spent = 0.0 if began is None else time.monotonic() - began
            if selector.select(timeout=0.2):
                line = stdout.readline()
                if not line:
                    return runs, f"{at}: it ended with status {process.wait()}"
                fields = json.loads(line)
                if "ready" in fields:
                    began = time.monotonic()
                    continue
                runs.append(fields)
                spent = 0.0 if began is None else time.monotonic() - began
                if 2 < len(runs) < len(lengths) and spent + predict_s(runs, lengths[len(runs)]) > limit_s:
                    return runs, f"{lengths[len(runs)]:,} tokens would have passed {limit_s:.0f} s, {_LIMIT}"
            elif spent > limit_s:
                return runs, f"{at} passed {limit_s:.0f} s, {_LIMIT}"
            if _rss_bytes(process.pid) > limit_bytes:
                return runs, f"{at} passed {limit_bytes / 2**30:.1f} GiB, {_LIMIT}"
    return runs, ""


def predict_s(runs: list[StockRun], tokens: int) -> float:
    """Seconds for `tokens` tokens: a * n + b * n^2 through the two longest runs, neither share below nothing."""
    last = runs[-1]
    if len(runs) == 1:
        return last["first_token_s"] * tokens / last["prompt_tokens"]
    (n1, t1), (n2, t2) = ((run["prompt_tokens"], run["first_token_s"]) for run in runs[-2:])
    b = max(0.0, (t2 / n2 - t1 / n1) / (n2 - n1))
    a = max(0.0, t2 / n2 - b * n2)
    return a * tokens + b * tokens**2


def _last_line(complaints: IO[bytes]) -> str:
    """The end of what the process wrote to its standard error, where the exception stands."""
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _rss_bytes(pid: int) -> int:
    """Resident memory of a process now, 0 where the system doesn't say."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
