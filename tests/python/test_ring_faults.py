"""Ranks that differ, die or hang: every other one raises, and says who and what, within the timeout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ring_faults
from crew import Crew, crew
from llama1m_ext.ring import Layout, ring_attention


@pytest.fixture(scope="module")
def three() -> Iterator[Crew]:
    made = Crew(3)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("layouts", "calls", "shapes", "said"),
    [
        ({}, {"causal": False}, {}, "causal: False on rank 1; True on ranks 0, 2"),
        ({}, {"softmax_scale": 0.5}, {}, "softmax_scale: 0.5 on rank 1; None on ranks 0, 2"),
        ({}, {"documents": [0, 7]}, {}, "documents: (0, 7) on rank 1; None on ranks 0, 2"),
        ({}, {"kv_start": 3}, {}, "kv_start: [3] on rank 1; None on ranks 0, 2"),
        ({}, {"length": 48}, {}, "length: 48 on rank 1; None on ranks 0, 2"),
        ({}, {}, {"dtype": torch.bfloat16}, "dtype: torch.bfloat16 on rank 1; torch.float32 on ranks 0, 2"),
        ({}, {}, {"kv_heads": 4}, "kv_heads: 4 on rank 1; 2 on ranks 0, 2"),
        ({"sharding": "striped"}, {}, {}, "sharding: 'striped' on rank 1; 'zigzag' on ranks 0, 2"),
        ({"outer": 3}, {}, {}, "inner: 1 on rank 1; 3 on ranks 0, 2"),
        ({"kv_format": "int8"}, {}, {}, "kv_format: 'int8' on rank 1; 'model' on ranks 0, 2"),
    ],
)
def test_ranks_that_differ(three, layouts, calls, shapes, said):
    for (kind, text, seconds), shape, sent in three.run(3, ring_faults.differing, 1, layouts, calls, shapes):
        assert kind == "DisagreementError" and said in text, text
        assert seconds < 20 and shape == (1, 4, 16, 16) and sent == {}


@pytest.mark.parametrize(
    ("calls", "shapes", "kind", "said"),
    [
        ({}, {"dtype": torch.float64}, "TypeError", "q: expected float32, bfloat16 or float16, got torch.float64"),
        ({}, {"kv_heads": 3}, "ValueError", "k: expected kv_heads that divide q_heads=4, got 3"),
        ({"length": 40}, {}, "ValueError", "tokens of 40 on rank 1"),
        ({"softmax_scale": float("nan")}, {}, "ValueError", "softmax_scale: expected a finite number, got nan"),
        ({"kv_end": torch.zeros(2)}, {}, "TypeError", "kv_end: expected an int, or int64 [1]"),
    ],
)
def test_one_rank_that_cannot(three, calls, shapes, kind, said):
    """All know at once why."""
    for rank, (found, _, sent) in enumerate(three.run(3, ring_faults.differing, 1, {}, calls, shapes)):
        expected = kind if rank == 1 else "DisagreementError"
        assert found[0] == expected and said in found[1], found
        assert sent == {} and (rank == 1 or "rank 1: " in found[1])


def test_shards_that_do_not_fit(three):
    for found, _, _ in three.run(3, ring_faults.differing, 1, {}, {}, {"n": 19}):
        assert found[0] == "ValueError" and "got [16, 19, 16]" in found[1]


def test_versions(three):
    for kind, text, _ in three.run(3, ring_faults.version, 2):
        assert kind == "DisagreementError" and "llama1m_ext: '0.0.1' on rank 2; " in text


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_a_rank_that_dies(passes):
    with crew(4) as made:
        answers = made.answers(4, ring_faults.stopping, 2, passes, "dies", 5.0)
    assert answers.pop(2) == (False, "died")
    for fine, (kind, text, seconds) in answers:
        assert fine and kind == "LinkError" and seconds < 15, (kind, text, seconds)
    # Those farther on may notice a pass later.
    assert any("rank 2" in text and f"ring attention, {passes}" in text for _, (_, text, _) in answers), answers


def test_a_rank_that_hangs():
    with crew(3) as made:
        answers = made.run(3, ring_faults.stopping, 1, "forward", "sleeps", 4.0)
    for rank, (kind, text, seconds) in enumerate(answers):
        assert kind == "LinkError" and (rank == 1 or seconds < 12), (rank, kind, text, seconds)
    said = answers[2][1]
    assert "rank 2: ring attention, forward" in said and "rank 1" in said and "timeout 4 s" in said


def test_a_rank_that_does_not_come():
    with crew(3) as made:
        answers = made.run(3, ring_faults.absent, 0, 3.0)
    for kind, text, seconds in answers[1:]:
        assert kind == "LinkError" and "agreeing on what comes" in text and seconds < 12, (kind, text, seconds)
    assert any("rank 0" in text for _, text, _ in answers[1:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sharding": "spiral"}, "sharding: expected one of zigzag, striped, contiguous, got 'spiral'"),
        ({"heads": 2}, "heads, inner, outer: expected factors of the group's 1 ranks, got 2 x 0 x 1"),
        ({"heads": 0}, "heads: expected a whole number from 1 on, got 0"),
        ({"inner": True}, "inner: expected a whole number from 1 on, got True"),
        ({"timeout": 0}, "timeout: expected seconds above 0, got 0"),
    ],
)
def test_layouts_that_are_none(options, said):
    with pytest.raises(ValueError, match=said):
        Layout(**options)


def test_alone():
    """Without torch.distributed, and with what is wrong said as it is."""
    q, k, v = ring_faults.tensors(12)
    assert ring_attention(q, k, v).shape == q.shape
    with pytest.raises(ValueError, match=r"v: expected \[1, kv_heads, 12, 16\].* got \(1, 2, 11, 16\)"):
        ring_attention(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match="documents"):
        ring_attention(q, k, v, documents=[3, 5])
    with pytest.raises(TypeError, match="documents"):
        ring_attention(q, k, v, documents=["a"])  # type: ignore[list-item]
    x = torch.arange(12)[None]
    assert torch.equal(Layout().shard(x), x) and torch.equal(Layout().gather(x, 12), x)
    with pytest.raises(ValueError, match="x: expected 12 positions of 12 on rank 0, got 11"):
        Layout().gather(x[:, 1:], 12)
