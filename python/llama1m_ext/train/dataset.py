"""The rows of a stage: where they are, whether they fit, and which ones a step sees."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .stages import Stage

COLUMNS = ("input_ids", "labels", "loss_weights", "position_ids")


class Rows(Protocol):
    """`rows[i]` is a mapping with input_ids, and optionally labels, loss_weights and position_ids, each `[length]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Mapping[str, Any]: ...


class Data:
    """A stage's rows, checked.

    Args:
        stage: it.
        source: a folder, or the rows themselves.
        vocab: tokens that the model knows.
        seed: of the order.

    Raises:
        FileNotFoundError, ValueError: there are none, or they don't fit; the message names the stage.
    """

    def __init__(self, stage: Stage, source: Any, vocab: int, seed: int) -> None:
        self.stage, self.vocab, self.seed = stage, vocab, seed
        self.where = str(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
        self.rows: Rows = _opened(source, stage)
        if len(self.rows) < 1:
            raise ValueError(f"stage {stage.name}: expected rows in {self.where}, got none")
        self.row(0)

    def row(self, i: int) -> dict[str, Tensor]:
        """Row i: input_ids and labels, int64 `[length]`; loss_weights, float32 `[length]`, and position_ids where there are.

        Raises:
            ValueError: it does not fit; the message names stage, row and column.
        """
        found, stage = self.rows[i], self.stage
        made = {}
        for name in COLUMNS:
            value = found[name] if name in found else None  # noqa: SIM401  # `datasets` rows are mappings, others need not be
            if value is None:
                continue
            t = torch.as_tensor(value)
            if t.shape != (stage.length,):
                raise ValueError(
                    f"stage {stage.name}: expected rows of {stage.length} tokens, got {name} of shape {tuple(t.shape)} in "
                    f"row {i} of {self.where}"
                )
            made[name] = t.to(torch.float32 if name == "loss_weights" else torch.int64)
        ids = made.get("input_ids")
        if ids is None:
            raise ValueError(f"stage {stage.name}: expected a column input_ids in {self.where}, got {', '.join(found)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab:
            raise ValueError(
                f"stage {stage.name}: expected tokens from 0 to {self.vocab - 1}, got {low} to {high} in row {i} of {self.where}"
            )
        weights = made.get("loss_weights")
        if weights is not None and not (bool(weights.isfinite().all()) and float(weights.min()) >= 0):
            raise ValueError(f"stage {stage.name}: expected finite loss_weights from 0 on in row {i} of {self.where}")
        made.setdefault("labels", ids)
        return made

    def index(self, n: int) -> int:
        """The n-th row that the stage sees, from 0: each pass over the rows has an order of its own."""
        turn, at = divmod(n, len(self.rows))
        if not self.stage.shuffle:
            return at
        return int(_order(len(self.rows), self.seed, turn)[at])

    def batch(self, numbers: list[int]) -> dict[str, Tensor]:
        """The n-th rows for each n, stacked: `[rows, length]` each."""
        rows = [self.row(self.index(n)) for n in numbers]
        names = {name for row in rows for name in row}
        if any(set(row) != names for row in rows):
            raise ValueError(f"stage {self.stage.name}: expected the same columns in all rows of {self.where}")
        return {name: torch.stack([row[name] for row in rows]) for name in names}


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return torch.randperm(n, generator=generator)


def folder_of(stage: Stage, data: Any) -> Any:
    """Where a stage's rows are: its own `data`, or what is given for all: a mapping by name, rows, or a folder that has them, or
    has a folder by the stage's name or length.

    Raises:
        FileNotFoundError: nowhere.
    """
    if isinstance(data, Mapping) and stage.name in data:
        return data[stage.name]
    if stage.data is not None:
        base = Path(data) if isinstance(data, (str, Path)) else Path()
        here = base / stage.data
        path = here if here.exists() else Path(stage.data)
        if not path.exists():
            raise FileNotFoundError(
                f"stage {stage.name}: expected a folder of rows, got {stage.data!r}, which is not there"
            )
        return path
    if isinstance(data, Mapping):
        raise FileNotFoundError(f"stage {stage.name}: expected data for it, got some for {', '.join(data) or 'none'}")
    if data is None:
        raise FileNotFoundError(f"stage {stage.name}: expected data, got none: give --data DIR, or data in its table")
    if not isinstance(data, (str, Path)):
        return data
    base = Path(data)
    for path in (base / stage.name, base / str(stage.length)):
        if path.is_dir():
            return path
    if (base / "state.json").is_file() or (base / "dataset_info.json").is_file():
        return base
    raise FileNotFoundError(
        f"stage {stage.name}: expected rows in {base / stage.name}, {base / str(stage.length)} or {base}, found none there"
    )


def _opened(source: Any, stage: Stage) -> Rows:
    if not isinstance(source, (str, Path)):
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise ValueError(f"stage {stage.name}: expected rows with len() and [i], got a {type(source).__name__}")
        return source
    if not Path(source).is_dir():
        raise FileNotFoundError(f"stage {stage.name}: expected a folder of rows, got {str(source)!r}")
    try:
        from ..data import open as open_rows  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return _by_datasets(source, stage)
    try:
        return open_rows(source)
    except ValueError as e:
        raise ValueError(f"stage {stage.name}: {e}") from None


def _by_datasets(source: Any, stage: Stage) -> Rows:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(source)).with_format("torch")
    except (FileNotFoundError, ValueError) as e:
        raise ValueError(f"stage {stage.name}: expected a folder of rows that `datasets` reads: {e}") from None
