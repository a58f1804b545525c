"""A book is read once, whatever is asked about it: prompts kept in a folder, and the beginnings that new ones share."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings

import pytest
import torch

import llama1m_ext
from conftest import stock
from llama1m_ext import testing
from llama1m_ext.remember import SUFFIX

CHUNK = 128

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes):
    model = testing.tiny_model(num_hidden_layers=3, **changes)
    # The questions too go through the layers in chunks: the same ones as in a whole prompt, where it ends with a chunk.
    llama1m_ext.set_options(model, chunk=CHUNK, kv="model", min_layer_major_len=2)
    return model


@pytest.fixture
def model():
    return tiny()


def read(model, ids, **more):
    """The logits of the last token, and what was counted."""
    llama1m_ext.stats(model, reset=True)
    with torch.no_grad():
        out = model(ids, logits_to_keep=1, **more)
    return out, llama1m_ext.stats(model)


def prompts(length, count, start=0, shared=0):
    """A book of so many tokens, and questions about it whose first tokens all differ, after `shared` that don't."""
    book = torch.cat([testing.random_ids(1, length), testing.random_ids(1, shared, seed=99)], 1)
    found = []
    for i in range(start, start + count):
        question = testing.random_ids(1, 10 + 3 * i, seed=i + 1)
        question[0, 0] = i
        found.append(torch.cat([book, question], 1))
    return found


def kept(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX))


# -- what it is for ------------------------------------------------------------------------------------------------------


def test_ten_questions_in_the_pipeline_read_the_book_once(tmp_path):
    from transformers import pipeline

    path = testing.tiny_checkpoint(tmp_path / "model", num_hidden_layers=3)
    pipe = pipeline("text-generation", model=str(path), device_map="cpu")
    llama1m_ext.set_options(pipe, chunk=CHUNK, kv="model")
    book = "".join(random.Random(0).choices("abcdefghij klmnop. ", k=3000))
    asked = [
        f"{book}\n\nQuestion {i}: who is {name}?"
        for i, name in enumerate("Ada Bob Cy Di Ed Flo Gus Hal Ida Jo".split())
    ]
    asked = [[{"role": "user", "content": text}] for text in asked]

    def ask():
        found = []
        for chat in asked:
            llama1m_ext.stats(pipe, reset=True)
            (answer,) = pipe(chat, max_new_tokens=8, do_sample=False)
            found.append((answer["generated_text"][-1]["content"], llama1m_ext.stats(pipe)))
        return found

    plain = ask()
    assert all(stats.computed > 3000 and not stats.reused for _, stats in plain)
    llama1m_ext.remember(pipe, tmp_path / "kept")
    ours = ask()
    assert [answer for answer, _ in ours] == [answer for answer, _ in plain]
    assert ours[0][1].computed == plain[0][1].computed
    for (_, mine), (_, theirs) in zip(ours[1:], plain[1:], strict=True):
        assert mine.reused >= 3000
        assert mine.computed <= 120
        assert mine.reused + mine.computed == theirs.computed
        assert not mine.stock
    assert len(kept(tmp_path / "kept")) == 1


def test_the_same_chunks_give_the_same_bits(model, tmp_path):
    asked = prompts(5 * CHUNK, 3)
    plain = [read(model, ids)[0] for ids in asked]
    llama1m_ext.remember(model, tmp_path)
    for i, (ids, want) in enumerate(zip(asked, plain, strict=True)):
        got, stats = read(model, ids)
        assert stats.reused == (5 * CHUNK if i else 0)
        assert torch.equal(got.logits, want.logits)
        for mine, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)


