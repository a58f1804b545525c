"""A prefill that was ended at any moment goes on where it was, to the same bits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

import llama1m_ext
from llama1m_ext import _compat, testing

LAYERS = 8
CHUNK = 128


class Stop(Exception):
    pass


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def modules():
    """What the tests look into; transformers' Llama is there by now."""
    testing.tiny_config()
    import transformers.models.llama.modeling_llama  # noqa: F401

    from llama1m_ext import checkpoint, prefill

    return checkpoint, prefill


@pytest.fixture
def every_layer(modules, monkeypatch):
    monkeypatch.setattr(modules[0], "SHARE", math.inf)


@pytest.fixture
def model():
    made = testing.tiny_model(num_hidden_layers=LAYERS)
    llama1m_ext.set_options(made, chunk=CHUNK, kv="model")
    return made


def read(model, ids, cache=None, **more):
    """The logits of the last token; the attention calls that it took."""
    llama1m_ext.stats(model, reset=True)
    with torch.no_grad():
        out = model(ids, logits_to_keep=1, **{_compat.cache_name(): cache}, **more).logits
    return out, llama1m_ext.stats(model).served


@contextlib.contextmanager
def stopped(modules, after: int):
    """Prefills end with an exception when so many layers are done."""
    prefill = modules[1]
    original, seen = prefill._layer, []

    def layer(module, *args):
        if module not in seen:
            seen.append(module)
        if len(seen) > after:
            raise Stop
        original(module, *args)

    prefill._layer = layer
    try:
        with pytest.raises(Stop):
            yield
    finally:
        prefill._layer = original


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def assert_same(mine, theirs):
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert [page.size for page in a.pages] == [page.size for page in b.pages]
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize(
    ("kv", "past"), [("model", 0), ("model", 33), ("int8", 0), ("int8", 500), ("int8/int4", 33), ("fp8", 500)]
)
def test_the_result_is_that_of_an_uninterrupted_prefill(modules, every_layer, model, tmp_path, kv, past):
    ids = testing.random_ids(1, past + 700)
    llama1m_ext.set_options(model, kv=kv)
    want, mine = llama1m_ext.LongCache(), llama1m_ext.LongCache()
    for cache in (want, mine):
        if past:
            read(model, ids[:, :past], cache)
    logits, calls = read(model, ids[:, past:], want)

    llama1m_ext.set_options(model, checkpoint=tmp_path)
    for more in (3, 2):
        with stopped(modules, more):
            read(model, ids[:, past:], mine)
        assert mine.get_seq_length() == past
        assert files(tmp_path)
    again, fewer = read(model, ids[:, past:], mine)
    assert fewer == calls - 5 * math.ceil(700 / CHUNK)
    assert torch.equal(again, logits)
    assert_same(mine, want)
    assert not list(tmp_path.iterdir())
    for token in ids[0, :20]:
        a, b = (read(model, token.view(1, 1), cache)[0] for cache in (want, mine))
        assert torch.equal(a, b)
    assert_same(mine, want)


@pytest.mark.parametrize("how", ["embeddings", "no cache", "padding", "disk", "small pages", "all logits", "bfloat16"])
def test_other_prefills(modules, every_layer, model, tmp_path, how):
    ids, more = testing.random_ids(2, 700), {}
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
    if how == "embeddings":
        more["inputs_embeds"] = model.model.embed_tokens(ids).detach()
    if how == "no cache":
        more["use_cache"] = False
    if how == "padding":
        more["attention_mask"] = torch.ones_like(ids)
        more["attention_mask"][0, :123] = 0
    if how == "disk":
        llama1m_ext.set_options(model, offload="disk", kv_memory=400_000, offload_dir=str(tmp_path))
    if how == "small pages":
        llama1m_ext.set_options(model, page_size=64, kv="int8")
    folder = tmp_path / "checkpoints"

    def run():
        cache = None if how == "no cache" else llama1m_ext.LongCache()
        llama1m_ext.stats(model, reset=True)
        with torch.no_grad():
            given = (None,) if how == "embeddings" else (ids,)
            keep = 0 if how == "all logits" else 2
            out = model(*given, past_key_values=cache, logits_to_keep=keep, **more).logits
        return out, cache, llama1m_ext.stats(model).served

    want, cache, calls = run()
    llama1m_ext.set_options(model, checkpoint=folder)
    with stopped(modules, 4):
        run()
    again, mine, fewer = run()
    assert fewer == calls - 4 * math.ceil(700 / CHUNK)
    assert torch.equal(again, want)
    if mine is not None:
        assert_same(mine, cache)


