"""Needles in a haystack: prompts as they should be, the demo model finds them, nothing is lost in a kill."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import llama1m_ext
from llama1m_ext import testing
from llama1m_ext.demo import MODEL_PATH
from llama1m_ext.eval import needle as module
from llama1m_ext.eval.cells import Cells, OtherSettings
from llama1m_ext.eval.frame import frame_for, stops
from llama1m_ext.eval.haystack import Haystack, cut_at, insert
from llama1m_ext.eval.kinds import KINDS, Kind, draw_needles
from llama1m_ext.eval.needle import Cell, NeedleReport, depths_for, needle
from llama1m_ext.eval.reader import Reader, evaluating

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def demo():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_PATH)
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_PATH, torch_dtype=torch.bfloat16), tokenizer


def prompts(kind, shared, length=2000, depths=5, chat="auto", sample=0, new_tokens=0):
    tokenizer = demo()[1]
    return module._Prompts(
        frame_for(tokenizer, chat),
        Haystack(None, tokenizer),
        KINDS[kind],
        length,
        depths_for(depths),
        shared,
        3,
        sample,
        new_tokens,
    )


@pytest.mark.parametrize("mode", module.MODES)
def test_the_demo_model_finds_its_needles(mode):
    model, tokenizer = demo()
    report = needle(
        model, tokenizer, lengths=[700, 1500], depths=4, kind="sentence", mode=mode, samples=2, seed=2, progress=False
    )
    assert report.accuracy() == report.accuracy(700) == 1.0
    assert report.lengths == [700, 1500]
    assert [cell.depth for cell in report.cells[:4]] == [0.0, 0.333333, 0.666667, 1.0] == report.depths
    assert all(cell.samples == 2 for cell in report.cells)


@pytest.mark.parametrize("kv", ["int8", "int8/int4"])
def test_over_a_compact_cache(kv):
    """Which is cut back after every question, too."""
    model, tokenizer = demo()
    given = {"lengths": 1200, "depths": 6, "kind": "sentence", "progress": False}
    llama1m_ext.set_options(model, kv=kv)
    try:
        before = llama1m_ext.stats(model).computed
        assert needle(model, tokenizer, **given).accuracy() == 1.0
        assert llama1m_ext.stats(model).computed - before < 1200 + 6 * 60
    finally:
        llama1m_ext.set_options(model, kv="auto")


def test_generating_says_the_same():
    model, tokenizer = demo()
    given = {"lengths": 700, "depths": 3, "progress": False, "generate": True}
    assert needle(model, tokenizer, kind="sentence", **given).accuracy() == 1.0
    assert needle(model, tokenizer, kind="kv", **given).accuracy() == 0.0, "which it was never trained for"


def test_what_is_not_there_is_not_found(monkeypatch):
    """The same prompts without their needles: an answer that is right without reading would be a fault of ours."""
    model, tokenizer = demo()
    monkeypatch.setattr(Kind, "text", " The needle is not here.", raising=False)
    blank = Kind("blank", " Nothing: {value}.", KINDS["sentence"].question, KINDS["sentence"].lead)
    report = needle(model, tokenizer, lengths=700, depths=3, kind=blank, progress=False)
    assert report.accuracy() == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_prompts(kind, shared, chat):
    tokenizer = demo()[1]
    made, again = (prompts(kind, shared, chat=chat) for _ in range(2))
    for i, one in enumerate(made.needles):
        ids, n = made.prompt(i)
        assert np.array_equal(ids, again.prompt(i)[0]), "the same seed gives the same prompt"
        assert 1990 - 40 * (kind == "kv") <= len(ids) <= 2000
        text = tokenizer.decode(ids)
        document = tokenizer.decode(made.document(i))
        assert one.text.strip() in document
        assert document.count(one.value) == (2 if kind == "passkey" else 1)
        present = sum(other.text.strip() in document for other in made.needles)
        assert present == (len(made.needles) if shared else 1)
        assert text.endswith(f"{one.lead}{one.answer}")
        assert one.value in tokenizer.decode(ids[-n:])
        assert one.question in text[len(document) :]
        assert text.startswith("<|begin_of_text|>") and not text.startswith("<|begin_of_text|>" * 2)
        assert ("<|eot_id|><|start_header_id|>assistant" in text) == chat
        place = document.find(one.text.strip()) / len(document)
        assert abs(place - i / 4) < 0.15, (i, place)
    others = prompts(kind, shared, chat=chat, sample=1)
    assert others.needles[0] != made.needles[0]
    assert not np.array_equal(others.document(0)[:200], made.document(0)[:200])


def test_needles_stand_between_sentences():
    made = prompts("sentence", True, length=4000, depths=9)
    document = demo()[1].decode(made.document(0))
    for one in made.needles[1:-1]:
        before = document[: document.find(one.text)].rstrip()
        assert before[-1] in ".!?\"')", before[-40:]
        assert not before.endswith(("Mr.", "Mrs.")), before[-40:]


def test_kv_has_distractors():
    made = prompts("kv", False, length=3000)
    assert demo()[1].decode(made.document(0)).count('": "') == 1 + KINDS["kv"].distractors


def test_all_keys_and_values_differ():
    for kind in KINDS.values():
        drawn = draw_needles(kind, 100, random.Random(1))
        assert len({one.key for one in drawn}) == len({one.value for one in drawn}) == 100
        assert all(len(one.value) == kind.digits for one in drawn)
    with pytest.raises(ValueError, match=r'depths: expected at most 133 .* mode="alone"'):
        draw_needles(KINDS["passkey"], 134, random.Random(1))


def test_hay():
    tokenizer = testing.tiny_tokenizer()  # a byte is a token
    stack = Haystack("One. Two three! Mr. Four five? six", tokenizer)
    ids = stack.tokens(34)
    assert tokenizer.decode(ids.tolist()) == stack.text
    assert [stack.text[:end][-1] for end in stack.sentence_ends(ids)] == [".", "!", ".", "?"]
    assert tokenizer.decode(stack.tokens(35, 5).tolist()) == "Two three! Mr. Four five? six\n\nOne."
    with pytest.raises(ValueError, match="hay: expected a text of at least 50 tokens, got one of 34; repeat=True"):
        stack.tokens(50)
    again = Haystack(stack.text, tokenizer, repeat=True).tokens(50)
    assert np.array_equal(again, [*ids, *ids[:16]])
    ends = np.array([4, 15, 30])
    assert [cut_at(ends, 34, depth) for depth in (0, 0.1, 0.5, 0.9, 1)] == [0, 3, 15, 30, 34]
    assert insert(np.arange(5), [(5, np.array([9])), (0, np.array([7])), (0, np.array([8]))]).tolist() == [
        7, 8, 0, 1, 2, 3, 4, 9
    ]  # fmt: skip
    with pytest.raises(ValueError, match="hay: expected some text"):
        Haystack(" \n", tokenizer)


def test_hay_is_the_same_however_much_of_it_is_asked_for():
    tokenizer = demo()[1]
    long = Haystack(None, tokenizer).tokens(5000, 1234)
    growing = Haystack(None, tokenizer)
    for count in (10, 300, 299, 5000, 40):
        assert np.array_equal(growing.tokens(count, 1234), long[:count])


def test_depths():
    assert depths_for(3) == [0, 0.5, 1]
    assert depths_for(1) == [0.5]
    assert depths_for([1, 0.25]) == [0.25, 1]
    for wrong in (0, [], [1.5], [-0.1]):
        with pytest.raises(ValueError, match="depths: expected"):
            depths_for(wrong)


# -- the reader --------------------------------------------------------------------------------------------------------


def plain(model, ids, n):
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0, -n:].float()


@pytest.mark.parametrize("which", ["served", "gpt2", "sliding"])
def test_the_reader_reads_nothing_twice_and_nothing_wrong(which):
    import transformers

    if which == "served":
        model = testing.tiny_model()
    elif which == "gpt2":
        config = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, initializer_range=0.15)
        model = transformers.GPT2LMHeadModel(config).eval()
    else:
        config = transformers.MistralConfig(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=50, initializer_range=0.15,
        )  # fmt: skip
        model = transformers.MistralForCausalLM(config).eval()
    first = testing.random_ids(1, 300)[0].tolist()
    part = first[:250]
    turns = [first, [*part, 7, 8, 9], [*part, 7, 8, 9, 10, 11], part, part, [5, 6, 7] * 30]
    with evaluating(model):
        reader, computed = Reader(model), []
        for ids in turns:
            before = reader.computed
            found = reader.logits(ids, 2)
            computed.append(reader.computed - before)
            testing_error = (found - plain(model, ids, 2)).abs().max().item()
            assert testing_error < 2e-4, (len(ids), testing_error)
    expected = [300, 3, 2, 2, 2, 90]
    assert computed == ([300, 253, 2, 250, 250, 90] if which == "sliding" else expected)


def test_the_reader_after_an_error_begins_anew():
    model, ids = testing.tiny_model(), testing.random_ids(1, 200)[0].tolist()
    with evaluating(model):
        reader = Reader(model)
        reader.logits(ids)
        hook = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            reader.logits([*ids[:150], 3, 4])
        hook.remove()
        assert torch.allclose(reader.logits([*ids, 3]), plain(model, [*ids, 3], 1), atol=1e-4)
        with pytest.raises(ValueError, match="last: expected 1 to 3"):
            reader.logits([1, 2, 3], 4)


def test_greedy_is_generate():
    model, ids = testing.tiny_model(), testing.random_ids(1, 90)
    said = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 90:].tolist()
    with evaluating(model):
        reader = Reader(model)
        assert reader.greedy(ids[0].tolist(), 12) == said
        assert reader.greedy(ids[0].tolist(), 12, frozenset(said[5:6])) == said[: said.index(said[5])]
        assert reader.computed < 90 + 12 + 12 + 2


def test_the_shared_document_is_read_once():
    model, tokenizer = demo()
    before = llama1m_ext.stats(model).computed
    needle(model, tokenizer, lengths=1000, depths=10, kind="sentence", progress=False)
    assert llama1m_ext.stats(model).computed - before < 1000 + 10 * 60


def test_frames():
    tokenizer = testing.tiny_tokenizer()
    chat = frame_for(tokenizer, system="Be brief.")
    assert chat.chat and chat.bos == () and "Be brief." in chat.before
    assert chat.after == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    plain_frame = frame_for(tokenizer, chat=False)
    assert (plain_frame.before, plain_frame.bos) == ("", (tokenizer.bos_token_id,))
    examples = frame_for(tokenizer, examples=[("ask", "say")]).before
    assert examples.index("ask") < examples.index("assistant") < examples.index("say")
    assert {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")} <= stops(
        testing.tiny_model(), tokenizer
    )
    tokenizer.chat_template = None
    assert not frame_for(tokenizer).chat
    with pytest.raises(ValueError, match="chat: expected a tokenizer with a chat template"):
        frame_for(tokenizer, chat=True)


# -- what is kept ------------------------------------------------------------------------------------------------------


def grid(tmp_path, **changes):
    model, tokenizer = testing.tiny_model(), testing.tiny_tokenizer()
    given = {"lengths": [400, 500], "depths": 3, "out": tmp_path / "out", "progress": False, "mode": "alone", **changes}
    return needle(given.pop("model", model), tokenizer, **given)


def test_a_finished_run_computes_nothing(tmp_path, monkeypatch):
    first = grid(tmp_path)
    monkeypatch.setattr(Reader, "logits", None)
    assert grid(tmp_path) == first
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report == first.to_dict()
    lines = [json.loads(line) for line in (tmp_path / "out/cells.jsonl").read_text().splitlines()]
    assert {(r["length"], r["depth"], r["sample"]) for r in lines} == {
        (n, d, 0) for n in (400, 500) for d in (0, 0.5, 1)
    }
    assert len(lines) == 6


def test_more_lengths_samples_and_depths_are_added(tmp_path):
    grid(tmp_path)
    before = (tmp_path / "out/cells.jsonl").read_bytes()
    report = grid(tmp_path, lengths=[300, 500], depths=[0, 0.25], samples=2)
    after = (tmp_path / "out/cells.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == 6 + 7, "one of eight was there"
    assert [(cell.length, cell.depth) for cell in report.cells] == [(300, 0), (300, 0.25), (500, 0), (500, 0.25)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sentence"}, "kind.name: there 'passkey', now 'sentence'"),
        ({"seed": 4}, "seed: there 0, now 4"),
        ({"mode": "shared"}, "mode: there 'alone', now 'shared'"),
        ({"model": testing.tiny_model(seed=1)}, "model.weights: there"),
        ({"model": testing.tiny_model(rope_theta=1e4)}, "model.rope.*there"),
        ({"hay": "Some other text. " * 100, "repeat": True}, "hay: there"),
        ({"chat": False}, "chat: there True, now False"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, changes, message):
    grid(tmp_path, lengths=400, depths=1)
    before = (tmp_path / "out/cells.jsonl").read_bytes()
    with pytest.raises(OtherSettings, match=message):
        grid(tmp_path, lengths=400, depths=1, **changes)
    assert (tmp_path / "out/cells.jsonl").read_bytes() == before


def test_shared_needles_depend_on_all_depths(tmp_path):
    grid(tmp_path, mode="shared", lengths=700)
    with pytest.raises(OtherSettings, match="depths: there"):
        grid(tmp_path, mode="shared", lengths=700, depths=2)


def test_an_output_layer_of_its_own_is_another_model(tmp_path):
    grid(tmp_path, lengths=400, depths=1)
    model = testing.tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 0.01
    with pytest.raises(OtherSettings, match=r"model\.output"):
        grid(tmp_path, lengths=400, depths=1, model=model)


def test_a_torn_line_is_cut_off_and_a_damaged_one_is_not(tmp_path):
    with Cells(tmp_path, {"a": 1}, ("n",)) as cells:
        cells.add({"n": 1, "right": True})
        cells.add({"n": 2, "right": False})
    path = tmp_path / "cells.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with Cells(tmp_path, {"a": 1}, ("n",)) as cells:
        assert cells.resumed == 1 and (1,) in cells and (2,) not in cells
        cells.add({"n": 2, "right": False})
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"n": 1', b'"x": 1'))
    with pytest.raises(ValueError, match=r"expected a result with n, got .* in line 1 of"):
        Cells(tmp_path, {"a": 1}, ("n",))
    path.write_bytes(whole)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has results and no settings\.json"):
        Cells(tmp_path, {"a": 1}, ("n",))


def test_one_process_at_a_time(tmp_path):
    with Cells(tmp_path, {}, ("n",)), pytest.raises(ValueError, match="in use by another process"):
        Cells(tmp_path, {}, ("n",))
    Cells(tmp_path, {}, ("n",)).close()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="out: expected a folder, got the file"):
        Cells(tmp_path / "file", {}, ("n",))


KILLED = """
import sys, time, torch
torch.set_num_threads(1)
from llama1m_ext import testing
from llama1m_ext.eval import reader
from llama1m_ext.eval.needle import needle
slow = reader.Reader.logits
def logits(self, *args):
    time.sleep(0.1)  # so that there is a moment to be killed in
    return slow(self, *args)
