"""What the machine code of a cubin is made of: nvdisasm's listing, counted per kernel."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

REQUIREMENT = "nvidia-cuda-nvdisasm"


def nvdisasm() -> Path | None:
    """nvdisasm from pip's nvidia-cuda-nvdisasm, from a toolkit, or from PATH."""
    for folder in sys.path:
        for found in sorted(glob.glob(os.path.join(folder or ".", "nvidia/cu*/bin/nvdisasm")), reverse=True):
            return Path(found)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        found = Path(os.environ.get(name, "/usr/local/cuda")) / "bin" / "nvdisasm"
        if found.is_file():
            return found
    on_path = shutil.which("nvdisasm")
    return Path(on_path) if on_path else None


def opcodes(cubin: bytes, tool: Path) -> dict[str, Counter]:
    """Instructions of each kernel, with their modifiers (LDG.E.128.CONSTANT), and how often each stands there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = subprocess.run(
            [str(tool), "--print-code", str(file)], capture_output=True, encoding="utf-8", check=False
        )
    if listing.returncode != 0:
        raise RuntimeError(f"{tool}: {listing.stderr.strip()}")
    kernels: dict[str, Counter] = {}
    counts: Counter = Counter()
    for line in listing.stdout.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line) or re.match(r"//-+ \.text\.(\w+)", line):
            counts = kernels.setdefault(found[1], Counter())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            counts[found[1]] += 1
    return kernels


def count(counts: Counter, *names: str, modifier: str = "") -> int:
    """How many instructions have one of these names, and a modifier where one is asked for."""
    return sum(
        number
        for opcode, number in counts.items()
        if opcode.split(".")[0] in names and (not modifier or modifier in opcode.split(".")[1:])
    )
