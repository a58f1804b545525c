"""Every example runs as it stands, at a small size, with the model that the package ships."""

from __future__ import annotations

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


def run(script: str, *words: str) -> str:
    answer = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *words],
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        cwd=EXAMPLES,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_every_numbered_example_is_run_here():
    scripts = {path.name for path in EXAMPLES.glob("[0-9]*.py")}
    assert scripts == set(WORDS)
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["04_model_card.ipynb"]


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


def test_notebook(monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("TOKENS", "2048")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "04_model_card.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    text = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )
    assert "2048 tokens and" in text


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
