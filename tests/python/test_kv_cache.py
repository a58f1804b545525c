"""Compact caches inside transformers: every format through `generate()`, against stock with the same rounding in torch."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, dense, offload, ops, testing
from llama1m_ext.cache import PagedLayer
from llama1m_ext.formats import KvFormat, Page, name_of

FORMATS = ["int8", "fp8", "int4", "int8/int4", "model/int4", "int8/model"]
SINK, KEPT, TAIL = 64, 64, 320
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 258}
STEPS = {"int8": 1 / 510, "int4": 1 / 30, "fp8": 1 / 56, "model": 0.0}
"""Largest rounding error of a code, as a part of its group's range: half a step of 255 or 15; 16 of 896 for e4m3."""
PARAMS = 3 * 2**-11
"""Likewise that of the scale and the offset in float16: the offset may be 1.5 times the range."""


@pytest.fixture(autouse=True)
def nan_in_new_pages(monkeypatch):
    make = dense.empty

    def filled(*args):
        made = make(*args)
        for t in made if isinstance(made, tuple) else (made,):
            t.view(torch.uint8).fill_(0x7F) if t.dtype.itemsize == 1 else t.fill_(float("nan"))
        return made

    monkeypatch.setattr(dense, "empty", filled)


class Rounded(DynamicLayer):
    """Stock's layer with the rule of when tokens become compact, and their rounding by `testing`, in plain torch."""

    kv = KvFormat("int8", "int8")
    sealed = 0

    def update(self, key_states, value_states, *args, **kwargs):
        found = super().update(key_states, value_states)
        self.keys, self.values = (x.clone() for x in found)
        length = self.keys.shape[2]
        start = self.sealed
        sink = max(0, SINK - start)
        if length - start >= TAIL + sink:
            a = start + sink
            b = a + (length - a - KEPT) // 64 * 64
            for x, name, which in ((self.keys, self.kv.k, "k"), (self.values, self.kv.v, "v")):
                if name != "model":
                    x[:, :, a:b] = as_kept(x[:, :, a:b], name, which).to(x.dtype)
            self.sealed = b
        return found

    def crop(self, tokens):
        super().crop(tokens)
        length = self.get_seq_length()
        self.sealed = 0 if length <= SINK else min(self.sealed, length)


def as_kept(x, name, which):
    return testing.dense_reference(testing.compact_reference(x, name, which), which, x.shape[3])


def rounded_cache(model, kv: str) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [Rounded() for _ in cache.layers]
    for layer in cache.layers:
        layer.kv = KvFormat.parse(kv)
    return cache


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
    ids = testing.random_ids(1, 500)
    cache, theirs = LongCache(kv=kv), rounded_cache(model, kv)
    with torch.no_grad():
        model(ids[:, :460], past_key_values=cache)
        with stock():
            model(ids[:, :460], past_key_values=theirs)
            a = model.generate(ids, past_key_values=cache, **GREEDY)
            b = model.generate(ids, past_key_values=theirs, **GREEDY)
    assert torch.equal(a, b)
    assert name_of(cache.layers[0].pages[1].k) == "int8"
    assert torch.equal(
        model.generate(torch.cat([a, ids], 1), past_key_values=cache, **GREEDY),
        model.generate(torch.cat([a, ids], 1), past_key_values=copy.deepcopy(cache), **GREEDY)
        if cache.crop(-GREEDY["max_new_tokens"] - 499) is None
        else None,
    )


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
    """The truth is the model in float64 over the codes' meaning, the yardstick stock in float32 over the same."""
    model = testing.tiny_model(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=80)
    truth = copy.deepcopy(model).double()
    ids, more = testing.random_ids(2, 600), testing.random_ids(2, 1, seed=1)
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
    testing.assert_no_worse(ours, yardstick, want, factor=1.5)


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


# -- one layer -------------------------------------------------------------------------------------------------------------

HEADS = 2


def new_tokens(batch: int, n: int, seed: int, head_dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, n, HEADS, head_dim, generator=generator).transpose(1, 2) for _ in range(2))
    return k.clamp(-4, 4), v.clamp(-4, 4)


