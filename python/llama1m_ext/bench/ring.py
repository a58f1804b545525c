"""Ring attention over slow links made real: network namespaces as nodes, and what layouts cost as the links between them slow down.

Measured are the layout that the planner picks (told what the machine does: FLOP/s of a rank while all compute, bytes/s within a node,
latency), the plain ring, the double ring, heads shared within nodes and over all ranks. A rank is a process with one thread; it has a
link of its own to other nodes where there are rails for it. Beside each time stands what hides nothing and wastes nothing: the longer
of the time without slow links and of what the busiest link carries.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import _core
from ..formats import KvFormat
from ..plan_topology import known_layouts, rate
from .attention import parse_heads
from .harness import DTYPES, Clock, alternate, reported, sizes
from .namespaces import Nodes

__all__ = ["PLAIN", "Plan", "plan", "run"]

PLAIN = "plain ring"
WAIT = 900.0
"""Seconds that an answer of a rank is waited for."""
QUICK = {"nodes": "2x2", "inter": "40Mb", "length": 512, "heads": "4x2x64", "rounds": 1}

Ways = tuple[int, int, int]
"""A layout: heads, inner, outer."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        nodes, ranks: nodes, and ranks of each.
        rails: links of a node.
        inter: bytes/s of a link, each.
        length: tokens of the sequence.
        heads: (q_heads, kv_heads, head_dim).
        dtype: "bf16", "f16", "f32".
        kv_format: of blocks on their way, as `Layout` takes it. The planner knows nothing of it.
        backward: the backward pass, too.
        rounds: alternated.
    """

    nodes: int
    ranks: int
    rails: int
    inter: tuple[float, ...]
    length: int
    heads: tuple[int, int, int]
    dtype: str
    kv_format: str
    backward: bool
    rounds: int


def plan(
    nodes: str = "4x2",
    rails: int = 2,
    inter: str = "1Gb,300Mb,100Mb,30Mb,10Mb",
    length: int = 4096,
    heads: str = "32x8x128",
    dtype: str = "bf16",
    kv_format: str = "model",
    backward: bool = False,
    rounds: int = 3,
    quick: bool = False,
) -> Plan:
    """Reads the options.

    Raises:
        ValueError: one of them is none.
    """
    if quick:
        nodes, inter, length, heads, rounds = (QUICK[name] for name in ("nodes", "inter", "length", "heads", "rounds"))  # type: ignore[assignment]
    found = sizes(nodes, 2, "nodes")
    if len(found) != 1 or not 2 <= found[0][0] <= 64 or not 1 <= found[0][0] * found[0][1] <= 128:
        raise ValueError(f"nodes: expected nodes x ranks, 2 to 64 nodes and 128 ranks at most, got {nodes!r}")
    if not 1 <= rails <= found[0][1]:
        raise ValueError(f"rails: expected 1 to {found[0][1]}, the ranks of a node, got {rails}")
    rates = tuple(rate("inter", one.strip()) for one in inter.split(",") if one.strip())
    if not rates:
        raise ValueError(f"inter: expected rates, comma-separated, got {inter!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if length < found[0][0] * found[0][1]:
        raise ValueError(f"length: expected at least a token for each rank, got {length}")
    form = KvFormat.parse(kv_format, "kv_format").name
    return Plan(found[0][0], found[0][1], rails, rates, length, parse_heads(heads), dtype, form, backward, rounds)


def run(plan: Plan) -> dict[str, Any]:
    """Measures, prints, and returns the report.

    Raises:
        namespaces.Unavailable: this machine can't make nodes.
        RuntimeError: a rank failed, or sent other bytes than predicted; the message says which.
    """
    with (
        Nodes(plan.nodes, plan.rails) as nodes,
        reported("ring", None, plan.rounds, Clock()) as report,
        _Ranks(plan, nodes) as ranks,
    ):
        machine = ranks.calibrated()
        report.update({"plan": _told(plan), "machine": machine})
        print(
            f"{plan.nodes} nodes of {plan.ranks} ranks with {plan.rails} links each, {plan.length} tokens, heads "
            f"{'x'.join(map(str, plan.heads))}, {plan.dtype}, blocks as {plan.kv_format}, {'forward and backward' if plan.backward else 'forward'}; a rank "
            f"while all compute: {machine['flops'] / 1e9:.1f} GFLOP/s, within a node {machine['intra'] / 1e9:.2f} GB/s, a message "
            f"{machine['latency'] * 1e6:.0f} us"
        )
        free: dict[Ways, float] = {}
        for inter in (None, *plan.inter):
            nodes.limit(inter)
            case = _case(plan, ranks, machine, inter, free)
            report["cases"].append(case)
            print("\n".join(_lines(case)), flush=True)
    return report


def known(plan: Plan) -> dict[str, Ways]:
    """Layouts that everybody knows, by name, where heads can be cut so."""
    named = known_layouts(plan.nodes, plan.ranks)
    return {name: ways for name, ways in named.items() if _fits(plan, ways[0])}


def ranked(plan: Plan, machine: dict[str, float], inter: float) -> list[tuple[Ways, float]]:
    """The planner's layouts, the best first, with the seconds that it expects."""
    q_heads, kv_heads, head_dim = plan.heads
    found = _core.ring_topology(
        nodes=plan.nodes,
        gpus=plan.ranks,
        intra=machine["intra"],
        inter=inter,
        rails=plan.rails,
        latency=machine["latency"],
        flops=machine["flops"],
        length=plan.length,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        itemsize=DTYPES[plan.dtype].itemsize,
        training=plan.backward,
    )
    return [
        (
            (one["heads"], one["inner"], one["outer"]),
            one["forward"]["seconds"] + (one["backward"]["seconds"] if plan.backward else 0.0),
        )
        for one in found
        if _fits(plan, one["heads"])
    ]


