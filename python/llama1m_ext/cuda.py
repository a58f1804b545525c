"""The calls of `ops` on NVIDIA GPUs: a thin layer over the core's `cuda_*` functions.

Outputs and workspaces are torch's (`torch.empty`), work goes to torch's current stream of the tensors' device, and
nothing here waits for it. So a call may be captured in a CUDA graph, and memory is reused in the order of the stream.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _core, cuda_files
from .formats import Side

Pages = Side | Sequence[Side]
ALIGN = 256
"""Workspaces begin at a multiple of so many bytes, as whatever `torch.empty` gives on a GPU does."""
MAX_PARTIALS = 32
"""Of one launch; more are merged in turns."""
_host_memory = False


class Missing(RuntimeError):
    """Something that a GPU needs is not there: the driver, or kernels for it."""


@contextlib.contextmanager
def over_host_memory() -> Iterator[None]:
    """Tensors on the CPU take the GPU's path, too: for tests, with a driver that runs kernels on the CPU. With any other
    driver the core refuses them."""
    global _host_memory
    before, _host_memory = _host_memory, True
    try:
        yield
    finally:
        _host_memory = before


def serves(tensor: Any) -> bool:
    """Whether a call with this tensor (of `ops`; its first one) is for a GPU."""
    if not isinstance(tensor, Tensor):
        return False
    return tensor.is_cuda or (_host_memory and tensor.device.type == "cpu")


def waits(device: torch.device) -> bool:
    """Whether reading a number from this device means waiting for all the work that was given to it."""
    return device.type != "cpu"


def info() -> dict[str, Any]:
    """What there is: driver, devices, NVRTC, kernels in this package, folder of compiled ones. Never raises."""
    set_up()
    return dict(_core.cuda_info())


@functools.cache
def set_up() -> None:
    """Tells the core where kernels come from. Before anything else is asked of it."""
    _core.cuda_set_up(cuda_files.packed(), cuda_files.cache(), cuda_files.nvrtc())


def missing(device: torch.device) -> str | None:
    """What is not there that this device needs, in words; None: nothing, as far as can be told without a launch."""
    if torch.version.hip is not None:
        return "this torch is built for AMD's GPUs (ROCm)"
    return _missing(device.index if device.index is not None else _current(device))


@functools.lru_cache(maxsize=64)
def _missing(index: int) -> str | None:
    found = info()
    driver = found["driver"]
    if not driver["found"]:
        return f"no NVIDIA driver: {driver.get('why') or 'there is no libcuda.so.1'}"
    if driver.get("fake"):
        return None
    devices = found["devices"]
    if index >= len(devices):
        return f"the driver knows {len(devices)} devices, there is none of number {index}"
    if isinstance(devices[index], str):
        return f"the driver says nothing of it: {devices[index]}"
    name, (major, minor), *_ = devices[index]
    if major < 8:
        return f"{name} is of compute capability {major}.{minor}, expected 8.0 or newer"
    nvrtc = found["nvrtc"]
    if not any(_fits(arch, major, minor) for arch in found["cubins"]) and nvrtc.get("path") is None:
        have = ", ".join(found["cubins"]) or "none"
        return (
            f"there are no kernels for {name} (sm_{major}{minor}): this package has {have}, and NVRTC, which would compile "
            f"them, was not found: {nvrtc.get('why') or 'no libnvrtc'}"
        )
    return None


def _fits(arch: str, major: int, minor: int) -> bool:
    """Whether a GPU of that compute capability runs kernels of an architecture: "sm_80", "sm_90a"."""
    number = arch.removeprefix("sm_").rstrip("abcdefghijklmnopqrstuvwxyz")
    if arch.endswith("a"):
        return number == f"{major}{minor}"
    return int(number[:-1]) == major and int(number[-1]) <= minor


def unserved(device: torch.device) -> str | None:
    """Why tensors on this device are none of ours, in words; None: they are served."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device {device.type}"
    why = missing(device)
    return None if why is None else f"device {device}: {why}"


def check(device: torch.device) -> None:
    """Raises:
    Missing: the driver or kernels for this device are not there; the message says which.
    """
    if device.type != "cuda":
        set_up()  # a driver of the tests'
        return
    why = missing(device)
    if why is not None:
        raise Missing(f"device {device}: {why}")


