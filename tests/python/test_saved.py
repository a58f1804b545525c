"""Caches in files: what was saved comes back bit by bit, for the model that made it, whatever happened while it was written."""

from __future__ import annotations

import copy
import gc
import json
import os
import time

import pytest
import torch
from typer.testing import CliRunner

import llama1m_ext
from llama1m_ext import LongCache, saved, testing
from llama1m_ext.cli import app
from llama1m_ext.dense import Kind, loaded
from llama1m_ext.formats import MODEL, KvFormat, Page
from llama1m_ext.pages import PagedLayer
from llama1m_ext.stored import StoredPage

FORMATS = ["model", "int8", "fp8", "int4", "int8/int4", "model/int4"]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 258}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny layers: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, logits_to_keep=1).logits


def filled(model, kv="model", batch=1, length=700, **more):
    """A cache that has read random tokens."""
    cache = LongCache(kv=kv, **more)
    read(model, testing.random_ids(batch, length), cache)
    return cache


def contents(cache):
    """Every byte of the tokens in use, by layer, page and name."""
    return [
        {name: (t.dtype, t.shape, t.contiguous().view(torch.uint8)) for name, t in loaded(part).tensors().items()}
        for layer in cache.layers
        for part in layer._used(layer.length)
    ]


def assert_same(mine, theirs):
    assert mine.get_seq_length() == theirs.get_seq_length()
    a, b = contents(mine), contents(theirs)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name][:2] == y[name][:2]
            assert torch.equal(x[name][2], y[name][2]), name
    if theirs.tokens is None:
        assert mine.tokens is None
    else:
        assert torch.equal(mine.tokens, theirs.tokens)


def assert_goes_on_alike(found, cache, model, ids):
    """The same tokens, and the same bits in every page."""
    copied = copy.deepcopy(cache)  # whose pages are cut where the file's are
    ours, theirs = (model.generate(ids, past_key_values=each, **GREEDY) for each in (found, copied))
    assert torch.equal(ours, theirs)
    assert_same(found, copied)


# -- there and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_saved_comes_back_and_goes_on(tmp_path, kv, dtype):
    model = testing.tiny_model(dtype=dtype)
    cache = filled(model, kv, batch=2)
    path = tmp_path / "book.safetensors"
    cache.save(path)
    before = path.read_bytes()
    found = LongCache.load(path, model)
    assert found.format == cache.format == KvFormat.parse(kv)
    assert all(type(layer) is PagedLayer and layer.decided for layer in found.layers)
    for layer in found.layers:
        # In a compact format, the newest tokens are in memory: they are to become compact, too.
        kept = layer.pages if kv == "model" else layer.pages[:-1]
        assert kept and all(isinstance(page, StoredPage) for page in kept)
    assert_same(found, cache)
    question = torch.cat([cache.tokens, testing.random_ids(2, 400, seed=1)], 1)
    assert_goes_on_alike(found, cache, model, question)
    assert path.read_bytes() == before, "generating wrote to the file"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 383, 384, 385, 449, 1000])
@pytest.mark.parametrize("kv", ["model", "int4"])
def test_lengths_around_the_borders_of_pages(tmp_path, kv, length):
    model = testing.tiny_model()
    cache = filled(model, kv, length=length, page_size=128)
    saved.save(cache, tmp_path / "f", model)
    found = LongCache.load(tmp_path / "f", model)
    assert_same(found, cache)
    for token in testing.random_ids(1, 5, seed=2)[0]:
        a, b = (read(model, token.view(1, 1), each) for each in (found, cache))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        {"head_dim": 80},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128},
    ],
)
def test_other_heads(tmp_path, changes):
    model = testing.tiny_model(**changes)
    for kv in ("model", "int8", "int4"):
        cache = filled(model, kv)
        cache.save(tmp_path / "f")
        assert_same(LongCache.load(tmp_path / "f", model), cache)


