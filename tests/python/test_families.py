"""Families of models beside Llama: nothing until they are switched on, then the same as stock's, on our path."""

from __future__ import annotations

import inspect
import re
import sys
import types

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

import llama1m_ext
from conftest import stock, why_no_prefill_chunks
from llama1m_ext import families, prefill, testing
from llama1m_ext.families import FAMILIES, LLAMA

HERE = [name for name, family in FAMILIES.items() if family is not LLAMA and family.is_known]
WINDOW = 12
# What makes layers of a family slide, or leaves it out: all layers, some of them, none.
SLIDES = {
    "mistral": {"sliding_window": WINDOW},
    "ministral": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "cwm": {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layers": [1, 0, 1]},
}
FULL = {
    "mistral": {"sliding_window": None},
    "ministral": {"layer_types": ["full_attention"] * 3},
    "cwm": {"layer_types": ["full_attention"] * 3},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "seed_oss": {"attention_bias": True},
}
CASES = [(name, False) for name in HERE] + [(name, True) for name in HERE if name in SLIDES]


@pytest.fixture(autouse=True)
def switched_on(one_thread, families_as_they_were):
    llama1m_ext.enable(families="all")


def made(name: str, slides: bool = False, seed: int = 1, **changes):
    """A random model of a family, of 3 layers, all of whose weights matter."""
    family = FAMILIES[name]
    fields = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        **(SLIDES if slides else FULL).get(name, {}),
        **changes,
    }
    if name == "qwen2":
        del fields["head_dim"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.prefix}Config")(**fields)
    model = getattr(transformers, f"{family.prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            spread = 0.2 if p.dim() > 1 else 0.3
            p.add_(torch.randn(p.shape, generator=generator) * spread)
    return model


def windows(model) -> list[int | None]:
    kind = families.classes_of(model.model)
    return [kind.window(model.config, i) for i in range(model.config.num_hidden_layers)]


def only_ours(model) -> bool:
    found = llama1m_ext.stats(model)
    return found.served > 0 and not found.stock


@pytest.mark.parametrize("name", HERE)
def test_the_layers_are_llama_s(name):
    """What a line in the table claims, of the transformers that is installed: its code is Llama's but for the names."""
    import importlib

    def text(of, prefix):
        words = re.sub(r'"""[\s\S]*?"""|#.*|^\s*@.*$', "", inspect.getsource(of), flags=re.M).replace(prefix, "Llama")
        return re.sub(r"\s+", "", words).replace(",)", ")").replace("Optional[", "").replace("]", "")

    from transformers.models.llama import modeling_llama

    family = FAMILIES[name]
    with stock():
        theirs = importlib.import_module(family.modeling)
        for part in ("DecoderLayer.forward", "RotaryEmbedding.forward", *(["MLP.forward"] if family.plain_mlp else [])):
            owner, _, function = part.partition(".")
            mine = getattr(getattr(theirs, family.prefix + owner), function)
            llamas = getattr(getattr(modeling_llama, "Llama" + owner), function)
            if part == "RotaryEmbedding.forward" and text(mine, family.prefix) != text(llamas, "Llama"):
                # Put in other words in 5.15 to 5.18: then what it computes.
                rotary = types.SimpleNamespace(rope_type="default", inv_freq=torch.rand(16), attention_scaling=1.25)
                x, positions = torch.zeros(2, 3, dtype=torch.bfloat16), torch.randint(0, 1 << 20, (2, 40))
                for a, b in zip(mine(rotary, x, positions), llamas(rotary, x, positions), strict=True):
                    assert torch.equal(a, b), part
                continue
            assert text(mine, family.prefix) == text(llamas, "Llama"), part
        assert text(theirs.apply_rotary_pos_emb, family.prefix) == text(modeling_llama.apply_rotary_pos_emb, "Llama")


@pytest.mark.parametrize(("name", "slides"), CASES)
def test_forward(name, slides):
    model = made(name, slides)
    assert any(windows(model)) == slides
    for n, chunk in (
        (5, "auto"),
        (WINDOW, "auto"),
        (WINDOW + 1, "auto"),
        (50, "auto"),
        (50, 7),
        (50, WINDOW - 1),
        (50, 30),
    ):
        ids = testing.random_ids(2, n)
        mask = torch.ones(2, n, dtype=torch.long)
        mask[1, : n // 3] = 0
        for given in ({}, {"attention_mask": mask}, {"use_cache": False}):
            llama1m_ext.set_options(model, chunk=chunk)
            with torch.no_grad():
                ours = model(ids, **given)
                with stock():
                    theirs = model(ids, **given)
            seen = given.get("attention_mask", torch.ones(2, n)).bool()
            torch.testing.assert_close(ours.logits[seen], theirs.logits[seen], rtol=2e-4, atol=2e-4)
            assert (ours.past_key_values is None) == (theirs.past_key_values is None)
    assert only_ours(model)
    assert llama1m_ext.stats(model).layer_major


@pytest.mark.parametrize("name", [name for name, slides in CASES if slides])
def test_a_wrong_window_would_show(name):
    model = made(name, slides=True)
    ids = testing.random_ids(1, 50)
    with torch.no_grad():
        one = model(ids).logits
        model.config.sliding_window = WINDOW + 1
        other = model(ids).logits
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "slides"), CASES)
def test_generate(name, slides):
    model = made(name, slides)
    ids = testing.random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for more in ({"num_beams": 1}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"do_sample": True}):
        given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **more}
        torch.manual_seed(0)
        ours = model.generate(ids, **given)
        with stock():
            torch.manual_seed(0)
            theirs = model.generate(ids, **given)
        assert torch.equal(ours, theirs), more
    assert only_ours(model)


