"""The plan of a ring over many GPUs: which layout (head parallel x inner ring x outer ring), how long, how many bytes over which
kind of link, and why. Arithmetic over `_core.ring_topology`; no network and no GPU is asked.

Against the training of Llama-3-8B-Instruct-Gradient-1048k (its card's table; L40S at 170 TFLOP/s, 12 GB/s within a node, 2.4 GB/s a
link; `tests/python/test_plan_topology.py`) the model has the rough size, in tokens/s for each GPU, of a plain ring over one link a
node for 65k on 8 GPUs (1229; the card has 649) and 262k on 32 (112; 94), of a double ring over 4 links a node for 524k in 16 groups
of 32 (238; 224) and 1048k in groups of 64 (127; 314), and the direction: layered rings double what a GPU does from 262k to 524k.
Where it does not: at 65k the card's run took twice as long as any layout here (it kept weights or activations on the host, which is not
in the model); and the card's 1048k row is above its 524k row, 316 TFLOP/s of a GPU whose peak is 362, recomputation not counted: that fits
a batch of 8 (157 tokens/s), not the card's 16. The links' speeds, and which layout ran, are inferred: the card has neither.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan_shape import Shape

CARD = "gradientai/Llama-3-8B-Instruct-Gradient-1048k"
FLOPS = 400e12
"""What one GPU is taken to sustain where nobody says: about an H100, in bfloat16."""
LATENCY = 20e-6
"""Seconds of a message beside its bytes, where nobody says."""
_RATE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kKMGT]?)(i?)(b|bit|B)(?:/s|ps)?\s*")


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links.

    Attributes:
        nodes, gpus: GPUs of a node.
        intra: bytes/s that a GPU sends within its node.
        inter: bytes/s of one link of a node to the others.
        rails: such links of a node.
        latency: seconds of a message beside its bytes.
        flops: that a GPU sustains, FLOP/s.
        given: whether somebody said so; else `FLOPS`.
    """

    nodes: int
    gpus: int
    intra: float
    inter: float
    rails: int
    latency: float
    flops: float
    given: bool

    @property
    def size(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Way:
    """One layout for one sequence, of the whole model.

    Attributes:
        heads, inner, outer: the layout.
        seconds: of a sequence: a prefill, or a training step with recomputation.
        attention: of these, attention with what it waits for; all layers.
        compute: of these, attention itself.
        exchange: of these, exchanging heads.
        within, across: bytes that all GPUs of the sequence together send within nodes and across nodes, all layers.
        messages: that a GPU sends in one layer's forward pass.
        replication: KV heads held over those that there are.
    """

    heads: int
    inner: int
    outer: int
    seconds: float
    attention: float
    compute: float
    exchange: float
    within: int
    across: int
    messages: int
    replication: float

    @property
    def layout(self) -> tuple[int, int, int]:
        """(heads, inner, outer)."""
        return self.heads, self.inner, self.outer


@dataclass(frozen=True)
class Topology:
    """The plan. `str(plan)` is for people, `to_dict()` what JSON can hold.

    Attributes:
        model: its name; tokens: of a sequence; sequences: of a step; training: else a prefill.
        cluster: what it was made for.
        groups: of GPUs, each with a sequence of its own.
        chosen: the layout within a group.
        others: what it is compared with, by name.
        balance: largest over mean work of a rank of its ring, zigzag.
        seconds: of all sequences.
        why: the reason.
    """

    model: str
    shape: Shape
    tokens: int
    sequences: int
    training: bool
    cluster: Cluster
    groups: int
    chosen: Way
    others: dict[str, Way]
    balance: float
    seconds: float
    why: str

    @property
    def rate(self) -> float:
        """Tokens a second for each GPU."""
        return self.tokens * self.sequences / self.seconds / self.cluster.size

    def to_dict(self) -> dict[str, Any]:
        """Numbers and names."""
        return dataclasses.asdict(self) | {"tokens_per_second_per_gpu": self.rate}

    def __str__(self) -> str:
        from .plan_topology_report import lines

        return "\n".join(lines(self))


def rate(name: str, value: Any) -> float:
    """Bytes a second from a number or from "400Gb" (bits, 1000s), "900GB" (bytes, 1000s), "12GiB" (1024s), with "/s" or "ps" or without.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f'{name}: expected "400Gb" (bits a second) or "900GB" (bytes), got {value!r}')
    if isinstance(value, str):
        found = _RATE.fullmatch(value)
        if found is None:
            raise ValueError(f'{name}: expected "400Gb" (bits a second) or "900GB" (bytes), got {value!r}')
        number, prefix, binary, unit = found.groups()
        scale = (1024 if binary else 1000) ** " kMGT".index({"": " ", "K": "k"}.get(prefix, prefix))
        value = float(number) * scale / (1 if unit == "B" else 8)
    if not 1 <= value <= 1e21:
        raise ValueError(f"{name}: expected at least one byte a second, got {value!r}")
    return float(value)


def topology(
    nodes: int,
    gpus: int,
    *,
    inter: float | str,
    intra: float | str,
    model: Any = CARD,
    tokens: int = 1 << 20,
    sequences: int = 1,
    training: bool = False,
    rails: int = 1,
    flops: float | None = None,
    latency: float = LATENCY,
    dtype: Any = None,
    layout: tuple[int, int, int] | None = None,
) -> Topology:
    """Chooses how to lay sequences over GPUs.

    Args:
        nodes, gpus: GPUs of a node.
        inter: what one link of a node carries to other nodes, bytes/s or "400Gb"; intra: what a GPU sends within its node.
            Both in one direction while as much comes back: NVLink's "900 GB/s" counts the two together.
        model: as `llama1m_ext.plan` takes it.
        tokens: of a sequence.
        sequences: of a step; groups of GPUs take one each, at the same time, where that is faster.
        training: a training step (gradient checkpointing, weights gathered from all GPUs), not a prefill.
        rails: links of a node to other nodes.
        flops: that a GPU sustains; None: `FLOPS`.
        latency: seconds of a message beside its bytes.
        dtype: None: the model's.
        layout: (heads, inner, outer) instead of the fastest; the GPUs that it leaves take other sequences.

    Raises:
        TypeError, ValueError: an argument is none of these; the message names it.
    """
    from .plan_shape import shape_of

    for name, n in (("nodes", nodes), ("gpus", gpus), ("tokens", tokens), ("sequences", sequences), ("rails", rails)):
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"{name}: expected an int, got {n!r}")
        if n < 1:
            raise ValueError(f"{name}: expected a number from 1 on, got {n}")
    sustained = FLOPS if flops is None else float(flops)
    cluster = Cluster(
        nodes, gpus, rate("intra", intra), rate("inter", inter), rails, latency, sustained, flops is not None
    )
    name, shape = shape_of(model, dtype)
    ask = Ask(shape, tokens, training, cluster)

    best: tuple[float, int, list[Way]] | None = None
    for groups in _groups(cluster, sequences, layout):
        ways = ask.ways(groups)
        if layout is not None:
            ways = [way for way in ways if way.layout == tuple(layout)]
        if not ways:
            continue
        seconds = math.ceil(sequences / groups) * ways[0].seconds
        if best is None or seconds < best[0] * 0.999:
            best = seconds, groups, ways
    if best is None:
        raise ValueError(f"layout: expected one of {cluster.size} GPUs and {shape.heads} query heads, got {layout}")
    seconds, groups, ways = best
    chosen, others = ways[0], _others(ask.ways(groups), ask.part(groups))
    from . import _core

    balance = _core.ring_balance("zigzag", tokens, chosen.inner * chosen.outer)
    from .plan_topology_report import why as reason

    why = reason(ask, groups, chosen, others, layout is not None)
    return Topology(name, shape, tokens, sequences, training, cluster, groups, chosen, others, balance, seconds, why)


def _groups(cluster: Cluster, sequences: int, layout: tuple[int, int, int] | None) -> list[int]:
    """Numbers of groups: each has whole nodes, or a share of one."""
    found = [n for n in range(1, cluster.size + 1) if cluster.size % n == 0]
    whole = [n for n in found if cluster.nodes % n == 0 or (n % cluster.nodes == 0)]
    if layout is not None:
        return [n for n in whole if n * math.prod(layout) == cluster.size]
    return [n for n in whole if n <= sequences]


@dataclass(frozen=True)
class Ask:
    """One question for several clusters."""

    shape: Shape
    tokens: int
    training: bool
    cluster: Cluster

    def part(self, groups: int) -> Cluster:
        """The GPUs of one group."""
        c = self.cluster
        if c.nodes % groups == 0:
            return dataclasses.replace(c, nodes=c.nodes // groups)
        return dataclasses.replace(c, nodes=1, gpus=c.size // groups)

    def ways(self, groups: int, **other: float) -> list[Way]:
        """Every layout of a group, the best first.

        Args:
            other: fields of the cluster that are different.
        """
        from . import _core

        c, s = dataclasses.replace(self.part(groups), **other), self.shape  # type: ignore[arg-type]
        found = _core.ring_topology(
            nodes=c.nodes,
            gpus=c.gpus,
            intra=c.intra,
            inter=c.inter,
            rails=c.rails,
            latency=c.latency,
            flops=c.flops,
            length=self.tokens,
            q_heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            itemsize=s.size,
            training=self.training,
        )
        linear = s.linear_flops(self.tokens) * (4 if self.training else 1) / c.size / c.flops
        floor = self._gathered() if self.training else 0.0
        ways = []
        for d in found:
            # With checkpointing the forward pass runs twice.
            passes = [d["forward"], d["forward"], d["backward"]] if self.training else [d["forward"]]
            attention, compute, exchange = (
                s.layers * sum(p[key] for p in passes) for key in ("seconds", "compute", "exchange")
            )
            within, across = (s.layers * sum(p[key] for p in passes) for key in ("within", "across"))
            ways.append(
                Way(
                    d["heads"],
                    d["inner"],
                    d["outer"],
                    max(attention + linear, floor),
                    attention,
                    compute,
                    exchange,
                    within,
                    across,
                    d["messages"],
                    d["replication"],
                )
            )
        return ways

    def _gathered(self) -> float:
        """Seconds until weights came to every GPU twice, and their gradients went (ZeRO-3, FSDP): hidden, if work takes longer."""
        c = self.cluster
        if c.nodes > 1:
            return 3 * self.shape.weight_bytes * (c.nodes - 1) / c.nodes / (c.inter * c.rails)
        return 3 * self.shape.weight_bytes * (c.gpus - 1) / c.gpus / c.intra


def known_layouts(nodes: int, gpus: int) -> dict[str, tuple[int, int, int]]:
    """(heads, inner, outer) of what everybody knows, by name; heads may not be cut so.

    Args:
        gpus: of a node.
    """
    return {
        "plain ring": (1, nodes * gpus, 1),
        "double ring": (1, gpus, nodes),
        "heads within nodes": (gpus, 1, nodes),
        "heads alone": (nodes * gpus, 1, 1),
    }


def _others(ways: list[Way], part: Cluster) -> dict[str, Way]:
    """What everybody knows, beside the chosen one."""
    known = {way.layout: way for way in ways}
    named = known_layouts(part.nodes, part.gpus)
    return {name: known[layout] for name, layout in named.items() if layout in known}
