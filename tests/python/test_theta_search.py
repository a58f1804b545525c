"""`theta_search`: what it tries, that it finds the least, and that a kill costs nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import llama1m_ext
from conftest import stock
from llama1m_ext import testing
from llama1m_ext.demo.book import HELD_OUT_CHARS, load_book
from llama1m_ext.eval import ppl
from llama1m_ext.extension import extended
from llama1m_ext.rope import theta_for
from llama1m_ext.train import theta_cli
from llama1m_ext.train.theta_search import DEFAULT, theta_search
from llama1m_ext.train.theta_trials import APART, Search, Trial, thetas

BOOK = load_book()[:20_000]
QUICK = Search(points=3, widen=1, refine=2)


# -- what is tried --------------------------------------------------------------------------------------------------------


def run(objective, now=5e5, length=65_536, search=DEFAULT, before=()):
    """All trials for an objective of ln(theta); the first ones may be known."""
    laws = {} if length is None else {m: theta_for(length, method=m) for m in ("ntk", "gradient-v1", "critical-base")}
    trials: list[Trial] = []
    for theta, why in thetas(trials, now, laws, search):
        y = before[len(trials)].objective if len(trials) < len(before) else objective(math.log(theta))
        trials.append(Trial(theta, y, None, y, why))
        assert len(trials) < 100
    return trials


@settings(max_examples=60, deadline=None)
@given(at=st.floats(math.log(1e5), math.log(3e9)), power=st.sampled_from([1.0, 2.0, 4.0]), skew=st.floats(0.2, 5.0))
def test_a_valley_is_found(at, power, skew):
    """Whatever its form, if the grid may grow to where it is: the best is as near as the refinement promises."""

    def valley(x):
        return (abs(x - at) * (skew if x > at else 1.0)) ** power

    trials = run(valley, search=Search(widen=20, refine=12))
    found = min(trials, key=lambda t: t.objective)
    assert abs(math.log(found.theta) - at) < 0.25
    every = sorted(math.log(t.theta) for t in trials)
    assert len({t.theta for t in trials}) == len(trials)
    assert min(b - a for a, b in zip(every, every[1:], strict=False)) > APART / 2


def test_a_parabola_is_found_at_once():
    trials = run(lambda x: (x - math.log(2.6e7)) ** 2)
    assert [t.why for t in trials[:4]] == ["as it is", "ntk", "gradient-v1", "critical-base"]
    assert trials[0].theta == 5e5
    first = next(t for t in trials if t.why == "parabola")
    assert math.isclose(first.theta, 2.6e7, rel_tol=1e-5)


def test_the_grid():
    made = run(lambda x: (x - math.log(22_443_169)) ** 2, search=Search((0.25, 4.0), points=5, refine=0))
    grid = sorted(t.theta for t in made if t.why.endswith("x critical-base"))
    assert grid == [round(22_443_169 * k) for k in (0.25, 0.5, 2, 4)]  # 1 x is a law's, and tried once
    alone = run(lambda x: (x - math.log(5e5)) ** 2, length=None, search=Search(refine=0))
    assert sorted(t.theta for t in alone) == [round(5e5 * 2 ** (i / 2 - 1)) for i in range(5)]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_best_edge_is_widened(sign):
    trials = run(lambda x: -sign * x, search=Search(widen=3))
    assert [t.why for t in trials].count("wider") == 3
    wider = [t.theta for t in trials if t.why == "wider"]
    assert wider == sorted(wider, reverse=sign < 0)
    assert trials[-1].why == "wider"  # nothing lies beyond, so there is nothing to refine


def test_what_is_not_finite_is_no_best():
    trials = run(lambda x: math.inf if x > math.log(2e7) else (x - math.log(1.5e7)) ** 2)
    assert math.isclose(min(trials, key=lambda t: t.objective).theta, 1.5e7, rel_tol=0.1)
    assert len(run(lambda x: math.inf)) < 20


def test_what_follows_is_a_function_of_what_was_found():
    def objective(x):
        return (x - math.log(3e7)) ** 2 + 0.01 * math.sin(40 * x)

    whole = run(objective)
    for n in range(len(whole)):
        assert run(objective, before=whole[:n]) == whole


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"span": (2.0, 0.5)}, "span: expected multiples of the critical base around 1, got 2 and 0.5"),
        ({"span": (0.0, 2.0)}, "got 0 and 2"),
        ({"span": (1.0, 1.0)}, "got 1 and 1"),
        ({"points": 1}, "points: expected at least 2, got 1"),
        ({"refine": -1}, "refine: expected at least 0, got -1"),
        ({"tolerance": 0}, "tolerance: expected more than 0, got 0"),
        ({"needle_weight": -0.5}, "needle_weight: expected at least 0, got -0.5"),
    ],
)
def test_wrong_choices(fields, words):
    with pytest.raises(ValueError) as raised:
        Search(**fields)
    assert words in str(raised.value)


# -- a model --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return testing.tiny_model(max_position_embeddings=128, rope_theta=1e4)


@pytest.fixture(scope="module")
def tokenizer():
    return testing.tiny_tokenizer()


def search(model, tokenizer, lengths=(512,), text=BOOK, **more):
    more = {"needles": 2, "kind": "sentence", "search": QUICK, "progress": False, **more}
    return theta_search(model, tokenizer, text, lengths, **more)


def test_from_end_to_end(model, tokenizer, tmp_path, one_thread):
    before, config = model(testing.random_ids(1, 100)).logits, copy.deepcopy(vars(model.config))
    found = search(model, tokenizer, (512, 400), windows=2, out=tmp_path / "out", progress="auto")
    assert vars(model.config) == config
    assert torch.equal(model(testing.random_ids(1, 100)).logits, before)
    assert [one.length for one in found.lengths] == [400, 512]
    for one in found.lengths:
        assert one.laws["critical-base"] == theta_for(
            one.length, method="critical-base", theta=1e4, original_max_len=128, head_dim=16
        )
        assert {1e4, *map(float, one.laws.values())} <= {t.theta for t in one.trials}
        for t in one.trials:
            assert t.objective == t.nll + 1 - t.accuracy and t.accuracy in (0, 0.5, 1)
        assert one.best.objective == min(t.objective for t in one.trials)
        assert found.best[one.length] == one.best.theta
    written = json.loads((tmp_path / "out" / "theta-search.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert (tmp_path / "out" / "theta-search.png").read_bytes().startswith(b"\x89PNG")
    lines = found.table().splitlines()
    assert "least half the length" in lines[0] and "1 * (1 - accuracy)" in lines[0]
    assert sum("<- best" in line for line in lines) == 2
    assert len(lines) == 1 + sum(2 + len(one.trials) for one in found.lengths)


def test_nll_is_that_of_the_second_half(model, tokenizer, one_thread):
    """Against transformers' own logits under that theta, in float64."""
    found = search(model, tokenizer, (300,), needles=0, windows=2, search=Search(points=2, widen=0, refine=0))
    ids = torch.tensor(tokenizer(BOOK, add_special_tokens=False)["input_ids"][: 2 * 299]).view(2, 299)
    rows = torch.cat([torch.full((2, 1), tokenizer.bos_token_id), ids], 1)
    for trial in found.lengths[0].trials:
        with extended(model, 300, theta=trial.theta), stock(), torch.no_grad():
            logits = model(rows).logits.double()
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
        assert nll.shape == (2, 299)
        assert math.isclose(trial.nll, nll[:, 149:].mean(), rel_tol=1e-5)  # 150 to 299 tokens before them
        assert trial.accuracy is None and trial.objective == trial.nll