def test_the_cache_that_generate_made(tmp_path):
    model = testing.tiny_model()
    ids = testing.random_ids(1, 500)
    out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    cache = out.past_key_values
    saved.save(cache, tmp_path / "f", model)
    found = LongCache.load(tmp_path / "f", model)
    assert found.get_seq_length() == 505
    for a, b in zip(found.layers, cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    mine, theirs = (model.generate(out.sequences, past_key_values=c, **GREEDY) for c in (found, cache))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_pages_that_live_in_a_file_are_saved_too(tmp_path, kv):
    model = testing.tiny_model()
    llama1m_ext.set_options(model, offload="disk", kv_memory=200_000, offload_dir=tmp_path, kv=kv)
    cache = LongCache()
    read(model, testing.random_ids(1, 3000), cache)
    assert any(isinstance(page, StoredPage) for layer in cache.layers for page in layer.pages)
    cache.save(tmp_path / "f")
    assert_same(LongCache.load(tmp_path / "f", model), cache)


@pytest.mark.parametrize("kv", ["model", "int4"])
def test_saving_to_the_file_that_it_came_from(tmp_path, kv):
    model = testing.tiny_model()
    cache = filled(model, kv)
    path = tmp_path / "f"
    cache.save(path)
    cache.save(path)  # twice
    for turn in range(4):
        found = LongCache.load(path, model)
        assert_same(found, cache)
        read(model, testing.random_ids(1, 300, seed=turn), found)
        before = copy.deepcopy(contents(found))
        found.save(path)
        # What was loaded sees the file as it was.
        for a, b in zip(contents(found), before, strict=True):
            assert all(torch.equal(a[name][2], b[name][2]) for name in b)
        cache = found
    assert cache.tokens.shape == (1, 1900)
    assert os.listdir(tmp_path) == ["f"]


def test_a_cache_that_was_cropped_and_reordered(tmp_path):
    model = testing.tiny_model()
    for kv in ("model", "int8"):
        cache = filled(model, kv, batch=3)
        cache.crop(-77)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.save(tmp_path / "f")
        found = LongCache.load(tmp_path / "f", model)
        assert_same(found, cache)
        found.crop(-200)
        found.reorder_cache(torch.tensor([1, 2, 0]))
        found.save(tmp_path / "f")
        assert_same(LongCache.load(tmp_path / "f", model), found)


def test_tokens_that_are_not_known_stay_unknown(tmp_path):
    model = testing.tiny_model()
    cache = LongCache()
    embeds = model.model.embed_tokens(testing.random_ids(1, 100)).detach()
    with torch.no_grad():
        model(inputs_embeds=embeds, past_key_values=cache)
    assert cache.tokens is None
    cache.save(tmp_path / "f")
    assert LongCache.load(tmp_path / "f", model).tokens is None


def test_loaded_twice_they_go_their_own_ways(tmp_path):
    model = testing.tiny_model()
    filled(model, "int8").save(tmp_path / "f")
    a, b = (LongCache.load(tmp_path / "f", model) for _ in range(2))
    c = copy.deepcopy(a)
    before = contents(b)
    read(model, testing.random_ids(1, 500, seed=3), a)
    for x, y in zip(contents(b), before, strict=True):
        assert all(torch.equal(x[name][2], y[name][2]) for name in x)
    assert_same(c, b)


def test_a_file_that_is_removed_stays_readable_for_who_has_it(tmp_path):
    model = testing.tiny_model()
    cache = filled(model)
    cache.save(tmp_path / "f")
    found = LongCache.load(tmp_path / "f", model)
    (tmp_path / "f").unlink()
    assert_same(found, cache)


def test_files_are_closed_with_the_cache(tmp_path):
    model = testing.tiny_model()
    filled(model).save(tmp_path / "f")
    gc.collect()
    folder = f"/proc/{os.getpid()}/fd"
    before = len(os.listdir(folder))
    for _ in range(5):
        contents(LongCache.load(tmp_path / "f", model))
    gc.collect()
    assert len(os.listdir(folder)) == before


def test_nothing_to_save(tmp_path):
    model = testing.tiny_model()
    with pytest.raises(ValueError, match="cache: expected at least one token"):
        saved.save(LongCache(), tmp_path / "f", model)
    assert not os.listdir(tmp_path)


def test_no_such_file(tmp_path):
    model = testing.tiny_model()
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        LongCache.load(tmp_path / "nothing-here", model)
    with pytest.raises(FileNotFoundError, match="folder"):
        filled(model, length=10).save(tmp_path / "no" / "folder" / "f")


def test_the_safetensors_library_reads_it(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    model = testing.tiny_model()
    cache = filled(model, "int8", length=1000)
    cache.save(tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()
    theirs = load_file(tmp_path / "f.safetensors")
    ours = [t for page in contents(cache) for _, _, t in page.values()]
    found = {t.contiguous().view(torch.uint8).numpy().tobytes() for t in theirs.values() if t.dim()}
    assert all(t.numpy().tobytes() in found for t in ours)


# -- which model it is for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 10_000.0}, ["theta", "500000", "10000"]),
        ({"num_hidden_layers": 3}, ["layers", "2", "3"]),
        ({"num_key_value_heads": 4}, ["heads", "2", "4"]),
        ({"head_dim": 32}, ["head_dim", "16", "32"]),
        ({"vocab_size": 300}, ["vocab_size", "261", "300"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope", "linear"]),
        ({"dtype": torch.bfloat16}, ["dtype", "float32", "bfloat16"]),
        ({"seed": 1}, ["weights"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_another_model(tmp_path, changes, named):
    model = testing.tiny_model()
    filled(model).save(tmp_path / "f")
    with pytest.raises(saved.CacheMismatch) as caught:
        LongCache.load(tmp_path / "f", testing.tiny_model(**changes))
    assert isinstance(caught.value, ValueError)
    for word in [*named, str(tmp_path / "f")]:
        assert word in str(caught.value), str(caught.value)


def test_every_difference_is_listed(tmp_path):
    model = testing.tiny_model()
    filled(model).save(tmp_path / "f")
    other = testing.tiny_model(num_hidden_layers=3, rope_theta=10_000.0, vocab_size=300)
    with pytest.raises(saved.CacheMismatch) as caught:
        LongCache.load(tmp_path / "f", other)
    for word in ("layers", "theta", "vocab_size"):
        assert word in str(caught.value)


def test_saving_with_a_model_that_can_not_have_made_it(tmp_path):
    model = testing.tiny_model()
    cache = filled(model)
    cache.save(tmp_path / "f")
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(ValueError, match="made the cache"):
        cache.save(tmp_path / "f", testing.tiny_model(num_hidden_layers=3))
    assert (tmp_path / "f").read_bytes() == before


def test_a_weight_that_changed(tmp_path):
    model = testing.tiny_model()
    cache = filled(model)
    cache.save(tmp_path / "f")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(saved.CacheMismatch, match="weights"):
        LongCache.load(tmp_path / "f", model)


def test_the_same_weights_loaded_again_are_the_same_model(tmp_path):
    from transformers import AutoModelForCausalLM

    path = testing.tiny_checkpoint(tmp_path / "model")
    first, second = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    filled(first).save(tmp_path / "f")
    LongCache.load(tmp_path / "f", second)
    LongCache.load(tmp_path / "f", second.model)  # without the head, which keys and values don't depend on
    if hasattr(second.config, "_attn_implementation"):
        third = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        LongCache.load(tmp_path / "f", third)


def test_a_model_that_is_no_llama(tmp_path):
    model = testing.tiny_model()
    filled(model).save(tmp_path / "f")
    with pytest.raises(TypeError, match="Llama"):
        LongCache.load(tmp_path / "f", torch.nn.Linear(2, 2))


def test_a_large_weight_is_sampled(tmp_path):
    model = testing.tiny_model(intermediate_size=20_000)  # 5 MB each
    cache = filled(model, length=10)
    cache.save(tmp_path / "f")
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight.detach().clone()
    for change in ("first", "last", "all, a bit"):
        with torch.no_grad():
            if change == "all, a bit":
                weight.data.mul_(1.001)  # past the counter of versions
            else:
                weight.view(-1)[0 if change == "first" else -1] += 1
        with pytest.raises(saved.CacheMismatch, match="the weights"):
            LongCache.load(tmp_path / "f", model)
        with torch.no_grad():
            weight.copy_(kept)
        LongCache.load(tmp_path / "f", model)


# -- kills ---------------------------------------------------------------------------------------------------------------

KILLS = r"""
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from llama1m_ext import LongCache, saved, testing
path, draw, left = sys.argv[1], random.Random(0), 0
model = testing.tiny_model()
versions = []
for length in (1000, 5000):
    cache = LongCache(kv="int8")
    with torch.no_grad():
        model(testing.random_ids(1, length, seed=length), past_key_values=cache, logits_to_keep=1)
    versions.append(cache)
versions[0].save(path)
seen = set()
for i in range(30):
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for cache in versions:
                    cache.save(path)
        finally:
            os._exit(9)
    time.sleep(draw.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it ended by itself"
    left += len(os.listdir(os.path.dirname(path))) - 1
    found = saved.verify(path)
    cache = LongCache.load(path, model)
    (same,) = [each for each in versions if each.get_seq_length() == found.tokens]
    assert torch.equal(cache.tokens, same.tokens)
    for a, b in zip(cache.layers, same.layers):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    seen.add(found.tokens)
versions[1].save(path)
assert len(os.listdir(os.path.dirname(path))) == 1
print("left", left, "seen", sorted(seen))
"""


def test_kills_leave_the_old_cache_or_the_new_one(run_python, tmp_path):
    out = run_python(f"import sys; sys.argv[1:] = [{str(tmp_path / 'f')!r}]\n{KILLS}")
    left = int(out.split()[1])
    assert left, "none was killed while it wrote"


# -- speed ---------------------------------------------------------------------------------------------------------------


def test_a_million_tokens_open_at_once(tmp_path):
    """As many pages as those of an 8B model have (32 layers of 256, 16 MiB each), but small ones, in two layers."""
    layers, pages, size = 2, 4096, 256
    model = testing.tiny_model(
        num_hidden_layers=layers, num_attention_heads=1, num_key_value_heads=1, head_dim=8, dtype=torch.bfloat16
    )
    page = Page(*torch.randn(2, 1, 1, size, 8).bfloat16())
    cache = LongCache(kv=MODEL)
    kind = Kind.of(page.k, page.v)
    cache.layers = [PagedLayer.of_pages([page] * pages, pages * size, MODEL, kind=kind) for _ in range(layers)]
    assert cache.get_seq_length() == 1_048_576
    saved.save(cache, tmp_path / "f", model)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = LongCache.load(tmp_path / "f", model)
        seconds.append(time.perf_counter() - start)
    assert found.get_seq_length() == 1_048_576
    assert min(seconds) < 1, seconds


# -- the console script --------------------------------------------------------------------------------------------------


def call(*words):
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_info_says_what_is_in_a_file(tmp_path):
    model = testing.tiny_model()
    filled(model, "int8/int4", batch=2).save(tmp_path / "f")
    answer = call("cache", "info", tmp_path / "f")
    assert answer.exit_code == 0, answer.output
    for word in (
        "700 in each of 2 rows, ids known",
        "int8/int4",
        "float32",
        "2 layers",
        "head_dim 16",
        "rope_theta 500000",
    ):
        assert word in answer.stdout
    facts = json.loads(call("cache", "info", tmp_path / "f", "--json").stdout)
    assert facts["tokens"] == 700
    assert facts["kv"] == "int8/int4"
    assert facts["nbytes"] == os.stat(tmp_path / "f").st_size
    assert facts["model"]["config"]["num_key_value_heads"] == 2


def test_verify_finds_each_damaged_byte(tmp_path):
    model = testing.tiny_model()
    path = tmp_path / "f"
    filled(model, "int8").save(path)
    answer = call("cache", "verify", path)
    assert answer.exit_code == 0, answer.output
    assert "as they were written" in answer.stdout
    data = bytearray(path.read_bytes())
    for at in (0, 100, len(data) // 3, len(data) // 2, len(data) - 1):
        data[at] ^= 4
        path.write_bytes(data)
        answer = call("cache", "verify", path)
        assert answer.exit_code == 1
        assert str(path) in answer.output
        assert answer.exception is None or isinstance(answer.exception, SystemExit)
        data[at] ^= 4


def test_files_that_are_no_caches(tmp_path):
    (tmp_path / "text").write_text("It is a truth universally acknowledged")
    for command in ("info", "verify"):
        for path, words in ((tmp_path / "text", "expected a safetensors file"), (tmp_path / "none", "No such file")):
            answer = call("cache", command, path)
            assert answer.exit_code == 1
            assert words in answer.output
            assert str(path) in answer.output


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_is_no_file_is_not_waited_for(tmp_path, command):
    """Opening a pipe that nobody writes to would never end."""
    os.mkfifo(tmp_path / "pipe")
    call("cache", command, tmp_path / "none")  # which loads what it needs
    descriptors = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        answer = call("cache", command, path)
        assert answer.exit_code == 1
        assert "expected a file" in answer.output
        assert str(path) in answer.output
    with pytest.raises(OSError, match="pipe"):
        LongCache.load(tmp_path / "pipe", testing.tiny_model())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # others', of earlier tests, may be gone since


def test_info_does_not_wait_for_transformers(run_python, tmp_path):
    model = testing.tiny_model()
    filled(model).save(tmp_path / "f")
    script = """
import os, sys
from typer.testing import CliRunner
from llama1m_ext.cli import app
for command in ("info", "verify"):
    answer = CliRunner().invoke(app, ["cache", command, os.environ["FILE"]])
    assert answer.exit_code == 0, answer.output
print("transformers" in sys.modules)
"""
    assert run_python(script, FILE=str(tmp_path / "f")).split() == ["False"]
