"""What the project says twice, it says alike."""

from __future__ import annotations

import re
from pathlib import Path

from llama1m_ext import _core

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version():
    crate = re.search(r'^version = "(.+)"$', read("Cargo.toml"), re.MULTILINE)
    assert crate is not None
    assert _core.__version__ == crate.group(1)
    assert f"## {_core.__version__}" in read("CHANGELOG.md")


def test_the_oldest_environment_of_ci_is_at_the_floors_of_pyproject():
    def floors_of(start: str) -> dict[str, str]:
        part = read("pyproject.toml").partition(start)[2].partition("\n]")[0]
        return dict(re.findall(r'"([a-z-]+)>=([0-9.]+)', part))

    oldest = dict(re.findall(r"^([a-z-]+)==([0-9.]+)$", read(".ci/oldest.txt"), re.MULTILINE))
    floors, of_tests = floors_of("\ndependencies = ["), floors_of("\ntest = [")
    assert set(floors) <= set(oldest) <= set(floors) | set(of_tests)
    floors |= {name: of_tests[name] for name in oldest if name not in floors}
    for name, floor in floors.items():
        # The same minor release; a withdrawn or broken patch release may be stepped over.
        assert oldest[name].split(".")[:2] == floor.split(".")[:2], name


def test_the_readme_has_the_table_of_transformers_releases():
    """What `make compat` printed: every minor release from the floor of pyproject.toml on, none with a failure."""
    rows = re.findall(
        r"^\| (\d+)\.(\d+)\.\d+ \| [\d.]+ \| (\d+) \| (\d+) \| (\d+) \| \d+ \|$", read("README.md"), re.MULTILINE
    )
    floor = re.search(r'"transformers>=(\d+)\.(\d+),', read("pyproject.toml"))
    assert floor is not None
    minors = [(int(a), int(b)) for a, b, *_ in rows]
    assert minors[0] == tuple(map(int, floor.groups()))
    for before, after in zip(minors, minors[1:], strict=False):
        assert after in ((before[0], before[1] + 1), (before[0] + 1, 0)), (before, after)
    for _, _, passed, failed, skipped in rows:
        assert int(failed) == 0
        assert int(passed) > 300 > 10 * int(skipped)


def test_no_path_of_one_machine_is_in_the_tree():
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        ROOT / "Makefile",
        *ROOT.glob(".ci/*"),
        *ROOT.glob("*/*.py"),
    ]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(opt|home|work|root)/[a-z]", text), path.name
