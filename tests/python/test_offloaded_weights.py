"""Weights that accelerate keeps elsewhere (`device_map` with "disk", `cpu_offload`, `disk_offload`) and brings for each call."""

from __future__ import annotations

import collections
import os

import accelerate
import accelerate.hooks
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, plan_call, saved, testing, weights
from llama1m_ext.fingerprint import fingerprint

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
LAYERS = 3
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def by_device_map(path, folder):
    return AutoModelForCausalLM.from_pretrained(path, device_map=ON_DISK, offload_folder=folder)


def table_on_disk_too(path, folder):
    return AutoModelForCausalLM.from_pretrained(
        path, device_map={**ON_DISK, "model.embed_tokens": "disk", "lm_head": "disk"}, offload_folder=folder
    )


def disk_offload(path, folder):
    return accelerate.disk_offload(AutoModelForCausalLM.from_pretrained(path), folder, execution_device="cpu")


def cpu_offload(path, folder):
    return accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(path), execution_device="cpu")


def whole_layers(path, folder):
    """One hook for a layer and all inside it."""
    return accelerate.disk_offload(
        AutoModelForCausalLM.from_pretrained(path),
        folder,
        execution_device="cpu",
        preload_module_classes=["LlamaDecoderLayer"],
    )


WAYS = [by_device_map, table_on_disk_too, disk_offload, cpu_offload, whole_layers]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return testing.tiny_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


@pytest.fixture
def model(path, tmp_path):
    return ready(by_device_map(path, tmp_path))


def ready(model):
    llama1m_ext.set_options(model, chunk=64, progress=False)
    return model.eval()


class Loads(collections.Counter):
    """How often each weight was brought, and how many weights were there at the same time at most."""

    def __init__(self):
        super().__init__()
        self.here, self.most = set(), 0

    def start(self):
        self.clear()
        self.here.clear()
        self.most = 0


@pytest.fixture
def loads(monkeypatch):
    found = Loads()
    real = accelerate.hooks.set_module_tensor_to_device

    def count(module, name, device, value=None, **more):
        real(module, name, device, value=value, **more)
        if value is None:
            found.here.discard((id(module), name))
        else:
            found.here.add((id(module), name))
            found[id(module), name] += 1
        found.most = max(found.most, len(found.here))

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", count)
    return found


def empty(model):
    return [name for name, p in model.named_parameters() if p.device.type == "meta"]


@pytest.mark.parametrize("way", WAYS)
def test_logits_and_tokens_with_each_layer_brought_once(path, tmp_path, way, loads, one_thread):
    model = ready(way(path, tmp_path))
    away, ids = empty(model), testing.random_ids(1, 300)
    loads.start()
    with torch.no_grad():
        ours = model(ids).logits
    tables = {(id(m), "weight") for m in (model.model.embed_tokens, model.lm_head)}
    assert len(loads) == len(away)
    assert all(n == 1 or (n == 2 and at in tables) for at, n in loads.items()), loads
    assert loads.most == 9, "of one layer, no more"
    assert empty(model) == away
    counts = llama1m_ext.stats(model)
    assert (counts.served, counts.layer_major, counts.stock) == (LAYERS * 5, 1, {})
    tokens = model.generate(ids, **GREEDY)
    assert llama1m_ext.stats(model).served == 2 * LAYERS * 5 - 4 + LAYERS * 5
    assert llama1m_ext.stats(model).stock == {}
    with stock(), torch.no_grad():
        torch.testing.assert_close(ours, model(ids).logits, rtol=2e-4, atol=2e-4)
        assert torch.equal(tokens, model.generate(ids, **GREEDY))
    with torch.no_grad():
        model(ids)
    assert llama1m_ext.stats(model).layer_major == 3, "not again after the patch was off and on"


