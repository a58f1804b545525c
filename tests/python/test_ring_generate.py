"""A model that several ranks share: logits and tokens are those of one process, turn after turn, and each rank holds its share."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import ring_models
from crew import Crew, crew
from llama1m_ext import distributed, plan, saved, set_options, testing
from llama1m_ext.dense import new_page
from llama1m_ext.formats import KvFormat
from llama1m_ext.ring import Layout, predicted
from llama1m_ext.ring.shard_layer import shares, spread_of
from llama1m_ext.ring.spread import Spread
from ring_models import Ask, Talk

pytestmark = pytest.mark.usefixtures("one_thread")

SPREAD_OUT = {"min_layer_major_len": 2}
"""Every prompt is spread over the ranks, however short."""


@pytest.fixture(scope="module")
def three() -> Iterator[Crew]:
    made = Crew(3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def eight() -> Iterator[Crew]:
    made = Crew(8)
    yield made
    made.close()


def judged(made: Crew, ranks: int, talk: Talk, factor: float = 1.5) -> list[dict]:
    """Every rank's logits, against float64 and one process in the same dtype; all ranks have the same bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float64 takes the stock path
        truth = ring_models.said(None, talk, truth=True)[0]
    alone = ring_models.said(None, talk)[0]
    answers = made.run(ranks, ring_models.said, talk)
    for rank, (logits, facts) in enumerate(answers):
        for turn, (ours, one, true) in enumerate(zip(logits, alone, truth, strict=True)):
            assert ours.shape == one.shape
            mine, theirs = testing.error(ours, true), testing.error(one, true)
            assert mine <= factor * theirs + 1e-6, (rank, turn, mine, theirs)
            assert torch.equal(ours, answers[0][0][turn]), (rank, turn)
        assert facts["stats"].stock == {}
    return [facts for _, facts in answers]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turns_over_one_cache(three, ranks, dtype):
    talk = Talk(turns=(50, 1, 1, 23, 1), dtype=dtype, options=SPREAD_OUT)
    found = judged(three, ranks, talk)
    for i, facts in enumerate(found):
        assert facts["length"] == 76 and facts["stats"].layer_major == 2
        assert torch.equal(facts["tokens"], talk.ids())
        assert abs(facts["held"][0] - 76 / ranks) <= 2, i
    assert sum(facts["held"][0] for facts in found) == 76


CASES = {
    "left padding": (3, Talk(turns=(40, 1, 12, 1), batch=3, pads=(7, 0, 33), options=SPREAD_OUT)),
    "right padding": (3, Talk(turns=(40,), batch=3, tails=(7, 0, 33), options=SPREAD_OUT)),
    "one logit": (3, Talk(turns=(40, 1, 12, 1), batch=2, pads=(2, 0), keep=1, options=SPREAD_OUT)),
    "some logits": (2, Talk(turns=(40, 5), keep=4, options=SPREAD_OUT)),
    "many logits": (2, Talk(turns=(60,), keep=30, options=SPREAD_OUT)),
    "no cache": (3, Talk(turns=(31,), batch=2, pads=(0, 4), keep=1, cached=False, options=SPREAD_OUT)),
    "embeddings": (2, Talk(turns=(31, 1), embeds=True, options=SPREAD_OUT)),
    "cut and gone on with": (3, Talk(turns=(30, 20, 9, 1), crops=4, options=SPREAD_OUT)),
    "fewer tokens than ranks": (3, Talk(turns=(2, 1, 1), options=SPREAD_OUT)),
    "short prompts": (3, Talk(turns=(20, 3, 1))),
    "striped": (3, Talk(turns=(45, 20, 1), layout={"sharding": "striped"}, options=SPREAD_OUT)),
    "contiguous": (2, Talk(turns=(45, 20, 1), layout={"sharding": "contiguous"}, options=SPREAD_OUT)),
    "kv_heads 1": (2, Talk(turns=(45, 9, 1), model={"num_key_value_heads": 1}, options=SPREAD_OUT)),
    "kv_heads 4": (3, Talk(turns=(45, 9, 1), model={"num_key_value_heads": 4}, options=SPREAD_OUT)),
    "small chunks and pages": (3, Talk(turns=(90, 33, 1), options={**SPREAD_OUT, "chunk": 7, "page_size": 8})),
}


