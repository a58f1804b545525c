"""Caches that a user gives: those of transformers' other classes work as they do without us, through the stock path, and
ours are handed around as transformers' own are."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, _compat, testing
from test_generate import GREEDY, left_padded

V5 = int(transformers.__version__.split(".")[0]) >= 5
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:llama1m_ext"),
    pytest.mark.filterwarnings("error:past_key_values"),  # of other tokens: never here
]
MORE = {**GREEDY, "max_new_tokens": 8, "disable_compile": True}


@pytest.fixture
def model():
    return testing.tiny_model()


@pytest.fixture
def streams_without_a_gpu(monkeypatch):
    """What transformers' offloading asks of a GPU, as far as one thread can do it."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    for owner, name in ((torch, "Stream"), (torch.cuda, "Stream"), (torch.cuda, "default_stream")):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)


def quantized(model):
    # Groups that divide what these small layers hold.
    return QuantizedCache("hqq", model.config, q_group_size=16, axis_key=0, axis_value=0, residual_length=16)


FOREIGN = {
    "StaticCache": lambda model: StaticCache(config=model.config, max_cache_len=96),
    "QuantizedCache": quantized,
    "MyCache": lambda model: type("MyCache", (DynamicCache,), {})(config=model.config),
    "offloaded": lambda model: DynamicCache(config=model.config, offloading=True),
    "offloaded static": lambda model: StaticCache(config=model.config, max_cache_len=96, offloading=True),
}
REASONS = {"offloaded": "the cache is offloaded", "offloaded static": "the cache is a StaticCache"}


