"""Bugs planted in the kernels, one at a time: do the checks see each? A check that misses one is not worth running.

  python tests/cuda/mutations.py [FAMILY...]              5 of each family, drawn anew each time (--seed N: those of an earlier run)
  python tests/cuda/mutations.py [FAMILY...] --all        every one: ten minutes
  python tests/cuda/mutations.py [FAMILY...] --list       what there is
Each mutations_FAMILY.py has MUTATIONS = [(file in csrc, old text, new text, what), ...]; check_FAMILY.cpp must fail, or hang, or
die with each of them, and pass without any.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import build

LEVEL = "-O1"  # of optimisation: compiled once, run for a moment; -O0 takes longer in all
EACH = 5  # of a family, where not all are tried
LIMIT = 120  # seconds: a planted bug may well hang


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    family: str
    file: str
    old: str
    new: str
    what: str


def mutations(family: str) -> list[Mutation]:
    """A family's list, each old text checked to occur once."""
    path = build.HERE / f"mutations_{family}.py"
    if not path.exists():
        return []
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [Mutation(family, *entry) for entry in module.MUTATIONS]
    for mutation in found:
        count = (build.CSRC / mutation.file).read_text().count(mutation.old)
        if count != 1:
            raise SystemExit(f"{path.name}: {mutation.what}: expected its text once in {mutation.file}, found {count}")
    return found


def judged(mutation: Mutation | str) -> tuple[bool, str]:
    """Whether the check saw a planted bug, and how; of a family's name, whether it passes without any."""
    family = mutation if isinstance(mutation, str) else mutation.family
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llama1m-mutant-") as folder:
        csrc = build.CSRC
        if isinstance(mutation, Mutation):
            csrc = Path(folder)
            for path in [*build.CSRC.glob("*.cu"), *build.CSRC.glob("*.cuh"), *build.CSRC.glob("*.h")]:
                shutil.copy(path, csrc)
            target = csrc / mutation.file
            target.write_text(target.read_text().replace(mutation.old, mutation.new))
        try:
            program = build.check(family, csrc, level=LEVEL)
        except build.BuildError as error:
            return False, f"does not compile: {str(error)[-400:]}"
        try:
            answer = subprocess.run([str(program), "quick"], capture_output=True, encoding="utf-8", timeout=LIMIT)
            status = answer.returncode
            last = ((answer.stderr.strip() or answer.stdout.strip()).splitlines() or [""])[-1][:110]
        except subprocess.TimeoutExpired:
            status, last = -1, f"still running after {LIMIT} s"
        finally:
            if isinstance(mutation, Mutation):
                program.unlink(missing_ok=True)  # nobody will want it again
    took = f"{time.monotonic() - start:.0f} s"
    wanted = (status != 0) == isinstance(mutation, Mutation)
    return wanted, f"status {status}, {took}: {last}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every one")
    parser.add_argument("--seed", type=int, help="of the draw")
    parser.add_argument("--list", action="store_true", help="what there is, and end")
    args = parser.parse_args()
    families = args.families or [f for f in build.families() if mutations(f)]
    unknown = set(families) - set(build.families())
    if unknown:
        print(f"expected some of {build.families()}, got {sorted(unknown)}", file=sys.stderr)
        return 2
    planted = [mutation for family in families for mutation in mutations(family)]
    if args.list:
        for mutation in planted:
            print(f"{mutation.family:16} {mutation.file:22} {mutation.what}")
        print(f"{len(planted)} planted bugs")
        return 0
    known, seed = len(planted), args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    if not args.all:
        draw = random.Random(seed)
        lists = [mutations(family) for family in families]
        planted = [mutation for own in lists for mutation in draw.sample(own, min(EACH, len(own)))]
    if not planted:
        print("no mutations to try", file=sys.stderr)
        return 2
    missed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for family, (good, how) in zip(families, pool.map(judged, families), strict=True):
            if not good:
                print(f"check_{family} fails without any planted bug: {how}", file=sys.stderr)
                return 1
        for mutation, (good, how) in zip(planted, pool.map(judged, planted), strict=True):
            print(f"{'caught' if good else 'MISSED'}  {mutation.family}: {mutation.what}: {how}", flush=True)
            if not good:
                missed.append(mutation)
    drawn = "" if args.all else f"; drawn from {known} with --seed {seed}"
    print(f"== {len(planted) - len(missed)} of {len(planted)} planted bugs caught{drawn}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
