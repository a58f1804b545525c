"""Memory that control groups leave: of trees made here as Linux shows them, and of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama1m_ext import cgroup, memory

UNLIMITED = 9223372036854771712


def tree(root: Path, mine: str, mounts: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(mine)
    (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
    return root


def second(root: Path, folder: str, limit: object, used: int = 0, **files: object) -> None:
    """A group of the second version."""
    where = root / folder
    where.mkdir(parents=True, exist_ok=True)
    for name, value in {"max": limit, "current": used, **files}.items():
        (where / f"memory.{name}").write_text(f"{value}\n")


def first(root: Path, folder: str, limit: int, used: int, stat: str = "") -> None:
    """A group of the first version."""
    where = root / folder
    where.mkdir(parents=True, exist_ok=True)
    (where / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (where / "memory.usage_in_bytes").write_text(f"{used}\n")
    (where / "memory.stat").write_text(stat)


V2 = "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 22 0:32 / /sys/fs/cgroup/memory rw,relatime shared:4 - cgroup cgroup rw,memory\n"
JOB = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/task_0"


@pytest.mark.parametrize("limited", ["task_0", "step_0", "job_7", "slurmstepd.scope", "system.slice"])
def test_the_limit_of_any_group_around(tmp_path, limited):
    """As SLURM and systemd-run -p MemoryMax make them."""
    root = tree(tmp_path, "0::/system.slice/slurmstepd.scope/job_7/step_0/task_0\n", V2)
    (root / "sys/fs/cgroup").mkdir(parents=True)  # the root group has no limit, nor a file for it
    folder = root / JOB
    while folder != root / "sys/fs/cgroup":
        second(root, str(folder.relative_to(root)), 5000 if folder.name == limited else "max", 1000)
        folder = folder.parent
    assert cgroup.available_bytes(root) == 4000


def test_the_least_of_several(tmp_path):
    root = tree(tmp_path, "0::/a/b\n", V2)
    second(root, "sys/fs/cgroup/a", 10_000, 9_500)
    second(root, "sys/fs/cgroup/a/b", 8_000, 4_000)
    assert cgroup.available_bytes(root) == 500
    second(root, "sys/fs/cgroup/a/b", 8_000, 4_000, high=4_100)
    assert cgroup.available_bytes(root) == 100
    second(root, "sys/fs/cgroup/a/b", 8_000, 9_000)
    assert cgroup.available_bytes(root) == 0


def test_files_pages_are_free(tmp_path):
    """Those of an offloaded cache, for one, count as used there, and are given up."""
    root = tree(tmp_path, "0::/a\n", V2)
    second(root, "sys/fs/cgroup/a", 1_000_000, 900_000)
    assert cgroup.available_bytes(root) == 100_000
    (root / "sys/fs/cgroup/a/memory.stat").write_text("anon 300000\nactive_file 200000\ninactive_file 400000\nslab 5\n")
    assert cgroup.available_bytes(root) == 700_000


def test_the_first_version(tmp_path):
    """What is used there is of all groups inside; so is what the names with total_ say."""
    root = tree(
        tmp_path, "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n", V1 + V2.replace("cgroup rw", "cgroup/unified rw")
    )
    first(root, "sys/fs/cgroup/memory", UNLIMITED, 70_000)
    first(root, "sys/fs/cgroup/memory/docker", 50_000, 30_000, "inactive_file 1\ntotal_inactive_file 10000\n")
    first(root, "sys/fs/cgroup/memory/docker/abc", UNLIMITED, 25_000)
    first(root, "sys/fs/cgroup/memory/x", 1, 1)
    assert cgroup.available_bytes(root) == 30_000


@pytest.mark.parametrize("path", ["/docker/abc", "/../../outside", "/elsewhere"])
def test_a_container_that_sees_only_its_own_group(tmp_path, path):
    """Without a namespace of groups the path is the host's, and the mount's root says the same."""
    mounts = V2.replace(" / /sys", " /docker/abc /sys")
    root = tree(tmp_path, f"0::{path}\n", mounts)
    second(root, "sys/fs/cgroup", 9_000, 2_000)
    second(root, "sys/fs/cgroup/elsewhere", 1, 1)
    assert cgroup.available_bytes(root) == 7_000


def test_the_group_below_a_container_s(tmp_path):
    root = tree(tmp_path, "0::/docker/abc/inner\n", V2.replace(" / /sys", " /docker/abc /sys"))
    second(root, "sys/fs/cgroup", 9_000, 2_000)
    second(root, "sys/fs/cgroup/inner", 3_000, 2_500)
    assert cgroup.available_bytes(root) == 500


def test_names_with_spaces(tmp_path):
    root = tree(tmp_path, "0::/my unit: 1\n", V2.replace("/sys/fs/cgroup", r"/sys/fs/c\040group"))
    second(root, "sys/fs/c group/my unit: 1", 3_000, 2_500)
    assert cgroup.available_bytes(root) == 500


@pytest.mark.parametrize("mine", ["", "0::/a\n", "nonsense\n", "1:memory:/\n", ":::\n0:\n"])
def test_no_groups(tmp_path, mine):
    assert cgroup.available_bytes(tmp_path) is None
    root = tree(tmp_path, mine, "nonsense\n1 2 - \n31 22 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n")
    assert cgroup.available_bytes(root) is None
    (root / "proc/self/mountinfo").unlink()
    assert cgroup.available_bytes(root) is None


def test_it_is_asked(monkeypatch):
    monkeypatch.setattr(cgroup, "available_bytes", lambda: 12_345)
    assert memory.available_bytes() == 12_345


INSIDE = """
import sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text("0")
from llama1m_ext import memory
print(memory.available_bytes())
"""


def test_a_real_group_in_a_group(request):
    """Where this process may make groups of its own: as root in the first version."""
    found = [folder for kind, folder in cgroup.folders() if kind == "cgroup"]
    if not found or not os.access(found[0], os.W_OK):
        pytest.skip("no groups of the first version that can be made here")
    outer = found[0] / f"llama1m-{os.getpid()}"
    try:
        (outer / "inner").mkdir(parents=True)
        (outer / "memory.limit_in_bytes").write_text(str(512 << 20))
    except OSError as e:
        pytest.skip(f"no group can be made here: {e}")
    finally:
        request.addfinalizer(lambda: [folder.rmdir() for folder in (outer / "inner", outer) if folder.exists()])
    answer = subprocess.run(
        [sys.executable, "-c", INSIDE, str(outer / "inner")], capture_output=True, encoding="utf-8", timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    assert 400 << 20 < int(answer.stdout) <= 512 << 20
