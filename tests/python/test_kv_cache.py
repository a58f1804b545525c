"""Compact caches inside transformers: every format through `generate()`, against stock with the same rounding in torch."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, dense, ops, testing
from llama1m_ext.formats import KvFormat, name_of
from rounded import (
    FORMATS,
    KEPT,
    PARAMS,
    SINK,
    STEPS,
    TAIL,
    as_kept,
    copies,
    rounded_cache,
    same_bits,
    tensors,
)

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 258}
pytestmark = pytest.mark.usefixtures("one_thread", "nan_in_new_pages")


@pytest.fixture
def model():
    return testing.tiny_model()


def both(model, kv, ids, **kwargs):
    """(ours with a compact cache, stock's with the rounding) of one `generate`."""
    llama1m_ext.stats(model, reset=True)
    cache = LongCache(kv=kv)
    ours = model.generate(ids, past_key_values=cache, **{**GREEDY, **kwargs})
    counts = llama1m_ext.stats(model)
    assert counts.served > 0 and not counts.stock, counts
    assert any(
        name_of(p.k) == cache.format.k != "model" or name_of(p.v) == cache.format.v != "model" for p in pages(cache)
    )
    with stock():
        theirs = model.generate(ids, past_key_values=rounded_cache(model, kv), **{**GREEDY, **kwargs})
    return ours, theirs


def pages(cache):
    return [page for layer in cache.layers for page in layer.pages]


# -- generate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize(("length", "chunk"), [(380, "auto"), (700, "auto"), (700, 96)])
def test_greedy(model, kv, length, chunk):
    llama1m_ext.set_options(model, chunk=chunk)
    ours, theirs = both(model, kv, testing.random_ids(1, length))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "eos_token_id": [17, 40]},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 260, "max_new_tokens": 40},
        {"prefill_chunk_size": 150},
    ],
    ids=lambda changes: next(iter(changes)) + str(len(changes)),
)
@pytest.mark.parametrize("kv", ["int8", "int8/int4"])
def test_ways_of_decoding(model, kv, changes):
    rows = 1 if "prompt_lookup_num_tokens" in changes else 2
    ours, theirs = both(model, kv, testing.random_ids(rows, 381, seed=3), **changes)
    assert torch.equal(ours, theirs)


def test_assisted_decoding(model):
    helper = testing.tiny_model(seed=0, num_hidden_layers=1)
    ours, theirs = both(model, "int4", testing.random_ids(1, 375), assistant_model=helper)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kv", ["int4", "fp8"])
def test_left_padded_batch(model, kv):
    # Groups of padding only: what lies there is no number of either's that must agree.
    ids, mask = testing.random_ids(3, 460), torch.ones(3, 460, dtype=torch.int64)
    mask[1, :50] = mask[2, :128] = 0
    ours, theirs = both(model, kv, ids, attention_mask=mask)
    assert torch.equal(ours, theirs)


def test_long_decoding_makes_the_tail_compact_again_and_again(model):
    ours, theirs = both(model, "int8", testing.random_ids(1, 300), max_new_tokens=500)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_turns_over_one_cache(model, kv):
    llama1m_ext.set_options(model, chunk=100)

    def conversation(cache):
        tokens = testing.random_ids(1, 500, seed=5)
        for turn in range(3):
            tokens = model.generate(tokens, past_key_values=cache, **{**GREEDY, "max_new_tokens": 8})
            tokens = torch.cat([tokens, testing.random_ids(1, (20, 400, 130)[turn], seed=6 + turn)], dim=1)
        return tokens

    ours = conversation(LongCache(kv=kv))
    with stock():
        assert torch.equal(ours, conversation(rounded_cache(model, kv)))


def test_the_option_and_generate_s_own_cache(model):
    llama1m_ext.set_options(model, kv="int8")
    ids = testing.random_ids(1, 500)
    out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert all(layer.format == KvFormat("int8", "int8") for layer in out.past_key_values.layers)
    with stock():
        theirs = model.generate(ids, past_key_values=rounded_cache(model, "int8"), **GREEDY)
    assert torch.equal(out.sequences, theirs)
    # A cache with a format of its own keeps it, and so does one that was begun in another.
    for cache in (LongCache(kv="int4"), out.past_key_values):
        before = cache.layers[0].format if cache.layers else cache.format
        llama1m_ext.set_options(model, kv="fp8")
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert cache.layers[0].format == before


@pytest.mark.parametrize("kv", ["int8", "k8v4"])
def test_stock_goes_on_with_a_compact_cache(model, kv):
    ids = testing.random_ids(1, 800)
    cache, theirs = LongCache(kv=kv), rounded_cache(model, kv)
    with torch.no_grad():
        model(ids[:, :460], past_key_values=cache)
        with stock():
            model(ids[:, :460], past_key_values=theirs)
            a = model.generate(ids, past_key_values=cache, **GREEDY)
            b = model.generate(ids, past_key_values=theirs, **GREEDY)
    assert torch.equal(a, b)
    assert name_of(cache.layers[0].pages[1].k) == "int8"
    # And back: the same pages serve our own path again.
    more = torch.cat([a, ids[:, :100]], 1)
    a = model.generate(more, past_key_values=cache, **GREEDY)
    with stock():
        b = model.generate(more, past_key_values=theirs, **GREEDY)
    assert torch.equal(a, b)


