"""What is put on is taken off; every order of imports works; nobody else's model is touched."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig

import llama1m_ext
from conftest import stock
from llama1m_ext import patch, testing


@pytest.fixture
def model():
    return testing.tiny_model()


def forward(model, ids=None, **kwargs):
    with torch.no_grad():
        return model(testing.random_ids(1, 30) if ids is None else ids, **kwargs).logits


def served(model) -> bool:
    llama1m_ext.stats(model, reset=True)
    forward(model)
    counts = llama1m_ext.stats(model)
    assert bool(counts.served) != bool(counts.stock) or not counts.stock
    return counts.served > 0


def attributes() -> dict[str, object]:
    return {
        f"{entry.owner}.{entry.name}": owner.__dict__.get(entry.name)
        for entry in patch.TABLE["llama"]
        if entry.module.startswith("transformers.")  # the others: test_meta_llama.py
        for module in [__import__(entry.module, fromlist=["x"])]
        for owner in [getattr(module, entry.owner)]
    }


def test_disable_puts_everything_back_and_enable_on_again(model):
    with stock():
        before = attributes()
        assert not served(model)
        llama1m_ext.enable()
        llama1m_ext.enable()
        during = attributes()
        assert served(model)
        llama1m_ext.disable()
        llama1m_ext.disable()
        assert attributes() == before
        assert not served(model)
    assert attributes() != before
    assert {name for name in before if before[name] is not during[name]} >= {
        "LlamaAttention.forward",
        "LlamaModel.forward",
        "LlamaForCausalLM.forward",
    }
    assert served(model)


def test_a_patch_over_ours_is_left_and_ours_passes_on(model, monkeypatch):
    ours = modeling_llama.LlamaModel.forward

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    with stock():
        original = modeling_llama.LlamaModel.forward
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", theirs)
    with pytest.warns(UserWarning, match=r"LlamaModel\.forward was replaced"):
        llama1m_ext.disable()
    assert modeling_llama.LlamaModel.forward is theirs
    assert not served(model)
    modeling_llama.LlamaModel.forward = original
    llama1m_ext.enable()
    monkeypatch.undo()
    llama1m_ext.disable()
    modeling_llama.LlamaModel.forward = original
    llama1m_ext.enable()
    assert served(model)


ORDERS = {
    "ours first": "import llama1m_ext; import transformers; make()",
    "transformers first": "import transformers; import llama1m_ext; make()",
    "the llama module first": "import transformers.models.llama.modeling_llama; import llama1m_ext; make()",
    "the model first": "import transformers; make(); import llama1m_ext",
    "the class by name": "import llama1m_ext; from transformers import LlamaForCausalLM; make()",
    "switched off and on": "import llama1m_ext; llama1m_ext.disable(); make(); llama1m_ext.enable()",
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_import(order, run_python):
    script = f"""
import sys
def make():
    global model, ids
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_grad_enabled(False)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.arange(20)[None]
{ORDERS[order]}
model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=63)
print(llama1m_ext.stats(model))
import transformers.models.llama.modeling_llama as module
assert module.__loader__ is module.__spec__.loader and "llama1m" not in type(module.__loader__).__module__
"""
    assert "served=6, stock={}" in run_python(script)


def test_environment_variable_keeps_it_off(run_python):
    script = """
import llama1m_ext, sys
from transformers.models.llama import modeling_llama
print(hasattr(modeling_llama.LlamaModel.forward, "_llama1m"), len([f for f in sys.meta_path if "llama1m" in type(f).__module__]))
llama1m_ext.enable()
print(hasattr(modeling_llama.LlamaModel.forward, "_llama1m"))
"""
    assert run_python(script, LLAMA1M_DISABLE="1").split() == ["False", "0", "True"]


def test_import_is_cheap(run_python):
    script = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import llama1m_ext
seconds, loaded = time.process_time() - start, sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"seconds": seconds, "loaded": loaded, "core": "llama1m_ext._core" in sys.modules,
                  "cuda": torch.cuda.is_initialized(), "version": llama1m_ext.__version__,
                  "missing": [name for name in llama1m_ext.__all__ if not hasattr(llama1m_ext, name)]}))
"""
    found = json.loads(run_python(script))
    assert found["seconds"] < 1
    assert not {"transformers", "tokenizers", "accelerate", "numpy"} & set(found["loaded"]), found["loaded"]
    assert not found["core"]
    assert not found["cuda"]
    assert found["version"][0].isdigit()
    assert not found["missing"]


