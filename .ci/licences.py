"""LICENSE-THIRD-PARTY: the licences of the Rust crates that the compiled module contains, as they ask for.

python .ci/licences.py            writes it, from what Cargo.lock names (cargo has to have fetched it)
python .ci/licences.py --check    ends with 1 where the file is not about these crates
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "LICENSE-THIRD-PARTY"
HEAD = """The compiled module of llama1m-ext contains the following Rust crates. .ci/licences.py has made this list, and the texts are
those that the crates come with. Where a crate offers a choice, the licence taken is Apache-2.0 or MIT.
"""
RULE = "=" * 100


def crates() -> list[dict]:
    """What is linked: normal dependencies, no build scripts' and no tests'."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--features", "python,cuda"]
    command += ["--filter-platform", "x86_64-unknown-linux-gnu"]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout)
    packages = {p["id"]: p for p in found["packages"]}
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    seen, waiting = set(), [found["resolve"]["root"]]
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        for dep in nodes[here]["deps"]:
            linked = any(kind["kind"] is None for kind in dep["dep_kinds"])
            macro = any("proc-macro" in target["kind"] for target in packages[dep["pkg"]]["targets"])
            if linked and not macro:  # a macro leaves code of ours behind, not its own
                waiting.append(dep["pkg"])
    seen.discard(found["resolve"]["root"])
    return sorted((packages[at] for at in seen), key=lambda p: (p["name"], p["version"]))


def text(package: dict) -> str:
    folder = Path(package["manifest_path"]).parent
    names = sorted(
        f for f in folder.iterdir() if f.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE"))
    )
    if not names:
        authors = ", ".join(package["authors"]) or "its authors"
        return f"(no text comes with it; {package['license']}, by {authors}, {package['repository']})\n"
    # One of Apache-2.0 and MIT is enough, and MIT's text is the one with the names.
    mit = [f for f in names if "MIT" in f.name.upper()]
    return "\n".join(
        f.read_text(encoding="utf-8", errors="replace").strip() + "\n" for f in mit or names if f.is_file()
    )


def title(package: dict) -> str:
    return f"{package['name']} {package['version']} ({package['license']})"


def main() -> None:
    found = crates()
    if "--check" in sys.argv[1:]:
        lines = FILE.read_text(encoding="utf-8").splitlines()
        have = {b for a, b, c in zip(lines, lines[1:], lines[2:], strict=False) if a == c == RULE}
        missing = [title(p) for p in found if title(p) not in have]
        extra = sorted(have - set(map(title, found)))
        if missing or extra:
            sys.exit(f"{FILE.name}: run python .ci/licences.py; not there: {missing}, no longer used: {extra}")
        return
    parts = [HEAD, *(f"{RULE}\n{title(p)}\n{RULE}\n{text(p)}" for p in found)]
    FILE.write_text("\n".join(parts), encoding="utf-8")
    print(f"{FILE.name}: {len(found)} crates")


if __name__ == "__main__":
    main()
