"""`llama1m ppl`, `needle`, `ruler`: what they print and write, and what they refuse before a model is loaded."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

import llama1m_ext
from llama1m_ext import testing
from llama1m_ext.cli import app
from llama1m_ext.eval import load
from llama1m_ext.eval.reader import served

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(testing.tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", vocab_size=testing.VOCAB_SIZE))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Once upon a time there was a mill. " * 100, encoding="utf-8")
    return str(path)


def test_ppl(checkpoint, text, tmp_path):
    words = ["ppl", checkpoint, "--text", text, "--length", "600", "--pieces", "3", "--dtype", "f32"]
    answer = call(*words, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png"))
    assert answer.exit_code == 0, answer.output
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["tokens"] == 3 * 599 == sum(bucket["tokens"] for bucket in report["buckets"])
    assert report["buckets"][-1]["end"] == 600 and report["length"] == 600
    assert f"{report['perplexity']:,.4f}" in answer.stdout
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "a.json").read_text())["buckets"]) > 3


def test_ppl_is_that_of_the_api(checkpoint, text, tmp_path):
    import torch
    import transformers

    from llama1m_ext.eval.ppl import perplexity

    answer = call(
        "ppl", checkpoint, "--text", text, "--length", "500", "--buckets", "4", "--json", str(tmp_path / "a.json")
    )
    assert answer.exit_code == 0, answer.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"][:500]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    found = perplexity(model, torch.tensor(ids), buckets=4)
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["nll"] == pytest.approx(found.nll, rel=1e-6)
    assert len(report["buckets"]) == len(found.buckets) == 4


def printed(answer) -> list[str]:
    """Lines of the standard output; old releases of click mix what is said beside it in."""
    return [line for line in answer.stdout.splitlines() if not line.startswith("wrote ")]


def test_needle_with_the_demo_model(tmp_path):
    out = tmp_path / "out"
    words = ["needle", "demo", "--lengths", "600,1K", "--depths", "0,0.5,1", "--kind", "sentence", "--out", str(out)]
    answer = call(*words, "--threads", "1", "--json", str(tmp_path / "a.json"))
    assert answer.exit_code == 0, answer.output
    assert [line.split() for line in printed(answer)] == [
        ["depth", "600", "1,024"],
        ["0%", "100%", "100%"],
        ["50%", "100%", "100%"],
        ["100%", "100%", "100%"],
        ["all", "100.0%", "100.0%"],
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        "cells.jsonl",
        "heat_map.png",
        "report.json",
        "settings.json",
    ]
    assert (out / "heat_map.png").stat().st_size > 5000
    assert json.loads((tmp_path / "a.json").read_text())["accuracy"]["all"] == 1.0
    answer = call(*words, "--seed", "1")
    assert answer.exit_code == 1
    assert "6 results of other settings: seed: there 0, now 1" in answer.output


def test_ruler(checkpoint, tmp_path):
    words = ["ruler", checkpoint, "--lengths", "2000", "--tasks", "niah_multikey_3, fwe", "--samples", "1"]
    answer = call(*words, "--out", str(tmp_path / "out"), "--plot", str(tmp_path / "a.png"))
    assert answer.exit_code == 0, answer.output
    assert [line.split()[0] for line in printed(answer)] == [
        "2,000",
        "niah_multikey_3",
        "fwe",
        "average",
        "without",
    ]
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppl", "demo", "--text", "none.txt"], "expected a file, got 'none.txt'"),
        (["ppl", "demo", "--length", "4k,8k"], "length: expected one number, got 2"),
        (["ppl", "demo", "--length", "4.5"], "length: expected numbers such as \"4096,64K\", got '4.5'"),
        (["ppl", "demo", "--plot", "none/a.png"], "expected a file in a folder that can be written to"),
        (["needle", "demo", "--kind", "pins"], "kind: expected one of passkey, kv, sentence, got 'pins'"),
        (["needle", "demo", "--depths", "2.0"], "depths: expected numbers from 0 to 1"),
        (["needle", "demo", "--depths", "a"], "depths: expected a number of them, or \"0,0.5,1\", got 'a'"),
        (["needle", "demo", "--lengths", ""], "lengths: expected numbers"),
        (["needle", "demo", "--dtype", "int3"], "dtype: expected one of bf16, f16, f32, got 'int3'"),
        (["ruler", "demo", "--tasks", "nope"], "tasks: expected some of"),
        (["ruler", "demo", "--tasks", "qa"], "tasks: expected a file in SQuAD's form"),
        (
            ["needle", "demo", "--out", "file"],
            "Invalid value for '--out': expected a folder that can be written to, got file",
        ),
        (["ruler", "demo", "--out", "file/in/it"], "expected a folder that can be written to, got file/in/it"),
        (["needle", "demo", "--hay", "file"], "hay: expected some text, got 'file' with none"),
        (["ruler", "./nowhere"], "model: expected a folder, a name on the hub"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(words, message, monkeypatch, tmp_path):
    import transformers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", None)
    answer = call(*words)
    assert answer.exit_code in (1, 2), answer.output
    assert message in " ".join(answer.output.replace("│", " ").split()), answer.output


def test_a_text_that_is_too_short_is_said_in_tokens(checkpoint, text):
    answer = call("ppl", checkpoint, "--text", text, "--length", "4K")
    assert answer.exit_code == 1
    assert "text: expected a text of at least 4095 tokens, got one of 3499; repeat=True (--repeat)" in answer.output
    assert call("ppl", checkpoint, "--text", text, "--length", "4K", "--repeat").exit_code == 0


def test_without_matplotlib_a_plot_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    answer = call("ppl", "demo", "--plot", str(tmp_path / "a.png"))
    assert answer.exit_code == 2
    assert "llama1m-ext[method]" in answer.output


def test_numbers():
    assert load.numbers("n", "4096, 64k,1M") == [4096, 65536, 1048576]
    for wrong in ("", "0", "-1", "1,,2", "K", "1G", "²"):
        with pytest.raises(ValueError, match="n: expected numbers"):
            load.numbers("n", wrong)
    assert load.depths("11") == 11
    assert load.depths("0,.5") == [0.0, 0.5]


@pytest.mark.usefixtures("families_as_they_were")
def test_other_families_are_served(tmp_path):
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=testing.VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    testing.tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load.load(str(tmp_path), "f32", kv="int8")
    assert model.dtype == torch.float32 and llama1m_ext.options(model).kv == "int8"
    assert served(model) is not None
    with pytest.raises(ValueError, match=r"model: expected a folder with a config\.json"):
        load.load(str(tmp_path.parent))
