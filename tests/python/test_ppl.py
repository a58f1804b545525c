"""Perplexity by position: the same as from all logits at once, whatever the chunks, the buckets and the model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import llama1m_ext
from conftest import stock
from llama1m_ext import testing
from llama1m_ext.eval import ppl
from llama1m_ext.eval.ppl import edges_for, perplexity

pytestmark = pytest.mark.usefixtures("one_thread")


def nats(model, ids):
    """Float64 `[rows, n - 1]`, from whole logits."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def test_it_is_that_of_whole_logits_in_float64(monkeypatch):
    """Ours in float32 is as near to float64 as stock's float32; prefill and output layer both in chunks. Twice stock's error
    is allowed, as for other sums of a few numbers: see test_differential.py."""
    from test_differential import exact

    monkeypatch.setattr(ppl, "LOGITS_BYTES", 4 * testing.VOCAB_SIZE * 50)
    model, ids = testing.tiny_model(), testing.random_ids(2, 700)
    with stock():
        truth = nats(exact(model), ids)
        yardstick = nats(model, ids)
    llama1m_ext.set_options(model, chunk=64, min_layer_major_len=128)
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[-2]))
    found = perplexity(model, ids)
    assert max(rows) == 50 and sum(rows) == 2 * 699, "logits of all positions are never there together"
    testing.assert_no_worse(found.per_token, yardstick.double(), truth, factor=2)
    assert llama1m_ext.stats(model).layer_major == 2
    assert not llama1m_ext.stats(model).stock
    assert found.tokens == 2 * 699
    assert found.nll == pytest.approx(found.per_token.mean().item(), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_the_package_has_it():
    assert llama1m_ext.eval.ppl is ppl and "eval" not in llama1m_ext.__all__, "a star would hide Python's own"


def test_a_float64_model_is_exact():
    model, ids = testing.tiny_model().double(), testing.random_ids(1, 300)
    with pytest.warns(UserWarning, match="float64"):
        found = perplexity(model, ids)
    with stock():
        assert (found.per_token - nats(model, ids)).abs().max() < 1e-12


@pytest.mark.parametrize("which", ["disabled", "gpt2", "qwen2"])
def test_models_that_are_not_served(which, monkeypatch):
    """In chunks, over a cache, through the model's own forward."""
    monkeypatch.setattr(ppl, "CHUNK", 100)
    import transformers

    torch.manual_seed(0)
    ids = testing.random_ids(2, 256)
    if which == "disabled":
        model = testing.tiny_model()
        with stock():
            found, truth = perplexity(model, ids), nats(model, ids)
    else:
        sizes = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
        if which == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_positions=512, **sizes)).eval()
        else:
            config = transformers.Qwen2Config(
                hidden_size=64, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=512, **sizes
            )
            model = transformers.Qwen2ForCausalLM(config).eval()
        found, truth = perplexity(model, ids), nats(model, ids)
    assert (found.per_token - truth).abs().max() < 2e-4
    assert found.per_token.std() > 0.5, "a weak oracle"


def test_logits_that_a_model_scales_are_scaled():
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.15, logits_scaling=8.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.GraniteForCausalLM(config).eval(), testing.random_ids(1, 90)
    assert (perplexity(model, ids).per_token - nats(model, ids)).abs().max() < 1e-4


def test_peft_layers_count():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(testing.tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
    ids = testing.random_ids(1, 200)
    found, plain = perplexity(model, ids), perplexity(testing.tiny_model(), ids)
    assert (found.per_token - nats(model.eval(), ids)).abs().max() < 1e-4
    assert abs(found.nll - plain.nll) > 0.01


def test_buckets_add_up():
    model, ids = testing.tiny_model(), testing.random_ids(2, 500)
    for buckets in (None, 5, [1, 7, 8, 300, 500]):
        found = perplexity(model, ids, buckets=buckets)
        assert [b.end for b in found.buckets[:-1]] == [b.start for b in found.buckets[1:]]
        assert sum(b.tokens for b in found.buckets) == found.tokens == 2 * 499
        assert sum(b.nll * b.tokens for b in found.buckets) == pytest.approx(found.nll * found.tokens, rel=1e-12)
        for b in found.buckets:
            assert b.nll == pytest.approx(found.per_token[:, b.start - 1 : b.end - 1].mean().item(), rel=1e-12)
    part = perplexity(model, ids, buckets=[100, 200])
    assert part.buckets[0].tokens == 200
    assert part.tokens == 2 * 499


def test_the_bounds():
    assert edges_for(2) == [1, 2]
    assert edges_for(64) == [1, 64]
    assert edges_for(1000) == [1, 64, 128, 256, 512, 1000]
    assert edges_for(1030) == [1, 64, 128, 256, 512, 1030], "six tokens are no bucket"
    assert edges_for(2**20)[-3:] == [2**18, 2**19, 2**20]
    assert edges_for(1024, 5) == [1, 4, 16, 64, 256, 1024]
    assert edges_for(3, 10) == [1, 2, 3]
    for wrong in (0, [1], [0, 5], [5, 5], [1, 2000], [9, 5]):
        with pytest.raises(ValueError, match="buckets: expected"):
            edges_for(1000, wrong)


def test_the_model_is_as_it_was():
    model = testing.tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    llama1m_ext.set_options(model, progress=True)
    ids = testing.random_ids(1, 50)
    first, second = perplexity(model, ids, progress=False), perplexity(model, ids, progress=False)
    assert torch.equal(first.per_token, second.per_token), "no dropout"
    assert model.training and not model.model.layers[0].training and model.model.layers[1].mlp.training
    assert llama1m_ext.options(model).progress is True


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, dtype=torch.long), r"input_ids: expected ints .* got torch.int64 \(1, 1\)"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"got torch.int64 \(2, 3, 4\)"),
        (torch.zeros(0, 4, dtype=torch.long), r"\(0, 4\)"),
        (torch.zeros(1, 4), "torch.float32"),
        ([1, 2, 999], "input_ids: expected ids from 0 to 260, got 999"),
        ([1, -2, 9], "got -2"),
    ],
)
def test_what_is_no_text_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        perplexity(testing.tiny_model(), ids)


def test_a_length_beyond_the_model_is_measured_with_one_warning():
    with pytest.warns(UserWarning, match="80 tokens are more than the model's max_position_embeddings=64") as caught:
        found = perplexity(testing.tiny_model(max_position_embeddings=64), testing.random_ids(2, 80))
    assert len(caught) == 1
    assert found.tokens == 2 * 79


def test_its_json_table_and_plot(tmp_path):
    import json

    found = perplexity(testing.tiny_model(), testing.random_ids(1, 270))
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["buckets"][-1] == {
        "start": 128, "end": 270, "tokens": 142, "nll": found.buckets[-1].nll, "perplexity": found.buckets[-1].perplexity
    }  # fmt: skip
    assert "128 to 269" in found.table() and len(found.table().splitlines()) == 2 + len(found.buckets)
    found.plot(tmp_path / "one.png")
    ppl.draw({"a": found, "b": found}, tmp_path / "two.png")
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert (tmp_path / "two.png").stat().st_size > 5000


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"llama1m-ext\[method\]"):
        perplexity(testing.tiny_model(), testing.random_ids(1, 10)).plot(tmp_path / "a.png")


def test_nan_is_told_as_it_is():
    model = testing.tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = perplexity(model, testing.random_ids(1, 10))
    assert math.isnan(found.nll) and math.isnan(found.perplexity)
    assert found.to_dict()["perplexity"] is None
