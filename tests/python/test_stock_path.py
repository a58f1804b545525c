"""What we can't serve exactly runs as it does without us: the same numbers, counted with the reason, said once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

import llama1m_ext
from conftest import assert_near, stock
from llama1m_ext import _compat, memory, testing


@pytest.fixture
def model():
    return testing.tiny_model()


def reasons(model) -> list[str]:
    counts = llama1m_ext.stats(model)
    assert counts.served == 0, counts
    return list(counts.stock)


def ids_and_mask():
    return testing.random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)


def causal(batch, n):
    return torch.ones(n, n, dtype=torch.bool).tril().expand(batch, 1, n, n).clone()


def holes():
    ids, mask = ids_and_mask()
    mask[0, 5:9] = 0
    return {"input_ids": ids, "attention_mask": mask}


def four_dimensions():
    ids, _ = ids_and_mask()
    mask = causal(2, 30)
    mask[:, :, :, 3] = False
    return {"input_ids": ids, "attention_mask": mask}


def packed():
    ids, _ = ids_and_mask()
    places = torch.cat([torch.arange(12), torch.arange(18)])
    return {"input_ids": ids, "position_ids": places.expand(2, -1), "use_cache": False}


def short_mask():
    ids, mask = ids_and_mask()
    return {"input_ids": ids, "attention_mask": mask[:, :28]}


def unknown_keyword():
    return {"input_ids": ids_and_mask()[0], "no_such_thing": 3}


CASES = {
    "attention_mask has holes": holes,
    "attention_mask is not 2-D": four_dimensions,
    "position_ids are packed sequences": packed,
    "attention_mask has another shape than the keys": short_mask,
    "argument no_such_thing": unknown_keyword,
}


@pytest.mark.parametrize("reason", CASES)
def test_one_warning_and_stock_s_numbers(model, reason):
    llama1m_ext.set_options(model, chunk=8)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=reason):
            ours = model(**CASES[reason]()).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**CASES[reason]())
        with stock():
            theirs = model(**CASES[reason]()).logits
    # Where stock lets packed sequences see each other, we don't: test_silent_errors.py.
    assert torch.equal(ours, theirs) == (_compat.keeps_packed_apart() or "packed" not in reason)
    assert llama1m_ext.stats(model) == llama1m_ext.Stats(0, {reason: 4}, 0)


def test_position_ids_that_do_not_jump_are_served(model):
    ids, _ = ids_and_mask()
    places = torch.arange(7, 37).expand(2, -1)
    with torch.no_grad():
        ours = model(ids, position_ids=places, use_cache=False).logits
        with stock():
            theirs = model(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    assert llama1m_ext.stats(model).served == 2


def test_a_mask_with_holes_that_would_not_fit_is_an_error(model, monkeypatch):
    monkeypatch.setattr("llama1m_ext.stock_path.available_bytes", lambda: 5000)
    monkeypatch.setattr("llama1m_ext.stock_path.SMALL", 0)
    assert memory.available_bytes() != 5000
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"attention_mask has holes: .* 30 keys .* 30 queries of 2 rows"),
    ):
        model(**holes())


def quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model(*args, **kwargs)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use_cache", [False, True, "an empty one"])
def test_training_has_stock_s_gradients(model, use_cache, padded):
    ids, mask = ids_and_mask()
    given = {"input_ids": ids, "labels": ids, "use_cache": bool(use_cache)}
    if padded:
        given |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def step():
        if use_cache == "an empty one":
            given["past_key_values"] = DynamicCache(config=model.config)
        made = quietly(model, **given) if use_cache != "an empty one" else model(**given)
        made.loss.backward()
        return made

    ours = step()
    grads = [p.grad.clone() for p in model.parameters()]
    found = llama1m_ext.stats(model, reset=True)
    assert found.served == 2 and not found.stock
    model.zero_grad()
    with stock():
        theirs = step()
    assert_near(grads, [p.grad for p in model.parameters()])
    name = _compat.cache_name()
    assert (ours.get(name) is None) == (theirs.get(name) is None) == (not use_cache)
    if use_cache:  # the same kind of cache, with gradients
        for a, b in zip(ours[name].layers, theirs[name].layers, strict=True):
            assert type(a) is type(b) and a.keys.requires_grad and a.values.requires_grad
            torch.testing.assert_close(a.keys, b.keys, rtol=1e-3, atol=1e-3)


def test_gradients_of_embeddings_alone(model):
    embeds = model.model.embed_tokens(testing.random_ids(1, 20)).detach().requires_grad_()
    model.requires_grad_(False)
    quietly(model, inputs_embeds=embeds).logits.sum().backward()
    assert llama1m_ext.stats(model).served == 2
    assert embeds.grad.abs().sum() > 0


def test_grad_mode_without_anything_to_differentiate_is_served(model):
    model.requires_grad_(False)
    quietly(model, testing.random_ids(1, 20))
    assert llama1m_ext.stats(model).served == 2


def test_gradients_that_show_only_in_the_attention(model):
    """A projection that begins to need gradients out of sight, as a functional adapter's does."""
    model.requires_grad_(False)
    extra = torch.zeros(64, requires_grad=True)
    layer = model.model.layers[1].self_attn
    layer.q_proj.register_forward_hook(lambda module, args, output: output + extra)
    ids, mask = testing.random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    ours = quietly(model, ids, attention_mask=mask, use_cache=True)
    ours.logits[mask.bool()].square().sum().backward()
    counts = llama1m_ext.stats(model)
    assert counts.served == 1
    assert list(counts.stock.values()) == [1]
    mine, extra.grad = extra.grad.clone(), None
    with stock():
        theirs = model(ids, attention_mask=mask, use_cache=True)
        theirs.logits[mask.bool()].square().sum().backward()
    torch.testing.assert_close(mine, extra.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.logits[mask.bool()], theirs.logits[mask.bool()], rtol=2e-4, atol=2e-4)


