"""ops.rope_apply: phases against mpmath at every scale of position, rotation against float64."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama1m_ext import _core, ops

# Llama-3's own, the model card's two, and the 4194k model's.
THETAS = [5e5, 2804339835.0, 3.58e9, 4.5e10]


def frequencies(theta, head_dim=128):
    return torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)


def exact(position, inv_freq):
    """(cos, sin) of position * inv_freq in 60 digits."""
    with mpmath.workdps(60):
        angles = [mpmath.mpf(position) * mpmath.mpf(float(f)) for f in inv_freq]
        return [float(mpmath.cos(a)) for a in angles], [float(mpmath.sin(a)) for a in angles]


@pytest.mark.parametrize("theta", THETAS)
def test_phases_are_exact_at_marked_positions(theta):
    inv_freq = frequencies(theta)
    for position in [0, 1, 2, 2**13, 2**16, 2**18 + 1, 2**20 - 1, 2**20, 10_000_019, 2**24 - 1]:
        cos, sin = _core.cos_sin(position, inv_freq)
        want_cos, want_sin = exact(position, inv_freq)
        assert np.abs(cos.astype(np.float64) - want_cos).max() < 1e-7, (theta, position)
        assert np.abs(sin.astype(np.float64) - want_sin).max() < 1e-7, (theta, position)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 2**24 - 1), theta=st.sampled_from(THETAS), frequency=st.floats(0, 1))
def test_phases_are_exact_at_any_position(position, theta, frequency):
    inv_freq = torch.cat([frequencies(theta), torch.tensor([frequency], dtype=torch.float64)])
    cos, sin = _core.cos_sin(position, inv_freq)
    want_cos, want_sin = exact(position, inv_freq)
    assert np.abs(cos.astype(np.float64) - want_cos).max() < 1e-7
    assert np.abs(sin.astype(np.float64) - want_sin).max() < 1e-7


def test_every_position_of_a_stretch():
    """All of 2^20 - 4096 ... 2^20 for the fastest and a slow frequency, against float64 (good to 1e-9 there)."""
    inv_freq = torch.tensor([1.0, 0.9, 1e-3, 2.8e-9], dtype=torch.float64)
    positions = torch.arange(2**20 - 4096, 2**20)
    x = torch.zeros(1, 1, len(positions), 8)
    x[..., :4] = 1.0
    out, _ = ops.rope_apply(x, None, positions, inv_freq)
    angle = positions.double()[:, None] * inv_freq
    assert (out[0, 0, :, :4].double() - angle.cos()).abs().max() < 1e-7
    assert (out[0, 0, :, 4:].double() - angle.sin()).abs().max() < 1e-7


def rotate(x, positions, inv_freq, scaling):
    half = len(inv_freq)
    angle = positions.double().reshape(-1, 1, positions.shape[-1], 1) * inv_freq
    a, b, rest = x.double()[..., :half], x.double()[..., half : 2 * half], x.double()[..., 2 * half :]
    cos, sin = angle.cos() * scaling, angle.sin() * scaling
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@pytest.mark.parametrize(
    "dtype,ulp", [(torch.float32, 2**-22), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str
)
@pytest.mark.parametrize("head_dim,half", [(128, 64), (64, 32), (96, 20), (10, 5)])
def test_rotation_is_rounded_once(dtype, ulp, head_dim, half):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 50, 4, head_dim, generator=g).to(dtype).transpose(1, 2)
    k = torch.randn(2, 2, 60, head_dim, generator=g).to(dtype)[:, :, 10:]
    inv_freq = frequencies(2804339835.0, 2 * half)
    positions = torch.randint(0, 2**20, (2, 50), generator=g)
    for p in (positions, positions[:1], positions[0]):
        got_q, got_k = ops.rope_apply(q, k, p, inv_freq, attention_scaling=1.25)
        for got, x in ((got_q, q), (got_k, k)):
            want = rotate(x, p, inv_freq, 1.25)
            error = (got.double() - want).abs()
            assert (error <= ulp * want.abs() + 2e-6).all(), error.max()


def test_in_place_and_given_outputs():
    q = torch.randn(1, 2, 5, 64)
    inv_freq, positions = frequencies(5e5, 64), torch.arange(5)
    want, _ = ops.rope_apply(q, None, positions, inv_freq)
    page = torch.full((1, 2, 9, 64), math.nan)
    _, k = ops.rope_apply(q, q, positions, inv_freq, k_out=page[:, :, 2:7])
    assert torch.equal(k, want) and torch.equal(page[:, :, 2:7], want) and page[:, :, :2].isnan().all()
    same, _ = ops.rope_apply(q, None, positions, inv_freq, q_out=q)
    assert same is q and torch.equal(q, want)