reader.Reader.logits = logits
needle(testing.tiny_model(), testing.tiny_tokenizer(), lengths=[400, 420], depths=4, samples=2, out=sys.argv[1],
       progress=False, mode="alone")
"""


def test_a_kill_loses_no_finished_cell(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], env={**os.environ, "PYTHONWARNINGS": "ignore"})
    try:
        cells = out / "cells.jsonl"
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (cells.exists() and cells.read_bytes().count(b"\n") >= 4):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = cells.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 4 <= before.count(b"\n") < 16
    given = {"lengths": [400, 420], "depths": 4, "samples": 2}
    report = grid(tmp_path, **given)
    after = cells.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 16
    assert report == grid(tmp_path / "uninterrupted", **given)


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report(tmp_path):
    cells = [Cell(100, 0.0, 2, 2), Cell(100, 1.0, 1, 2), Cell(2000, 0.0, 0, 2), Cell(2000, 1.0, 1, 2)]
    report = NeedleReport("passkey", "shared", 0, False, cells)
    assert report.accuracy() == 0.5
    assert report.accuracy(100) == 0.75
    with pytest.raises(ValueError, match=r"length: expected one of \[100, 2000\], got 3"):
        report.accuracy(3)
    assert [line.split() for line in report.table().splitlines()] == [
        ["depth", "100", "2,000"],
        ["0%", "100%", "0%"],
        ["100%", "50%", "50%"],
        ["all", "75.0%", "25.0%"],
    ]
    assert json.loads(json.dumps(report.to_dict()))["accuracy"] == {"all": 0.5, "100": 0.75, "2000": 0.25}
    report.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pins"}, "kind: expected one of passkey, kv, sentence, got 'pins'"),
        ({"kind": Kind("mine", "no value", "?", "")}, "kind: expected {value} in text"),
        ({"mode": "both"}, "mode: expected one of shared, alone, got 'both'"),
        ({"lengths": []}, "lengths: expected numbers of tokens"),
        ({"lengths": [100]}, "lengths: expected more than .* tokens for 1 needles of kind 'passkey'"),
        ({"samples": 0}, "samples: expected at least 1, got 0"),
        ({"hay": "Short. ", "lengths": 900}, "hay: expected a text of at least 719 tokens, got one of 6; repeat=True"),
    ],
)
def test_errors_come_before_work(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(Reader, "logits", None)
    with pytest.raises(ValueError, match=message):
        grid(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_beyond_the_model_s_positions_there_is_one_warning():
    model, tokenizer = testing.tiny_model(max_position_embeddings=450), testing.tiny_tokenizer()
    with pytest.warns(UserWarning, match="500 tokens are more than .* max_position_embeddings=450") as caught:
        needle(model, tokenizer, lengths=[400, 500], depths=1, progress=False)
    assert len(caught) == 1