def test_inference_mode_then_no_grad(model):
    ids = testing.random_ids(2, 500)
    cache, theirs = LongCache(kv="int8"), rounded_cache(model, "int8")
    with torch.inference_mode():
        first = model.generate(ids, past_key_values=cache, num_beams=2, **GREEDY)
    with stock():
        want = model.generate(ids, past_key_values=theirs, num_beams=2, **GREEDY)
    assert torch.equal(first, want)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    theirs.reorder_cache(torch.tensor([1, 0, 3, 2]))
    more = testing.random_ids(4, 300, seed=2)
    with torch.no_grad():
        a = model(more, past_key_values=cache).logits
        with stock():
            b = model(more, past_key_values=theirs).logits
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


# -- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("chunk", ["auto", 100])
def test_prefill_is_exact_and_what_is_kept_is_rounded_once(model, kv, chunk):
    llama1m_ext.set_options(model, chunk=chunk)
    ids = testing.random_ids(2, 600)
    exact, cache = LongCache(kv="model"), LongCache(kv=kv)
    with torch.no_grad():
        want = model(ids, past_key_values=exact, logits_to_keep=1).logits
        ours = model(ids, past_key_values=cache, logits_to_keep=1).logits
    assert torch.equal(ours, want), "the prompt's own attention must not see compact keys"
    for mine, theirs in zip(cache.layers, exact.layers, strict=True):
        assert mine.pages[0].size == SINK
        for which, name in (("keys", mine.format.k), ("values", mine.format.v)):
            a, b = getattr(mine, which), getattr(theirs, which)
            sealed = 64 + (600 - SINK - KEPT) // 64 * 64
            for part in (slice(0, SINK), slice(sealed, 600)):
                assert torch.equal(a[:, :, part], b[:, :, part])
            torch.testing.assert_close(
                a[:, :, SINK:sealed].double(),
                b[:, :, SINK:sealed].double() if name == "model" else as_kept(b[:, :, SINK:sealed], name, which[0]),
                rtol=1e-6,
                atol=1e-6,
            )


@pytest.mark.parametrize("kv", FORMATS)
def test_decoding_against_float64_over_what_the_pages_stand_for(kv):
    """The truth is the model in float64 over the codes' meaning, the yardstick stock in float32 over the same.

    A token's logits say little about either error (ratios of 0.6 to 2.7): three models are looked at together, whose ratio
    is 0.6 to 1.5. Compact formats turn the query as well, at a rounding an element.
    """
    triples = [_decoded(kv, seed) for seed in range(3)]
    testing.assert_no_worse(*(torch.cat(x) for x in zip(*triples, strict=True)), factor=2.0)


def _decoded(kv, seed):
    model = testing.tiny_model(seed, hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=80)
    truth = copy.deepcopy(model).double()
    ids, more = testing.random_ids(2, 600, seed=seed), testing.random_ids(2, 1, seed=seed + 1)
    cache = LongCache(kv=kv)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for i, layer in enumerate(cache.layers):
            sides = [
                torch.cat([testing.dense_reference(getattr(p, which), which, 80) for p in layer.pages], 2)[:, :, :600]
                for which in "kv"
            ]
            caches[0].update(*sides, i)
            caches[1].update(*(x.float() for x in sides), i)
        at = {"position_ids": torch.zeros(2, 1, dtype=torch.int64)}  # where stock's phases are right too
        ours = model(more, past_key_values=cache, **at).logits
        with stock():
            want = truth(more, past_key_values=caches[0], **at).logits
            yardstick = model(more, past_key_values=caches[1], **at).logits
    assert llama1m_ext.stats(model).served == 4
    return ours, yardstick, want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = testing.tiny_model(dtype=dtype)
    cache, exact = LongCache(kv="int8"), LongCache(kv="model")
    with torch.no_grad():
        for c in (cache, exact):
            model(testing.random_ids(1, 600), past_key_values=c)
    bound = testing.error(exact.layers[0].keys, torch.zeros(())) * 8 * (STEPS["int8"] + PARAMS + torch.finfo(dtype).eps)
    assert cache.layers[0].keys.dtype == dtype
    assert (cache.layers[0].keys - exact.layers[0].keys).abs().max() < bound


@pytest.mark.parametrize("kv", ["int8", "int4", "int8/int4", "model/int4"])
def test_memory(kv):
    model = testing.tiny_model(hidden_size=256)  # head_dim 64
    cache = LongCache(kv=kv)
    with torch.no_grad():
        model(testing.random_ids(1, 5000), past_key_values=cache, logits_to_keep=1)
    a_token = cache.format.token_bytes(2, 64, 4)
    dense_bytes = 2 * 2 * 64 * 4
    for layer in cache.layers:
        assert layer.length == 5000
        assert layer.nbytes <= (SINK + TAIL) * dense_bytes + (5000 - SINK - KEPT) * 1.08 * a_token
    gc.collect()
    alive = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in pages(cache) for t in p.tensors().values()
    }
    assert sum(alive.values()) == cache.nbytes, "a page keeps memory that is not its own"