def test_a_length_of_its_own(model, tokenizer, one_thread):
    """Not beyond what the model was made for: there are no laws, and the grid lies around its theta."""
    found = search(model, tokenizer, (100,), needles=0).lengths[0]
    assert found.laws == {} and {1e4, 5e3, 2e4} <= {t.theta for t in found.trials}
    found = search(model, tokenizer, (512,), needles=0, original_max_len=256, original_theta=2e4).lengths[0]
    assert found.laws["ntk"] == theta_for(512, method="ntk", theta=2e4, original_max_len=256, head_dim=16)


STARTED = """
import sys, torch, transformers, llama1m_ext
from llama1m_ext.demo.book import load_book
from llama1m_ext.train.theta_search import DEFAULT, theta_search
from llama1m_ext.train.theta_trials import Search
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = transformers.AutoTokenizer.from_pretrained({folder!r})
theta_search(model, tokenizer, load_book()[:20_000], [512, 600], needles=2, kind="sentence",
             search=Search(points=3, widen=1, refine=2), out={out!r}, progress=False)
"""


def test_killed_and_resumed(model, tokenizer, tmp_path, one_thread):
    whole = search(model, tokenizer, (512, 600), out=tmp_path / "whole")
    folder, out = tmp_path / "model", tmp_path / "killed"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    script = STARTED.format(folder=str(folder), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    cells = out / "cells.jsonl"
    try:
        deadline = time.monotonic() + 200
        while not cells.exists() or cells.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert not (out / "theta-search.json").exists()
    known = cells.read_bytes().splitlines()
    with cells.open("ab") as file:
        file.write(b'{"length": 512, "the')  # what a write leaves that was cut short
    resumed = search(model, tokenizer, (512, 600), out=out, resume=True)
    assert resumed == whole and resumed.table() == whole.table()
    assert (out / "theta-search.json").read_bytes() == (tmp_path / "whole" / "theta-search.json").read_bytes()
    assert cells.read_bytes().splitlines()[: len(known)] == known


def test_what_is_known_is_not_evaluated_again(model, tokenizer, tmp_path, monkeypatch, one_thread):
    """Also under other choices; and Ctrl-C leaves what was made, and the model as it was."""
    calls = []
    real = ppl.perplexity

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ppl, "perplexity", counted)
    config = copy.deepcopy(vars(model.config))
    with pytest.raises(KeyboardInterrupt):
        search(model, tokenizer, out=tmp_path)
    assert vars(model.config) == config
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 3
    found = search(model, tokenizer, out=tmp_path, resume=True)
    n = len(found.lengths[0].trials)
    assert len(calls) == 1 + n
    again = search(model, tokenizer, out=tmp_path, resume=True)
    assert again == found and len(calls) == 1 + n
    search(model, tokenizer, out=tmp_path, resume=True, search=Search(points=5, widen=0, refine=0))
    assert len(calls) <= 1 + n + 5


