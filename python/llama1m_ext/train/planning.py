"""The plan of a run before it starts: memory by part for each stage, what layers will keep, disk, and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..plan_bytes import Peak
from ..plan_choice import DoesNotFit, gib
from ..plan_shape import Shape, shape_of
from . import plan_bytes
from .plan_bytes import Parts, Step
from .stages import Run, Settings, Stage

OF_PEAK, BACKWARD_OF_PEAK = 0.85, 0.7
"""Shares of the rate of multiply-adds in registers that attention reaches, forward and backward."""
_NAMES = {
    "weights": "weights",
    "masters": "float32 weights of the optimizer",
    "moments": "its moments",
    "gradients": "gradients",
    "kept": "kept for backward",
    "file": "kept elsewhere",
    "layer": "backward of one layer",
    "head": "loss: norm, logits of a chunk",
    "rows": "token ids and labels",
}


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take, on each device.

    Attributes:
        stage: it.
        step: what a device does.
        keep: what layers will keep for backward.
        fits: whether it fits; None: nobody knows how much memory there is.
        parts: bytes by part.
        peak: the worst moment.
        phases: all that were reckoned.
        flops: of the stage, on all devices.
        seconds: of the stage; None: this machine was not measured.
    """

    stage: Stage
    step: Step
    keep: str
    fits: bool | None
    parts: Parts
    peak: Peak
    phases: tuple[Peak, ...]
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will take. `str(plan)` is a table, `to_dict()` what JSON can hold.

    Attributes:
        model: its name.
        shape: its sizes.
        settings: of the run.
        stages: one after the other.
        memory: bytes that there are on each device; None: nobody knows.
        devices: how many.
        disk: bytes of the run's folder in the end: checkpoints and models.
        sequence_parallel: how many of the devices share each row.
    """

    model: str
    shape: Shape
    settings: Settings
    stages: tuple[StagePlan, ...]
    memory: int | None
    devices: int
    disk: int
    sequence_parallel: int = 1

    @property
    def fits(self) -> bool:
        """Whether all stages do, as far as is known."""
        return all(stage.fits is not False for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in what JSON can hold. Bytes are ints, times seconds."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def check(self) -> None:
        """Before the work.

        Raises:
            DoesNotFit: a stage does not.
        """
        for each in self.stages:
            if each.fits is False:
                assert self.memory is not None
                alive = ", ".join(f"{_NAMES.get(k, k)} {gib(v)}" for k, v in list(each.peak.parts.items())[:4])
                ways = _ways(self, each)
                raise DoesNotFit(
                    f"stage {each.stage.name}: training at {each.stage.length} tokens takes {gib(each.peak.bytes)} in {each.peak.phase} "
                    f"({alive}), and {gib(self.memory)} are there. Ways out: {'; '.join(ways)}",
                    each.peak.bytes,
                    self.memory,
                    tuple(ways),
                )


def plan(
    model_or_config: Any,
    stages: Any = None,
    *,
    memory: int | str | None = None,
    gpu: bool = False,
    devices: int = 1,
    shard: bool | None = None,
    sequence_parallel: int = 1,
    measure: bool = True,
    threads: int | None = None,
    **settings: Any,
) -> TrainingPlan:
    """What training a Llama stage by stage will take, without a step of it.

    Args:
        model_or_config: a model, a `LlamaConfig`, a folder with a config.json, or a name; the model card's needs no network.
        stages: as `extend` takes them; None: the model card's.
        memory: bytes of each device's memory, as an int or "80GiB"; None: what is free here now, for each of them.
        gpu: reckon with the larger pieces that a GPU works on.
        devices: how many compute rows beside each other.
        shard: whether weights, gradients and optimizer states are spread over them; None: as the field `devices` of `Settings` says.
        sequence_parallel: how many of them share each row (ring attention).
        measure: measure this machine for half a second, to estimate times (on the CPU, one device).
        threads: of the arithmetic; None: as torch has it.
        settings: fields of `Settings`, in the place of what `stages` says.

    Raises:
        StagesError, ValueError, TypeError: arguments that make no sense, or rows of a step that the devices can't share evenly;
            the message names it.
    """
    from ..memory import available_bytes
    from ..options import parse_bytes

    run = Run.of(stages)
    if settings:
        run = run.with_settings(**settings)
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices: expected an int from 1 on, got {devices!r}")
    if type(sequence_parallel) is not int or sequence_parallel < 1 or devices % sequence_parallel:
        raise ValueError(f"sequence_parallel: expected a divisor of the {devices} devices, got {sequence_parallel!r}")
    name, shape = shape_of(model_or_config, run.settings.dtype)
    shape = dataclasses.replace(shape, dtype=run.settings.dtype)
    loaded = shape.resident_bytes if shape.loaded is not None and memory is None else 0
    limit = available_bytes() if memory is None else parse_bytes("memory", memory)
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    trained = trained_elements(shape, run.settings)
    made = planned(
        run,
        shape,
        trained,
        None if limit is None else limit + loaded,
        gpu=gpu,
        devices=devices,
        shards=devices if (run.settings.devices == "shard" if shard is None else shard) else 1,
        threads=threads,
        rates=_rates(shape, threads) if measure and not gpu and devices == 1 else None,
        sequence_parallel=sequence_parallel,
    )
    return dataclasses.replace(made, model=name)


def planned(
    run: Run,
    shape: Shape,
    trained: int | None,
    limit: int | None,
    *,
    gpu: bool,
    devices: int,
    shards: int,
    threads: int,
    rates: tuple[float, float] | None = None,
    sequence_parallel: int = 1,
    outer: int = 1,
) -> TrainingPlan:
    """The plan for known sizes.

    Args:
        trained: elements that are trained; None: all.
        limit: bytes that there are for all of it, weights included.
        rates: FLOP/s of matrices and of attention in registers.
        sequence_parallel: devices that share a row.
        outer: rings of them (double ring).
    """
    made, teams = [], max(1, devices // sequence_parallel)
    for stage in run.stages:
        share, at_once = stage.shares(teams, sequence_parallel)
        s = run.settings
        step = Step(
            length=-(-stage.length // sequence_parallel),
            rows=at_once,
            passes=share // at_once,
            offload=s.offload,
            chunk=s.chunk,
            ce_chunk=s.ce_chunk,
            autocast=s.autocast,
            trained=trained,
            gpu=gpu,
            shards=shards,
            threads=threads,
            ring=sequence_parallel,
            outer=outer,
        )
        step = _chosen(shape, step, s.keep, limit)
        phases = plan_bytes.peaks(shape, step)
        matrices, attention = (
            n / sequence_parallel for n in plan_bytes.flops(shape, dataclasses.replace(step, length=stage.length))
        )
        seconds = None if rates is None else stage.steps * _seconds(step, matrices, attention, rates)
        made.append(
            StagePlan(
                stage=stage,
                step=step,
                keep=step.keep,
                fits=None if limit is None else phases[0].bytes <= limit,
                parts=plan_bytes.parts(shape, step),
                peak=phases[0],
                phases=tuple(phases),
                flops=stage.steps * devices * (matrices + attention),
                seconds=seconds,
            )
        )
    model = shape.parameters * (2 if (run.settings.save_dtype or run.settings.dtype) == "bfloat16" else 4)
    disk = (run.settings.checkpoints + 1) * made[0].parts.checkpoint + len(made) * model
    return TrainingPlan("a Llama", shape, run.settings, tuple(made), limit, devices, disk, sequence_parallel)


def trained_elements(shape: Shape, settings: Settings) -> int | None:
    """Elements that are trained, by arithmetic; None: all."""
    lora = settings.lora
    if lora is None:
        return None
    sides = {
        "q_proj": shape.hidden + shape.q_dim,
        "k_proj": shape.hidden + shape.kv_dim,
        "v_proj": shape.hidden + shape.kv_dim,
        "o_proj": shape.hidden + shape.q_dim,
        "gate_proj": shape.hidden + shape.intermediate,
        "up_proj": shape.hidden + shape.intermediate,
        "down_proj": shape.hidden + shape.intermediate,
    }
    whole = {
        "embed_tokens": shape.vocab * shape.hidden,
        "lm_head": shape.vocab * shape.hidden,
        "norm": (2 * shape.layers + 1) * shape.hidden,
    }
    adapters = lora.rank * shape.layers * sum(sides.get(name, 0) for name in lora.targets)
    return adapters + sum(whole.get(name, 0) for name in lora.also)


def _chosen(shape: Shape, step: Step, keep: str, limit: int | None) -> Step:
    """With what layers keep: as asked for, or the most that fits."""
    if keep != "auto":
        return dataclasses.replace(step, keep=keep)
    order = ("all", "attention", "inputs") if step.offload == "none" else ("attention", "inputs")
    for each in order:
        step = dataclasses.replace(step, keep=each)
        if limit is None:
            return dataclasses.replace(step, keep="attention")
        # With a tenth to spare: what is kept is only worth time.
        if plan_bytes.peaks(shape, step)[0].bytes <= 0.9 * limit:
            return step
    return step


def _rates(shape: Shape, threads: int) -> tuple[float, float]:
    from ..plan_speed import measure

    machine = measure(shape, threads)
    return machine.matmul, machine.flops


def _seconds(step: Step, matrices: float, attention: float, rates: tuple[float, float]) -> float:
    again = 1 if step.keep == "inputs" else 0
    forward = attention * (1 + again) / (3.5 + again)
    return matrices / rates[0] + forward / (OF_PEAK * rates[1]) + (attention - forward) / (BACKWARD_OF_PEAK * rates[1])


def _ways(p: TrainingPlan, each: StagePlan) -> list[str]:
    """Changes with which it fits, or would fit better."""
    step, limit = each.step, p.memory
    assert limit is not None
    tries: list[tuple[str, Callable[[], Step]]] = [
        ('keep = "inputs"', lambda: dataclasses.replace(step, keep="inputs")),
        ("rows_at_once = 1", lambda: dataclasses.replace(step, rows=1, passes=step.rows * step.passes)),
        ('offload = "disk"', lambda: dataclasses.replace(step, keep="inputs", offload="disk")),
        (
            "[lora]",
            lambda: dataclasses.replace(
                step, trained=trained_elements(p.shape, dataclasses.replace(p.settings, lora=_lora()))
            ),
        ),
    ]
    fit = [name for name, make in tries if plan_bytes.peaks(p.shape, make())[0].bytes <= limit]
    return fit or ['a machine with more memory, or more of them (FSDP: devices = "shard")']


def _lora() -> Any:
    from .stages import Lora

    return Lora()


def _lines(p: TrainingPlan) -> list[str]:
    known = "unknown" if p.memory is None else gib(p.memory)
    trained = "all weights" if p.settings.lora is None else f"adapters of rank {p.settings.lora.rank}"
    who = f"{p.devices} device{'s' * (p.devices > 1)} with {known} of memory each"
    if p.sequence_parallel > 1:
        who += f", {p.sequence_parallel} to a row"
    lines = [f"{p.model}: {trained} in {p.settings.dtype}, {who}", ""]
    for each in p.stages:
        s, step = each.stage, each.step
        theta = f"theta {s.theta:.0f}" if s.theta is not None else s.method or "theta as it is"
        where = "a device" if step.ring == 1 else f"{step.ring} devices, {step.length:,} tokens each"
        lines.append(
            f"stage {s.name}: {s.length:,} tokens, {theta}; {s.steps} steps of {s.rows} rows, {step.rows} at a time on {where}: "
            f"{s.tokens:,} tokens"
        )
        alive = each.peak.parts
        for name, label in _NAMES.items():
            n = getattr(each.parts, name)
            if n or name in alive:
                now = alive.get(name, 0)
                note = "" if gib(now) == gib(n) else f"   ({gib(now)} at the peak)" if now else "   (not at the peak)"
                lines.append(f"  {label:<36}{gib(n):>12}{note}")
        if "gathered" in alive:
            lines.append(f"  {'weights that come together':<36}{gib(alive['gathered']):>12}")
        fits = "" if each.fits is None else ", which fits" if each.fits else ", which does NOT fit"
        lines.append(f'  {"peak: " + each.peak.phase:<36}{gib(each.peak.bytes):>12}{fits}, with keep = "{each.keep}"')
        took = "" if each.seconds is None else f": about {_time(each.seconds)} on this machine"
        lines += [f"  {each.flops:.1e} floating-point operations{took}", ""]
    one = p.stages[0].parts.checkpoint
    lines.append(
        f"disk: {gib(p.disk)}: {p.settings.checkpoints} checkpoints of {gib(one)}, one more while it is written, models"
    )
    if not p.fits:
        for each in p.stages:
            if each.fits is False:
                lines.append(f"stage {each.stage.name} does not fit. Ways out: {'; '.join(_ways(p, each))}.")
    return lines


def _time(n: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if n >= 2 * size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.1f} s"
