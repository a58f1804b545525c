"""The plan: bytes by arithmetic, what "auto" chooses, what is said where nothing fits."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import llama1m_ext
from llama1m_ext import DoesNotFit, LongCache, memory, plan, plan_call, plan_choice, plan_speed, set_options
from llama1m_ext.cli import app
from llama1m_ext.plan_bytes import LADDER, Storage, Work, kv_bytes, layer_bytes, parts, peak
from llama1m_ext.plan_shape import PRESETS, shape_of
from llama1m_ext.testing import random_ids, tiny_config, tiny_model

plan_module = sys.modules["llama1m_ext.plan"]
CARD = "gradientai/Llama-3-8B-Instruct-Gradient-1048k"
GIB = 1 << 30
MILLION = 1 << 20


def card(**more):
    return plan(CARD, MILLION, **{"measure": False, "host": "256GiB", **more})


# -- bytes -----------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_model_card():
    p = card(new_tokens=0)
    assert p.parts.weights == 16_060_522_496  # 8,030,261,248 parameters
    sizes = {f.name: f.kv_bytes / GIB for f in p.formats}
    expected = {"model": 128, "int8": 68, "fp8": 68, "int8/int4": 52, "int4": 36}
    assert sizes == pytest.approx(expected, rel=1e-3)
    assert {f.name: f.token_bytes for f in p.formats}["int4"] == 36864
    assert p.parts.hidden == 8 * GIB
    assert p.shape.linear_flops(MILLION) == pytest.approx(1.464e16, rel=1e-3)
    assert p.shape.attention_flops(MILLION) == pytest.approx(2.882e17, rel=1e-3)


@pytest.mark.parametrize("kv", ["model", "int8", "int4", "int8/int4", "fp8"])
@pytest.mark.parametrize("tokens", [1, 64, 320, 383, 384, 385, 500, 2048, 3001])
def test_the_bytes_of_a_cache_are_what_a_real_one_has(kv, tokens):
    model = tiny_model(hidden_size=256, num_key_value_heads=1)
    set_options(model, kv=kv, page_size=64, chunk=256)
    cache = LongCache()
    with torch.inference_mode():
        model(random_ids(1, tokens), past_key_values=cache, logits_to_keep=1)
    shape = shape_of(model)[1]
    one = layer_bytes(shape, "model", 1)
    room = 384 * one if kv != "model" else 64 * one  # of the tail; of the last page
    each = cache.layers[0].nbytes
    assert kv_bytes(shape, kv, tokens) == shape.layers * layer_bytes(shape, kv, tokens)
    assert layer_bytes(shape, kv, tokens) <= each <= layer_bytes(shape, kv, tokens) + room


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_weights_by_arithmetic_are_those_of_a_model(changes):
    model = tiny_model(**changes)
    counted = sum(p.numel() * p.element_size() for p in model.parameters())
    _, by_config = shape_of(model.config, "float32")
    assert by_config.weight_bytes == counted
    _, by_model = shape_of(model)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert counted <= by_model.weight_bytes <= counted + buffers
    assert by_model.dtype == "float32"


def test_sources_of_a_plan(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    from_folder = plan(str(tmp_path), 4096, measure=False, dtype="bf16")
    from_config = plan(config, 4096, measure=False, dtype=torch.bfloat16)
    assert from_folder.shape == from_config.shape
    assert from_folder.parts == from_config.parts
    model = tiny_model()
    whole, inner = (plan(m, 4096, measure=False).shape for m in (model, model.model))
    assert whole.layers == inner.layers == 2
    assert whole.loaded - inner.loaded == model.lm_head.weight.nbytes


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"tokens": 0}, ValueError, "tokens"),
        ({"tokens": 1.5}, TypeError, "tokens"),
        ({"batch": 0}, ValueError, "batch"),
        ({"new_tokens": -1}, ValueError, "new_tokens"),
        ({"dtype": "int3"}, ValueError, "int3"),
        ({"kv": "int3"}, ValueError, "int3"),
        ({"offload": "moon"}, ValueError, "moon"),
        ({"gpu": "80 bananas"}, ValueError, "gpu"),
        ({"host": 0}, ValueError, "host"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"threads": 0}, ValueError, "threads"),
        ({"model_or_config": 7}, TypeError, "int"),
        ({"model_or_config": "/nowhere/at/all"}, ValueError, "/nowhere/at/all"),
    ],
)
def test_what_makes_no_sense_is_named(arguments, error, named):
    with pytest.raises(error, match=re.escape(named)):
        plan(**{"model_or_config": CARD, "tokens": 1000, "measure": False, **arguments})


def test_another_kind_of_model_is_an_error(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2"):
        plan(str(tmp_path), 1000)


# -- what "auto" chooses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "kv", "offload"),
    [("80GiB", "int4", None), ("141GiB", "int8", None), ("192GiB", "model", None), ("48GiB", "int4", "host")],
)
def test_the_card_on_gpus(gpu, kv, offload):
    p = card(gpu=gpu)
    assert (p.kv, p.offload, p.fits) == (kv, offload, True)
    assert "arithmetic" in str(p)
    assert ("come for each decoded token" in p.why) == (offload == "host")
    if offload == "host":
        others = [card(gpu=gpu, kv=other).parts.file for other in LADDER if other != kv]
        assert 0 < p.parts.file < min(others)
        assert f"{p.parts.file / GIB:.1f} GiB of the pages live on the host" in str(p)


@pytest.mark.parametrize(
    ("host", "kv", "offload", "fits"),
    [
        ("256GiB", "model", None, True),
        ("128GiB", "int8", None, True),
        ("96GiB", "int8/int4", None, True),
        ("72GiB", "int4", None, True),
        ("48GiB", "int4", "disk", True),
        ("16GiB", "int4", "disk", False),
    ],
)
def test_the_card_on_hosts(host, kv, offload, fits):
    p = card(host=host)
    assert (p.kv, p.offload, p.fits) == (kv, offload, fits)
    assert p.peak.bytes <= p.memory[0].bytes or not fits
    assert ("does not fit" in str(p)) == (not fits)


SHAPE = PRESETS[CARD]
RANK = {("model", None): 0, ("int8", None): 1, ("int8/int4", None): 2, ("int4", None): 3, ("int4", "disk"): 4}


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.integers(1000, 1 << 21),
    more=st.integers(0, 1 << 20),
    memory=st.integers(1 << 30, 300 << 30),
    less=st.integers(0, 100 << 30),
    used=st.sampled_from([0, SHAPE.weight_bytes]),
)
def test_less_memory_or_more_tokens_only_moves_on(tokens, more, memory, less, used):
    def rank(tokens, memory):
        choice = plan_choice.choose(SHAPE, Work(tokens), memory, used=used)
        assert choice.why
        if choice.storage.offload is None:
            assert choice.fits
            assert (choice.peak.bytes - used) * plan_choice.MARGIN <= memory
        return RANK[choice.storage.kv, choice.storage.offload]

    assert rank(tokens, memory) <= rank(tokens + more, max(1, memory - less))


def test_what_is_asked_for_is_kept():
    work = Work(MILLION)
    assert plan_choice.choose(SHAPE, work, 64 * GIB, kv="int8").storage.offload == "disk"
    assert plan_choice.choose(SHAPE, work, 64 * GIB, kv="int8").storage.kv == "int8"
    assert plan_choice.choose(SHAPE, work, 300 * GIB, offload="disk").storage.kv == "model"
    assert plan_choice.choose(SHAPE, work, 300 * GIB, offload="disk").storage.offload == "disk"
    none = plan_choice.choose(SHAPE, work, 48 * GIB, offload=None)
    assert (none.storage.kv, none.storage.offload, none.fits) == ("int4", None, False)
    assert plan_choice.choose(SHAPE, work, 300 * GIB, kv_memory=60 * GIB).storage.kv == "int8/int4"
    assert plan_choice.choose(SHAPE, work, None).storage == Storage("model")


# -- what cannot fit -----------------------------------------------------------------------------------------------------------


def test_a_clear_error_with_ways_out_that_work():
    work, storage, limit = Work(MILLION, chunk=4096), Storage("model"), 90 * GIB
    used = SHAPE.weight_bytes
    with pytest.raises(DoesNotFit) as caught:
        plan_choice.check(SHAPE, work, storage, limit, used)
    error = caught.value
    assert isinstance(error, MemoryError)
    assert error.needed == peak(SHAPE, work, storage).bytes - used
    assert error.available == limit
    assert len(error.ways) == 3
    assert all(way in str(error) for way in error.ways)
    for kv in ("int8", "int8/int4"):
        (way,) = (way for way in error.ways if f'kv="{kv}"' in way)
        saved = float(re.search(r"saves ([\d.]+) GiB", way).group(1))
        left = peak(SHAPE, work, Storage(kv)).bytes - used
        assert saved == pytest.approx((error.needed - left) / GIB, abs=0.1)
        plan_choice.check(SHAPE, work, Storage(kv), limit, used)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.needed, copy.available, copy.ways) == (error.needed, error.available, error.ways)


@pytest.mark.parametrize("limit", [x * GIB for x in (1, 5, 10, 14, 20, 40, 60, 100, 130)])
@pytest.mark.parametrize("kv", LADDER)
def test_every_way_out_fits(limit, kv):
    """Each way that the error names is tried: as options, or as fewer tokens."""
    work, storage, used = Work(MILLION, chunk=8192), Storage(kv), SHAPE.weight_bytes
    if peak(SHAPE, work, storage).bytes - used <= limit:
        plan_choice.check(SHAPE, work, storage, limit, used)
        return
    with pytest.raises(DoesNotFit) as caught:
        plan_choice.check(SHAPE, work, storage, limit, used)
    assert caught.value.ways
    for way in caught.value.ways:
        tokens = re.search(r"fewer tokens: (\d+)", way)
        chunk = re.search(r"chunk=(\d+)", way)
        format_ = re.search(r'kv="([^"]+)"', way)
        pages = re.search(r'kv_memory="(\d+)MiB"', way)
        tried = dataclasses.replace(
            work, tokens=int(tokens[1]) if tokens else work.tokens, chunk=int(chunk[1]) if chunk else work.chunk
        )
        disk = 'offload="disk"' in way
        held = (int(pages[1]) << 20 if pages else 1 << 20) if disk else None
        new = Storage(format_[1] if format_ else kv, "disk" if disk else None, held)
        assert peak(SHAPE, tried, new).bytes - used <= limit, way
        if tokens:  # and not many more
            much = dataclasses.replace(tried, tokens=int(tokens[1]) + 256)
            assert peak(SHAPE, much, new).bytes - used > limit, way


def test_before_any_work(monkeypatch):
    """A real model: the error comes before the first module is called, and the cache is as it was."""
    model = tiny_model(hidden_size=256, num_hidden_layers=4)
    set_options(model, chunk=512, offload=None)
    monkeypatch.setattr(plan_call, "SMALL", 0)
    calls = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    cache = LongCache()
    ids = random_ids(1, 4096)
    monkeypatch.setattr(plan_call, "available_bytes", lambda: 2 << 20)
    with torch.inference_mode(), pytest.raises(DoesNotFit, match="4096 tokens need") as caught:
        model(ids, past_key_values=cache, logits_to_keep=1)
    assert not calls
    assert cache.get_seq_length() == 0
    assert caught.value.ways
    monkeypatch.setattr(plan_call, "available_bytes", lambda: 1 << 30)
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 4096
    assert cache.format.is_model


def test_kv_memory_alone_is_a_limit(monkeypatch):
    monkeypatch.setattr(plan_call, "SMALL", 0)
    model = tiny_model(hidden_size=256)
    set_options(model, chunk=512, kv="model", offload=None, kv_memory=1 << 20)
    with torch.inference_mode(), pytest.raises(DoesNotFit, match="kv_memory"):
        model(random_ids(1, 4096), past_key_values=LongCache(), logits_to_keep=1)
    set_options(model, kv="auto", kv_memory="1900KiB")
    cache = LongCache()
    with torch.inference_mode():
        model(random_ids(1, 2048), past_key_values=cache, logits_to_keep=1)
    assert cache.format.name == "int8"
    assert cache.nbytes <= 1900 << 10


def test_auto_becomes_compact_and_then_goes_to_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(plan_call, "SMALL", 0)
    model = tiny_model(hidden_size=256, num_hidden_layers=8)
    set_options(model, chunk=128, offload_dir=str(tmp_path))
    ids = random_ids(1, 4096)
    shape = shape_of(model)[1]
    work = Work(4096, chunk=128, threads=torch.get_num_threads())
    found = []
    kept = plan_call._reckoned

    def need(kv):
        return peak(shape, work, Storage(kv)).bytes - used

    monkeypatch.setattr(plan_call, "_reckoned", lambda *a: found.append(kept(*a)) or found[-1])
    with torch.inference_mode():
        model(ids, past_key_values=LongCache(), logits_to_keep=1)
        work, used = found[0][1], found[0][2]
        shape = found[0][0]
        for name, memory, stored in (
            ("model", need("model") * 1.06, False),
            ("int8", need("model") * 1.04, False),
            ("int4", need("int8/int4") * 1.04, False),
            ("int4", need("int4") * 1.02, True),
        ):
            monkeypatch.setattr(plan_call, "available_bytes", lambda memory=memory: int(memory))
            cache = LongCache()
            model(ids, past_key_values=cache, logits_to_keep=1)
            assert cache.format.name == name, memory
            assert (cache.layers[0].store is not None) == stored


def test_small_calls_are_not_planned(monkeypatch):
    def never(*_):
        raise AssertionError("a small call was planned")

    monkeypatch.setattr(plan_call, "available_bytes", never)
    monkeypatch.setattr(plan_call, "_reckoned", never)
    model = tiny_model()
    cache = LongCache()
    with torch.inference_mode():
        model(random_ids(1, 300), past_key_values=cache, logits_to_keep=1)
        model(random_ids(1, 1), past_key_values=cache, logits_to_keep=1)
    assert cache.format.is_model


# -- for people ----------------------------------------------------------------------------------------------------------------


def call(*words: str):
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command(tmp_path):
    file = tmp_path / "plan.json"
    answer = call(CARD, "--tokens", "1048576", "--gpu", "80GiB", "--json", str(file))
    assert answer.exit_code == 0, answer.output
    for word in (
        "128.0 GiB",
        "68.0 GiB",
        "52.0 GiB",
        "36.0 GiB",
        "int8/int4",
        "hidden states",
        'kv="int4"',
        "<- chosen",
    ):
        assert word in answer.stdout, word
    made = json.loads(file.read_text())
    assert made["kv"] == "int4"
    assert made["parts"]["hidden"] == 8 * GIB
    assert made["speed"] is None


@pytest.mark.parametrize(
    "words", [("--host", "16GiB"), ("--host", "256GiB", "--kv-memory", "1GiB", "--offload", "none"), ("--gpu", "17GiB")]
)
def test_the_command_says_what_does_not_fit_and_the_ways_out(tmp_path, words):
    file = tmp_path / "plan.json"
    answer = call(CARD, "--tokens", "1048576", "--json", str(file), *words)
    assert answer.exit_code == 1, answer.output
    made = json.loads(file.read_text())
    assert made["fits"] is False
    assert "does not fit" in answer.stdout
    for way in made["ways"]:
        assert way in answer.stdout
    if "--kv-memory" in words:
        assert any("kv_memory=" in way for way in made["ways"])
    if "16GiB" not in words and "17GiB" not in words:
        assert made["ways"]


def test_estimates_follow_from_measured_rates():
    p = plan(tiny_config(), 100_000, dtype="f32", threads=1)
    m, s = p.speed.machine, p.speed
    assert m.threads == 1
    assert min(m.flops, m.matmul) > 1e8
    assert m.read > 1e7
    assert s.prefill_seconds == pytest.approx(
        p.shape.attention_flops(100_000) / (0.85 * m.flops) + p.shape.linear_flops(100_000) / m.matmul
    )
    assert "Estimates" in str(p)
    assert json.loads(json.dumps(p.to_dict()))["speed"]["prefill_seconds"] == s.prefill_seconds


def test_estimates_for_a_gpu_that_is_described(tmp_path):
    p = card(gpu="80GiB", gpu_flops=400e12, gpu_read="2000GB")
    m, s = p.speed.machine, p.speed
    assert (m.where, m.given, m.matmul, m.read) == ("gpu", True, 400e12, 2000e9)
    work = p.shape.attention_flops(MILLION) / 0.85 + p.shape.linear_flops(MILLION)
    assert s.prefill_seconds == pytest.approx(work / 400e12)
    pages = kv_bytes(p.shape, "int4", MILLION + 256)
    assert s.token_seconds == pytest.approx((p.shape.read_bytes + pages) / (0.8 * 2000e9))
    assert "Estimates for the GPU (given: 400.0 TFLOP/s, 1863 GiB/s of reading)" in str(p)
    small = card(gpu="48GiB", gpu_flops=400e12, gpu_read="2000GB")
    assert f"without bringing {plan_choice.gib(small.parts.file)} from the host for each" in str(small)
    answer = call(CARD, "--tokens", "1048576", "--gpu", "80GiB", "--gpu-tflops", "400", "--gpu-bandwidth", "2000GB")
    assert answer.exit_code == 0
    assert str(p).splitlines()[-2:] == answer.stdout.splitlines()[-2:]


def test_estimates_for_a_gpu_that_is_there(monkeypatch):
    """What is timed there, timed here; and that a model's own GPU is asked."""
    m = plan_speed.measure_gpu(shape_of(tiny_config(hidden_size=64))[1], torch.device("cpu"), 16, 256, 16, 1 << 20)
    assert m.where == "gpu"
    assert not m.given
    assert min(m.flops, m.matmul, m.read) > 1e5
    assert m.attention == m.flops
    asked = []
    monkeypatch.setattr(plan_module, "_gpus_of", lambda model: {torch.device("cuda", 1), torch.device("cuda", 0)})
    monkeypatch.setattr(memory, "free_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(plan_speed, "measure_gpu", lambda shape, device: asked.append(device) or m)
    model = tiny_model()
    p = plan(model, 4096)
    assert asked == [torch.device("cuda", 0)]
    assert p.memory[0].bytes == 160 * GIB
    assert p.speed.machine == m
    assert "Estimates for the GPU (measured: " in str(p)
    assert plan(model, 4096, measure=False).speed is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--tokens", "0"), "--tokens"),
        (("--tokens", "10", "--gpu", "1GiB", "--gpu-tflops", "3"), "both or none"),
        (("--tokens", "10", "--gpu", "1GiB", "--gpu-tflops", "-3", "--gpu-bandwidth", "1GB"), "gpu_flops"),
        (("--tokens", "10", "--gpu", "1GiB", "--gpu-tflops", "nan", "--gpu-bandwidth", "1GB"), "gpu_flops"),
        (("--tokens", "10", "--gpu", "1GiB", "--gpu-tflops", "3", "--gpu-bandwidth", "fast"), "fast"),
        (("--tokens", "10", "--gpu-tflops", "3", "--gpu-bandwidth", "1GB"), "for none"),
        (("--tokens", "10", "--kv", "int3"), "int3"),
        (("--tokens", "10", "--gpu", "many"), "many"),
        (("--tokens", "10", "--offload", "moon"), "moon"),
        (("--tokens", "10", "--chunk", "big"), "big"),
    ],
)
def test_the_command_refuses(words, named):
    answer = call(CARD, *words)
    assert answer.exit_code == 2
    assert named in answer.output


def test_the_plan_has_the_packages_name():
    assert llama1m_ext.plan is plan
    assert parts(SHAPE, Work(10), Storage()).weights == SHAPE.weight_bytes