def test_a_failure_takes_the_weights_away_again(model, monkeypatch, one_thread):
    away, ids, cache = empty(model), testing.random_ids(1, 300), LongCache()
    act, seen = model.model.layers[1].mlp.act_fn, []

    def fail(x):
        seen.append(model.model.layers[1].mlp.up_proj.weight.device.type)
        raise KeyboardInterrupt

    monkeypatch.setattr(act, "forward", fail)
    monkeypatch.setattr("llama1m_ext.prefill.watched", lambda call: False)
    hooked = [name for name, m in model.named_modules() if "forward" in m.__dict__]
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    assert seen == ["cpu"]
    assert empty(model) == away and cache.get_seq_length() == 0
    assert [name for name, m in model.named_modules() if "forward" in m.__dict__] == hooked
    monkeypatch.undo()
    with torch.no_grad():
        ours = model(ids, past_key_values=cache).logits
        with stock():
            torch.testing.assert_close(ours, model(ids).logits, rtol=2e-4, atol=2e-4)


def test_weights_that_cannot_be_read_are_accelerate_s_error(path, tmp_path, one_thread):
    model = ready(disk_offload(path, tmp_path))
    away = empty(model)
    os.rename(tmp_path / "model.layers.1.mlp.down_proj.weight.dat", tmp_path / "gone")
    with torch.no_grad(), pytest.raises(FileNotFoundError, match="down_proj"):
        model(testing.random_ids(1, 300))
    assert empty(model) == away
    os.rename(tmp_path / "gone", tmp_path / "model.layers.1.mlp.down_proj.weight.dat")
    with torch.no_grad():
        assert model(testing.random_ids(1, 300)).logits.isfinite().all()


class Watcher(accelerate.hooks.ModelHook):
    def __init__(self):
        self.seen = []

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(args[0].shape[1])
        return args, kwargs


@pytest.mark.parametrize("where", ["", "self_attn", "mlp", "mlp.up_proj"])
def test_hooks_of_others_see_whole_prompts(model, where, one_thread):
    watcher = Watcher()
    accelerate.hooks.add_hook_to_module(model.model.layers[1].get_submodule(where), watcher, append=True)
    keywords_only = where == "self_attn"
    if keywords_only:
        watcher.pre_forward = lambda module, *args, **kwargs: (
            watcher.seen.append(kwargs["hidden_states"].shape[1]) or (args, kwargs)
        )
    with torch.no_grad():
        model(testing.random_ids(1, 300))
    assert watcher.seen == [300]
    counts = llama1m_ext.stats(model)
    assert (counts.served, counts.layer_major) == (LAYERS, 0)


def test_hooks_from_before_the_import_need_patch_model(path, tmp_path, one_thread):
    with stock():  # as without us: the hooks keep transformers' own functions
        model = ready(by_device_map(path, tmp_path))
    ids = testing.random_ids(1, 300)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="the forward of a LlamaAttention is not ours"):
            want = model(ids).logits
        assert llama1m_ext.stats(model, reset=True).served == 0
        assert llama1m_ext.patch_model(model) > LAYERS
        torch.testing.assert_close(model(ids).logits, want, rtol=2e-4, atol=2e-4)
    counts = llama1m_ext.stats(model)
    assert (counts.served, counts.layer_major, counts.stock) == (LAYERS * 5, 1, {})


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_belongs_to_the_same_weights_wherever_they_are(path, tmp_path, way, one_thread):
    here, there = ready(AutoModelForCausalLM.from_pretrained(path)), ready(way(path, tmp_path / "weights"))
    assert fingerprint(here.model) == fingerprint(there.model)
    ids, more, cache = testing.random_ids(1, 100), testing.random_ids(1, 20, seed=1), LongCache()
    with torch.no_grad():
        there(ids, past_key_values=cache)
        cache.save(tmp_path / "kv", model=there)
        want = there(more, past_key_values=cache).logits
        got = here(more, past_key_values=LongCache.load(tmp_path / "kv", here)).logits
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
        LongCache.load(tmp_path / "kv", there)


