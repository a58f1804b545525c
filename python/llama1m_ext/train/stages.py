"""What a run of progressive training is told: its stages, from a table of TOML or from Python."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT = "gradient-1048k"
"""The stages of the model card, which the package carries."""
SCHEDULES = ("constant", "linear", "cosine")
KEEP = ("auto", "all", "attention", "inputs")
OFFLOAD = ("none", "host", "disk")
DEVICES = ("replicate", "shard")
DTYPES = ("float32", "bfloat16")
_NAME_BYTES = 200
"""Of a stage's name: its folder has a number before it, and more while it is written."""
_ALIASES = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16"}


class StagesError(ValueError):
    """A table of stages that makes no sense; the message names the stage, the field and what was expected."""


@dataclass(frozen=True)
class Stage:
    """One length, trained for so many steps, from the weights of the stage before.

    A step sees `batch_size * accumulation` rows, over all devices.

    Attributes:
        length: tokens of a row.
        steps: of the optimizer.
        name: of its folder.
        theta: of the rotary embedding; None: as it is, unless there is a method.
        method: instead of a theta: a law of `rope.theta_for`, or "yarn".
        data: a folder of rows (`llama1m data`, or `datasets`' `save_to_disk`), beside the table, in the run's data, or here;
            None: `<data>/<name>`, `<data>/<length>` or `<data>` of the run's.
        batch_size: rows that are computed at a time, over all devices.
        accumulation: how many times that before a step.
        rows_at_once: rows that one device computes at a time; None: its share of `batch_size`.
        learning_rate: the highest.
        schedule: what becomes of it after `warmup`: "constant", "linear" or "cosine" (down to `least_rate` of it).
        warmup: steps that it grows for, from 0.
        least_rate: share of the learning rate at the end.
        betas, eps, weight_decay: AdamW's; matrices decay, norms and biases don't.
        clip: largest norm of the gradients; 0: any.
        shuffle: rows in random order, another one in each pass over them; false: as they lie.
    """

    length: int
    steps: int
    name: str = ""
    theta: float | None = None
    method: str | None = None
    data: str | None = None
    batch_size: int = 1
    accumulation: int = 1
    rows_at_once: int | None = None
    learning_rate: float = 2e-5
    schedule: str = "constant"
    warmup: int = 0
    least_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    shuffle: bool = True

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.batch_size * self.accumulation

    @property
    def tokens(self) -> int:
        """Of all its steps."""
        return self.steps * self.rows * self.length

    def shares(self, teams: int, size: int = 1) -> tuple[int, int]:
        """(rows of a step that one of so many teams computes, how many of them at a time).

        Args:
            size: processes of a team, which share each row.

        Raises:
            StagesError: rows that can't be shared out evenly.
        """
        if self.rows % teams:
            who = "processes" if size == 1 else f"teams of {size} processes"
            raise StagesError(
                f"stage {self.name}: expected batch_size * accumulation to be a multiple of {teams} {who}, got "
                f"{self.batch_size} * {self.accumulation}"
            )
        share, at_once = self.rows // teams, self.rows_at_once or max(1, self.batch_size // teams)
        if share % at_once:
            raise StagesError(
                f"stage {self.name}: rows_at_once: expected a divisor of the {share} rows that a device computes in a step, got {at_once}"
            )
        return share, at_once


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters in the place of full fine-tuning (PEFT).

    Attributes:
        rank, alpha, dropout: as PEFT has them.
        targets: names of the linear modules that get one.
        also: names of modules that are trained whole beside them; LongLoRA (2309.12307) finds norms and embeddings needed.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What all stages share.

    Attributes:
        seed: of the rows' order and of dropout.
        dtype: of the weights that compute. "bfloat16" ones have float32 ones beside them, which the optimizer changes.
        autocast: with float32 weights: matrix products and attention in bfloat16.
        keep: what layers keep for backward (`train.layer.KEEP`); "auto": the most that fits into memory.
        offload: where it waits: "none" (where it is), "host" (behind a GPU), "disk".
        offload_dir: the folder of that file; "": where temporary files go.
        chunk: positions that go through an MLP at a time.
        ce_chunk: positions whose logits are alive at a time; 0: by bytes.
        devices: what several processes do (torchrun): "replicate" all weights, or "shard" them, with gradients and the optimizer's
            states, over all (FSDP2). Each computes rows of its own.
        checkpoint_steps, checkpoint_minutes: a checkpoint after so many steps, or so much time, whichever is first; 0: never.
        checkpoints: how many are kept.
        save_dtype: of the model folders; "": that of the weights.
        lora: None: all weights are trained.
    """

    seed: int = 0
    dtype: str = "bfloat16"
    autocast: bool = False
    keep: str = "auto"
    offload: str = "none"
    offload_dir: str = ""
    chunk: int = 2048
    ce_chunk: int = 0
    devices: str = "replicate"
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 15.0
    checkpoints: int = 2
    save_dtype: str = ""
    lora: Lora | None = None


@dataclass(frozen=True)
class Run:
    """Stages and what they share. `Run.read` has it from TOML, `Run.of` from Python."""

    stages: tuple[Stage, ...]
    settings: Settings = Settings()

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None = None) -> Run:
        """From a file of TOML: fields of `Settings` at the top, fields of `Stage` there too, for all stages that don't say
        otherwise, and a table `[[stage]]` for each; `[lora]` for adapters.

        Args:
            path: the file, or the name of one that the package carries. None: the model card's.

        Raises:
            FileNotFoundError: there is none.
            StagesError: what is in it makes no sense.
        """
        given = DEFAULT if path is None else os.fspath(path)
        shipped = Path(__file__).with_name("stages") / f"{given}.toml"
        file = shipped if not Path(given).exists() and shipped.is_file() else Path(given)
        if not file.is_file():
            known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.toml")))
            raise FileNotFoundError(f"stages: expected a file of TOML, or one of {known}; got {given!r}")
        try:
            table = _toml().loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as e:  # TOMLDecodeError is one
            raise StagesError(f"{file}: expected TOML: {e}") from None
        try:
            run = cls.of(table)
        except StagesError as e:
            raise StagesError(f"{file}: {e}") from None
        beside = [file.parent / stage.data if stage.data else None for stage in run.stages]
        return dataclasses.replace(
            run,
            stages=tuple(
                dataclasses.replace(stage, data=str(path)) if path is not None and path.is_dir() else stage
                for stage, path in zip(run.stages, beside, strict=True)
            ),
        )

    @classmethod
    def of(cls, given: Any) -> Run:
        """From a `Run`, a table as TOML gives it, a list of `Stage`s or of tables, or a path.

        Raises:
            StagesError, FileNotFoundError, TypeError: as `read`.
        """
        if isinstance(given, Run):
            return given
        if given is None or isinstance(given, (str, os.PathLike)):
            return cls.read(given)
        if isinstance(given, Sequence):
            given = {"stage": list(given)}
        if not isinstance(given, Mapping):
            raise TypeError(f"stages: expected a path, a Run, a table or a list of stages, got {type(given).__name__}")
        return _run(given)

    def with_settings(self, **changes: Any) -> Run:
        """With some settings otherwise.

        Raises:
            StagesError: one that makes no sense.
        """
        kept = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(Settings)}
        return dataclasses.replace(self, settings=_settings({**kept, **changes}))

    def to_dict(self) -> dict[str, Any]:
        """In what JSON can hold."""
        return dataclasses.asdict(self)


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    import tomli

    return tomli


_STAGE = {f.name: f for f in dataclasses.fields(Stage)}
_SETTINGS = {f.name: f for f in dataclasses.fields(Settings)}


def _run(table: Mapping[str, Any]) -> Run:
    stages = table.get("stage")
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise StagesError(f"stage: expected at least one [[stage]], got {stages!r:.80}")
    unknown = set(table) - set(_STAGE) - set(_SETTINGS) - {"stage"}
    if unknown:
        raise StagesError(f"expected fields of the run or of its stages, got {', '.join(sorted(unknown))}")
    defaults = {name: value for name, value in table.items() if name in _STAGE}
    settings = {name: value for name, value in table.items() if name in _SETTINGS}
    made = [_stage(i, given, defaults) for i, given in enumerate(stages)]
    names = [stage.name for stage in made]
    for name in names:
        if names.count(name) > 1:
            raise StagesError(f"stage: expected different names, got {name!r} {names.count(name)} times")
    return Run(tuple(made), _settings(settings))


def _stage(i: int, given: Any, defaults: Mapping[str, Any]) -> Stage:
    where = f"stage {i + 1}"
    if isinstance(given, Stage):
        given = {f: getattr(given, f) for f in _STAGE if getattr(given, f) != _STAGE[f].default}
    if not isinstance(given, Mapping):
        raise StagesError(f"{where}: expected a table, got {given!r:.80}")
    unknown = set(given) - set(_STAGE)
    if unknown:
        raise StagesError(f"{where}: expected fields {', '.join(_STAGE)}; got {', '.join(sorted(unknown))}")
    fields = {**defaults, **given}
    if "theta" in given:
        fields.pop("method", None) if "method" not in given else None
    for name in ("length", "steps"):
        if name not in fields:
            raise StagesError(f"{where}: expected {name}, got none")
    for name in ("length", "steps", "batch_size", "accumulation"):
        _whole(where, name, fields.get(name, 1), 1)
    if fields["length"] < 2:
        raise StagesError(f"{where}: length: expected at least 2 tokens, got {fields['length']}")
    _whole(where, "warmup", fields.get("warmup", 0), 0)
    if fields.get("rows_at_once") is not None:
        _whole(where, "rows_at_once", fields["rows_at_once"], 1)
    for name, low in (("learning_rate", 0.0), ("eps", 0.0), ("weight_decay", 0.0), ("clip", 0.0), ("least_rate", 0.0)):
        if name in fields:
            fields[name] = _real(where, name, fields[name], low)
    if fields.get("least_rate", 0.0) > 1:
        raise StagesError(f"{where}: least_rate: expected a share from 0 to 1, got {fields['least_rate']}")
    if fields.get("theta") is not None:
        fields["theta"] = _real(where, "theta", fields["theta"], 1.0)
        if fields.get("method") is not None:
            raise StagesError(
                f"{where}: expected theta or method, got both: {fields['theta']} and {fields['method']!r}"
            )
    betas = fields.get("betas", (0.9, 0.95))
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise StagesError(f"{where}: betas: expected two numbers, got {betas!r}")
    fields["betas"] = tuple(_real(where, "betas", beta, 0.0) for beta in betas)
    if not all(beta < 1 for beta in fields["betas"]):
        raise StagesError(f"{where}: betas: expected numbers below 1, got {list(betas)}")
    _one_of(where, "schedule", fields.get("schedule", "constant"), SCHEDULES)
    name = fields.setdefault("name", "") or _named(fields["length"])
    if not isinstance(name, str) or not name.strip() or {"/", "\0"} & {*name} or name.startswith("."):
        raise StagesError(f"{where}: name: expected the name of a folder, got {name!r}")
    if len(name.encode()) > _NAME_BYTES:
        raise StagesError(f"{where}: name: expected at most {_NAME_BYTES} bytes, got {len(name.encode())}")
    fields["name"] = name
    for text in ("data", "method"):
        if not isinstance(fields.get(text), (str, type(None))):
            raise StagesError(f"{where}: {text}: expected a string, got {fields[text]!r}")
    if not isinstance(fields.get("shuffle", True), bool):
        raise StagesError(f"{where}: shuffle: expected true or false, got {fields['shuffle']!r}")
    if fields.get("warmup", 0) > fields["steps"]:
        raise StagesError(f"{where}: warmup: expected at most {fields['steps']} steps, got {fields['warmup']}")
    return Stage(**fields)


def _settings(given: Mapping[str, Any]) -> Settings:
    where, fields = "run", dict(given)
    for name, least in (("seed", 0), ("chunk", 1), ("ce_chunk", 0), ("checkpoint_steps", 0), ("checkpoints", 1)):
        if name in fields:
            _whole(where, name, fields[name], least)
    if fields.get("seed", 0) >= 1 << 32:
        raise StagesError(f"{where}: seed: expected a whole number below {1 << 32}, got {fields['seed']}")
    if "checkpoint_minutes" in fields:
        fields["checkpoint_minutes"] = _real(where, "checkpoint_minutes", fields["checkpoint_minutes"], 0.0)
    for name in ("dtype", "save_dtype"):
        if name in fields and (name, fields[name]) != ("save_dtype", ""):
            fields[name] = _ALIASES.get(fields[name], fields[name]) if isinstance(fields[name], str) else fields[name]
            _one_of(where, name, fields[name], DTYPES)
    if not isinstance(fields.get("autocast", False), bool):
        raise StagesError(f"{where}: autocast: expected true or false, got {fields['autocast']!r}")
    if fields.get("autocast") and fields.get("dtype", "bfloat16") != "float32":
        raise StagesError(
            f'{where}: autocast: expected dtype = "float32" with it, got {fields.get("dtype", "bfloat16")!r}'
        )
    _one_of(where, "keep", fields.get("keep", "auto"), KEEP)
    _one_of(where, "offload", fields.get("offload", "none"), OFFLOAD)
    _one_of(where, "devices", fields.get("devices", "replicate"), DEVICES)
    if not isinstance(fields.get("offload_dir", ""), str):
        raise StagesError(f"{where}: offload_dir: expected a folder, got {fields['offload_dir']!r}")
    lora = fields.get("lora")
    if isinstance(lora, Mapping):
        fields["lora"] = _lora(lora)
    elif lora is not None and not isinstance(lora, Lora):
        raise StagesError(f"{where}: lora: expected a table, got {lora!r}")
    return Settings(**fields)


def _lora(given: Mapping[str, Any]) -> Lora:
    names = {f.name for f in dataclasses.fields(Lora)}
    if set(given) - names:
        raise StagesError(
            f"lora: expected fields {', '.join(sorted(names))}; got {', '.join(sorted(set(given) - names))}"
        )
    fields = dict(given)
    _whole("lora", "rank", fields.get("rank", 16), 1)
    for name, least in (("alpha", 0.0), ("dropout", 0.0)):
        if name in fields:
            fields[name] = _real("lora", name, fields[name], least)
    if fields.get("dropout", 0.0) >= 1:
        raise StagesError(f"lora: dropout: expected a share below 1, got {fields['dropout']}")
    for name in ("targets", "also"):
        if name in fields:
            if not isinstance(fields[name], (list, tuple)) or not all(isinstance(word, str) for word in fields[name]):
                raise StagesError(f"lora: {name}: expected a list of names, got {fields[name]!r}")
            fields[name] = tuple(fields[name])
    return Lora(**fields)


def _named(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _whole(where: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StagesError(f"{where}: {name}: expected a whole number from {least} on, got {value!r}")


def _real(where: str, name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise StagesError(f"{where}: {name}: expected a number from {least:g} on, got {value!r}")
    return float(value)


def _one_of(where: str, name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise StagesError(f"{where}: {name}: expected one of {', '.join(known)}, got {value!r}")
