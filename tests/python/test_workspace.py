"""One memory for all chunks of a prefill: the same bits, and modules that are not plain are called as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama1m_ext import LongCache, set_options, workspace
from llama1m_ext.testing import random_ids, tiny_model
from llama1m_ext.workspace import Workspace, is_plain


def prefill(model, ids):
    set_options(model, chunk=96, min_layer_major_len=100, progress=False)
    cache = LongCache()
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return logits, cache.layers[-1].keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_as_without(monkeypatch, dtype, biases, batch):
    model = tiny_model(dtype=dtype, attention_bias=biases, mlp_bias=biases)
    ids = random_ids(batch, 500)
    ours = prefill(model, ids)
    plain = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    with torch.inference_mode():
        assert all(is_plain(m, torch.empty(1, dtype=dtype)) for m in plain)
    monkeypatch.setattr(workspace, "is_plain", lambda *_: False)
    for mine, other in zip(ours, prefill(model, ids), strict=True):
        assert torch.equal(mine, other)


def test_what_is_not_a_plain_layer_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(1, 5, 8)
    space, seen = Workspace(), []
    double, hooked, own, plain = Doubled(8, 4), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)
    hooked.register_forward_hook(lambda *_: seen.append(1))
    own.forward = lambda x: torch.full((1,), 7.0)
    with torch.no_grad():
        assert torch.equal(space.linear("a", double, x), double(x))
        space.linear("a", hooked, x)
        assert seen
        assert space.linear("a", own, x).item() == 7
        assert not any(is_plain(m, x) for m in (double, hooked, own))
        assert not is_plain(plain.double(), x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_plain(nn.Linear(8, 4), x)
    assert not is_plain(nn.Linear(8, 4), x), "gradients are wanted"


def test_memory_is_taken_again():
    space, like = Workspace(), torch.empty(0, dtype=torch.bfloat16)
    first = space.take("a", (2, 3), like)
    assert first.dtype == torch.bfloat16
    assert space.take("a", (3, 1), like).data_ptr() == first.data_ptr()
    assert space.take("b", (2, 3), like).data_ptr() != first.data_ptr()
    assert space.take("a", (4, 3), like).shape == (4, 3)
    assert space.take("a", (2, 2), torch.empty(0)).dtype == torch.float32


def test_an_activation_of_somebody_elses_is_called():
    model = tiny_model()
    before, _ = prefill(model, random_ids(1, 300))

    class Other(nn.Module):
        def forward(self, x):
            return -nn.functional.silu(x)

    for layer in model.model.layers:
        layer.mlp.act_fn = Other()
    after, _ = prefill(model, random_ids(1, 300))
    assert not torch.equal(before, after)


def test_norms_in_parts_are_the_norm_of_all():
    model = tiny_model(hidden_size=128)
    norm = model.model.layers[0].input_layernorm
    hidden = torch.randn(2, 1001, 128)
    with torch.no_grad():
        assert torch.equal(Workspace().norm("x", norm, hidden), norm(hidden))
