"""What a run says of itself: a line of JSON for each step, always; TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .saves import At

FILE = "log.jsonl"
LOGS = ("tensorboard", "wandb")


class Journal:
    """The log of a run in its folder.

    Args:
        out: the folder.
        logs: names out of `LOGS`.
        at: how far the run is that goes on; what was logged of later steps is dropped, as they come again.
        run: what it was told, for those who show it.

    Raises:
        ValueError: an unknown name.
        ImportError: what was asked for is not installed.
    """

    def __init__(self, out: Path, logs: Sequence[str], at: At | None, run: dict[str, Any]) -> None:
        check(logs)
        self.path = out / FILE
        self._before = {(line["kind"], line.get("stage_number")) for line in _cut(self.path, at)}
        self._file = self.path.open("a", encoding="utf-8")
        self._total = 0
        self._writer = self._wandb = None
        if "tensorboard" in logs:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"))
        if "wandb" in logs:
            import wandb

            known = out / "wandb-id"
            name = known.read_text().strip() if known.is_file() else wandb.util.generate_id()
            known.write_text(name + "\n")
            self._wandb = wandb.init(id=name, resume="allow", dir=str(out), config=run)

    def step(self, number: int, body: dict[str, Any]) -> None:
        """A step of the optimizer.

        Args:
            number: over all stages, from 1 on.
            body: what is known of it; its numbers are shown as curves.
        """
        self.note("step", **body)
        curves = {name: body[name] for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second")}
        if self._writer is not None:
            for name, value in curves.items():
                self._writer.add_scalar(f"train/{name}", value, number)
        if self._wandb is not None:
            self._wandb.log({f"train/{name}": value for name, value in curves.items()}, step=number)

    def note(self, kind: str, **body: Any) -> None:
        """A line."""
        line = {"kind": kind, "time": round(time.time(), 3), **body}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def has(self, kind: str, stage_number: int) -> bool:
        """Was such a line there when the run went on?"""
        return (kind, stage_number) in self._before

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def check(logs: Sequence[str]) -> None:
    """Before the work.

    Raises:
        ValueError, ImportError: as `Journal`.
    """
    import importlib.util

    for name in logs:
        if name not in LOGS:
            raise ValueError(f"log: expected names out of {', '.join(LOGS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"log: {name!r} needs the package {name}: pip install {name}")


def read(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log; one that a kill has cut is left out."""
    try:
        text = (Path(out) / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _cut(path: Path, at: At | None) -> list[dict[str, Any]]:
    """Drops what comes again, and a line that was cut. What is left."""
    if not path.exists():
        return []
    kept = [line for line in read(path.parent) if not _comes_again(line, at)]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def _comes_again(line: dict[str, Any], at: At | None) -> bool:
    stage = line.get("stage_number")
    if stage is None:
        return False
    done = (0, 0) if at is None else (at.stage + 1, at.step)
    if line["kind"] == "step":
        return (stage, line["step"]) > done
    # What was said of a stage that is done is not said again.
    return stage > done[0] or (stage == done[0] and not (at is not None and at.ended))
