"""`llama1m bench kv`: its figures against what they must be, at small sizes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from llama1m_ext.bench import kv, kv_quality, kv_variants
from llama1m_ext.cli import app
from llama1m_ext.formats import KvFormat
from llama1m_ext.testing import compact_reference, dense_reference


@pytest.fixture(scope="module")
def report():
    return kv.run(kv.plan(kv_len="1000", heads="8x2x64", rounds=3, threads=2))


def test_bytes_are_the_formats_own(report):
    for row in report["cases"][0]["formats"]:
        exact = KvFormat.parse(row["format"]).token_bytes(2, 64, 2)
        # Keys come in whole groups of 64 tokens: 1000 are 1024.
        assert exact <= row["bytes_per_token"] <= exact * 1024 / 1000


def test_errors_are_ordered_and_the_kernel_adds_little(report):
    error = {row["format"]: row["error"] for row in report["cases"][0]["formats"]}
    assert error["model"] < error["int8"] < error["fp8"] < error["int4"] < 0.5
    assert error["int8"] < error["int8/int4"] < error["int4"]
    for row in report["cases"][0]["formats"]:
        assert row["kernel_error"] < 0.006, row


def test_ratios_are_of_the_medians(report):
    record = report["cases"][0]
    first = record["formats"][0]
    for row in record["formats"]:
        assert row["faster"] == pytest.approx(first["median_s"] / row["median_s"])
        assert row["smaller"] == pytest.approx(first["bytes_per_token"] / row["bytes_per_token"])
        assert row["of_bytes"] == pytest.approx(row["faster"] / row["smaller"])
        assert row["rate"] == pytest.approx(row["bytes_per_token"] * 1000 / row["median_s"] / 1e9)
        assert len(row["samples_s"]) == 3 and row["write_tokens_per_s"] > 0
    json.dumps(report)


def test_bad_plans_name_the_option():
    for words, message in (
        ({"formats": "int8"}, 'formats: expected "model" first'),
        ({"formats": "model,int3"}, "kv: expected one of"),
        ({"dtype": "f8"}, "dtype: expected one of"),
        ({"peers": "gguf"}, "peers: expected some of"),
        ({"kv_len": "0"}, "kv_len: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            kv.plan(**words)


def test_peers_that_cannot_run_say_why():
    plan = kv.plan(formats="model,int4", heads="4x2x64", peers="", peer_len=256, rounds=3)
    found = {one["name"]: one for one in kv.peers(plan)}
    ours = found["LongCache(kv='int4')"]
    assert ours["kv_len"] == 256 and ours["error"] < 0.4 and found["LongCache(kv='model')"]["error"] < 0.01
    assert "DynamicCache(offloading=True)" in found
    assert any("does not run here" in text for text in kv.peer_lines([{"name": "x", "why": "RuntimeError: no"}]))


@pytest.mark.parametrize("error", [ImportError("no package"), AttributeError(), TypeError("two\nlines")])
def test_a_failure_is_told_of_a_peer_and_raised_of_ours(error):
    def make():
        raise error

    plan = kv.plan(formats="model", heads="4x2x64", peer_len=64, rounds=3)
    first = (str(error).splitlines() or [""])[0]
    assert kv._step("QuantizedCache", make, plan) == {
        "name": "QuantizedCache",
        "why": f"{type(error).__name__}: {first}",
    }
    with pytest.raises(type(error)):
        kv._step("LongCache(kv='model')", make, plan)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_the_shipped_variants_are_what_is_shipped(name):
    k, v = kv.llama_like(2, 128, 128, torch.float32)
    variant = next(one for one in kv_variants.variants() if one.name.startswith(f"{name} (shipped)"))
    for side, x, which in ((variant.k, k, "k"), (variant.v, v, "v")):
        ours = dense_reference(compact_reference(x, name, which), which, 128)
        # Codes differ where offsets, which begin elsewhere, are rounded otherwise; the error is the same.
        off = (side(x) - x).pow(2).mean().sqrt()
        assert off == pytest.approx(float((ours - x.double()).pow(2).mean().sqrt()), rel=0.03)


def test_turning_and_centring_give_back_what_they_took():
    exact = lambda x: x  # noqa: E731
    x = torch.randn(3, 70, 64)
    for how in (kv_variants.turned(exact), kv_variants.centred(exact)):
        assert torch.allclose(how(x), x, atol=1e-5)


def test_variants_rank_as_the_literature_has_it():
    # One channel far larger than the rest: a scale for each token spends its steps on it.
    k, v = kv.llama_like(2, 512, 128, torch.float32)
    q = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(1))
    score = {one.name: kv_variants.errors(one, q, k[0], v[0])[0] for one in kv_variants.variants()}
    shipped = score["int4 (shipped): K per channel, V per token"]
    assert shipped < 0.6 * score["int4: K and V turned (Hadamard), per token"]
    assert shipped < 0.4 * score["int4: K and V per token"]
    assert score["int8 (shipped)"] < 0.1 * shipped


def test_quality_on_the_demo_model(capsys):
    rows = kv_quality.quality(tokens=1024, needles=2, rest=64, keys=256)
    shipped = [row["shipped"] for row in rows if row["shipped"]]
    assert shipped == ["model", "int8", "fp8", "int8/int4", "int4"] and len(rows) >= 8
    base = rows[0]
    assert base["found"] == 2 and base["score_error"] == base["out_error"] == 0
    for row in rows[1:]:
        assert row["bytes_per_token"] < base["bytes_per_token"]
        assert 0 < row["out_error"] < 0.6 and abs(row["perplexity"] / base["perplexity"] - 1) < 0.1
    assert capsys.readouterr().out.count("\n") == len(rows)


def test_command_line(tmp_path):
    out = tmp_path / "kv.json"
    result = CliRunner().invoke(
        app, ["bench", "kv", "--quick", "--heads", "4x2x64", "--threads", "2", "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "of its bytes" in result.output and json.loads(out.read_text())["cases"][0]["formats"][4]["format"] == "int4"
    assert CliRunner().invoke(app, ["bench", "kv", "--formats", "int4"]).exit_code == 2
