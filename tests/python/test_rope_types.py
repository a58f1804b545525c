"""RoPE as transformers has it, type by type: its frequencies and factors, our phases; judged in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import llama1m_ext
from conftest import stock
from llama1m_ext import testing
from llama1m_ext.rope import Rope, frequencies

V5 = int(transformers.__version__.split(".")[0]) >= 5
TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}
THETA = 10_000.0


def config(kind: str):
    parameters = {"rope_type": kind, **TYPES[kind]}
    limit = {"max_position_embeddings": 256 if "original_max_position_embeddings" in parameters else 64}
    if V5:
        return testing.tiny_config(rope_theta=THETA, rope_parameters={**parameters, "rope_theta": THETA}, **limit)
    more = {} if kind == "default" else {"rope_scaling": parameters}
    return testing.tiny_config(rope_theta=THETA, **more, **limit)


def in_float64(rotary, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' tables, the same inv_freq and factor, computed in float64 (its own forward rounds to float32)."""
    rotary(torch.zeros(1), position_ids=positions)  # the types that depend on the length update inv_freq here
    angles = positions[..., None].double() * rotary.inv_freq.double()
    angles = torch.cat([angles, angles], -1)
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling


@pytest.mark.parametrize("kind", TYPES)
def test_rotation_of_each_type(kind):
    ours, theirs = LlamaRotaryEmbedding(config(kind)), LlamaRotaryEmbedding(config(kind))
    generator = torch.Generator().manual_seed(0)
    # Up and down again: dynamic grows with the longest so far and comes back, longrope changes its factors at 64.
    for first, n in ((0, 20), (40, 60), (190, 40), (200, 1), (0, 10)):
        positions = torch.arange(first, first + n)[None]
        q, k = torch.randn(1, 4, n, 16, generator=generator), torch.randn(1, 2, n, 16, generator=generator)
        rope = Rope(modeling_llama, ours, torch.zeros(1), positions, 16)
        assert rope.inv_freq is not None
        got = rope.apply(q, k)
        cos, sin = in_float64(theirs, positions)
        want = apply_rotary_pos_emb(q.double(), k.double(), cos, sin)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours.inv_freq, theirs.inv_freq)
        for a, b in zip(rope, theirs(torch.zeros(1), position_ids=positions), strict=True):
            assert torch.equal(a, b), "the tables for layers that don't know us"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("chunk", ["auto", 16])
def test_generation_with_each_type(kind, chunk):
    model = transformers.LlamaForCausalLM(config(kind)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.15)
    llama1m_ext.set_options(model, chunk=chunk)
    other = copy.deepcopy(model)
    more = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    for n in (59, 90, 20):  # across the limit of 64 while decoding, beyond it, back below it
        ids = testing.random_ids(1, n)
        ours = model.generate(ids, **more)
        with stock():
            assert torch.equal(ours, other.generate(ids, **more))
    assert llama1m_ext.stats(model).served and not llama1m_ext.stats(model).stock


def test_positions_near_a_million():
    rotary = LlamaRotaryEmbedding(testing.tiny_config(rope_theta=2.804339835e9))
    positions = torch.tensor([[0, 1, 1023, 1_048_575]])
    q = torch.ones(1, 1, 4, 16)
    got, _ = Rope(modeling_llama, rotary, q, positions, 16).apply(q, q)
    want, _ = apply_rotary_pos_emb(q.double(), q.double(), *in_float64(rotary, positions))
    torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [False, True])
def test_frequencies_that_were_cast_are_made_again(kind, dtype, back):
    fresh = LlamaRotaryEmbedding(config(kind))
    cast = LlamaRotaryEmbedding(config(kind)).to(dtype)
    if back:
        cast = cast.float()
    for last in (30, 200):
        positions = torch.tensor([[0, last]])
        want, got = frequencies(fresh, positions), frequencies(cast, positions)
        assert torch.equal(got[0], want[0])
        assert got[1] == want[1]


def test_frequencies_of_one_s_own_are_believed():
    rotary = LlamaRotaryEmbedding(config("default"))
    assert frequencies(rotary, torch.tensor([[5]])) is not None
    rotary.inv_freq.mul_(0.5)
    mine = frequencies(rotary, torch.tensor([[5]]))[0]
    assert torch.equal(mine, rotary.inv_freq.double())
    rotary.inv_freq = rotary.inv_freq * 3
    assert torch.equal(frequencies(rotary, torch.tensor([[5]]))[0], rotary.inv_freq.double())


def test_somebody_else_s_rotation_is_used(monkeypatch):
    """A rotary module or an apply function that was replaced: their tables, not our phases."""
    from transformers.models.llama import modeling_llama

    model = testing.tiny_model()
    ids = testing.random_ids(1, 40)

    def reversed_in_time(q, k, cos, sin, *args, **kwargs):
        return apply_rotary_pos_emb(q, k, cos, -sin)

    with torch.no_grad():
        plain = model(ids).logits
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", reversed_in_time)
        for chunk in ("auto", 16):
            llama1m_ext.set_options(model, chunk=chunk)
            llama1m_ext.stats(model, reset=True)
            ours = model(ids, logits_to_keep=3).logits
            assert llama1m_ext.stats(model).served
            with stock():
                theirs = model(ids, logits_to_keep=3).logits
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
            assert (ours - plain[:, -3:]).abs().max() > 0.01
