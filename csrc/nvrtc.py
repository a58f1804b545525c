"""NVRTC by ctypes: a kernel file in, a cubin with its figures out. For the build and its gates; the package itself compiles from Rust.

Kernels include nothing but files of this folder, and those are given to the compiler from memory: no include path, no CUDA headers,
and nothing of this machine in the result.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPTIONS = ("--std=c++17",)  # src/cuda/nvrtc.rs has the same; what is hashed
VERBOSE = "--ptxas-options=-v"  # registers and spills come back in the log; the code is the same


class CompileError(Exception):
    """The compiler refused a kernel; its log is the message."""


@dataclass
class Entry:
    """What ptxas said about one kernel, and what its PTX declares."""

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    smem: int = 0  # static only
    barriers: int = 0
    param_bytes: int = 0
    max_threads: int = 0  # of __launch_bounds__; 0: none given
    min_blocks: int = 0
    setmaxnreg: tuple[int, ...] = ()  # decreases first

    def figures(self) -> dict[str, int]:
        """What the manifest keeps."""
        return {name: getattr(self, name) for name in ("registers", "spill_stores", "spill_loads", "stack", "smem")}


@dataclass
class Program:
    """A compiled kernel file."""

    source: str
    arch: str
    cubin: bytes
    ptx: str
    log: str
    entries: dict[str, Entry] = field(default_factory=dict)


def kernel_files(folder: Path = HERE) -> list[Path]:
    """Every kernel file, in order of name."""
    return sorted(folder.glob("*.cu"))


def headers(folder: Path = HERE) -> list[Path]:
    """Every header that a kernel may include, in order of name."""
    return sorted([*folder.glob("*.cuh"), *folder.glob("*.h")], key=lambda path: path.name.encode())


def fits(source: str, arch: str) -> bool:
    """Whether a kernel file is meant for an architecture: wgmma and TMA are Hopper's own."""
    return "sm90" not in source or arch == "sm_90a"


def source_hash(path: Path) -> str:
    """What a cubin was made from: the kernel file, all headers and the options. src/cuda/cubin.rs computes the same."""
    digest = hashlib.sha256()
    for part in [path, *headers(path.parent)]:
        text = part.read_bytes()
        digest.update(part.name.encode() + b"\0" + str(len(text)).encode() + b"\0" + text)
    digest.update(b"options\0" + "\n".join(OPTIONS).encode())
    return digest.hexdigest()


def library_in(folder: str | os.PathLike) -> Path | None:
    """libnvrtc under a folder: as pip lays it out (nvidia/cu13/lib, nvidia/cuda_nvrtc/lib), or a toolkit (lib64), or right there."""
    for places in ("nvidia/cu*/lib", "nvidia/cuda_nvrtc/lib", "lib64", "lib", "targets/*/lib", "."):
        for place in sorted(glob.glob(os.path.join(folder, places)), reverse=True):
            found = [name for name in glob.glob(os.path.join(place, "libnvrtc.so*")) if os.path.isfile(name)]
            if found:
                return Path(max(found, key=lambda name: ("alt" not in name, name)))
    return None


def installed() -> Path | None:
    """The NVRTC that this interpreter's torch brings, LLAMA1M_CUDA_NVRTC first, or a toolkit's."""
    override = os.environ.get("LLAMA1M_CUDA_NVRTC")
    if override:
        path = Path(override)
        found = path if path.is_file() else library_in(path)
        if found is None:
            raise FileNotFoundError(f"LLAMA1M_CUDA_NVRTC: expected libnvrtc or a folder that has it, got {override}")
        return found
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in [*sys.path, *toolkits, "/usr/local/cuda"]:
        found = library_in(folder) if folder else None
        if found:
            return found
    return None