def test_a_folder_of_something_else(model, tokenizer, tmp_path, one_thread):
    quick = {"out": tmp_path, "search": Search(points=2, widen=0, refine=0)}
    search(model, tokenizer, **quick)
    before = (tmp_path / "cells.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"has results already; resume=True \(--resume\) goes on"):
        search(model, tokenizer, **quick)
    other = testing.tiny_model(seed=1, max_position_embeddings=128, rope_theta=1e4)
    for wrong, words in (
        ({"model": other}, "model.weights"),
        ({"model": testing.tiny_model(max_position_embeddings=128, rope_theta=2e4)}, "model.rope.rope_theta"),
        ({"text": BOOK[100:]}, "text: there"),
        ({"windows": 2}, "windows: there 1, now 2"),
        ({"needles": 3}, "needles.number: there 2, now 3"),
        ({"kind": "passkey"}, "needles.kind: there 'sentence', now 'passkey'"),
    ):
        with pytest.raises(ValueError) as raised:
            search(**{"model": model, "tokenizer": tokenizer, **quick, "resume": True, **wrong})
        assert words in str(raised.value)
    assert (tmp_path / "cells.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"lengths": []}, ValueError, "lengths: expected numbers of tokens from 16 on, got []"),
        ({"lengths": [8]}, ValueError, "got [8]"),
        ({"lengths": [1e4]}, TypeError, "lengths: expected a whole number, got 10000.0"),
        ({"windows": 0}, ValueError, "windows: expected at least 1, got 0"),
        ({"needles": -1}, ValueError, "needles: expected at least 0, got -1"),
        ({"text": "short"}, ValueError, "text: expected a text of at least 511 tokens, got one of 5"),
        ({"text": b"bytes"}, TypeError, "text: expected a text, got bytes"),
        ({"kind": "pin"}, ValueError, "kind: expected one of passkey, kv, sentence, got 'pin'"),
        ({"lengths": [64, 512]}, ValueError, "lengths: expected more than"),
        ({"original_theta": 0.1}, ValueError, "original_theta: expected more than 1, got 0.1"),
    ],
)
def test_wrong_arguments(model, tokenizer, wrong, error, words, monkeypatch):
    monkeypatch.setattr(ppl, "perplexity", None)  # nothing is evaluated before
    with pytest.raises(error) as raised:
        search(**{"model": model, "tokenizer": tokenizer, **wrong})
    assert words in str(raised.value)