def talk(model, cache, ids, mask=None, turns=2, **more):
    """`generate` after `generate` on one cache."""
    for turn in range(turns):
        given = {} if mask is None else {"attention_mask": mask}
        ids = model.generate(ids, past_key_values=cache, **given, **MORE, **more)
        ids = torch.cat([ids, testing.random_ids(len(ids), 5, seed=turn)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    return ids


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_caches_that_are_not_ours(model, streams_without_a_gpu, kind, padded):
    llama1m_ext.set_options(model, chunk=8)
    ids, mask = left_padded([30, 20] if padded else [30, 30])
    ours = talk(model, FOREIGN[kind](model), ids, mask)
    counts = llama1m_ext.stats(model)
    assert (counts.served, list(counts.stock)) == (0, [REASONS.get(kind, f"the cache is a {kind}")])
    with stock():
        assert torch.equal(ours, talk(model, FOREIGN[kind](model), ids, mask))
    if kind not in ("QuantizedCache",):  # which rounds
        assert torch.equal(ours, talk(model, LongCache(), ids, mask))


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized", "dynamic"])
def test_cache_implementation_by_name(model, streams_without_a_gpu, kind):
    more = {"cache_implementation": kind, **MORE}
    if kind == "quantized":
        more["cache_config"] = {"backend": "hqq", "q_group_size": 16, "axis_key": 0, "axis_value": 0}
    ids = testing.random_ids(2, 30)
    ours = model.generate(ids, **copy.deepcopy(more))  # 4.57 takes things out of cache_config
    counts = llama1m_ext.stats(model)
    with stock():
        assert torch.equal(ours, model.generate(ids, **more))
    assert bool(counts.served) == (kind == "dynamic")
    assert len(counts.stock) == (kind != "dynamic")


@pytest.mark.parametrize("kind", ["StaticCache", "MyCache", "QuantizedCache"])
def test_prefill_chunks_into_a_foreign_cache(model, kind):
    found = []
    for context in (torch.no_grad, stock):
        with context():
            found.append(model.generate(
                testing.random_ids(1, 40), past_key_values=FOREIGN[kind](model), prefill_chunk_size=16, **MORE
            ))  # fmt: skip
    assert torch.equal(*found)
    assert not llama1m_ext.stats(model).served


def test_beams_in_a_foreign_cache(model):
    found = []
    for context in (torch.no_grad, stock):
        with context():
            found.append(model.generate(
                testing.random_ids(2, 20), past_key_values=FOREIGN["MyCache"](model), num_beams=3, **MORE
            ))  # fmt: skip
    assert torch.equal(*found)


def test_a_decoder_in_an_encoder_decoder_cache(model):
    results = []
    for context in (torch.no_grad, stock):
        with context(), torch.no_grad():
            both = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
            try:
                results.append(model(testing.random_ids(1, 20), past_key_values=both).logits)
            except Exception as e:
                results.append(type(e))
    assert results[0] is results[1] if isinstance(results[0], type) else torch.equal(*results)


@pytest.mark.skipif(V5, reason="transformers 5 has no legacy format")
def test_legacy_tuples(model):
    ids = testing.random_ids(1, 40)
    with torch.no_grad():
        want = model(ids).logits[:, 30:]
        first = model(ids[:, :30]).past_key_values
        rows = first.to_legacy_cache()
        again = DynamicCache.from_legacy_cache(rows)
        ours = model(ids[:, 30:], past_key_values=again).logits
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
    assert not llama1m_ext.stats(model).stock
    assert first.get_seq_length() == 30 and rows[0][0].shape[2] == 30


@pytest.mark.parametrize("kv", ["model", "int8"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_after_generate_with_the_middle_taken_back(model, kv, padded):
    """A question, its answer taken back, another question: as if the first had never been."""
    llama1m_ext.set_options(model, page_size=64, chunk=32)
    ids, mask = left_padded([90, 70] if padded else [90, 90])
    cache = LongCache(config=model.config, kv=kv)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
        model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    document = copy.deepcopy(cache)

    def ask(cache, seed):
        tokens = torch.cat([ids, testing.random_ids(2, 6, seed)], dim=1)
        return talk(model, cache, tokens, torch.cat([mask, mask.new_ones(2, 6)], dim=1))

    ask(cache, 1)
    cache.crop(90 - cache.get_seq_length())
    answer = ask(cache, 2)
    if kv == "model":
        assert torch.equal(answer, ask(document, 2))
        with stock():
            assert torch.equal(answer, ask(DynamicCache(config=model.config), 2))
    assert cache.get_seq_length() == answer.shape[1] - 6
    assert not llama1m_ext.stats(model).stock


def test_a_cache_goes_from_stock_to_ours_and_back(model):
    """Every few tokens the patch is switched off or on, over one cache."""
    ids, cache = testing.random_ids(2, 12), DynamicCache(config=model.config)
    with stock():
        want = model.generate(ids, **{**MORE, "max_new_tokens": 24})
    for turn in range(4):
        with stock() if turn % 2 else contextlib.nullcontext():
            ids = model.generate(ids, past_key_values=cache, **{**MORE, "max_new_tokens": 6})
    assert torch.equal(ids, want)


def test_a_foreign_cache_filled_by_ours_and_ours_by_a_foreign_one(model):
    """Keys and values copied from cache to cache, as people do it by `update`."""
    ids = testing.random_ids(1, 30)
    static, long = StaticCache(config=model.config, max_cache_len=64), LongCache(config=model.config)
    with torch.no_grad():
        want = model(ids).logits[:, 20:]
        mine = model(ids[:, :20], past_key_values=LongCache()).past_key_values
        for i, layer in enumerate(mine.layers):
            places = {"cache_position": torch.arange(20)}
            static.update(layer.keys, layer.values, i, *([] if V5 else [places]))
        first = model(ids[:, 20:], past_key_values=static, cache_position=torch.arange(20, 30)).logits
        for i, layer in enumerate(static.layers):
            long.update(layer.keys[:, :, :20], layer.values[:, :, :20], i)
        second = model(ids[:, 20:], past_key_values=long).logits
    torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)


def test_a_quantized_cache_of_transformers_and_a_compact_one_of_ours(model):
    """Both lossy, each by itself: neither is taken for the other."""
    ids = testing.random_ids(1, 200)
    llama1m_ext.set_options(model, kv="int8", page_size=64)
    theirs, ours = quantized(model), LongCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=ours)
        model(ids, past_key_values=theirs)
    assert ours.format.name == "int8"
    assert theirs.layers[0]._quantized_keys is not None
    assert llama1m_ext.stats(model).served == 2
    assert list(llama1m_ext.stats(model).stock) == ["the cache is a QuantizedCache"]


def test_a_warning_for_each_kind_of_cache_once(model):
    ids = testing.random_ids(1, 20)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for kind in ("StaticCache", "MyCache", "StaticCache", "MyCache"):
            model(ids, past_key_values=FOREIGN[kind](model))
    texts = [str(w.message).rpartition(": ")[2] for w in told if "llama1m_ext" in str(w.message)]
    assert texts == ["the cache is a StaticCache", "the cache is a MyCache"]


def test_copies_go_their_own_ways(model):
    """Two deep copies and the original, each continued otherwise, in any order."""
    prompt = testing.random_ids(1, 40)
    caches = [LongCache(config=model.config, page_size=8)]
    with torch.no_grad():
        model(prompt, past_key_values=caches[0])
        caches += [copy.deepcopy(caches[0]), copy.deepcopy(caches[0])]
        tails = [testing.random_ids(1, 9, seed=i) for i in range(3)]
        found = [[] for _ in caches]
        for at in range(9):
            for i in (2, 0, 1):
                found[i].append(model(tails[i][:, at : at + 1], past_key_values=caches[i]).logits)
        for tail, logits in zip(tails, found, strict=True):
            want = model(torch.cat([prompt, tail], dim=1)).logits[:, 40:]
            torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["LongCache", "DynamicCache"])
def test_the_cache_by_this_release_s_name(model, kind):
    """5.24 renamed `past_key_values`. Its own name is served without a word, the older one as well, positions included."""
    name, ids = _compat.cache_name(), testing.random_ids(1, 24)
    made = {"LongCache": LongCache, "DynamicCache": lambda: DynamicCache(config=model.config)}[kind]
    assert (name == "cache") == hasattr(transformers.modeling_outputs.BaseModelOutputWithPast(), "cache")
    with stock(), torch.no_grad():
        want = model(ids).logits[:, -1]
    for by in (name, "past_key_values"):
        cache = made()
        llama1m_ext.stats(model, reset=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error" if by == name else "ignore")
            first = model(ids[:, :16], use_cache=True, **{by: cache})
            assert first[name] is cache and getattr(first, name) is cache
            got = model(ids[:, 16:], **{by: cache}).logits[:, -1]
            inner = model.model(ids[:, :1], None, None, cache)  # by position, too
        assert inner[name] is cache and cache.get_seq_length() == 25
        assert not llama1m_ext.stats(model).stock and llama1m_ext.stats(model).served == 3 * len(model.model.layers)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    out = model.generate(ids, return_dict_in_generate=True, **MORE)
    assert out[name].get_seq_length() == out.sequences.shape[1] - 1