@pytest.mark.parametrize("name", [name for name in HERE if name in SLIDES])
def test_ways_that_take_tokens_back(name):
    """An assistant's tokens that are refused are cut off again, beyond the window too; and chunks of a prompt."""
    model = made(name, slides=True)
    ids = testing.random_ids(1, 10).repeat(1, 4)
    given = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    for more in ({"assistant_model": made(name, slides=True, seed=2)}, {"prefill_chunk_size": 7}):
        if "prefill_chunk_size" in more and why_no_prefill_chunks() is not None:
            continue
        with stock():
            theirs = generated(model, ids, **given, **more)
        ours = generated(model, ids, **given, **more)
        if isinstance(theirs, str):
            assert ours == theirs and "Cannot `crop`" in theirs, more  # so some releases before 5.23
        else:
            assert torch.equal(ours, theirs), more
    assert only_ours(model)


def test_a_count_of_tokens_that_is_a_tensor():
    """As a crop by a tensor leaves it, and `update` adds to in place (assisted generation in 5.15 to 5.17)."""
    model, ids = made("ministral", slides=True), testing.random_ids(1, 30)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :25], past_key_values=cache)
        for layer in caches[1].layers:
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length = torch.tensor(layer.cumulative_length)
        want, got = (model(ids[:, 25:], past_key_values=cache).logits for cache in caches)
    assert torch.equal(got, want)
    assert caches[1].get_seq_length() == 30
    assert only_ours(model)


def generated(model, ids, **given):
    """Tokens, or what transformers says where it can't."""
    try:
        return model.generate(ids, **given)
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize(("name", "slides"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_stock(name, slides, dtype):
    model = made(name, slides).to(dtype)
    ids = testing.random_ids(1, 60)
    llama1m_ext.set_options(model, chunk=25)
    with torch.no_grad():
        ours = model(ids).logits
        with stock():
            theirs = model(ids).logits
            truth = model.double()(ids).logits
    testing.assert_no_worse(ours, theirs, truth, factor=1.25)


@pytest.mark.parametrize("name", [name for name in HERE if name in SLIDES])
def test_caches(name):
    """One cache from call to call, of transformers' making (no more than a window is kept), of a DynamicCache without a
    config, and a LongCache (all is kept)."""
    model = made(name, slides=True)
    ids = testing.random_ids(1, 60)
    with stock(), torch.no_grad():
        want = model(ids).logits
    makers = (lambda: DynamicCache(config=model.config), DynamicCache, llama1m_ext.LongCache)
    for make in makers:
        cache = make()
        with torch.no_grad():
            got = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 20), (20, 21), (21, 45), (45, 60))]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=2e-4, atol=2e-4)
        assert cache.get_seq_length() == 60
    assert only_ours(model)
    cache = DynamicCache(config=model.config)
    kept = [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers]
    assert kept == [width is not None for width in windows(model)]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer, slides in zip(cache.layers, kept, strict=True):
        assert (type(layer) is DynamicSlidingWindowLayer) == slides
        assert layer.keys.shape[2] == (WINDOW - 1 if slides else 60)
    with stock(), torch.no_grad():  # which goes on with it
        after = model(testing.random_ids(1, 3, seed=5), past_key_values=cache).logits
        whole = model(torch.cat([ids, testing.random_ids(1, 3, seed=5)], 1)).logits[:, -3:]
    torch.testing.assert_close(after, whole, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in HERE if name in SLIDES])