@pytest.mark.parametrize("name", CASES)
def test_calls(three, name):
    judged(three, *CASES[name])


@pytest.mark.parametrize("kv", ["int8", "int8/int4"])
def test_compact_formats(three, kv):
    talk = Talk(turns=(900, 1, 500, 1, 1), keep=1, options={**SPREAD_OUT, "kv": kv})
    # A rank's groups of 64 tokens are others than one process's: rounded likewise, but not the same.
    found = judged(three, 2, talk, factor=3.0)
    assert [facts["format"] for facts in found] == [kv, kv]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_prompts_whose_blocks_travel_compact(three, form):
    """As good as one process that goes on with a cache of that format, whose first and newest tokens are as they were."""
    shape = {"batch": 2, "pads": (0, 70), "model": {"head_dim": 64}}
    talk = Talk(turns=(900, 1, 200), layout={"kv_format": form}, options=SPREAD_OUT, **shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = ring_models.said(None, talk, truth=True)[0]
    cache = ring_models.said(None, replace(talk, options={**SPREAD_OUT, "kv": form}))[0]
    exact = ring_models.said(None, talk)[0]
    bound = testing.error(cache[2], truth[2])
    assert bound > 100 * testing.error(exact[2], truth[2])
    answers = three.run(3, ring_models.said, talk)
    for logits, facts in answers:
        assert facts["format"] == "model" and facts["stats"].stock == {}
        for ours, true, same in zip(logits, truth, answers[0][0], strict=True):
            assert 0.05 * bound < testing.error(ours, true) <= 1.5 * bound, (testing.error(ours, true), bound)
            assert torch.equal(ours, same)


def test_auto_is_one_format_on_all_ranks(three):
    assert three.run(2, ring_models.formats) == [["int8", "int8"]] * 2


def test_a_cache_goes_with_its_last_reference(three):
    assert three.run(2, ring_models.released) == [True, True]


def test_rank_0_has_the_bar(three):
    first, second = three.run(2, ring_models.shown)
    assert "400/400 tokens" in first and not second


def test_pages_on_the_disk(three, tmp_path):
    more = {"offload": "disk", "kv_memory": 40_000, "offload_dir": str(tmp_path)}
    judged(three, 2, Talk(turns=(700, 1, 90, 1), keep=1, options={**SPREAD_OUT, **more}))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (8, {"outer": 2}),
        (4, {}),
        (4, {"sharding": "striped", "outer": 2}),
        (4, {"sharding": "contiguous", "inner": 2, "outer": 2}),
        (8, {}),
        (8, {"sharding": "striped", "inner": 2, "outer": 4}),
        (7, {}),
    ],
)
def test_many_ranks(eight, ranks, layout):
    for talk in (Talk(turns=(3, 2, 1)), Talk(turns=(130, 1, 60, 1, 1), batch=2, pads=(0, 70), keep=1)):
        judged(eight, ranks, replace(talk, layout=layout, options=SPREAD_OUT))
    ask = Ask(batch=2, pads=(5, 0), layout=layout, options=SPREAD_OUT, more={"max_new_tokens": 6, "do_sample": True})
    expected = ring_models.answered(None, ask)
    assert all(torch.equal(made, expected) for made in eight.run(ranks, ring_models.answered, ask))


def test_random_conversations(eight):
    rng = random.Random(5)
    for _ in range(25):
        batch = rng.choice([1, 1, 2, 3])
        turns = tuple(rng.choice([1, 1, 2, rng.randint(3, 120)]) for _ in range(rng.randint(1, 6)))
        talk = Talk(
            turns=turns,
            batch=batch,
            keep=rng.choice([0, 1]),
            pads=tuple(rng.randint(0, turns[0] - 1) for _ in range(batch)) if rng.random() < 0.5 else (),
            crops=rng.choice([0, 0, 1]) if turns[0] > 1 else 0,
            layout={"sharding": rng.choice(["zigzag", "striped", "contiguous"])},
            options={
                "min_layer_major_len": rng.choice([2, 30]),
                "chunk": rng.choice([5, 64]),
                "page_size": rng.choice([16, "auto"]),
            },
        )
        judged(eight, rng.randint(2, 8), talk)


