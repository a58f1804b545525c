"""Quantised weights: bitsandbytes, torchao and quanto through `quantization_config`, on the CPU, against the same model in stock."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, _compat, plan_call, saved, testing, weights
from llama1m_ext.fingerprint import fingerprint

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}


def bits_and_bytes(**more):
    return lambda: BitsAndBytesConfig(**more)


def torchao(name):
    def make():
        from torchao import quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(quantization, name)())

    return make


def quanto():
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def hqq():
    from transformers import HqqConfig

    return HqqConfig(nbits=4, group_size=64)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
# bits of a weight; whether activations are rounded too
FORMS = {
    "nf4": (bits_and_bytes(**NF4), 4, False),
    "nf4, scales quantised": (bits_and_bytes(**NF4, bnb_4bit_use_double_quant=True), 4, False),
    "fp4": (bits_and_bytes(**FP4), 4, False),
    "llm.int8": (bits_and_bytes(load_in_8bit=True), 8, True),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), 8, False),
    "torchao int8, activations too": (torchao("Int8DynamicActivationInt8WeightConfig"), 8, True),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), 8, False),
    "quanto int8": (quanto, 8, False),
    "hqq": (hqq, 4, False),
}


def made(path, form, dtype=torch.float32):
    if form == "hqq" and (_compat.V5 or dtype != torch.float32):
        pytest.skip("stock transformers 5.23 does not load hqq weights yet, and 4.57 multiplies them with float32 only")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=FORMS[form][0]())
    llama1m_ext.set_options(model, chunk=64, progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return testing.tiny_checkpoint(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    """Layer 1's o_proj is twice as large: its codes are the same, its scales are not."""
    model = testing.tiny_model(**SHAPE)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 2
    found = tmp_path_factory.mktemp("other")
    model.save_pretrained(found)
    return found


