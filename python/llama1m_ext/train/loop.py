"""Progressive training: a Llama's context grows stage by stage, each stage from the weights of the one before.

What a step computes depends on the run's table, the rows and the weights alone, so a run that was killed goes on from its
last checkpoint to the same bits (on one device, with the same number of threads).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import memory, plan_shape, tensorfile
from . import cross_entropy, models, planning, rotation, saves
from .dataset import Data, folder_of
from .devices import Devices, join, spread
from .forward import Trainee, causal_of, shift
from .journal import Journal
from .journal import check as check_logs
from .kept import place
from .layer import How
from .optimizer import Optimizer, rate
from .saves import At
from .signals import Interrupted, Signals
from .stages import Run, Settings, Stage
from .team import Team, team_of

RUN_FILE = "run.json"
_FREE = ("keep", "offload", "offload_dir", "chunk", "ce_chunk", "checkpoint_steps", "checkpoint_minutes", "checkpoints")
"""Settings that a run which goes on may have otherwise: they change no result, or its last bits at most."""


@dataclass(frozen=True)
class Step:
    """What is known of a step of the optimizer, as the log has it.

    Attributes:
        stage, stage_number, step: whose, from 1 on.
        loss: the mean over its labels, nats a token.
        grad_norm: before clipping.
        learning_rate: that it was taken with.
        tokens: that it saw.
        seconds, tokens_per_second: that it took, on all devices together.
    """

    stage: str
    stage_number: int
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Done:
    """A stage that is done.

    Attributes:
        name, length, theta: of the stage.
        steps, loss: how many it took, and the last one's loss (nan: it was done before).
        folder: the model.
    """

    name: str
    length: int
    theta: float
    steps: int
    loss: float
    folder: Path


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        out: its folder.
        stages: one after the other; the last one's folder is the model.
        model: the model, as it is in memory.
    """

    out: Path
    stages: tuple[Done, ...]
    model: Any


def extend(
    model: Any,
    stages: Any = None,
    out: str | os.PathLike[str] = "extended",
    *,
    data: Any = None,
    resume: bool = False,
    log: Sequence[str] = (),
    progress: bool | Literal["auto"] = "auto",
    evaluate: Callable[[Any, Stage, Path], Mapping[str, Any] | None] | None = None,
    on_step: Callable[[Step], bool | None] | None = None,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    sequence_parallel: int = 1,
    **settings: Any,
) -> Result:
    """Trains a Llama on growing lengths.

    In `out` there will be `run.json` (what it was told), `log.jsonl` (a line for each step), `checkpoints/` (the last few), and
    a folder for each stage that is done, `1-65k` and so on, which `from_pretrained` loads.

    Args:
        model: a folder, a name on the hub, or a model of transformers; a `PeftModel`'s adapters are what is trained of it.
        stages: a file of TOML, a `Run`, a list of `Stage`s or tables; None: the model card's.
        out: the run's folder; it must be new or empty, unless the run goes on.
        data: a folder with rows, or with a folder of them for each stage (by name or length); or a mapping of these by stage's
            name; or rows: something with `len()` and `[i]` (see `train.dataset.Rows`).
        resume: go on after the last checkpoint in `out`. Where there is none, begin.
        log: "tensorboard", "wandb", beside `log.jsonl`.
        progress: show a bar; "auto": on a terminal.
        evaluate: called with (model, stage, folder) after each stage; what it returns is logged.
        on_step: called with each `Step`; True ends the stage after it.
        tokenizer: saved beside each stage's model. None: the files of the model's folder come along.
        device: where to compute; None: a GPU, where torch sees one, else the CPU.
        sequence_parallel: processes that share each row, which torchrun starts: ring attention. It divides their number.
        settings: fields of `Settings`, in the place of what `stages` says.

    Raises:
        StagesError, ValueError, TypeError: stages, data or a model that make no sense together; before any work.
        FileExistsError, FileNotFoundError: `out` holds another run, or there is no data.
        DoesNotFit: it would not fit into memory; before any work.
        OSError: there is no room on the disk. What was written before is whole.
        FloatingPointError: a loss or gradient is not finite. The last checkpoint is from before.
        train.Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last full step is there.
    """
    run = Run.of(stages)
    if settings:
        run = run.with_settings(**settings)
    check_logs(log)
    devices = join(device)
    team = team_of(devices, sequence_parallel)
    started = _Started(Path(out), resume, devices)
    with started:
        trainer = _Trainer(model, run, started, data, log, progress, evaluate, on_step, tokenizer, devices, team)
        return trainer.all()


