"""Rows of one length, written as the Arrow files of a folder that `datasets.load_from_disk` maps."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SHARD_TOKENS = 8 << 20
"""Tokens of a file: what a killed build makes again at most."""
BATCH_TOKENS = 1 << 16
"""Rows shorter than this share a record batch: one for each costs more than they hold."""
FACTS = "llama1m.json"
"""What `open` wants to know beyond what `datasets` does."""
_VALUES = {"input_ids": "int32", "labels": "int32", "loss_weights": "float32"}
_SEGMENT = {"source": "string", "document": "string", "start": "int64", "end": "int64", "offset": "int64"}


class Shards:
    """Writes `data-00000.arrow`, `data-00001.arrow`, ... into a folder. A file has its name when it is whole and on disk.

    Args:
        folder: an existing one.
        length: tokens of every row.
        columns: beside input_ids and segments: labels, loss_weights.
        shard_tokens: a file is finished when it holds as many.
        names: files written before, by whom this one follows.
    """

    def __init__(
        self,
        folder: Path,
        length: int,
        columns: Sequence[str] = (),
        *,
        shard_tokens: int = SHARD_TOKENS,
        names: Iterable[str] = (),
    ) -> None:
        self.folder, self.length, self.columns = folder, length, ("input_ids", *columns)
        self.names = list(names)
        self.rows_per_shard = max(1, shard_tokens // length)
        self.rows = 0
        self._schema = _schema(self.columns)
        self._waiting: list[dict[str, Any]] = []
        self._file: Any = None
        self._writer: Any = None

    def add(self, row: Mapping[str, Any]) -> bool:
        """One row: int32 arrays `[length]` (`loss_weights`: float32), and `segments`, made by `segment`.

        Returns:
            Whether this row finished a file.
        """
        self._waiting.append(dict(row))
        self.rows += 1
        if self.rows == self.rows_per_shard:
            self.finish()
            return True
        if len(self._waiting) * self.length >= BATCH_TOKENS:
            self._flush()
        return False

    def finish(self) -> None:
        """What was added since the last file becomes one."""
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        name = f"data-{len(self.names):05d}.arrow"
        os.replace(self.folder / f"{name}.part", self.folder / name)
        sync_folder(self.folder)
        self.names.append(name)
        self.rows, self._file, self._writer = 0, None, None

    def drop(self) -> None:
        """Gives up on the file that is being written."""
        if self._file is not None:
            self._file.close()
            self._file, self._writer = None, None
        self._waiting, self.rows = [], 0

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            self._file = (self.folder / f"data-{len(self.names):05d}.arrow.part").open("wb")
            self._writer = pa.ipc.new_stream(self._file, self._schema)
        counts = np.arange(len(self._waiting) + 1, dtype=np.int32) * self.length
        arrays = []
        for name in self.columns:
            values = np.concatenate([row[name] for row in self._waiting])
            arrays.append(pa.ListArray.from_arrays(pa.array(counts), pa.array(values)))
        segments = [row["segments"] for row in self._waiting]
        arrays.append(pa.array(segments, self._schema.field("segments").type))
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._waiting = []


def write(
    rows: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    length: int | None = None,
    source: str = "",
    cross_document: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> Any:
    """Writes rows made by anybody, one at a time, to a folder that `open` and `datasets.load_from_disk` read.

    Args:
        rows: each one integers `[length]` (a list, an array, a tensor), or a mapping with `input_ids` and, where wanted,
            `labels` (integers `[length]`), `loss_weights` (numbers `[length]`) and `segments`: mappings with `source`,
            `start`, `end` and, where known, `document` and `offset`, which follow each other from 0 to `length`.
        out: the folder to make. It must not be there. It has its name when all rows are written.
        length: tokens of every row. Default: as many as the first one has.
        source: of rows without segments.
        cross_document: False: `open` gives position ids that begin anew in each segment, unless it is told otherwise.
        shard_tokens: tokens of a file, about.

    Returns:
        The rows, opened: a `Rows`.

    Raises:
        FileExistsError: the folder is there.
        ValueError: a row has another length or other columns than the first one, an id is negative or over 2^31 - 1, a
            weight is not finite, segments leave gaps, or there are no rows. Nothing is left behind.
    """
    from .rows import open as open_rows

    target = Path(out)
    must_be_free(target)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    folder.mkdir()
    shards: Shards | None = None
    try:
        count = 0
        for i, given in enumerate(rows):
            row = _named(given, f"row {i}")
            if shards is None:
                columns = tuple(name for name in ("labels", "loss_weights") if row.get(name) is not None)
                length = len(row["input_ids"]) if length is None else length
                if length < 1:
                    raise ValueError(f"length: expected at least 1 token, got {length}")
                must_have_room(target.parent, len(rows) if isinstance(rows, Sized) else 0, length, len(columns))
                shards = Shards(folder, length, columns, shard_tokens=shard_tokens)
            assert length is not None
            shards.add(_checked(row, length, shards.columns, source, f"row {i}"))
            count = i + 1
        if shards is None or length is None:
            raise ValueError("rows: expected at least one, got none")
        shards.finish()
        write_facts(folder, shards, {"rows": count, "cross_document": cross_document})
        give_name(folder, target)
    except BaseException:
        if shards is not None:
            shards.drop()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return open_rows(target)


def _named(given: Any, who: str) -> Mapping[str, Any]:
    row = given if isinstance(given, Mapping) else {"input_ids": given}
    if row.get("input_ids") is None or set(row) - {*_VALUES, "segments"}:
        raise ValueError(f"{who}: expected input_ids, labels, loss_weights, segments, got the keys {sorted(row)}")
    return row


def _checked(row: Mapping[str, Any], length: int, columns: Sequence[str], source: str, who: str) -> dict[str, Any]:
    got = [name for name in _VALUES if row.get(name) is not None]
    if got != list(columns):
        raise ValueError(f"{who}: expected the columns of the first row, {', '.join(columns)}, got {', '.join(got)}")
    made: dict[str, Any] = {name: _array(row[name], name, length, who) for name in columns}
    segments = row.get("segments")
    made["segments"] = [segment(source, "", 0, length, 0)] if segments is None else _segments(segments, length, who)
    return made


def _array(given: Any, name: str, length: int, who: str) -> np.ndarray:
    values = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
    if values.shape != (length,):
        raise ValueError(f"{who}: {name}: expected {length} values in one dimension, got the shape {values.shape}")
    if name == "loss_weights":
        if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
            raise ValueError(f"{who}: loss_weights: expected finite numbers, got {values.dtype} {_odd(values)}")
        return values.astype(np.float32)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{who}: {name}: expected integers, got {values.dtype}")
    low, high = int(values.min()), int(values.max())
    least = 0 if name == "input_ids" else -(1 << 31)  # labels: -100 where there is no loss
    if low < least or high >= 1 << 31:
        raise ValueError(f"{who}: {name}: expected values from {least} to 2147483647, got {low} to {high}")
    return values.astype(np.int32)


def _odd(values: np.ndarray) -> str:
    if values.dtype.kind != "f":
        return ""
    at = int(np.flatnonzero(~np.isfinite(values))[0])
    return f"with {values[at]} at {at}"


def segment(source: str, document: str, start: int, end: int, offset: int) -> dict[str, Any]:
    """Tokens `start` to `end` of a row are those from `offset` on of `document`, which is of `source`."""
    return {"source": source, "document": document, "start": start, "end": end, "offset": offset}


def _segments(given: Any, length: int, who: str) -> list[dict[str, Any]]:
    made, at = [], 0
    for one in given:
        start, end = int(one["start"]), int(one["end"])
        if start != at or end <= start:
            raise ValueError(f"{who}: segments: expected one that begins at {at}, got {start} to {end}")
        source, document = str(one.get("source") or ""), str(one.get("document") or "")
        made.append(segment(source, document, start, end, int(one.get("offset") or 0)))
        at = end
    if at != length:
        raise ValueError(f"{who}: segments: expected them to end at {length}, got {at}")
    return made


def _features(columns: Iterable[str]) -> dict[str, Any]:
    """As `datasets` 3 writes them; later versions read this form too, and 3 doesn't read theirs."""
    features: dict[str, Any] = {
        name: {"feature": {"dtype": _VALUES[name], "_type": "Value"}, "_type": "Sequence"} for name in columns
    }
    features["segments"] = [{name: {"dtype": dtype, "_type": "Value"} for name, dtype in _SEGMENT.items()}]
    return features


