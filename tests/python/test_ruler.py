"""RULER's tasks: prompts that fit and hold their answers, scores as RULER's, and a run that goes on."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from llama1m_ext import testing
from llama1m_ext.demo import MODEL_PATH
from llama1m_ext.eval.reader import Reader
from llama1m_ext.eval.ruler import Prompts, RulerReport, TaskCell, ruler, tasks_for
from llama1m_ext.eval.ruler_tasks import NOISE, TASKS, read_squad
from llama1m_ext.eval.score import match_all, match_any
from llama1m_ext.eval.words import book_words, draw_letters, draw_words

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name in TASKS if name != "qa"]


@functools.cache
def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    articles = []
    for a in range(6):
        parts = []
        for p in range(4):
            place = f"Town{a}{p}"
            qas = [
                {"question": f"Where is the mill of {place}?", "answers": [{"text": f"by the river {place}"}, {"text": "water"}]},
                {"question": "Never?", "answers": [], "is_impossible": True},
            ]  # fmt: skip
            parts.append({"context": f"The mill stands by the river {place}, which is wide. " * 6, "qas": qas})
        articles.append({"title": str(a), "paragraphs": parts})
    path = tmp_path_factory.mktemp("squad") / "squad.json"
    path.write_text(json.dumps({"data": articles}))
    return path


@functools.cache
def prompts(chat="auto", seed=7, qa=None, repeat=False):
    return Prompts(tokenizer(), None, qa, seed, chat, repeat)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_fits_and_holds_its_answers(name):
    task = TASKS[name]
    for length, index, chat in ((1100, 0, True), (4096, 3, False)):
        sample, ids = prompts(chat).sample(task, length, index)
        again, same = prompts(chat, 7, None, False).sample(task, length, index)  # another object
        assert sample == again and np.array_equal(ids, same)
        room = length - task.new_tokens
        unit = 130 if name == "niah_multikey_3" else 60
        assert room - max(unit, 0.02 * room) <= len(ids) <= room, (len(ids), room)
        text = tokenizer().decode(ids)
        assert text.endswith(sample.lead.rstrip()) or text.endswith(sample.lead)
        assert text.count("<|begin_of_text|>") == 1
        assert ("<|eot_id|>" in text) == chat
        for answer in sample.answers:
            assert answer in sample.user
            assert answer not in sample.lead
        assert len(set(sample.answers)) == len(sample.answers)
        assert task.score(" and ".join(sample.answers), sample.answers) == 1.0
    first = prompts().sample(task, 1100, 0)[0].answers
    assert first != prompts().sample(task, 1100, 1)[0].answers
    assert first != prompts(seed=8).sample(task, 1100, 0)[0].answers


NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


@pytest.mark.parametrize(
    ("name", "needles", "keys", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multikey_2", None, None, 1),
        ("niah_multikey_3", None, None, 1),
        ("niah_multivalue", 4, 1, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles(name, needles, keys, answers):
    sample, _ = prompts().sample(TASKS[name], 3000, 0)
    found = NEEDLE.findall(sample.user)
    if needles is None:
        assert len(found) > 15
        assert len({key for _, key, _ in found}) == len(found)
    else:
        assert len(found) == needles
        assert len({key for _, key, _ in found}) == keys
    assert len(sample.answers) == answers
    query = re.search(r"for (\S+(?:, (?:and )?\S+)*) mentioned", sample.lead)[1]
    asked = re.split(r", (?:and )?", query)
    assert sorted(value for _, key, value in found if key in asked) == sorted(sample.answers)
    many = answers > 1
    what = "uuid" if name in ("niah_single_3", "niah_multikey_3") else "number"
    assert sample.user.startswith("Some special magic numbers are" if many else f"A special magic {what} is hidden")
    assert sample.user.endswith(f"the special magic {what}{'s' * many} for {query} mentioned in the provided text?")
    assert sample.lead.endswith("are" if many else "is")
    pattern = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if what == "uuid" else r"\d{7}"
    assert all(re.fullmatch(pattern, answer) for answer in sample.answers)


def test_needles_stand_between_sentences_of_the_essays():
    sample, _ = prompts().sample(TASKS["niah_multiquery"], 4096, 0)
    text = sample.user.split("\n", 1)[1]
    for found in NEEDLE.finditer(text):
        before = text[: found.start()].rstrip()
        assert not before or before[-1] in ".!?\"')"
        assert not before.endswith(("Mr.", "Mrs."))


def test_variable_tracking():
    sample, _ = prompts().sample(TASKS["vt"], 2500, 0)
    real = sample.user[sample.user.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d{5}) in the text", real)[1]
    assert f"VAR {sample.answers[0]} = {value}\n" in real
    places = [real.index(f"VAR {b} = VAR {a}") for a, b in zip(sample.answers, sample.answers[1:], strict=False)]
    assert len(sample.answers) == 5 and places == sorted(places)
    assert real.count(NOISE) > 20
    example = sample.user[: sample.user.rindex("Memorize and track")]
    assert "5 variables are assigned the value" in example and not set(sample.answers) & set(example.split())


def test_common_words():
    for length, often, seldom in ((2000, 6, 1), (5000, 30, 3)):
        sample, _ = prompts().sample(TASKS["cwe"], length, 0)
        counts = Counter(re.findall(r"\d+\. (\S+)", sample.user))
        assert [word for word, n in counts.items() if n == often] and set(counts.values()) == {often, seldom}
        assert {word for word, n in counts.items() if n == often} == set(sample.answers)
        ((question, answer),) = sample.examples
        shown = Counter(re.findall(r"\d+\. (\S+)", question))
        assert {word for word, _ in shown.most_common(10)} == set(re.findall(r"\d+\. (\S+)", answer))


def test_frequent_words():
    for length in (600, 1500, 6000):
        sample, _ = prompts().sample(TASKS["fwe"], length, 2)
        coded = sample.user.split("coded words. ")[1].split("\nQuestion")[0].split()
        counts = Counter(coded).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == sample.answers
        assert counts[3][1] > counts[4][1], "no tie"
        assert counts[1][1] > counts[2][1] > counts[3][1]


def test_questions_about_documents(squad):
    made = prompts(qa=squad)
    sample, ids = made.sample(TASKS["qa"], 1500, 5)
    assert sample.answers == ("by the river Town11", "water")
    documents = re.findall(r"^Document \d+:\n(.*)$", sample.user, re.MULTILINE)
    assert sum("Town11" in document for document in documents) == 1
    assert sum("Town1" in document for document in documents) == 4, "the others of its article come first"
    assert len(documents) > 8 and len(set(documents)) == len(documents)
    assert len(ids) <= 1500 - 32
    with pytest.raises(ValueError, match=r"qa: expected text for 9000 tokens, got enough for \d+; repeat=True"):
        made.sample(TASKS["qa"], 9000, 5)
    _, ids = prompts(qa=squad, repeat=True).sample(TASKS["qa"], 9000, 5)
    assert len(ids) > 8500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "qa: expected JSON in SQuAD's form"),
        ("{", "qa: expected JSON in SQuAD's form"),
        ('{"data": []}', "qa: expected questions with answers"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b"}]}]}]}', "KeyError"),
    ],
)
def test_files_in_another_form_are_refused(content, message, tmp_path):
    path = tmp_path / "qa.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_squad(path)
    with pytest.raises(FileNotFoundError, match="qa: expected a file, got"):
        read_squad(tmp_path / "none.json")


def test_scores():
    """As RULER's string_match_all and string_match_part, by hand."""
    assert match_all("It is 12 and 34.", ["12", "34"]) == 1.0
    assert match_all("it is 12", ["12", "34", "56", "78"]) == 0.25
    assert match_all("", ["12"]) == 0.0
    assert match_all("YES, Paris", ["yes", "paris"]) == 1.0
    assert match_all("1\x002", ["12"]) == 0.0, "control characters become line ends, as there"
    assert match_any("the Seine, of course", ["Thames", "seine"]) == 1.0
    assert match_any("no", ["Thames", "seine"]) == 0.0