CHANGES = ["ids", "longer", "weights", "dtype", "theta", "kv", "chunk", "page_size", "padding", "past", "positions"]


@pytest.mark.parametrize("what", CHANGES)
def test_another_prefill_does_not_go_on_from_it(modules, every_layer, model, tmp_path, what):
    past, ids = testing.random_ids(1, 100, seed=1), testing.random_ids(1, 600)
    more = {}

    def run(folder):
        llama1m_ext.set_options(model, checkpoint=None)
        cache = llama1m_ext.LongCache()
        read(model, past, cache)
        llama1m_ext.set_options(model, checkpoint=folder)
        return read(model, ids, cache, **more)

    with stopped(modules, 5):
        run(tmp_path)
    assert files(tmp_path)
    if what == "ids":
        ids = ids.clone()
        ids[0, 300] += 1
    elif what == "longer":
        ids = torch.cat([ids, ids[:, :1]], 1)
    elif what == "weights":
        with torch.no_grad():
            model.model.layers[7].mlp.up_proj.weight[3, 5] += 0.5
    elif what == "dtype":
        model = model.to(torch.bfloat16)
    elif what == "theta":
        other = testing.tiny_model(num_hidden_layers=LAYERS, rope_theta=10_000.0)
        other.load_state_dict(model.state_dict())
        llama1m_ext.set_options(other, chunk=CHUNK, kv="model")
        model = other
    elif what == "padding":
        more["attention_mask"] = torch.ones(1, 700, dtype=torch.long)
        more["attention_mask"][0, :3] = 0
    elif what == "past":
        past = past.clone()
        past[0, 7] += 1
    elif what == "positions":
        more["position_ids"] = torch.arange(200, 800)[None]
    else:
        llama1m_ext.set_options(model, **{what: {"kv": "int8", "chunk": 100, "page_size": 128}[what]})
    want, calls = run(None)
    again, mine = run(tmp_path)
    assert torch.equal(again, want)
    assert mine == calls, "it went on from a checkpoint that is not its own"
    assert files(tmp_path), "the checkpoint of the first one is gone"


def test_going_on_keeps_the_chunk_that_auto_gave(modules, every_layer, model, tmp_path, monkeypatch):
    ids = testing.random_ids(1, 700)
    llama1m_ext.set_options(model, chunk="auto", checkpoint=tmp_path)
    monkeypatch.setattr(modules[1], "chunk_len", lambda *args: 100)
    want, calls = read(model, ids)
    with stopped(modules, 4):
        read(model, ids)
    monkeypatch.setattr(modules[1], "chunk_len", lambda *args: 300)
    again, mine = read(model, ids)
    assert torch.equal(again, want)
    assert mine == calls - 4 * 7


def test_other_threads_go_on_with_a_warning(modules, every_layer, model, tmp_path, monkeypatch):
    ids = testing.random_ids(1, 700)
    want, _ = read(model, ids)
    llama1m_ext.set_options(model, checkpoint=tmp_path)
    with stopped(modules, 4):
        read(model, ids)
    here = {**modules[0]._environment(), "threads": 77}
    monkeypatch.setattr(modules[0], "_environment", lambda: here)
    with pytest.warns(UserWarning, match="'threads': 77.*last bits may differ"):
        again, calls = read(model, ids)
    assert calls < 4 * 6
    torch.testing.assert_close(again, want)


# -- damage ------------------------------------------------------------------------------------------------------------