# -- generate ------------------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": (2, {"do_sample": False}),
    "sampling": (3, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
    "beams": (2, {"num_beams": 3, "do_sample": False}),
    "several sequences": (2, {"num_return_sequences": 2, "do_sample": True}),
    # 4.57 stumbles over a guess where nothing ends a text: here something does that never comes.
    "lookup": (2, {"prompt_lookup_num_tokens": 3, "do_sample": False, "eos_token_id": 1 << 20}),
}


@pytest.mark.parametrize("name", WAYS)
def test_generate(three, name):
    ranks, more = WAYS[name]
    batch = 1 if name == "lookup" else 2
    ask = Ask(batch=batch, pads=(5, 0)[: batch - 1 and 2], options=SPREAD_OUT, more={"max_new_tokens": 10, **more})
    expected = ring_models.answered(None, ask)
    for made in three.run(ranks, ring_models.answered, ask):
        assert torch.equal(made, expected)


@pytest.mark.parametrize("name", WAYS)
def test_ranks_that_compute_otherwise(three, name):
    """CPUs of different types round differently: rank 0 decides."""
    ranks, more = WAYS[name]
    ask = Ask(batch=1 if name == "lookup" else 2, options=SPREAD_OUT, more={"max_new_tokens": 20, **more}, noise=1e-3)
    expected = ring_models.answered(None, ask)
    for made in three.run(ranks, ring_models.answered, ask):
        assert torch.equal(made, expected)


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_greedy_tokens_in_bf16(three, kv):
    ask = Ask(
        length=600,
        dtype=torch.bfloat16,
        options={**SPREAD_OUT, "kv": kv},
        more={"max_new_tokens": 8, "do_sample": False},
    )
    first, second = three.run(2, ring_models.answered, ask)
    assert torch.equal(first, second)
    expected = ring_models.answered(None, ask)
    # The first token is computed before anything is compact; later ones may differ where two are nearly as likely.
    assert torch.equal(first[:, :601], expected[:, :601])
    assert kv == "int8" or torch.equal(first, expected)


# -- what is sent ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "int8", "fp8/int4"])
def test_bytes_sent(three, form):
    ranks, n, tokens, batch = 3, 100, 4, 2
    talk = Talk(turns=(n, *[1] * tokens), batch=batch, keep=1, layout={"kv_format": form}, options=SPREAD_OUT)
    heads, kv_heads, head_dim, layers, hidden = 4, 2, 16, 2, 64
    partial = batch * heads * (head_dim + 1) * 4
    for rank, (_, facts) in enumerate(three.run(ranks, ring_models.said, talk)):
        layout = Layout.__new__(Layout)
        layout.__dict__.update(
            sharding="zigzag",
            heads=1,
            inner=ranks,
            outer=1,
            ranks_per_node=ranks,
            ring_rank=rank,
            ring_size=ranks,
            rank=rank,
            kv_format=KvFormat.parse(form),
        )
        ring = predicted(layout, n, batch, heads, kv_heads, head_dim, torch.float32).forward.get("within", 0)
        # All layers but the last send blocks; that one the state of the last token, which rank 0 has, and partials, as each
        # layer of a decoded token does.
        expected = (layers - 1) * ring + (ranks - 1) * partial * (1 + layers * tokens)
        expected += (ranks - 1) * batch * hidden * 4 if rank == 0 else 0
        assert facts["sent"] == {"within": expected}


# -- saved caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv", "turns"), [("model", (50, 1, 23, 5)), ("int8", (1100, 1, 300, 5))])
def test_saved_caches(three, tmp_path, kv, turns):
    talk = Talk(turns=turns, options={**SPREAD_OUT, "kv": kv})
    path = str(tmp_path / "cache")
    three.run(3, ring_models.kept, talk, path)
    assert saved.verify(path).tokens == sum(turns[:-1])
    alone, ids, _ = ring_models.resumed(None, talk, path)
    assert torch.equal(ids, talk.ids())
    for ranks in (2, 3):
        held = 0
        for logits, tokens, mine in three.run(ranks, ring_models.resumed, talk, path):
            assert torch.allclose(logits, alone, atol=1e-4), (logits - alone).abs().max()
            assert torch.equal(tokens, ids)
            held += mine[0]
        assert held == sum(turns[:-1])


