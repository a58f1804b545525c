"""The part of the suite that meets transformers, on the newest patch of every minor release that pyproject.toml allows.

    make compat                                  all of them, from nothing; the table goes where .ci/run keeps its logs
    python tests/compat.py --versions 5.3,5.4    some, with the torch of the Python that runs this

torch and its CUDA libraries are 5 GB, so they are installed once, in the base: the environment whose Python runs this. Each
release gets a virtual environment of its own over it. Its site-packages come first and those of the base after them, by
a .pth file, so pip sees what the base has, and installs just what this release pins otherwise (huggingface_hub,
tokenizers, ...). Unlike `pip install --target` and PYTHONPATH, this holds in every process that a test starts, whatever
environment variables the test gives it, and the console scripts are the right ones; and each run begins by looking
where transformers and everything that it requires really come from.

One JSON file for each release is kept, and a second call goes on where the first stopped; a release is tested again
when the package or the tests changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".ci" / "work" / "compat"

FILES = """
    test_cache test_differential test_families test_generate test_generation_modes test_heads test_patch test_reasons
    test_snippets test_user_caches
""".split()
"""The tests that meet transformers. Others ask it for little, and run on the newest and the oldest in CI."""

# Runs in the environment of a release: says what is where, or what is wrong.
WHERE = """
import importlib.metadata as m, json, re, sys
import transformers, huggingface_hub, tokenizers, torch
wanted, overlay = sys.argv[1:]
assert transformers.__version__ == wanted, f"transformers: expected {wanted}, got {transformers.__version__}"
assert transformers.__file__.startswith(overlay), f"transformers: expected it in {overlay}, got {transformers.__file__}"
from transformers.dependency_versions_check import dep_version_check
for name in ("huggingface-hub", "tokenizers", "numpy", "safetensors", "tqdm", "regex", "packaging"):
    dep_version_check(name)
where = lambda module: "overlay" if module.__file__.startswith(overlay) else "base"
import llama1m_ext
print(json.dumps({"torch": torch.__version__, "huggingface_hub": m.version("huggingface_hub"),
    "tokenizers": m.version("tokenizers"), "from": {x.__name__: where(x) for x in (transformers, huggingface_hub, tokenizers)},
    "package": llama1m_ext.__file__}))
