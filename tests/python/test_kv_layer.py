"""A layer in compact formats: whatever is done to it, it holds its tokens up to rounding, and what others hold stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama1m_ext import dense, offload, ops
from llama1m_ext.cache import PagedLayer
from llama1m_ext.formats import KvFormat, Page
from rounded import FORMATS, HEADS, PARAMS, SINK, STEPS, TAIL, copies, new_tokens, same_bits, tensors

pytestmark = pytest.mark.usefixtures("one_thread", "nan_in_new_pages")


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


def in_several_pages(page_size, kv, keys, values):
    layer = PagedLayer(page_size, KvFormat.parse(kv))
    for a, b in ((0, 500), (500, 820), (820, 1200)):
        layer.update(keys[:, :, a:b], values[:, :, a:b])
    assert len(layer.pages) > 3, "expected more than one compact page"
    return layer


@pytest.mark.parametrize("kv", ["int8", "int4", "model/fp8"])
@pytest.mark.parametrize("page_size", ["auto", 100])
def test_crop_anywhere_then_append(kv, page_size):
    keys, values = new_tokens(2, 1200, 0, 80)
    for length in [0, 1, 63, 64, 65, 128, 129, 191, 192, 448, 511, 512, 513, 575, 576, 577, 640, 700, 1023, 1024, 1025]:
        layer = in_several_pages(page_size, kv, keys, values)
        layer.truncate(length)
        k, v = keys[:, :, :length], values[:, :, :length]
        for step, n in enumerate((1, 62, 1, 1, 200, 320, 400)):
            more = new_tokens(2, n, 1 + step, 80)
            layer.update(*more)
            k, v = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
        check(layer, k, v)
        # Growing costs no page for each step, however it was cropped.
        assert len(layer.pages) <= 8 + (0 if page_size == "auto" else layer.length // 128)


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
                found = layer.update(k, v)
                assert torch.equal(found[0][:, :, -n:], k) and torch.equal(found[1][:, :, -n:], v)  # not rounded yet
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


@pytest.mark.parametrize("kv", ["int8", "model/int4"])
@pytest.mark.parametrize("back_to", [640, 700, 1024, 1030, 1100, 1190])
@pytest.mark.parametrize("how", ["truncate", "restore"])
def test_what_is_shared_stays_as_it_is(kv, back_to, how):
    keys, values = new_tokens(2, 1200, 0)
    layer = in_several_pages("auto", kv, keys[:, :, :1200], values[:, :, :1200])
    snapshot = None
    if how == "restore":
        layer.truncate(back_to)
        keys, values = keys[:, :, :back_to], values[:, :, :back_to]
        snapshot = layer.snapshot()
        for seed in (3, 4, 5):
            layer.update(*new_tokens(2, 170, seed))
    shared = layer.share(layer.length)
    found = [t for p in shared for t in p.tensors().values()]
    before = [t.clone() for t in found]
    other = PagedLayer.of_pages(shared, layer.length, layer.format)
    if snapshot is not None:
        layer.restore(snapshot)
    else:
        layer.truncate(back_to)
        keys, values = keys[:, :, :back_to], values[:, :, :back_to]
    for seed, n in enumerate((3, 90, 170, 200)):
        for one in (layer, other):
            one.update(*new_tokens(2, n, seed + (one is other) * 10))
    assert same_bits(found, before)
    check(
        layer,
        *(
            torch.cat([x, *(new_tokens(2, n, s)[i] for s, n in enumerate((3, 90, 170, 200)))], 2)
            for i, x in enumerate((keys, values))
        ),
    )


def test_a_copy_is_gone_on_with_by_itself():
    keys, values = new_tokens(2, 1200, 0)
    layer = in_several_pages("auto", "int8", keys, values)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again.reorder_cache(torch.tensor([1, 0]))
        more = new_tokens(2, 500, 1)
        again.update(*more)
        check(again, torch.cat([keys[[1, 0]], more[0]], 2), torch.cat([values[[1, 0]], more[1]], 2))
        assert again.nbytes < layer.nbytes + 600 * layer.format.token_bytes(HEADS, 16, 4) * 2
    check(layer, keys, values)


def test_rows_are_repeated_then_gone_on_with():
    keys, values = new_tokens(2, 1200, 0)
    layer = in_several_pages("auto", "int8", keys, values)
    layer.batch_repeat_interleave(2)
    more = new_tokens(4, 500, 1)
    layer.update(*more)
    rows = [0, 0, 1, 1]
    check(layer, torch.cat([keys[rows], more[0]], 2), torch.cat([values[rows], more[1]], 2))


@pytest.mark.parametrize(
    "sizes", [(64,), (3, 61, 64), (30, 30, 30, 30, 8), (1,) * 64, (70, 1, 57), (100, 27, 1, 64), (65, 62, 1)]
)
def test_groups_of_a_run(sizes):
    keys, values = new_tokens(1, sum(sizes) + 5, 0)
    at, run = 0, []
    for i, n in enumerate(sizes):
        n += 5 * (i == 0)  # begin in the middle of a page
        run.append(Page(keys[:, :, at : at + n], values[:, :, at : at + n]))
        at += n
    found = list(dense.groups(run, 5, at))
    assert all(k.shape == v.shape and k.shape[2] % 64 == 0 for k, v in found)
    for i, x in enumerate((keys, values)):
        assert torch.equal(torch.cat([pair[i] for pair in found], 2), x[:, :, 5:])


def test_pages_are_few_when_tokens_come_one_by_one():
    layer = PagedLayer("auto", KvFormat("int8", "int8"))
    layer.update(*new_tokens(1, 5000, 0))
    k, v = new_tokens(1, 1, 1)
    for _ in range(3000):
        layer.append(k, v)
        layer.seal()
    assert len(layer.pages) <= 8
    assert layer.nbytes < 1.2 * 8000 * layer.format.token_bytes(HEADS, 16, 4) + 2 * TAIL * 2 * HEADS * 16 * 4


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
