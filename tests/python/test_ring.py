"""Ring attention over gloo: any number of ranks, against float64 and torch in the same dtype; the bytes sent are those predicted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import ring_cases
from conftest import assert_near
from crew import Crew
from llama1m_ext import testing
from llama1m_ext.ring import Layout
from llama1m_ext.ring.training import RingAttention
from llama1m_ext.train.attention import Apart
from llama1m_ext.train.forward import shift
from ring_cases import Case

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def eight() -> Iterator[Crew]:
    made = Crew(8)
    yield made
    made.close()


NAMES = ("out", "lse", "dq", "dk", "dv")


def judge(case: Case, made: list[torch.Tensor], factor: float = 1.25, floor: float = 2e-8) -> None:
    truth, yardstick = ring_cases.by_torch(case, torch.float64), ring_cases.by_torch(case, case.dtype)
    for name, ours, theirs, true in zip(NAMES, made, yardstick, truth, strict=True):
        dead = true == -torch.inf
        assert torch.equal(ours == -torch.inf, dead), (name, case)
        ours, theirs, true = (t.masked_fill(dead, 0.0) for t in (ours, theirs, true))
        mine, bound = testing.error(ours, true), factor * testing.error(theirs, true)
        # Where torch happens to be exact (a row with one key).
        assert mine <= bound + (floor if ours.dtype == torch.float32 else 0.0) * max(
            1.0, true.abs().max().item() if true.numel() else 1.0
        ), (
            name,
            mine,
            bound,
            case,
        )


def run(crew: Crew, cases: list[Case], with_length: bool = True) -> list[list[torch.Tensor]]:
    """Results of each case, once bytes are checked. The cases have the same number of ranks."""
    answers = crew.run(cases[0].ranks, ring_cases.on_rank, cases, with_length)
    found = []
    for i, case in enumerate(cases):
        of = [a[i] for a in answers]
        for rank, a in enumerate(of):
            assert a["sent"] == a["predicted"], (rank, case)
        found.append(ring_cases.whole(case, of))
    return found


SHAPES = [
    {"kv_heads": 4},
    {"kv_heads": 1, "dtype": torch.bfloat16, "batch": 2},
    {"q_heads": 8, "kv_heads": 1, "head_dim": 24},
    {"kv_heads": 2, "causal": False, "scale": 0.3},
    {"batch": 3, "start": (0, 17, 40), "dtype": torch.bfloat16},
    {"batch": 2, "start": (5, 0), "end": (33, 60), "causal": False},
    {"documents": (0, 1, 13, 40, 41), "kv_heads": 4},
    {"documents": (0, 30), "batch": 2, "start": (0, 40), "dtype": torch.float16},
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("sharding", ["zigzag", "striped", "contiguous"])
def test_against_float64(eight, ranks, sharding):
    cases = [
        Case(ranks, 64 + i * (3 if ranks == 3 else 1), {"sharding": sharding}, seed=i, **shape)
        for i, shape in enumerate(SHAPES)
        if ranks < 8 or i % 2 == len(sharding) % 2
    ]
    for case, made in zip(cases, run(eight, cases), strict=True):
        judge(case, made)


@pytest.mark.parametrize(
    "layout", [{"inner": 2, "outer": 2}, {"heads": 2}, {"heads": 4}, {"heads": 2, "outer": 2}, {"outer": 4}]
)
def test_layers_of_parallelism_on_four(eight, layout):
    cases = [
        Case(4, 70 + i, {"sharding": ("zigzag", "striped", "contiguous")[i % 3], **layout}, seed=i, **shape)
        for i, shape in enumerate(SHAPES[::2])
    ]
    for case, made in zip(cases, run(eight, cases), strict=True):
        judge(case, made)


@pytest.mark.parametrize(
    "layout",
    [
        {"inner": 4, "outer": 2},
        {"inner": 2, "outer": 4},
        {"heads": 2, "inner": 2, "outer": 2},
        {"heads": 4, "outer": 2},
        {"heads": 8},
        {"heads": 8, "ranks_per_node": 2},
        {"heads": 4, "ranks_per_node": 2},
        {"ranks_per_node": 4},
    ],
)
def test_layers_of_parallelism_on_eight(eight, layout):
    cases = [
        Case(8, 90 + i, {"sharding": sharding, **layout}, q_heads=8, kv_heads=(8, 2, 1)[i % 3], seed=i, **more)
        for i, sharding in enumerate(("zigzag", "striped", "contiguous"))
        for more in [({}, {"documents": (0, 20, 55), "dtype": torch.bfloat16, "batch": 2, "start": (0, 11)})[i % 2]]
    ]
    for case, made in zip(cases, run(eight, cases), strict=True):
        judge(case, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_does_not_grow_with_ranks(eight, dtype):
    """ring-flash-attention's issues 22 and 42: partials in bfloat16, gradients that get worse with every rank."""
    errors = []
    for ranks in (1, 2, 3, 4, 8):
        case = Case(ranks, 512, q_heads=2, kv_heads=1, head_dim=32, dtype=dtype)
        (made,) = run(eight, [case])
        truth = ring_cases.by_torch(case, torch.float64)
        errors.append([testing.error(ours, true) for ours, true in zip(made, truth, strict=True)])
    theirs = [testing.error(t, true) for t, true in zip(ring_cases.by_torch(case, dtype), truth, strict=True)]
    # Each merge rounds out once, to float32: nothing in bfloat16, a few per cent of float32's own error.
    for name, of, yardstick in zip(NAMES, zip(*errors, strict=True), theirs, strict=True):
        room = 1.25 if name == "lse" or dtype == torch.float32 else 1.02
        assert max(of) <= min(room * of[0], 1.1 * yardstick), (name, of, yardstick)