def test_other_chunks_are_as_exact(model, tmp_path):
    asked = prompts(1000, 4)  # not a multiple of the chunk: the rounding is another one, and no worse
    plain = [read(model, ids)[0].logits for ids in asked]
    llama1m_ext.remember(model, tmp_path)
    ours = []
    for i, ids in enumerate(asked):
        got, stats = read(model, ids)
        assert stats.reused == (1000 if i else 0)
        ours.append(got.logits)
    exact = tiny().double()
    with stock(), torch.no_grad():
        truth = [exact(ids, logits_to_keep=1).logits for ids in asked]
    testing.assert_no_worse(torch.cat(ours), torch.cat(plain), torch.cat(truth), factor=1.5)


@pytest.mark.parametrize("kv", ["int8", "int4", "int8/int4"])
@pytest.mark.parametrize("length", [640, 700, 999])
def test_compact_formats(model, tmp_path, kv, length):
    """What is taken was rounded once, so the answer is as far from the exact one as an answer's later tokens are."""
    asked = prompts(length, 2)
    with torch.no_grad():
        exact = read(model, asked[1])[0].logits
        llama1m_ext.set_options(model, kv=kv)
        # The same tokens, read in two calls: the second one sees the first one's through the format.
        cache = llama1m_ext.LongCache()
        read(model, asked[1][:, :length], past_key_values=cache)
        theirs, _ = read(model, asked[1][:, length:], past_key_values=cache)
    llama1m_ext.remember(model, tmp_path)
    read(model, asked[0])
    ours, stats = read(model, asked[1])
    assert stats.reused == length
    # The tail was dense there, and is compact where the first question followed it.
    bound = 3 * testing.error(theirs.logits, exact) + 1e-5
    assert testing.error(ours.logits, exact) <= bound
    assert testing.error(ours.logits, theirs.logits) <= bound
    out = model.generate(asked[1], max_new_tokens=80, do_sample=False)
    assert out.shape[1] == asked[1].shape[1] + 80


def test_a_changed_token_ends_what_is_taken(model, tmp_path):
    llama1m_ext.remember(model, tmp_path)
    (ids,) = prompts(1000, 1)
    read(model, ids)
    for place in (255, 256, 500, 999):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 256
        got, stats = read(model, changed)
        assert stats.reused == (place if place >= 256 else 0)
        assert stats.computed == changed.shape[1] - stats.reused
        llama1m_ext.remember(model, None)
        torch.testing.assert_close(got.logits, read(model, changed)[0].logits, rtol=1e-4, atol=1e-4)
        llama1m_ext.remember(model, tmp_path)


def test_the_same_prompt_again_computes_its_last_token(model, tmp_path):
    llama1m_ext.remember(model, tmp_path)
    (ids,) = prompts(600, 1)
    want, _ = read(model, ids)
    got, stats = read(model, ids)
    assert (stats.reused, stats.computed) == (ids.shape[1] - 1, 1)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    _, stats = read(model, ids[:, :500])  # a prompt that is a beginning of it
    assert (stats.reused, stats.computed) == (499, 1)


def test_generating_on_leaves_what_is_kept_as_it_is(model, tmp_path):
    llama1m_ext.remember(model, tmp_path)
    asked = prompts(1000, 3)
    first = [model.generate(ids, max_new_tokens=40, do_sample=False) for ids in asked]
    again = [model.generate(ids, max_new_tokens=40, do_sample=False) for ids in asked]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_a_talk_that_grows_has_one_file(model, tmp_path):
    llama1m_ext.remember(model, tmp_path)
    talk = testing.random_ids(1, 300)
    for turn in range(6):
        _, stats = read(model, talk)
        assert stats.computed <= 300
        assert stats.reused == (talk.shape[1] - 300 if turn else 0)
        assert len(kept(tmp_path)) == 1
        talk = torch.cat([talk, testing.random_ids(1, 300, seed=turn + 1)], 1)


def test_the_longest_of_several_is_taken(model, tmp_path):
    llama1m_ext.remember(model, tmp_path)
    ids = testing.random_ids(1, 2000)
    for length in (400, 900, 600):
        other = ids[:, : length + 300].clone()
        other[0, length:] = testing.random_ids(1, 300, seed=length)
        other[0, length] = (ids[0, length] + 1) % 256
        read(model, other)
    assert len(kept(tmp_path)) >= 2
    assert read(model, ids)[1].reused == 900


