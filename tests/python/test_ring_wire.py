"""Blocks that travel in a compact format: what ranks compute is attention over their own keys as they are and the others' as the
format has them, against float64; no worse than a compact cache; the bytes sent are those predicted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import ring_cases
from crew import Crew
from llama1m_ext import _core, ops, testing
from llama1m_ext.formats import KvFormat, Page, empty
from llama1m_ext.ring import Layout
from ring_cases import Case
from test_ring import NAMES, judge, random_case, run

FORMATS = ["int8", "fp8", "int4", "int8/int4", "model/int8", "int4/model"]


@pytest.fixture(scope="module")
def eight() -> Iterator[Crew]:
    made = Crew(8)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


SITUATIONS = [
    {"kv_heads": 4},
    {"batch": 2, "start": (0, 97), "dtype": torch.bfloat16},
    {"documents": (0, 1, 70, 120), "kv_heads": 1, "head_dim": 24},
    {"causal": False, "end": (150, 260), "batch": 2, "dtype": torch.float16},
    {"head_dim": 80},
    {"layout": {"sharding": "striped"}, "dtype": torch.bfloat16, "head_dim": 64},
    {"layout": {"sharding": "contiguous"}, "documents": (0, 30)},
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_against_float64(eight, ranks):
    """Shards that end within 64 tokens, at them, and one beyond."""
    cases = []
    for i, how in enumerate(SITUATIONS * 2):
        layout = {"kv_format": FORMATS[(i + ranks) % 6], **how.get("layout", {})}
        length = ranks * (128, 129, 127, 150, 64)[i % 5] + i % 2
        cases.append(Case(ranks, length, seed=i, **{**how, "layout": layout}))
    for case, made in zip(cases, run(eight, cases), strict=True):
        judge(case, made)


@pytest.mark.parametrize(
    "layout",
    [
        {"inner": 2, "outer": 4, "ranks_per_node": 4},
        {"heads": 2, "inner": 2, "outer": 2},
        {"heads": 4, "outer": 2},
    ],
)
def test_layers_of_parallelism(eight, layout):
    cases = [
        Case(8, 530 + i, {"kv_format": form, **layout}, q_heads=8, kv_heads=(8, 2)[i % 2], seed=i, **more)
        for i, form in enumerate(("int8", "int4/fp8"))
        for more in [({}, {"documents": (0, 20, 300), "dtype": torch.bfloat16, "batch": 2, "start": (0, 11)})[i % 2]]
    ]
    for case, made in zip(cases, run(eight, cases), strict=True):
        judge(case, made)


def test_short_and_uneven(eight):
    """Empty shards, and groups that no shard fills."""
    for ranks in (2, 8):
        cases = [
            Case(ranks, n, {"sharding": ("zigzag", "striped", "contiguous")[i % 3], "kv_format": FORMATS[i]}, seed=n)
            for i, n in enumerate((0, 1, ranks - 1, ranks + 1, 64 * ranks - 1, 64 * ranks + 1))
        ]
        for case, made in zip(cases, run(eight, cases), strict=True):
            if case.length:
                judge(case, made, floor=2**-23)


def whole_cache(case: Case) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv of one process over a cache in the case's format."""
    q, k, v, grad, grad_lse = case.inputs()
    shape = tuple(k.shape)
    page = Page(empty(case.kv_format.k, "k", shape, k), empty(case.kv_format.v, "v", shape, v))
    ops.kv_append(k, v, page, 0)
    out, lse = ops.attention(q, page.k, page.v, return_lse=True)
    dense = ops.kv_read(page, 0, shape[2], shape[3], k.dtype)
    return [out, lse, *ops.attention_backward(grad, q, *dense, out, lse, grad_lse=grad_lse)]


@pytest.mark.parametrize("form, dtype", [("int8", torch.float32), ("fp8", torch.bfloat16), ("int4", torch.bfloat16)])
def test_no_worse_than_a_compact_cache(eight, form, dtype):
    """However many ranks there are: what a rank has itself it computes on as it is. One rank rounds nothing."""
    errors = {}
    for ranks in (1, 2, 3, 4, 8):
        case = Case(ranks, 1100, {"kv_format": form}, q_heads=2, kv_heads=1, head_dim=64, dtype=dtype)
        plain = replace(case, ranks=1, layout={})
        (made,) = run(eight, [case])
        if ranks == 1:
            truth = ring_cases.by_torch(plain, torch.float64)
            (exact,) = run(eight, [plain])
            assert all(torch.equal(a, b) for a, b in zip(made, exact, strict=True))
            bound = [testing.error(t, true) for t, true in zip(whole_cache(case), truth, strict=True)]
        errors[ranks] = [testing.error(ours, true) for ours, true in zip(made, truth, strict=True)]
    for ranks, of in errors.items():
        for name, mine, most in zip(NAMES, of, bound, strict=True):
            assert mine <= 1.02 * most, (name, ranks, mine, most)
    assert all(two > 3 * one for one, two in zip(errors[1], errors[2], strict=True))  # which round