def test_short_and_uneven(eight):
    """Fewer tokens than ranks, none at all, one more or less than fits."""
    for ranks in (2, 3, 8):
        cases = [
            Case(ranks, n, {"sharding": sharding}, seed=n)
            for n in (0, 1, 2, ranks - 1, 2 * ranks - 1, 2 * ranks + 1)
            for sharding in ("zigzag", "striped", "contiguous")
        ]
        for case, made in zip(cases, run(eight, cases), strict=True):
            if case.length:
                judge(case, made, floor=2**-23)  # the log-sum-exp of one key is its score, rounded


def test_length_is_asked_for(eight):
    cases = [Case(3, 50, {"sharding": "striped"}), Case(3, 49, {"sharding": "contiguous"})]
    for case, made in zip(cases, run(eight, cases, False), strict=True):
        judge(case, made)


def test_variable_length(eight):
    """Rows packed of documents that cross shards, as in the tests of ring-flash-attention for variable length and for Llama 3's
    gathered keys: a block goes no farther than its documents do."""
    documents = (0, 15, 156)
    for sharding in ("zigzag", "striped", "contiguous"):
        cases = [Case(8, 529, {"sharding": sharding}, q_heads=5, kv_heads=5, documents=d) for d in (documents, None)]
        for case, made in zip(cases, run(eight, cases), strict=True):
            judge(case, made)
    answers = eight.run(8, ring_cases.on_rank, cases)
    packed, plain = (sum(a[i]["sent"][0].get("within", 0) for a in answers) for i in (0, 1))
    block = 66 * 2 * 5 * 16 * 4
    assert plain == block * sum(7 - rank for rank in range(8)), "only later queries need a block"
    # Position 156 is in the third shard: the blocks before it stop there.
    assert packed == block * (2 + 1 + sum(7 - rank for rank in range(2, 8)))


def test_the_same_bits_in_every_run(eight):
    case = Case(4, 200, {"inner": 2, "outer": 2}, dtype=torch.bfloat16)
    first, second = run(eight, [case, case])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [{}, {"heads": 2}, {"heads": 4}, {"outer": 2, "sharding": "striped"}])
