"""What a bug report needs: versions, CPU level, memory, GPU, NVRTC, the environment variables that matter."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "llama1m-ext",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "flash-attn",
    "peft",
    "bitsandbytes",
    "onnxruntime",
)

# Named one by one or by a prefix of ours, and never HF_TOKEN: people paste this output into public reports.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
)


def isa_levels() -> list[str]:
    """The ISA levels that this CPU and this build have, best first."""
    from llama1m_ext import _core

    return list(_core.isa_levels())


def collect() -> dict[str, Any]:
    """Everything, as JSON-able values. Whatever cannot be found out is None; nothing here raises for a missing part."""
    import torch

    from llama1m_ext import _core, cuda

    of_cuda = cuda.info()
    return {
        "versions": {
            "core": _core.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "executable": sys.executable,
        "cpu": {
            "model": _first_value("/proc/cpuinfo", ("model name", "Model")) or platform.processor() or None,
            "architecture": platform.machine(),
            "logical_cpus": os.cpu_count(),
            "usable_cpus": _usable_cpus(),
            "isa_levels": isa_levels(),
            "isa": _isa(_core),
            "torch_threads": torch.get_num_threads(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        },
        "memory_gib": {name: _meminfo_gib(key) for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))},
        "gpu": _gpu(torch, of_cuda),
        "nvrtc": _nvrtc(of_cuda),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if _wanted(name)},
    }


def render(facts: dict[str, Any]) -> str:
    """`collect()`'s facts as aligned lines."""
    lines: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
            return
        if isinstance(value, list):
            value = ", ".join(str(item) for item in value)
        lines.append(f"{prefix:<36} {'-' if value in (None, '', {}) else value}")

    walk("", facts)
    return "\n".join(lines)


def _isa(core: Any) -> str:
    try:
        return str(core.isa())
    except ValueError as error:  # LLAMA1M_ISA names a level that is not there: worth a report of its own
        return f"none ({error})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted(name: str) -> bool:
    return name.startswith("LLAMA1M_") or name in VARIABLES


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _first_value(path: str, keys: tuple[str, ...]) -> str | None:
    for line in (_read(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def _meminfo_gib(key: str) -> float | None:
    value = _first_value("/proc/meminfo", (key,))
    return round(int(value.split()[0]) / 2**20, 1) if value else None


def _usable_cpus() -> int | None:
    # A container or taskset may grant fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _gpu(torch: Any, cuda: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch_cuda": torch.version.cuda,
        "driver": None,
        "devices": [],
        "cuda": cuda["driver"]["version"] or cuda["driver"]["why"],
        "kernels": cuda["cubins"],
        "compiled_kernels": cuda["cache"],
    }
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
            answer = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=20, check=True)
            found["driver"] = answer.stdout.split("\n")[0].strip() or None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            it = torch.cuda.get_device_properties(index)
            found["devices"].append(f"{it.name}, sm_{it.major}{it.minor}, {it.total_memory / 2**30:.0f} GiB")
    return found


def _nvrtc(cuda: dict[str, Any]) -> dict[str, str] | None:
    """Which NVRTC kernels would be compiled with, and where it is, or None."""
    found = cuda["nvrtc"]
    return None if found["path"] is None else {"version": found["version"], "library": found["path"]}
