"""Where documents come from: files of JSON lines, parquet, folders and names of `datasets`, or rows in memory."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSED = ("", ".gz", ".xz", ".zst", ".bz2")
SUFFIXES = (*(lines + packed for lines in JSON_LINES for packed in COMPRESSED), ".parquet")
_ROWS = 16
"""Rows of parquet and Arrow in memory at a time: one may be a book."""
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?")


class SourceError(ValueError):
    """A source can't be read, or a row in it is not as it should be. The message names both."""


class RowError(SourceError):
    """One row is not as it should be; those after it may be."""


@dataclass(frozen=True)
class Part:
    """A file, or whatever else is read from its start to its end.

    Attributes:
        name: begins the ids of its documents.
        digest: tells it from another one of this name, as far as that shows at a glance.
        nbytes: on disk; 0 where that isn't known.
        read: the rows, from the first on, or a RowError in place of one.
    """

    name: str
    digest: str
    nbytes: int
    read: Callable[[Sequence[str]], Iterator[Mapping[str, Any] | RowError]]


def resolve(sources: Any) -> list[Part]:
    """What the sources consist of, in an order that doesn't depend on the machine.

    Args:
        sources: one or several: files (.jsonl, .json with a row a line, plain or .gz, .xz, .bz2, .zst; .parquet), folders
            of such files, folders that `datasets` saved (`FOLDER@SPLIT` of several splits), names on the hub
            (`NAME`, `NAME:CONFIG@SPLIT`; streamed), or objects: a `datasets.Dataset`, an iterable of mappings.

    Raises:
        FileNotFoundError: a path isn't there.
        SourceError: nothing in it can be read.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) or hasattr(sources, "column_names") else list(sources)
    if given and all(isinstance(one, Mapping) for one in given):
        given = [given]  # rows in memory, not a list of sources
    if not given:
        raise SourceError("sources: expected at least one, got none")
    parts: list[Part] = []
    for i, one in enumerate(given):
        parts += _of_name(os.fspath(one)) if isinstance(one, (str, os.PathLike)) else [_of_object(one, f"source{i}")]
    seen: dict[str, int] = {}
    unique = []
    for part in parts:
        name = part.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # files may have any
        times = seen[name] = seen.get(name, 0) + 1
        name = name if times == 1 else f"{name}~{times}"
        unique.append(Part(name, part.digest, part.nbytes, part.read))
    return unique


def _of_name(name: str) -> list[Part]:
    path, split = Path(name), ""
    if not path.exists() and "@" in name:
        path, split = Path(name.rpartition("@")[0]), name.rpartition("@")[2]
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return [_of_saved(path, split)]
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise SourceError(f"{path}: expected files named *{', *'.join(SUFFIXES[::5])} in it, got none")
        return [_of_file(file, file.relative_to(path).as_posix()) for file in files]
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise SourceError(f"{path}: expected a name that ends with {', '.join(SUFFIXES)}")
        return [_of_file(path, path.name)]
    if _HUB.fullmatch(name) and not path.parent.is_dir():
        return [_of_hub(name)]
    raise FileNotFoundError(f"{name}: expected a file, a folder, or a dataset's name on the hub")


def _of_file(path: Path, name: str) -> Part:
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise SourceError(f"{path}: expected a file that can be read, got {error}") from None
    size = path.stat().st_size
    digest = f"{size}:{hashlib.blake2b(start, digest_size=8).hexdigest()}"
    if path.suffix == ".parquet":
        return Part(name, digest, size, lambda columns: _parquet(path, columns))
    return Part(name, digest, size, lambda columns: _lines(path))


def _lines(path: Path) -> Iterator[Mapping[str, Any] | RowError]:
    number = 0
    try:
        with _opened(path) as file:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield RowError(f"{path}: line {number}: expected a JSON object, got {error}")
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    yield RowError(f"{path}: line {number}: expected a JSON object, got {type(row).__name__}")
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise SourceError(f"{path}: after line {number}: expected more of the file, got {error}") from None


def _opened(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 16)
    return open(path, "rb")


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any] | RowError]:
    import pyarrow.parquet as pq

    first = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            _must_have(columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(_ROWS, columns=list(columns), use_threads=False):
                yield from _rows(batch, str(path), first)
                first += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: expected parquet, got {error}") from None


def _rows(table: Any, who: str, first: int) -> list[Mapping[str, Any] | RowError]:
    """Of a few rows of Arrow, of which `first` is the number of the first; text that isn't UTF-8 spoils its own only."""
    try:
        made: list[Mapping[str, Any] | RowError] = table.to_pylist()
        return made
    except UnicodeDecodeError as error:
        if len(table) == 1:
            return [RowError(f"{who}: row {first}: expected text in UTF-8, got {error}")]
    return [row for i in range(len(table)) for row in _rows(table.slice(i, 1), who, first + i)]


def _must_have(columns: Sequence[str], there: Sequence[str], who: str) -> None:
    missing = [name for name in columns if name not in there]
    if missing:
        raise SourceError(f"{who}: expected a field {missing[0]!r}, got the columns {', '.join(there)}")


def _of_saved(path: Path, split: str) -> Part:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, Mapping):
        name = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else "")
        if name not in loaded:
            raise SourceError(f"{path}@{name}: expected one of the splits {', '.join(loaded)}")
        return _of_dataset(loaded[name], f"{path.name}@{name}")
    if split:
        raise SourceError(f"{path}@{split}: expected a folder of several splits, got one without")
    return _of_dataset(loaded, path.name)


def _of_hub(name: str) -> Part:
    import datasets

    base, _, split = name.partition("@")
    base, _, config = base.partition(":")
    try:
        loaded = datasets.load_dataset(base, config or None, split=split or "train", streaming=True)
    except Exception as error:  # of the network, of the hub, of its libraries: all kinds
        raise SourceError(f"{name}: expected a file, a folder, or a dataset on the hub, got {error}") from None
    return Part(base, name, 0, lambda columns: iter(loaded))


def _of_dataset(loaded: Any, name: str) -> Part:
    def read(columns: Sequence[str]) -> Iterator[Mapping[str, Any] | RowError]:
        _must_have(columns, loaded.column_names, name)
        for i, table in enumerate(loaded.select_columns(list(columns)).with_format("arrow").iter(_ROWS)):
            yield from _rows(table, name, i * _ROWS)

    return Part(name, f"{len(loaded)}:{loaded._fingerprint}", loaded.dataset_size or 0, read)


def _of_object(given: Any, name: str) -> Part:
    if hasattr(given, "with_format") and hasattr(given, "_fingerprint"):
        return _of_dataset(given, name)
    if not isinstance(given, Iterable) or isinstance(given, Iterator):  # read once to look at it, and to resume again
        kinds = "a path, a dataset or rows that can be read more than once"
        raise SourceError(f"{name}: expected {kinds}, got {type(given).__name__}")
    return Part(name, str(len(given)) if isinstance(given, Sized) else "", 0, lambda columns: iter(given))
