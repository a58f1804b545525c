"""Schedules of rings, as Python sees them: pieces run through `ops.attention` and merged are the whole, and bad arguments are
errors. `tests/ring.rs` has every pair and every message."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from llama1m_ext import _core, ops

SHARDINGS = ["contiguous", "zigzag", "striped"]


def positions(sharding: str, length: int, ranks: int, rank: int) -> list[int]:
    return [p for run in _core.ring_shard(sharding, length, ranks, rank) for p in range(*run)]


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("length", [0, 1, 4, 7, 10, 1000])
def test_shards_partition_the_sequence(sharding: str, length: int):
    for ranks in (1, 2, 3, 5, 8):
        held = [positions(sharding, length, ranks, rank) for rank in range(ranks)]
        assert sorted(p for shard in held for p in shard) == list(range(length))
        assert all(shard == sorted(shard) for shard in held)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("documents", [None, [0, 1, 40, 41, 90]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("inner, outer, length", [(1, 1, 33), (3, 1, 127), (2, 2, 130), (2, 3, 101), (1, 4, 97)])
def test_merged_pieces_are_the_whole(
    sharding: str, documents: list[int] | None, causal: bool, inner: int, outer: int, length: int
):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(1, 4, length, 16, generator=generator)
    k, v = (torch.randn(1, 2, length, 16, generator=generator) for _ in range(2))
    starts = [0] if documents is None else [d for d in documents if d < length]

    order = torch.arange(length)
    document = torch.bucketize(order, torch.tensor(starts), right=True)
    seen = document[:, None] == document
    if causal:
        seen &= order[:, None] >= order
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT / 4
    whole = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double().repeat_interleave(2, 1)

    given = None if documents is None else starts
    ranks = inner * outer
    for rank in range(ranks):
        own = positions(sharding, length, ranks, rank)
        out, lse = torch.zeros(1, 4, len(own), 16), torch.full((1, 4, len(own)), -torch.inf)
        for _, source, needed, pieces, *_ in _core.ring_schedule(sharding, length, inner, outer, rank, causal, given):
            assert needed == bool(pieces)
            theirs = positions(sharding, length, ranks, source)
            for q_lo, q_hi, k_lo, k_hi, masked, q_start in pieces:
                mine, keys = own[q_lo:q_hi], theirs[k_lo:k_hi]
                part = ops.attention(
                    q[:, :, mine], k[:, :, keys], v[:, :, keys], causal=masked, q_start=q_start, return_lse=True
                )
                rows = slice(q_lo, q_hi)
                out[:, :, rows], lse[:, :, rows] = ops.merge_partials(
                    [out[:, :, rows].clone(), part[0]], [lse[:, :, rows].clone(), part[1]]
                )
        torch.testing.assert_close(out.double(), whole[:, :, own], atol=2e-6, rtol=1e-5)


def test_bytes_are_counted_for_each_rank_and_kind_of_link():
    # Two nodes of two ranks, 25 tokens each; a token's keys and values take 8 bytes, its gradients 16.
    plain = _core.ring_bytes("striped", 100, 4, 1, per_node=2, kv_bytes=8, gradient_bytes=16)
    # Ranks 0 and 2 send to their own node, 1 and 3 to the other; the last one returns a sum to whom it belongs: its successor.
    assert plain == [(600, 0, 1800, 0), (0, 600, 0, 1800)] * 2
    double = _core.ring_bytes("striped", 100, 2, 2, per_node=2, kv_bytes=8, gradient_bytes=16)
    assert double == [(400, 200, 1200, 600)] * 4
    assert sum(row[1] for row in double) < sum(row[1] for row in plain)


def test_a_block_stops_where_nobody_needs_it():
    steps = [_core.ring_schedule("contiguous", 64, 4, 1, rank) for rank in range(4)]
    assert [s[5] for s in steps[0]] == [1, None, None, None]
    assert [s[5] for s in steps[3]] == [None] * 4  # nobody sees the last keys but their own rank; the others end here
    assert [s[4] for s in steps[3]] == [None, 2, 2, 2]
    assert all(s[4] is None and not s[2] for s in steps[0][1:])


@pytest.mark.parametrize("sharding", ["zigzag", "striped"])
def test_causal_work_is_even(sharding: str):
    begin = time.process_time()
    for ranks in (2, 8, 512):
        assert 1 <= _core.ring_balance(sharding, ranks << 16, ranks) < 1.01
        assert _core.ring_balance("contiguous", ranks << 16, ranks) == pytest.approx(2 - 1 / ranks, abs=1e-4)
    assert _core.ring_balance(sharding, 1 << 20, 512) < 1.01
    _core.ring_schedule(sharding, 1 << 20, 8, 64, 511)
    _core.ring_bytes(sharding, 1 << 20, 8, 64, per_node=8, kv_bytes=4096)
    assert time.process_time() - begin < 2


def test_lengths_to_2_to_the_40():
    assert _core.ring_shard("zigzag", 2**40, 4096, 4095) == [(2**39 - 2**27, 2**39 + 2**27, 1)]
    most = _core.ring_bytes("zigzag", 2**40, 4, 2, per_node=4, kv_bytes=2**64 - 1, gradient_bytes=2**64 - 1)
    assert most[0][1] == 2**37 * (2**64 - 1)
    pieces = [p for s in _core.ring_schedule("zigzag", 2**40, 4, 2, 7) for p in s[3]]
    assert max(p[3] for p in pieces) == 2**37


SCHEDULE: dict[str, object] = {"sharding": "zigzag", "length": 64, "inner": 2, "outer": 2, "rank": 0}


@pytest.mark.parametrize(
    "function, wrong, error, says",
    [
        (_core.ring_schedule, {"sharding": "zebra"}, ValueError, "sharding: expected contiguous, zigzag or striped, got \"zebra\""),
        (_core.ring_schedule, {"length": -1}, ValueError, "length: expected .*, got -1"),
        (_core.ring_schedule, {"length": 2**40 + 1}, ValueError, f"length: expected 0 to 2.40, got {2**40 + 1}"),
        (_core.ring_schedule, {"length": 10**30}, ValueError, "length: expected .*, got 1000"),
        (_core.ring_schedule, {"length": 1.5}, TypeError, "length: expected an int, got float"),
        (_core.ring_schedule, {"inner": 0}, ValueError, "inner: expected 1 to 4096, got 0"),
        (_core.ring_schedule, {"outer": 5000}, ValueError, "outer: expected 1 to 4096, got 5000"),
        (_core.ring_schedule, {"inner": 4096, "outer": 4096}, ValueError, "inner x outer: expected at most 4096"),
        (_core.ring_schedule, {"rank": 4}, ValueError, "rank: expected 0 to 3 of 4 ranks, got 4"),
        (_core.ring_gradients, {"rank": -1}, ValueError, "rank: expected .*, got -1"),
        (_core.ring_schedule, {"documents": []}, ValueError, "documents: expected start positions"),
        (_core.ring_schedule, {"documents": [1]}, ValueError, r"documents\[0\]: expected 0"),
        (_core.ring_schedule, {"documents": [0, 9, 8]}, ValueError, r"documents\[2\]: expected a position after 9"),
        (_core.ring_schedule, {"documents": [0, 64]}, ValueError, r"documents\[1\]: expected a position below length=64, got 64"),
        (_core.ring_schedule, {"documents": [0, "a"]}, TypeError, r"documents\[1\]: expected an int, got str"),
    ],
)  # fmt: skip
def test_wrong_arguments(function: Callable[..., object], wrong: dict[str, object], error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        function(**{**SCHEDULE, **wrong})


def test_wrong_arguments_of_the_others():
    with pytest.raises(ValueError, match="ranks: expected 1 to 4096, got 0"):
        _core.ring_shard("striped", 8, 0, 0)
    with pytest.raises(ValueError, match="ranks: expected 1 to 4096, got 4097"):
        _core.ring_balance("striped", 8, 4097)
    with pytest.raises(ValueError, match="per_node: expected at least 1 rank, got 0"):
        _core.ring_bytes("striped", 8, 2, 2, per_node=0, kv_bytes=1)
    with pytest.raises(ValueError, match=r"kv_bytes: expected .*, got -5"):
        _core.ring_bytes("striped", 8, 2, 2, per_node=1, kv_bytes=-5)
    with pytest.raises(ValueError, match="documents: expected few enough for 4194304 pieces"):
        _core.ring_schedule("striped", 1 << 23, 512, 1, 511, True, range(0, 1 << 23, 512))