# -- the calls -----------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Pages,
    v: Pages,
    out: Tensor,
    lse: Tensor | None,
    *,
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | int | None,
    kv_end: Tensor | int | None,
    kv_len: int | None,
    path: str = "auto",
) -> None:
    """As `_core.attention`, with the bounds of rows as tensors on the device, or ints."""
    device = q.device
    check(device)
    with _at(device) as stream:
        size = _core.cuda_attention_workspace(q, k, v, kv_len=kv_len, path=path, out_f32=out.dtype == torch.float32)
        _core.cuda_attention(
            q,
            k,
            v,
            out,
            lse,
            causal=causal,
            softmax_scale=softmax_scale,
            q_start=q_start,
            kv_start=bound("kv_start", kv_start, q),
            kv_end=bound("kv_end", kv_end, q),
            kv_len=kv_len,
            workspace=_workspace(size, device),
            stream=stream,
            path=path,
        )


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Pages,
    v: Pages,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | int | None,
    kv_end: Tensor | int | None,
    kv_len: int | None,
    grad_lse: Tensor | None = None,
    path: str = "auto",
) -> None:
    """As `_core.attention_backward`, with the bounds of rows as tensors on the device, or ints. The same bits each time.

    grad_out is rounded to q's dtype; k and v that are several pages are put together first, which is a copy. Beside the
    results it takes 8 bytes for each query of each head, and where a sum has more than 65,536 terms at most 1 GiB, or what one
    key head and its group need.
    """
    device = q.device
    check(device)
    with _at(device) as stream:
        # First of all, for it refuses what is too large before any copy.
        size = _core.cuda_attention_backward_workspace(q, k, v, kv_len=kv_len)
        grad_out = _streamable(grad_out.to(q.dtype) if isinstance(grad_out, Tensor) else grad_out)
        k, v = _joined(k), _joined(v)
        _core.cuda_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            causal=causal,
            softmax_scale=softmax_scale,
            q_start=q_start,
            kv_start=bound("kv_start", kv_start, q),
            kv_end=bound("kv_end", kv_end, q),
            kv_len=kv_len,
            grad_lse=grad_lse,
            workspace=_workspace(size, device),
            stream=stream,
            path=path,
        )


def merge_partials(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """As `_core.merge_partials`."""
    check(out.device)
    while len(outs) > MAX_PARTIALS:
        first, sums = outs[:MAX_PARTIALS], lses[:MAX_PARTIALS]
        joined = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        sum_ = torch.empty(lse.shape, dtype=torch.float32, device=out.device)
        merge_partials(first, sums, joined, sum_)
        outs, lses = [joined, *outs[MAX_PARTIALS:]], [sum_, *lses[MAX_PARTIALS:]]
    with _at(out.device) as stream:
        _core.cuda_merge_partials(outs, lses, out, lse, stream=stream)


def rope_apply(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    attention_scaling: float,
) -> None:
    """As `_core.rope_apply`; positions on the device, inv_freq on the host."""
    check(q.device)
    with _at(q.device) as stream:
        _core.cuda_rope_apply(
            q, k, q_out, k_out, _packed(positions), inv_freq, attention_scaling=attention_scaling, stream=stream
        )


def kv_append(
    k: Tensor,
    v: Tensor,
    page_k: Side,
    page_v: Side,
    at: int,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_scaling: float = 1.0,
) -> None:
    """As `_core.kv_append` of both sides, with the rotation of k on the way where there are positions."""
    check(k.device)
    with _at(k.device) as stream:
        _core.cuda_kv_append(
            k,
            v,
            page_k,
            page_v,
            at,
            positions=_packed(positions),
            inv_freq=inv_freq,
            attention_scaling=attention_scaling,
            stream=stream,
        )


def kv_read(side: Side, start: int, out: Tensor, of: str) -> None:
    """As `_core.kv_read`."""
    check(out.device)
    with _at(out.device) as stream:
        _core.cuda_kv_read(side, start, out, of, stream=stream)


def bound(name: str, x: Tensor | int | None, like: Tensor) -> Tensor | None:
    """A bound of each batch row as the kernels take it, int64 `[batch]` on the device of `like`; made there from an int."""
    if x is None or isinstance(x, Tensor):
        return x
    if not 0 <= x < 1 << 62:
        raise ValueError(f"{name}: expected a token from 0 to 2^62, got {x}")
    return torch.full((like.shape[0],), x, dtype=torch.int64, device=like.device)


def _joined(x: Pages) -> Pages:
    """Several dense pages as one tensor; anything else as it is."""
    if isinstance(x, (list, tuple)) and len(x) > 1 and all(isinstance(page, Tensor) for page in x):
        return torch.cat([page for page in x if isinstance(page, Tensor)], dim=2)
    return x


def _streamable(x: Tensor) -> Tensor:
    """A gradient with rows that the fast kernels can read: what autograd hands over may be expanded, or lie anyhow."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x  # the core names it and refuses
    strides = [stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    even = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides[:-1])
    if even and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _packed(x: Any) -> Any:
    """A tensor without gaps; anything else as it is, for the core to refuse."""
    return x.contiguous() if isinstance(x, Tensor) else x


def _workspace(size: int, device: torch.device) -> Tensor | None:
    if not size:
        return None
    if device.type == "cuda":
        return torch.empty(size, dtype=torch.uint8, device=device)
    memory = torch.empty(size + ALIGN, dtype=torch.uint8)  # of the CPU's, where less is aligned
    return memory[-memory.data_ptr() % ALIGN :][:size]


def _current(device: torch.device) -> int:
    return torch.cuda.current_device() if device.type == "cuda" else 0


@contextlib.contextmanager
def _guarded(device: torch.device) -> Iterator[int]:
    # The core makes the device's context the current one: whatever was is put back.
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _at(device: torch.device) -> AbstractContextManager[int]:
    """The stream that work goes to. Leaves torch's current device as it was."""
    return _guarded(device) if device.type == "cuda" else nullcontext(0)
