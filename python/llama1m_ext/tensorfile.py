"""Safetensors files of any size: written in one stream and replaced as a whole, read by header, never trusted.

What is written here has a checksum (xxh3, 64 bits) of every tensor and of the header in its metadata, and is a valid
safetensors file, which other programs can read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stored import ALIGN, CacheDamaged, PageSource, Span, as_bytes, checksum, read_bytes, write_bytes

CHECKSUMS = "llama1m.xxh3"
"""The metadata's name for the checksums: 16 hexadecimal digits for each tensor, in the order of the file."""
HEADER = "llama1m.header.xxh3"
"""Its name for the checksum of all bytes before the first tensor, these 16 digits as zeros."""
MAX_HEADER = 100_000_000
"""Bytes of a header, at most: as in the safetensors library."""
_PAD = "llama1m.pad"
_FETCH = 64 << 20
"""Bytes that are fetched from a GPU at a time."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_REAL = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

Entry = tuple[str, torch.dtype, tuple[int, ...], Iterable[Tensor]]
"""Of a tensor that is written: name, dtype, shape, and its elements in order, in contiguous parts of that dtype."""


def write(
    path: str | os.PathLike[str], tensors: Iterable[Entry], metadata: Mapping[str, str], *, align: bool = True
) -> None:
    """Writes a file, or replaces it: a kill at any moment leaves the old one or the new one.

    The parts are asked for one after the other, and written at once.

    Args:
        path: the file; its folder must be there.
        tensors: what is in it.
        metadata: words beside them.
        align: begin each tensor at a multiple of 64 bytes, with padding between, which other programs see as tensors.

    Raises:
        OSError: there is no room, or the folder can't be written to. The old file is as it was.
        ValueError: parts that are not what was announced.
    """
    path = Path(os.path.realpath(path))  # what a symbolic link points to is replaced, not the link
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file, got a folder", str(path))
    entries = list(tensors)
    header: dict[str, Any] = {}
    places: list[tuple[int, Entry]] = []
    end = 0
    for name, dtype, shape, parts in entries:
        if align and end % ALIGN:
            pad = ALIGN - end % ALIGN
            zeros = torch.zeros(pad, dtype=torch.uint8)
            header[f"{_PAD}.{end}"] = _described(torch.uint8, (pad,), end)
            places.append((end, (f"{_PAD}.{end}", torch.uint8, (pad,), [zeros])))
            end += pad
        if name in header or name == "__metadata__":
            raise ValueError(f"tensors: expected different names, got {name!r} twice")
        header[name] = _described(dtype, shape, end)
        places.append((end, (name, dtype, shape, parts)))
        end += math.prod(shape) * dtype.itemsize
    start = len(_packed(header, metadata, [0] * len(places)))
    with _replacing(path) as fd:
        free = shutil.disk_usage(path.parent).free
        if start + end > free:
            raise OSError(errno.ENOSPC, f"it takes {start + end} bytes, and {free} are free", str(path))
        try:
            sums = [_write_tensor(fd, start + at, entry) for at, entry in places]
            write_bytes(fd, memoryview(_packed(header, metadata, sums)), 0)
            os.fsync(fd)
        except OSError as e:
            if e.filename is not None:
                raise  # a part could not be read, from another file
            message = f"{e.strerror}: it takes {start + end} bytes, and {free} were free"
            raise OSError(e.errno, message, str(path)) from e


def read(where: str | os.PathLike[str] | PageSource) -> tuple[dict[str, str], dict[str, tuple[Span, int | None]]]:
    """Reads what is in a file, but not the tensors.

    Args:
        where: a path, or the open file: then what is found is in that file, whoever replaces it meanwhile.

    Returns:
        The metadata, and for each tensor where it lies, and its checksum; None where none is known (somebody else's file).

    Raises:
        CacheDamaged: not a valid safetensors file.
        OSError: it can't be read.
    """
    source = where if isinstance(where, PageSource) else PageSource.open(where)
    path, (size, _) = source.name, source.state(0)
    prefix = torch.zeros(8, dtype=torch.uint8)
    if size >= 8:
        source.read(0, prefix)
    length = int.from_bytes(prefix.numpy().tobytes(), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise CacheDamaged(f"{path}: expected a safetensors file, found {size} bytes with no header in them")
    packed = torch.empty(8 + length, dtype=torch.uint8)
    source.read(0, packed)
    raw = packed.numpy().tobytes()
    data = raw[8:]
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are no strings")
        spans = {name: _span(name, entry, 8 + length) for name, entry in header.items()}
        _check_places(list(spans.values()), 8 + length, size)
        sums = _checksums(metadata.pop(CHECKSUMS, None), spans)
        if metadata.pop(HEADER, None) is not None or sums:
            at = _place_of_checksum(raw)
            if raw[at : at + 16].decode() != f"{_checksum_of_header(raw, at):016x}":
                raise ValueError("the header has another checksum than when it was written: the file is damaged")
    except (ValueError, RecursionError) as e:
        # Words of the file, however many it has.
        raise CacheDamaged(f"{path}: expected a safetensors file: {e!s:.300}") from None
    found = {name: (spans[name], sums.get(name)) for name in spans if not name.startswith(_PAD)}
    return metadata, found


def sweep(folder: str | os.PathLike[str], name: str = "") -> None:
    """Removes what writers that were killed have left in a folder.

    Args:
        name: of the file that they were to write; default: all of them.
    """
    pattern = re.compile(rf"\.{re.escape(name) if name else '.+'}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    fd = os.open(entry.path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
                    try:
                        if lock(fd):  # nobody writes to it
                            os.unlink(entry.path)
                    finally:
                        os.close(fd)


def rows(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in order, in contiguous parts in main memory: all of it at once, or as few rows as it takes;
    from a GPU in blocks."""
    if tensor.is_contiguous():
        yield from [tensor.detach()] if tensor.device.type == "cpu" else _fetched(tensor.detach().view(-1))
    elif tensor.dim() > 1 and tensor.numel():
        for row in tensor:
            yield from rows(row)
    elif tensor.numel():
        yield tensor.detach().contiguous().cpu()


def _fetched(flat: Tensor) -> Iterator[Tensor]:
    for part in flat.split(max(1, _FETCH // flat.element_size())):
        yield part.cpu()


def described(key: str, body: Mapping[str, Any]) -> dict[str, str]:
    """Metadata that hold an object of JSON under this name, with a checksum (SHA-256) beside it."""
    text = json.dumps(body, sort_keys=True)
    return {key: text, f"{key}.sha256": _sha256(text)}


def description(metadata: Mapping[str, str], key: str, path: str) -> dict[str, Any]:
    """The opposite of `described`.

    Args:
        path: what messages call the file.

    Raises:
        CacheDamaged: there is none, or it is not what was written.
    """
    text = metadata.get(key)
    if text is None:
        raise CacheDamaged(f"{path}: expected metadata {key!r}, found a safetensors file without")
    if _sha256(text) != metadata.get(f"{key}.sha256"):
        raise CacheDamaged(f"{path}: the metadata are not what was written: the file is damaged")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CacheDamaged(f"{path}: the metadata make no sense: {e!r}") from None
    if not isinstance(body, dict):
        raise CacheDamaged(f"{path}: the metadata make no sense: expected an object, got {text!r:.80}")
    return body


def dtype_name(dtype: torch.dtype) -> str:
    """As metadata call it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """The opposite of `dtype_name`, for dtypes of keys and values.

    Raises:
        ValueError: another name.
    """
    if not isinstance(name, str) or name not in _REAL:
        raise ValueError(f"dtypes: expected one of {', '.join(_REAL)}, got {name!r:.80}")
    return _REAL[name]


# -- writing -----------------------------------------------------------------------------------------------------------


def _described(dtype: torch.dtype, shape: tuple[int, ...], at: int) -> dict[str, Any]:
    if dtype not in _NAMES:
        raise ValueError(f"tensors: expected one of {', '.join(map(str, _NAMES))}, got {dtype}")
    end = at + math.prod(shape) * dtype.itemsize
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}


def _packed(header: Mapping[str, Any], metadata: Mapping[str, str], sums: list[int]) -> bytes:
    """The length and the header, padded so that the tensors begin at a multiple of 64 bytes."""
    words = {**metadata, HEADER: "0" * 16, CHECKSUMS: "".join(f"{value:016x}" for value in sums)}
    text = json.dumps({"__metadata__": words, **header}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    if len(text) > MAX_HEADER:
        raise ValueError(f"tensors: expected a header of at most {MAX_HEADER} bytes, got {len(text)}")
    packed = struct.pack("<Q", len(text)) + text
    at = _place_of_checksum(packed)
    return packed[:at] + f"{_checksum_of_header(packed, at):016x}".encode() + packed[at + 16 :]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # JSON can say half a character


def _place_of_checksum(packed: bytes) -> int:
    """Where a header has its own checksum.

    Raises:
        ValueError: nowhere, or in two places.
    """
    key = f'"{HEADER}":"'.encode()
    at = packed.find(key)
    if at < 0 or packed.find(key, at + 1) >= 0:
        raise ValueError(f"expected one {HEADER} in the metadata")
    return at + len(key)


def _checksum_of_header(packed: bytes, at: int) -> int:
    zeroed = bytearray(packed)
    zeroed[at : at + 16] = b"0" * 16
    return checksum(torch.frombuffer(zeroed, dtype=torch.uint8))


def _write_tensor(fd: int, at: int, entry: Entry) -> int:
    """Writes a tensor's parts; returns its checksum."""
    name, dtype, shape, parts = entry
    nbytes, done, value, count = math.prod(shape) * dtype.itemsize, 0, None, 0
    for part in parts:
        if part.dtype != dtype or not part.is_contiguous() or part.device.type != "cpu":
            raise ValueError(f"{name}: expected contiguous parts of {dtype}, got {part.dtype} on {part.device}")
        data = as_bytes(part)
        if done + data.numel() > nbytes:
            raise ValueError(f"{name}: expected {nbytes} bytes for {dtype} {shape}, the parts have more")
        write_bytes(fd, data.numpy().data, at + done)
        done, count = done + data.numel(), count + 1
        value = checksum(data) if done == nbytes and count == 1 else None
    if done != nbytes:
        raise ValueError(f"{name}: expected {nbytes} bytes for {dtype} {shape}, the parts have {done}")
    return _checksum_of_file(fd, at, nbytes) if value is None else value


def _checksum_of_file(fd: int, at: int, nbytes: int) -> int:
    """Of what was just written in several parts, seen through a map: it is in memory still."""
    if not nbytes:
        return checksum(torch.empty(0, dtype=torch.uint8))
    start = at // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        seen = mmap.mmap(
            fd, at - start + nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start
        )
        return checksum(torch.frombuffer(seen, dtype=torch.uint8)[at - start :])
    except (OSError, ValueError, OverflowError):
        pass  # no room in the address space, or a file system without maps
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if read_bytes(fd, memory.numpy().data, at) < nbytes:
        raise OSError(errno.EIO, "a file has become shorter while it was written")
    return checksum(memory)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """A temporary file beside `path`, which takes its place in the end."""
    sweep(path.parent, path.name)
    temporary, fd = _temporary(path)
    try:
        try:
            yield fd
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):  # not all systems can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary(path: Path) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        lock(fd)  # as long as it is open, nobody sweeps it away
        if os.fstat(fd).st_nlink:
            return temporary, fd
        os.close(fd)  # somebody did, just before


def lock(fd: int) -> bool | None:
    """Locks a file for as long as it is open. False where another process has it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


# -- reading -----------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _span(name: str, entry: Any, start: int) -> Span:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r}: expected a dtype of {', '.join(_DTYPES)}, got {dtype!r}")
    for numbers in (shape, offsets):
        # No number is larger than a file can be, so that products stay exact and quick.
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"tensor {name!r}: expected lists of numbers from 0 on, got {numbers!r:.80}")
    if len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"tensor {name!r}: expected two offsets and at most 8 axes, got {offsets} and {shape}")
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"tensor {name!r}: {dtype} {shape} takes {nbytes} bytes, not {offsets[1] - offsets[0]}")
    return Span(start + offsets[0], nbytes, _DTYPES[dtype], tuple(shape))


def _check_places(spans: list[Span], start: int, size: int) -> None:
    """One tensor after the other, without gaps, to the end of the file."""
    for span in sorted(spans, key=lambda span: (span.offset, span.nbytes)):
        if span.offset != start:
            raise ValueError(f"expected a tensor at byte {start}, found one at {span.offset}")
        start += span.nbytes
    if start != size:
        raise ValueError(f"the tensors end at byte {start}, the file at {size}")


def _checksums(text: str | None, spans: Mapping[str, Span]) -> dict[str, int]:
    if text is None:
        return {}
    if not re.fullmatch(rf"[0-9a-f]{{{16 * len(spans)}}}", text):
        raise ValueError(f"expected {len(spans)} checksums of 16 digits, got {len(text)} characters")
    order = sorted(spans, key=lambda name: (spans[name].offset, spans[name].nbytes))
    return {name: int(text[16 * i : 16 * i + 16], 16) for i, name in enumerate(order)}
