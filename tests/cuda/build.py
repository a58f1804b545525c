"""The kernels as host programs, by g++ and emulation.h: a driver without a GPU, and the checks of each family.

  python tests/cuda/build.py                     builds everything that is not up to date
  python tests/cuda/build.py --driver            libcuda.so.1 only; the last line printed is its folder
  python tests/cuda/build.py --run [FAMILY...]   builds and runs check_FAMILY.cpp, all of them by default
Objects are kept by content (preprocessed source, options, compiler) in target/emulation.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "target" / "emulation"
CXX = os.environ.get("CXX", "g++")
# No contraction: what a kernel rounds twice is rounded twice.
FLAGS = ["-std=c++17", "-march=x86-64-v3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread", "-w"]
PROBE = "LLAMA1M_KERNEL"


class BuildError(Exception):
    """The compiler's words."""


def run(command: list[str], text: str | None = None) -> str:
    answer = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
    if answer.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{answer.stderr[-6000:]}")
    return answer.stdout


@functools.cache
def compiler() -> str:
    return run([CXX, "--version"]).splitlines()[0]


def compiled(source: str, csrc: Path, link: tuple[str, ...] | None = None, level: str = "-O2") -> Path:
    """An object of a source text, or with `link` a program; made only if there is none of the same content."""
    how = [*FLAGS, level]
    includes = [f"-I{csrc}", f"-I{HERE}"]
    seen = run([CXX, *FLAGS, *includes, "-E", "-P", "-x", "c++", "-"], source)
    key = hashlib.sha256("\0".join([compiler(), *how, *(link or ("-c",)), seen]).encode()).hexdigest()[:24]
    target = OUT / (f"{key}.o" if link is None else key)
    if not target.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        run([CXX, *how, *includes, *(["-c"] if link is None else link), "-x", "c++", "-", "-o", str(draft)], source)
        draft.replace(target)
    return target


def entries(path: Path) -> list[tuple[str, str]]:
    """(name, threads as the source says them) of a kernel file's entries, however its macros make them."""
    probe = f'#include "emulation.h"\n#undef KERNEL\n#define KERNEL(threads, blocks) {PROBE} [threads] void\n#include "{path}"\n'
    seen = run([CXX, *FLAGS, f"-I{path.parent}", f"-I{HERE}", "-E", "-P", "-x", "c++", "-"], probe)
    found = re.findall(rf"{PROBE} \[(.*?)\] void\s+(\w+)\s*\(", seen, re.S)
    if not found:
        raise BuildError(f"{path.name}: expected entries made with KERNEL(threads, blocks), found none")
    return [(name, threads) for threads, name in found]


def kernel_object(path: Path) -> Path:
    """A kernel file for the driver, in a namespace of its own: files may use the same names for different things."""
    lines = ['#include "fake_driver.h"', f"namespace of_{path.stem} {{", f'#include "{path.name}"']
    lines += [
        f'static const fake::Registered at_{name}("{name}", {threads}, {name});' for name, threads in entries(path)
    ]
    return compiled("\n".join([*lines, "}"]) + "\n", path.parent)


def driver(csrc: Path = CSRC) -> Path:
    """libcuda.so.1, in a folder of its own: nothing else must find it by chance."""
    paths = sorted(csrc.glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        main = pool.submit(compiled, (HERE / "fake_driver.cpp").read_text(), csrc)
        objects = [main.result(), *pool.map(kernel_object, paths)]
    key = hashlib.sha256("\0".join(path.name for path in objects).encode()).hexdigest()[:24]
    library = OUT / f"driver-{key}" / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        draft = library.with_name(f".libcuda.{os.getpid()}")
        run([CXX, "-shared", "-pthread", "-Wl,-soname,libcuda.so.1", "-o", str(draft), *map(str, objects)])
        draft.replace(library)
    return library


def families() -> list[str]:
    """Those that have a check."""
    return sorted(path.stem.removeprefix("check_") for path in HERE.glob("check_*.cpp"))


def check(family: str, csrc: Path = CSRC, level: str = "-O2") -> Path:
    """The program of check_FAMILY.cpp."""
    return compiled((HERE / f"check_{family}.cpp").read_text(), csrc, link=("-pthread",), level=level)


def judged(program: Path) -> tuple[int, str, float]:
    """Runs a check: its status, what it said, and the seconds that it took."""
    start = time.monotonic()
    answer = subprocess.run([str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    return answer.returncode, answer.stdout, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", action="store_true", help="only the driver")
    parser.add_argument("--run", nargs="*", metavar="FAMILY", help="run the checks")
    args = parser.parse_args()
    try:
        if args.driver:
            print(driver().parent)
            return 0
        chosen = args.run or families()
        unknown = set(chosen) - set(families())
        if unknown or not chosen:
            print(f"expected some of {families()}, got {sorted(unknown) or chosen}", file=sys.stderr)
            return 2
        if args.run is None:
            print(driver())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            programs = dict(zip(chosen, pool.map(check, chosen), strict=True))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if args.run is None:
        return 0
    bad = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for family, (status, said, seconds) in zip(programs, pool.map(judged, programs.values()), strict=True):
            print(f"== check_{family}\n{said.rstrip()}")
            print(f"   {'ok' if status == 0 else f'FAILED, status {status}'}, {seconds:.1f} s", flush=True)
            if status != 0:
                bad.append(family)
    print(f"== {len(programs) - len(bad)} of {len(programs)} families good; failed: {' '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
