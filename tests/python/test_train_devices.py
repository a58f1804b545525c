"""Several processes train what one does with twice the accumulation, in both ways, and go on after a kill."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_train_extend import found, losses, run, weights

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import os
import sys
import time
from pathlib import Path
import torch
from test_train_extend import run
torch.set_num_threads(1)
out, devices, dtype, stop, share = sys.argv[1:]
if os.environ["RANK"] != "0":
    is_dir = Path.is_dir
    Path.is_dir = lambda path: time.sleep(0.1) or is_dir(path)  # others look for files later than the first, which writes them
def enough(step):
    if step.stage_number == 2 and step.step == int(stop):
        raise RuntimeError("enough")
try:
    options = {"devices": devices, "dtype": dtype, "checkpoint_steps": 3, "on_step": enough, "resume": True}
    run(out + "/" + devices, sequence_parallel=int(share), **options)
except RuntimeError as e:
    assert str(e) == "enough", e
time.sleep(0.5)  # gloo's thread gives up its last tensors, for which it needs the GIL: torch 2.5 waits for it with the GIL held
torch.distributed.destroy_process_group()
"""


def two(out: Path, devices: str, dtype: str, stop: int = 0, share: int = 1, processes: int = 2) -> None:
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--standalone",
        "--no-python",
    ]
    words += [sys.executable, "-c", SCRIPT, str(out), devices, dtype, str(stop), str(share)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=280, env=env)
    said = answer.stdout[-3000:] + answer.stderr
    reasons = [line for line in said.splitlines() if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b", line)]
    assert answer.returncode == 0, "\n".join([*reasons, said[-16000:]])


def close(a: Path, b: Path, atol: float) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].float(), other[name].float(), atol=atol) for name in one
    )


def test_two_processes(tmp_path):
    two(tmp_path, "replicate", "float32")
    alone = run(tmp_path / "alone")
    assert losses(tmp_path / "replicate") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    for name in ("1-32", "2-64"):
        assert close(tmp_path / "replicate" / name, alone.out / name, 2e-4)
    sizes = [(found(tmp_path / "replicate")[0] / f"rank-{i}.safetensors").stat().st_size for i in (0, 1)]
    assert sizes[1] < 10_000 < sizes[0], "the first writes for both"


@pytest.mark.parametrize(
    ("devices", "processes", "share"),
    [
        ("replicate", 2, 2),
        pytest.param("shard", 2, 2, marks=pytest.mark.slow),
        pytest.param("replicate", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_processes_share_rows(tmp_path, devices, processes, share):
    """Ring attention over each row: the same losses and weights as one process has."""
    two(tmp_path, devices, "float32", share=share, processes=processes)
    alone = run(tmp_path / "alone")
    assert losses(tmp_path / devices) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    for name in ("1-32", "2-64"):
        assert close(tmp_path / devices / name, alone.out / name, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", ["replicate", "shard"])
def test_they_go_on_after_a_stop(tmp_path, devices, dtype):
    two(tmp_path / "a", devices, dtype)
    two(tmp_path / "b", devices, dtype, stop=5)
    assert [path.name for path in found(tmp_path / "b" / devices)] == ["02-0000003", "01-0000008-ended"]
    two(tmp_path / "b", devices, dtype)
    assert losses(tmp_path / "a" / devices) == losses(tmp_path / "b" / devices)
    alone = run(tmp_path / "alone", dtype=dtype)
    assert losses(tmp_path / "a" / devices) == pytest.approx(
        losses(alone.out), rel=1e-4 if dtype == "float32" else 2e-2
    )
    for name in ("1-32", "2-64"):
        assert close(tmp_path / "a" / devices / name, tmp_path / "b" / devices / name, 0)
        assert close(tmp_path / "a" / devices / name, alone.out / name, 2e-4 if dtype == "float32" else 2e-2)
    if devices == "shard":
        sizes = [f.stat().st_size for f in found(tmp_path / "a" / devices)[0].iterdir()]
        whole = sum(f.stat().st_size for f in found(alone.out)[0].iterdir())
        assert all(size < 0.6 * whole for size in sizes)
