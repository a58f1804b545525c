"""How a figure is measured: candidates alternated A B C A B C, medians, beside the machine's limit in the same rounds.

A case has one `limit` (peak FLOP/s, or raw read bytes/s), sampled once a round between the candidates, so that a slow
minute of a shared machine slows both. Errors are against float64 on a subsample of rows.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

OURS = "llama1m_ext"
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}

# Above this ratio of the slowest to the fastest raw read, the memory system was not one machine but several: on shared
# hosts it jumps between about 45 and 75 GB/s. A fraction of it then means nothing.
RAW_SPREAD_VOID = 1.3


@dataclass(frozen=True)
class Call:
    """One candidate. `run` is timed; `output` turns its result into `[batch, q_heads, q_len, head_dim]`, untimed."""

    name: str
    run: Callable[[], Any]
    work: float  # FLOP or bytes of one run
    yardstick: bool = True  # may `ratio` be taken against it; False for what computes something else, and for peers
    output: Callable[[Any], torch.Tensor] = field(default=lambda result: result)


@dataclass(frozen=True)
class Limit:
    """What the machine can do: `sample(clock)` gives FLOP/s or bytes/s."""

    name: str
    sample: Callable[[Clock], float]
    void_spread: float | None = None  # spread (max / min) of the samples above which the case is void


@dataclass(frozen=True)
class Clock:
    """Wall time; or, for one thread on a busy machine, CPU time of this process, which preemption does not touch."""

    name: str = "wall"

    def __post_init__(self) -> None:
        if self.name not in ("wall", "cpu"):
            raise ValueError(f"clock: expected wall or cpu, got {self.name!r}")

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter() if self.name == "wall" else time.process_time()


@dataclass(frozen=True)
class Case:
    """One shape in one dtype: what is asked of every candidate."""

    name: str
    dtype: str
    unit: str  # "GFLOP/s" or "GB/s"
    shape: dict[str, int]
    calls: list[Call]
    limit: Limit
    reference: torch.Tensor  # float64 [batch, q_heads, len(rows), head_dim]
    rows: torch.Tensor  # int64: the query rows that are judged


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """torch on `count` threads (None: as it is) inside the block; ours follows torch. Yields the count."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def alternate(samplers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each sampler once a round, `rounds` times, in the order given; what each returned, round by round."""
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            samples[name].append(sampler())
    return samples


def seconds(run: Callable[[], Any], clock: Clock) -> float:
    """Seconds that one call of `run` takes on `clock`."""
    start = clock.now()
    run()
    return clock.now() - start


def spread(values: list[float]) -> float:
    """Largest over smallest."""
    return max(values) / min(values)


def sample_rows(q_len: int, count: int = 16) -> torch.Tensor:
    """At most `count` query rows, the first and the last among them, evenly apart. int64."""
    return torch.linspace(0, q_len - 1, min(count, q_len), dtype=torch.float64).round().long()


def reference_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, *, q_start: int, causal: bool = True
) -> torch.Tensor:
    """Attention of the query rows `rows` in float64, `[batch, q_heads, len(rows), head_dim]`, one kv head at a time."""
    batch, q_heads, _, head_dim = q.shape
    group = q_heads // k.shape[1]
    out = torch.empty(batch, q_heads, len(rows), head_dim, dtype=torch.float64)
    hidden = torch.arange(k.shape[2])[None, :] > (q_start + rows)[:, None]
    for b in range(batch):
        for kv_head in range(k.shape[1]):
            keys, values = k[b, kv_head].double(), v[b, kv_head].double()
            heads = slice(kv_head * group, (kv_head + 1) * group)
            scores = q[b, heads][:, rows].double() @ keys.T / math.sqrt(head_dim)
            if causal:
                scores.masked_fill_(hidden, -math.inf)
            out[b, heads] = torch.softmax(scores, -1) @ values
    return out


def measure(case: Case, rounds: int, clock: Clock | None = None) -> dict[str, Any]:
    """Run a case: one untimed round that warms up and is judged against float64, then `rounds` alternated ones.

    Returns a JSON-able record. `ratio` of a candidate is our rate over its rate; the case's `yardstick` names torch's
    fastest way to compute what was asked, and the case's `ratio` is against that.
    """
    clock = clock or Clock()
    errors = {call.name: _max_error(call, case) for call in case.calls}
    samplers: dict[str, Callable[[], float]] = {"limit": partial(case.limit.sample, clock)}
    for call in case.calls:
        samplers[call.name] = partial(seconds, call.run, clock)
    samples = alternate(samplers, rounds)
    limits = samples.pop("limit")
    limit = statistics.median(limits)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    rates = {call.name: call.work / medians[call.name] for call in case.calls}
    others = [call for call in case.calls if call.name != OURS]
    yardstick = max((call.name for call in others if call.yardstick), key=rates.__getitem__, default=None)
    void_above = case.limit.void_spread
    return {
        "name": case.name,
        "dtype": case.dtype,
        "shape": case.shape,
        "unit": case.unit,
        "limit": {
            "name": case.limit.name,
            "rate": limit / 1e9,
            "spread": spread(limits),
            "samples": [value / 1e9 for value in limits],
        },
        "void": void_above is not None and spread(limits) > void_above,
        "yardstick": yardstick,
        "ratio": rates[OURS] / rates[yardstick] if yardstick else None,
        "candidates": [
            {
                "name": call.name,
                "median_s": medians[call.name],
                "rate": rates[call.name] / 1e9,
                "fraction": rates[call.name] / limit,
                "ratio": rates[OURS] / rates[call.name],
                "max_error": errors[call.name],
                "samples_s": samples[call.name],
            }
            for call in case.calls
        ],
    }


