"""Whoever asks for gradients that we can't give is told, and never gets a silent zero; those we give are in test_gradients.py."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import llama1m_ext
from conftest import stock
from llama1m_ext import ops, testing

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(**grad: bool) -> dict[str, torch.Tensor]:
    shapes = {"q": (1, 4, 6, 16), "k": (1, 2, 20, 16), "v": (1, 2, 20, 16)}
    return {name: torch.randn(shape, requires_grad=grad.get(name, False)) for name, shape in shapes.items()}


INV_FREQ = torch.rand(8, dtype=torch.float64)
CALLS = {
    "attention": lambda q, k, v: ops.attention(q, k, v),
    "attention with lse": lambda q, k, v: ops.attention(q, k, v, return_lse=True)[1],
    "pages": lambda q, k, v: ops.attention(q, [k[:, :, :10], k[:, :, 10:]], [v[:, :, :10], v[:, :, 10:]]),
    "rope_apply": lambda q, k, v: ops.rope_apply(q, None, torch.arange(6)[None], INV_FREQ)[0],
    "merge_partials": lambda q, k, v: ops.merge_partials(
        [q, q.detach().cos()], [q.detach()[..., 0], q.detach()[..., 1]]
    )[0],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_result_needs_a_gradient_where_an_input_does(name, which):
    given = tensors(**{which: True})
    seen = which == "q" or name not in ("rope_apply", "merge_partials")
    assert CALLS[name](**given).requires_grad == seen
    with torch.no_grad():
        assert not CALLS[name](**given).requires_grad
    with torch.inference_mode():
        CALLS[name](**given)


@pytest.mark.parametrize("name", CALLS)
def test_transforms_of_torch_func_are_refused(name):
    """Under vmap, grad and jvp tensors are wrappers: reading their memory would be wrong, or leave a zero gradient."""
    given = tensors()

    def total(q):
        return CALLS[name](q, given["k"], given["v"]).sum()

    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        torch.func.grad(total)(given["q"])
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        torch.func.jvp(total, (given["q"],), (given["q"],))
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        torch.func.vmap(total)(given["q"][None].expand(3, -1, -1, -1, -1))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given["q"], torch.ones_like(given["q"]))
        with pytest.raises(TypeError, match="forward-mode gradients"):  # and no tangent that is lost without a word
            total(dual)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_refusals_say_what_to_do(name, transform):
    given = tensors()
    call = lambda q: CALLS[name](q, given["k"], given["v"]).sum()  # noqa: E731
    made = torch.func.grad(call) if transform == "grad" else torch.func.vmap(call)
    with pytest.raises(TypeError, match=r"inside a transform of torch\.func; .*scaled_dot_product_attention"):
        made(given["q"] if transform == "grad" else given["q"].expand(3, 1, 4, 6, 16)[:, None])


def test_functional_call_of_a_model():
    """Other weights for one call: ours where nothing needs gradients, stock's gradients where something does."""
    model = testing.tiny_model()
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    ids = testing.random_ids(1, 20)
    with torch.no_grad():
        ours = torch.func.functional_call(model, other, (ids,)).logits
        with stock():
            theirs = torch.func.functional_call(model, other, (ids,)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert llama1m_ext.stats(model).served == 2

    def loss(weights):
        return torch.func.functional_call(model, weights, (ids,), {"labels": ids, "use_cache": False}).loss

    mine = torch.func.grad(loss)(other)
    with stock():
        wanted = torch.func.grad(loss)(other)
    for name, g in wanted.items():
        torch.testing.assert_close(mine[name], g, rtol=1e-5, atol=1e-6)
        assert g.abs().max() > 0 or "embed" in name


def test_a_gradient_penalty_of_second_order():
    def run():
        model = testing.tiny_model().requires_grad_(False)
        embeds = model.get_input_embeddings()(testing.random_ids(1, 12)).detach().requires_grad_()
        torch.manual_seed(0)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = model(inputs_embeds=embeds, use_cache=False).logits.square().sum()
            (first,) = torch.autograd.grad(out, embeds, create_graph=True)
            first.square().sum().backward()
        return embeds.grad

    ours = run()
    with stock():
        theirs = run()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    assert ours.abs().max() > 0


@pytest.mark.parametrize("how", ["trace", "export"])
def test_traced_and_exported_models_are_stock_s(how):
    model = testing.tiny_model()
    ids = testing.random_ids(1, 12)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    def make():
        if how == "trace":
            return torch.jit.trace(Logits(), ids)
        return torch.export.export(Logits(), (ids,), strict=False).module()

    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        try:
            with stock():
                make()
        except Exception as e:
            pytest.skip(f"stock can't be made so by these versions: {str(e)[:200]}")
        torch.testing.assert_close(make()(ids), want, rtol=1e-4, atol=1e-4)
