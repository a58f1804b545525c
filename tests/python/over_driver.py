"""Whole models over the driver of tests/cuda, against the CPU's engine in the same process. Run by test_cuda_driver.py."""

from __future__ import annotations

import contextlib

import pytest
import torch

import llama1m_ext
from llama1m_ext import LongCache, _core, cuda, ops, saved, testing
from llama1m_ext.pinned import HostPage, HostStore

torch.set_num_threads(1)


@contextlib.contextmanager
def on_the_cpu():
    """The CPU's engine, which is out of reach otherwise (conftest.py)."""
    nothing, ops._core = ops._core, _core
    cuda._host_memory = False
    try:
        yield
    finally:
        ops._core, cuda._host_memory = nothing, True


def both(run):
    """(over the driver, on the CPU), each run with a model of its own."""
    with torch.no_grad():
        ours = run()
        with on_the_cpu():
            return ours, run()


def test_the_driver_is_ours():
    assert cuda.info()["driver"]["fake"]
    with pytest.raises(AttributeError):
        ops._core.attention  # noqa: B018


@pytest.mark.parametrize("implementation", ["heads of 16", "heads of 64"])
def test_generate(implementation):
    """Two rows, one padded, more than a tail of tokens: the tokens of the CPU's engine."""
    changes = {} if implementation == "heads of 16" else {"hidden_size": 256, "num_attention_heads": 4}

    def run():
        model = testing.tiny_model(**changes)
        ids = testing.random_ids(2, 40)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        stats = llama1m_ext.stats(model)
        assert (stats.stock, stats.served) == ({}, 2 * 24)
        return tokens

    ours, theirs = both(run)
    assert torch.equal(ours, theirs)
    assert len(set(ours[0, 40:].tolist())) > 8, "too dull to tell anything"


@pytest.mark.parametrize("kv", ["model", "int8", "int8/int4", "fp8"])
def test_a_long_prompt_and_what_follows(kv):
    """Layer by layer in chunks; in a compact format the tail becomes compact while tokens follow."""

    def run():
        model = testing.tiny_model()
        llama1m_ext.set_options(model, chunk=100, kv=kv)
        cache = LongCache()
        logits = [model(testing.random_ids(1, 450), past_key_values=cache, logits_to_keep=3).logits]
        for step in range(3):
            logits.append(model(testing.random_ids(1, 70, seed=step), past_key_values=cache).logits)
            logits.append(model(testing.random_ids(1, 1, seed=step), past_key_values=cache).logits)
        assert llama1m_ext.stats(model).layer_major == 1
        return logits, cache

    (ours, mine), (theirs, cache) = both(run)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for a, b in zip(mine.layers, cache.layers, strict=True):
        assert [page.size for page in a.pages] == [page.size for page in b.pages]
        assert (a.format.name, a.length) == (kv, 663)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    """Against float32, no further off than the CPU's engine."""

    def run(dtype=dtype):
        model = testing.tiny_model(dtype=dtype, hidden_size=256, num_attention_heads=4)
        llama1m_ext.set_options(model, chunk=64)
        cache = LongCache()
        first = model(testing.random_ids(1, 150), past_key_values=cache).logits
        return torch.cat([first, model(testing.random_ids(1, 1), past_key_values=cache).logits], 1).double()

    ours, theirs = both(run)
    with torch.no_grad(), on_the_cpu():
        truth = run(torch.float32)
    error, yardstick = ((x - truth).square().mean().sqrt() for x in (ours, theirs))
    assert error <= 1.2 * yardstick


def test_a_saved_cache_goes_on(tmp_path):
    ids = testing.random_ids(1, 300)

    def run(path):
        model = testing.tiny_model()
        cache = LongCache(kv="int8")
        model(ids, past_key_values=cache)
        saved.save(cache, path, model)
        return model(ids[:, :5], past_key_values=LongCache.load(path, model)).logits

    ours, theirs = both(lambda: run(tmp_path / str(cuda._host_memory)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_pages_on_a_disk(tmp_path):
    ids = testing.random_ids(2, 700)

    def run():
        model = testing.tiny_model()
        llama1m_ext.set_options(model, chunk=128, kv="int8", offload="disk", kv_memory=1 << 16, offload_dir=tmp_path)
        cache = LongCache()
        first = model(ids, past_key_values=cache, logits_to_keep=1).logits
        assert cache.layers[0].store is not None
        return torch.cat([first, model(ids[:, :3], past_key_values=cache).logits], 1)

    ours, theirs = both(run)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_pages_in_main_memory():
    """Pages behind a GPU come through its buffers; the last ones are there."""
    ids = testing.random_ids(2, 700)

    def run():
        model = testing.tiny_model()
        llama1m_ext.set_options(model, chunk=128)
        cache, store = LongCache(kv="int8", config=model.config), HostStore(1 << 16, 2)
        for layer in cache.layers:
            layer.keep_in(store)
        first = model(ids, past_key_values=cache, logits_to_keep=1).logits
        assert any(isinstance(page, HostPage) for page in cache.layers[0].pages)
        return torch.cat([first, model(ids[:, :3], past_key_values=cache).logits], 1)

    ours, theirs = both(run)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_beams():
    def run():
        model = testing.tiny_model()
        llama1m_ext.set_options(model, kv="int8")
        ids = testing.random_ids(1, 330)
        more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **more)
        stats = llama1m_ext.stats(model)
        assert (stats.stock, stats.served) == ({}, 2 * 8)
        return found

    ours, theirs = both(run)
    assert torch.equal(ours, theirs)


def test_a_prompt_that_is_remembered(tmp_path):
    book, questions = testing.random_ids(1, 600), [testing.random_ids(1, 9, seed=n) for n in (1, 2)]

    def run():
        model = testing.tiny_model()
        llama1m_ext.set_options(model, chunk=128)
        llama1m_ext.remember(model, tmp_path / str(cuda._host_memory))
        logits = [model(torch.cat([book, q], 1), logits_to_keep=1).logits for q in questions]
        assert llama1m_ext.stats(model).reused >= 600
        return torch.cat(logits)

    ours, theirs = both(run)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_layers_that_accelerate_has_hooked(tmp_path):
    """As `device_map` spreads them, here all to one place: layer by layer in chunks all the same."""
    from transformers import AutoModelForCausalLM

    path = testing.tiny_checkpoint(tmp_path / "model")
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]

    def run(spread):
        if not spread:
            model = AutoModelForCausalLM.from_pretrained(path)
        else:
            from accelerate import dispatch_model

            model = dispatch_model(
                AutoModelForCausalLM.from_pretrained(path), dict.fromkeys(names, "cpu"), force_hooks=True
            )
            assert "_hf_hook" in model.model.layers[0].__dict__
        llama1m_ext.set_options(model, chunk=64)
        with torch.no_grad():
            logits = model(testing.random_ids(1, 300), logits_to_keep=2).logits
        assert llama1m_ext.stats(model).layer_major == 1
        return logits

    assert torch.equal(run(True), run(False))