class Nvrtc:
    """One NVRTC library."""

    def __init__(self, library: str | os.PathLike):
        self.path = Path(library)
        # libnvrtc has no RPATH: its builtins must be mapped before it looks for them by name.
        for builtins in sorted(self.path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
        self.lib = ctypes.CDLL(str(self.path))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def archs(self) -> list[str]:
        """Architectures that it can compile for, as sm_80."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return [f"sm_{number}" for number in numbers]

    def compile(self, path: Path, arch: str, options: tuple[str, ...] = OPTIONS) -> Program:
        """A kernel file for one architecture; raises CompileError with the log."""
        # NVRTC 12.4 leaves the locale of the thread that calls it at "C": not ours, where Python would read and write ASCII.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._compile, path, arch, options).result()

    def _compile(self, path: Path, arch: str, options: tuple[str, ...]) -> Program:
        parts = headers(path.parent)
        count = len(parts)
        names = (ctypes.c_char_p * count)(*[part.name.encode() for part in parts])
        texts = (ctypes.c_char_p * count)(*[part.read_bytes() for part in parts])
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), path.read_bytes(), path.name.encode(), count, texts, names
        )
        try:
            given = [f"--gpu-architecture={arch}", *options, VERBOSE]
            line = (ctypes.c_char_p * len(given))(*[option.encode() for option in given])
            status = self.lib.nvrtcCompileProgram(program, len(given), line)
            log = self._bytes("nvrtcGetProgramLog", program).decode(errors="replace")
            if status != 0:
                raise CompileError(f"{path.name} for {arch} by NVRTC {self.version}: {self._error(status)}\n{log}")
            ptx = self._bytes("nvrtcGetPTX", program).decode()
            return Program(
                path.name, arch, self._bytes("nvrtcGetCUBIN", program, text=False), ptx, log, _entries(log, ptx)
            )
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, name: str, program: ctypes.c_void_p, text: bool = True) -> bytes:
        size = ctypes.c_size_t()
        self._call(name + "Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(name, program, buffer)
        return buffer.raw[: size.value].rstrip(b"\0") if text else buffer.raw[: size.value]

    def _call(self, name: str, *args) -> None:
        status = getattr(self.lib, name)(*args)
        if status != 0:
            raise CompileError(f"{name}: {self._error(status)}")

    def _error(self, status: int) -> str:
        return f"{self.lib.nvrtcGetErrorString(status).decode()} ({status})"


def _entries(log: str, ptx: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    entry, ours = Entry(), False
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            entry = entries.setdefault(found[1], Entry())
        elif found := re.search(r"Function properties for (\w+)", line):
            ours = found[1] in entries  # else a function that was not inlined: its frame is its own
            entry = entries.get(found[1], entry)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            if ours or entry.stack == entry.spill_stores == entry.spill_loads == 0:
                entry.stack, entry.spill_stores, entry.spill_loads = stack, stores, loads
        elif found := re.search(r"Used (\d+) registers(.*)", line):
            entry.registers = int(found[1])
            for name, pattern in (("barriers", r"used (\d+) barriers"), ("smem", r"(\d+) bytes smem")):
                value = re.search(pattern, found[2])
                setattr(entry, name, int(value[1]) if value else 0)
    for found in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)\s*((?:\.\w+ [^\n{]*\n)*)\s*\{(.*?)\n\}", ptx, re.S):
        name, params, directives, body = found.groups()
        entry = entries.setdefault(name, Entry())
        entry.param_bytes = _param_bytes(params)
        threads = re.search(r"\.maxntid (\d+)(?:, *(\d+))?(?:, *(\d+))?", directives)
        if threads:
            entry.max_threads = 1
            for extent in threads.groups():
                entry.max_threads *= int(extent or 1)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        entry.min_blocks = int(blocks[1]) if blocks else 0
        limits = re.findall(r"setmaxnreg\.(dec|inc)\.sync\.aligned\.u32\s+(\d+)", body)
        entry.setmaxnreg = tuple(int(value) for _, value in sorted(limits))
    return entries


def _param_bytes(params: str) -> int:
    end = 0
    for align, kind, extent in re.findall(
        r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr (?:\.\w+ )*(?:\.align \d+ )?)?\w+(?:\[(\d+)\])?", params
    ):
        size = int(kind[1:]) // 8 if not extent else int(extent)
        unit = int(align) if align else size
        end = (end + unit - 1) // unit * unit + size
    return end