# -- what is never mixed up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weights", "one bit in place", "a row", "theta", "dtype", "kv", "layers"])
def test_another_model_never_takes_it(model, tmp_path, what):
    many = {"vocab_size": 20_000} if what == "a row" else {}
    model = tiny(**many) if many else model
    llama1m_ext.remember(model, tmp_path)
    (ids,) = prompts(600, 1)
    read(model, ids)
    assert read(model, ids)[1].reused
    if what == "weights":
        other = tiny(seed=1)
    elif what == "a row":
        other = tiny(**many)  # a row of a large matrix, that a sample of it would miss
        with torch.no_grad():
            other.model.embed_tokens.weight[12_345] += 1
    elif what == "one bit in place":
        other = model  # the same object, changed in place
        with torch.no_grad():
            weight = other.model.layers[1].mlp.down_proj.weight
            weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    elif what == "theta":
        other = tiny(rope_theta=10_000.0)
    elif what == "dtype":
        other = tiny(dtype=torch.bfloat16)
    elif what == "kv":
        other = model
        llama1m_ext.set_options(other, kv="int8")
    else:
        other = testing.tiny_model(num_hidden_layers=2)
        llama1m_ext.set_options(other, chunk=CHUNK, kv="model")
    llama1m_ext.remember(other, None)
    want, _ = read(other, ids)
    llama1m_ext.remember(other, tmp_path)
    got, stats = read(other, ids)
    assert stats.reused == 0
    assert torch.equal(got.logits, want.logits)
    assert read(other, ids)[1].reused, "its own it does take"


class Adapter(torch.nn.Module):
    """What PEFT puts in the place of a projection; plain attributes say whether it does anything, and how much."""

    def __init__(self, base):
        super().__init__()
        self.base, self.enabled, self.scaling = base, True, {"default": 0.5}
        self.a = torch.nn.Linear(base.in_features, 4, bias=False)
        self.b = torch.nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        out = self.base(x)
        return out + self.scaling["default"] * self.b(self.a(x)) if self.enabled else out


def test_an_adapter_that_is_switched_off_and_on(model, tmp_path):
    torch.manual_seed(0)
    adapters = []
    for layer in model.model.layers:
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
        adapters.append(layer.self_attn.v_proj)
    (ids,) = prompts(600, 1)

    def ways():
        for enabled, scaling in ((True, 0.5), (False, 0.5), (True, 0.25)):
            for adapter in adapters:
                adapter.enabled, adapter.scaling = enabled, {"default": scaling}
            yield read(model, ids)

    plain = [got.logits for got, _ in ways()]
    assert (plain[0] - plain[1]).abs().max() > 1e-2 < (plain[0] - plain[2]).abs().max()
    llama1m_ext.remember(model, tmp_path)
    for again in range(2):
        for (got, stats), want in zip(ways(), plain, strict=True):
            torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-4)
            assert bool(stats.reused) == bool(again)


