"""The rows of a stage: where they are, whether they fit, and which ones a step sees."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import data
from .cross_entropy import IGNORED
from .stages import Stage

COLUMNS = ("input_ids", "labels", "loss_weights", "position_ids")


class Rows(Protocol):
    """`rows[i]` is a mapping with input_ids, and optionally labels, loss_weights and position_ids, each `[length]`. With
    cu_seqlens, `[documents + 1]`, a row is packed of documents that don't see each other."""

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
        self.fingerprint: str | None = self.rows.fingerprint if isinstance(self.rows, data.Rows) else None
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
        borders = found["cu_seqlens"] if "cu_seqlens" in found else None  # noqa: SIM401
        if borders is not None:
            made["cu_seqlens"] = torch.as_tensor(borders)
            if made["cu_seqlens"].dim() != 1 or int(made["cu_seqlens"][-1]) != stage.length:
                raise ValueError(
                    f"stage {stage.name}: expected cu_seqlens from 0 to {stage.length}, got {borders!r:.80} in row {i} of {self.where}"
                )
            # A document's first token is not told from the one before it.
            made["labels"] = made["labels"].index_fill(0, made["cu_seqlens"][:-1].long(), IGNORED)
        return made

    def index(self, n: int) -> int:
        """The n-th row that the stage sees, from 0: each pass over the rows has an order of its own."""
        turn, at = divmod(n, len(self.rows))
        if not self.stage.shuffle:
            return at
        return int(_order(len(self.rows), self.seed, turn)[at])

    def batch(self, numbers: list[int]) -> tuple[dict[str, Tensor], list[list[int]] | None]:
        """The n-th rows for each n, stacked, `[rows, length]` each; and where the documents in each begin and end, if they
        don't see each other."""
        rows = [self.row(self.index(n)) for n in numbers]
        names = {name for row in rows for name in row}
        if any(set(row) != names for row in rows):
            raise ValueError(f"stage {self.stage.name}: expected the same columns in all rows of {self.where}")
        borders = [row.pop("cu_seqlens").tolist() for row in rows] if "cu_seqlens" in names else None
        return {name: torch.stack([row[name] for row in rows]) for name in names - {"cu_seqlens"}}, borders


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return torch.randperm(n, generator=generator)


def folder_of(stage: Stage, given: Any) -> Any:
    """Where a stage's rows are: its own `data`, or what is given for all: a mapping by name, rows, or a folder that has them, or
    has a folder by the stage's name or length.

    Raises:
        FileNotFoundError: nowhere.
    """
    if isinstance(given, Mapping) and stage.name in given:
        return given[stage.name]
    if stage.data is not None:
        base = Path(given) if isinstance(given, (str, Path)) else Path()
        here = base / stage.data
        path = here if here.exists() else Path(stage.data)
        if not path.exists():
            raise FileNotFoundError(
                f"stage {stage.name}: expected a folder of rows, got {stage.data!r}, which is not there"
            )
        return path
    if isinstance(given, Mapping):
        raise FileNotFoundError(f"stage {stage.name}: expected data for it, got some for {', '.join(given) or 'none'}")
    if given is None:
        raise FileNotFoundError(f"stage {stage.name}: expected data, got none: give --data DIR, or data in its table")
    if not isinstance(given, (str, Path)):
        return given
    base = Path(given)
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
        return data.open(source, segments=False)
    except ValueError as e:
        raise ValueError(f"stage {stage.name}: {e}") from None
