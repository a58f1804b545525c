"""Attention within a sliding window, against float64 over the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama1m_ext import window
from llama1m_ext.cache import LongCache, PagedLayer


def reference(q, k, v, width, scale, start, end):
    """float64; the queries are the last ones of the keys."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n, kv_len = q.shape[2], k.shape[2]
    at = torch.arange(kv_len - n, kv_len)[:, None]
    keys = torch.arange(kv_len)
    seen = ((keys <= at) & (keys > at - width))[None, None]
    if start is not None:
        seen = seen & (keys >= start[:, None, None, None])
    if end is not None:
        seen = seen & (keys < end[:, None, None, None])
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_against_the_whole_matrix(data):
    draw = lambda *args: data.draw(st.integers(*args))  # noqa: E731
    width, n = draw(2, 40), draw(1, 70)
    past = draw(0, 60)
    batch, group, kv_heads, head_dim = draw(1, 3), draw(1, 3), draw(1, 2), 8 * draw(1, 3)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    kv_len = past + n
    torch.manual_seed(draw(0, 1000))
    q = 3 * torch.randn(batch, n, group * kv_heads, head_dim).transpose(1, 2)
    k, v = torch.randn(2, batch, kv_heads, kv_len, head_dim).unbind()
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    start = end = None
    if data.draw(st.booleans()):
        start = torch.tensor([draw(0, kv_len) for _ in range(batch)])
    if data.draw(st.booleans()):
        end = torch.tensor([draw(0, kv_len) for _ in range(batch)])
    want = reference(q, k, v, width, 0.25, start, end)
    got = window.attention(q, k, v, width, softmax_scale=0.25, kv_start=start, kv_end=end)
    assert got.shape == q.shape
    assert got.dtype == dtype
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    # What lies before the window need not be there.
    kept = min(kv_len, width - 1 + n)
    gone = kv_len - kept
    again = window.attention(
        q,
        k[:, :, gone:],
        v[:, :, gone:],
        width,
        softmax_scale=0.25,
        kv_start=None if start is None else start - gone,
        kv_end=None if end is None else end - gone,
    )
    torch.testing.assert_close(again, got, rtol=0, atol=tolerance)


def test_a_window_is_not_the_whole():
    """The test above can fail: a window one wider or narrower is another result."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 50, 16).unbind()
    found = [window.attention(q, k, v, width, softmax_scale=0.25) for width in (9, 10, 11)]
    for other in (found[0], found[2]):
        assert (found[1] - other).abs().max() > 1e-2


@pytest.mark.parametrize("kv", ["model", "int8", "int4"])
@pytest.mark.parametrize("page_size", [16, 64, "auto"])
def test_the_end_of_a_paged_layer(kv, page_size):
    """`PagedLayer.dense` from a token on is the end of all of it, whatever pages it lies in."""
    cache = LongCache(page_size=page_size, kv=kv)
    torch.manual_seed(0)
    for n in (150, 40, 1, 1, 30):
        cache.update(*torch.randn(2, 2, 2, n, 16).unbind(), 0)
        cache.layers[0].seal()
    layer = cache.layers[0]
    assert isinstance(layer, PagedLayer)
    keys, values = layer.dense()
    for start in (0, 1, 15, 16, 17, 63, 64, 100, 149, 150, 151, 200, layer.length - 1):
        k, v = layer.dense(start)
        assert torch.equal(k, keys[:, :, start:])
        assert torch.equal(v, values[:, :, start:])
    for start in (-1, layer.length):
        with pytest.raises(ValueError, match=f"more than {start} tokens"):
            layer.dense(start)