def damages(folder, count, seed=0):
    """Ways to damage the files of a folder, each a function of the folder."""
    draw = random.Random(seed)
    names = [path.relative_to(folder) for path in files(folder)]

    def flip(name, at, bit):
        def damage(folder):
            data = bytearray((folder / name).read_bytes())
            data[at] ^= 1 << bit
            (folder / name).write_bytes(data)

        return damage

    def cut(name, size):
        return lambda folder: os.truncate(folder / name, size)

    def lose(name):
        return lambda folder: (folder / name).unlink()

    for name in names:
        yield f"without {name.name}", lose(name)
        yield f"{name.name} empty", cut(name, 0)
    for i in range(count):
        name = draw.choice(names)
        size = (folder / name).stat().st_size
        at = draw.randrange(min(size, 3000) if i % 2 else size)
        yield f"{name.name}: bit of byte {at}", flip(name, at, draw.randrange(8))
        yield f"{name.name} cut at {at}", cut(name, at)


@pytest.mark.parametrize("kv", ["model", "int4"])
def test_a_damaged_checkpoint_costs_a_warning_and_nothing_else(modules, every_layer, tmp_path, kv):
    model = testing.tiny_model(num_hidden_layers=3)
    llama1m_ext.set_options(model, chunk=CHUNK, kv=kv)
    ids = testing.random_ids(1, 200)
    want, calls = read(model, ids)
    llama1m_ext.set_options(model, checkpoint=tmp_path / "good")
    with stopped(modules, 2):
        read(model, ids)
    ways = list(damages(tmp_path / "good", 25))
    warned = 0
    for i, (what, damage) in enumerate(ways):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "good", folder)
        damage(folder)
        llama1m_ext.set_options(model, checkpoint=folder)
        cache = llama1m_ext.LongCache()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            again, mine = read(model, ids, cache)
        assert torch.equal(again, want), what
        assert cache.get_seq_length() == 200
        assert not any(folder.iterdir()), what
        begun = mine == calls
        warned += bool(seen)
        # Without a state there is nothing to go on from, and nothing to warn of.
        assert len(seen) == (begun and what != "without state.safetensors"), what
        assert all("starts from the beginning" in str(w.message) for w in seen)
    assert warned >= 0.9 * len(ways) - 3


def rewritten(path, change):
    """Writes a file anew with checksums that fit, after `change(body, tensors)` has changed what is in it."""
    import safetensors.torch

    from llama1m_ext import checkpoint, tensorfile

    metadata, spans = tensorfile.read(path)
    body = tensorfile.description(metadata, checkpoint._META, str(path))
    loaded = safetensors.torch.load_file(path)
    tensors = {name: loaded[name].clone() for name in spans}
    change(body, tensors)
    entries = [(name, t.dtype, tuple(t.shape), tensorfile.rows(t)) for name, t in tensors.items()]
    tensorfile.write(path, entries, tensorfile.described(checkpoint._META, body))


def of_body(**changes):
    return lambda body, tensors: body.update({k: f(body[k]) if callable(f) else f for k, f in changes.items()})


def without(name):
    return lambda body, tensors: body.pop(name)


def of_tensors(change, only=""):
    def forge(body, tensors):
        for name in tensors:
            if name.endswith(only):
                tensors[name] = change(tensors[name])

    return forge


def also(name, tensor):
    return lambda body, tensors: tensors.update({name: tensor})


def all_of(*forges):
    return lambda body, tensors: [forge(body, tensors) for forge in forges]


