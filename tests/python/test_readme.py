"""The README's code is run as it stands, but for the model's path; its commands are commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama1m_ext.cli import app

README = Path(__file__).parents[2] / "README.md"
MODEL = "gradientai/Llama-3-8B-Instruct-Gradient-1048k"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[int, str]]:
    """(line of its first code line, code) of each fenced block of a language."""
    text = README.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(2)) + 1, match.group(2))
        for match in FENCE.finditer(text)
        if match.group(1) == language
    ]


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for _, block in blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("llama1m ")]


def test_python_blocks_run_in_order(tmp_path):
    from llama1m_ext import testing

    found = blocks("python")
    assert len(found) >= 4
    assert MODEL in found[0][1], "the first block names the model; nothing else may need a substitution"
    checkpoint = testing.tiny_checkpoint(tmp_path / "model")
    # One script, each line where the README has it, so that a traceback's line numbers are the README's.
    lines: list[str] = []
    for start, code in found:
        lines += [""] * (start - 1 - len(lines))
        lines += code.replace(MODEL, str(checkpoint)).splitlines()
    script = tmp_path / "README.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, str(script)], capture_output=True, encoding="utf-8", timeout=240, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
    counted = re.search(r"Stats\(served=(\d+), stock=(\{.*?\})", answer.stdout)
    assert counted is not None, answer.stdout
    assert int(counted.group(1)) > 0, "our kernel computed the pipeline's attention"
    assert counted.group(2) == "{}", "and nothing took the stock path"


def test_the_two_commands_stand_on_the_first_screen():
    first_screen = README.read_text(encoding="utf-8").splitlines()[:40]
    assert "pip install . && llama1m demo" in "\n".join(first_screen)
    assert "pip install '.[test]' && pytest" in "\n".join(first_screen)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_exists_with_its_options(command):
    words = shlex.split(command)[1:]
    answer = CliRunner().invoke(app, [*words, "--help"])
    assert answer.exit_code == 0, answer.output


def test_an_unknown_option_would_be_seen():
    assert CliRunner().invoke(app, ["demo", "--no-such-option", "--help"]).exit_code == 2


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