def _schema(columns: Sequence[str]) -> Any:
    of = {"int32": pa.int32(), "int64": pa.int64(), "float32": pa.float32(), "string": pa.string()}
    segment = pa.struct([(name, of[dtype]) for name, dtype in _SEGMENT.items()])
    fields = [(name, pa.list_(of[_VALUES[name]])) for name in columns]
    info = json.dumps({"info": {"features": _features(columns)}})
    return pa.schema([*fields, ("segments", pa.list_(segment))], metadata={"huggingface": info})


def write_facts(folder: Path, shards: Shards, facts: dict[str, Any]) -> None:
    """The JSON files that make a folder of Arrow files one of `datasets`, and ours."""
    digest = hashlib.blake2b(digest_size=8)
    for name in shards.names:  # the files, not the time: the same rows are the same dataset to its caches
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    description = f"{facts['rows']} rows of {shards.length} tokens, written by llama1m-ext"
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in shards.names],
        "_fingerprint": digest.hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": description, "features": _features(shards.columns)}
    write_json(folder / "dataset_info.json", {**info, "homepage": "", "license": ""})
    write_json(folder / "state.json", state)
    write_json(folder / FACTS, {"length": shards.length, "columns": list(shards.columns), **facts})


def write_json(path: Path, content: Any) -> None:
    """The file is the old one or the new one, never a part."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names that were given are on disk when this returns."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def give_name(folder: Path, target: Path) -> None:
    """A finished folder becomes `target`, all at once."""
    if os.path.lexists(target):  # since the start; os.rename would replace an empty folder
        raise FileExistsError(f"{target}: it is there already")
    os.rename(folder, target)
    sync_folder(target.parent)


def must_be_free(target: Path) -> None:
    """Said before the work.

    Raises:
        FileExistsError: something has this name.
        FileNotFoundError: its folder isn't there.
        PermissionError: its folder can't be written to.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target}: it is there already; rows go into a new folder")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent}: expected a folder to make {target.name} in")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{parent}: expected a folder that can be written to")


def must_have_room(folder: Path, rows: int, length: int, columns: int = 0, there: int = 0) -> None:
    """Said before the work.

    Args:
        folder: on the disk in question.
        rows: how many are to be written.
        length: tokens of a row.
        columns: beside input_ids.
        there: bytes of them that are written already.

    Raises:
        OSError: the disk has less.
    """
    need = rows * (length * 4 * (1 + columns) + 4096) - there
    free = shutil.disk_usage(folder.absolute()).free
    if need > free:
        raise OSError(f"{folder}: expected room for {need} bytes of rows, got {free} bytes free")
