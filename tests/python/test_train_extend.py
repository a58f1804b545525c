"""Progressive training: what it computes, what it leaves behind, and that a kill at any moment costs no bit of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llama1m_ext
from conftest import stock
from crew import fresh
from llama1m_ext import tensorfile, testing
from llama1m_ext.rope import theta_for
from llama1m_ext.train import Interrupted, Lora, Run, Stage, StagesError, extend
from llama1m_ext.train.journal import read as read_log
from llama1m_ext.train.optimizer import rate
from llama1m_ext.train.saves import Damaged, found

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows:
    """Rows that repeat, which a model can learn."""

    def __init__(self, n: int, length: int, weights: bool = False, seed: int = 0):
        self.n, self.length, self.weights, self.seed = n, length, weights, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        generator = torch.Generator().manual_seed(self.seed * 1000 + i)
        piece = torch.randint(0, 40, (8,), generator=generator)
        row = {"input_ids": piece.repeat(self.length // 8 + 1)[: self.length]}
        if self.weights:
            row["loss_weights"] = torch.rand(self.length, generator=generator)
        return row


STAGES = [
    {"length": 32, "steps": 8, "batch_size": 2, "accumulation": 2, "learning_rate": 3e-3},
    {"length": 64, "theta": 1e6, "steps": 6, "batch_size": 2, "learning_rate": 1e-3, "warmup": 2, "schedule": "cosine"},
]
DATA = {"32": Rows(7, 32), "64": Rows(5, 64, weights=True)}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 32}


def model(**changes):
    return testing.tiny_model(**{**SMALL, **changes})


def run(out, given=None, stages=None, **more):
    settings = {"dtype": "float32", "data": DATA, "progress": False, "checkpoint_minutes": 0, **more}
    return extend(model() if given is None else given, STAGES if stages is None else stages, out, **settings)


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a, b) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(out) -> list[float]:
    return [line["loss"] for line in read_log(out) if line["kind"] == "step"]


# -- what it computes ---------------------------------------------------------------------------------------------------


def test_two_stages(tmp_path):
    made = run(tmp_path / "out")
    assert [stage.folder.name for stage in made.stages] == ["1-32", "2-64"]
    lines = read_log(made.out)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [(line["stage_number"], line["step"]) for line in steps] == [(1, i) for i in range(1, 9)] + [
        (2, i) for i in range(1, 7)
    ]
    assert [line["tokens"] for line in steps] == [4 * 32] * 8 + [2 * 64] * 6
    assert steps[7]["loss"] < 0.8 * steps[0]["loss"]
    assert [line["folder"] for line in lines if line["kind"] == "stage"] == ["1-32", "2-64"]
    with stock():
        first, last = (AutoModelForCausalLM.from_pretrained(stage.folder) for stage in made.stages)
    assert first.config.max_position_embeddings == 32
    assert last.config.max_position_embeddings == 64
    assert float(last.model.rotary_emb.inv_freq[1]) == pytest.approx(1e6 ** (-2 / 8))
    assert float(first.model.rotary_emb.inv_freq[1]) == pytest.approx(5e5 ** (-2 / 8))
    assert torch.equal(last.lm_head.weight, made.model.lm_head.weight)
    assert not made.model.training


def test_it_is_the_loop_that_one_would_write(tmp_path):
    """transformers' own loss and torch's AdamW."""
    ours = model()
    theirs = copy.deepcopy(ours).train()
    stage = {"length": 32, "steps": 6, "batch_size": 3, "learning_rate": 1e-2, "shuffle": False, "clip": 0.5}
    run(tmp_path / "out", ours, [stage])
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    expected = []
    for step in range(6):
        ids = torch.stack([DATA["32"][(3 * step + i) % 7]["input_ids"] for i in range(3)])
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_accumulation_is_a_larger_batch(tmp_path):
    data = {"32": Rows(9, 32, weights=True)}
    for name, shape in (
        ("a", {"batch_size": 4}),
        ("b", {"accumulation": 4}),
        ("c", {"batch_size": 4, "rows_at_once": 2}),
    ):
        run(tmp_path / name, stages=[{"length": 32, "steps": 4, "learning_rate": 1e-3, **shape}], data=data)
    for other in ("b", "c"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
        a, b = weights(tmp_path / "a/1-32"), weights(tmp_path / other / "1-32")
        assert all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)


def test_bfloat16_weights_have_float32_masters(tmp_path):
    """Steps smaller than bfloat16 can add to most weights still add up."""
    stage = {"length": 32, "steps": 24, "batch_size": 2, "learning_rate": 1e-4, "weight_decay": 0.0}
    made = run(tmp_path / "a", model(dtype=torch.bfloat16), [stage], dtype="bfloat16")
    exact = run(tmp_path / "b", model(dtype=torch.bfloat16), [stage], dtype="float32")
    before = dict(model(dtype=torch.bfloat16).named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    after, wanted = weights(made.stages[0].folder)[name], weights(exact.stages[0].folder)[name]
    assert after.dtype == torch.bfloat16 and wanted.dtype == torch.float32
    start = before[name].detach().float()
    coarse = start.abs() > 0.125  # their neighbours are 2^-10 away: a step is a tenth of that
    moved, rounded = (wanted - start)[coarse], (after.float() - start)[coarse]
    assert 1e-3 < float(moved.abs().max()) < 2.5e-3
    assert float((rounded * moved).sum() / moved.square().sum()) == pytest.approx(1, abs=0.2)
    assert json.loads((made.stages[0].folder / "config.json").read_text()).get("dtype", "bfloat16") == "bfloat16"


def test_autocast_and_a_dtype_of_the_folder(tmp_path):
    made = run(tmp_path / "out", autocast=True, save_dtype="bfloat16")
    assert losses(tmp_path / "out")[7] < losses(tmp_path / "out")[0]
    loaded = AutoModelForCausalLM.from_pretrained(made.stages[-1].folder, dtype="auto")  # 4.57's default is float32
    assert loaded.dtype == torch.bfloat16
    assert made.model.dtype == torch.float32


def test_lora(tmp_path):
    lora = Lora(rank=4, targets=("q_proj", "v_proj"), also=("norm",), dropout=0.1)
    base = model()
    before = {name: p.clone() for name, p in base.named_parameters()}
    made = run(tmp_path / "out", base, lora=lora)
    assert losses(tmp_path / "out")[7] < losses(tmp_path / "out")[0]
    ids = testing.random_ids(1, 40)
    with torch.no_grad(), stock():
        folder = AutoModelForCausalLM.from_pretrained(made.stages[-1].folder)
        torch.testing.assert_close(folder(ids).logits, made.model(ids).logits, rtol=1e-4, atol=1e-4)
    state = weights(made.stages[-1].folder)
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(
        state["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )
    assert not torch.equal(state["model.norm.weight"], before["model.norm.weight"])
    assert (made.stages[-1].folder / "adapter" / "adapter_model.safetensors").is_file()
    size = sum(f.stat().st_size for f in found(made.out)[0].iterdir())
    assert size < 100_000, "checkpoints hold what is trained"


def test_documents_that_do_not_see_each_other(tmp_path):
    """A packed row and its documents alone have the same loss."""

    class Packed(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {
                **row,
                "cu_seqlens": torch.tensor([0, 12, 32]),
                "position_ids": torch.cat([torch.arange(12), torch.arange(20)]),
            }

    stage = {"length": 32, "steps": 1, "shuffle": False}
    run(tmp_path / "out", stages=[stage], data=Packed(1, 32))
    ids, total = DATA["32"][0]["input_ids"], 0.0
    with torch.no_grad():
        for a, b in ((0, 12), (12, 32)):
            part = ids[None, a:b]
            total += float(model()(part, labels=part).loss) * (b - a - 1)
    assert losses(tmp_path / "out") == pytest.approx([total / 30], rel=1e-5)


def test_rates():
    stage = Stage(32, 10, learning_rate=2.0, warmup=4, schedule="cosine", least_rate=0.1)
    found = [rate(stage, i) for i in range(10)]
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert all(a > b for a, b in zip(found[4:], found[5:], strict=False))
    assert rate(stage, 10) == pytest.approx(0.2)
    linear = dataclasses.replace(stage, schedule="linear", least_rate=0.0)
    assert rate(linear, 7) == pytest.approx(1.0) and rate(linear, 10) == 0
    assert rate(dataclasses.replace(stage, schedule="constant"), 9) == 2.0


def test_every_row_is_seen_once_in_each_pass():
    from llama1m_ext.train.dataset import Data

    data = Data(Stage(32, 1, name="x"), Rows(7, 32), 261, seed=3)
    turns = [[data.index(7 * turn + i) for i in range(7)] for turn in range(3)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert turns[0] != turns[1]
    data = Data(Stage(32, 1, name="x", shuffle=False), Rows(7, 32), 261, seed=3)
    assert [data.index(i) for i in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_hooks(tmp_path):
    seen = []

    def evaluate(given, stage, folder):
        assert folder.is_dir() and not given.training
        return {"score": stage.length}

    run(tmp_path / "out", evaluate=evaluate, on_step=lambda step: seen.append(step) or step.step == 3)
    assert [step.step for step in seen] == [1, 2, 3, 1, 2, 3]
    assert [line["score"] for line in read_log(tmp_path / "out") if line["kind"] == "evaluation"] == [32, 64]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "out", log=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "out/tensorboard"))
    events.Reload()
    curve = events.Scalars("train/loss")
    assert [point.step for point in curve] == list(range(1, 15))
    assert [point.value for point in curve] == pytest.approx(losses(tmp_path / "out"))


def test_a_lock_that_a_killed_run_left(tmp_path):
    for resume in (False, True):
        out = tmp_path / str(resume)
        out.mkdir()
        (out / ".lock").touch()
        assert run(out, stages=[{"length": 32, "steps": 1}], resume=resume).stages[0].steps == 1


# -- kills --------------------------------------------------------------------------------------------------------------


def forked(work: Callable[..., Any], *args: Any, sleep: float | None = None, number: int = signal.SIGKILL) -> int:
    """Runs `work(*args)` in a process of its own; a signal comes after a while. Its exit status, -N where signal N ended it."""
    process = fresh.Process(target=_child, args=(work, args))
    process.start()
    if sleep is not None:
        time.sleep(sleep)
        if process.is_alive():
            os.kill(process.pid, number)
    process.join()
    status = process.exitcode
    process.close()
    return status


def _child(work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    code = 5
    try:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work(*args)
        code = 0
    except Interrupted as e:
        code = 130 if "--resume goes on" in str(e) else 2
    except OSError:
        code = 3
    except KeyboardInterrupt:  # before or after training it is an ordinary one
        code = 4
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(out, lora=None, dtype="bfloat16", checkpoint_steps=3)
    torch.set_num_threads(threads)
    return out


def _resumed(out, pause: float = 0.0) -> None:
    run(out, resume=True, dtype="bfloat16", checkpoint_steps=3, on_step=lambda step: time.sleep(pause))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, uninterrupted, number):
    dice = random.Random(int(number))
    out, deaths = tmp_path / "out", 0
    for _ in range(60):
        last = found(out)[0].name if found(out) else ""
        # From the start of the process on, of which the first part goes into imports. A fast machine would soon be done: the
        # first runs, of 14 steps in all, wait a while after each.
        sleep, pause = dice.uniform(0.1, 0.4 if deaths < 2 else 1.5), 0.1 if deaths < 2 else 0.0
        status = forked(_resumed, out, pause, sleep=sleep, number=number)
        if status == 0:
            break
        deaths += 1
        if number == signal.SIGKILL:
            assert status == -signal.SIGKILL
        else:
            assert status in (-number, 130, 4, 1)  # 1 is multiprocessing's own, before our code
        assert (found(out)[0].name if found(out) else "") >= last, "nothing is lost"
    assert status == 0 or forked(_resumed, out) == 0
    assert deaths >= 2
    for name in ("1-32", "2-64"):
        assert same(out / name, uninterrupted / name)
    assert losses(out) == losses(uninterrupted), "one line for each step, and the same"
    left = [p.name for p in out.iterdir() if p.name.endswith(".tmp")]
    assert not left


def test_ctrl_c_leaves_a_checkpoint_of_the_last_full_step(tmp_path, uninterrupted):
    """Also in the middle of one: its gradients are thrown away, and the random numbers that it drew are drawn again."""
    out, calls = tmp_path / "out", [0]

    class Interrupting(Rows):
        def __getitem__(self, i):
            calls[0] += 1
            if calls[0] == 1 + 4 * 5 + 3:  # one to look at it, then four rows a step
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            return super().__getitem__(i)

    with pytest.raises(Interrupted, match=r"interrupted in stage 32 after step 5 of 8.*--resume goes on"):
        run(out, dtype="bfloat16", data={"32": Interrupting(7, 32), "64": DATA["64"]})
    assert found(out)[0].name == "01-0000005"
    run(out, dtype="bfloat16", resume=True)
    assert same(out / "2-64", uninterrupted / "2-64")
    assert losses(out) == losses(uninterrupted)


def test_a_run_that_is_done_goes_on_to_nothing(tmp_path):
    run(tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    made = run(tmp_path / "out", resume=True)
    assert len(made.stages) == 2
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    assert torch.equal(made.model.lm_head.weight, weights(tmp_path / "out/2-64")["lm_head.weight"])


def test_what_was_said_of_a_stage_that_is_done_stays(tmp_path):
    out, seen = tmp_path / "out", []

    def evaluate(model, stage, folder):
        seen.append(stage.name)
        if len(seen) == 2:
            raise RuntimeError("enough")
        return {"perplexity": float(len(seen))}

    def said():
        lines = [line for line in read_log(out) if line["kind"] != "step"]
        return [(line["kind"], line["stage_number"], line.get("perplexity")) for line in lines]

    with pytest.raises(RuntimeError, match="enough"):
        run(out, evaluate=evaluate)
    first = [("stage", 1, None), ("evaluation", 1, 1.0), ("stage", 2, None)]
    assert said() == first
    for _ in range(2):  # what is lacking comes, once
        run(out, resume=True, evaluate=evaluate)
        assert said() == [*first, ("evaluation", 2, 3.0)]
    assert seen == ["32", "64", "64"]


def test_a_stage_s_folder_that_was_removed(tmp_path):
    """It does not come again with the weights of a later stage."""
    import shutil

    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="enough"):
        run(out, checkpoint_steps=2, on_step=lambda step: step.stage == "64" and _until(3)(step))
    shutil.rmtree(out / "1-32")
    run(out, checkpoint_steps=2, resume=True)
    assert not (out / "1-32").exists() and (out / "2-64").is_dir()
    shutil.rmtree(out / "2-64")
    made = run(out, checkpoint_steps=2, resume=True)
    assert torch.equal(made.model.lm_head.weight, weights(out / "2-64")["lm_head.weight"])


def test_damaged_checkpoints(tmp_path, uninterrupted, capsys):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="enough"):
        run(out, dtype="bfloat16", checkpoint_steps=2, on_step=_until(7))
    newest, older = found(out)
    assert (newest.name, older.name) == ("01-0000006", "01-0000004")
    file = newest / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run(out, dtype="bfloat16", checkpoint_steps=2, resume=True)
    said = capsys.readouterr().err
    assert "checkpoint 01-0000006" in said and "damaged" in said and "going on after step 4" in said
    assert same(out / "2-64", uninterrupted / "2-64")

    for path in found(out):
        os.truncate(path / "rank-0.safetensors", 1000)
    with pytest.raises(Damaged, match="expected a whole checkpoint, got 2 damaged"):
        run(out, dtype="bfloat16", checkpoint_steps=2, resume=True)


def test_the_only_checkpoint_is_never_given_up_for_the_next(tmp_path, monkeypatch):
    """Ctrl-C in a stage's last step; then the disk is full when that stage ends."""
    out = tmp_path / "out"
    more = {"stages": STAGES[:1], "checkpoints": 1}
    with pytest.raises(Interrupted):
        run(out, on_step=lambda step: step.step == 8 and os.kill(os.getpid(), signal.SIGINT), **more)
    before = [path.name for path in found(out)]
    assert before == ["01-0000008"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tensorfile, "write", full)
        with pytest.raises(OSError, match="No space left"):
            run(out, resume=True, **more)
    assert [path.name for path in found(out)] == before
    run(out, resume=True, **more)
    assert [path.name for path in found(out)] == ["01-0000008-ended"]


