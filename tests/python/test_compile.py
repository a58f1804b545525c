"""torch.compile: our operators inside a graph, and whole models, which take the stock path there, without more graphs than
stock makes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, ops, testing

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture(autouse=True)
def fresh(one_thread):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    return testing.tiny_model()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def growing(name: str):
    """A function of one of our operators, and its arguments for lengths that grow by one."""
    k, v, inv_freq = random(1, 2, 200, 16), random(1, 2, 200, 16), torch.rand(8, dtype=torch.float64)
    return {
        "keys": (
            lambda q, k, v: ops.attention(q, k, v),
            lambda n: (random(1, 4, 1, 16), random(1, 2, 50 + n, 16), random(1, 2, 50 + n, 16)),
        ),
        "kv_len": (lambda q, n: ops.attention(q, k, v, kv_len=n), lambda n: (random(1, 4, 1, 16), 50 + n)),
        "queries": (lambda q: ops.attention(q, k, v, return_lse=True), lambda n: (random(1, 4, n, 16),)),
        "rope": (
            lambda q, k, at: ops.rope_apply(q, k, at, inv_freq),
            lambda n: (random(1, 4, n, 16), random(1, 2, n, 16), torch.arange(n)[None]),
        ),
        "merge": (
            lambda a, b, x, y: ops.merge_partials([a, b], [x, y]),
            lambda n: (random(1, 4, n, 16), random(1, 4, n, 16).cos(), random(1, 4, n), random(1, 4, n).cos()),
        ),
    }[name]


@pytest.mark.parametrize("name", ["keys", "kv_len", "queries", "rope", "merge"])
def test_operators_are_compiled_twice_at_most(name):
    """Once for the first length, once for any: as dynamo does it with what is dynamic; and never broken."""
    f, arguments = growing(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n in range(3, 8):
        got, want = compiled(*arguments(n)), f(*arguments(n))
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 2


def test_one_dynamic_graph_is_enough():
    f, arguments = growing("keys")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for n in (3, 9, 40):
        compiled(*arguments(n))
    assert counter.frame_count == 1


def frames(model, calls) -> tuple[int, list[torch.Tensor]]:
    """How many graphs were made, none of them broken, and the logits."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        logits = [compiled(ids, **more).logits for ids, more in calls]
    return counter.frame_count, logits


def test_model_without_a_cache(model):
    calls = [(testing.random_ids(1, n), {"use_cache": False}) for n in range(20, 25)]
    mine, ours = frames(model, calls)
    with stock():
        most, theirs = frames(model, calls)
    assert mine <= most
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made", ["one page", "several pages", "LongCache", "int8"])
def test_decoding_over_a_cache(model, made):
    """A prompt read without compilation, then tokens through a compiled model: our pages become what dynamo can follow."""
    llama1m_ext.set_options(model, page_size=16 if made == "several pages" else "auto")

    def calls():
        kind = LongCache(kv="int8") if made == "int8" else LongCache() if made == "LongCache" else DynamicCache()
        with torch.no_grad():
            model(testing.random_ids(1, 140), past_key_values=kind)
        return [(testing.random_ids(1, 1, seed=n), {"past_key_values": kind}) for n in range(5)]

    graphs, compiled = frames(model, calls())
    with torch.no_grad():
        plain = [model(ids, **more).logits for ids, more in calls()]
    # Stock makes two: for the first length, and for any. Our first step finds pages, the second what it has made of them.
    assert graphs <= (3 if TORCH >= (2, 6) else 6)  # 2.5 makes one for each layer, and each of them twice
    tolerance = 0.05 if made == "int8" else 1e-4
    torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)


def test_generate_with_a_compiled_forward(model):
    ids = testing.random_ids(1, 30)
    given = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    want = model.generate(ids, **given)
    model.forward = torch.compile(model.forward, backend="eager")
    got = model.generate(ids, **given)
    assert torch.equal(got, want)


def test_a_compiled_model_does_not_count(model):
    """A counter would be a guard: every call another graph."""
    frames(model, [(testing.random_ids(1, 20), {"use_cache": False})])
    found = llama1m_ext.stats(model)
    assert not found.served
    assert not found.stock
    with torch.no_grad():
        model(testing.random_ids(1, 20))
    assert llama1m_ext.stats(model).served == 2


def test_switching_off_is_seen_by_what_was_compiled(model):
    ids = testing.random_ids(1, 20)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        on = compiled(ids, use_cache=False).logits
        with stock():
            off = compiled(ids, use_cache=False).logits
        again = compiled(ids, use_cache=False).logits
    assert torch.equal(on, off)
    assert torch.equal(on, again)
