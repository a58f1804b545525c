"""What a plan for many GPUs says: the table, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan_topology import Ask, Topology, Way


def why(ask: Ask, groups: int, chosen: Way, others: dict[str, Way], given: bool) -> str:
    """The reason, as a sentence of clauses.

    Args:
        ask: the question; groups: what was chosen first.
        others: layouts that it is compared with.
        given: whether somebody chose the layout.
    """
    shares = chosen.compute / chosen.seconds, chosen.exchange / chosen.seconds
    waits = max(0.0, chosen.attention - chosen.compute - chosen.exchange) / chosen.seconds
    said = [
        "the layout was given"
        if given
        else "no other layout is faster by more than 2%, and of those within 2% it sends the fewest bytes across nodes, "
        "then the fewest messages"
    ]
    if waits + shares[1] < 0.02:
        said.append(f"attention takes {shares[0]:.0%} of the time and hides the transfers")
    else:
        # Which link it is: the one whose speed would shorten this very layout most.
        def faster(**other: float) -> float:
            same = next(way for way in ask.ways(groups, **other) if way.layout == chosen.layout)
            return chosen.seconds - same.seconds

        part = ask.part(groups)
        gains = {
            "links across nodes": faster(inter=1e21),
            "links within a node": faster(intra=1e21),
            "the latency of messages": faster(latency=0.0),
        }
        what = max(gains, key=lambda name: gains[name]) if max(gains.values()) > 0 else "links"
        if part.nodes == 1 and what == "links across nodes":
            what = "links within a node"
        said.append(
            f"attention takes {shares[0]:.0%} of the time, waiting for blocks {waits:.0%}, exchanging heads "
            f"{shares[1]:.0%}; what binds is {what}"
        )
    for name, way in others.items():
        if way.layout == chosen.layout:
            said.append(f"it is the {name}" if name.endswith("ring") else f"it is {name}")
            continue
        times, more = way.seconds / chosen.seconds, way.across / chosen.across if chosen.across else 1.0
        sent = "" if abs(more - 1) < 0.005 else f" and sends {more:.2f} times as much across nodes"
        said.append(f"{name} ({' x '.join(map(str, way.layout))}) would take {times:.2f} times as long{sent}")
    if "heads alone" not in others:
        size = ask.part(groups).size
        said.append(f"heads alone cannot fill {size} GPUs: {ask.shape.heads} query heads, cut evenly, whole nodes")
    if chosen.replication > 1:
        said.append(f"{chosen.heads} shares of {ask.shape.kv_heads} KV heads hold each {chosen.replication:.2f} times")
    return "; ".join(said)


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if n < 1000 or unit == "PB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def lines(p: Topology) -> list[str]:
    """The plan as people read it."""
    from .plan import _seconds

    c, way = p.cluster, p.chosen
    what = "training step" if p.training else "prefill"
    several = f" x {p.sequences} sequences" if p.sequences > 1 else ""
    assumed = "as given" if c.given else "assumed: --gpu-tflops says another"
    found = [
        f"{p.model}: {what} of {p.tokens:,} tokens{several}, in {p.shape.dtype}",
        f"{c.nodes} nodes x {c.gpus} GPUs: {_size(c.intra)}/s within a node for each GPU, {c.rails} x {_size(c.inter)}/s across for "
        f"each node, {c.latency * 1e6:.0f} us a message, {c.flops / 1e12:.0f} TFLOP/s sustained ({assumed})",
        "",
        f"layout: head parallel {way.heads} x inner ring {way.inner} x outer ring {way.outer}"
        + (f", {p.groups} groups side by side" if p.groups > 1 else ""),
        f"balance: {p.balance:.4f} (zigzag; largest over mean work of {way.inner * way.outer} ranks)",
        "",
        f"  {'':<20}{'heads x inner x outer':>22}{'one sequence':>14}{'attention':>12}{'within nodes':>14}{'across nodes':>14}{'messages':>10}",
    ]
    for name, one in {"chosen": way, **p.others}.items():
        found.append(
            f"  {name:<20}{' x '.join(map(str, one.layout)):>22}{_seconds(one.seconds):>14}{_seconds(one.attention):>12}"
            f"{_size(one.within):>14}{_size(one.across):>14}{one.messages:>10}"
        )
    part = c.size // p.groups
    found += [
        f"  (bytes: of the {part} GPUs of a sequence together, all layers; messages: of a GPU, in one layer's forward pass)",
        "",
        f"{_seconds(p.seconds)} in all, {p.rate:.0f} tokens/s for each GPU.",
        f"Why: {p.why}.",
        "An estimate. Not in it: memory, other traffic, kernels that are slower at short lengths. Against the model card's training table (L40S)",
        "it gives 112, 238 and 127 tokens/s for each GPU at 262k, 524k and 1048k, where the card has 94, 224 and 314 (157, if its batch was 8: 314 is",
        "beyond the GPU's peak); and 1229 at 65k, where the card has 649 (its run kept things on the host).",
    ]
    return found