def test_attention_of_a_training_step(eight, layout):
    """Rows with documents of their own, as `train.loss` asks for them; shares of labels and weights."""
    borders = [[0, 10, 50], [0, 10, 50], [0, 50], [0, 1, 2, 49, 50]]
    answers = eight.run(4, ring_cases.of_training, layout, borders, 3)
    q, k, v, grad = ring_cases.packed(4, 50, 3)
    one = Apart(borders)
    out, lse = one.forward(q, k, v, 0.25)
    expected = out, *one.backward(grad, q, k, v, out, lse, 0.25)
    ids = torch.arange(100).view(2, 50)
    labels, weights = shift(ids, ids.float())
    for answer in answers:
        assert_near(answer["results"], expected, 2e-6)
        for ours, whole in zip(answer["share"], (ids, labels, weights, torch.arange(50)[None]), strict=True):
            assert torch.equal(ours, whole)
        assert answer["denominator"] == weights.sum().item()
    with pytest.raises(ValueError, match="borders: expected positions that rise from 0 to 50, got"):
        RingAttention(Layout(), 50, [[0, 5, 5, 50]])


def random_case(seed: int) -> Case:
    """A situation nobody thought of."""
    pick = random.Random(seed)
    ranks = pick.choice([1, 2, 3, 4, 5, 6, 7, 8])
    heads = pick.choice([h for h in (1, 2, 3, 4, 8) if ranks % h == 0])
    outer = pick.choice([o for o in (1, 2, 3, 4) if (ranks // heads) % o == 0])
    kv_heads = heads * pick.choice([1, 2]) if pick.random() < 0.7 else 1
    length, batch = pick.randrange(1, 150), pick.randrange(1, 4)
    inner = ranks // heads // outer
    case = Case(
        ranks,
        length,
        {
            "sharding": pick.choice(["zigzag", "striped", "contiguous"]),
            "heads": heads,
            "outer": outer,
            "ranks_per_node": pick.choice([n for n in (1, heads, heads * inner) if n % heads == 0 or heads % n == 0]),
        },
        batch=batch,
        q_heads=max(kv_heads, heads) * pick.choice([1, 2]) if kv_heads > 1 else heads * pick.choice([1, 4]),
        kv_heads=kv_heads,
        head_dim=pick.choice([8, 16, 24, 64]),
        dtype=pick.choice([torch.float32, torch.bfloat16, torch.float16]),
        causal=pick.random() < 0.7,
        scale=pick.choice([None, 0.2]),
        seed=seed,
    )
    if pick.random() < 0.4:
        starts = sorted(pick.sample(range(1, length), min(pick.randrange(5), length - 1))) if length > 1 else []
        case = replace(case, documents=(0, *starts))
    if pick.random() < 0.4:
        case = replace(case, start=tuple(pick.randrange(length + 1) for _ in range(batch)))
    if pick.random() < 0.3:
        case = replace(case, end=tuple(pick.randrange(length + 1) for _ in range(batch)))
    return case


def by_ranks(seeds: range) -> dict[int, list[Case]]:
    found: dict[int, list[Case]] = {}
    for case in map(random_case, seeds):
        found.setdefault(case.ranks, []).append(case)
    return found


def test_random(eight):
    for cases in by_ranks(range(24)).values():
        for case, made in zip(cases, run(eight, cases), strict=True):
            judge(case, made, 2.0)  # few numbers: a seed decides


@pytest.mark.slow
def test_random_long(eight):
    for cases in by_ranks(range(1000, 1600)).values():
        for at in range(0, len(cases), 20):
            for case, made in zip(cases[at : at + 20], run(eight, cases[at : at + 20]), strict=True):
                judge(case, made, 2.5, 2e-8 if case.length > 8 else 2**-23)  # a dozen numbers may all be exact
