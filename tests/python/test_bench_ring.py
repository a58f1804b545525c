"""Ring attention over links that are slow: the bench's parts by hand, and all of it over network namespaces where these can be made."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama1m_ext.bench import namespaces, ring
from llama1m_ext.cli import app

MACHINE = {"flops": 1e12, "intra": 1e9, "latency": 1e-4}


@pytest.fixture(scope="module")
def nodes():
    """Skips where there is no way: in a container without CAP_NET_ADMIN whose user namespaces are forbidden, and outside Linux."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(namespaces.Nodes(2, 2))
            made.limit(1e6)
        except namespaces.Unavailable as e:
            pytest.skip(f"no network namespaces on this machine: {e}")
        yield made


TRAFFIC = """
import socket, sys, time
where = ("10.77.%s.1" % sys.argv[2], 5000)
if sys.argv[1] == "serve":
    with socket.create_server(where) as server:
        print("ready", flush=True)
        link, _ = server.accept()
        n, begin = 0, None
        while got := link.recv(1 << 20):
            begin = begin or time.monotonic()
            n += len(got)
        print(n / (time.monotonic() - begin), flush=True)
else:
    with socket.create_connection(where) as link:
        link.sendall(bytes(int(sys.argv[3])))
"""


def carried(nodes: namespaces.Nodes, rail: int, size: int) -> float:
    """Bytes/s from the second node to the first."""
    words = [sys.executable, "-c", TRAFFIC]
    server = subprocess.Popen(nodes.inside(0, [*words, "serve", str(rail)]), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        subprocess.run(nodes.inside(1, [*words, "send", str(rail), str(size)]), check=True, timeout=60)
        return float(server.stdout.readline())
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def lives(pid: int) -> bool:
    """Whether a process does; one that has ended may wait for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def assert_all_end(script: str, count: int, within: float, after: float = 0.0) -> None:
    """The processes whose numbers a script prints end within so many seconds after it is killed, `after` seconds from then."""
    maker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    pids = [int(pid) for pid in maker.stdout.readline().split()]
    assert len(pids) == count
    time.sleep(after)
    maker.kill()
    maker.wait()
    maker.stdout.close()
    deadline = time.monotonic() + within
    while any(map(lives, pids)):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.05)


def test_links_carry_what_they_are_told(nodes):
    nodes.limit(1e6)
    slow = [carried(nodes, rail, 1_500_000) for rail in (0, 1)]
    assert all(0.6e6 < rate < 1.1e6 for rate in slow), slow
    nodes.limit(None)
    assert carried(nodes, 0, 4_000_000) > 4e6
    with pytest.raises(namespaces.Unavailable, match="qdisc"):
        nodes._run(1, [namespaces._found("tc"), "qdisc", "add", "dev", "none", "root", "pfifo"])


def test_namespaces_end_with_their_maker(nodes):
    """Even with one that is killed: nothing is left on the machine."""
    script = "import time; from llama1m_ext.bench.namespaces import Nodes; n = Nodes(2, 1).__enter__()\n"
    script += "print(*[h.pid for h in n._holders], flush=True); time.sleep(60)"
    assert_all_end(script, 3, within=10.0)


def test_no_programs_no_nodes(monkeypatch):
    monkeypatch.setattr(namespaces, "_program", lambda name: None)
    with pytest.raises(namespaces.Unavailable, match="got no ip, tc, unshare, nsenter"), namespaces.Nodes(2, 1):
        pass
    answer = CliRunner().invoke(app, ["bench", "ring", "--quick"])
    assert answer.exit_code == 1
    assert "can't make nodes of network namespaces: expected the programs" in answer.output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": "4"}, "nodes: expected NxN"),
        ({"nodes": "1x4"}, "nodes: expected nodes x ranks, 2 to 64"),
        ({"rails": 3}, "rails: expected 1 to 2, the ranks of a node, got 3"),
        ({"inter": "fast"}, "inter: expected"),
        ({"inter": ","}, "inter: expected rates"),
        ({"dtype": "f64"}, "dtype: expected one of bf16"),
        ({"kv_format": "int7"}, "kv_format: expected"),
        ({"length": 7}, "length: expected at least a token for each rank, got 7"),
        ({"heads": "3x2x64"}, "heads"),
    ],
)
def test_wrong_options(wrong, said):
    with pytest.raises(ValueError, match=said):
        ring.plan(**wrong)


def test_layouts_are_those_that_heads_allow():
    assert ring.known(ring.plan()) == {
        "plain ring": (1, 8, 1),
        "double ring": (1, 2, 4),
        "heads within nodes": (2, 1, 4),
        "heads alone": (8, 1, 1),
    }
    assert list(ring.known(ring.plan(heads="6x3x64"))) == ["plain ring", "double ring"]
    plan = ring.plan(heads="6x3x64")
    assert all(ways[0] in (1,) for ways, _ in ring.ranked(plan, MACHINE, 1e6))


def test_the_planner_leaves_slow_links_to_few():
    """Where links bind, it takes a layout that uses all of them; where nothing binds, fewest bytes and messages decide."""
    plan = ring.plan()
    slow = dict(ring.ranked(plan, MACHINE, 1e6))
    assert next(iter(slow)) in ((1, 2, 4), (2, 1, 4))
    assert slow[(1, 8, 1)] > 2 * next(iter(slow.values()))


def test_the_busiest_link_by_hand():
    plan = ring.plan(nodes="2x2")
    # Rank 0 to its neighbour, and to both ranks of the other node; rank 3 back to rank 1.
    sent = [{"1": 5, "2": 10, "3": 1}, {}, {}, {"1": 3}]
    assert ring._crossing(plan, sent) == (14, 10)
    assert ring._crossing(ring.plan(nodes="2x2", rails=1), sent) == (14, 11)
    assert ring._crossing(plan, [{}] * 4) == (0, 0)


def test_measured_over_slow_links(nodes, tmp_path):
    """Two nodes of two ranks: one block over each of two links, not three over one of them."""
    words = [
        "bench",
        "ring",
        "--nodes",
        "2x2",
        "--length",
        "512",
        "--heads",
        "4x2x64",
        "--inter",
        "4Mb",
        "--rounds",
        "2",
    ]
    words += [
        "--backward",
        "--kv-format",
        "int8",
        "--json",
        str(tmp_path / "out.json"),
        "--plot",
        str(tmp_path / "out.png"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "llama1m_ext", *words], capture_output=True, encoding="utf-8", timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    free, slow = report["cases"]
    assert (free["inter"], slow["inter"]) == (None, 0.5e6)
    of = {one["name"]: one for one in slow["candidates"]}
    (chosen,) = (one for one in slow["candidates"] if one["chosen"])
    plain = of["plain ring"]
    # Forward and backward: a block is 128 rows of keys and values, 2 heads of 64, in int8 with their scales and offsets in float16,
    # for each channel of 64 keys and each value; gradients are float32.
    block = 128 * 2 * 2 * 64
    sides = block + 2 * 2 * (2 * 64 + 128) * 2
    assert plain["busiest_link_bytes"] == 3 * (2 * sides + 4 * block), plain
    assert chosen["layout"] in ([1, 2, 2], [2, 1, 2])
    assert chosen["busiest_link_bytes"] * 2 < plain["busiest_link_bytes"]
    assert plain["seconds"] > 0.8 * plain["transfer_s"], "links are as slow as they were told to be"
    assert chosen["speed_up"] > 1.3
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "<- planned" in done.stdout


def test_a_rank_that_fails_is_named(nodes):
    with ring._Ranks(ring.plan(quick=True), nodes) as ranks:
        ranks._processes[1].kill()
        with pytest.raises(RuntimeError, match=r"rank 1: latency: it died|rank [023]: latency: \w+Error: .*peer"):
            ranks.all("latency", rounds=1)


def test_ranks_end_with_the_bench(nodes):
    """Killed while its ranks wait for each other: nobody goes on waiting."""
    script = "from llama1m_ext.bench import ring, namespaces\n"
    script += "with namespaces.Nodes(2, 2) as nodes, ring._Ranks(ring.plan(quick=True), nodes) as ranks:\n"
    script += "    print(*[p.pid for p in ranks._processes], flush=True)\n"
    script += "    nodes.limit(1000)\n"
    script += "    ranks.all('call', heads=1, inner=4, outer=1, kv_format='model', backward=False)\n"
    assert_all_end(script, 4, within=20.0, after=2.0)