# -- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command():
    app = typer.Typer()
    app.callback()(lambda: None)
    theta_cli.register(app)
    return lambda *words: CliRunner().invoke(app, ["theta-search", *map(str, words)])


def test_the_command(command, tmp_path, one_thread):
    folder = testing.tiny_checkpoint(tmp_path / "model", max_position_embeddings=128, rope_theta=1e4)
    text = tmp_path / "text.txt"
    text.write_text(BOOK)
    words = (
        folder,
        "--text",
        text,
        "--lengths",
        "512",
        "--needles",
        2,
        "--kind",
        "sentence",
        "--out",
        tmp_path / "out",
    )
    quick = ("--points", 2, "--widen", 0, "--refine", 1)
    done = command(*words, *quick)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "theta-search.json").read_text())
    best = found["lengths"][0]["best_theta"]
    assert f"llama1m_ext.extend(model, 512, theta={best:.0f})" in done.output and "<- best" in done.output
    again = command(*words, *quick)
    assert again.exit_code == 1 and "--resume" in again.output
    assert command(*words, *quick, "--resume").exit_code == 0
    for wrong, said in (
        (("--span", "2"), "span: expected two numbers such as \"0.5,2\", got '2'"),
        (("--span", "2,."), "span: expected two numbers"),
        (("--span", "2,3"), "span: expected multiples of the critical base around 1"),
        (("--lengths", "4k?"), "lengths: expected numbers such as"),
        (("--text", tmp_path / "none.txt"), "text: expected a file"),
    ):
        failed = command(*words, *wrong)
        assert failed.exit_code == 1 and f"error: {said}" in failed.output.replace("\n", " "), failed.output
    (tmp_path / "file").touch()
    failed = command(*words, "--out", tmp_path / "file")
    assert failed.exit_code == 2 and "expected a folder that can be written to" in failed.output


def test_the_command_is_stopped(command, tmp_path, monkeypatch):
    from llama1m_ext.train import theta_search as module

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "theta_search", stopped)
    folder = testing.tiny_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("words")
    done = command(folder, "--text", text, "--lengths", "512", "--out", tmp_path)
    assert done.exit_code == 130 and "--resume goes on with it" in done.output


@pytest.mark.slow
def test_a_trained_model_needs_a_theta_for_the_length(tmp_path):
    """The demo model at 16384 tokens of a novel that it never saw: it finds all needles with the theta it was trained with,
    few with one ten thousand times smaller, and the search sees it."""
    import transformers

    from llama1m_ext.demo import MODEL_PATH

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_PATH)
    found = theta_search(
        model,
        tokenizer,
        load_book()[:HELD_OUT_CHARS],
        [16_384],
        needles=8,
        kind="sentence",
        search=Search((1e-4, 1e4), points=3, widen=0, refine=2),
        out=tmp_path,
    )
    print(found.table())
    own = 2_804_339_835.0
    by = {t.theta: t for t in found.lengths[0].trials}
    assert by[own].accuracy == 1
    assert by[round(own * 1e-4)].accuracy <= 0.75
    assert by[own].objective < by[round(own * 1e-4)].objective - 0.25
    assert llama1m_ext.stats(model).served