def test_a_damaged_checkpoint_does_not_push_out_whole_ones(tmp_path, uninterrupted):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="enough"):
        run(out, dtype="bfloat16", checkpoint_steps=2, on_step=_until(7))
    os.truncate(found(out)[0] / "rank-0.safetensors", 1000)
    for _ in range(2):
        stop = {"on_step": lambda step: os.kill(os.getpid(), signal.SIGINT)}
        with pytest.raises(Interrupted):
            run(out, dtype="bfloat16", checkpoints=1, resume=True, **stop)
    assert found(out)[0].name == "01-0000006"
    run(out, dtype="bfloat16", checkpoints=1, resume=True)
    assert same(out / "2-64", uninterrupted / "2-64")


def _until(n: int):
    def stop(step):
        if step.step == n:
            raise RuntimeError("enough")

    return stop


def _with_little_room(out) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    run(out, dtype="bfloat16", checkpoint_steps=2, resume=True)


def test_a_disk_that_fills_up(tmp_path, uninterrupted):
    """Files may not grow beyond 64 KiB: the second checkpoint fails, and the first stays."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="enough"):
        run(out, dtype="bfloat16", checkpoint_steps=2, on_step=_until(3))
    before = [path.name for path in found(out)]
    assert before == ["01-0000002"]

    assert forked(_with_little_room, out) == 3
    assert [path.name for path in found(out)] == before
    assert not [p for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]
    run(out, dtype="bfloat16", checkpoint_steps=2, resume=True)
    assert same(out / "2-64", uninterrupted / "2-64")


def test_no_room_is_known_before_the_start(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"3 checkpoints and the stages' models takes \d+ bytes, and 1000 are free"):
        run(tmp_path / "out")


# -- errors before the work ---------------------------------------------------------------------------------------------


def test_folders_of_something_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match=r"expected a new or empty folder, got .* with something else"):
        run(out)
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a run to go on with, got .* without run.json"):
        run(out, resume=True)
    assert [p.name for p in out.iterdir()] == ["mine"]
    run(tmp_path / "a")
    with pytest.raises(FileExistsError, match="with a run, which --resume goes on with"):
        run(tmp_path / "a")
    other = [{**STAGES[0], "learning_rate": 1.0}, STAGES[1]]
    with pytest.raises(FileExistsError, match=r"got another one: stage 32: learning_rate: 0.003 then, 1.0 now"):
        run(tmp_path / "a", stages=other, resume=True)
    with pytest.raises(FileExistsError, match="the model's weights are not those that it began with"):
        run(tmp_path / "a", testing.tiny_model(seed=5, **SMALL), resume=True)
    with pytest.raises(FileExistsError, match="the model's config"):
        run(tmp_path / "a", model(num_hidden_layers=1), resume=True)
    with pytest.raises(FileExistsError, match=r"data: .*rows': 7.* then, .*rows': 8.* now"):
        run(tmp_path / "a", data={**DATA, "32": Rows(8, 32)}, resume=True)


def test_other_rows_in_the_same_number(tmp_path):
    from llama1m_ext.data import write

    out, more = tmp_path / "out", {"stages": STAGES[:1], "checkpoint_steps": 2}
    for seed in (0, 1):
        rows = Rows(4, 32, seed=seed)
        write([rows[i] for i in range(4)], tmp_path / f"rows-{seed}")
    with pytest.raises(RuntimeError, match="enough"):
        run(out, data=tmp_path / "rows-0", on_step=_until(3), **more)
    with pytest.raises(FileExistsError, match=r"got another one: data: .*'fingerprint': .* then, .* now"):
        run(out, data=tmp_path / "rows-1", resume=True, **more)
    (tmp_path / "rows-0").rename(tmp_path / "moved")
    run(out, data=tmp_path / "moved", resume=True, **more)


def test_one_run_at_a_time(tmp_path):
    with pytest.raises(FileExistsError, match="where a run is going on"):
        run(tmp_path / "out", evaluate=lambda *_: run(tmp_path / "out", resume=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "stage 32: expected data, got none"),
        ({"64": Rows(3, 64)}, "stage 32: expected data for it, got some for 64"),
        (
            {"32": Rows(3, 31), "64": Rows(3, 64)},
            r"stage 32: expected rows of 32 tokens, got input_ids of shape \(31,\)",
        ),
        ({"32": Rows(0, 32), "64": Rows(3, 64)}, "stage 32: expected rows in a Rows, got none"),
        ({"32": 5, "64": Rows(3, 64)}, r"stage 32: expected rows with len\(\) and \[i\], got a int"),
        (
            {"32": [{"input_ids": [999] * 32}], "64": Rows(3, 64)},
            "expected tokens from 0 to 260, got 999 to 999 in row 0",
        ),
        ({"32": [{"labels": [9] * 32}], "64": Rows(3, 64)}, "expected a column input_ids in a list, got labels"),
        (
            {"32": [{"input_ids": [9] * 32, "loss_weights": [-1.0] * 32}], "64": Rows(3, 64)},
            "expected finite loss_weights from 0 on in row 0",
        ),
        ("nowhere", "stage 32: expected rows in nowhere/32, nowhere/32 or nowhere, found none there"),
    ],
)
def test_data_that_does_not_fit(tmp_path, data, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists(), "nothing is left"


def test_a_row_without_a_label_that_counts(tmp_path):
    rows = [{"input_ids": [9] * 32, "labels": [-100] * 32}]
    with pytest.raises(ValueError, match="stage 32, step 1: expected a label that counts, got none"):
        run(tmp_path / "out", stages=STAGES[:1], data=rows)


def test_a_loss_that_is_not_finite(tmp_path):
    given = model()
    with torch.no_grad():
        given.model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="stage 32, step 1: expected a finite loss and gradient, got nan"):
        run(tmp_path / "out", given)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"length": 32}], "stage 1: expected steps, got none"),
        ([{"length": 32, "steps": 0}], "stage 1: steps: expected a whole number from 1 on, got 0"),
        ([{"length": 32, "steps": 1, "speed": 1}], "stage 1: expected fields .*; got speed"),
        ([{"length": 64, "steps": 1, "theta": 1e6, "method": "ntk"}], "expected theta or method, got both"),
        ([{"length": 64, "steps": 1}], "expected theta or method, as the model's config has 32 positions"),
        ([{"length": 64, "steps": 1, "method": "guess"}], "stage 64: method"),
        ([{"length": 16, "steps": 1, "theta": 1e6}], "stage 16: max_len"),
        ([{"length": 32, "steps": 1, "betas": [0.9]}], "betas: expected two numbers"),
        (
            [{"length": 32, "steps": 1, "schedule": "step"}],
            "schedule: expected one of constant, linear, cosine, got 'step'",
        ),
        ([{"length": 32, "steps": 1, "name": "../x"}], "name: expected the name of a folder"),
        ([{"length": 32, "steps": 1, "name": "a\0b"}], "name: expected the name of a folder"),
        ([{"length": 32, "steps": 1, "name": "x" * 201}], "name: expected at most 200 bytes, got 201"),
        ([{"length": 32, "steps": 1}] * 2, "expected different names, got '32' 2 times"),
        (
            [{"length": 32, "steps": 1, "batch_size": 4, "rows_at_once": 3}],
            "rows_at_once: expected a divisor of the 4 rows",
        ),
        ([{"length": 32, "steps": 3, "warmup": 4}], "warmup: expected at most 3 steps, got 4"),
        ([], r"expected at least one \[\[stage\]\]"),
    ],
)
def test_stages_that_make_no_sense(tmp_path, stages, message):
    with pytest.raises(StagesError, match=message):
        run(tmp_path / "out", stages=stages, data={"32": Rows(3, 32), "64": Rows(3, 64), "16": Rows(3, 16)})
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(StagesError, match="keep: expected one of"):
        run(tmp_path / "out", keep="most")
    for dtype in ("", False, ["bfloat16"]):
        with pytest.raises(
            StagesError, match=f"dtype: expected one of float32, bfloat16, got {re.escape(repr(dtype))}"
        ):
            run(tmp_path / "out", dtype=dtype)
    with pytest.raises(StagesError, match="save_dtype: expected one of float32, bfloat16, got 0"):
        run(tmp_path / "out", save_dtype=0)
    with pytest.raises(StagesError, match=f"seed: expected a whole number below {1 << 32}, got {1 << 63}"):
        run(tmp_path / "out", seed=1 << 63)
    with pytest.raises(StagesError, match="lora: targets: expected a list of names, got 5"):
        run(tmp_path / "out", lora={"targets": 5})
    for field in ("targets", "also"):  # whether all of them are wrong or one
        with pytest.raises(
            ValueError, match=f"lora: {field}: expected names of modules that the model has, got 'nrom'"
        ):
            run(tmp_path / "out", lora={field: ["q_proj", "nrom"]})
    for field, word in (("targets", "embed_tokens"), ("also", "model.embed_tokens"), ("also", "lm_head")):
        with pytest.raises(ValueError, match=f"lora: {field}: expected none of the tied .*, got '{word}'"):
            run(tmp_path / "out", model(tie_word_embeddings=True), lora={field: [word]})
    with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got 'gpu'"):
        run(tmp_path / "out", device="gpu")
    with pytest.raises(StagesError, match='autocast: expected dtype = "float32" with it'):
        run(tmp_path / "out", dtype="bfloat16", autocast=True)
    with pytest.raises(ValueError, match=r"sequence_parallel: expected a divisor of the 1 processes .*, got 2"):
        run(tmp_path / "out", sequence_parallel=2)
    with pytest.raises(ValueError, match="log: expected names out of tensorboard, wandb, got 'paper'"):
        run(tmp_path / "out", log=("paper",))
    with pytest.raises(TypeError, match="model: expected a LlamaForCausalLM"):
        run(tmp_path / "out", torch.nn.Linear(2, 2))
    assert not (tmp_path / "out").exists()


# -- tables -------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_model_card_s_table():
    stages = Run.read().stages
    assert [stage.length for stage in stages] == [1 << 16, 1 << 18, 1 << 19, 1 << 20]
    assert [stage.theta for stage in stages] == [15296098, 207112184, 1062356830, 2804339835]
    assert [stage.theta for stage in stages] == [theta_for(stage.length, method="gradient-v1") for stage in stages]
    assert [stage.batch_size for stage in stages] == [1, 1, 16, 16]
    assert [stage.steps for stage in stages] == [30, 24, 50, 50]
    assert [stage.tokens for stage in stages] == [62914560, 100663296, 419430400, 838860800]
    assert all(stage.learning_rate == 2e-5 for stage in stages)


def test_tables(tmp_path):
    (tmp_path / "rows").mkdir()
    file = tmp_path / "stages.toml"
    file.write_text(
        'learning_rate = 1e-3\ndtype = "f32"\nkeep = "inputs"\n[lora]\nrank = 3\ntargets = ["q_proj"]\n'
        '[[stage]]\nlength = 4096\nsteps = 2\ndata = "rows"\n[[stage]]\nlength = 5000\nsteps = 3\nmethod = "ntk"\n'
        "learning_rate = 1e-4\n"
    )
    made = Run.read(file)
    assert [(s.name, s.learning_rate, s.method) for s in made.stages] == [("4k", 1e-3, None), ("5000", 1e-4, "ntk")]
    assert made.stages[0].data == str(tmp_path / "rows")
    assert made.settings.dtype == "float32" and made.settings.lora == Lora(rank=3, targets=("q_proj",))
    assert Run.of(made.stages).stages == made.stages
    file.write_text("[[stage]\n")
    with pytest.raises(StagesError, match=r"stages.toml: expected TOML"):
        Run.read(file)
    file.write_text("pace = 3\n[[stage]]\nlength = 4\nsteps = 1\n")
    with pytest.raises(StagesError, match=r"expected fields of the run or of its stages, got pace"):
        Run.read(file)
    with pytest.raises(FileNotFoundError, match="expected a file of TOML, or one of gradient-1048k; got 'other'"):
        Run.read("other")


def test_command(tmp_path):
    from typer.testing import CliRunner

    from llama1m_ext.cli import app
    from llama1m_ext.data import write

    testing.tiny_checkpoint(tmp_path / "model", **{**SMALL, "head_dim": 16})
    (tmp_path / "data").mkdir()
    for length in (32, 64):
        write([Rows(4, length)[i] for i in range(4)], tmp_path / "data" / str(length))
    (tmp_path / "stages.toml").write_text(
        'dtype = "float32"\n[[stage]]\nname = "first"\nlength = 32\nsteps = 2\n'
        '[[stage]]\nlength = 64\nmethod = "gradient-v1"\nsteps = 2\n'
    )
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    words = [
        "extend",
        str(tmp_path / "model"),
        "--stages",
        str(tmp_path / "stages.toml"),
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--data", str(tmp_path / "data")]
    (tmp_path / "none").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff" * 9)
    for more, said in (
        (["--eval-text", str(tmp_path / "none")], "eval_text: expected at least 2 tokens in"),
        (["--eval-text", str(tmp_path / "bytes")], "eval_text: expected text in UTF-8 in"),
        (["--eval-text", str(tmp_path / "text"), "--eval-tokens", "1"], "eval_tokens: expected 0 or at least 2, got 1"),
    ):
        answer = CliRunner().invoke(app, [*words, *more])
        assert answer.exit_code == 1 and said in answer.output
        assert not (tmp_path / "out").exists()
    answer = CliRunner().invoke(app, [*words, "--eval-text", str(tmp_path / "text")])
    assert answer.exit_code == 0, answer.output
    assert "1-first: 32 tokens" in answer.output and "2-64: 64 tokens" in answer.output
    scores = [line for line in read_log(tmp_path / "out") if line["kind"] == "evaluation"]
    assert [line["tokens"] for line in scores] == [31, 63]
    assert all(1 < line["perplexity"] < 1e6 for line in scores)
    folder = tmp_path / "out" / "2-64"
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert AutoModelForCausalLM.from_pretrained(folder).config.max_position_embeddings == 64
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1 and "--resume goes on with" in again.output
    again = CliRunner().invoke(app, [*words, "--resume"])
    assert again.exit_code == 0, again.output
    assert llama1m_ext.train.extend is extend