"""


def show(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], check=True, encoding="utf-8", stdin=subprocess.DEVNULL, **more)


def newest_patches(minors: list[str] | None) -> list[str]:
    """The newest patch of each minor release that pyproject.toml allows, oldest first, from the package index."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    line = re.search(r'"(transformers[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert line, "pyproject.toml: expected a requirement of transformers"
    allowed = Requirement(line[1]).specifier
    said = show(sys.executable, "-m", "pip", "index", "versions", "transformers", stdout=subprocess.PIPE).stdout
    listed = re.search(r"Available versions: (.*)", said)
    assert listed, f"pip index versions: expected a list of versions, got {said!r}"
    newest: dict[tuple[int, ...], Version] = {}
    for version in map(Version, listed[1].split(", ")):
        if version in allowed:
            newest[version.release[:2]] = max(version, newest.get(version.release[:2], version))
    chosen = {f"{a}.{b}": str(v) for (a, b), v in sorted(newest.items())}
    unknown = set(minors or ()) - set(chosen)
    if unknown:
        raise SystemExit(
            f"--versions: expected minor releases out of {', '.join(chosen)}; got {', '.join(sorted(unknown))}"
        )
    return [version for minor, version in chosen.items() if not minors or minor in minors]


def fingerprint() -> str:
    """Of what is tested: the package, its tests and this file."""
    digest = hashlib.sha256()
    for folder in ("python", "tests/python", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".so", ".ipynb") and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def environment(at: Path, version: str) -> Path:
    """Makes a virtual environment over this Python's own, with that release; its Python."""
    shutil.rmtree(at, ignore_errors=True)
    show(sys.executable, "-m", "venv", "--without-pip", at)
    python = at / "bin" / "python"
    overlay = site_of(python)
    base = [p for p in site.getsitepackages() if Path(p).is_dir()]
    # addsitedir, not a plain line: the base's own .pth files (an editable install) count as well.
    lines = [f"import site; site.addsitedir({p!r})" for p in base]
    (overlay / "base.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    words = ["install", "-q", f"transformers=={version}"]
    if importlib.metadata.version("transformers") == version:
        words += ["--ignore-installed", "--no-deps"]  # the base's own: pip would see nothing to do
    show(*pip, *words, stdout=subprocess.DEVNULL)
    return python


def site_of(python: Path) -> Path:
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(show(python, "-c", ask, stdout=subprocess.PIPE).stdout.strip())


def run_tests(python: Path, at: Path, version: str, files: list[str]) -> dict[str, Any]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("LLAMA1M_DISABLE", None)
    result: dict[str, Any] = {}
    asked = subprocess.run(
        [str(python), "-c", WHERE, version, str(site_of(python))],
        capture_output=True,
        encoding="utf-8",
        env=env,
        cwd=ROOT,
    )
    if asked.returncode:
        lines = asked.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with {asked.returncode}"}
    result |= json.loads(asked.stdout.strip().splitlines()[-1])
    report = at / "report.xml"
    words = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={report}",
        "-o",
        "junit_family=xunit1",
    ]
    words += [f"tests/python/{name}.py" for name in files]
    start = time.perf_counter()
    with (at / "pytest.log").open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            [str(w) for w in words], stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT
        ).returncode
    result["seconds"] = round(time.perf_counter() - start, 1)
    if ended not in (0, 1) or not report.exists():
        tail = (at / "pytest.log").read_text(encoding="utf-8").strip().splitlines()[-3:]
        return result | {"error": f"pytest ended with {ended}: " + " / ".join(tail)}
    return result | counts(report)


def counts(report: Path) -> dict[str, Any]:
    """How many passed, and which did not, each with the last line of what it said."""
    passed, failed, skipped = 0, {}, {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('file')}::{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            failed[name] = (bad.get("message") or "").strip().splitlines()[0:1]
        elif (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message")
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| transformers | torch | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|"]
    for r in results:
        if "passed" not in r:
            lines.append(f"| {r['version']} | {r.get('torch', '')} | {r['error']} | | | |")
            continue
        cells = [
            r["version"],
            r["torch"].partition("+")[0],
            r["passed"],
            len(r["failed"]),
            len(r["skipped"]),
            round(r["seconds"]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--versions", help="minor releases, such as 4.57,5.3; all that pyproject.toml allows")
    parser.add_argument("--keep", type=Path, help="a folder in which the environments stay; they are removed otherwise")
    parser.add_argument("--work", type=Path, default=WORK, help="where results and logs go")
    parser.add_argument("--table", type=Path, help="where the table goes; WORK/table.md")
    parser.add_argument("--files", help=f"test files; {','.join(FILES)}")
    parser.add_argument("--again", action="store_true", help="run what has a result already, too")
    options = parser.parse_args()

    files = options.files.split(",") if options.files else FILES
    versions = newest_patches(options.versions.split(",") if options.versions else None)
    tested, results = fingerprint() + ":" + ",".join(files), []
    options.work.mkdir(parents=True, exist_ok=True)
    for version in versions:
        kept = options.work / f"{version}.json"
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if options.again or found.get("tested") != tested or "passed" not in found:
            at = (options.keep or options.work).resolve() / f"transformers-{version}"
            python = environment(at, version)
            found = {"version": version, "tested": tested, **run_tests(python, at, version, files)}
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            log = at / "pytest.log"
            if log.exists():
                shutil.copy(log, options.work / f"{version}.log")
            if not options.keep:
                shutil.rmtree(at)
        results.append(found)
        print(table([found]).splitlines()[-1], flush=True)
        for name, said in found.get("failed", {}).items():
            print(f"    {name}: {' '.join(said)}", flush=True)
    text = table(results)
    (options.table or options.work / "table.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    bad = [r["version"] for r in results if r.get("failed") or "error" in r]
    if bad:
        raise SystemExit(f"failures on {', '.join(bad)}; logs are in {options.work}")


if __name__ == "__main__":
    main()