def _fits(plan: Plan, heads: int) -> bool:
    q_heads, kv_heads, _ = plan.heads
    return q_heads % heads == 0 and (kv_heads % heads == 0 or heads % kv_heads == 0)


def _case(
    plan: Plan, ranks: _Ranks, machine: dict[str, float], inter: float | None, free: dict[Ways, float]
) -> dict[str, Any]:
    """All layouts at one speed of the links; None: unlimited, which fills `free`."""
    expected = dict(ranked(plan, machine, 1e15 if inter is None else inter))
    chosen = next(iter(expected))
    names = {ways: name for name, ways in known(plan).items()}
    names.setdefault(chosen, "another")
    if inter is None:  # what any speed may choose is measured without limit, too
        for other in plan.inter:
            names.setdefault(ranked(plan, machine, other)[0][0], "another")
    calls: dict[Ways, list[dict[str, Any]]] = {ways: [] for ways in names}

    def sample(ways: Ways) -> float:
        answers = ranks.all(
            "call", heads=ways[0], inner=ways[1], outer=ways[2], kv_format=plan.kv_format, backward=plan.backward
        )
        calls[ways].append({"sent": [a["sent"] for a in answers], "waited": [a["waited"] for a in answers]})
        return float(max(a["end"] for a in answers) - min(a["begin"] for a in answers))

    for ways in names:
        sample(ways)  # warms up: connections, pages, schedules
    samples = alternate({str(ways): partial(sample, ways) for ways in names}, plan.rounds)
    candidates = []
    for ways, name in names.items():
        seconds = statistics.median(samples[str(ways)])
        if inter is None:
            free[ways] = seconds
        crossing, busiest = _crossing(plan, calls[ways][-1]["sent"])
        transfer = 0.0 if inter is None else busiest / inter
        bound = max(free.get(ways, 0.0), transfer)
        candidates.append(
            {
                "name": name,
                "layout": list(ways),
                "chosen": ways == chosen,
                "seconds": seconds,
                "expected_s": expected[ways],
                "samples_s": samples[str(ways)],
                "across_bytes": crossing,
                "busiest_link_bytes": busiest,
                "transfer_s": transfer,
                "free_s": free.get(ways),
                "over_bound": seconds / bound if bound else None,
                "waited_s": statistics.median(sum(c["waited"]) / len(c["waited"]) for c in calls[ways][1:]),
            }
        )
    plain = next(one["seconds"] for one in candidates if one["name"] == PLAIN)
    for one in candidates:
        one["speed_up"] = plain / one["seconds"]
    return {"inter": inter, "candidates": candidates}


