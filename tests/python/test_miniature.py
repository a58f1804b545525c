"""The miniature: its script runs from beginning to end, and the results that are kept say what its README says."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from llama1m_ext.rope import theta_for
from llama1m_ext.train import Run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
KEPT = EXAMPLES / "miniature"


@pytest.fixture(scope="module")
def results():
    return json.loads((KEPT / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def shown(monkeypatch):
    """The module that makes tables of results."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import miniature_results

    return miniature_results


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script, and returns what it printed. In this process: importing torch again would take longer than all else."""
    from transformers.utils import logging

    monkeypatch.syspath_prepend(EXAMPLES)
    verbosity = logging.get_verbosity()

    def script(out):
        import train_miniature

        with warnings.catch_warnings():
            train_miniature.main(["--out", str(out), "--smoke"])
        return capsys.readouterr().out

    yield script
    logging.set_verbosity(verbosity)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_makes_everything_and_goes_on(run, tmp_path):
    out = tmp_path / "out"
    text = run(out)
    made = json.loads((out / "results.json").read_text(encoding="utf-8"))
    names = list(made["variants"])
    assert names == list(json.loads((KEPT / "results.json").read_text(encoding="utf-8"))["variants"])
    assert made["variants"]["kept"]["theta"] == made["variants"]["first"]["theta"] == 10_000
    for folder, lengths in (("extended", [512, 1024, 2048]), ("kept", [512, 1024, 2048])):
        steps = [json.loads(line) for line in (out / folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [one["tokens"] for one in steps if "loss" in one] == [1024] * 4 + [2048] * 2, folder
        stages = [one for one in steps if "folder" in one]
        assert [one["length"] for one in stages] == lengths
    for name in names:
        assert (out / f"needle-{name}.png").read_bytes().startswith(b"\x89PNG")
        cells = made["variants"][name]["needle"]
        assert sorted({cell["length"] for cell in cells}) == [512, 1024] and len(cells) == 22
    assert (out / "perplexity.png").stat().st_size > 10_000
    tables = (out / "results.md").read_text(encoding="utf-8")
    assert tables in text

    # The last part is lost: only that one is made again.
    (out / "measured" / "extended.json").unlink()
    (out / "results.json").unlink()
    again = run(out)
    assert re.findall(r"^(.*): [\d.]+ s, ", again, re.M) == ["measuring extended"]
    assert (out / "results.md").read_text(encoding="utf-8") == tables


def test_stages_follow_the_card_s_rule():
    run = Run.read(KEPT / "stages.toml")
    assert [stage.method for stage in run.stages] == ["gradient-v1"] * len(run.stages)
    thetas = [
        theta_for(stage.length, method="gradient-v1", theta=10_000, original_max_len=512, head_dim=64)
        for stage in run.stages
    ]
    assert [stage.length for stage in run.stages] == [8 * 512, 16 * 512, 32 * 512]
    assert thetas == [323_275, 1_702_509, 4_565_087]


def test_the_extended_one_finds_what_the_others_do_not(results, shown):
    """The claim of the method: at 16 times its first length and more, at least 95% found, where the model left alone fails."""
    variants = {name: shown.report_of(variant) for name, variant in results["variants"].items()}
    first = results["first_length"]
    assert first == 512
    assert variants["first"].accuracy(first) >= 0.95
    for factor, questions in ((16, 44), (32, 22)):
        at = factor * first
        cells = [cell for cell in variants["extended"].cells if cell.length == at]
        assert len(cells) == 11 and sum(cell.samples for cell in cells) == questions
        assert variants["extended"].accuracy(at) >= 0.95, factor
        assert variants["first"].accuracy(at) <= 0.05, factor
        assert variants["kept"].accuracy(at) <= 0.5, factor
        for name in (name for name in variants if name.startswith("theta-")):
            assert variants[name].accuracy(at) < variants["extended"].accuracy(at), (name, factor)


def test_perplexity_stays_flat_where_the_first_one_s_rises(results):
    def by_end(name):
        return {bucket["end"]: bucket["nll"] for bucket in results["variants"][name]["perplexity"]["buckets"]}

    first, extended = by_end("first"), by_end("extended")
    for end in (8192, 16384):
        assert first[end] > first[512] + 0.5
        assert extended[end] < extended[512] + 0.15
        assert extended[end] < first[end] - 0.5
        for name in (name for name in results["variants"] if name.startswith("theta-")):
            assert extended[end] < by_end(name)[end] - 0.1, name


def test_the_readme_has_the_tables_and_pictures(results, shown):
    readme = (KEPT / "README.md").read_text(encoding="utf-8")
    for table in re.split(r"\n\n(?=Perplexity)", shown.tables(results).strip()):
        assert table in readme
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
    assert "needle-extended.png" in pictures and "needle-first.png" in pictures and "perplexity.png" in pictures
    kept = {path.name for path in KEPT.glob("*.png")}
    assert set(pictures) == kept
    assert all((KEPT / name).stat().st_size < 150_000 for name in kept)