@pytest.mark.parametrize(
    "what",
    [
        "two rows",
        "padding",
        "embeddings",
        "positions",
        "a hook",
        "hidden states",
        "a filled cache",
        "all logits",
        "short",
    ],
)
def test_calls_that_are_served_as_before(model, tmp_path, what):
    (ids,) = prompts(600, 1)
    llama1m_ext.remember(model, tmp_path)
    read(model, ids)
    more = {}
    if what == "two rows":
        ids = ids.expand(2, -1)
    elif what == "padding":
        more["attention_mask"] = torch.ones_like(ids)
        more["attention_mask"][0, :5] = 0
    elif what == "embeddings":
        more["inputs_embeds"] = model.model.embed_tokens(ids).detach()
        ids = None
    elif what == "positions":
        more["position_ids"] = torch.arange(5, 5 + ids.shape[1])[None]
    elif what == "a hook":
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    elif what == "hidden states":
        more["output_hidden_states"] = True
    elif what == "short":
        ids = ids[:, :200]

    def run():
        cache = None
        if what == "a filled cache":
            cache = llama1m_ext.LongCache()
            read(model, testing.random_ids(1, 50, seed=7), past_key_values=cache)
        llama1m_ext.stats(model, reset=True)
        keep = {} if what == "all logits" else {"logits_to_keep": 1}
        with torch.no_grad():
            return model(ids, past_key_values=cache, **keep, **more).logits

    got = run()
    assert llama1m_ext.stats(model).reused == 0
    assert len(kept(tmp_path)) == 1
    llama1m_ext.remember(model, None)
    assert torch.equal(got, run())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length(tmp_path, kind):
    scaling = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
    model = tiny(rope_scaling=scaling, max_position_embeddings=128 if kind == "dynamic" else 4096)
    (ids,) = prompts(600, 1)
    llama1m_ext.remember(model, tmp_path)
    for _ in range(2):
        assert read(model, ids)[1].reused == 0
    assert not os.path.exists(tmp_path) or not kept(tmp_path)


# -- other processes, other disks ------------------------------------------------------------------------------------------

OTHER = """
import sys, json, torch, llama1m_ext
from llama1m_ext import testing
from llama1m_ext.remember import SUFFIX
torch.set_num_threads(1)
model = testing.tiny_model(num_hidden_layers=3)
llama1m_ext.set_options(model, chunk=128, kv="model", min_layer_major_len=2)
llama1m_ext.remember(model, sys.argv[1])
ids = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model(ids, logits_to_keep=1).logits
torch.save(logits, sys.argv[3])
print(json.dumps(llama1m_ext.stats(model).reused))
"""


