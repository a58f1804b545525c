"""The console script: what it prints, what it refuses, what it hands on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llama1m_ext import _core, env
from llama1m_ext.cli import app


def call(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, encoding="utf-8", timeout=120, env={**os.environ, **variables}
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "sys.argv = ['llama1m', '--help']\n"
        "from llama1m_ext.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('heavy:', sorted({'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)))\n"
    )
    answer = python("-c", code)
    assert answer.returncode == 0, answer.stderr
    for word in ("demo", "bench", "env"):
        assert word in answer.stdout
    assert "heavy: []" in answer.stdout


def test_the_module_runs_as_a_program():
    answer = python("-m", "llama1m_ext", "env", "--isa-levels")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == _core.isa_levels()


def test_env_has_what_a_bug_report_needs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    answer = call("env", "--json")
    assert answer.exit_code == 0, answer.output
    facts = json.loads(answer.stdout)
    assert facts["versions"]["core"] == _core.__version__
    for name in ("torch", "transformers", "accelerate", "numpy"):
        assert facts["versions"][name], name
    assert facts["cpu"]["isa"] in facts["cpu"]["isa_levels"] == _core.isa_levels()
    assert facts["cpu"]["usable_cpus"] >= 1
    assert facts["memory_gib"]["total"] > facts["memory_gib"]["available"] > 0
    assert set(facts["gpu"]) == {"torch_cuda", "driver", "devices", "cuda", "kernels", "compiled_kernels"}
    assert facts["gpu"]["cuda"], "a version, or why there is none"
    assert facts["nvrtc"] is None or set(facts["nvrtc"]) == {"version", "library"}
    assert facts["variables"]["OMP_NUM_THREADS"] == "2"
    assert "hf_secret" not in answer.stdout, "people paste this into public reports"


def test_env_in_words_has_a_line_per_fact():
    facts = {"cpu": {"isa_levels": ["avx2", "portable"], "isa": "avx2"}, "nvrtc": None, "variables": {}}
    assert [line.split(maxsplit=1) for line in env.render(facts).splitlines()] == [
        ["cpu.isa_levels", "avx2, portable"],
        ["cpu.isa", "avx2"],
        ["nvrtc", "-"],
        ["variables", "-"],
    ]
    answer = call("env")
    assert answer.exit_code == 0
    assert f"versions.core {_core.__version__}" in " ".join(answer.stdout.split())


@pytest.mark.parametrize("level", _core.isa_levels())
def test_the_environment_chooses_the_isa_level(level):
    answer = python("-m", "llama1m_ext", "env", "--json", LLAMA1M_ISA=level)
    assert answer.returncode == 0, answer.stderr
    facts = json.loads(answer.stdout)
    assert facts["cpu"]["isa"] == level
    assert facts["variables"]["LLAMA1M_ISA"] == level


def test_env_still_reports_when_the_isa_level_is_not_there():
    answer = python("-m", "llama1m_ext", "env", "--json", LLAMA1M_ISA="mmx")
    assert answer.returncode == 0, answer.stderr
    isa = json.loads(answer.stdout)["cpu"]["isa"]
    assert isa.startswith("none (LLAMA1M_ISA: expected one of")
    assert "mmx" in isa


def test_bench_writes_json_and_a_plot(tmp_path):
    words = ["bench", "attention", "--squares", "64", "--chunks", "16x80", "--rounds", "1", "--dtypes", "f32"]
    answer = call(*words, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png"))
    assert answer.exit_code == 0, answer.output
    report = json.loads((tmp_path / "a.json").read_text())
    assert [case["shape"]["q_len"] for case in report["cases"]] == [64, 16]
    assert (tmp_path / "a.png").stat().st_size > 1000

    words = ["bench", "decode", "--kv-len", "256", "--heads", "4x2x64", "--rounds", "1", "--page-size", "100"]
    answer = call(*words, "--threads", "1", "--clock", "cpu", "--json", str(tmp_path / "d.json"))
    assert answer.exit_code == 0, answer.output
    report = json.loads((tmp_path / "d.json").read_text())
    assert (report["threads"], report["clock"]) == (1, "cpu")
    assert len(report["cases"][0]["candidates"]) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "attention", "--dtypes", "int3"], "dtypes: expected some of bf16, f32, f16, got 'int3'"),
        (["bench", "decode", "--heads", "3x2x64"], "heads: expected kv_heads to divide q_heads=3, got 2"),
        (["bench", "decode", "--rounds", "0"], "--rounds"),
        (["demo", "--text", "no/such/file.txt"], "expected a text file, got 'no/such/file.txt'"),
        (["demo", "--depth", "1.5"], "--depth"),
        (["demo", "--tokens", "3"], "--tokens"),
    ],
)
def test_a_wrong_word_is_named(words, message):
    answer = call(*words)
    assert answer.exit_code == 2
    # The frame around the message breaks its lines.
    assert message in " ".join(answer.output.replace("│", " ").split())


@pytest.mark.parametrize("correct", [True, False])
def test_demo_hands_on_its_options_and_fails_when_the_answer_is_wrong(correct, monkeypatch, tmp_path):
    from llama1m_ext import demo

    seen = {}

    def run_demo(**options):
        seen.update(options)
        return {"correct": correct}

    monkeypatch.setattr(demo, "run_demo", run_demo)
    book, report = tmp_path / "book.txt", tmp_path / "demo.json"
    book.write_text("Call me Ishmael.")
    answer = call(
        *["demo", "--tokens", "4096", "--text", str(book), "--depth", "0.25", "--seed", "7", "--no-stock"],
        *["--json", str(report)],
    )
    assert answer.exit_code == (0 if correct else 1), answer.output
    assert seen == {"tokens": 4096, "text": book, "depth": 0.25, "seed": 7, "stock": False}
    assert json.loads(report.read_text()) == {"correct": correct}
