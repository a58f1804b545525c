"""What training will take is within 10% of what real processes take."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crew import crew
from llama1m_ext import DoesNotFit
from llama1m_ext.plan_bytes import Peak
from llama1m_ext.plan_shape import PRESETS, of_config
from llama1m_ext.testing import tiny_config, tiny_model
from llama1m_ext.train import Lora, Run, Stage, StagesError, plan
from llama1m_ext.train.layer import KEEP
from llama1m_ext.train.plan_bytes import Step, ce_chunk, flops, parts, peaks

CARD = "gradientai/Llama-3-8B-Instruct-Gradient-1048k"
FIELDS = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 8000,
}
WIDE = {"num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 1000, "intermediate_size": 512}
"""Much of a step is keys and values here, which travel between processes that share a row."""
THRESHOLD = 1 << 18
"""Bytes from which malloc maps what it gives, and unmaps it when it is free."""


def measured(asked: dict[str, Any]) -> int:
    """Bytes that this process takes at most for two steps, beside what libraries keep."""
    from transformers import LlamaForCausalLM

    from llama1m_ext.train.devices import Devices
    from llama1m_ext.train.forward import Trainee, shift
    from llama1m_ext.train.kept import place
    from llama1m_ext.train.layer import How
    from llama1m_ext.train.models import trained
    from llama1m_ext.train.optimizer import Optimizer
    from llama1m_ext.train.team import Team, team_of

    torch.set_num_threads(1)
    devices, team = Devices(asked["rank"], asked["ring"]), Team(0, 1, 1)
    if asked["ring"] > 1:
        if not torch.distributed.is_initialized():
            at = {"init_method": f"file://{asked['store']}", "rank": asked["rank"], "world_size": asked["ring"]}
            torch.distributed.init_process_group("gloo", **at)
        team = team_of(devices, asked["ring"])

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

    def make(fields: dict[str, int]) -> LlamaForCausalLM:
        torch.set_default_dtype(getattr(torch, asked["dtype"]))
        model = LlamaForCausalLM(tiny_config(**fields))
        torch.set_default_dtype(torch.float32)
        return model.train()

    def run(model: LlamaForCausalLM, lengths: list[int]) -> None:
        trainee, where = Trainee(model), place(None if asked["offload"] == "none" else asked["offload"])
        optimizer = Optimizer(trained(model), Stage(2, 1))
        for n in lengths:  # a short step first, after which the optimizer has its states
            how = How(asked["keep"], where, asked["chunk"], team.attention(n, None))
            for _ in range(asked["passes"]):
                ids = torch.randint(0, 100, (asked["rows"], n))
                mine, labels, _ = team.share({"input_ids": ids}, shift(ids)[0], None)
                places, over = mine.get("position_ids"), {"denominator": n, "ce_chunk": asked["ce_chunk"]}
                with torch.autocast("cpu", torch.bfloat16, enabled=asked["autocast"]):
                    loss = trainee(mine["input_ids"], labels, None, places, how=how, **over)
                loss.backward()
                where.clear()
            devices.add_up(optimizer.gradients())
            optimizer.clipped()
            optimizer.step(1e-5)

    # What libraries load and keep when they are first used is no part of a step.
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    run(make(asked["fields"] | small), [256])
    before = memory("VmRSS")
    model = make(asked["fields"])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run(model, [64, asked["length"]])
    return memory("VmHWM") - before


def asked_of(
    dtype, length, keep, passes=1, rows=1, autocast=False, offload="none", chunk=256, ce_chunk=128, ring=1, outer=1
) -> tuple[dict[str, Any], list[Peak]]:
    """What `measured` is told, and what is predicted."""
    fields = FIELDS if ring == 1 else FIELDS | WIDE
    step = Step(length // ring, rows, passes, keep, offload, chunk, ce_chunk, autocast, ring=ring, outer=outer)
    asked = {"dtype": dtype, "length": length, "keep": keep, "passes": passes, "rows": rows, "autocast": autocast}
    asked |= {"offload": offload, "chunk": chunk, "ce_chunk": ce_chunk, "fields": fields, "ring": ring, "rank": 0}
    return asked, peaks(of_config(tiny_config(**fields), dtype), step)


def start(asked: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    script = "import json, sys; from test_train_plan import measured; print(measured(json.loads(sys.argv[1])))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # Large tensors are given back at once, as those of a large model are; glibc keeps what is below 32 MB for itself.
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(THRESHOLD)}
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(asked)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **own, **environment},
    )


def ended(process: subprocess.Popen[str]) -> int:
    out, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    return int(out.splitlines()[-1])


def compare(found: int, predicted: list[Peak], what: str) -> None:
    worst, off = predicted[0], predicted[0].bytes / found - 1
    print(f"| {what} | {worst.bytes / 1e6:.0f} MB | {found / 1e6:.0f} MB | {off:+.1%} | {worst.phase}")
    assert abs(off) <= 0.1, f"{what}: predicted {worst}, measured {found / 1e6:.1f} MB, {off:+.1%}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "case",
    [
        ("float32", 2048, "attention"),
        ("float32", 2048, "inputs"),
        ("float32", 2048, "all"),
        ("bfloat16", 2048, "all"),
        ("bfloat16", 2048, "attention", 2),
        ("float32", 4096, "attention", 2),
        ("float32", 2048, "attention", 1, 1, True),
        ("bfloat16", 4096, "inputs"),
        ("float32", 4096, "attention", 1, 1, False, "disk"),
        ("float32", 1024, "attention", 2, 3),
        ("bfloat16", 8192, "attention"),
    ],
)
def test_predicted_peaks(case):
    asked, predicted = asked_of(*case)
    compare(ended(start(asked)), predicted, " | ".join(map(str, case)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("ring", "outer", "case"),
    [
        (2, 1, ("float32", 8192, "attention")),
        (2, 1, ("bfloat16", 8192, "attention", 2)),
        (2, 1, ("float32", 4096, "all")),
        (2, 1, ("bfloat16", 8192, "inputs")),
        (3, 1, ("float32", 6144, "attention", 1, 2)),
        (4, 1, ("float32", 8192, "attention")),
        (6, 2, ("float32", 12288, "attention")),
    ],
)
def test_predicted_peaks_of_processes_that_share_rows(tmp_path, ring, outer, case):
    """Each of them."""
    asked, predicted = asked_of(*case, ring=ring, outer=outer)
    more = {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": str(ring // outer)}
    processes = [start({**asked, "rank": rank, "store": str(tmp_path / "store")}, **more) for rank in range(ring)]
    for rank, found in enumerate([ended(process) for process in processes]):
        compare(found, predicted, f"rank {rank} of {ring} ({outer}) | {' | '.join(map(str, case))}")


@pytest.mark.parametrize(
    ("ring", "case"), [(1, ("float32", 2048, "attention", 2)), (2, ("float32", 4096, "attention"))]
)
def test_a_predicted_peak(ring, case):
    """In processes that are forked with all libraries in them."""
    asked, predicted = asked_of(*case, ring=ring)
    with crew(ring) as made:
        for rank, found in enumerate(made.run(ring, measured_here, asked)):
            compare(found, predicted, f"rank {rank} of {ring} | {' | '.join(map(str, case))}")


def measured_here(group: Any, asked: dict[str, Any]) -> int:
    """In a process of a crew."""
    ctypes.CDLL(None).mallopt(-3, THRESHOLD)  # M_MMAP_THRESHOLD
    return measured({**asked, "rank": torch.distributed.get_rank(group)})


# -- arithmetic ---------------------------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    """facts/science.md: a checkpoint of a layer's input is 262,144 bytes a token over all layers; out and log-sum-exps add
    8.3 KB a token and layer; the whole schedule is 8.9e20 floating-point operations without what is made again."""
    shape = PRESETS[CARD]
    inputs, kept = (parts(shape, Step(1 << 17, keep=keep)).kept for keep in ("inputs", "attention"))
    assert inputs == 262_144 << 17
    assert (kept - inputs) / 32 / (1 << 17) == 8192 + 128
    assert parts(shape, Step(1 << 16)).checkpoint == 12 * 8_030_261_248
    stages = Run.read().stages
    total = sum(stage.steps * sum(flops(shape, Step(stage.length, passes=stage.rows, keep="all"))) for stage in stages)
    assert total == pytest.approx(1.1e21, rel=0.1)
    one = flops(shape, Step(1 << 20, keep="all"))
    assert sum(one) == pytest.approx(1.055e18, rel=0.01)
    assert sum(flops(shape, Step(1 << 20, keep="inputs"))) == pytest.approx(1.36e18, rel=0.01)


def test_more_kept_takes_more():
    shape = PRESETS[CARD]
    for length in (1 << 16, 1 << 18, 1 << 20):
        found = [peaks(shape, Step(length, keep=keep))[0].bytes for keep in KEEP]
        assert found == sorted(found, reverse=True)
        assert peaks(shape, Step(length, offload="disk"))[0].bytes < found[1]
        assert peaks(shape, Step(length, shards=8))[0].bytes < found[1]
        assert peaks(shape, Step(length, trained=10_000_000))[0].bytes < found[1]


def test_chunks_are_what_the_loss_takes():
    from llama1m_ext.train.cross_entropy import chunk_len

    for vocab in (261, 8000, 128_256):
        assert ce_chunk(vocab, False) == chunk_len(vocab, torch.device("cpu"))
        assert ce_chunk(vocab, True) == chunk_len(vocab, torch.device("cuda"))


def test_what_is_kept_follows_from_memory():
    shape = of_config(tiny_config(**FIELDS), "float32")
    needs = {keep: peaks(shape, Step(8192, keep=keep, ce_chunk=128))[0].bytes for keep in KEEP}
    stages, given = [Stage(8192, 1)], {"dtype": "float32", "measure": False, "threads": 1, "ce_chunk": 128}
    for keep in KEEP:
        made = plan(tiny_config(**FIELDS), stages, memory=int(needs[keep] / 0.89), **given)
        assert made.stages[0].keep == keep and made.fits
        made.check()
    made = plan(tiny_config(**FIELDS), stages, memory=needs["inputs"] * 3 // 4, **given)
    assert not made.fits and made.stages[0].keep == "inputs"
    with pytest.raises(
        DoesNotFit, match=r"stage 8k: training at 8192 tokens takes .* MiB in .*are there. Ways out: \[lora\]"
    ) as e:
        made.check()
    assert e.value.needed > e.value.available == needs["inputs"] * 3 // 4
    assert "stage 8k does not fit" in str(made)


def test_a_run_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    from llama1m_ext import memory
    from llama1m_ext.train import extend

    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    rows = [{"input_ids": [1] * 4096}]
    with pytest.raises(DoesNotFit, match="stage 4k: training at 4096 tokens takes"):
        extend(tiny_model(), [Stage(4096, 1)], tmp_path / "out", data=rows, dtype="float32")
    assert not (tmp_path / "out").exists()


def test_processes_on_one_machine_share_its_memory(tmp_path, monkeypatch):
    from llama1m_ext import memory
    from llama1m_ext.train import extend

    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 << 29)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    rows = [{"input_ids": [1] * 65536}]
    with pytest.raises(DoesNotFit, match=r"training at 65536 tokens takes .*, and 9[67]\.. MiB are there"):
        extend(tiny_model(), [Stage(65536, 1)], tmp_path / "out", data=rows, dtype="float32")


def test_lora_is_counted():
    from llama1m_ext.train.models import trained, with_adapters
    from llama1m_ext.train.planning import trained_elements
    from llama1m_ext.train.stages import Settings

    lora = Lora(rank=3, targets=("q_proj", "k_proj", "down_proj"), also=("norm", "embed_tokens"))
    model = with_adapters(tiny_model(), lora)
    counted = sum(p.numel() for name, p in trained(model))
    assert trained_elements(of_config(tiny_config(), "float32"), Settings(lora=lora)) == counted


def test_command(tmp_path):
    from typer.testing import CliRunner

    from llama1m_ext.cli import app

    file = tmp_path / "plan.json"
    answer = CliRunner().invoke(app, ["extend", CARD, "--plan", "--memory", "600GiB", "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    assert "stage 1048k: 1,048,576 tokens, theta 2804339835; 50 steps of 16 rows" in answer.output
    made = json.loads(file.read_text())
    assert [stage["fits"] for stage in made["stages"]] == [True] * 4
    assert made["stages"][0]["parts"]["moments"] == 8 * 8_030_261_248
    assert made["devices"] == 1 and "to a row" not in answer.output
    answer = CliRunner().invoke(app, ["extend", CARD, "--plan", "--stages", str(tmp_path / "none.toml")])
    assert answer.exit_code == 1 and "expected a file of TOML" in answer.output


def test_devices_that_share_rows():
    """Eight to a row: an eighth of what is kept, the same work in all, and blocks that travel."""
    more = {"shard": True, "gpu": True, "memory": "80GiB", "measure": False, "keep": "attention"}
    alone = plan(CARD, devices=16, **more).stages[-1]
    more["devices"] = 64
    shared, all_of_them = (plan(CARD, sequence_parallel=n, **more).stages[-1] for n in (8, 64))
    assert (shared.step.length, shared.step.passes, all_of_them.step.passes) == (131072, 2, 16)
    assert alone.parts.kept == 8 * shared.parts.kept == 64 * all_of_them.parts.kept
    assert shared.flops == all_of_them.flops and shared.parts.layer > alone.parts.layer / 8
    assert all_of_them.fits and not shared.fits
    with pytest.raises(ValueError, match="sequence_parallel: expected a divisor of the 64 devices, got 3"):
        plan(CARD, sequence_parallel=3, **more)
    with pytest.raises(StagesError, match=r"stage 65k: expected .* a multiple of 64 processes, got 1 \* 32"):
        plan(CARD, **more)
    with pytest.raises(StagesError, match=r"rows_at_once: expected a divisor of the 8 rows .*, got 3"):
        plan(CARD, [Stage(4096, 1, batch_size=16, rows_at_once=3)], devices=4, sequence_parallel=2, measure=False)


def test_the_command_plans_for_processes_that_share_rows(tmp_path):
    """As Python's `plan` does; without --ranks there are as many as share a row."""
    from typer.testing import CliRunner

    from llama1m_ext.cli import app

    def invoked(*more):
        answer = CliRunner().invoke(app, ["extend", CARD, "--plan", "--memory", "80GiB", *more])
        return answer.exit_code, answer.output

    file = tmp_path / "plan.json"
    code, said = invoked("--sequence-parallel", "8", "--json", str(file))
    assert code == 0, said
    assert "8 devices with 80.0 GiB of memory each, 8 to a row" in said
    assert "50 steps of 16 rows, 1 at a time on 8 devices, 131,072 tokens each: 838,860,800 tokens" in said
    made, want = json.loads(file.read_text()), plan(CARD, memory="80GiB", devices=8, sequence_parallel=8, measure=False)
    assert made == json.loads(json.dumps(want.to_dict()))
    assert made["stages"][-1]["step"]["ring"] == 8 and made["stages"][-1]["step"]["shards"] == 1
    code, said = invoked("--sequence-parallel", "8", "--ranks", "64", "--json", str(file))
    assert code == 0 and "64 devices with 80.0 GiB of memory each, 8 to a row" in said
    assert json.loads(file.read_text())["stages"][-1]["step"]["passes"] == 2
    code, said = invoked("--sequence-parallel", "3", "--ranks", "64")
    assert code == 1 and "sequence_parallel: expected a divisor of the 64 devices, got 3" in said
    answer = CliRunner().invoke(app, ["extend", CARD, "--out", str(tmp_path / "out"), "--ranks", "2"])
    assert answer.exit_code == 2 and "--plan only" in answer.output


def test_the_stages_say_whether_weights_are_spread():
    given = {"memory": "80GiB", "measure": False, "devices": 8}
    table = {"stage": [{"length": 4096, "steps": 1, "batch_size": 8}], "devices": "shard"}
    assert plan(CARD, table, **given).stages[0].step.shards == 8
    assert plan(CARD, table, **given, shard=False).stages[0].step.shards == 1
    assert plan(CARD, {**table, "devices": "replicate"}, **given).stages[0].step.shards == 1


def test_what_makes_no_sense():
    with pytest.raises(ValueError, match="devices: expected an int from 1 on, got 0"):
        plan(CARD, devices=0, measure=False)
    with pytest.raises(StagesError, match="keep: expected one of"):
        plan(CARD, keep="some", measure=False)
    assert dataclasses.is_dataclass(plan(CARD, measure=False))
