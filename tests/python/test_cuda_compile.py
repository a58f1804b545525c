"""The operators of torch behind `ops`: for both kinds of device, as opcheck wants them, and inside `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama1m_ext import ops
from llama1m_ext.dense import new_page
from llama1m_ext.formats import KvFormat

NAMES = ("attention", "merge_partials", "rope_apply", "kv_append", "kv_read")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["CPU", "CUDA"])
def test_operators_are_there_for_both_devices(name, device):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"llama1m_ext::{name}", device)


@pytest.mark.parametrize("kv", ["model", "int8", "int4"])  # opcheck can't compare numbers of fp8
def test_opcheck_of_pages(kv):
    k, v = torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64)
    page = new_page(KvFormat.parse(kv), 192, k, v)
    for t in page.tensors().values():
        t.zero_()
    sides = ops._flat(page.k), ops._flat(page.v)
    append, read = torch.ops.llama1m_ext.kv_append.default, torch.ops.llama1m_ext.kv_read.default
    torch.library.opcheck(append, (k, v, *sides, 64))
    rope = torch.arange(128), torch.rand(32, dtype=torch.float64)
    torch.library.opcheck(append, (k, v, *sides, 0, *rope, 1.0))
    torch.library.opcheck(read, (sides[0], "k", 3, 100, 64, torch.float32))
    torch.library.opcheck(read, (sides[1], "v", 0, 192, 64, torch.float32))


def step(q, k, v, positions, inv_freq, page):
    """All there is, once."""
    ops.kv_append(k, v, page, 64, positions=positions, inv_freq=inv_freq, attention_scaling=1.5)
    q, _ = ops.rope_apply(q, None, positions, inv_freq)
    keys, values = ops.kv_read(page, 0, 128, q.shape[3], q.dtype)
    first, lse = ops.attention(q, [page.k], [page.v], kv_len=128, kv_start=3, return_lse=True, out_dtype=torch.float32)
    second, lse2 = ops.attention(q, keys, values, causal=False, return_lse=True, out_dtype=torch.float32)
    out, lse = ops.merge_partials([first, second], [lse, lse2])
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1), lse


def inputs(device, dtype, kv):
    q, k = torch.randn(2, 4, 64, 64, device=device, dtype=dtype), torch.randn(2, 2, 64, 64, device=device, dtype=dtype)
    page = new_page(KvFormat.parse(kv), 192, k, k)
    for t in page.tensors().values():
        t.zero_()
    positions = torch.arange(64, 128, device=device).expand(2, 64)
    return q, k, k * 0.5, positions, torch.rand(32, dtype=torch.float64), page


@pytest.mark.parametrize("kv", ["model", "int8/int4"])
def test_compiled_on_the_cpu_is_what_it_is_without(kv):
    torch.manual_seed(0)
    *tensors, page = inputs("cpu", torch.float32, kv)
    with torch.no_grad():
        want = step(*tensors, page)
        for t in page.tensors().values():
            t.zero_()
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors, page)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("kv", ["model", "int8/int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_for_a_gpu_it_is_one_graph(fake_gpu, kv, dtype):
    """With fake tensors: shapes, dtypes and devices of each result, as the compiler sees them on a machine with a GPU."""
    seen = []

    def backend(graph, example):
        seen.append([str(node.target) for node in graph.graph.nodes if "llama1m_ext" in str(node.target)])
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, example)

    with FakeTensorMode(), torch.no_grad():
        given = inputs("cuda", dtype, kv)
        for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
            out, lse = run(*given)
            assert (out.device.type, out.dtype, tuple(out.shape)) == ("cuda", torch.float32, (2, 64, 256))
            assert (lse.device.type, lse.dtype, tuple(lse.shape)) == ("cuda", torch.float32, (2, 4, 64))
    (calls,) = seen
    for name in NAMES:
        assert sum(name in call for call in calls) == (2 if name in ("attention", "kv_read") else 1), calls
