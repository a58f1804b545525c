"""Results as they come, in a folder: a run that is killed goes on where it was.

`settings.json` says what was asked; `cells.jsonl` has a line for each result, written at once and to the disk. A line that a
kill left unfinished is cut off when the file is opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llama1m_ext.tensorfile import lock

from .reader import served

SETTINGS, CELLS = "settings.json", "cells.jsonl"


class OtherSettings(ValueError):
    """A folder holds the results of something else."""


class Cells:
    """The results of one run, in memory, and in a folder where there is one.

    Args:
        folder: made if it is not there; None: nothing is kept.
        settings: what the results depend on beside their keys; plain values, one or two levels deep.
        keys: the fields that name a result.

    Attributes:
        resumed: how many were there already.

    Raises:
        OtherSettings: the folder has results under other settings; names each difference.
        FileExistsError: a file is there in place of the folder.
        ValueError: the file is damaged, or another process writes to it.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        self.keys, self._found, self._fd = keys, dict[tuple[Any, ...], dict[str, Any]](), -1
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            if self.folder.exists() and not self.folder.is_dir():
                raise FileExistsError(f"out: expected a folder, got the file {str(self.folder)!r}")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.folder / CELLS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if lock(self._fd) is False:
                    raise ValueError(f"out: {str(self.folder)!r} is in use by another process")
                self._read()
                self._compare(json.loads(json.dumps(settings)))
            except BaseException:
                self.close()
                raise
        self.resumed = len(self._found)

    def _read(self) -> None:
        assert self.folder is not None
        path = self.folder / CELLS
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self._found[tuple(record[key] for key in self.keys)] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"out: expected a result with {', '.join(self.keys)}, got {line[:80]!r} in line {number} of {str(path)!r}"
                ) from None
        if whole < len(data):
            os.ftruncate(self._fd, whole)

    def _compare(self, settings: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / SETTINGS
        if not path.exists():
            if self._found:
                raise ValueError(
                    f"out: {str(self.folder)!r} has results and no {SETTINGS}: it is not known what they are of"
                )
            write_json(path, settings)
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"out: {str(path)!r} is no JSON ({error})") from None
        found = differences(before, settings)
        if found and not self._found:  # nothing is lost
            write_json(path, settings)
        elif found:
            raise OtherSettings(
                f"out: {str(self.folder)!r} has {len(self._found)} results of other settings: {'; '.join(found)}. Take another "
                "folder, or remove that one"
            )

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._found

    def get(self, key: tuple[Any, ...]) -> dict[str, Any]:
        """A result, by the values of its keys in their order."""
        return self._found[key]

    def add(self, record: Mapping[str, Any]) -> None:
        """Keeps a result; when this returns it is on the disk."""
        record = dict(record)
        if self._fd >= 0:
            os.write(self._fd, (json.dumps(record, ensure_ascii=False) + "\n").encode())
            os.fsync(self._fd)
        self._found[tuple(record[key] for key in self.keys)] = record

    def close(self) -> None:
        """Closes the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Cells:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """In words where two settings differ; of two things with other names, only the names."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: list[str] = []
        if "name" in before and "name" in now and before["name"] != now["name"]:
            return differences(before["name"], now["name"], f"{name}.name")
        for key in sorted({*before, *now}):
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if before == now else [f"{name}: there {before!r:.120}, now {now!r:.120}"]


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, or replaces it as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def model_settings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What answers depend on: every weight, theta, the KV format, the words of the tokenizer. Plain values.

    Reading all weights takes seconds for a large model, once for each model object where this package serves it.
    """
    import torch

    from llama1m_ext.options import options
    from llama1m_ext.stored import as_bytes, checksums

    found: dict[str, Any] = {"tokenizer": tokenizer_digest(tokenizer)}
    both = served(model)
    if both is not None:
        from llama1m_ext.fingerprint import identity

        inner, head = both
        found |= identity(inner).as_dict()
        found["kv"] = options(inner).kv
        tensors = dict(head.named_parameters())
    else:
        found["config"] = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
        found["dtype"] = str(model.dtype)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    digest = hashlib.blake2b(digest_size=16)
    here = {name: tensor for name, tensor in sorted(tensors.items()) if tensor.device.type != "meta"}
    with torch.no_grad():
        sums = checksums(as_bytes(tensor.detach().contiguous()).cpu() for tensor in here.values())
    for (name, tensor), total in zip(here.items(), sums, strict=True):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total:016x}\n".encode())
    found["output" if both is not None else "weights"] = digest.hexdigest()
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """Of the vocabulary and the chat template."""
    words = json.dumps([sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)], default=str)
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def text_digest(text: str) -> str:
    """Of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
