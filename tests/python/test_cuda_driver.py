"""The way to the GPU without one: torch's tensors, the core's door, the driver's calls, and the kernels' own source, run
on the CPU by a driver of ours (tests/cuda/fake_driver.cpp). In processes of their own: a driver can't be changed.

The cases are those that the CPU's engine is tested with: `pytest -m "slow or not slow" tests/python/test_cuda_driver.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILD = HERE.parent / "cuda" / "build.py"

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or sys.platform != "linux",
    reason="the driver is built by a C++ compiler, on Linux",
)


@pytest.fixture(scope="session")
def driver():
    """The path of libcuda.so.1; made only where its parts have changed."""
    built = subprocess.run(
        [sys.executable, str(BUILD), "--driver"], capture_output=True, encoding="utf-8", timeout=1800
    )
    assert built.returncode == 0, built.stderr
    return Path(built.stdout.splitlines()[-1]) / "libcuda.so.1"


@pytest.fixture
def over(driver, tmp_path):
    """Runs a script over that driver, and returns what it printed."""

    def run(*command, timeout=900, **environment):
        answer = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            cwd=HERE,
            env={
                **os.environ,
                "LLAMA1M_TEST_DRIVER": str(driver),
                "LLAMA1M_CUDA_CACHE": str(tmp_path / "kernels"),
                **environment,
            },
        )
        assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-6000:]
        return answer.stdout

    return run


def passed(said):
    """How many tests pytest says that passed; all of them."""
    found = re.search(r"(\d+) passed", said)
    assert found is not None, said
    assert "failed" not in said, said
    assert "skipped" not in said, said
    return int(found[1])


CASES = {
    "attention": (
        31,
        "test_attention.py",
        "-k",
        "random or views or laid or not_in_use or torchs",
    ),
    "merge": (4, "test_merge.py"),
    "rope": (4, "test_rope.py", "-k", "rotation or given_outputs or stretch"),
    # Pages have other bits there than the whole.
    "gradients": (
        40,
        "test_gradients.py",
        "-k",
        "float64 or same_bits or strided or by_hand or merges or checkpointed or only_what or turn_back",
    ),
    # What is there on a GPU can't be looked at by the host: numbers of positions and bounds.
    "mistakes": (47, "test_fuzz_ops.py", "-k", "(mistakes or crash or freed) and not host"),
    "kv": (20, "test_kv_formats.py", "-k", "codes or parts or touches or partials or padding or views or nan"),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("what", CASES)
def test_the_cases_of_the_cpu(over, what):
    least, *selected = CASES[what]
    assert passed(over("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selected)) >= least


@needs_compiler
def test_whole_models(over):
    assert passed(over("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "over_driver.py")) >= 15


@needs_compiler
@pytest.mark.parametrize("mode", ["eager", "random"])
def test_pages_rope_and_merge(over, mode):
    """Against the CPU's engine, pages byte for byte."""
    said = over("-m", "pytest", "-q", "-p", "no:cacheprovider", "over_driver_verbs.py", LLAMA1M_FAKE_MODE=mode)
    assert passed(said) >= 74


@needs_compiler
def test_gradients(over):
    """Against float64 and eager attention's autograd; on a GPU of Hopper's kind."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "over_driver_backward.py", "-k", "not segment")
    assert passed(over(*command)) >= 37


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "mode"), [("8.0", "random"), ("8.9", "lazy")])
def test_gradients_elsewhere(over, capability, mode):
    """Where the kernels for sm_90a don't run; and where a block gets less shared memory."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "over_driver_backward.py", "-k", "float64 or masks")
    assert passed(over(*command, LLAMA1M_FAKE_CAPABILITY=capability, LLAMA1M_FAKE_MODE=mode)) >= 28


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "which"), [("8.0", "65700"), ("9.0", "4110")])
def test_gradients_of_many_terms(over, capability, which):
    """Sums that go by way of float32 memory: of keys, of queries."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "over_driver_backward.py", "-k", f"segment and {which}")
    assert passed(over(*command, LLAMA1M_FAKE_CAPABILITY=capability)) == 1


@needs_compiler
@pytest.mark.slow
def test_on_another_gpu(over):
    """Where the kernels for sm_90a don't run, and asynchronous copies come as late as can be."""
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "over_driver.py", "-k", "narrow or int8")
    assert passed(over(*command, LLAMA1M_FAKE_CAPABILITY="8.0", LLAMA1M_FAKE_MODE="lazy")) == 4
