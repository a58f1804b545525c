"""What several test files share."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for tiny operations by spinning take the cores from each other: on a busy machine the suite took 6 times
# as long. Read by libgomp when torch loads it, which is after this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DRIVER = os.environ.get("LLAMA1M_TEST_DRIVER")
"""A libcuda.so.1 that runs the kernels on the CPU (tests/cuda/build.py --driver): all calls of `ops` go through it then."""


_over = contextlib.ExitStack()


def pytest_configure() -> None:
    if DRIVER:
        import ctypes
        import types

        ctypes.CDLL(DRIVER, mode=ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 gets this one
        from llama1m_ext import cuda, gradients, ops

        _over.enter_context(cuda.over_host_memory())
        ops._core = gradients._core = types.SimpleNamespace()  # nothing falls back on the CPU's engine unseen


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """transformers as it is without us."""
    import llama1m_ext

    llama1m_ext.disable()
    try:
        yield
    finally:
        llama1m_ext.enable()


def assert_near(ours: Iterable[Any], theirs: Iterable[Any], share: float = 2e-4) -> None:
    """Gradients, or weights after some steps: each within a share of the largest of its tensor."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        worst, most = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
        assert worst <= share * most + 1e-12, (worst, most, tuple(b.shape))


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs a script in a Python of its own, and returns what it printed."""

    def run(script: str, timeout: float = 120, **environment: str) -> str:
        answer = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            env={**os.environ, **environment},
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models, on which threads only wait for each other: many times, on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def families_as_they_were() -> Iterator[None]:
    """For tests that switch families of models on: nobody else can switch one off."""
    import llama1m_ext
    from llama1m_ext import families, patch

    on, known = list(patch._on), dict(families._by_class)
    yield
    llama1m_ext.disable()
    patch._on[:] = on
    for c in families._by_class.keys() - known.keys():
        del families._by_class[c]
    llama1m_ext.enable()


@pytest.fixture
def nan_in_new_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of pages that nobody has written holds what must not be read: NaN, or codes that would show."""
    import torch

    from llama1m_ext import dense

    make = dense.empty

    def filled(*args):
        made = make(*args)
        for t in made if isinstance(made, tuple) else (made,):
            t.view(torch.uint8).fill_(0x7F) if t.dtype.itemsize == 1 else t.fill_(float("nan"))
        return made

    monkeypatch.setattr(dense, "empty", filled)


@functools.cache
def why_no_prefill_chunks() -> str | None:
    """transformers 5.0 refuses `prefill_chunk_size` with the cache that it makes itself, and 5.1 counts on from the last
    chunk, not from the prompt: every later token is at another place than its keys."""
    from llama1m_ext import testing

    model, places = testing.tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: places.append(kwargs.get("cache_position")), with_kwargs=True
    )
    try:
        with stock():
            model.generate(testing.random_ids(1, 20), prefill_chunk_size=8, max_new_tokens=3, eos_token_id=None)
    except ValueError as e:
        return str(e)
    last = places[-1]
    return None if last is None or last.tolist() == [21] else f"cache_position {last.tolist()} for the 22nd token"


def needs_prefill_chunks(wanted: bool = True) -> None:
    """Skips where transformers itself can't: there is nothing to compare with."""
    why = why_no_prefill_chunks() if wanted else None
    if why is not None:
        import transformers

        pytest.skip(f"transformers {transformers.__version__} itself: {why}")


@functools.cache
def _why_no_fake_gpu() -> str | None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            torch.randn(2, device="cuda:0").uniform_()
    except RuntimeError as e:  # torch 2.5 asks the driver even then
        return str(e).splitlines()[0]
    return None


@pytest.fixture
def fake_gpu() -> None:
    """For tests of fake tensors on a GPU: skips where this torch can't make them without a driver. Never in CI's newest
    environment."""
    why = _why_no_fake_gpu()
    if why is not None:
        assert os.environ.get("LLAMA1M_CUDA_GATES") != "required", why
        pytest.skip(f"no fake tensors on a GPU with this torch: {why}")