@pytest.mark.parametrize("name", ["Mistral", "Qwen2"])
def test_other_models_are_untouched(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    other = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        on = other(ids)
        with stock():
            off = other(ids)
    assert torch.equal(on.logits, off.logits)
    assert {type(layer) for layer in on.past_key_values.layers} == {type(layer) for layer in off.past_key_values.layers}
    for module in other.modules():
        assert not hasattr(type(module).forward, "_llama1m"), type(module)
    with pytest.raises(TypeError, match=rf'{name}Model is left to .*enable\(families="{name.lower()}"\)'):
        llama1m_ext.stats(other)


def from_checkpoint(path, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def test_an_explicit_attention_implementation_wins(tmp_path):
    path = testing.tiny_checkpoint(tmp_path)
    assert served(from_checkpoint(path))
    for name in ("eager", "sdpa"):
        model = from_checkpoint(path, attn_implementation=name)
        assert not served(model)
        (reason,) = llama1m_ext.stats(model).stock
        assert name in reason
        with stock():
            theirs = forward(model)
        assert torch.equal(forward(model), theirs)
    # sdpa by name, and yet ours: by an option
    llama1m_ext.set_options(model, replace_sdpa=True)
    assert served(model)
    # a copy of the config keeps the wish, a checkpoint does not
    assert not served(modeling_llama.LlamaForCausalLM(copy.deepcopy(model.config)))
    model.save_pretrained(tmp_path / "again")
    assert "llama1m" not in (tmp_path / "again" / "config.json").read_text()
    assert served(from_checkpoint(tmp_path / "again"))


def test_set_attn_implementation(model):
    assert served(model)
    model.set_attn_implementation("eager")
    assert not served(model)
    model.set_attn_implementation("sdpa")
    assert not served(model)
    llama1m_ext.set_options(model, replace_sdpa=True)
    assert served(model)


def test_a_default_that_is_used_again_is_no_wish(model):
    assert served(modeling_llama.LlamaForCausalLM(model.config))
    assert served(modeling_llama.LlamaForCausalLM(copy.deepcopy(model.config)))
    assert served(modeling_llama.LlamaForCausalLM(LlamaConfig(**model.config.to_dict())))


def test_models_are_copied_and_pickled_with_their_options(model):
    llama1m_ext.set_options(model, chunk=7, progress=False)
    want = forward(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert llama1m_ext.options(again) == llama1m_ext.Options(chunk=7, progress=False)
        assert torch.equal(forward(again), want)
        llama1m_ext.set_options(again, chunk=9)
    assert llama1m_ext.options(model).chunk == 7
    assert b"llama1m_ext" not in pickle.dumps(model), "a pickled model must load where this package is not installed"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"chunk": 0}, ValueError, "chunk.*at least 1.*got 0"),
        ({"chunk": "big"}, TypeError, "chunk.*'big'"),
        ({"page_size": -3}, ValueError, "page_size.*-3"),
        ({"page_size": True}, TypeError, "page_size.*True"),
        ({"min_layer_major_len": 1.5}, TypeError, "min_layer_major_len.*1.5"),
        ({"progress": "yes"}, TypeError, "progress.*'yes'"),
        ({"replace_sdpa": 1}, TypeError, "replace_sdpa.*1"),
        ({"chunks": 3}, TypeError, "expected one of .*chunk, .*'chunks'"),
    ],
)
def test_mistakes_in_options(model, change, error, words):
    with pytest.raises(error, match=words):
        llama1m_ext.set_options(model, **change)
    assert llama1m_ext.options(model) == llama1m_ext.Options()


def test_models_without_llama_are_refused():
    for call in (llama1m_ext.options, llama1m_ext.stats, llama1m_ext.set_options):
        with pytest.raises(TypeError, match="got Linear"):
            call(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="got str"):
        llama1m_ext.patch_model("model")


def test_threads_with_models_of_different_options():
    ids = testing.random_ids(1, 60)
    models = [testing.tiny_model(seed) for seed in range(3)]
    with stock():
        want = [forward(model, ids) for model in models]
    for model, chunk in zip(models, (5, 16, "auto"), strict=True):
        llama1m_ext.set_options(model, chunk=chunk)
    wrong = []

    def work(i):
        for _ in range(8):
            if not torch.allclose(forward(models[i], ids), want[i], rtol=2e-4, atol=2e-4):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    counts = [llama1m_ext.stats(model) for model in models]
    assert [c.layer_major for c in counts] == [16, 16, 0]
    assert [c.served for c in counts] == [16 * 2 * 12, 16 * 2 * 4, 16 * 2]


def test_accelerate_hooks_put_on_before_the_import(model):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    with stock():
        want = forward(model)
        cpu_offload(model, execution_device=torch.device("cpu"))
        for module in model.modules():
            if not hasattr(module, "_hf_hook"):
                from accelerate.hooks import ModelHook, add_hook_to_module

                add_hook_to_module(module, ModelHook())
    assert torch.equal(forward(model), want)
    assert llama1m_ext.patch_model(model) == 2 + 1 + 1
    assert served(model)
    torch.testing.assert_close(forward(model), want, rtol=2e-4, atol=2e-4)
    with stock():
        assert torch.equal(forward(model), want), "disable() does not reach a model with hooks"
    remove_hook_from_submodules(model)


@pytest.mark.parametrize("chunk", ["auto", 16])
def test_disk_offload(tmp_path, chunk):
    from transformers import AutoModelForCausalLM

    path = testing.tiny_checkpoint(tmp_path / "model")
    want = forward(from_checkpoint(path))
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
               "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, device_map=devices, offload_folder=tmp_path / "offload")
    llama1m_ext.set_options(model, chunk=chunk)
    assert served(model)
    torch.testing.assert_close(forward(model), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compile(model, fullgraph):
    ids = testing.random_ids(1, 30)
    with stock():
        want = forward(model, ids, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    torch.testing.assert_close(forward(compiled, ids, use_cache=False), want, rtol=2e-4, atol=2e-4)
    if not fullgraph:
        torch._dynamo.reset()
        again = copy.deepcopy(model)
        again.model.layers[0].compile(backend="eager")
        with pytest.warns(UserWarning, match="compiled layer"):
            torch.testing.assert_close(forward(again, ids), want, rtol=2e-4, atol=2e-4)
    torch._dynamo.reset()