def test_scratch_is_one_for_all_layers(model):
    llama1m_ext.set_options(model, chunk=100, kv="int8")
    made, alive = [], []

    class Watched(dense.Scratch):
        def __init__(self):
            super().__init__()
            alive.append(weakref.ref(self))

        def take(self, tokens, k, v):
            page = super().take(tokens, k, v)
            made.append(page.k.untyped_storage().data_ptr())
            return page

    from llama1m_ext import call

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(call, "Scratch", Watched)
        out = model(testing.random_ids(1, 900))
    assert len(made) == 2 and len(set(made)) == 1
    kept = {t.untyped_storage().data_ptr() for p in pages(out.past_key_values) for t in p.tensors().values()}
    assert not kept & set(made)
    gc.collect()
    assert all(ref() is None for ref in alive), "the prompt's scratch memory outlives its call"


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["attention", "kv_append"])
@pytest.mark.parametrize(("past", "n", "chunk"), [(0, 500, 100), (450, 500, 100), (450, 5, "auto"), (383, 1, "auto")])
def test_an_interrupted_call_leaves_the_cache_bit_equal(model, where, past, n, chunk, monkeypatch):
    llama1m_ext.set_options(model, chunk=chunk)
    cache, ids = LongCache(kv="int8/int4"), testing.random_ids(2, past + n)
    with torch.no_grad():
        if past:
            model(ids[:, :past], past_key_values=cache)
        before, lengths = [copies(layer) for layer in cache.layers], [layer.length for layer in cache.layers]
        want = model(ids[:, past:], past_key_values=copy.deepcopy(cache)).logits
        original, calls = getattr(ops, where), 0

        def interrupted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise Stop
            return original(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(ops, where, interrupted)
            if (past, n, where) == (450, 5, "kv_append"):
                model(ids[:, past:], past_key_values=copy.deepcopy(cache))  # nothing becomes compact here
                assert calls == 0
                return
            with pytest.raises(Stop):
                model(ids[:, past:], past_key_values=cache)
        assert [layer.length for layer in cache.layers][: len(lengths)] == (lengths or [])
        for layer, then in zip(cache.layers, before, strict=False):
            assert same_bits(tensors(layer), then)
        assert torch.equal(model(ids[:, past:], past_key_values=cache).logits, want)


# -- what a cache says, and mistakes -----------------------------------------------------------------------------------------


def test_a_dynamic_cache_of_stock_becomes_compact(model):
    llama1m_ext.set_options(model, kv="int8")
    ids, cache = testing.random_ids(1, 620), DynamicCache(config=model.config)
    with torch.no_grad():
        with stock():
            model(ids[:, :600], past_key_values=cache)
        model(ids[:, 600:], past_key_values=cache)
    assert [name_of(p.k) for p in cache.layers[0].pages] == ["model", "int8", "model"]


def test_what_foreign_code_sets_is_kept_until_the_next_seal(model):
    cache = LongCache(kv="int8")
    with torch.no_grad():
        model(testing.random_ids(1, 600), past_key_values=cache)
    layer = cache.layers[0]
    keys, values = layer.keys, layer.values
    layer.keys = keys[:, :, :500]
    with pytest.raises(ValueError, match="one length"):
        layer.append(keys[:, :, :1], values[:, :, :1])
    layer.values = values[:, :, :500]
    assert torch.equal(layer.keys, keys[:, :, :500]) and torch.equal(layer.values, values[:, :, :500])
    layer.update(keys[:, :, 500:501], values[:, :, 500:501])
    assert [name_of(p.k) for p in layer.pages] == ["model", "int8", "model"]


def test_what_a_cache_says_of_itself():
    model = testing.tiny_model(hidden_size=256)  # head_dim 64
    cache = LongCache()
    assert cache.format is None and cache.nbytes == 0
    with torch.no_grad():
        model(testing.random_ids(1, 600), past_key_values=cache)
    assert cache.format == KvFormat("model", "model")
    compact = LongCache(config=model.config, kv="k8v4")
    assert compact.format == KvFormat("int8", "int4")
    assert "0 tokens" in repr(compact) and "int8/int4" in repr(compact)
    with torch.no_grad():
        model(testing.random_ids(1, 600), past_key_values=compact)
    assert "600 tokens" in repr(compact)
    assert compact.nbytes == sum(layer.nbytes for layer in compact.layers) < cache.nbytes
    again = pickle.loads(pickle.dumps(compact))
    assert again.format == compact.format
    assert same_bits(tensors(again.layers[1]), tensors(compact.layers[1]))
    compact.reset()
    assert compact.format == KvFormat("int8", "int4") and compact.get_seq_length() == 0


@pytest.mark.parametrize(("kv", "error"), [("int5", ValueError), ("", ValueError), (8, TypeError), ("k8v", ValueError)])
def test_formats_that_do_not_exist(kv, error):
    with pytest.raises(error, match="kv: expected"):
        LongCache(kv=kv)
