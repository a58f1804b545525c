"""The plan before real calls: under a hard limit of memory, onto caches that have tokens, for models without logits."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch

from conftest import needs_prefill_chunks
from llama1m_ext import DoesNotFit, LongCache, _compat, plan_call, set_options
from llama1m_ext.plan_bytes import Storage, Work, peak
from llama1m_ext.plan_shape import shape_of
from llama1m_ext.testing import random_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Every case in a fork of its own, with so many bytes of address space more than the process has; what it prints is JSON.
LIMITED = """
import json, os, resource, sys
import torch
from llama1m_ext import DoesNotFit, LongCache, set_options
from llama1m_ext.testing import random_ids, tiny_config
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(tiny_config(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
                                     num_hidden_layers=24, vocab_size=1000)).eval()
torch.set_default_dtype(torch.float32)
ids = random_ids(1, 4096)

def run(tokens, kv=None):
    cache = LongCache(kv=kv) if kv else LongCache()
    model(ids[:, :tokens], past_key_values=cache, logits_to_keep=1)
    store = cache.layers[0].store
    return {"format": cache.format.name, "stored": store is not None, "tokens": cache.get_seq_length()}

def limited(more, tokens=4096, kv=None, **options):
    sys.stdout.flush()
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, (more, tokens, options)
        return
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))
    try:
        set_options(model, **options)
        said = run(tokens, kv)
    except DoesNotFit as error:
        said = {"needed": error.needed, "available": error.available, "ways": error.ways}
    except BaseException as error:
        said = {"failed": repr(error)}
    print(json.dumps(said), flush=True)
    os._exit(0)

set_options(model, progress=False, chunk=512, offload=None)
with torch.inference_mode():
    run(1024)
    for case in json.loads(os.environ["CASES"]):
        limited(**case)
