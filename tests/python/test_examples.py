"""Every example runs as it stands, at a small size, with the model that the package ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CARD = "# --- the model card ---\n"
# What each script is given, to be small. A script that is not named here fails the first test.
WORDS = {"01_pipeline.py": [], "02_generate.py": [], "03_ops.py": ["3000"], "05_ask_a_book.py": ["2048"]}


# The same, for those that torchrun starts.
OVER_PROCESSES = {"10_several_processes.py": ["1024"], "11_train_over_processes.py": ["300"]}


def run(script: str, *words: str, processes: int = 1) -> str:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    answer = subprocess.run(
        [*(start if processes > 1 else start[:1]), str(EXAMPLES / script), *words],
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        cwd=EXAMPLES,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} if processes > 1 else None,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_every_numbered_example_is_run_here():
    scripts = {path.name for path in EXAMPLES.glob("[0-9]*.py")}
    assert scripts == {*WORDS, *OVER_PROCESSES}
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("script", sorted(WORDS))
def test_script(script):
    out = run(script, *WORDS[script])
    assert out.strip()
    if script == "03_ops.py":
        assert "3 pages of 1000: at most" in out
    if script == "05_ask_a_book.py":
        assert "10 of 10 right" in out
        computed, reused = (
            int(n.replace(",", "")) for n in re.findall(r"Tokens computed: ([\d,]+);.* ([\d,]+)\n", out)[0]
        )
        assert computed < 3000 < 15_000 < reused
        assert "1 prompt was kept" in out


def test_several_processes_answer_alike():
    out = run("10_several_processes.py", "1024", processes=2)
    found = re.findall(r"^rank (\d) of 2, ([\d.]+) MiB sent: (.*) \(it is (\d+)\)$", out, re.MULTILINE)
    assert sorted(rank for rank, *_ in found) == ["0", "1"], out
    (said,), (value,) = {text for _, _, text, _ in found}, {value for *_, value in found}
    assert value in said and all(float(sent) > 0.1 for _, sent, _, _ in found), out


def test_several_processes_train_as_one():
    one, two = (run("11_train_over_processes.py", "300", processes=n) for n in (1, 2))
    losses = [[float(n) for n in re.findall(r"loss ([\d.]+)", out)] for out in (one, two)]
    norms = [[float(n) for n in re.findall(r"norm ([\d.]+)", out)] for out in (one, two)]
    assert len(losses[0]) == 8 and losses[0][-1] < losses[0][0] - 0.1
    assert losses[1] == pytest.approx(losses[0], abs=2e-3) and norms[1] == pytest.approx(norms[0], rel=1e-2)


# What each notebook prints at 2048 tokens. A notebook that is not named here fails the first test.
NOTEBOOKS = {
    "04_model_card.ipynb": ["2048 tokens and"],
    "06_chat_with_a_book.ipynb": ["4 of 4 right", "nothing on the stock path"],
    "07_batch_questions.ipynb": ["8 of 8 right; the same answers one by one: True", "on the stock path: nothing"],
    "08_kv_formats.ipynb": [
        r"model +\d+ +0.00% +found",
        r"int8 +\d+ +[0-2]\.\d+% +found",
        r"int4 +\d+ +\d+\.\d+% +found",
    ],
    "09_needle_and_theta.ipynb": [
        r"all +100\.0% +100\.0% +100\.0% +100\.0%",
        r"its own theta +100% +100% +100% +100% +1[0-9]{2}\.\d",
        r"1e4 \(Llama 2\) +\d+% +\d+% +\d+% +0% +1\d{2}\.\d",
    ],
}


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Runs a notebook, and returns its text."""

    def run(notebook) -> str:
        from nbclient import NotebookClient

        monkeypatch.setenv("TOKENS", "2048")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
        NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        return "".join(output.text for output in outputs if output.output_type == "stream")

    return run


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(execute, name):
    import nbformat

    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    text = execute(notebook)
    for words in NOTEBOOKS[name]:
        assert re.search(words, text), text
    if name in ("08_kv_formats.ipynb", "09_needle_and_theta.ipynb"):
        assert any("image/png" in output.get("data", {}) for output in notebook.cells[-1].outputs)


@pytest.mark.parametrize("widgets", [True, False])
def test_the_progress_bar_in_a_notebook(execute, widgets):
    """A widget where ipywidgets is there, and text where it is not."""
    from nbformat.v4 import new_code_cell, new_notebook

    prefill = (
        "import torch, llama1m_ext\nfrom llama1m_ext import testing\nmodel = testing.tiny_model()\n"
        "llama1m_ext.set_options(model, chunk=16, progress=True)\n"
        "with torch.no_grad():\n    model(testing.random_ids(1, 60))"
    )
    first = "pass" if widgets else "import sys; sys.modules['ipywidgets'] = None"
    notebook = new_notebook(cells=[new_code_cell(first), new_code_cell(prefill)])
    text = execute(notebook)
    shown = [output for output in notebook.cells[1].outputs if output.output_type == "display_data"]
    assert "Traceback" not in text
    if widgets:
        (bar,) = [o for o in shown if "application/vnd.jupyter.widget-view+json" in o.data]
        assert bar.data["text/plain"].startswith("prefill")
        states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
        (state,) = [s["state"] for s in states if s["model_name"] == "FloatProgressModel"]
        assert state["value"] == state["max"] > 0
        assert state["bar_style"] == "success"
    else:
        assert not shown
        assert re.search(r"prefill 100%\|█+\| 60/60 tokens", text)


def test_notebook_and_readme_have_the_card_s_snippets_word_for_word():
    import nbformat

    notebook = nbformat.read(EXAMPLES / "04_model_card.ipynb", as_version=4)
    cells = [cell.source.strip() for cell in notebook.cells]
    for script in ("01_pipeline.py", "02_generate.py"):
        head, _, card = (EXAMPLES / script).read_text(encoding="utf-8").partition(CARD)
        assert "import llama1m_ext" in head
        assert card.strip() in cells, script
    card = (EXAMPLES / "01_pipeline.py").read_text(encoding="utf-8").partition(CARD)[2]
    assert card.strip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_are_short():
    for path in EXAMPLES.glob("[0-9]*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name
