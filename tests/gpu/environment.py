"""What is here: card, driver, torch, the package and the kernels that it carries."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from typing import Any

import torch

from .machine import GIB, Machine, commit
from .section import Report


def facts(machine: Machine, given_commit: str | None = None) -> dict[str, Any]:
    """What stands beside every figure."""
    found: dict[str, Any] = {
        "device": machine.name,
        "python": platform.python_version(),
        "commit": given_commit or commit(),
    }
    for name in ("torch", "transformers", "llama1m-ext"):
        try:
            found[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name.replace("-", "_")] = "from the source tree"
    if not machine.dry:
        found["driver"] = driver_version()
    return found


def driver_version() -> str:
    """The driver's version as the kernel module says it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return next(word for word in file.readline().split() if word.count(".") >= 1 and word[0].isdigit())
    except (OSError, StopIteration):
        return f"CUDA {torch.version.cuda}"


def run(machine: Machine, report: Report) -> None:
    """Tells it all, and launches one kernel of each kind before anything long begins."""
    import llama1m_ext
    from llama1m_ext import cuda, ops

    found = cuda.info()
    for name, value in found.items():
        report.table("cuda.info()", what=name, value=str(value))
    report.note(f"package: {llama1m_ext.__file__}, Python {sys.version.split()[0]}, {platform.platform()}")
    tools = {name: bool(shutil.which(name)) for name in ("nvcc", "ncu", "compute-sanitizer", "nvdisasm")}
    report.note(f"tools: {tools}")
    report.check("driver", found["driver"]["found"], f"{found['driver']}")
    if not machine.dry:
        properties = torch.cuda.get_device_properties(0)
        report.table(
            "card", name=properties.name, capability=str(machine.capability), SMs=properties.multi_processor_count,
            **{"memory GiB": properties.total_memory / GIB, "L2 MiB": machine.l2_bytes / 2**20},
        )  # fmt: skip
        arch = "sm_{}{}".format(*machine.capability)
        fits = [a for a in found["cubins"] if a.rstrip("a") == arch or (a == "sm_80" and machine.capability[0] == 8)]
        report.check("kernels for this card are in the package", bool(fits), f"cubins {found['cubins']}, {arch}")
        report.check("NVRTC is found", found["nvrtc"].get("path") is not None, f"{found['nvrtc']}")
    q = machine.randn(1, 2, 3, 64, dtype=torch.bfloat16)
    with machine.serving():
        out = ops.attention(q, q, q)
    machine.wait()
    report.check("one launch", bool(torch.isfinite(out).all()), "not finite")
