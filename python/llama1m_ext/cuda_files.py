"""Files that kernels for GPUs come from: those in this package, those compiled before, and NVRTC, which compiles others.

Environment variables: `LLAMA1M_CUDA_CACHE`, the folder of compiled kernels; `LLAMA1M_CUDA_CUBINS=0`, to leave the package's
own aside; `LLAMA1M_CUDA_NVRTC`, NVRTC's file or folder, and no other one is looked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def packed() -> str | None:
    """The folder of the kernels that came with this package, or None."""
    folder = Path(__file__).parent / "cubins"
    off = os.environ.get("LLAMA1M_CUDA_CUBINS", "").strip().lower() in ("0", "false", "no", "off")
    return None if off or not (folder / "manifest.json").is_file() else str(folder)


def cache() -> str | None:
    """The folder where compiled kernels are kept; it need not be there. None: there is no home either."""
    named = os.environ.get("LLAMA1M_CUDA_CACHE")
    if named:
        return os.path.abspath(os.path.expanduser(named))
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return os.path.join(base, "llama1m_ext")
    home = os.path.expanduser("~")
    return None if home == "~" else os.path.join(home, ".cache", "llama1m_ext")


def nvrtc() -> list[str]:
    """Where NVRTC may be, in the order in which to try: what a pip-installed torch brings, a CUDA of the system, whatever
    the loader finds."""
    named = os.environ.get("LLAMA1M_CUDA_NVRTC")
    if named:
        path = Path(named).expanduser()
        return [str(file) for file in _in(path)] if path.is_dir() else [str(path)]
    found: list[str] = []
    for entry in sys.path:
        nvidia = Path(entry or ".") / "nvidia"
        for folder in (*sorted(nvidia.glob("cu[0-9]*/lib"), reverse=True), nvidia / "cuda_nvrtc" / "lib"):
            found += map(str, _in(folder))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            found += map(str, _in(Path(os.environ[name]) / "lib64"))
    return [*dict.fromkeys(found), *_SONAMES]


def _in(folder: Path) -> list[Path]:
    """NVRTC's files in a folder, those with the shortest names first, which are links to the others."""
    files = (path for path in folder.glob("libnvrtc.so*") if path.is_file())
    return sorted(files, key=lambda path: (len(path.name), path.name))
