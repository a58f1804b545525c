"""Pages, rope and merge over the driver of tests/cuda, against the CPU's engine in the same process. Run by
test_cuda_driver.py."""

from __future__ import annotations

import pytest
import torch

from llama1m_ext import _core, cuda
from llama1m_ext.formats import NAMES, Compact, empty, tensors_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
torch.set_num_threads(1)


def turns(pairs):
    return torch.tensor(5e5, dtype=torch.float64) ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def some_rows(n, head_dim, dtype):
    """With what makes trouble: large channels, zeros of either sign, constants, no numbers."""
    torch.manual_seed(n * head_dim)
    x = torch.randn(2, 3, n, head_dim)
    x[..., 1] *= 40
    x[0, 0, :, 3] = torch.tensor([-0.0, 0.0])[torch.arange(n) % 2]
    x[1, 0, 0] = -0.0
    x[1, 1, :, 2] = 7.5
    x[0, 1, n // 2, 5], x[0, 2, n // 3, 6] = torch.nan, torch.inf
    return x.to(dtype)


def pages(name, like, size):
    made = [empty(name, which, (2, 3, size, like.shape[3]), like) for which in ("k", "v")]
    for side in made:
        for t in tensors_of(side):
            t.view(torch.uint8).fill_(0x5A)
    return made


def differing(a, b):
    """Bytes of two pages' sides that differ; of dense ones numbers, where a NaN is a NaN."""
    if not isinstance(a, Compact):
        return int((~torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)).sum())
    return sum(
        int((x.view(torch.uint8) != y.view(torch.uint8)).sum())
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("head_dim", "n", "at"), [(128, 150, 64), (64, 7, 0), (80, 130, 64), (18, 64, 128)])
def test_pages_are_the_cpus_byte_for_byte(dtype, name, head_dim, n, at):
    k, v = some_rows(n, head_dim, dtype), some_rows(n, head_dim, dtype).flip(2)
    ours, theirs = pages(name, k, 320), pages(name, k, 320)
    cuda.kv_append(k, v, *ours, at)
    for rows, side, of in zip((k, v), theirs, "kv", strict=True):
        _core.kv_append(rows, side, at, of)
    for a, b, of in zip(ours, theirs, "kv", strict=True):
        assert differing(a, b) == 0
        got, want = torch.empty_like(k[:, :, : n - 3]), torch.empty_like(k[:, :, : n - 3])
        cuda.kv_read(a, at + 3, got, of)
        _core.kv_read(a, at + 3, want, of)
        assert differing(got, want) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rotated_on_the_way_is_rotated_before(dtype, name):
    """And both within float32's rounding of the CPU, whose cosines are rounded from float64."""
    k, v = some_rows(70, 64, dtype).nan_to_num(0, 1), some_rows(70, 64, dtype)
    positions = torch.randint(0, 1 << 20, (2, 70))
    how = (positions, turns(24), 1.1)
    at_once, apart = pages(name, k, 128), pages(name, k, 128)
    cuda.kv_append(k, v, *at_once, 0, *how)
    turned = torch.empty_like(k)
    cuda.rope_apply(k, None, turned, None, *how)
    cuda.kv_append(turned, v, *apart, 0)
    assert [differing(a, b) for a, b in zip(at_once, apart, strict=True)] == [0, 0]
    want = torch.empty_like(k)
    _core.rope_apply(k, None, want, None, *how[:2], attention_scaling=1.1)
    steps = {torch.float32: 4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(turned, want, rtol=steps, atol=1e-7 * float(k.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 32, 75])
def test_merge(dtype, count):
    """More partials than a launch takes are merged in turns, in float32 on the way."""
    torch.manual_seed(count)
    outs = [torch.randn(2, 3, 5, 48).to(dtype) for _ in range(count)]
    lses = [torch.randn(2, 3, 5) * 4 for _ in range(count)]
    for out, lse in zip(outs[::2], lses[::2], strict=True):
        lse[0, :, 1], out[0, :, 1] = -torch.inf, torch.nan
    lses[-1][1, 2, 4] = torch.nan
    got, got_lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    cuda.merge_partials(outs, lses, got, got_lse)
    want, want_lse = torch.empty(2, 3, 5, 48), torch.empty_like(lses[0])
    _core.merge_partials(outs, lses, want, want_lse)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        got, want.to(dtype), equal_nan=True, **({} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-6})
    )
    assert got[1, 2, 4].isnan().all()
    if count == 1:
        assert (got[0, :, 1] == 0).all()


def test_what_does_not_fit_is_refused():
    """As the CPU refuses it; and what only a GPU asks for."""
    k = torch.randn(1, 2, 64, 64)
    dense, int8 = pages("model", k, 64), pages("int8", k, 128)
    three = torch.randn(1, 3, 64, 64)
    for call, words in [
        (lambda: cuda.kv_append(k[:, :1], k[:, :1], *dense, 0), "k: expected rows that fit the page"),
        (lambda: cuda.kv_append(three, three, *dense, 0), "k: expected rows that fit the page"),
        (lambda: cuda.kv_append(k, k, *int8, 0), "k: expected rows that fit the page"),
        (
            lambda: cuda.rope_apply(k, None, k, None, torch.arange(64), turns(40), 1.0),
            "q: expected head_dim of at least 80",
        ),
        (lambda: cuda.rope_apply(k, None, k, None, torch.arange(63), turns(32), 1.0), "positions: expected"),
        (
            lambda: cuda.rope_apply(k, None, k, None, torch.arange(64).int(), turns(32), 1.0),
            "positions: expected a dtype of .* got torch.int32",
        ),
        (lambda: cuda.kv_read(dense[0], 60, k[..., :5, :], "k"), "k: expected"),
        (lambda: cuda.kv_read(dense[0], 0, k, "w"), "of: expected k or v, got w"),
        (lambda: cuda.merge_partials([], [], k, k[..., 0]), "lses: expected as many as outs"),
        (lambda: cuda.merge_partials([k], [k[..., 0].double()], k, k[..., 0]), "lses"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            call()
    long = torch.zeros(1, 2, 1, 64).expand(1, 2, 1 << 31, 64)
    with pytest.raises(ValueError, match="at most 1073741824 of them on a GPU, got 2147483600"):
        cuda.kv_read(long, (1 << 31) - 112, k.clone(), "k")
    side = int8[1]
    moved = Compact(torch.empty(side.codes.numel() + 1, dtype=torch.int8)[1:].view(side.codes.shape), side.params)
    with pytest.raises(ValueError, match="multiples of 16 bytes on a GPU"):
        cuda.kv_read(moved, 0, torch.empty(2, 3, 128, 64), "v")


def test_a_position_that_is_not_served_is_loud():
    k = torch.ones(1, 1, 3, 8)
    out = torch.empty_like(k)
    cuda.rope_apply(k, None, out, None, torch.tensor([[-1, 5, 1 << 40]]), turns(4), 1.0)
    assert out.isnan().all(-1).tolist() == [[[True, False, True]]]