def in_the_open(model):
    """The same weights in a stock model of plain float64: what each linear layer makes of the unit vectors."""
    plain = testing.tiny_model(**SHAPE).double()
    with torch.no_grad():
        for name, module in plain.named_modules():
            theirs = model.get_submodule(name)
            if type(module) is torch.nn.Linear:
                module.weight.copy_(theirs(torch.eye(module.in_features, dtype=model.dtype)).T)
            elif not list(module.children()):
                for mine, its in zip(module.parameters(), theirs.parameters(), strict=True):
                    mine.copy_(its)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_tokens(path, form, dtype, one_thread):
    model, ids = made(path, form, dtype), testing.random_ids(1, 200)
    plain = in_the_open(model)
    with torch.no_grad():
        ours = model(ids).logits
        with stock():
            theirs, truth = model(ids).logits, plain(ids).logits
    counts = llama1m_ext.stats(model, reset=True)
    assert (counts.served, counts.layer_major, counts.stock) == (2 * 4, 1, {})
    # Beside the rounding that both do: stock rounds an angle, of which the truth has the same, by 2^-24 of a position.
    phase = 200 * 2**-24 * truth.std().item()
    assert testing.error(ours, truth) <= 1.1 * testing.error(theirs, truth) + phase

    tokens = model.generate(ids, **GREEDY)
    counts = llama1m_ext.stats(model)
    assert (counts.served, counts.layer_major, counts.stock) == (4 + 1 + 2 * 7, 1, {})
    assert model.generation_config.cache_implementation is None
    if dtype == torch.float32:
        with stock():
            assert torch.equal(tokens, model.generate(ids, **GREEDY))
    else:  # two logits may be the same number in bfloat16: each token is one that stock might choose as well
        with torch.no_grad(), stock():
            logits = model(tokens).logits[0, ids.shape[1] - 1 : -1].float()
        chosen = logits.gather(1, tokens[0, ids.shape[1] :, None])
        assert (logits.amax(1, keepdim=True) - chosen).max() <= 6 * testing.error(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_cache_belongs_to_the_weights(path, other_path, form, tmp_path, one_thread):
    ids = testing.random_ids(1, 100)
    model, cache = made(path, form), LongCache()
    before = fingerprint(model.model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        assert fingerprint(model.model) == before, "the first call changed it"
        cache.save(tmp_path / "kv", model=model)
        again = made(path, form)
        more = testing.random_ids(1, 20, seed=1)
        want = model(more, past_key_values=cache).logits
        got = again(more, past_key_values=LongCache.load(tmp_path / "kv", again)).logits
    assert torch.equal(got, want)
    other = made(other_path, form)
    with pytest.raises(saved.CacheMismatch, match="the weights"):
        LongCache.load(tmp_path / "kv", other)
    with torch.no_grad():
        other(ids)
    assert fingerprint(other.model) != before
    plain = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(saved.CacheMismatch, match=r"the modules|the weights"):
        LongCache.load(tmp_path / "kv", plain)


def test_forms_of_the_same_weights_differ(path):
    assert len({fingerprint(made(path, form).model) for form in FORMS if form != "hqq"}) == len(FORMS) - 1


@pytest.mark.parametrize("form", ["nf4", "llm.int8", "torchao int8", "quanto int8"])
def test_a_changed_scale_is_seen(path, form):
    model = made(path, form)
    before = fingerprint(model.model)
    module = model.model.layers[1].mlp.up_proj
    scales = [
        t for name, t in weights.tensors(module, "weight", module.weight) if name.endswith(("absmax", "SCB", "scale"))
    ]
    with torch.no_grad():
        scales[0][3:4].mul_(1.5)
    assert fingerprint(model.model) != before


@pytest.mark.parametrize("form", ["nf4, scales quantised", "llm.int8", "torchao int8", "quanto int8"])
def test_a_prompt_is_remembered(path, form, tmp_path, one_thread):
    ids = testing.random_ids(1, 400)
    folder, found = tmp_path / "kept", []
    for _ in range(2):
        model = made(path, form)
        llama1m_ext.remember(model, folder)
        with torch.no_grad():
            found.append(model(ids, logits_to_keep=4).logits)
        taken = llama1m_ext.stats(model).reused
    assert taken == 396
    assert testing.error(*found) <= 0.05 * found[0].std()


@pytest.mark.parametrize("form", FORMS)
def test_the_plan_counts_the_bytes_that_weights_take(path, form, one_thread):
    model, bits = made(path, form), FORMS[form][1]
    linear = 2 * 128 * (2 * 128 + 2 * 64 + 3 * 256)
    table = 2 * testing.VOCAB_SIZE * 128 * 4 + 5 * 128 * 4
    # A scale in float32 for each row, or for each 64 codes; buffers of a few numbers.
    scales = linear // 64 * 4 if bits == 4 else 2 * 2 * 4 * (2 * 128 + 2 * 64 + 3 * 256)
    least = linear * bits // 8 + table
    for _ in range(2):  # before the first call, and after what that packs
        plan = llama1m_ext.plan(model, 1000, measure=False)
        assert plan.shape.unpacked == 4 * 128 * 256
        assert least < plan.parts.weights <= least + scales + 14 * 1200 * 4
        with torch.no_grad():
            model(testing.random_ids(1, 20))


def test_the_plan_before_a_prefill_counts_what_is_unpacked(path, monkeypatch, one_thread):
    found = []
    monkeypatch.setattr(plan_call, "SMALL", 0)
    real = plan_call.plan_choice.check
    monkeypatch.setattr(plan_call.plan_choice, "check", lambda *args: found.append(args[:3]) or real(*args))
    plain = AutoModelForCausalLM.from_pretrained(path)
    llama1m_ext.set_options(plain, chunk=64, progress=False)
    with torch.no_grad():
        for model in (made(path, "nf4"), plain):
            model(testing.random_ids(1, 200))
    peaks = [plan_call.plan_bytes.peak(*args).bytes for args in found]
    assert peaks[0] - peaks[1] == 4 * 128 * 256 + 4 * 64 * 256


def test_another_packing_than_the_one_we_know_is_left_to_bitsandbytes(path, monkeypatch, one_thread):
    model = made(path, "nf4")
    before = fingerprint(model.model)
    with torch.no_grad():
        model(testing.random_ids(1, 20))
    if not getattr(model.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs 4-bit weights anew only on CPUs with AVX512-BF16")
    asked = []
    monkeypatch.setattr(weights, "_halves", lambda codes: asked.append(codes.shape) or torch.zeros_like(codes))
    assert fingerprint(model.model) == before
    assert len(asked) == 14