def test_a_cache_that_can_not_be_saved(three, tmp_path):
    talk = Talk(turns=(50, 1), options=SPREAD_OUT)
    answers = three.answers(2, ring_models.kept, talk, str(tmp_path / "nowhere" / "cache"))
    assert [ok for ok, _ in answers] == [False, False]
    assert "FileNotFoundError" in answers[0][1] and "rank 0 could not write it" in answers[1][1]
    striped = replace(talk, layout={"sharding": "striped"})
    assert all("striped" in text for _, text in three.answers(2, ring_models.kept, striped, str(tmp_path / "c")))


# -- what can't be served ------------------------------------------------------------------------------------------------------

REFUSED = {
    "gradients": "ValueError: ring: expected a call without gradients",
    "output_attentions": "ValueError: ring: expected a call that 2 ranks can serve together, got one with output_attentions",
    "checkpoint": "ValueError: checkpoint: expected None where several ranks share a model, got 'somewhere'",
    "other tokens": "DisagreementError: expected the same on all ranks, got input",
    "max_time": "ValueError: max_time: expected None where several ranks generate",
    "other settings": "DisagreementError: expected the same on all ranks, got generate.*'max_new_tokens': [23]",
    "another model": "TypeError: cache: its 40 tokens are spread over 2 ranks",
    "a mask with holes": "ValueError: ring: expected .* attention_mask has holes",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(three, what):
    for found in three.run(2, ring_models.refused, what):
        assert found and all(re.match(REFUSED[what], text) for text in found), found


def test_one_rank_without_room(three):
    (first,), (second,) = three.run(2, ring_models.refused, "one rank alone has no room")
    assert "DisagreementError" in first and "rank 1: DoesNotFit" in first
    assert second.startswith("DoesNotFit: kv_memory")


def test_a_copy_in_another_process():
    model = testing.tiny_model(3)
    set_options(model, ring="ring-of-elsewhere")
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="expected a layout of this process, got 'ring-of-elsewhere'"),
    ):
        model(testing.random_ids(1, 4))
    with pytest.raises(TypeError, match="ring: expected a name"):
        set_options(model, ring=3)


def test_without_a_group():
    with pytest.raises(RuntimeError, match="expected a process group, or a process that torchrun started"):
        distributed(testing.tiny_model(3))


@pytest.mark.slow
def test_a_rank_that_is_silent():
    with crew(2) as made:
        first, second = made.run(2, ring_models.silent)
    assert second == "gone" and re.match(r"LinkError: rank 0: .*from rank 1 within", first)


# -- who holds what ------------------------------------------------------------------------------------------------------------


def test_a_spread_is_what_its_history_says():
    rng = random.Random(1)
    for _ in range(60):
        ranks, at = rng.randint(1, 5), 0
        spread, owners = Spread(ranks), list[int]()
        for _ in range(rng.randint(1, 8)):
            n, kind = rng.randint(1, 40), rng.choice(["shared", "given", "cut"])
            if kind == "shared":
                sharding = rng.choice(["zigzag", "striped", "contiguous"])
                mine = torch.zeros(n, dtype=torch.long)
                for rank in range(ranks):
                    for run in Spread(ranks).shared(n, sharding).runs(rank):
                        mine[run[0] : run[1] : run[2]] = rank
                spread, owners = spread.shared(n, sharding), owners + mine.tolist()
            elif kind == "given":
                rank = spread.next_rank()
                spread, owners = spread.given(n, rank), owners + [rank] * n
            else:
                at = rng.randint(0, len(owners))
                spread, owners = spread.truncated(at), owners[:at]
            assert spread.length == len(owners) and spread.held == tuple(owners.count(r) for r in range(ranks))
        where = torch.tensor([0, 3, 17, len(owners), len(owners) + 5])
        for rank in range(ranks):
            held = [i for i, owner in enumerate(owners) if owner == rank]
            assert [i for run in spread.runs(rank) for i in range(*run)] == held
            assert spread.before(rank, where).tolist() == [sum(i < w for i in held) for w in where.tolist()]


