"""The paged cache holds what a `DynamicLayer` holds, whatever is done to both."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llama1m_ext import LongCache
from llama1m_ext.cache import PagedLayer, cache_layers

CROP_TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters
HEADS, HEAD_DIM = 2, 4
pytestmark = pytest.mark.usefixtures("nan_in_new_pages")


def new_tokens(batch: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # [batch, n, heads, head_dim] in memory, as projections give them
    k, v = (torch.randn(batch, n, HEADS, HEAD_DIM, generator=generator).transpose(1, 2) for _ in range(2))
    return k, v


def same(ours: PagedLayer, theirs: DynamicLayer) -> None:
    length = theirs.get_seq_length()
    assert ours.get_seq_length() == length
    if length:
        assert ours.capacity == sum(p.k.shape[2] for p in ours.pages) == sum(p.v.shape[2] for p in ours.pages)
    assert ours.capacity >= ours.length
    if length:
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 9)),
        st.tuples(st.just("remove"), st.integers(1, 12)),
        st.tuples(st.just("reorder"), st.integers(0, 1000)),
        st.tuples(st.just("repeat"), st.integers(2, 2)),
        st.tuples(st.just("select"), st.integers(0, 1000)),
        st.tuples(st.just("deepcopy"), st.just(0)),
        st.tuples(st.just("pickle"), st.just(0)),
        st.tuples(st.just("hold"), st.just(0)),
        st.tuples(st.just("set"), st.integers(1, 5)),
        st.tuples(st.just("offload"), st.just(0)),
        st.tuples(st.just("truncate"), st.integers(0, 20)),
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(page_size=st.sampled_from(["auto", 1, 3, 8]), todo=operations, batch=st.integers(1, 3))
def test_any_sequence_of_operations(page_size, todo, batch):
    ours, theirs = PagedLayer(page_size), DynamicLayer()
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step, (what, n) in enumerate([("update", 2), *todo]):
        if theirs.is_initialized and theirs.get_seq_length():
            batch = theirs.keys.shape[0]
        elif what in ("reorder", "repeat", "select", "set"):
            continue  # DynamicLayer has no rows then
        if what == "update":
            k, v = new_tokens(batch, n, step)
            for a, b in zip(ours.update(k, v), theirs.update(k, v), strict=True):
                assert torch.equal(a, b)
        elif what == "remove":
            if CROP_TAKES_LENGTH and n > theirs.get_seq_length():
                continue  # transformers 4 crops from the wrong end then
            ours.crop(-n)
            theirs.crop(-n)
        elif what == "reorder":
            index = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(n))
            ours.reorder_cache(index)
            theirs.reorder_cache(index)
        elif what == "repeat" and batch <= 4:
            ours.batch_repeat_interleave(n)
            theirs.batch_repeat_interleave(n)
        elif what == "select":
            index = torch.randint(0, batch, (1 + n % 3,), generator=torch.Generator().manual_seed(n))
            ours.batch_select_indices(index)
            theirs.batch_select_indices(index)
        elif what == "deepcopy":
            left, ours = ours, copy.deepcopy(ours)
            left.reset()
        elif what == "pickle":
            ours = pickle.loads(pickle.dumps(ours))
        elif what == "hold" and ours.length:
            held.append((ours.keys, ours.keys.clone()))
        elif what == "set" and ours.length:
            n = min(n, ours.length)
            ours.keys, ours.values = ours.keys[:, :, :n], ours.values[:, :, :n]
            theirs.keys, theirs.values = theirs.keys[:, :, :n], theirs.values[:, :, :n]
        elif what == "offload":
            ours.offload()
            ours.prefetch()
        elif what == "truncate" and n < theirs.get_seq_length():
            ours.truncate(n)
            theirs.keys, theirs.values = theirs.keys[:, :, :n], theirs.values[:, :, :n]
        same(ours, theirs)
    for view, then in held:
        assert torch.equal(view, then), "keys that were handed out changed under their holder"


@pytest.mark.parametrize("then", ["append", "reorder", "fewer, then more"])
def test_a_view_that_was_handed_out_stays_as_it_is(then):
    layer = PagedLayer()
    layer.append(*new_tokens(2, 10, 0))
    views = [layer.keys, layer.values]
    before = [x.clone() for x in views]
    assert views[0].data_ptr() == layer.pages[0].k.data_ptr()
    if then == "reorder":
        layer.reorder_cache(torch.tensor([1, 0]))
    elif then == "fewer, then more":
        layer.truncate(7)
    layer.append(*new_tokens(2, 9, 1))
    assert all(torch.equal(a, b) for a, b in zip(views, before, strict=True))


def test_decode_appends_in_place():
    layer = PagedLayer()
    layer.expect(1000)
    layer.append(*new_tokens(1, 1000, 0))
    pages = [p.k.data_ptr() for p in layer.pages]
    for step in range(60):
        layer.append(*new_tokens(1, 1, step))
    assert [p.k.data_ptr() for p in layer.pages] == pages
    assert len(pages) == 1


def test_automatic_pages_are_few_and_waste_little():
    layer = PagedLayer()
    k = torch.empty(1, 1, 1, 8)
    layer.expect(100_000)
    layer.slots(k, k)
    assert layer.capacity <= 100_000 * 1.07
    layer.commit(100_000)
    while layer.length < 1_000_000:  # as decode grows it, without the writing
        layer.slots(k, k)
        layer.length = layer.capacity
        assert layer.capacity <= max(layer.length, 100_000) * 1.125 + 128
    assert len(layer.pages) < 24


def test_pages_have_the_size_that_was_asked_for():
    layer = PagedLayer(32)
    layer.append(*new_tokens(2, 100, 0))
    assert [tuple(p.k.shape) for p in layer.pages] == [(2, HEADS, 32, HEAD_DIM)] * 4


@pytest.mark.skipif(not CROP_TAKES_LENGTH, reason="transformers 5 removes tokens only")
def test_crop_to_a_length():
    layer = PagedLayer(8)
    layer.append(*new_tokens(1, 30, 0))
    layer.crop(40)
    assert layer.length == 30
    layer.crop(11)
    assert layer.length == 11


@pytest.mark.skipif(CROP_TAKES_LENGTH, reason="transformers 4 takes a length")
def test_crop_to_a_length_is_refused():
    layer = PagedLayer(8)
    layer.append(*new_tokens(1, 30, 0))
    with pytest.raises(ValueError, match="got 11"):
        layer.crop(11)


def test_gradients_flow_through_update():
    layer = PagedLayer(8)
    layer.append(*new_tokens(1, 5, 0))
    k, v = (x.requires_grad_() for x in new_tokens(1, 3, 1))
    keys, values = layer.update(k, v)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k))
    assert torch.equal(v.grad, torch.ones_like(v))
    assert layer.length == 8


def test_other_dtypes_are_promoted_as_cat_does():
    layer, theirs = PagedLayer(8), DynamicLayer()
    for dtype in (torch.bfloat16, torch.float32):
        k, v = (x.to(dtype) for x in new_tokens(1, 5, 0))
        layer.update(k, v)
        theirs.update(k, v)
    same(layer, theirs)
    assert layer.keys.dtype == torch.float32


@pytest.fixture
def filled():
    from llama1m_ext import testing

    model = testing.tiny_model()
    cache = LongCache(config=model.config, page_size=8)
    with torch.no_grad():
        model(testing.random_ids(2, 20), past_key_values=cache)
    return cache


def test_what_a_cache_says_of_itself(filled):
    assert isinstance(filled, DynamicCache)
    assert len(filled) == 2
    assert filled.get_seq_length() == filled.get_seq_length(1) == 20
    assert filled.is_sliding == [False, False]
    assert not filled.is_compileable
    if hasattr(filled, "get_max_cache_shape"):
        assert filled.get_max_cache_shape() == -1
    else:
        assert filled.get_max_length() == -1
    step = torch.arange(20, 23) if CROP_TAKES_LENGTH else 3
    assert filled.get_mask_sizes(step, 0) == (23, 0)
    rows = [row[:2] for row in filled]
    assert all(k.shape == v.shape == (2, 2, 20, 16) for k, v in rows)
    if hasattr(filled, "to_legacy_cache"):
        assert torch.equal(filled.to_legacy_cache()[1][0], rows[1][0])
    filled.reset()
    assert filled.get_seq_length() == 0
    assert not filled.is_initialized


def test_a_copy_has_only_what_is_written(filled):
    filled.layers[0].page_size = 1000
    assert len(pickle.dumps(filled)) < 2 * 2 * 20 * 2 * 2 * 16 * 4 + 20_000
    again = pickle.loads(pickle.dumps(filled))
    assert type(again) is LongCache
    assert torch.equal(again.layers[1].keys, filled.layers[1].keys)
    assert copy.deepcopy(filled).layers[0].keys.data_ptr() != filled.layers[0].keys.data_ptr()


def test_cache_from_pairs_of_keys_and_values(filled):
    again = LongCache([(k, v) for k, v, *_ in filled])
    assert len(again) == 2
    assert torch.equal(again.layers[1].values, filled.layers[1].values)


def test_layers_with_a_window_keep_everything_and_others_are_refused(monkeypatch):
    from transformers import MistralConfig

    config = MistralConfig(num_hidden_layers=2, sliding_window=16)
    cache = LongCache(config=config)
    for i in range(2):
        cache.update(*new_tokens(1, 40, i), i)
    assert all(type(layer) is PagedLayer and layer.length == 40 for layer in cache.layers)

    class Recurrent:
        """What a model that is no attention has in its cache."""

    init = DynamicCache.__init__
    monkeypatch.setattr(
        DynamicCache, "__init__", lambda self, **k: (init(self, **k), self.layers.append(Recurrent()))[0]
    )
    with pytest.raises(ValueError, match=r"full or in a sliding window, in every layer, got .*Recurrent.* in layer 2"):
        LongCache(config=config)


def test_a_dynamic_cache_is_adopted_without_copying():
    cache = DynamicCache()
    for i in range(2):
        cache.update(*new_tokens(1, 10, i), i)
    keys = cache.layers[1].keys
    before = keys.clone()
    layers = cache_layers(cache, [None, None], "auto")
    assert layers[1].pages[0].k.data_ptr() == keys.data_ptr()
    layers[1].truncate(4)
    layers[1].append(*new_tokens(1, 3, 9))
    layers[1].reorder_cache(torch.tensor([0]))
    assert torch.equal(keys, before), "a tensor of the caller's was written to"
    assert layers[1].length == 7


@pytest.mark.parametrize("make", ["static", "uneven", "quantised layer"])
def test_foreign_caches_are_left_alone(make):
    from transformers import StaticCache

    from llama1m_ext import testing

    if make == "static":
        cache = StaticCache(config=testing.tiny_config(), max_cache_len=16)
    else:
        cache = DynamicCache()
        for i in range(2):
            cache.update(*new_tokens(1, 10 + (i if make == "uneven" else 0), i), i)
    if make == "quantised layer":
        cache.layers[1] = type("Other", (DynamicLayer,), {})()
    assert isinstance(cache_layers(cache, [None, None], "auto"), str)
