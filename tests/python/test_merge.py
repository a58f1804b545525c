"""ops.merge_partials: associative, commutative, neutral on empty partials, never overflowing."""

from __future__ import annotations

import math

import pytest
import torch

from llama1m_ext import ops


def parts(cuts, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, 7, 64, generator=g).to(dtype)
    k, v = (torch.randn(2, 2, cuts[-1], 64, generator=g).to(dtype) for _ in range(2))
    whole = ops.attention(q, k, v, causal=False, return_lse=True)
    some = [
        ops.attention(q, k[:, :, a:b], v[:, :, a:b], causal=False, return_lse=True)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    return whole, [o for o, _ in some], [s for _, s in some]


def test_splits_merge_to_the_whole():
    (want, want_lse), outs, lses = parts([0, 1, 50, 51, 130, 200])
    out, lse = ops.merge_partials(outs, lses)
    torch.testing.assert_close(out, want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse, want_lse, rtol=2e-6, atol=2e-6)
    out, _ = ops.merge_partials(outs[::-1], lses[::-1])
    torch.testing.assert_close(out, want, rtol=2e-6, atol=2e-6)
    left, right = ops.merge_partials(outs[:2], lses[:2]), ops.merge_partials(outs[2:], lses[2:])
    out, _ = ops.merge_partials([left[0], right[0]], [left[1], right[1]])
    torch.testing.assert_close(out, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_partials(dtype):
    (want, _), outs, lses = parts([0, 64, 200], dtype)
    out, lse = ops.merge_partials(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)


def test_stacked_tensors():
    (want, _), outs, lses = parts([0, 64, 200])
    out, _ = ops.merge_partials(torch.stack(outs), torch.stack(lses))
    torch.testing.assert_close(out, want, rtol=2e-6, atol=2e-6)


def test_empty_partials_are_not_read():
    (_, _), outs, lses = parts([0, 64])
    nothing = torch.full_like(outs[0], math.nan), torch.full_like(lses[0], -math.inf)
    out, lse = ops.merge_partials([nothing[0], outs[0]], [nothing[1], lses[0]])
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])
    out, lse = ops.merge_partials([nothing[0]], [nothing[1]])
    assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("a,b", [(1e4, -1e4), (3e38, 0.0), (-3e38, -3.1e38), (88.0, -104.0)])
def test_far_apart_log_sums_do_not_overflow(a, b):
    x, y = torch.ones(1, 1, 3, 64), torch.full((1, 1, 3, 64), 5.0)
    out, lse = ops.merge_partials([x, y], [torch.full((1, 1, 3), a), torch.full((1, 1, 3), b)])
    assert (out == 1).all() and (lse == a).all()