def test_the_same_bits_in_every_run(eight):
    case = Case(4, 500, {"inner": 2, "outer": 2, "kv_format": "int4"}, dtype=torch.bfloat16)
    first, second = run(eight, [case, case])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_bytes_of_a_block():
    """A block takes what its tensors take, of any shape; and a long one 1 + 1/16 byte an element where bf16 takes 2."""
    pick = random.Random(1)
    for _ in range(200):
        form = KvFormat.parse(f"{pick.choice(['model', *FORMATS[:3]])}/{pick.choice(['model', *FORMATS[:3]])}")
        batch, heads, tokens, head_dim = (
            pick.randrange(1, 4),
            pick.randrange(1, 5),
            pick.randrange(300),
            pick.randrange(8, 257),
        )
        like = torch.empty(0, dtype=pick.choice([torch.float32, torch.bfloat16]), device="meta")
        sides = (empty(getattr(form, of), of, (batch, heads, tokens, head_dim), like) for of in ("k", "v"))
        token, group = form.block_bytes(batch * heads, head_dim, like.element_size())
        assert Page(*sides).nbytes == tokens * token + -(-tokens // 64) * group
    assert KvFormat.parse("int8").block_bytes(8, 128, 2) == (8 * 136, 8 * 128 * 68)
    # Two nodes of two ranks, 100 tokens each: two groups begun.
    sent = _core.ring_bytes("contiguous", 400, 4, 1, per_node=2, kv_bytes=3, kv_group_bytes=1000, causal=False)
    assert sent == [(6900, 0, 6900, 0), (0, 6900, 0, 6900)] * 2


def test_bytes_shrink(eight):
    """Of Llama's heads: forward, int8 sends little more than half of bf16's bytes, int4 little more than a quarter."""
    cases = [
        Case(4, 1024, {"kv_format": form}, kv_heads=1, head_dim=128, dtype=torch.bfloat16)
        for form in ("model", "int8", "int4")
    ]
    totals = [0, 0, 0]
    for answer in eight.run(4, ring_cases.on_rank, cases):
        for i, of in enumerate(answer):
            totals[i] += of["sent"][0]["within"]
            assert of["sent"] == of["predicted"]
    assert [total / totals[0] for total in totals] == [1, 17 / 32, 9 / 32]


@pytest.mark.parametrize("layout", [{}, {"heads": 2}, {"outer": 2, "sharding": "striped"}])
def test_attention_of_a_training_step(eight, layout):
    """What `train.loss` asks for, from ranks whose blocks are compact: near what it is otherwise, and not the same."""
    answers = eight.run(4, ring_cases.of_training, {**layout, "kv_format": "int8"}, [[0, 300], [0, 300]], 3)
    exact = eight.run(4, ring_cases.of_training, layout, [[0, 300], [0, 300]], 3)
    for ours, plain in zip(answers, exact, strict=True):
        for made, true in zip(ours["results"], plain["results"], strict=True):
            assert 1e-4 < testing.error(made, true) < 0.02


def compact(case: Case, pick: random.Random) -> Case:
    return replace(
        case, length=case.length * pick.choice([1, 1, 4]), layout={**case.layout, "kv_format": pick.choice(FORMATS)}
    )


@pytest.mark.parametrize("seeds", [range(2000, 2016), pytest.param(range(3000, 3300), marks=pytest.mark.slow)])
def test_random(eight, seeds):
    cases: dict[int, list[Case]] = {}
    for seed in seeds:
        case = compact(random_case(seed), random.Random(seed))
        cases.setdefault(case.ranks, []).append(case)
    for of in cases.values():
        for at in range(0, len(of), 20):
            for case, made in zip(of[at : at + 20], run(eight, of[at : at + 20]), strict=True):
                judge(case, made, 2.5, 2e-8 if case.length > 8 else 2**-23)  # a dozen numbers may all be exact


@pytest.mark.parametrize(
    ("form", "kind", "said"),
    [
        ("int2", ValueError, "kv_format: expected one of model, int8, int4, fp8, .*, got 'int2'"),
        ("auto", ValueError, "kv_format: expected one of model, int8, int4, fp8, .*, got 'auto'"),
        (8, TypeError, "kv_format: expected one of model, int8, int4, fp8, .*, got 8"),
    ],
)
def test_formats_that_are_none(form, kind, said):
    with pytest.raises(kind, match=said):
        Layout(kv_format=form)


def test_its_name_is_what_ranks_compare():
    assert Layout(kv_format="k8v4").same()["kv_format"] == "int8/int4"
    assert "kv_format='int8/int4'" in repr(Layout(kv_format="int8/int4"))