FORGED = {
    "no rooms": of_body(rooms=[]),
    "rooms of words": of_body(rooms=lambda rooms: ["1"] * len(rooms)),
    "rooms that are no list": of_body(rooms=7),
    "endless rooms": of_body(rooms=lambda rooms: [2**50] * len(rooms)),
    "twice the room": of_body(rooms=lambda rooms: [*rooms[:-1], 4 * rooms[-1]]),
    "less room than tokens": of_body(rooms=lambda rooms: [*rooms[:-1], 1]),
    "room in the middle": of_body(rooms=lambda rooms: [rooms[0] + 64, *rooms[1:]]),
    "negative sizes": of_body(sizes=lambda sizes: [-1, *sizes[1:]]),
    "sizes that are no numbers": of_body(sizes=lambda sizes: [True] * len(sizes)),
    "other sizes": of_body(sizes=lambda sizes: [sizes[0] + 1, *sizes[1:]]),
    "no sizes": without("sizes"),
    "kept pages that are not there": of_body(kept=3),
    "kept is negative": of_body(kept=-1),
    "kept is no number": of_body(kept=None),
    "another layer": of_body(layer=1),
    "a negative kind": of_body(kind=lambda kind: [-n for n in kind]),
    "another kind": of_body(kind=lambda kind: [2 * kind[0], *kind[1:]]),
    "a kind with words": of_body(kind=["a", "b", "c", "d"]),
    "half a kind": of_body(kind=lambda kind: kind[:2]),
    "another dtype": of_body(dtypes=["float16", "float16"]),
    "no dtypes": of_body(dtypes=[]),
    "tensors of another dtype": of_tensors(lambda t: t.double() if t.dtype == torch.float32 else t.float()),
    "all of another dtype": all_of(
        of_body(dtypes=["float16", "float16"]), of_tensors(lambda t: t.half() if t.dtype == torch.float32 else t)
    ),
    "one head, which torch would spread": of_tensors(lambda t: t[:, :1].contiguous()),
    "one channel": of_tensors(lambda t: t[..., :1].contiguous()),
    "fewer tokens": of_tensors(lambda t: t[:, :, :1].contiguous()),
    "fewer axes": of_tensors(lambda t: t[0]),
    "keys alone": lambda body, tensors: [tensors.pop(name) for name in list(tensors) if ".v" in name],
    "no tensors": lambda body, tensors: tensors.clear(),
    "a tensor more": also("77.k", torch.zeros(2)),
    "a tensor without a page": also("k", torch.zeros(2)),
}
OF_STATE = {
    "no environment": without("environment"),
    "an environment of words": of_body(environment="here"),
    "no run": without("run"),
    "a run that is a number": of_body(run=3),
    "no chunk": without("chunk"),
    "chunks without end": of_body(chunk=2**60),
    "all layers done": of_body(done=3),
    "no layer done": of_body(done=0),
    "done is True": of_body(done=True),
    "other states": of_tensors(lambda t: t[:, :1].contiguous()),
    "states of another dtype": of_tensors(lambda t: t.double()),
    "no states": lambda body, tensors: tensors.clear(),
}


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_a_forged_checkpoint_is_refused_once(modules, every_layer, tmp_path, kv):
    """Its checksums fit, its words do not: the answer is that of a prefill from the beginning, and nothing is left of it."""
    model = testing.tiny_model(num_hidden_layers=3)
    llama1m_ext.set_options(model, chunk="auto", min_layer_major_len=2, kv=kv)
    ids = testing.random_ids(1, 500)
    want, calls = read(model, ids)
    plain = llama1m_ext.LongCache()
    read(model, ids, plain)
    llama1m_ext.set_options(model, checkpoint=tmp_path / "good")
    with stopped(modules, 2):
        read(model, ids)
    cases = [("layer-00000.safetensors", *case) for case in FORGED.items()]
    cases += [("state.safetensors", *case) for case in OF_STATE.items()]
    cases.append(("layer-00001.safetensors", "nothing", of_body()))
    for i, (file, what, forge) in enumerate(cases):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "good", folder)
        (path,) = folder.rglob(file)
        rewritten(path, forge)
        llama1m_ext.set_options(model, checkpoint=folder)
        cache = llama1m_ext.LongCache()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            again, mine = read(model, ids, cache)
        good = what == "nothing"
        if kv == "model" and what == "room in the middle":
            good = len(plain.layers[0].pages) == 1  # there is none: it is the last one's
        assert torch.equal(again, want), what
        assert (mine < calls) == good, what
        assert ["starts from the beginning" in str(w.message) for w in seen] == ([] if good else [True]), what
        assert not any(folder.iterdir()), what
        if not good:
            assert_same(cache, plain)


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_can_not_be_made(modules, every_layer, model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    ids = testing.random_ids(1, 700)
    want, _ = read(model, ids)
    llama1m_ext.set_options(model, checkpoint=tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="no checkpoints of this prefill: .*file") as seen:
        again, _ = read(model, ids)
    assert len(seen) == 1
    assert torch.equal(again, want)


FULL = """
import math, os, resource, subprocess, sys, warnings
import torch
torch.set_num_threads(1)
import llama1m_ext
from llama1m_ext import testing
model = testing.tiny_model(num_hidden_layers=8)
from llama1m_ext import checkpoint, prefill
checkpoint.SHARE = math.inf
llama1m_ext.set_options(model, chunk=128, kv="model")
ids = testing.random_ids(1, 700)
folder, mounted = sys.argv[1], False
def read(**more):
    llama1m_ext.stats(model, reset=True)
    with torch.no_grad():
        out = model(ids, logits_to_keep=1, **more).logits
    return out, llama1m_ext.stats(model).served
want, calls = read()
# A layer's K and V: 700 * 2 * 2 * 16 * 4 = 179,200 bytes, and as much for the hidden states, twice while they are replaced.
if os.geteuid() == 0:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder], stderr=2).returncode == 0
if not mounted:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    llama1m_ext.set_options(model, checkpoint=folder)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again, _ = read()
    assert torch.equal(again, want)
    assert len(seen) == 1, [str(w.message) for w in seen]
    assert "no more checkpoints of this prefill" in str(seen[0].message), seen[0].message
    assert not os.listdir(folder), os.listdir(folder)
    # What was written before the disk was full is good.
    original, runs = prefill._layer, []
    def layer(module, *args):
        if module is model.model.layers[7]:
            raise KeyboardInterrupt
        original(module, *args)
    prefill._layer = layer
    cache = llama1m_ext.LongCache()
    try:
        read(past_key_values=cache)
    except KeyboardInterrupt:
        pass
    assert cache.get_seq_length() == 0
    prefill._layer = original
    again, fewer = read(past_key_values=cache)
    assert torch.equal(again, want)
    assert not mounted or fewer <= calls - 2 * 6, (fewer, calls)
    print("mounted" if mounted else "limited")
finally:
    if mounted:
        subprocess.run(["umount", folder], check=True)
"""


def test_a_full_disk(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, encoding="utf-8", timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split()[-1] in ("mounted", "limited")


def test_two_processes_at_the_same_prefill(modules, every_layer, model, tmp_path):
    ids = testing.random_ids(1, 700)
    want, calls = read(model, ids)
    llama1m_ext.set_options(model, checkpoint=tmp_path)
    with stopped(modules, 3):
        read(model, ids)
    (folder,) = tmp_path.iterdir()
    lock = modules[0]._locked(folder / "lock")  # flock is of the open file: another one in this process counts
    try:
        before = {path: path.read_bytes() for path in files(folder)}
        with pytest.warns(UserWarning, match="another process is at the same prefill"):
            again, mine = read(model, ids)
        assert torch.equal(again, want)
        assert mine == calls
        assert {path: path.read_bytes() for path in files(folder)} == before
    finally:
        os.close(lock)
    assert read(model, ids)[1] == calls - 3 * 6


# -- how often -----------------------------------------------------------------------------------------------------------


def test_a_short_prefill_writes_nothing(modules, model, tmp_path):
    llama1m_ext.set_options(model, checkpoint=tmp_path)
    with stopped(modules, 4):
        read(model, testing.random_ids(1, 400))
    assert not files(tmp_path)


def test_writing_takes_a_small_share_of_the_time(modules, model, tmp_path, monkeypatch):
    checkpoint, prefill = modules
    now, written, at_writing = [0.0], [], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    layer, write = prefill._layer, checkpoint.tensorfile.write

    def slow_layer(*args):
        now[0] += 10 / 6
        layer(*args)

    def slow_write(path, tensors, metadata):
        tensors = list(tensors)
        now[0] += 0.3
        at_writing.append(0.3)
        written.append(os.path.basename(path))
        write(path, tensors, metadata)

    monkeypatch.setattr(prefill, "_layer", slow_layer)
    monkeypatch.setattr(checkpoint.tensorfile, "write", slow_write)
    model = testing.tiny_model(num_hidden_layers=30)
    llama1m_ext.set_options(model, chunk=CHUNK, kv="model", checkpoint=tmp_path)
    read(model, testing.random_ids(1, 700))
    layers = [name for name in written if name.startswith("layer")]
    assert layers == sorted(layers), "each layer once, in order"
    states = written.count("state.safetensors")
    assert 3 <= states <= 15
    assert len(layers) >= 20
    assert sum(at_writing) <= 0.06 * now[0]


# -- kills ---------------------------------------------------------------------------------------------------------------

# A process that is prepared once, and forks for each run: importing torch takes longer than the whole prefill. With one
# thread, because libgomp does not survive a fork.
KILLS = """
import json, math, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import llama1m_ext
from llama1m_ext import testing
folder, name, kills, past = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = testing.tiny_model(num_hidden_layers=24)
from llama1m_ext import checkpoint
checkpoint.SHARE = math.inf
llama1m_ext.set_options(model, chunk=128, kv="int8")
ids = testing.random_ids(1, past + 500)
cache = llama1m_ext.LongCache()

def run(path, options):
    llama1m_ext.set_options(model, **options)
    llama1m_ext.stats(model, reset=True)
    with torch.no_grad():
        logits = model(ids[:, past:], past_key_values=cache, logits_to_keep=1).logits
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes now is the test's
    found = {"logits": logits}
    for i, layer in enumerate(cache.layers):
        for j, (page, room) in enumerate(layer.parts()):
            for tensor_name, tensor in page.tensors().items():
                found[f"{i} {j} {room} {tensor_name}"] = tensor.contiguous()
    torch.save((llama1m_ext.stats(model).served, found), path)

def child(path, options):
    # Not in the middle of the fork: at-fork handlers that a Ctrl-C cuts short leave Python itself with broken locks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return pid
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.alarm(60)  # a child that hangs is a failure, not a wait
        run(path, options)
    except KeyboardInterrupt:
        lengths = {layer.length for layer in cache.layers}
        # Once the model has returned, the cache is what it should be, and the Ctrl-C is the caller's.
        whole = lengths == {past + 500} and not os.listdir(options["checkpoint"])
        if not (whole or lengths <= {past}):
            print("layers of", lengths, "tokens", file=sys.stderr)
        os._exit(3 if whole or lengths <= {past} else 4)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

if past:
    with torch.no_grad():
        model(ids[:, :past], past_key_values=cache)
plain, mine = folder + "/plain.pt", folder + "/mine.pt"
os.waitpid(child(plain, {}), 0)
options = {"checkpoint": folder + "/checkpoints"}
began = time.perf_counter()
assert os.waitpid(child(mine, options), 0)[1] == 0
whole = time.perf_counter() - began
draw, number = random.Random(past), getattr(signal, name)
done, spared, rounds = 0, 0, 0
all_calls, want = torch.load(plain)
while done < kills or not rounds:
    pid = child(mine, options)
    time.sleep(draw.uniform(0, 0.5 * whole))
    os.kill(pid, number)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == number
        done += 1
    elif os.WEXITSTATUS(status) == 3:
        done += 1
    else:
        assert os.WEXITSTATUS(status) == 0, os.WEXITSTATUS(status)
        calls, found = torch.load(mine)
        rounds, spared = rounds + 1, spared + all_calls - calls
        assert found.keys() == want.keys()
        for key in want:
            assert torch.equal(found[key], want[key]), key
print(json.dumps({"kills": done, "rounds": rounds, "spared": spared, "whole": whole}))
"""


@pytest.mark.parametrize(("name", "past", "kills"), [("SIGKILL", 0, 50), ("SIGINT", 70, 20)])
def test_kills_at_random_moments(tmp_path, name, past, kills):
    command = [sys.executable, "-c", KILLS, str(tmp_path), name, str(kills), str(past)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240, env=environment)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["kills"] >= kills
    assert found["rounds"] >= 1
    assert found["spared"] > 0, "no run went on from a checkpoint"
    # We have nothing to warn of. A Ctrl-C that lands in a finalizer is printed by Python as ignored, and the run goes on.
    assert "llama1m_ext:" not in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr or "Exception ignored" in answer.stderr, answer.stderr
