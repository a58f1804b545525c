"""The plan for many GPUs: the model card's table, the choice against every other layout, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama1m_ext import _core, plan_topology
from llama1m_ext.cli import app
from llama1m_ext.plan_topology import CARD, rate, topology

L40S = {"intra": "12GB", "inter": "2.4GB", "flops": 170e12, "training": True}
"""What an L40S sustains in attention, its PCIe, and a link of a node: shared/facts/science.md section 5."""


def card(nodes: int, tokens: int, layout: tuple[int, int, int], rails: int = 1, sequences: int = 1):
    return topology(nodes, 8, tokens=tokens, layout=layout, rails=rails, sequences=sequences, **L40S)


def test_the_card_s_table():
    # tokens/s for each GPU: the card's tokens over minutes and GPUs; 1048k with the batch of 8 that fits the GPU's peak.
    seen = {
        65: 62914560 / 202 / 60 / 8,
        262: 100663296 / 555 / 60 / 32,
        524: 419430400 / 61 / 60 / 512,
        1048: 419430400 / 87 / 60 / 512,
    }
    made = {
        65: card(1, 1 << 16, (1, 8, 1)),
        262: card(4, 1 << 18, (1, 32, 1)),
        524: card(64, 1 << 19, (1, 8, 4), rails=4, sequences=16),
        1048: card(64, 1 << 20, (1, 8, 8), rails=4, sequences=8),
    }
    assert made[524].groups == 16 and made[1048].groups == 8
    got = {stage: plan.rate for stage, plan in made.items()}
    print({stage: (round(seen[stage]), round(got[stage])) for stage in seen})
    # The size: within a third, but for 65k, whose run did what this model does not know of.
    for stage in (262, 524, 1048):
        assert 2 / 3 < got[stage] / seen[stage] < 3 / 2, (stage, got[stage], seen[stage])
    assert 1.5 < got[65] / seen[65] < 2.5
    # The direction: 262k is slowest for its length; layered parallelism doubles what a GPU does; 1048k costs more a token.
    assert got[65] > got[524] > got[262]
    assert got[524] / got[262] == pytest.approx(seen[524] / seen[262], rel=0.25)
    assert got[524] > got[1048] and seen[524] > seen[1048]
    # The same stages in a plain ring over one link of each node: no gain at all.
    plain = card(64, 1 << 19, (1, 32, 1), rails=4, sequences=16)
    assert plain.rate < got[262] * 1.05


def test_the_text_says_what_the_table_gives():
    told = str(topology(2, 8, inter="400Gb", intra="900GB")), plan_topology.__doc__ or ""
    for plan in (
        card(4, 1 << 18, (1, 32, 1)),
        card(4, 1 << 19, (1, 8, 4), rails=4),
        card(8, 1 << 20, (1, 8, 8), rails=4),
        card(1, 1 << 16, (1, 8, 1)),
    ):
        assert all(f"{plan.rate:.0f}" in text for text in told), plan.rate
    assert all("649" in text and "94" in text and "224" in text and "314" in text for text in told)


@pytest.mark.parametrize("nodes, gpus, rails, sequences, training", [(4, 8, 1, 1, False), (2, 4, 4, 1, True), (8, 2, 1, 4, True), (1, 8, 1, 16, False), (3, 4, 2, 3, False)])  # fmt: skip
def test_nothing_else_is_faster(nodes: int, gpus: int, rails: int, sequences: int, training: bool):
    where = {"inter": "10Gb", "intra": "64GB", "rails": rails, "training": training, "tokens": 1 << 17, "flops": 1e14}
    best = topology(nodes, gpus, sequences=sequences, **where)
    tried = 0
    for heads in (1, 2, 4, 8, 16, 32):
        for inner in range(1, nodes * gpus + 1):
            for outer in range(1, nodes * gpus + 1):
                try:
                    other = topology(nodes, gpus, sequences=sequences, layout=(heads, inner, outer), **where)
                except ValueError:
                    continue
                if other.groups <= sequences:
                    tried += 1
                    assert best.seconds <= other.seconds * 1.021, (best.chosen.layout, other.chosen.layout)
    assert tried > 5


def test_groups_take_a_sequence_each():
    one = topology(8, 8, inter="100Gb", intra="64GB", tokens=1 << 18)
    many = topology(8, 8, inter="100Gb", intra="64GB", tokens=1 << 18, sequences=8)
    assert one.groups == 1 and many.groups > 1
    assert many.rate > one.rate
    assert many.chosen.heads * many.chosen.inner * many.chosen.outer * many.groups == 64


def test_kv_heads_held_more_than_once_are_counted():
    ways = _core.ring_topology(
        nodes=1, gpus=32, intra=1e10, inter=1e9, rails=1, latency=0.0, flops=1e14,
        length=1 << 15, q_heads=32, kv_heads=8, head_dim=128, itemsize=2,
    )  # fmt: skip
    at = {way["heads"]: way for way in ways if way["outer"] == 1}
    assert [at[h]["replication"] for h in (1, 8, 16, 32)] == [1, 1, 2, 4]
    # 31 other places; 1024 tokens of one q head, k and v there, one head of out back.
    assert at[32]["forward"]["within"] == 32 * 31 * 1024 * 128 * 2 * (1 + 2 + 1)


@pytest.mark.parametrize(
    "value, expected",
    [("400Gb", 50e9), ("400 Gbit/s", 50e9), ("900GB", 900e9), ("900GB/s", 900e9), ("1.5GiB", 1.5 * 2**30), ("10Gbps", 1.25e9), ("5kB", 5e3), (12.5e9, 12.5e9)],
)  # fmt: skip
def test_rates(value: object, expected: float):
    assert rate("inter", value) == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong, error, says",
    [
        ({"inter": "fast"}, ValueError, 'inter: expected "400Gb"'),
        ({"inter": None}, TypeError, "inter: expected"),
        ({"intra": 0}, ValueError, "intra: expected at least one byte"),
        ({"nodes": 0}, ValueError, "nodes: expected a number from 1 on, got 0"),
        ({"nodes": 1 << 15}, ValueError, "nodes x gpus: expected at most 32768 GPUs"),
        ({"tokens": 2.5}, TypeError, "tokens: expected an int, got 2.5"),
        ({"tokens": 2**41}, ValueError, "length: expected 1 to 2.40"),
        ({"latency": -1.0}, ValueError, "latency: expected 0 to 3600 seconds, got -1"),
        ({"flops": float("nan")}, ValueError, "flops: expected a rate"),
        ({"layout": (3, 1, 1)}, ValueError, r"layout: expected one of 16 GPUs and 32 query heads, got \(3, 1, 1\)"),
    ],
)
def test_what_is_refused(wrong: dict[str, object], error: type[Exception], says: str):
    arguments: dict[str, object] = {"nodes": 2, "gpus": 8, "inter": "400Gb", "intra": "900GB", **wrong}
    with pytest.raises(error, match=says):
        topology(**arguments)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path):
    file = tmp_path / "plan.json"
    command = ["plan", "--nodes", "64", "--gpus", "8", "--inter", "400Gb", "--intra", "900GB", "--json", str(file)]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    made = json.loads(file.read_text(encoding="utf-8"))
    chosen = made["chosen"]
    assert chosen["heads"] * chosen["inner"] * chosen["outer"] == 512 and made["model"] == CARD
    layout = f"head parallel {chosen['heads']} x inner ring {chosen['inner']} x outer ring {chosen['outer']}"
    for words in (layout, "balance: 1.0", "plain ring", "across nodes", "Why: ", "64 nodes x 8 GPUs", "1 x 50.0 GB/s"):
        assert words in said.output
    assert made["tokens_per_second_per_gpu"] == pytest.approx((1 << 20) / made["seconds"] / 512)
    # Every node needs the blocks of the others once, whatever the layout.
    assert chosen["across"] == 32 * 63 * (1 << 20) * 8 * 128 * 2 * 2


def test_the_command_refuses():
    run = CliRunner().invoke
    assert "inter: expected" in run(app, ["plan", "--nodes", "2", "--inter", "fast"]).output.replace("\n", " ")
    said = run(app, ["plan"])
    assert said.exit_code == 2 and "--nodes" in said.output