def test_new_tokens_go_round():
    spread = Spread(3).shared(10, "contiguous")
    for _ in range(3000):
        spread = spread.given(1, spread.next_rank())
    assert max(spread.held) - min(spread.held) <= 256
    assert len(spread.parts) < 20


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_shares_of_a_whole_cache(kv):
    rng, like = random.Random(2), torch.zeros(1, 1, 1, 16)
    for _ in range(50):
        sizes = [rng.choice([64, 640, rng.randint(1, 500)]) for _ in range(rng.randint(1, 5))]
        pages, ranks = [new_page(KvFormat.parse(kv), size, like, like) for size in sizes], rng.randint(1, 5)
        found = shares(pages, ranks)
        spread = spread_of(found)
        assert spread.length == sum(sizes)
        assert [page.size for of in found for page in of] and sum(spread.held) == sum(sizes)
        assert max(spread.held) <= sum(sizes) / ranks + 64 * 2 + 1


def test_the_plan_counts_a_shard():
    name = "gradientai/Llama-3-8B-Instruct-Gradient-1048k"
    one, eight = (plan(name, 1 << 20, ranks=n, gpu="141GiB", host="1TiB", kv="int8", measure=False) for n in (1, 8))
    assert eight.parts.kv == pytest.approx(one.parts.kv / 8, rel=0.01)
    assert eight.parts.hidden * 8 == one.parts.hidden and one.parts.ring == 0
    tokens, dims = 1 << 17, 32 * 128
    assert eight.parts.ring >= tokens * (dims * 2 + dims * 4 + 3 * 2 * 8 * 128 * 2)
    assert "over 8 ranks; each has 131,072" in str(eight)
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        plan(name, 1000, ranks=0)


# -- torchrun ------------------------------------------------------------------------------------------------------------------

CARD = """
import sys, pathlib, os
import llama1m_ext

model_id = sys.argv[1]

import transformers
import torch

pipeline = transformers.pipeline(
    "text-generation",
    model=model_id,
    model_kwargs={"torch_dtype": torch.bfloat16},
    device_map="auto",
)
if "RANK" in os.environ:
    llama1m_ext.distributed(pipeline)
messages = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": "Who are you? " * 30},
]
prompt = pipeline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
terminators = [
    pipeline.tokenizer.eos_token_id,
    pipeline.tokenizer.convert_tokens_to_ids("<|eot_id|>")
]
torch.manual_seed(3)
outputs = pipeline(prompt, max_new_tokens=12, eos_token_id=terminators, do_sample=True, temperature=0.6, top_p=0.9)
served = llama1m_ext.stats(pipeline)
assert served.stock == {} and served.layer_major == ("RANK" in os.environ), served
out = pathlib.Path(sys.argv[2]) / os.environ.get("RANK", "alone")
out.write_text(outputs[0]["generated_text"][len(prompt):], encoding="utf-8")
"""
"""The model card's snippet, and the one line."""

OLD_MACHINE = """
import os

if os.environ.get("RANK") == "1":
    os.environ.update(LLAMA1M_ISA="portable", ATEN_CPU_CAPABILITY="default")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("before", ["", OLD_MACHINE])
def test_the_model_card_under_torchrun(tmp_path, before):
    """On CPUs of one type, and of two."""
    testing.tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "script.py").write_text(before + CARD)
    words = [str(tmp_path / "script.py"), str(tmp_path / "model"), str(tmp_path)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for how in ([], torchrun):
        answer = subprocess.run(
            [sys.executable, *how, *words],
            capture_output=True,
            encoding="utf-8",
            timeout=430,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
    alone, first, second = ((tmp_path / name).read_text(encoding="utf-8") for name in ("alone", "0", "1"))
    assert alone and first == second == alone
