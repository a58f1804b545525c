"""ops.attention against float64, with torch's own attention in the same dtype as the yardstick.

Runs once per instruction-set level in CI (`LLAMA1M_ISA`).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DRIVER
from llama1m_ext import _core, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of outputs of order 1: rounding of the result plus that of the probabilities.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.5e-2, torch.float16: 3e-3}


def reference(q, k, v, *, causal=True, scale=None, q_start=None, kv_start=None, kv_end=None):
    """Float64 attention and log-sum-exp with every mask written out."""
    q, k, v = q.double(), k.double(), v.double()
    batch, q_heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    group = q_heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(head_dim) if scale is None else scale)
    i = torch.arange(q_len)[:, None] + (kv_len - q_len if q_start is None else q_start)
    j = torch.arange(kv_len)[None, :]
    visible = (j <= i) if causal else torch.ones(q_len, kv_len, dtype=torch.bool)
    visible = visible.expand(batch, 1, q_len, kv_len).clone()
    if kv_start is not None:
        visible &= (j >= torch.as_tensor(kv_start).reshape(-1, 1, 1, 1)).expand_as(visible)
    if kv_end is not None:
        visible &= (j < torch.as_tensor(kv_end).reshape(-1, 1, 1, 1)).expand_as(visible)
    scores = scores.masked_fill(~visible, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v, scores.logsumexp(-1)


def check(out, lse, want, want_lse, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    seen = ~torch.isneginf(want_lse)
    torch.testing.assert_close(lse.double()[seen], want_lse[seen], rtol=tolerance, atol=tolerance)


def make(batch, q_heads, kv_heads, q_len, kv_len, head_dim, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_heads, q_len, head_dim, generator=g).to(dtype)
    k = torch.randn(batch, kv_heads, kv_len, head_dim, generator=g).to(dtype)
    v = torch.randn(batch, kv_heads, kv_len, head_dim, generator=g).to(dtype)
    return q, k, v


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_random_problems(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, head_dim = draw(st.sampled_from([1, 2, 4, 5, 8])), draw(st.sampled_from([8, 33, 64, 96, 128, 256]))
    q_len, kv_len = draw(st.integers(1, 140)), draw(st.integers(1, 260))
    q, k, v = make(batch, group * kv_heads, kv_heads, q_len, kv_len, head_dim, dtype, seed=draw(st.integers(0, 99)))
    kw = {
        "causal": draw(st.booleans()),
        "q_start": draw(st.none() | st.integers(-20, 300)),
        "kv_start": draw(st.none() | st.lists(st.integers(0, 280), min_size=batch, max_size=batch)),
        "kv_end": draw(st.none() | st.lists(st.integers(0, 280), min_size=batch, max_size=batch)),
    }
    want, want_lse = reference(q, k, v, **kw)
    for name in ("kv_start", "kv_end"):
        kw[name] = None if kw[name] is None else torch.tensor(kw[name])
    cut = draw(st.none() | st.lists(st.integers(0, kv_len), max_size=4))
    if cut is not None:
        edges = [0, *sorted(cut), kv_len]
        pages = [(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        k, v = [k[:, :, a:b] for a, b in pages], [v[:, :, a:b] for a, b in pages]
    out, lse = ops.attention(q, k, v, return_lse=True, **kw)
    check(out, lse, want, want_lse, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len,kv_len,head_dim", [(300, 300, 128), (512, 512, 64), (1, 20000, 128), (64, 8192, 128)])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_error_is_no_larger_than_torchs(dtype, q_len, kv_len, head_dim, sharpness):
    q, k, v = make(2, 4, 1, q_len, kv_len, head_dim, dtype)
    q = q * sharpness
    causal = q_len == kv_len
    kr, vr = k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(q.double(), kr.double(), vr.double(), is_causal=causal)

    def rms(x):
        return (x.double() - want).square().mean().sqrt().item()

    ours, torchs = rms(ops.attention(q, k, v, causal=causal)), rms(sdpa(q, kr, vr, is_causal=causal))
    # Measured: 0.2 to 1.05, and up to 1.11 where few keys carry a row (torch rescales eagerly, so that the largest
    # probability is exactly 1; we let it wait below 2^8, which is 9% faster). Without FMA it is a little more.
    # So is a GPU's kernel beside the torch of this host (1.42 seen), whose own torch would be its yardstick.
    limit = 1.15 if _core.isa() != "portable" and not DRIVER else 1.6
    assert ours <= limit * torchs, f"rms {ours:.3e} against torch's {torchs:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views(dtype):
    """Transposed projections, slices of larger tensors, expanded heads: read in place."""
    batch, q_len, kv_len, head_dim = 2, 30, 50, 64
    g = torch.Generator().manual_seed(1)
    q = torch.randn(batch, q_len, 4, head_dim, generator=g).to(dtype).transpose(1, 2)
    big = torch.randn(batch, 3, kv_len + 7, 3 * head_dim, generator=g).to(dtype)
    k, v = big[:, :2, 3 : kv_len + 3, 64:128], big[:, 1:, 7:, 128:]
    want, want_lse = reference(q, k, v)
    out, lse = ops.attention(q, k, v, return_lse=True)
    check(out, lse, want, want_lse, dtype)
    one = k[:, :1].expand(batch, 4, kv_len, head_dim)
    want, want_lse = reference(q, one, one)
    out, lse = ops.attention(q, one, one, return_lse=True)
    check(out, lse, want, want_lse, dtype)


def test_out_is_laid_out_for_the_projection_that_follows():
    q, k, v = make(2, 4, 2, 9, 9, 64, torch.float32)
    out = ops.attention(q, k, v)
    assert out.shape == q.shape
    flat = out.transpose(1, 2).reshape(2, 9, -1)
    assert flat.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("q_len", [1, 40])
def test_memory_that_is_not_in_use_is_never_read(q_len):
    q, k, v = make(1, 4, 2, q_len, 100, 64, torch.bfloat16)
    pages_k = [torch.full((1, 2, 64, 64), math.nan, dtype=k.dtype) for _ in range(3)]
    pages_v = [p.clone() for p in pages_k]
    for pages, x in ((pages_k, k), (pages_v, v)):
        pages[0].copy_(x[:, :, :64])
        pages[1][:, :, :36].copy_(x[:, :, 64:])
    want, want_lse = reference(q, k, v)
    out, lse = ops.attention(q, pages_k, pages_v, kv_len=100, return_lse=True)
    check(out, lse, want, want_lse, torch.bfloat16)


def test_numpy_arrays_cross_the_door():
    q, k, v = make(1, 4, 2, 10, 20, 64, torch.float32)
    want, want_lse = reference(q, k, v)
    out, lse = np.empty((1, 4, 10, 64), np.float32), np.empty((1, 4, 10), np.float32)
    _core.attention(q.numpy(), k.numpy(), v.numpy(), out, lse, threads=2)
    check(torch.from_numpy(out), torch.from_numpy(lse), want, want_lse, torch.float32)
    half = [x.half().numpy() for x in (q, k, v)]
    out = np.empty((1, 4, 10, 64), np.float16)
    _core.attention(*half, out)
    want, _ = reference(*(torch.from_numpy(x) for x in half))
    torch.testing.assert_close(torch.from_numpy(out).double(), want, rtol=3e-3, atol=3e-3)


def test_results_do_not_depend_on_the_number_of_threads_or_the_path():
    q, k, v = make(2, 8, 2, 3, 5000, 128, torch.float32)
    outs = []
    for threads in (1, 2, 5):
        for path in ("prefill", "decode"):
            out = torch.empty_like(q)
            _core.attention(q, k, v, out, threads=threads, path=path)
            outs.append(out)
    want, _ = reference(q, k, v)
    for out in outs:
        torch.testing.assert_close(out.double(), want, rtol=4e-6, atol=4e-6)


def test_memory_stays_constant_in_the_length():
    """An N x N matrix of this size would be 2.4 GB; what is really added is a few MiB of scratch."""
    psutil = pytest.importorskip("psutil")
    q, k, v = make(1, 2, 1, 24576, 24576, 8, torch.float32)
    ops.attention(q[:, :, :64], k, v)
    before = psutil.Process().memory_info().rss
    out = ops.attention(q[:, :, -4096:], k, v)
    grown = psutil.Process().memory_info().rss - before
    assert grown < out.numel() * 4 + 32 * 2**20, f"{grown / 2**20:.0f} MiB"


def test_opcheck():
    q, k, v = make(2, 4, 2, 5, 9, 64, torch.float32)
    starts = torch.tensor([0, 2])
    torch.library.opcheck(
        torch.ops.llama1m_ext.attention.default, (q, [k], [v], True, None, None, starts, None, None, True, None)
    )
    torch.library.opcheck(
        torch.ops.llama1m_ext.attention.default, (q, [k, k], [v, v], True, 0.5, 3, None, None, 12, False, None)
    )
    lse = torch.randn(2, 4, 5)
    torch.library.opcheck(torch.ops.llama1m_ext.merge_partials.default, ([q, q], [lse, lse]))
    positions = torch.arange(5)[None]
    inv_freq = torch.rand(32, dtype=torch.float64)
    torch.library.opcheck(torch.ops.llama1m_ext.rope_apply.default, (q, k[:, :, :5], positions, inv_freq, 1.0))
    torch.library.opcheck(torch.ops.llama1m_ext.rope_apply.default, (q, None, positions, inv_freq, 1.0))


def test_compiles_without_a_graph_break():
    def f(q, k, v, positions, inv_freq):
        q, k = ops.rope_apply(q, k, positions, inv_freq)
        out, lse = ops.attention(q, k, v, return_lse=True)
        out, lse = ops.merge_partials([out, out], [lse, lse])
        return out * 2, lse

    q, k, v = make(1, 4, 2, 6, 6, 64, torch.float32)
    args = (q, k, v, torch.arange(6), torch.rand(32, dtype=torch.float64))
    want = f(*args)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(got, want)