def test_dropout_and_gradient_checkpointing(model):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.train()
    ids = testing.random_ids(1, 20)
    with torch.no_grad():
        torch.manual_seed(0)
        ours = quietly(model, ids).logits
        with stock():
            torch.manual_seed(0)
            assert torch.equal(ours, model(ids).logits)
    assert reasons(model) == ["training with dropout"]
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert reasons(model) == ["training with dropout", "training"]


def test_foreign_caches(model):
    ids = testing.random_ids(1, 20)
    places = torch.arange(20)
    with torch.no_grad():
        results = []
        for context in (torch.no_grad, stock):
            with context():
                cache = StaticCache(config=model.config, max_cache_len=32)
                results.append(model(ids, past_key_values=cache, cache_position=places).logits)
    assert torch.equal(*results)
    assert "the cache is a StaticCache" in reasons(model)


def test_static_cache_through_generate(model):
    more = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    more["cache_implementation"] = "static"
    more["disable_compile"] = True
    ids = testing.random_ids(1, 20)
    ours = model.generate(ids, **more)
    with stock():
        assert torch.equal(ours, model.generate(ids, **more))
    assert reasons(model) == ["the cache is a StaticCache"]


def test_float64(model):
    model = model.double()
    ids = testing.random_ids(1, 20)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"dtype torch\.float64"):
            ours = model(ids).logits
        with stock():
            assert torch.equal(ours, model(ids).logits)
    assert reasons(model) == ["dtype torch.float64"]


def test_float64_at_length_rewinds_the_cache(model):
    model = model.double()
    llama1m_ext.set_options(model, chunk=8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(testing.random_ids(1, 20), past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_output_attentions_of_eager(tmp_path):
    from transformers import AutoModelForCausalLM

    path = testing.tiny_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    ids = testing.random_ids(1, 20)
    with torch.no_grad():
        ours = quietly(model, ids, output_attentions=True)
        with stock():
            theirs = model(ids, output_attentions=True)
    assert len(ours.attentions) == 2
    assert all(torch.equal(a, b) for a, b in zip(ours.attentions, theirs.attentions, strict=True))


def test_autocast(model):
    ids = testing.random_ids(1, 40)
    for chunk in ("auto", 16):
        llama1m_ext.set_options(model, chunk=chunk)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours = model(ids).logits
            with stock():
                theirs = model(ids).logits
        with torch.no_grad(), stock():
            truth = model(ids).logits
        testing.assert_no_worse(ours, theirs, truth, factor=1.25)
    assert llama1m_ext.stats(model).served


def test_errors_are_stock_s(model):
    for arguments in ({}, {"input_ids": testing.random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 64)}):
        with torch.no_grad():
            with pytest.raises(ValueError) as ours:
                model(**arguments)
            with stock(), pytest.raises(ValueError) as theirs:
                model(**arguments)
        assert str(ours.value) == str(theirs.value)
    cache = llama1m_ext.LongCache(config=model.config)
    with torch.no_grad():
        model(testing.random_ids(2, 5), past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"):
            model(testing.random_ids(3, 5), past_key_values=cache)


def test_a_layer_of_somebody_else(model):
    class Other(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.seen = []

        def forward(self, *args, **kwargs):
            self.seen.append(kwargs.get("attention_mask"))
            return self.inner(*args, **kwargs)

    ids, mask = testing.random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        other = Other(model.model.layers[1].self_attn)
        model.model.layers[1].self_attn = other
        with pytest.warns(UserWarning, match="the forward of a Other is not ours"):
            ours = model(ids, attention_mask=mask).logits
    assert isinstance(other.seen[0], torch.Tensor), "a layer that does not know us got our own kind of mask"
    torch.testing.assert_close(ours[mask.bool()], want[mask.bool()], rtol=2e-4, atol=2e-4)


def test_deepcopied_model_counts_for_itself(model):
    with torch.no_grad():
        model(testing.random_ids(1, 5))
        again = copy.deepcopy(model)
        again(testing.random_ids(1, 5))
    assert llama1m_ext.stats(model).served == 2
    assert llama1m_ext.stats(again).served == 4
