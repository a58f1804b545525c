"""The bench: its timing and judging logic on made-up calls, then both benches end to end at tiny sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from llama1m_ext.bench import attention, backward, decode, harness, plot
from llama1m_ext.bench.harness import OURS, Call, Case, Clock, Limit


def made_up_case(calls: list[Call], limits: list[float], void_spread: float | None = 1.3) -> Case:
    answers = iter(limits)
    return Case(
        name="made up",
        dtype="f32",
        unit="GB/s",
        shape={"q_len": 2},
        calls=calls,
        limit=Limit("limit", lambda clock: next(answers), void_spread),
        reference=torch.zeros(1, 1, 2, 1, dtype=torch.float64),
        rows=torch.tensor([0, 3]),
    )


def test_alternate_takes_each_sampler_once_a_round_in_order():
    seen: list[str] = []

    def sampler(name: str, value: float):
        return lambda: (seen.append(name), value + len(seen))[1]

    samples = harness.alternate({"a": sampler("a", 0), "b": sampler("b", 100)}, rounds=3)
    assert seen == ["a", "b"] * 3
    assert samples == {"a": [1, 3, 5], "b": [102, 104, 106]}
    with pytest.raises(ValueError, match=r"rounds: expected at least 1, got 0"):
        harness.alternate({}, 0)


def test_measure_takes_medians_ratios_fractions_and_the_fastest_torch(monkeypatch):
    # Seconds by name and round; one slow outlier each, which a median does not see.
    times = {OURS: [1.0, 9.0, 1.0], "slow": [4.0, 4.0, 40.0], "fast": [2.0, 2.0, 2.0], "other": [0.5, 0.5, 0.5]}
    left = {name: iter(values) for name, values in times.items()}
    order: list[str] = []

    def run_of(name: str):
        def run():
            order.append(name)
            return torch.zeros(1, 1, 4, 1) + (0.25 if name == "fast" else 0)

        return run

    calls = [Call(name, run_of(name), work=8e9, yardstick=name != "other") for name in times]
    names = {id(call.run): call.name for call in calls}
    monkeypatch.setattr(harness, "seconds", lambda run, clock: (run(), next(left[names[id(run)]]))[1])
    record = harness.measure(made_up_case(calls, [16e9, 20e9, 16e9]), rounds=3)

    assert order == list(times) * 4, "one judged warm-up round, then three"
    ours, slow, fast, other = record["candidates"]
    assert [one["median_s"] for one in record["candidates"]] == [1.0, 4.0, 2.0, 0.5]
    assert (ours["rate"], ours["fraction"]) == (8.0, 0.5)
    assert (slow["ratio"], fast["ratio"], other["ratio"]) == (4.0, 2.0, 0.5)
    assert record["yardstick"] == "fast", "the fastest of those that may be one; `other` may not"
    assert record["ratio"] == 2.0
    assert (ours["max_error"], fast["max_error"]) == (0.0, 0.25)
    assert record["limit"]["spread"] == 1.25
    assert not record["void"]
    assert json.loads(json.dumps(record)) == record
    text = "\n".join(harness.lines(record))
    assert "ours 2.00x  <- yardstick" in text
    assert "VOID" not in text


def test_a_raw_read_that_varies_voids_the_case():
    calls = [Call(OURS, lambda: torch.zeros(1, 1, 4, 1), 1.0)]
    record = harness.measure(made_up_case(calls, [1e9, 1.31e9]), rounds=2)
    assert record["void"]
    assert "VOID" in "\n".join(harness.lines(record))
    assert record["yardstick"] is None
    assert not harness.measure(made_up_case(calls, [1e9, 1.31e9], void_spread=None), rounds=2)["void"]


def test_a_wrong_result_is_seen_and_a_wrong_shape_refused():
    def judged(out):
        return harness.measure(made_up_case([Call(OURS, lambda: out, 1.0)], [1.0]), rounds=1)

    # Only the sampled rows 0 and 3 count.
    out = torch.tensor([0.0, 9.0, 9.0, -2.0]).reshape(1, 1, 4, 1)
    assert judged(out)["candidates"][0]["max_error"] == 2.0
    assert math.isnan(judged(out * math.nan)["candidates"][0]["max_error"])
    with pytest.raises(ValueError, match="expected rows of shape"):
        judged(torch.zeros(1, 2, 4, 1))
    with pytest.raises(TypeError, match="expected a Tensor, got int"):
        judged(3)


def test_the_cpu_clock_counts_work_and_not_waiting():
    import time

    assert harness.seconds(lambda: time.sleep(0.05), Clock("wall")) > 0.04
    assert harness.seconds(lambda: time.sleep(0.05), Clock("cpu")) < 0.04
    with pytest.raises(ValueError, match="clock: expected wall or cpu, got 'sun'"):
        Clock("sun")


def test_threads_are_set_inside_and_restored_after():
    before = torch.get_num_threads()
    with harness.torch_threads(1) as count:
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("q_len", [1, 2, 15, 16, 17, 4096])
def test_sampled_rows_have_both_ends(q_len):
    rows = harness.sample_rows(q_len).tolist()
    assert rows[0] == 0
    assert rows[-1] == q_len - 1
    assert len(set(rows)) == len(rows) == min(q_len, 16)


@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 5), (3, 11)])
def test_reference_is_attention(q_len, kv_len):
    torch.manual_seed(0)
    q = torch.randn(2, 4, q_len, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, kv_len, 8, dtype=torch.float64)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    rows = torch.tensor([0, q_len - 1])
    got = harness.reference_rows(q, k, v, rows, q_start=kv_len - q_len)
    torch.testing.assert_close(got, want[:, :, rows])


@pytest.mark.parametrize("dtype", list(harness.DTYPES))
def test_the_ways_to_ask_torch_for_a_decode_step_agree(dtype):
    one = decode.case(dtype, 300, (8, 2, 64), threads=1, batch=2, page_size=128)
    wanted = one.reference
    assert len(one.calls) == 5
    bound = {"bf16": 2e-2, "f16": 2e-3, "f32": 1e-5}[dtype]
    for call in one.calls:
        got = call.output(call.run()).double()
        assert got.shape == wanted.shape, call.name
        assert (got - wanted).abs().max() < bound, call.name


def test_prefill_cases_compute_what_they_say():
    square = attention.case("f32", 96, 96, (4, 1, 64), threads=1)
    chunk = attention.case("f32", 32, 96, (4, 2, 64), threads=1)
    for one in (square, chunk):
        for call in one.calls:
            error = (call.run()[:, :, one.rows].double() - one.reference).abs().max()
            assert (error < 1e-5) == call.yardstick, call.name
    pairs = sum(64 + i + 1 for i in range(32))
    assert chunk.calls[0].work == 4 * 64 * 4 * pairs


@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-5), ("bf16", 0.1)])
def test_backward_cases_compute_what_they_say(dtype, bound):
    one = backward.case(dtype, 300, (4, 2, 64), threads=1)
    assert len(one.calls) == 3
    assert one.reference.shape == (1, 4 + 2 * 2, 300, 64)
    for call in one.calls:
        assert call.work == 10 * 64 * 4 * sum(range(301))
        error = (call.output(call.run()).double() - one.reference).abs().max()
        assert 0 < error < bound, call.name
    wrong = one.calls[0].output(tuple(x * 1.5 for x in one.calls[0].run()))
    assert (wrong.double() - one.reference).abs().max() > bound


def test_backward_reference_is_autograd_s():
    q, grad = torch.randn(2, 1, 4, 300, 16)
    k, v = torch.randn(2, 1, 2, 300, 16)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    want = torch.cat(torch.autograd.grad(out, inputs, grad.double()), 1)
    torch.testing.assert_close(backward.reference(q, k, v, grad), want)


def test_words_of_the_command_line():
    gradients = backward.plan(dtypes="bf16", squares="64,96", heads="8x2x64", threads=1, clock="cpu")
    assert (gradients.lengths, gradients.heads, gradients.clock.name) == ([64, 96], (8, 2, 64), "cpu")
    assert backward.plan(quick=True).lengths == [512]
    with pytest.raises(ValueError, match="squares: expected N with positive integers"):
        backward.plan(squares="64x64")
    plan = attention.plan(dtypes="f32, bf16", squares="64,128", chunks="16x64", heads="8X2x64")
    assert plan.shapes == [(64, 64), (128, 128), (16, 64)]
    assert plan.heads == (8, 2, 64)
    assert plan.dtypes == ["f32", "bf16"]
    assert attention.plan(squares="64", chunks="").shapes == [(64, 64)]
    for bad, message in [
        ({"dtypes": "int8"}, "dtypes: expected some of bf16, f32, f16, got 'int8'"),
        ({"squares": "64x64"}, "squares: expected N with positive integers"),
        ({"squares": "-3"}, "squares: expected N with positive integers"),
        ({"chunks": "64"}, "chunks: expected NxN"),
        ({"chunks": "64x32"}, "chunks: expected q_len <= kv_len, got 64x32"),
        ({"heads": "4x3x64"}, "heads: expected kv_heads to divide q_heads=4, got 3"),
        ({"heads": ""}, "heads: expected one"),
        ({"peers": "nobody"}, "peers: expected some of onnxruntime, got 'nobody'"),
        ({"clock": "cpu", "threads": 2}, "clock: expected wall unless threads is 1"),
    ]:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            attention.plan(**bad)


def test_benches_run_report_and_draw(tmp_path, capsys):
    prefill = attention.run(attention.plan("f32,bf16", "64", "16x96", "4x2x64", rounds=2))
    step = decode.run(decode.plan("bf16", "512", "4x2x64", page_size=100, rounds=2))
    gradients = backward.run(backward.plan("f32", "64", "4x2x64", rounds=2))
    text = capsys.readouterr().out
    for report, unit, count in ((prefill, "GFLOP/s", 4), (step, "GB/s", 1), (gradients, "GFLOP/s", 1)):
        assert len(report["cases"]) == count
        assert json.loads(json.dumps(report))["bench"] == report["bench"]
        for record in report["cases"]:
            assert record["unit"] == unit
            assert record["yardstick"].startswith("torch")
            assert record["ratio"] > 0
            ours = record["candidates"][0]
            assert ours["name"] == OURS
            assert len(ours["samples_s"]) == 2
            assert 0 < ours["max_error"] < 2e-2
            assert f"{record['name']}, {record['dtype']}" in text
        target = tmp_path / f"{report['bench']}.png"
        plot.draw(report, target)
        assert target.read_bytes().startswith(b"\x89PNG")
    assert "max error" in text


def test_onnxruntime_as_a_peer():
    one = attention.case("f32", 64, 64, (4, 2, 64), threads=1, peers=["onnxruntime"])
    call = one.calls[-1]
    assert call.name.startswith("onnxruntime")
    error = (call.output(call.run())[:, :, one.rows].double() - one.reference).abs().max()
    assert error < 1e-5
