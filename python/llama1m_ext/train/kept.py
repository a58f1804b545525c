"""Where what forward keeps for backward waits: where it is, in main memory behind a GPU, or in a file."""

from __future__ import annotations

import os
import tempfile
from typing import Protocol

import torch
from torch import Tensor

from ..stored import as_bytes, read_bytes, write_bytes

PLACES = (None, "host", "disk")


class Kept(Protocol):
    """A tensor that was put away."""

    def get(self) -> Tensor:
        """The tensor, on its device."""
        ...


class Place(Protocol):
    """Puts tensors away."""

    def put(self, x: Tensor) -> Kept:
        """Keeps x; the caller lets go of it."""
        ...

    def clear(self) -> None:
        """Nothing that was put away is wanted any more."""
        ...


class Here:
    """Where it is."""

    def put(self, x: Tensor) -> Kept:
        return _Same(x)

    def clear(self) -> None:
        pass


class Host:
    """In pinned main memory, behind a GPU."""

    def put(self, x: Tensor) -> Kept:
        return _Same(x) if x.device.type == "cpu" else _OnHost(x)

    def clear(self) -> None:
        pass


class Disk:
    """In a file without a name, which is gone with the process.

    Args:
        folder: where it lies; None: where temporary files go.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(prefix="llama1m-train-", dir=folder)  # noqa: SIM115  # as long as we are
        self._end = 0

    def put(self, x: Tensor) -> Kept:
        dense = x.detach().contiguous()
        data = as_bytes(dense if dense.device.type == "cpu" else dense.cpu())
        at, self._end = self._end, self._end + data.numel()
        try:
            write_bytes(self._file.fileno(), data.numpy().data, at)
        except OSError as e:
            where = self.folder or tempfile.gettempdir()
            raise OSError(e.errno, f"{e.strerror}: activations of {self._end} bytes for backward", where) from e
        return _InFile(self._file.fileno(), at, x)

    def clear(self) -> None:
        self._end = 0


def place(where: str | None, folder: str | None = None) -> Place:
    """By name: None, "host" or "disk".

    Raises:
        ValueError: another name.
    """
    if where not in PLACES:
        raise ValueError(f'offload: expected None, "host" or "disk", got {where!r}')
    if where == "disk":
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        return Disk(folder)
    return Host() if where == "host" else Here()


class _Same:
    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()

    def get(self) -> Tensor:
        return self.x


class _OnHost:
    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        self.copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.copy.copy_(x.detach(), non_blocking=True)

    def get(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=True)


class _InFile:
    def __init__(self, fd: int, at: int, like: Tensor) -> None:
        self.fd, self.at = fd, at
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device

    def get(self) -> Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)
        data = as_bytes(made)
        if read_bytes(self.fd, data.numpy().data, self.at) < data.numel():
            raise OSError(f"activations for backward: expected {data.numel()} bytes at {self.at}, the file is shorter")
        return made.to(self.device)
