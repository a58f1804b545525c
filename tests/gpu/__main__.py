"""All that needs a GPU, in one command, from an installed wheel: python -m tests.gpu

  --quick               the sections that fit into ten minutes together
  --section NAME...     these only; a later run supersedes an earlier one of the same section in the same --out
  --budget SECONDS      begin no section whose limit does not fit any more
  --detach              go on in the background (a lease whose commands are limited); look at it with --wait SECONDS
  --render              only write RESULTS.md anew from raw.jsonl
  --dry-run             no GPU: the kernels on the CPU by the fake driver, tiny sizes
RESULTS.md, raw.jsonl and log.txt in --out are up to date at every moment.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAKE = "LLAMA1M_GPU_FAKE_DRIVER"


def main() -> int:
    args = arguments()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.child:
        return child(args, out)
    if args.detach:
        return detach(out)
    if args.render:
        write_results(out)
        return 0
    if args.wait is not None:
        return wait(out, args.wait)
    return parent(args, out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--section", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="the sections, and end")
    parser.add_argument("--budget", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default="bench-out/gpu", help="where results go (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the 8B-shaped model, instead of 32: for a short look")
    parser.add_argument("--commit", help="what to write beside figures where there is no git")
    parser.add_argument("--detach", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--wait", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--render", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the parent: sections one after the other, each in a process of its own -----------------------------------------------


def parent(args: argparse.Namespace, out: Path) -> int:
    from .sections import BY_NAME, SECTIONS

    if args.list:
        for section in SECTIONS:
            print(
                f"{section.name:12} at most {section.seconds:5} s  {section.title}{'' if section.quick else '  (not in --quick)'}"
            )
        return 0
    unknown = set(args.section or ()) - set(BY_NAME)
    if unknown:
        print(f"--section: expected some of {', '.join(BY_NAME)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = (
        [BY_NAME[name] for name in args.section] if args.section else [s for s in SECTIONS if s.quick or not args.quick]
    )
    environment = dict(os.environ)
    if args.dry_run:
        chosen = [section for section in chosen if section.dry]
        environment |= fake_driver()
    started, bad, left = time.monotonic(), [], []
    for section in chosen:
        remaining = args.budget - (time.monotonic() - started)
        if remaining < min(section.seconds, 60):
            left.append(section.name)
            continue
        print(f"== {section.name}: {section.title}", flush=True)
        status = supervise(section, args, out, environment, min(section.seconds, remaining))
        if status != 0:
            bad.append(section.name)
        write_results(out)
    print(
        f"== {out / 'RESULTS.md'}: {len(chosen) - len(bad) - len(left)} sections good; failed: {' '.join(bad) or 'none'}; not begun: {' '.join(left) or 'none'}"
    )
    return 1 if bad else 0


def supervise(section, args: argparse.Namespace, out: Path, environment: dict[str, str], limit: float) -> int:
    """Runs a section, shows and keeps its output, and ends it at its limit."""
    command = [sys.executable, "-m", "tests.gpu", "--child", section.name, "--out", str(out)]
    command += ["--dry-run"] * args.dry_run
    command += ["--layers", str(args.layers)] if args.layers else []
    command += ["--commit", args.commit] if args.commit else []
    environment = {**environment, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["LLAMA1M_GPU_COMMAND"] = shlex.join(["python", "-m", "tests.gpu", *sys.argv[1:]])
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"== {section.name}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        import threading

        over = threading.Event()

        def end() -> None:
            over.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        status = process.wait()
        timer.cancel()
    if over.is_set() or status < 0:
        # What it could not say itself: its rows are in the file already.
        from .section import Report

        why = f"stopped after {limit:.0f} s" if over.is_set() else f"killed by signal {-status}"
        Report(out / "raw.jsonl", section.name).end(status=why, seconds=limit)
        print(f"  {why}", flush=True)
        return 1
    return status


def write_results(out: Path) -> None:
    from . import results
    from .sections import SECTIONS

    page = results.markdown(results.load([out / "raw.jsonl"]), [(section.name, section.title) for section in SECTIONS])
    draft = out / ".RESULTS.md"
    draft.write_text(page, encoding="utf-8")
    draft.replace(out / "RESULTS.md")


def fake_driver() -> dict[str, str]:
    """Builds the driver that runs kernels on the CPU; the environment by which children find it."""
    built = subprocess.run(
        [sys.executable, "tests/cuda/build.py", "--driver"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if built.returncode != 0:
        raise SystemExit(f"tests/cuda/build.py --driver failed:\n{built.stdout}{built.stderr}")
    return {FAKE: os.path.join(built.stdout.strip().splitlines()[-1], "libcuda.so.1")}


# -- the child: one section -------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace, out: Path) -> int:
    if args.dry_run and FAKE in os.environ:
        ctypes.CDLL(os.environ[FAKE])  # first: whoever asks for libcuda.so.1 after this gets it
    import torch

    from .environment import facts
    from .machine import Machine
    from .section import Report
    from .sections import BY_NAME

    section = BY_NAME[args.child]
    report = Report(out / "raw.jsonl", section.name)
    if not args.dry_run and not torch.cuda.is_available():
        print("torch finds no GPU here; --dry-run needs none", file=sys.stderr)
        return 3
    machine = Machine(dry=args.dry_run, options=args)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    command = os.environ.get("LLAMA1M_GPU_COMMAND", "")
    report.begin(date=now, command=command, dry_run=args.dry_run, **facts(machine, args.commit))
    start = time.monotonic()
    try:
        section.run(machine, report)
        machine.wait()
    except BaseException as error:
        trace = traceback.format_exc()
        print(trace, flush=True)
        report.end(
            status=f"{type(error).__name__}: {str(error)[:300]}",
            seconds=round(time.monotonic() - start, 1),
            trace=trace[-3000:],
        )
        return 1
    report.end(status="done", seconds=round(time.monotonic() - start, 1))
    print(f"  {report.passed} checks passed, {report.failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if report.failed else 0


# -- a lease whose commands are shorter than the work ------------------------------------------------------------------------


def detach(out: Path) -> int:
    """The same command without --detach, in a session of its own, which outlives the command that started it."""
    rest = [argument for argument in sys.argv[1:] if argument != "--detach"]
    with (out / "detached.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu", *rest],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (out / "detached.pid").write_text(str(process.pid))
    print(f"in the background: process {process.pid}, output in {out / 'detached.txt'}")
    return 0


def wait(out: Path, seconds: float) -> int:
    """Until the detached run ends, or so long; shows the end of its output."""
    try:
        pid = int((out / "detached.pid").read_text())
    except OSError:
        print(f"--wait: nothing was detached with --out {out}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(1)
    print((out / "detached.txt").read_text(encoding="utf-8")[-6000:])
    print(f"== {'still running' if alive(pid) else 'ended'}: process {pid}")
    return 4 if alive(pid) else 0


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