def test_a_call_that_fails_leaves_the_cache(name, monkeypatch):
    model = made(name, slides=True)
    llama1m_ext.set_options(model, chunk=9)
    cache = DynamicCache(config=model.config)
    ids = testing.random_ids(1, 60)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        before = [(layer.keys.clone(), layer.get_seq_length()) for layer in cache.layers]
        real, seen = prefill._layer, []

        def failing(layer, *args):
            seen.append(layer)
            if seen.count(model.model.layers[-1]) == 2:
                raise MemoryError("the second chunk of the last layer")
            return real(layer, *args)

        monkeypatch.setattr(prefill, "_layer", failing)
        with pytest.raises(MemoryError):
            model(ids[:, 30:], past_key_values=cache)
        monkeypatch.undo()
        for layer, (keys, length) in zip(cache.layers, before, strict=True):
            assert layer.get_seq_length() == length == 30
            assert torch.equal(layer.keys, keys)
        got = model(ids[:, 30:], past_key_values=cache).logits
        with stock():
            want = model(ids).logits[:, 30:]
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in HERE if name in SLIDES])
def test_gradients_that_show_only_in_the_attention(name):
    """As LoRA's in a frozen base: stock's attention then, with a matrix of the window that fits what its cache keeps."""
    model = made(name, slides=True).requires_grad_(False)
    ids, scale = testing.random_ids(1, 40), torch.ones((), requires_grad=True)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for make in (lambda: None, lambda: DynamicCache(config=model.config)):
        cache = make()
        if cache is not None:
            with torch.no_grad():
                model(ids[:, :25], past_key_values=cache, attention_mask=mask[:, :25])
        handles = [
            layer.self_attn.q_proj.register_forward_hook(lambda *a: a[-1] * scale) for layer in model.model.layers
        ]
        start = 25 if cache is not None else 0
        got = model(ids[:, start:], past_key_values=cache, attention_mask=mask).logits
        for handle in handles:
            handle.remove()
        with stock(), torch.no_grad():
            want = model(ids, attention_mask=mask).logits[:, start:]
        seen = mask[:, start:].bool()
        torch.testing.assert_close(got[seen], want[seen], rtol=2e-4, atol=2e-4)
        scale.grad = None
        got.sum().backward()
        assert scale.grad is not None
        assert scale.grad != 0


def test_what_needs_all_keys_says_so(tmp_path):
    model = made("mistral", slides=True)
    llama1m_ext.set_options(model, chunk=100, checkpoint=tmp_path / "on", remember=tmp_path / "shelf")
    ids = testing.random_ids(1, 600)
    with torch.no_grad(), pytest.warns(UserWarning, match="no checkpoints of this prefill: layers .* sliding window"):
        model(ids, logits_to_keep=1)
    assert not (tmp_path / "shelf").exists() or not list((tmp_path / "shelf").rglob("*.kv*"))
    cache = llama1m_ext.LongCache()
    llama1m_ext.set_options(model, checkpoint=None, remember=None)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        cache.save(tmp_path / "kept", model)
        again = llama1m_ext.LongCache.load(tmp_path / "kept", model)
        more = testing.random_ids(1, 5, seed=3)
        assert torch.equal(model(more, past_key_values=again).logits, model(more, past_key_values=cache).logits)
    model.config.sliding_window += 1
    with pytest.raises(ValueError, match="sliding_window"):
        llama1m_ext.LongCache.load(tmp_path / "kept", model)


def test_plan():
    mistral = made("mistral", slides=True)
    found = llama1m_ext.plan(mistral, tokens=100_000)
    assert "100,000" in str(found) or "100000" in str(found)
    config = transformers.BertConfig()
    with pytest.raises(ValueError, match=r"expected a Llama or another model of .*mistral.* got 'bert'"):
        llama1m_ext.plan(config, tokens=10)


def test_switching_on(run_python):
    """Before the family's module is loaded, by name; others stay as they are; off and on again."""
    printed = run_python(
        """
import llama1m_ext
llama1m_ext.enable(families="mistral")
import transformers, torch
import sys
def marked(cls):
    return hasattr(cls.forward, "_llama1m")
from transformers.models.mistral import modeling_mistral as m
from transformers.models.qwen2 import modeling_qwen2 as q
print(marked(m.MistralModel), marked(m.MistralAttention), marked(q.Qwen2Model))
llama1m_ext.enable(families=["qwen2"])
print(marked(q.Qwen2Model))
llama1m_ext.disable()
print(marked(m.MistralModel), marked(q.Qwen2Model))
llama1m_ext.enable()
print(marked(m.MistralModel), marked(q.Qwen2Model))
for wrong in ("mixtral", ["mistral", "gpt2"], [3]):
    try:
        llama1m_ext.enable(families=wrong)
    except (ValueError, TypeError) as e:
        print(type(e).__name__, e)
"""
    ).splitlines()
    assert printed[:4] == ["True True False", "True", "False False", "True True"]
    assert printed[4].startswith('ValueError families: expected "all" or names out of llama, arcee')
    assert "'gpt2'" in printed[5]
    assert printed[6].startswith("TypeError families: expected names")


def test_nothing_is_imported_by_switching_on(run_python):
    printed = run_python(
        "import sys, llama1m_ext\nllama1m_ext.enable(families='mistral')\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('transformers', 'torch')])"
    )
    assert printed.strip() == "[]"


def test_every_family_has_a_case():
    assert {name for name, _ in CASES} == set(HERE)
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert set(HERE) == set(FAMILIES) - {"llama"}
    assert sys.modules["llama1m_ext.families"] is families