def test_another_process_goes_on_from_it(model, tmp_path):
    asked = prompts(5 * CHUNK, 2)
    want, _ = read(model, asked[1])
    llama1m_ext.remember(model, tmp_path / "kept")
    read(model, asked[0])
    torch.save(asked[1], tmp_path / "ids.pt")
    words = [str(tmp_path / name) for name in ("kept", "ids.pt", "logits.pt")]
    answer = subprocess.run([sys.executable, "-c", OTHER, *words], capture_output=True, encoding="utf-8", timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == 5 * CHUNK
    assert torch.equal(torch.load(tmp_path / "logits.pt"), want.logits)


MANY = """
import os, random, sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("error")
import llama1m_ext
from llama1m_ext import testing
from llama1m_ext.remember import SUFFIX
model = testing.tiny_model(num_hidden_layers=2)
llama1m_ext.set_options(model, chunk=128, kv="model")
books = [testing.random_ids(1, 400, seed=i) for i in range(6)]
def read(book, question):
    ids = torch.cat([books[book], testing.random_ids(1, 20, seed=100 + question)], 1)
    with torch.no_grad():
        return model(ids, logits_to_keep=1).logits
want = {(b, q): read(b, q) for b in range(6) for q in range(4)}
children = []
for seed in range(4):
    pid = os.fork()
    if not pid:
        try:
            draw = random.Random(seed)
            # Room for about three of the six books: they are removed under each other's feet.
            llama1m_ext.remember(model, sys.argv[1], limit=3 * 2 * 420 * 2 * 2 * 16 * 4)
            for _ in range(40):
                book, question = draw.randrange(6), draw.randrange(4)
                torch.testing.assert_close(read(book, question), want[book, question], rtol=1e-4, atol=1e-4)
            os._exit(0 if llama1m_ext.stats(model).reused else 3)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
assert codes == [0] * 4, codes
size = sum(entry.stat().st_size for entry in os.scandir(sys.argv[1]))
assert size < 6 * 2 * 420 * 2 * 2 * 16 * 4, size
"""


def test_processes_share_a_folder(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180, env=environment)
    assert answer.returncode == 0, answer.stderr


def test_a_damaged_file_costs_a_warning_and_nothing_else(model, tmp_path):
    asked = prompts(5 * CHUNK, 2)
    want, _ = read(model, asked[1])
    draw = random.Random(0)
    warned = 0
    for i in range(24):
        folder = tmp_path / str(i)
        llama1m_ext.remember(model, folder)
        read(model, asked[0])
        (name,) = kept(folder)
        data = bytearray((folder / name).read_bytes())
        at = draw.randrange(len(data)) if i % 2 else draw.randrange(4000)
        if i % 4 == 3:
            del data[at:]
        else:
            data[at] ^= 1 << draw.randrange(8)
        (folder / "new").write_bytes(data)
        os.replace(folder / "new", folder / name)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            got, stats = read(model, asked[1])
        assert torch.equal(got.logits, want.logits), at
        assert bool(seen) == (stats.reused == 0), at
        assert all("remembered prompt can't be used" in str(w.message) for w in seen)
        warned += bool(seen)
        if seen:
            # The prompt is kept again, and the damaged file is in nobody's way.
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert read(model, asked[1])[1].reused == asked[1].shape[1] - 1
    assert warned >= 20


def test_room_is_made_by_removing_what_was_not_used(model, tmp_path):
    books = [testing.random_ids(1, 400, seed=i) for i in range(4)]
    each = 400 * 3 * 2 * 2 * 16 * 4
    llama1m_ext.remember(model, tmp_path, limit=3 * each + each // 2)
    for book in books[:3]:
        read(model, book)
    assert len(kept(tmp_path)) == 3
    assert read(model, books[0])[1].reused  # used: the oldest is the second one now
    read(model, books[3])
    assert len(kept(tmp_path)) == 3
    llama1m_ext.set_options(model, remember_bytes=10 * each)
    found = [bool(read(model, book)[1].reused) for book in (books[0], books[2], books[3], books[1])]
    assert found == [True, True, True, False]
    llama1m_ext.remember(model, tmp_path, limit=1000)
    with pytest.warns(UserWarning, match="not remembered: .*remember_bytes"):
        read(model, testing.random_ids(1, 400, seed=9))
    assert len(kept(tmp_path)) == 4


FULL = """
import resource, sys, warnings, torch, llama1m_ext
from llama1m_ext import testing
from llama1m_ext.remember import SUFFIX
torch.set_num_threads(1)
model = testing.tiny_model(num_hidden_layers=3)
llama1m_ext.set_options(model, chunk=128, kv="model")
ids = testing.random_ids(1, 700)
def read():
    with torch.no_grad():
        return model(ids, logits_to_keep=1).logits
want = read()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
llama1m_ext.remember(model, sys.argv[1])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert torch.equal(read(), want)
assert len(seen) == 1, [str(w.message) for w in seen]
assert "this prompt is not remembered" in str(seen[0].message)
"""


def test_a_full_disk(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, encoding="utf-8", timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    assert not os.listdir(tmp_path)


def test_a_folder_that_can_not_be_made(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    llama1m_ext.remember(model, tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="not remembered: .*file"):
        read(model, testing.random_ids(1, 400))


def test_weights_that_can_not_be_read(model, tmp_path, monkeypatch):
    from llama1m_ext import checkpoint, shelf

    def refuse(*args):
        raise ValueError("expected weights in memory")

    monkeypatch.setattr(shelf, "fingerprint_of", refuse)
    monkeypatch.setattr(checkpoint, "fingerprint", refuse)
    ids = testing.random_ids(1, 400)
    want, _ = read(model, ids)
    llama1m_ext.remember(model, tmp_path)
    with pytest.warns(UserWarning, match="prompts are not remembered: expected weights"):
        assert torch.equal(read(model, ids)[0].logits, want.logits)
    llama1m_ext.remember(model, None)
    llama1m_ext.set_options(model, checkpoint=tmp_path)
    with pytest.warns(UserWarning, match="no checkpoints of this prefill: expected weights"):
        assert torch.equal(read(model, ids)[0].logits, want.logits)


def test_a_call_that_fails_leaves_the_cache_empty(model, tmp_path):
    llama1m_ext.remember(model, tmp_path)
    asked = prompts(600, 2)
    read(model, asked[0])
    cache = llama1m_ext.LongCache()

    def stop(*args):
        raise KeyboardInterrupt

    norm = model.model.norm.forward
    model.model.norm.forward = stop
    try:
        # A module with a forward of its own is a reason not to take anything, so go past that check.
        from llama1m_ext import shelf

        watched, shelf.watched = shelf.watched, lambda call: False
        with pytest.raises(KeyboardInterrupt):
            read(model, asked[1], past_key_values=cache)
    finally:
        shelf.watched = watched
        model.model.norm.forward = norm
        del model.model.norm.__dict__["forward"]
    assert cache.get_seq_length() == 0
    _, stats = read(model, asked[1], past_key_values=cache)
    assert stats.reused == 600
    assert torch.equal(cache.tokens, asked[1])


# -- the words -----------------------------------------------------------------------------------------------------------


def test_forget(model, tmp_path):
    (tmp_path / "mine.txt").write_text("of the user's")
    (tmp_path / "mine.safetensors").write_text("of the user's")
    llama1m_ext.remember(model, tmp_path)
    (ids,) = prompts(600, 1)
    read(model, ids)
    assert llama1m_ext.forget(model) == 1
    assert read(model, ids)[1].reused == 0
    assert llama1m_ext.forget(str(tmp_path)) == 1
    assert llama1m_ext.forget(tmp_path) == 0
    assert sorted(os.listdir(tmp_path)) == ["mine.safetensors", "mine.txt"]
    llama1m_ext.remember(model, None)
    assert llama1m_ext.options(model).remember is None
    read(model, ids)
    assert not kept(tmp_path)
    assert llama1m_ext.forget(model) == 0
    with pytest.raises(TypeError, match="model: expected a Llama"):
        llama1m_ext.forget(17)


def test_words_that_make_no_sense(model, tmp_path):
    with pytest.raises(TypeError, match="remember: expected a path or None, got 5"):
        llama1m_ext.remember(model, 5)
    with pytest.raises(ValueError, match="remember_bytes: expected"):
        llama1m_ext.remember(model, tmp_path, limit="many")
    with pytest.raises(TypeError, match="model: expected a Llama"):
        llama1m_ext.remember(object(), tmp_path)


def test_a_cache_of_one_s_own_from_question_to_question(model):
    asked = prompts(1000, 4)
    plain = [model.generate(ids, max_new_tokens=6, do_sample=False) for ids in asked]
    cache = llama1m_ext.LongCache()
    read(model, asked[0][:, :1000], past_key_values=cache)
    assert torch.equal(cache.tokens, asked[0][:, :1000])
    for ids, want in zip(asked, plain, strict=True):
        llama1m_ext.stats(model, reset=True)
        got = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, want)
        assert llama1m_ext.stats(model).computed == ids.shape[1] - 1000 + 5
        assert torch.equal(cache.tokens, got[:, :-1])
        cache.crop(1000 - cache.get_seq_length())
        assert torch.equal(cache.tokens, asked[0][:, :1000])


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_pages_on_disk(model, tmp_path, kv):
    asked = prompts(3000, 2)
    llama1m_ext.set_options(model, kv=kv, offload="disk", kv_memory=600_000, offload_dir=str(tmp_path))
    read(model, asked[0])
    want, _ = read(model, asked[1])
    llama1m_ext.remember(model, tmp_path / "kept")
    read(model, asked[0])
    got, stats = read(model, asked[1])
    assert stats.reused == 3000
    tolerance = 1e-4 if kv == "model" else 0.1
    torch.testing.assert_close(got.logits, want.logits, rtol=tolerance, atol=tolerance)
