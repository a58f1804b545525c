"""Kernels into cubins that the wheel carries: python csrc/build.py. Packing needs no CUDA and no GPU.

A pinned NVRTC of CUDA 12 makes them, for newer drivers load older cubins and not the other way round. Architectures that no cubin
fits are compiled on first use by the NVRTC that torch brings, so a wheel without cubins works too.
  python csrc/build.py                     python/llama1m_ext/cubins/: cubins, manifest.json, hashes.txt (git ignores them)
  python csrc/build.py --check [NAME...]   compiles for sm_80 sm_89 sm_90a sm_100a and prints what ptxas says
                                           and what the gates of tests/python/test_cuda_gates.py will say; writes nothing
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gates
import sass
from nvrtc import HERE, OPTIONS, CompileError, Nvrtc, fits, installed, kernel_files, library_in, source_hash

REQUIREMENT = "nvidia-cuda-nvrtc-cu12==12.9.86"
VERSION = "12.9"
ARCHS = ("sm_80", "sm_90a")
CHECK_ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
SHOWN = (
    "HGMMA",
    "HMMA",
    "UTMALDG",
    "USETMAXREG",
    "LDSM",
    "LDGSTS",
    "LDG",
    "STG",
    "LDL",
    "STL",
    "MUFU",
    "BAR",
    "WARPSYNC",
)
OUT = HERE.parent / "python" / "llama1m_ext" / "cubins"


def pinned(folder: str) -> Nvrtc:
    """The NVRTC that packages are built with, from the package index, in a folder that goes away with the build."""
    print(f"installing {REQUIREMENT} for this build", flush=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, REQUIREMENT], check=True
    )
    return load(folder)


def load(place: str) -> Nvrtc:
    """The NVRTC at a path: the library itself or a folder that has it."""
    path = Path(place) if os.path.isfile(place) else library_in(place)
    if path is None:
        raise SystemExit(f"--nvrtc: expected libnvrtc or a folder that has it, got {place}")
    return Nvrtc(path)


def build(nvrtc: Nvrtc, out: Path) -> dict:
    """Writes cubins and manifest; what an earlier build left and this one does not make goes away."""
    out.mkdir(parents=True, exist_ok=True)
    cubins = []
    if not kernel_files():
        raise SystemExit(f"no kernel files in {HERE}")
    for path in kernel_files():
        for arch in ARCHS:
            if not fits(path.name, arch):
                continue
            program = nvrtc.compile(path, arch)
            if not program.cubin or not program.entries:
                raise SystemExit(f"{path.name} for {arch}: expected a cubin with kernels, got none\n{program.log}")
            if complaints := gates.figures(program):
                raise SystemExit("not packed:\n" + "\n".join(complaints))
            file = f"{path.stem}.{arch}.cubin"
            replace(out / file, program.cubin)
            cubins.append(
                {
                    "file": file,
                    "source": path.name,
                    "arch": arch,
                    "source_hash": source_hash(path),
                    "sha256": hashlib.sha256(program.cubin).hexdigest(),
                    "bytes": len(program.cubin),
                    "entries": {name: program.entries[name].figures() for name in sorted(program.entries)},
                }
            )
            print(f"  {file:34} {len(program.cubin):8} bytes, {len(program.entries)} kernels", flush=True)
    manifest = {"nvrtc": nvrtc.version, "options": list(OPTIONS), "cubins": cubins}
    replace(out / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    # The same for src/cuda/cubin.rs, which has no reader of JSON.
    lines = [f"{cubin['file']} {cubin['source_hash']} {cubin['sha256']}\n" for cubin in cubins]
    replace(out / "hashes.txt", "".join(lines).encode())
    for stale in set(out.glob("*.cubin")) - {out / cubin["file"] for cubin in cubins}:
        stale.unlink()
    return manifest


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: somebody may be importing the package."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


def check(nvrtc: Nvrtc, names: list[str], archs: list[str]) -> bool:
    """Prints what compiler and disassembler say about every kernel; whether all pass the gates."""
    good = True
    tool = sass.nvdisasm()
    paths = [path for path in kernel_files() if not names or path.stem in names or path.name in names]
    if not paths:
        raise SystemExit(f"no kernel file out of {names} in {HERE}, there is {[path.stem for path in kernel_files()]}")
    for path in paths:
        for arch in archs:
            if not fits(path.name, arch):
                continue
            try:
                program = nvrtc.compile(path, arch)
            except CompileError as error:
                good = False
                print(f"== {error}")
                continue
            print(f"== {path.name} {arch}, NVRTC {nvrtc.version}, {len(program.cubin)} bytes")
            for name, entry in sorted(program.entries.items()):
                print(
                    f"  {name:32} {entry.registers:4} registers  spills {entry.spill_stores}/{entry.spill_loads}  "
                    f"stack {entry.stack}  smem {entry.smem}  params {entry.param_bytes}  "
                    f"bounds {entry.max_threads}x{entry.min_blocks}"
                )
            complaints = gates.figures(program)
            if tool:
                kernels = sass.opcodes(program.cubin, tool)
                complaints += gates.instructions(program, kernels)
                for name, counts in sorted(kernels.items()):
                    found = {what: sass.count(counts, what) for what in SHOWN}
                    print(f"  {name:32} " + "  ".join(f"{what} {number}" for what, number in found.items() if number))
            for complaint in complaints:
                print(f"  GATE {complaint}")
            good &= not complaints
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="with --check: kernel files; all when left out")
    parser.add_argument("--nvrtc", help=f"libnvrtc or a folder that has it, instead of {REQUIREMENT} from pip")
    parser.add_argument("--out", type=Path, default=OUT, help="where the cubins go")
    parser.add_argument("--check", action="store_true", help="compile for every architecture, write nothing")
    parser.add_argument("--archs", nargs="+", default=list(CHECK_ARCHS), help="with --check")
    args = parser.parse_args()
    if args.check:
        library = args.nvrtc or installed()
        if library is None:
            raise SystemExit("no NVRTC here: install a torch with CUDA, or give --nvrtc")
        raise SystemExit(0 if check(load(str(library)), args.names, args.archs) else 1)
    with tempfile.TemporaryDirectory(prefix="llama1m-nvrtc-") as folder:
        nvrtc = load(args.nvrtc) if args.nvrtc else pinned(folder)
        if nvrtc.version != VERSION:
            raise SystemExit(f"expected NVRTC {VERSION} for packaging, got {nvrtc.version} at {nvrtc.path}")
        manifest = build(nvrtc, args.out)
    total = sum(cubin["bytes"] for cubin in manifest["cubins"])
    print(f"{len(manifest['cubins'])} cubins, {total} bytes, NVRTC {manifest['nvrtc']} -> {args.out}")


if __name__ == "__main__":
    main()