"""


def under_limits(run_python, cases: list[dict]) -> list[dict]:
    lines = run_python(LIMITED, timeout=900, CASES=json.dumps(cases), OMP_NUM_THREADS="1").splitlines()
    assert len(lines) == len(cases), lines
    return [json.loads(line) for line in lines]


def as_case(way: str, more: int, **options) -> dict:
    """A way out, as the error names it, as a call."""
    case = {"more": more, **options}
    tokens = re.search(r"fewer tokens: (\d+)", way)
    if tokens:
        case["tokens"] = int(tokens[1])
    for name, text in re.findall(r'(kv|offload|kv_memory|chunk)=("[^"]+"|\d+)', way):
        case[name] = json.loads(text)
    return case


def try_all(run_python, kinds: list[tuple[str, int]]) -> list[dict]:
    """96 MiB of pages: in less address space there is an error before the start or an answer, nothing in between. Each way
    out that an error names is tried in the same space. Returns what was said at first."""
    limits = [({"kv": kv}, mib << 20) for kv, mib in kinds]
    first = under_limits(run_python, [{"more": more, **kind} for kind, more in limits])
    ways = []
    for (kind, more), said in zip(limits, first, strict=True):
        assert "failed" not in said, (kind, more, said)
        if "ways" in said:
            assert said["needed"] > said["available"]
            assert said["available"] <= more
            assert said["ways"], (kind, more, said)
            ways += [(as_case(way, more, **kind), way) for way in said["ways"]]
    for (case, way), said in zip(ways, under_limits(run_python, [case for case, _ in ways]), strict=True):
        assert said == {
            "format": case["kv"],
            "stored": case.get("offload") == "disk",
            "tokens": case.get("tokens", 4096),
        }, (way, case, said)
    return first


def test_what_cannot_fit_is_said_before_and_every_way_out_works(run_python):
    first = try_all(run_python, [("model", 80), ("int8", 45)])
    assert all("ways" in said for said in first)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_every_space_there_is_an_error_before_or_an_answer(run_python):
    spaces = range(10, 130, 16)
    first = try_all(run_python, [(kv, mib) for kv in ("model", "int8", "int8/int4", "int4") for mib in spaces])
    for i in range(4):
        said = ["ways" in said for said in first[i * len(spaces) : (i + 1) * len(spaces)]]
        assert said == sorted(said, reverse=True)
        assert said[0]
        assert not said[-1]


def test_auto_runs_wherever_anything_does(run_python):
    sizes = [26, 36, 86, 200]
    cases = [{"more": mib << 20, "kv": "auto", "offload": "auto"} for mib in sizes]
    said = under_limits(run_python, cases)
    assert [s.get("tokens") for s in said] == [4096] * len(sizes), said
    ranks = [(s["stored"], ["model", "int8", "int8/int4", "int4"].index(s["format"])) for s in said]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == (True, 3)
    assert ranks[-1] == (False, 0)


@pytest.fixture
def planned(monkeypatch):
    """Every call is planned, with memory as the test says."""
    monkeypatch.setattr(plan_call, "SMALL", 0)
    monkeypatch.setattr(plan_call, "address_space", lambda: None)

    def memory(n: float) -> None:
        monkeypatch.setattr(plan_call, "available_bytes", lambda: int(n))

    return memory


def history(model, tokens: int, memory, **options):
    """A cache that has tokens in memory already."""
    set_options(model, progress=False, chunk=128, **options)
    memory(1 << 34)
    cache = LongCache()
    with torch.inference_mode():
        model(random_ids(1, tokens), past_key_values=cache, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_a_history_that_grows_too_long_goes_to_the_disk(planned, tmp_path, kv):
    model = tiny_model(hidden_size=256, num_hidden_layers=8)
    more = random_ids(1, 2048, seed=2)
    logits, stored = [], []
    for memory in (1 << 34, 0):
        cache = history(model, 3072, planned, kv=kv, offload="auto", offload_dir=str(tmp_path))
        assert cache.layers[0].store is None
        shape = shape_of(model)[1]
        new = peak(shape, Work(2048, 3072, chunk=128), Storage(kv)).bytes - shape.weight_bytes - cache.nbytes
        planned(memory or new - (2 << 20))
        with torch.inference_mode():
            logits.append(model(more, past_key_values=cache, logits_to_keep=1).logits)
            step = model(random_ids(1, 1, seed=3), past_key_values=cache).logits
        assert cache.format.name == kv
        assert cache.get_seq_length() == 5121
        stored.append(cache.layers[0].store is not None)
        logits[-1] = torch.cat([logits[-1], step], 1)
    assert stored == [False, True]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_a_cache_with_tokens_is_not_offered_another_format(planned):
    model = tiny_model(hidden_size=256, num_hidden_layers=8)
    cache = history(model, 3072, planned, kv="model", offload=None)
    planned(4 << 20)
    before = [layer.length for layer in cache.layers]
    with torch.inference_mode(), pytest.raises(DoesNotFit) as caught:
        model(random_ids(1, 2048), past_key_values=cache, logits_to_keep=1)
    assert [layer.length for layer in cache.layers] == before
    assert caught.value.needed > caught.value.available
    assert caught.value.ways
    assert "kv=" not in str(caught.value.ways)


def test_a_cache_that_says_its_format_is_told_so(planned):
    model = tiny_model(hidden_size=256, num_hidden_layers=8)
    set_options(model, progress=False, chunk=128, offload=None)
    shape = shape_of(model)[1]
    planned(peak(shape, Work(4096, chunk=128), Storage("int8")).bytes - shape.weight_bytes)
    ids = random_ids(1, 4096)
    with torch.inference_mode():
        with pytest.raises(DoesNotFit, match=re.escape('LongCache(kv="int8")')):
            model(ids, past_key_values=LongCache(kv="model"), logits_to_keep=1)
        cache = LongCache(kv="int8")
        model(ids, past_key_values=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 4096


def test_logits_count_only_where_they_are_made(planned):
    model = tiny_model(vocab_size=50_000)
    set_options(model, progress=False, chunk=128)
    ids = random_ids(1, 2048)
    all_logits = 2048 * 50_000 * 4
    planned(all_logits // 2)
    with torch.inference_mode():
        assert model.model(ids).last_hidden_state.shape[:2] == (1, 2048)
        assert model.model(ids, use_cache=False).last_hidden_state.shape[:2] == (1, 2048)
        assert model(ids, logits_to_keep=1).logits.shape[:2] == (1, 1)
        with pytest.raises(DoesNotFit, match="logits_to_keep=1") as caught:
            model(ids)
        assert caught.value.needed >= all_logits
        planned(all_logits * 1.2)
        assert model(ids).logits.shape[:2] == (1, 2048)


# -- what is to be generated -------------------------------------------------------------------------------------------


def once(*_, **__):
    """A stopping criterion: one token is enough."""
    return torch.ones(1, dtype=torch.bool)


def generate(model, ids, cache, **more):
    with torch.inference_mode():
        more = {"stopping_criteria": [once], "eos_token_id": None, "do_sample": False, **more}
        return model.generate(ids, **{_compat.cache_name(): cache}, **more)


def room_for(shape, kv: str, new: int, batch: int = 1) -> float:
    """Bytes in which 512 tokens and so many new ones fit in this format, with what "auto" wants to spare."""
    work = Work(512, new=new, batch=batch, chunk=128)
    return 1.06 * (peak(shape, work, Storage(kv)).bytes - shape.weight_bytes)


@pytest.mark.parametrize("how", ["max_new_tokens", "max_length", "config", "embeddings", "beams", "chunks", "another"])
def test_auto_counts_what_generate_may_make(planned, how):
    model = tiny_model(hidden_size=256, num_hidden_layers=4)
    set_options(model, progress=False, chunk=128)
    rows = 2 if how == "beams" else 1
    shape = shape_of(model)[1]
    planned(room_for(shape, "int8", 3072, rows))
    assert (
        room_for(shape, "model", 0, rows)
        < room_for(shape, "int8", 3072, rows)
        < room_for(shape, "model", 3072, rows) / 1.06
    )
    ids, more, given = random_ids(1, 512), {"max_new_tokens": 3072}, LongCache()
    if how == "max_length":
        more = {"max_length": 3584}
    elif how == "config":
        model.generation_config.max_new_tokens, more = 3072, {}
    elif how == "embeddings":
        more["inputs_embeds"], ids = model.model.embed_tokens(ids).detach(), None
    elif how == "beams":
        more["num_beams"] = 2
        more["stopping_criteria"] = [lambda ids, *_, **__: torch.ones(len(ids), dtype=torch.bool)]
    elif how == "chunks":
        needs_prefill_chunks()
        more["prefill_chunk_size"] = 100
    seen = []
    if how == "another":  # the plan of another model that is asked meanwhile, and of this one in another thread
        other = tiny_model(hidden_size=256, num_hidden_layers=4)
        set_options(other, progress=False, chunk=128)

        def meanwhile(*_, **__):
            for asked, run in ((other, lambda f: f()), (model, in_a_thread)):
                cache = LongCache()
                run(lambda asked=asked, cache=cache: history_of(asked, ids, cache))
                seen.append(cache.format.name)
            return torch.ones(1, dtype=torch.bool)

        more["stopping_criteria"] = [meanwhile]
    generate(model, ids, given, **more)
    assert given.format.name == "int8"
    assert seen == (["model", "model"] if how == "another" else [])
    again = LongCache()
    history_of(model, random_ids(1, 512), again)
    assert again.format.name == "model"  # nothing is left of it
    if how == "max_new_tokens":
        short = LongCache()
        generate(model, ids, short, max_new_tokens=8)
        assert short.format.name == "model"


def in_a_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def history_of(model, ids, cache) -> None:
    with torch.inference_mode():
        model(ids, **{_compat.cache_name(): cache}, logits_to_keep=1)


@pytest.mark.parametrize("limit", ["memory", "kv_memory"])
def test_what_cannot_be_generated_is_said_before(planned, limit):
    model = tiny_model(hidden_size=256, num_hidden_layers=4)
    set_options(model, progress=False, chunk=128, kv="model", offload=None)
    if limit == "memory":
        planned(room_for(shape_of(model)[1], "model", 1024))
    else:
        set_options(model, kv_memory=4 * 1024 * (512 + 1024))
        planned(1 << 34)
    ids, cache = random_ids(1, 512), LongCache()
    with pytest.raises(DoesNotFit, match="512 tokens and up to 2999 that are generated") as caught:
        generate(model, ids, cache, max_new_tokens=3000)
    assert cache.get_seq_length() == 0
    (way,) = [way for way in caught.value.ways if "max_new_tokens" in way]
    most = int(re.search(r"max_new_tokens=(\d+)", way)[1])
    assert 1000 < most < 2500
    with pytest.raises(DoesNotFit):
        generate(model, ids, cache, max_new_tokens=most + 10)
    generate(model, ids, cache, max_new_tokens=most)
    assert cache.get_seq_length() == 512


# -- a limit that is reached on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "page_size", "step"), [("model", "auto", 1), ("model", 64, 7), ("int8", "auto", 64), ("int8/int4", 64, 16)]
)
def test_pages_never_take_more_than_kv_memory(kv, page_size, step):
    model = tiny_model(hidden_size=256)
    ids = random_ids(1, 1200)
    most = 2 * (600 * 1024 if kv == "model" else 470 * 1024)
    start = 550 if kv == "model" else 400
    set_options(model, progress=False, kv=kv, page_size=page_size, offload=None, kv_memory=most)
    free = tiny_model(hidden_size=256)
    set_options(free, progress=False, kv=kv, page_size=page_size)
    cache, other = LongCache(), LongCache()
    for asked, mine in ((model, cache), (free, other)):
        history_of(asked, ids[:, :start], mine)
    at = start
    with torch.inference_mode():
        while at < 1200:
            more = ids[:, at : at + step]
            before = [(layer.length, layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
            try:
                logits = model(more, past_key_values=cache).logits
            except DoesNotFit as e:
                error = e
                break
            torch.testing.assert_close(logits, free(more, past_key_values=other).logits, atol=1e-4, rtol=1e-4)
            assert cache.nbytes <= most
            at += step
        else:
            raise AssertionError("there was room for everything")
        assert error.needed > error.available == most
        assert "kv_memory" in error.ways[0]
        assert at > start
        if kv == "model":
            assert 600 - step < at <= 600  # all of it is used
        for layer, (length, keys, values) in zip(cache.layers, before, strict=True):
            assert layer.length == length == at
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
        set_options(model, kv_memory="auto")
        on, want = (f(more, past_key_values=c).logits for f, c in ((model, cache), (free, other)))
        torch.testing.assert_close(on, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_tokens_that_outgrow_kv_memory_go_to_the_disk(kv, tmp_path):
    model = tiny_model(hidden_size=256)
    free = tiny_model(hidden_size=256)
    ids = random_ids(1, 720)
    most = 2 * (600 * 1024 if kv == "model" else 470 * 1024)
    start = 590 if kv == "model" else 511
    set_options(model, progress=False, kv=kv, kv_memory=most, offload_dir=str(tmp_path))
    set_options(free, progress=False, kv=kv)
    cache, other = LongCache(), LongCache()
    for asked, mine in ((model, cache), (free, other)):
        history_of(asked, ids[:, :start], mine)
    assert cache.layers[0].store is None
    with torch.inference_mode():
        end = 640 if kv == "model" else 720
        for at in range(start, end):
            one = ids[:, at : at + 1]
            a, b = (asked(one, past_key_values=mine).logits for asked, mine in ((model, cache), (free, other)))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            if cache.layers[0].store is not None and at % 50 == 0:
                assert cache.nbytes <= most
    assert cache.layers[0].store is not None
    assert cache.get_seq_length() == end
