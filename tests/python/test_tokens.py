"""A cache of one's own knows which tokens it has seen, or says that it does not."""

from __future__ import annotations

import copy

import pytest
import torch

import llama1m_ext
from llama1m_ext import testing


@pytest.fixture
def model():
    return testing.tiny_model()


def read(model, cache, ids, **more):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **more).logits


def test_ids_of_several_calls(model):
    ids = testing.random_ids(2, 40)
    cache = llama1m_ext.LongCache()
    assert cache.tokens is not None
    assert cache.tokens.shape == (1, 0)
    for a, b in ((0, 20), (20, 21), (21, 40)):
        read(model, cache, ids[:, a:b])
        assert torch.equal(cache.tokens, ids[:, :b])
    assert torch.equal(copy.deepcopy(cache).tokens, ids)


def test_it_follows_what_is_done_to_the_cache(model):
    ids = testing.random_ids(2, 40)
    cache = llama1m_ext.LongCache()
    for a, b in ((0, 30), (30, 35), (35, 40)):
        read(model, cache, ids[:, a:b])
    cache.crop(-8)
    assert torch.equal(cache.tokens, ids[:, :32])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.tokens, ids[[1, 1], :32])
    read(model, cache, ids[:, :1])
    assert torch.equal(cache.tokens, torch.cat([ids[[1, 1], :32], ids[:, :1]], 1))
    cache.batch_repeat_interleave(2)
    assert cache.tokens.shape == (4, 33)
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.tokens, torch.cat([ids[1:, :32], ids[1:, :1]], 1))
    cache.reset()
    assert cache.tokens.shape[1] == 0
    read(model, cache, ids)
    assert torch.equal(cache.tokens, ids)


def test_generate_adds_what_it_makes(model):
    ids = testing.random_ids(1, 30)
    cache = llama1m_ext.LongCache()
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    # The last new token has not been through the model.
    assert torch.equal(cache.tokens, out[:, : cache.get_seq_length()])
    again = model.generate(out, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(cache.tokens, again[:, : cache.get_seq_length()])


@pytest.mark.parametrize("how", ["embeddings", "padding", "positions", "update", "a failed call", "crop and update"])
def test_what_is_not_known(model, how):
    ids = testing.random_ids(1, 20)
    cache = llama1m_ext.LongCache()
    read(model, cache, ids)
    keys = torch.zeros(1, 2, 4, 16)
    if how == "embeddings":
        with torch.no_grad():
            model(inputs_embeds=model.model.embed_tokens(ids), past_key_values=cache)
    elif how == "padding":
        mask = torch.ones(1, 40, dtype=torch.long)
        mask[0, 0] = 0
        read(model, cache, ids, attention_mask=mask)
    elif how == "positions":
        read(model, cache, ids, position_ids=torch.arange(30, 50)[None])
    elif how == "update":
        cache.update(keys, keys, 0)
        cache.update(keys, keys, 1)
    elif how == "crop and update":
        cache.crop(-4)
        cache.update(keys, keys, 0)
        cache.update(keys, keys, 1)
        assert cache.get_seq_length() == 20
    else:
        with pytest.raises(IndexError):
            read(model, cache, torch.full((1, 4), 10**6))
        assert torch.equal(cache.tokens, ids)
        return
    assert cache.tokens is None
    read(model, cache, ids)
    assert cache.tokens is None


def test_ids_of_another_length_are_refused(model):
    cache = llama1m_ext.LongCache()
    read(model, cache, testing.random_ids(1, 20))
    with pytest.raises(ValueError, match=r"expected ids \[batch, 20\]"):
        cache.tokens = testing.random_ids(1, 19)