def _crossing(plan: Plan, sent: list[dict[str, int]]) -> tuple[int, int]:
    """(bytes that cross nodes in all, those that the busiest link carries in one direction)."""
    links: dict[tuple[str, int, int], int] = {}
    total = 0
    for rank, of in enumerate(sent):
        for other, n in of.items():
            here, (there, place) = rank // plan.ranks, divmod(int(other), plan.ranks)
            if here == there:
                continue
            total += n
            rail = place % plan.rails  # a rank's address is on its own rail: that is where others send
            for end in (("out", here, rail), ("in", there, rail)):
                links[end] = links.get(end, 0) + n
    return total, max(links.values(), default=0)


def _lines(case: dict[str, Any]) -> Iterator[str]:
    inter = case["inter"]
    yield ""
    yield "links unlimited" if inter is None else f"links {inter * 8 / 1e6:,.0f} Mb/s"
    for one in case["candidates"]:
        layout = " x ".join(map(str, one["layout"]))
        bound = "" if inter is None else f"  {one['over_bound']:4.2f}x of what is possible"
        yield (
            f"  {one['name']:<18} {layout:<10} {one['seconds']:8.3f} s (expected {one['expected_s']:8.3f})  waited {one['waited_s']:7.3f} s  "
            f"busiest link {one['busiest_link_bytes'] / 1e6:7.2f} MB{bound}  {one['speed_up']:5.2f}x the plain ring"
            f"{'  <- planned' if one['chosen'] else ''}"
        )


def _told(plan: Plan) -> dict[str, Any]:
    q_heads, kv_heads, head_dim = plan.heads
    shape = {"length": plan.length, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    cluster = {"nodes": plan.nodes, "ranks_per_node": plan.ranks, "rails": plan.rails}
    return {**cluster, **shape, "dtype": plan.dtype, "kv_format": plan.kv_format, "backward": plan.backward}


class _Ranks:
    """The processes, one for each rank, on their nodes."""

    def __init__(self, plan: Plan, nodes: Nodes) -> None:
        self.plan, self.nodes = plan, nodes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="llama1m-ring-")

    def __enter__(self) -> _Ranks:
        p = self.plan
        try:
            for rank in range(p.nodes * p.ranks):
                node, place = divmod(rank, p.ranks)
                words = [sys.executable, "-m", "llama1m_ext.bench.ring_rank"]
                env = {
                    **os.environ,
                    "GLOO_SOCKET_IFNAME": self.nodes.interface(place % p.rails),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                }
                self._processes.append(
                    subprocess.Popen(
                        self.nodes.inside(node, words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
                    )
                )
            shape = {name: n for name, n in _told(p).items() if name in ("length", "q_heads", "kv_heads", "head_dim")}
            dtype = str(DTYPES[p.dtype]).removeprefix("torch.")
            store = str(Path(self._folder.name) / "store")
            told = {**shape, "dtype": dtype, "store": store, "world_size": len(self._processes)}
            orders = [
                {"do": "begin", "rank": r, "ranks_per_node": p.ranks, **told} for r in range(len(self._processes))
            ]
            self._ask(orders)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def all(self, do: str, **more: Any) -> list[dict[str, Any]]:
        """All ranks do the same; their answers, in order."""
        return self._ask([{"do": do, **more}] * len(self._processes))

    def calibrated(self) -> dict[str, float]:
        """What the planner is told of the machine: medians of three."""

        def of(do: str, key: str, **more: Any) -> float:
            return statistics.median(statistics.median(a[key] for a in self.all(do, **more)) for _ in range(4))

        self.nodes.limit(None)
        intra = of("within", "rate", size=8 << 20)
        return {"flops": of("alone", "flops"), "intra": intra or 1e9, "latency": of("latency", "latency", rounds=20)}

    def close(self) -> None:
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        deadline = time.monotonic() + 5
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []
        self._folder.cleanup()

    def _ask(self, orders: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for process, order in zip(self._processes, orders, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its answer says so
                process.stdin.write((json.dumps(order) + "\n").encode())
                process.stdin.flush()
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + WAIT
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    silent = sorted(set(range(len(self._processes))) - set(answers))
                    raise RuntimeError(f"{orders[0]['do']}: no answer of ranks {silent} within {WAIT:g} s")
                for key, _ in ready:
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    answers[key.data] = json.loads(line) if line else {"error": "it died"}
                    waiting.unregister(key.fileobj)
                    if "error" in answers[key.data]:
                        raise RuntimeError(f"rank {key.data}: {orders[0]['do']}: {answers[key.data]['error']}")
        return [answers[rank] for rank in range(len(self._processes))]