def lines(record: dict[str, Any]) -> list[str]:
    """A record of `measure` as text: the case, then a line per candidate."""
    limit, unit = record["limit"], record["unit"]
    head = f"{record['name']}, {record['dtype']}  ({limit['name']} {limit['rate']:.1f} {unit}"
    out = ["", f"{head}, spread {limit['spread']:.2f}x)"]
    for one in record["candidates"]:
        ratio = "" if one["name"] == OURS else f"  ours {one['ratio']:.2f}x"
        mark = "  <- yardstick" if one["name"] == record["yardstick"] else ""
        out.append(
            f"  {one['name']:<44} {one['median_s'] * 1e3:10.3f} ms {one['rate']:9.2f} {unit}"
            f" {one['fraction'] * 100:6.1f}%  max error {one['max_error']:.1e}{ratio}{mark}"
        )
    if record["void"]:
        out.append(f"  VOID: raw read varied {limit['spread']:.2f}x (> {RAW_SPREAD_VOID}x): not one machine, ask again")
    return out


@contextlib.contextmanager
def reported(bench: str, threads: int | None, rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """A report to fill under `cases`, on `threads` threads, with the machine and what else it was doing."""
    from llama1m_ext import _core
    from llama1m_ext.env import collect

    with torch_threads(threads) as count:
        report: dict[str, Any] = {
            "bench": bench,
            "threads": count,
            "rounds": rounds,
            "clock": clock.name,
            "environment": collect(),
            "cases": [],
        }
        print(
            f"{bench}: {report['environment']['cpu']['model']}, ISA {_core.isa()}, {count} threads, torch "
            f"{torch.__version__}, medians of {rounds} alternated rounds, {clock.name} clock"
        )
        before = _busy_seconds()
        yield report
        after = _busy_seconds()
        if before is not None and after is not None:
            elapsed = after[0] - before[0]
            others = max(0.0, (after[1] - before[1]) / elapsed) if elapsed else 0.0
            report["other_cpus_busy"] = others
            print(f"\nother processes kept {others:.2f} of {os.cpu_count()} CPUs busy meanwhile")


def add(report: dict[str, Any], case: Case, clock: Clock) -> None:
    """Measure a case, print it, and put it into the report."""
    record = measure(case, report["rounds"], clock)
    report["cases"].append(record)
    print("\n".join(lines(record)), flush=True)


def chosen_clock(name: str, threads: int | None) -> Clock:
    """The clock named, with CPU time refused where it is not the time of a call."""
    if name == "cpu" and threads != 1:
        raise ValueError(f"clock: expected wall unless threads is 1, got cpu with threads={threads}")
    return Clock(name)


def chosen_dtypes(text: str) -> list[str]:
    """`"bf16,f32"` as names out of `DTYPES`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in DTYPES]
    if unknown or not names:
        raise ValueError(f"dtypes: expected some of {', '.join(DTYPES)}, got {text!r}")
    return names


def sizes(text: str, parts: int, what: str) -> list[tuple[int, ...]]:
    """`"512x4096,2048x4096"` as tuples of `parts` positive integers. An empty text is an empty list."""
    found = []
    for item in (item.strip() for item in text.split(",")):
        if not item:
            continue
        numbers = item.lower().split("x")
        if len(numbers) != parts or not all(number.isdigit() and int(number) > 0 for number in numbers):
            form = "x".join("N" * parts)
            raise ValueError(f"{what}: expected {form} with positive integers, comma-separated, got {item!r}")
        found.append(tuple(int(number) for number in numbers))
    return found


def _max_error(call: Call, case: Case) -> float:
    out = call.output(call.run())
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{call.name}: expected a Tensor, got {type(out).__name__}")
    got = out[:, :, case.rows].double()
    if got.shape != case.reference.shape:
        raise ValueError(f"{call.name}: expected rows of shape {tuple(case.reference.shape)}, got {tuple(got.shape)}")
    return float((got - case.reference).abs().max())


def _busy_seconds() -> tuple[float, float] | None:
    """(wall seconds, CPU seconds used by everything but this process, a stealing host included); None off Linux."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    everything = (user + nice + system + irq + softirq + steal) / ticks
    return time.perf_counter(), everything - time.process_time()