def tensors(layer) -> list[torch.Tensor]:
    return [t for page in layer._used(layer.length) for t in dense.loaded(page).tensors().values()]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def copies(layer) -> list[torch.Tensor]:
    return [t.clone() for t in tensors(layer)]


def check(layer, keys, values) -> None:
    """The pages are as they should be, and hold the tokens up to rounding."""
    assert layer.length == keys.shape[2] and layer.capacity == sum(p.size for p in layer.pages) >= layer.length
    assert all(p.size > 0 for p in layer.pages)
    at = 0
    for page in layer.pages:
        assert at < layer.length
        at += page.size
        if at > layer.length:
            assert page is layer.pages[-1] and dense.is_dense(page)
    for name, ours, truth in ((layer.format.k, layer.keys, keys), (layer.format.v, layer.values, values)):
        worst = 8.0 * (STEPS[name] + PARAMS * (name != "model"))
        assert (ours - truth).abs().max() <= worst
        assert torch.equal(ours[:, :, : min(SINK, layer.length)], truth[:, :, : min(SINK, layer.length)])
    q = torch.randn(keys.shape[0], 4, 1, keys.shape[3], generator=torch.Generator().manual_seed(0))
    k, v = layer.dense()
    torch.testing.assert_close(offload.attention(q, layer), ops.attention(q, k, v), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kv", ["int8", "int4", "model/fp8"])
@pytest.mark.parametrize("page_size", ["auto", 100])
def test_crop_anywhere_then_append(kv, page_size):
    keys, values = new_tokens(2, 1200, 0, 80)
    for length in [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 300, 575, 576, 577, 640, 700, 1151, 1152, 1153]:
        layer = PagedLayer(page_size, KvFormat.parse(kv))
        layer.update(keys, values)
        layer.truncate(length)
        k, v = keys[:, :, :length], values[:, :, :length]
        for step, n in enumerate((1, 62, 1, 1, 200, 320, 400)):
            more = new_tokens(2, n, 1 + step, 80)
            layer.update(*more)
            k, v = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
        check(layer, k, v)
        # Growing costs no page for each step, however it was cropped.
        assert len(layer.pages) <= 6 + (0 if page_size == "auto" else layer.length // 128)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 500)),
        st.tuples(st.just("update"), st.integers(1, 5)),
        st.tuples(st.just("expected"), st.integers(1, 700)),
        st.tuples(st.just("truncate"), st.integers(1, 400)),
        st.tuples(st.just("truncate"), st.integers(1, 3)),
        st.tuples(st.just("reorder"), st.integers(0, 1000)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.integers(0, 1000)),
        st.tuples(st.just("deepcopy"), st.just(0)),
        st.tuples(st.just("pickle"), st.just(0)),
        st.tuples(st.just("hold"), st.integers(0, 1)),
        st.tuples(st.just("share"), st.integers(0, 1000)),
        st.tuples(st.just("of_pages"), st.integers(0, 1000)),
        st.tuples(st.just("retried"), st.integers(1, 500)),
        st.tuples(st.just("set"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv=st.sampled_from(FORMATS),
    page_size=st.sampled_from(["auto", 1, 64, 150]),
    todo=operations,
    batch=st.integers(1, 2),
    head_dim=st.sampled_from([16, 80]),
)
def test_any_sequence_of_operations(kv, page_size, todo, batch, head_dim):
    layer = PagedLayer(page_size, KvFormat.parse(kv))
    keys, values = new_tokens(batch, 400, 99, head_dim)
    layer.update(keys, values)
    held: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    scratch = dense.Scratch()
    for step, (what, n) in enumerate(todo):
        if what in ("update", "expected", "retried"):
            k, v = new_tokens(batch, n, step, head_dim)
            if what == "retried":
                before, snapshot = copies(layer), layer.snapshot()
                layer.expect(layer.length + n, scratch)
                layer.append(*new_tokens(batch, n // 2 + 1, 50 + step, head_dim))
                if n % 2:
                    layer.seal()
                layer.restore(snapshot)
                assert same_bits(tensors(layer), before)
            if what != "update":  # in chunks, as a prefill does it
                layer.expect(layer.length + n, scratch)
                for a in range(0, n, 150):
                    layer.append(k[:, :, a : a + 150], v[:, :, a : a + 150])
                layer.seal()
            else:
                layer.update(k, v)
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        elif what == "truncate":
            n = max(1, layer.length - n)
            layer.truncate(n)
            keys, values = keys[:, :, :n], values[:, :, :n]
        elif what in ("reorder", "repeat", "select"):
            if what == "repeat" and batch <= 2:
                rows = torch.arange(batch).repeat_interleave(n)
                layer.batch_repeat_interleave(n)
            elif what == "reorder":
                rows = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(n))
                layer.reorder_cache(rows)
            else:
                rows = torch.randint(0, batch, (1 + n % 3,), generator=torch.Generator().manual_seed(n))
                layer.batch_select_indices(rows)
            if what == "reorder":
                held = [h for h in held if h[0] is not None]
            keys, values, batch = keys[rows], values[rows], len(rows)
        elif what == "deepcopy":
            left, layer = layer, copy.deepcopy(layer)
            left.reset()
        elif what == "pickle":
            layer = pickle.loads(pickle.dumps(layer))
        elif what == "hold":
            found = [layer.keys, layer.values]
            held.append((found, [x.clone() for x in found]))
        elif what in ("share", "of_pages"):
            n %= layer.length + 1
            shared = layer.share(n)
            assert sum(p.size for p in shared) == n
            found = [t for p in shared for t in p.tensors().values()]
            held.append((found, [t.clone() for t in found]))
            if what == "of_pages" and n:
                layer = PagedLayer.of_pages(shared, n, layer.format, page_size, layer.kind)
                keys, values = keys[:, :, :n], values[:, :, :n]
        elif what == "set":
            layer.keys, layer.values = layer.keys, layer.values
            keys, values = layer.keys.clone(), layer.values.clone()
        if layer.length:
            check(layer, keys, values)
    for found, then in held:
        assert same_bits(found, then), "what was handed out changed under its holder"


def test_pages_are_few_when_tokens_come_one_by_one():
    layer = PagedLayer("auto", KvFormat("int8", "int8"))
    layer.update(*new_tokens(1, 5000, 0))
    k, v = new_tokens(1, 1, 1)
    for _ in range(3000):
        layer.append(k, v)
        layer.seal()
    assert len(layer.pages) <= 8
    assert layer.nbytes < 1.2 * 8000 * layer.format.token_bytes(HEADS, 16, 4) + 2 * TAIL * 2 * HEADS * 16 * 4


def test_scratch_is_one_for_all_layers(model):
    llama1m_ext.set_options(model, chunk=100, kv="int8")
    made = []
    make = dense.new_page

    class Watched(dense.Scratch):
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
    assert make is dense.new_page


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


def test_gradients_through_a_compact_layer():
    layer = PagedLayer("auto", KvFormat("int8", "int8"))
    layer.update(*new_tokens(1, 500, 0))
    k, v = (x.requires_grad_() for x in new_tokens(1, 3, 1))
    keys, values = layer.update(k, v)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k)) and torch.equal(v.grad, torch.ones_like(v))
    assert layer.length == 503


def test_a_dtype_that_has_no_compact_form_stays_dense():
    layer = PagedLayer("auto", KvFormat("int8", "int8"))
    layer.update(*(x.double() for x in new_tokens(1, 1000, 0)))
    assert all(dense.is_dense(p) for p in layer.pages)


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


def test_pages_of_somebody_else_are_checked():
    layer = PagedLayer("auto", KvFormat("int8", "int8"))
    layer.update(*new_tokens(1, 500, 0))
    with pytest.raises(ValueError, match="0 to 500"):
        layer.share(501)
    with pytest.raises(ValueError, match="tokens of the pages"):
        PagedLayer.of_pages(layer.share(100), 101)
    with pytest.raises(ValueError, match="compact"):
        PagedLayer.of_pages(layer.share(500)[1:2], 64)
    with pytest.raises(ValueError, match="settled"):
        layer.replace(len(layer.pages) - 1, Page(*new_tokens(1, 3, 0)))
    with pytest.raises(ValueError, match="64 tokens"):
        layer.replace(0, Page(*new_tokens(1, 3, 0)))