class _Started:
    """The run's folder, which one run at a time has."""

    def __init__(self, out: Path, resume: bool, devices: Devices) -> None:
        self.out, self.resume, self.devices = out, resume, devices
        self._fd: int | None = None
        self._made = False

    def __enter__(self) -> _Started:
        self.devices.each("opening the run's folder", self._open if self.devices.is_first else lambda: None)
        return self

    def _open(self) -> None:
        file = self.out / RUN_FILE
        if self.out.exists() and not self.out.is_dir():
            raise FileExistsError(f"out: expected a folder, got the file {self.out}")
        # A run that was killed while it loaded its model has left its lock, and nothing else.
        held = self.out.is_dir() and any(path.name != ".lock" for path in self.out.iterdir())
        if not self.resume and held:
            what = "a run, which --resume goes on with" if file.exists() else "something else"
            raise FileExistsError(f"out: expected a new or empty folder, got {self.out} with {what}")
        if self.resume and held and not file.is_file():
            raise FileNotFoundError(
                f"out: expected the folder of a run to go on with, got {self.out} without {RUN_FILE}"
            )
        self._made = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        if tensorfile.lock(self._fd) is False:
            os.close(self._fd)
            self._fd = None
            raise FileExistsError(
                f"out: expected a folder that nobody writes to, got {self.out}, where a run is going on"
            )

    def __exit__(self, *error: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            with contextlib.suppress(OSError):
                if [p.name for p in self.out.iterdir()] == [".lock"]:  # it was refused before it began
                    (self.out / ".lock").unlink()
                    if self._made:
                        self.out.rmdir()


class _Trainer:
    """A run under way."""

    def __init__(
        self,
        model: Any,
        run: Run,
        started: _Started,
        data: Any,
        log: Sequence[str],
        progress: bool | Literal["auto"],
        evaluate: Any,
        on_step: Any,
        tokenizer: Any,
        devices: Devices,
        team: Team,
    ) -> None:
        self.team = team
        self.run, self.settings, self.out, self.devices = run, run.settings, started.out, devices
        self.evaluate, self.on_step, self.tokenizer = evaluate, on_step, tokenizer
        self.show = (sys.stderr.isatty() if progress == "auto" else progress) and devices.is_first
        self.source = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        self.sharded = devices.world_size > 1 and self.settings.devices == "shard"
        for stage in run.stages:
            stage.shares(team.teams, team.size)
        self.sources = [folder_of(stage, data) for stage in run.stages]
        self.model = models.load(model, self.settings, devices.device)
        causal = causal_of(self.model)
        vocab = int(causal.config.vocab_size)
        self.data = [
            Data(stage, source, vocab, self.settings.seed + i)
            for i, (stage, source) in enumerate(zip(run.stages, self.sources, strict=True))
        ]
        identity = models.identity(self.model)
        torch.manual_seed(self.settings.seed)
        if self.settings.lora is not None:
            self.model = models.with_adapters(self.model, self.settings.lora)
        if not models.trained(self.model):
            raise ValueError("model: expected parameters that need gradients, got none")
        rotation.check(self.model, run.stages)
        self.plans = self._planned()
        self.at: At | None = None
        self.save: saves.Save | None = None
        devices.each("comparing with the run in its folder", lambda: self._agree_with(identity))
        if started.resume:
            self.save = saves.newest(self.out, devices, self._say)
            self.at = self.save.at if self.save is not None else None
        self.journal: Journal | None = None
        devices.each("making ready", (lambda: self._make_ready(log)) if devices.is_first else lambda: None)
        self.trainee: Any = Trainee(self.model)
        if self.sharded:
            self.trainee = spread(self.trainee, self.settings)
        self.place = place(
            None if self.settings.offload == "none" else self.settings.offload, self.settings.offload_dir or None
        )

    def _make_ready(self, log: Sequence[str]) -> None:
        needed = (self.settings.checkpoints + 1) * self._checkpoint_bytes() + self._folder_bytes()
        held = sum(f.stat().st_size for path in saves.found(self.out) for f in path.iterdir())
        saves.room(self.out, needed - held, f"{self.settings.checkpoints + 1} checkpoints and the stages' models")
        self.journal = Journal(self.out, log, self.at, self.run.to_dict())

    def all(self) -> Result:
        """All stages that are not done yet."""
        done = []
        self.model.train()
        if self.save is not None:
            models.fill(self.model, self.save.tensor)
        try:
            for i, stage in enumerate(self.run.stages):
                done.append(self._stage(i, stage))
        finally:
            self.model.eval()
            if self.journal is not None:
                self.journal.close()
        return Result(self.out, tuple(done), self.model)

    # -- one stage ------------------------------------------------------------------------------------------------------

    def _stage(self, i: int, stage: Stage) -> Done:
        theta, positions = rotation.turn_to(self.model, stage)
        folder = self.out / f"{i + 1}-{stage.name}"
        at = self.at
        if at is not None and at.stage > i:  # the weights are a later stage's: if its folder was removed, it is gone
            return Done(stage.name, stage.length, theta, stage.steps, math.nan, folder)
        if at is not None and at.stage == i and at.ended:
            step, loss = at.step, math.nan
        else:
            step, loss = self._trained(i, stage)
        return self._finish(i, stage, theta, positions, step, loss, folder)

    def _trained(self, i: int, stage: Stage) -> tuple[int, float]:
        """Takes the steps that are left. (steps done, the last one's loss)."""
        optimizer = Optimizer(models.trained(self.model), stage)
        step = 0
        try:
            torch.manual_seed(self.settings.seed + 1000 * (i + 1))
            if self.at is not None and self.at.stage == i and self.save is not None:
                optimizer.load(self.save.tensor)
                _set_random(self.save.tensor)
                step = self.at.step
                self._say(f"stage {stage.name}: going on after step {step} of {stage.steps}")
            self.save = None
            step, loss = self._steps(i, stage, optimizer, step)
            self._write(At(i, step, True), optimizer)
        finally:
            optimizer.close()
        return step, loss

    def _finish(self, i: int, stage: Stage, theta: float, positions: int, step: int, loss: float, folder: Path) -> Done:
        if not self.devices.first_says(folder.is_dir()):
            models.save(self.model, folder, self.settings, self.devices, self.source, self.tokenizer, positions)
        about = {"stage": stage.name, "stage_number": i + 1}
        if self.journal is not None and not self.journal.has("stage", i + 1):
            self.journal.note("stage", **about, steps=step, folder=folder.name, theta=theta, length=stage.length)
        known = self.journal is not None and self.journal.has("evaluation", i + 1)
        if self.evaluate is not None and not self.devices.first_says(known):
            self.model.eval()
            found = self.evaluate(self.model, stage, folder)
            self.model.train()
            if found is not None and self.journal is not None:
                self.journal.note("evaluation", **about, **found)
        return Done(stage.name, stage.length, theta, step, loss, folder)

    def _steps(self, i: int, stage: Stage, optimizer: Optimizer, first: int) -> tuple[int, float]:
        """(steps done, the last one's loss)."""
        written, written_at = first, time.monotonic()
        loss, step = math.nan, first
        random = _random(self.devices.device)
        with Signals(wait=self.devices.world_size > 1) as signals, self._bar(stage, first) as show:
            try:
                while step < stage.steps:
                    random = _random(self.devices.device)
                    begin = time.perf_counter()
                    loss, norm = self._gradients(i, stage, optimizer, step)
                    if not (math.isfinite(loss) and math.isfinite(norm)):
                        raise FloatingPointError(
                            f"stage {stage.name}, step {step + 1}: expected a finite loss and gradient, got {loss} and {norm}; "
                            f"the last checkpoint is of step {written}"
                        )
                    with signals.held():
                        now = rate(stage, step)
                        optimizer.step(now)
                        step += 1
                        random = _random(self.devices.device)
                        seconds = time.perf_counter() - begin
                        tokens = stage.rows * stage.length
                        body = Step(stage.name, i + 1, step, loss, norm, now, tokens, seconds, tokens / seconds)
                        if self.journal is not None:
                            before = sum(s.steps for s in self.run.stages[:i])
                            self.journal.step(before + step, asdict(body))
                        show(body)
                    stop = self.on_step(body) if self.on_step is not None else False
                    if self.devices.any_says(bool(stop)):
                        break
                    signals.check()
                    minutes = (time.monotonic() - written_at) / 60
                    due = 0 < self.settings.checkpoint_minutes <= minutes
                    if self.devices.world_size > 1:
                        due = self.devices.any_says(due)
                        if self.devices.any_says(signals.pending is not None):
                            raise Interrupted("interrupted", signals.pending or 2)
                    every = self.settings.checkpoint_steps
                    if step < stage.steps and (due or (every and step % every == 0)):
                        with signals.held():
                            self._write(At(i, step), optimizer)
                        written, written_at = step, time.monotonic()
                        signals.check()
            except Interrupted as e:
                optimizer.clear()
                if step != written or not self.devices.first_says(bool(saves.found(self.out))):
                    with signals.held():
                        self._write(At(i, step), optimizer, random)
                raise Interrupted(
                    f"interrupted in stage {stage.name} after step {step} of {stage.steps}: all of it is in {self.out}; "
                    "--resume goes on from there",
                    e.signal,
                ) from None
        return step, loss

    def _gradients(self, i: int, stage: Stage, optimizer: Optimizer, step: int) -> tuple[float, float]:
        """Sums the gradients of a step, and clips them. (loss, their norm before)."""
        devices, team, data = self.devices, self.team, self.data[i]
        share, at_once = stage.shares(team.teams, team.size)
        first = step * stage.rows + team.number * share
        batches, weight = [], 0.0
        for a in range(first, first + share, at_once):
            batch, borders = data.batch(list(range(a, a + at_once)))
            labels, factors = shift(batch["labels"], batch.get("loss_weights"))
            if team.is_first:
                weight += float(cross_entropy.total_weight(labels, factors))
            batches.append((*team.share(batch, labels, factors), borders))
        (weight,) = devices.total(weight)
        if weight <= 0:
            raise ValueError(
                f"stage {stage.name}, step {step + 1}: expected a label that counts, got none in all its rows"
            )
        total = 0.0
        kind = devices.device.type
        for batch, labels, factors, borders in batches:
            how = How(self.plans[i], self.place, self.settings.chunk, team.attention(stage.length, borders))
            with torch.autocast(kind, torch.bfloat16, enabled=self.settings.autocast):
                loss = self.trainee(
                    batch["input_ids"].to(devices.device),
                    labels.to(devices.device),
                    None if factors is None else factors.to(devices.device),
                    None if "position_ids" not in batch else batch["position_ids"].to(devices.device),
                    how=how,
                    denominator=weight,
                    ce_chunk=self.settings.ce_chunk or None,
                )
            total += float(loss.detach())
            if self.sharded:
                loss = loss * devices.world_size  # FSDP takes the mean over ranks
            loss.backward()
            self.place.clear()
        if not self.sharded:
            devices.add_up(optimizer.gradients())
        (total,) = devices.total(total)
        return total, optimizer.clipped()

    # -- what is around it ------------------------------------------------------------------------------------------------

    def _planned(self) -> list[str]:
        """What layers keep, for each stage.

        Raises:
            DoesNotFit: a stage does not fit into what is free.
        """
        device, inner = self.devices.device, causal_of(self.model).model
        shape = plan_shape.of_model(inner, self.model)
        trained = sum(p.numel() for _, p in models.trained(self.model))
        free = memory.free_bytes(device)
        if free is not None and device.type == "cpu":
            free //= self.devices.on_node
        made = planning.planned(
            self.run,
            shape,
            trained,
            None if free is None else free + shape.resident_bytes,  # which are there already
            gpu=device.type == "cuda",
            devices=self.devices.world_size,
            sequence_parallel=self.team.size,
            outer=1 if self.team.layout is None else self.team.layout.outer,
            shards=self.devices.world_size if self.sharded else 1,
            threads=torch.get_num_threads(),
        )
        made.check()
        keeps = [each.keep for each in made.stages]
        if self.devices.world_size > 1:  # all alike: the least that any of them has room for
            order = ("all", "attention", "inputs")
            for i, keep in enumerate(keeps):
                for least in reversed(order):
                    if self.devices.any_says(keep == least):
                        keeps[i] = least
                        break
        return keeps

    def _agree_with(self, identity: dict[str, Any]) -> None:
        """Writes down what the run was told, or compares with what is written there."""
        file = self.out / RUN_FILE
        body = {
            "version": 1,
            "run": _plain(self.run.to_dict()),
            "model": {"source": self.source, **identity},
            "data": [
                {"stage": data.stage.name, "rows": len(data.rows), "fingerprint": data.fingerprint}
                for data in self.data
            ],
        }
        if not file.is_file():
            if self.devices.is_first:
                temporary = file.with_name(f".{RUN_FILE}.tmp")
                temporary.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
                os.replace(temporary, file)
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            differ = list(_differences(known["run"], body["run"]))
            differ += [
                f"data: {a} then, {b} now"
                for a, b in zip(known["data"], body["data"], strict=False)
                if any(a[name] != b[name] for name in a.keys() & b.keys())  # older runs have no fingerprints
            ]
            for name in ("config", "weights"):
                if known["model"][name] != identity[name]:
                    differ.append(f"the model's {name} are not those that it began with")
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{file}: expected what a run was told, got something else: {e!r}") from None
        if differ:
            raise FileExistsError(
                f"out: expected the same run as in {self.out}, got another one: {'; '.join(differ[:5])}"
            )

    def _write(self, at: At, optimizer: Optimizer, random: list[tuple[str, Tensor]] | None = None) -> None:
        tensors = random or _random(self.devices.device)
        if self.sharded or self.devices.is_first:
            tensors = [*optimizer.state(), *tensors]
        saves.write(self.out, at, tensors, {}, self.devices)
        if self.devices.is_first:
            saves.prune(self.out, self.settings.checkpoints, at)

    def _checkpoint_bytes(self) -> int:
        """Of this rank's checkpoint: float32 weights and both moments."""
        return sum(12 * _size(p) + 256 for _, p in models.trained(self.model)) + (1 << 16)

    def _folder_bytes(self) -> int:
        """Of the model folders that are not there yet."""
        size = 2 if (self.settings.save_dtype or self.settings.dtype) == "bfloat16" else 4
        left = sum(not (self.out / f"{i + 1}-{stage.name}").is_dir() for i, stage in enumerate(self.run.stages))
        return left * size * sum(p.numel() for p in causal_of(self.model).parameters())

    @contextlib.contextmanager
    def _bar(self, stage: Stage, first: int) -> Iterator[Callable[[Step], None]]:
        if not self.show:
            yield lambda step: None
            return
        from tqdm.auto import tqdm

        with tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step", dynamic_ncols=True) as bar:

            def show(step: Step) -> None:
                bar.set_postfix_str(
                    f"loss {step.loss:.4f}, norm {step.grad_norm:.2f}, {step.tokens_per_second:,.0f} tokens/s",
                    refresh=False,
                )
                bar.update(1)

            yield show

    def _say(self, text: str) -> None:
        if self.devices.is_first:
            print(text, file=sys.stderr)


def _size(p: Any) -> int:
    return int((p.to_local() if hasattr(p, "to_local") else p).numel())


def _random(device: torch.device) -> list[tuple[str, Tensor]]:
    found = [("random.cpu", torch.get_rng_state())]
    if device.type == "cuda":
        found.append(("random.cuda", torch.cuda.get_rng_state(device)))
    return found


def _set_random(read: Callable[[str], Tensor | None]) -> None:
    for name, put in (("random.cpu", torch.set_rng_state), ("random.cuda", torch.cuda.set_rng_state)):
        state = read(name)
        if state is not None:
            put(state)


def _plain(body: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(body))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*then["settings"], *now["settings"]} - set(_FREE)):
        a, b = then["settings"].get(name), now["settings"].get(name)
        if a != b:
            yield f"{name}: {a!r} then, {b!r} now"
    if len(then["stages"]) != len(now["stages"]):
        yield f"{len(then['stages'])} stages then, {len(now['stages'])} now"
    for a, b in zip(then["stages"], now["stages"], strict=False):
        for name in sorted({*a, *b} - {"data", "rows_at_once"}):
            if a.get(name) != b.get(name):
                yield f"stage {b['name']}: {name}: {a.get(name)!r} then, {b.get(name)!r} now"


__all__ = ["Done", "Result", "Settings", "Stage", "Step", "extend"]