def test_words():
    import random

    known = book_words()
    assert 10_000 < len(known) == len(set(known)) and all(re.fullmatch("[a-z]{4,12}", word) for word in known)
    many = draw_words(len(known) + 500, random.Random(1))
    assert len(set(many)) == len(known) + 500 and set(known) < set(many)
    assert draw_words(50, random.Random(1)) == draw_words(50, random.Random(1))
    assert len(set(draw_letters(1, "abc", 3, random.Random(1)))) == 3
    with pytest.raises(ValueError, match="expected at most 3 strings, got 4"):
        draw_letters(1, "abc", 4, random.Random(1))


def test_which_tasks():
    assert [task.name for task in tasks_for("all", False)] == NAMES
    assert [task.name for task in tasks_for("all", True)] == list(TASKS)
    assert len(tasks_for("niah", False)) == 8
    assert [task.name for task in tasks_for(["fwe", "vt", "fwe"], False)] == ["vt", "fwe"]
    for wrong, message in (
        ("x", "expected some of niah, all, niah_single_1"),
        ("qa", "expected a file"),
        ([], "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks_for(wrong, False)


# -- runs --------------------------------------------------------------------------------------------------------------


def run(tmp_path=None, **changes):
    given = {"lengths": [1000, 1100], "tasks": ["niah_single_1", "vt"], "samples": 2, "progress": False, **changes}
    model = given.pop("model", None) or testing.tiny_model(vocab_size=3072)
    return ruler(model, tokenizer(), out=tmp_path, **given)


def test_who_says_the_answers_gets_100(monkeypatch, squad):
    """The whole way but for the model: prompts, tokens, decoding, scores."""
    made = prompts(seed=0, qa=squad)
    given = {"lengths": [1100], "samples": 1, "progress": False, "qa": squad}
    answers = {}
    for task in TASKS.values():
        sample, ids = made.sample(task, 1100, 0)
        answers[ids.tobytes()] = tokenizer()(", ".join(sample.answers), add_special_tokens=False)["input_ids"]
    limits = []
    monkeypatch.setattr(Reader, "greedy", lambda self, ids, limit, stop: limits.append(limit) or answers[ids.tobytes()])
    report = ruler(testing.tiny_model(vocab_size=3072), tokenizer(), **given)
    assert report.tasks == list(TASKS)
    assert all(cell.score == 100.0 for cell in report.cells)
    assert limits == [128] * 8 + [30, 120, 50, 32]
    monkeypatch.setattr(Reader, "greedy", lambda self, ids, limit, stop: answers[ids.tobytes()][:8])
    report = ruler(testing.tiny_model(vocab_size=3072), tokenizer(), **given, tasks=["niah_multiquery", "vt"])
    scores = {cell.task: cell.score for cell in report.cells}
    assert 0 < scores["niah_multiquery"] < 100 and 0 < report.average() < 100


def test_a_model_that_copies_is_heard():
    """A real forward to a real score: the demo model repeats the key and knows nothing, an untrained one says noise."""
    report = run(samples=1, lengths=[1000], tasks=["niah_single_2", "fwe"])
    assert [(cell.task, cell.samples) for cell in report.cells] == [("niah_single_2", 1), ("fwe", 1)]
    assert report.average() == 0.0


def test_it_goes_on(tmp_path, monkeypatch):
    spoken = []

    def greedy(self, ids, limit, stop):
        if len(spoken) == 3:
            raise KeyboardInterrupt
        spoken.append(len(ids))
        return [1, 2, 3]

    monkeypatch.setattr(Reader, "greedy", greedy)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(Reader, "greedy", lambda self, ids, limit, stop: spoken.append(len(ids)) or [1, 2, 3])
    report = run(tmp_path)
    assert len(spoken) == 8
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    records = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len({(r["task"], r["length"], r["sample"]) for r in records}) == 8
    assert set(records[0]) == {"task", "length", "sample", "score", "tokens", "expected", "said"}
    run(tmp_path, tasks="vt", samples=3)
    assert len(spoken) == 10, "only the third samples were new"
    with pytest.raises(ValueError, match="seed: there 0, now 1"):
        run(tmp_path, seed=1)


def test_the_report(tmp_path):
    cells = [TaskCell("vt", 4096, 80.0, 5), TaskCell("fwe", 4096, 40.0, 5), TaskCell("vt", 8192, 60.0, 5), TaskCell("fwe", 8192, 0.0, 5)]  # fmt: skip
    report = RulerReport(0, cells)
    assert report.average() == 45.0 and report.average(4096) == 60.0
    assert [line.split() for line in report.table().splitlines()] == [
        ["4,096", "8,192"],
        ["vt", "80.0", "60.0"],
        ["fwe", "40.0", "0.0"],
        ["average", "60.0", "30.0"],
    ]
    assert json.loads(json.dumps(report.to_dict()))["average"] == {"all": 45.0, "4096": 60.0, "8192": 30.0}
    report.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="length: expected one of"):
        report.average(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [200]}, "lengths: expected at least .* tokens for a sample of niah_single_1, got 200"),
        ({"tasks": "nope"}, "tasks: expected some of"),
        ({"samples": 0}, "samples: expected at least 1"),
        ({"tasks": "niah_single_2", "hay": "Short text. " * 9}, "hay: expected text for 1000 tokens, got enough for"),
    ],
)
def test_errors_come_before_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", model=torch.nn.Identity(), **changes)
    assert not (tmp_path / "out").exists()


def test_more_samples_than_questions(squad, tmp_path):
    with pytest.raises(ValueError, match="samples: expected at most 24, the questions of the file, for qa, got 25"):
        run(tmp_path, tasks="qa", qa=squad, samples=25)