def test_other_weights_elsewhere_are_others(path, tmp_path):
    model = testing.tiny_model(num_hidden_layers=LAYERS)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[5, 5] += 1e-3
    model.save_pretrained(tmp_path / "other")
    one, other = by_device_map(path, tmp_path), by_device_map(tmp_path / "other", tmp_path)
    assert fingerprint(one.model) != fingerprint(other.model)
    ids, cache = testing.random_ids(1, 30), LongCache()
    with torch.no_grad():
        one(ids, past_key_values=cache)
    cache.save(tmp_path / "kv", model=one)
    with pytest.raises(saved.CacheMismatch, match="the weights"):
        LongCache.load(tmp_path / "kv", other)


def test_files_that_change_are_seen(path, tmp_path):
    model = ready(disk_offload(path, tmp_path))
    before = fingerprint(model.model)
    assert fingerprint(model.model) == before
    file = tmp_path / "model.layers.1.mlp.down_proj.weight.dat"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert fingerprint(model.model) != before


def test_weights_in_main_memory_that_change_are_seen(path, tmp_path):
    model = ready(cpu_offload(path, tmp_path))
    before = fingerprint(model.model)
    hook = model.model.layers[1].mlp.up_proj._hf_hook
    with torch.no_grad():
        hook.weights_map["weight"][3, 3] += 1
    assert fingerprint(model.model) != before


def test_weights_that_are_nowhere_have_no_fingerprint():
    with torch.device("meta"):
        model = LlamaForCausalLM(testing.tiny_config())
    with pytest.raises(ValueError, match=r"expected weights in memory, but .*embed_tokens\.weight is not"):
        fingerprint(model.model)


def test_a_prompt_is_remembered(path, tmp_path, one_thread):
    ids, found = testing.random_ids(1, 400), []
    for folder in ("a", "b"):
        model = ready(by_device_map(path, tmp_path / folder))
        llama1m_ext.remember(model, tmp_path / "kept")
        with torch.no_grad():
            found.append(model(ids, logits_to_keep=4).logits)
    assert llama1m_ext.stats(model).reused == 396
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


def layer_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.model.layers[1].parameters())


@pytest.mark.parametrize("way", WAYS)
def test_the_plan_counts_what_is_in_memory_at_a_time(path, tmp_path, way):
    model = way(path, tmp_path)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    layer, table = layer_bytes(model), model.lm_head.weight.numel() * 4
    norm = model.model.norm.weight.numel() * 4
    away = {
        by_device_map: 2 * layer + norm,
        table_on_disk_too: 2 * layer + norm + 2 * table,
        disk_offload: whole,
        cpu_offload: 0,
        whole_layers: whole,
    }[way]
    shape = llama1m_ext.plan(model, 1000, measure=False).shape
    assert whole - away <= shape.loaded <= whole - away + 200, "beside buffers"
    assert shape.brought == (0 if way is cpu_offload else max(layer, 0 if way is by_device_map else table))
    assert shape.weight_bytes == shape.loaded + shape.brought
    to_a_gpu = weights.brought_bytes(model.model.layers, gpu=True)  # where main memory is elsewhere too
    assert to_a_gpu == layer


def test_the_plan_before_a_prefill_counts_a_layer_that_is_brought(path, model, monkeypatch, one_thread):
    found = []
    monkeypatch.setattr(plan_call, "SMALL", 0)
    real = plan_call.plan_choice.check
    monkeypatch.setattr(plan_call.plan_choice, "check", lambda shape, *args: found.append(shape) or real(shape, *args))
    with torch.no_grad():
        model(testing.random_ids(1, 300))
        ready(AutoModelForCausalLM.from_pretrained(path))(testing.random_ids(1, 300))
    assert [shape.brought for shape in found] == [layer_bytes(model), 0]
    work, storage = plan_call.Work(300, chunk=64), plan_call.Storage()
    peaks = [plan_call.plan_bytes.peak(shape, work, storage).bytes for shape in found]
    assert peaks[0] - peaks[1] == layer_bytes(model)
