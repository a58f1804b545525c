"""Rows of tokens, mapped from disk: what `build` and `write` made, for torch."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .shards import FACTS

_DTYPES = {"input_ids": torch.int64, "labels": torch.int64, "loss_weights": torch.float32}


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style dataset of rows. Made by `open`.

    Files are mapped when a process first needs them, so it can be pickled and used in a `DataLoader`'s workers (with
    `collate`). A row is copied once, from the mapped file into its tensors.

    Attributes:
        path: the folder.
        length: tokens of a row; None if the folder isn't ours and rows may differ.
        columns: what a row has.
        facts: of `build` or `write`: rows, cross_document, and what else they noted.
        fingerprint: of all rows that `build` or `write` made; None if the folder isn't ours.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None, position_ids: bool | None, segments: bool) -> None:
        self.path = path
        self.facts: dict[str, Any] = _json(path / FACTS) if (path / FACTS).is_file() else {}
        self.length: int | None = self.facts.get("length")
        state = _json(path / "state.json")
        try:
            self._names: list[str] = [str(one["filename"]) for one in state["_data_files"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / 'state.json'}: expected _data_files with filenames, got {error!r}") from None
        for name in self._names:
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path / name}: expected a file that state.json names")
        self.fingerprint: str | None = state.get("_fingerprint") if self.facts else None
        self._batches: list[Any] | None = None
        self._starts: np.ndarray = np.zeros(1, dtype=np.int64)
        batches = self._open()
        there = batches[0].schema.names if batches else []
        if "input_ids" not in there:
            raise ValueError(f"{path}: expected a column input_ids, got {', '.join(there) or 'no rows'}")
        if columns is not None and (unknown := set(columns) - set(there)):
            raise ValueError(f"{path}: columns: expected some of {', '.join(there)}, got {', '.join(sorted(unknown))}")
        self._packed = not self.facts.get("cross_document", True) if position_ids is None else position_ids
        if self._packed and "segments" not in there:
            raise ValueError(f"{path}: position_ids: expected a column segments, got {', '.join(there)}")
        self._read = [name for name in there if name != "segments" and (columns is None or name in columns)]
        self._segments = segments and "segments" in there and (columns is None or "segments" in columns)
        packed = ["position_ids", "cu_seqlens"] if self._packed else []
        self.columns = [*self._read, *(["segments"] if self._segments else []), *packed]

    def __len__(self) -> int:
        self._open()
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row.

        Args:
            index: from -len to len - 1.

        Returns:
            `input_ids` int64 `[length]`; `labels` int64 and `loss_weights` float32 `[length]` where the folder has
            them; `segments`, a list of dicts: tokens `start` to `end` of the row are those from `offset` on of
            `document`, which is of `source`. With position ids: `position_ids` int64 `[length]`, from 0 in each
            segment, and `cu_seqlens` int32 `[segments + 1]`, where segments begin and the last one ends.
        """
        batches = self._open()
        count = int(self._starts[-1])
        i = operator.index(index)
        if not -count <= i < count:
            raise IndexError(f"expected a row from {-count} to {count - 1}, got {i}")
        i %= count
        which = int(np.searchsorted(self._starts, i, side="right")) - 1
        batch, at = batches[which], i - int(self._starts[which])
        row: dict[str, Any] = {name: _tensor(batch.column(name), at, name) for name in self._read}
        if self._segments or self._packed:
            segments = batch.column("segments")[at].as_py()
            if self._segments:
                row["segments"] = segments
            if self._packed:
                borders = [0, *(one["end"] for one in segments)]
                lengths = np.diff(borders)
                position_ids = np.arange(borders[-1], dtype=np.int64) - np.repeat(borders[:-1], lengths)
                row["position_ids"] = torch.from_numpy(position_ids)
                row["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}

    def __repr__(self) -> str:
        return f"Rows({str(self.path)!r}: {len(self)} rows of {self.length} tokens, {', '.join(self.columns)})"

    def _open(self) -> list[Any]:
        if self._batches is None:
            batches = []
            for name in self._names:
                try:
                    batches += list(pa.ipc.open_stream(pa.memory_map(str(self.path / name))))
                except (pa.ArrowInvalid, OSError) as error:
                    raise ValueError(f"{self.path / name}: expected Arrow's stream format, got {error}") from None
            self._batches = [batch for batch in batches if batch.num_rows]
            self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
            if self.facts.get("rows", self._starts[-1]) != self._starts[-1]:
                raise ValueError(f"{self.path}: expected {self.facts['rows']} rows, got {self._starts[-1]}")
        return self._batches


def open(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    position_ids: bool | None = None,
    segments: bool = True,
) -> Rows:
    """The rows of a folder that `build` or `write` made, or that `datasets` saved with a column `input_ids`.

    Args:
        path: the folder.
        columns: which ones of the folder's. Default: all.
        position_ids: also give `position_ids` and `cu_seqlens`, with which packed attention keeps documents apart.
            Default: as the folder was made (`cross_document`).
        segments: also give the list of segments; without it a row has tensors only.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: it isn't one of `datasets`, a file is damaged, or a column isn't there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of rows")
    if not (folder / "state.json").is_file():
        raise ValueError(f"{folder}: expected a folder of rows with a state.json, got one without")
    return Rows(folder, columns, position_ids, segments)


def collate(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For a `DataLoader`: tensors of one shape are stacked to `[batch, length]`, all else becomes lists."""
    given = list(rows)
    made: dict[str, Any] = {}
    for name in given[0]:
        values = [row[name] for row in given]
        alike = all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values)
        made[name] = torch.stack(values) if alike and name != "cu_seqlens" else values
    return made


def _tensor(column: Any, at: int, name: str) -> Any:
    if not (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        return column[at].as_py()
    values = column.slice(at, 1).flatten()
    if values.null_count or pa.types.is_nested(values.type) or not pa.types.is_primitive(values.type):
        return column[at].as_py()
    array = values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
    # torch can't share memory that can't be written to; its own copy may be.
    made = torch.empty(len(array), dtype=_DTYPES.get(name) or torch.from_numpy(array[:0].copy()).dtype)
    np.copyto(made.numpy(), array, casting="same_kind")
    return made


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content
