"""A saved cache is one model's: weights and adapters that change, and other models that write to it, are noticed."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

from llama1m_ext import LongCache, _compat, maker, saved, testing
from llama1m_ext.fingerprint import Trace

pytestmark = pytest.mark.usefixtures("one_thread")


def read(model, ids, cache):
    with torch.no_grad():
        model(ids, **{_compat.cache_name(): cache}, logits_to_keep=1)


def filled(model, n=300):
    cache = LongCache()
    read(model, testing.random_ids(1, n), cache)
    return cache


def refused(cache, path, match, model=None):
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(saved.CacheMismatch, match=match):
        cache.save(path, model)
    assert (path.read_bytes() if path.exists() else None) == before


def in_place(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1


def another_tensor(model):
    proj = model.model.layers[0].self_attn.v_proj
    proj.weight = torch.nn.Parameter(proj.weight.detach() + 1)


def another_memory(model):
    proj = model.model.layers[0].self_attn.v_proj
    proj.weight.data = proj.weight.data + 1


def embeddings(model):
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)


def theta(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def a_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)


def eps(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 1e-3


CHANGES = [in_place, another_tensor, another_memory, embeddings, theta, a_hook, eps]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [0, 1, 300])
def test_a_model_that_was_changed(tmp_path, change, more):
    """Before the cache is saved, and with tokens after the change: then it is of two models, whoever it is said to be of."""
    model = testing.tiny_model()
    cache = filled(model)
    cache.save(tmp_path / "f")
    change(model)
    if more:
        read(model, testing.random_ids(1, more), cache)
    refused(cache, tmp_path / "f", "when it made the keys" if more < 2 else "of one model")
    if more > 1:
        refused(cache, tmp_path / "f", "of one model")
        refused(pickle.loads(pickle.dumps(cache)), tmp_path / "f", "of one model", model)
        refused(copy.deepcopy(cache), tmp_path / "f", "of one model")
    cache.reset()
    read(model, testing.random_ids(1, 20), cache)
    cache.save(tmp_path / "f")  # all of it is of the model as it is now


def test_another_model_that_goes_on(tmp_path):
    one, other = testing.tiny_model(), testing.tiny_model()
    in_place(other)
    cache = filled(one)
    read(other, testing.random_ids(1, 1), cache)
    refused(cache, tmp_path / "f", "weights")
    refused(cache, tmp_path / "f", "weights", one)
    refused(cache, tmp_path / "f", "weights", other)


def test_saved_as_of_another_model(tmp_path):
    one, other = testing.tiny_model(), testing.tiny_model()
    in_place(other)
    refused(filled(one), tmp_path / "f", "weights", other)


def test_the_same_weights_in_another_object(tmp_path):
    one = testing.tiny_model()
    cache, other = filled(one), copy.deepcopy(one)
    read(other, testing.random_ids(1, 1), cache)
    read(one, testing.random_ids(1, 1), cache)
    for model in (None, one, other):
        cache.save(tmp_path / "f", model)
    assert LongCache.load(tmp_path / "f", other).get_seq_length() == 302
    del one
    gc.collect()
    with pytest.raises(ValueError, match="expected the model that made the cache"):
        cache.save(tmp_path / "f")
    cache.save(tmp_path / "f", other)  # nobody is left who could say otherwise


def test_an_adapter_that_is_switched(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(testing.tiny_model(), config).eval()
    cache = filled(model)
    with model.disable_adapter():
        refused(cache, tmp_path / "f", "k_proj")
        read(model, testing.random_ids(1, 2), cache)  # a question with another adapter
    refused(cache, tmp_path / "f", "of one model")
    again = filled(model)
    again.save(tmp_path / "f")
    assert LongCache.load(tmp_path / "f", model).get_seq_length() == 300


def test_what_is_no_change(tmp_path):
    model = testing.tiny_model()
    cache = filled(model)
    model.train()
    model.eval()
    model.requires_grad_(False)
    for n in (1, 2, 300):
        read(model, testing.random_ids(1, n), cache)
    cache.save(tmp_path / "f")
    trace = Trace(model.model)
    tensor = model.model.layers[0].self_attn.k_proj.weight
    there = torch.empty_like(tensor, device="meta")
    state = trace._layers[0]["layers.0.self_attn.k_proj.weight"]
    # To another device: the same tensor, other memory. There is none in most tests, so its name is put in place.
    trace._layers[0]["layers.0.self_attn.k_proj.weight"] = (state[0], 77, *state[2:-1], there.device)
    assert trace.change(model.model) is None
    assert trace.change(model.model) is None


def test_decoding_looks_at_a_layer_now_and_then(monkeypatch):
    """How much of a model is looked at, and how often: Python's time is each token's."""
    model = testing.tiny_model()
    looks = []
    for name in ("change", "change_of_layer"):
        kept = getattr(Trace, name)
        monkeypatch.setattr(Trace, name, lambda *args, kept=kept, name=name: looks.append(name) or kept(*args))
    cache = filled(model, 100)
    for _ in range(200):
        read(model, testing.random_ids(1, 1), cache)
    assert looks.count("change") == 0
    assert looks.count("change_of_layer") == 200 // maker.LAYER_EVERY
    looks.clear()
    read(model, testing.random_ids(1, 60), cache)
    assert looks[:1] == ["change"]
    looks.clear()
    read(model, testing.random_ids(1, 2), cache)
    assert looks == ["change_of_layer"]


def test_a_model_of_fewer_layers_is_refused():
    large, small = testing.tiny_model(num_hidden_layers=3), testing.tiny_model(num_hidden_layers=2)
    cache = filled(large)
    with pytest.raises(ValueError, match="expected a cache of 2 layers, as the model has, got 3 with 300 tokens"):
        read(small, testing.random_ids(1, 1), cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [300] * 3
    read(large, testing.random_ids(1, 1), cache)
    large.model.config.num_hidden_layers = 2  # for a while: drafting by the first layers
    read(large, testing.random_ids(1, 1), cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [302, 302, 301]
