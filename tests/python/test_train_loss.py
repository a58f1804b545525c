"""The loss of a training step and its gradients: float64 judges, torch in the same dtype is the yardstick."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import llama1m_ext
from llama1m_ext import testing
from llama1m_ext.train import linear_cross_entropy, loss
from llama1m_ext.train.forward import shift
from llama1m_ext.train.rows import by_rows, trainable

KEEP = ("all", "attention", "inputs")
pytestmark = pytest.mark.usefixtures("one_thread")


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def judged(n: int, vocab: int, width: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 0.2).to(dtype)
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[3::7] = -100
    return hidden, weight, labels


def with_gradients(f, *tensors, dtype=None):
    given = [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
    made = f(*given)
    made.sum().backward()
    return [made.detach(), *(t.grad for t in given)]


# -- cross-entropy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [1, 99, 100, 101, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_is_no_farther_from_float64_than_torch(dtype, chunk, recompute):
    hidden, weight, labels = judged(100, 700, 64, dtype)

    def whole(hidden, weight):
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)

    def ours(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, chunk=chunk, recompute=recompute)

    truth = with_gradients(whole, hidden, weight, dtype=torch.float64)
    yardstick = with_gradients(whole, hidden, weight)
    for mine, theirs, right in zip(with_gradients(ours, hidden, weight), yardstick, truth, strict=True):
        assert error(mine, right) <= 1.1 * error(theirs, right) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_gradcheck(reduction):
    hidden, weight, labels = judged(9, 11, 5, torch.float64)
    bias, factors = torch.randn(11, dtype=torch.float64), torch.rand(9)
    factors[4] = 0

    def f(hidden, weight, bias):
        given = {"bias": bias, "loss_weights": factors, "reduction": reduction, "chunk": 4, "recompute": True}
        return linear_cross_entropy(hidden, weight, labels, **given)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (hidden, weight, bias)])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_with_bias_and_weights(reduction, recompute):
    hidden, weight, labels = judged(40, 30, 8, torch.float64)
    bias, factors = torch.randn(30, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    factors[::3] = 0

    def whole(hidden, weight, bias):
        losses = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none") * factors
        total = losses.sum()
        return {"none": losses, "sum": total, "mean": total / factors[labels != -100].sum()}[reduction]

    def ours(hidden, weight, bias):
        given = {"bias": bias, "loss_weights": factors, "reduction": reduction, "chunk": 7, "recompute": recompute}
        return linear_cross_entropy(hidden, weight, labels, **given)

    for mine, theirs in zip(
        with_gradients(ours, hidden, weight, bias), with_gradients(whole, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_only_what_needs_gradients_gets_them():
    hidden, weight, labels = judged(20, 30, 8, torch.float32)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels).backward()
    assert hidden.grad is not None and weight.grad is None
    linear_cross_entropy(hidden.detach(), weight.requires_grad_(), labels).backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_positions_without_a_label_are_not_computed():
    hidden, weight, labels = judged(20, 30, 8, torch.float32)
    labels[5:] = -100
    hidden[5:] = float("nan")
    found = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    found.backward()
    assert found.isfinite() and hidden.grad.isfinite().all()


def test_no_label_at_all_is_nan_as_torch_has_it():
    hidden, weight, labels = judged(5, 30, 8, torch.float32)
    for recompute in (False, True):
        assert linear_cross_entropy(hidden.requires_grad_(), weight, labels.fill_(-100), recompute=recompute).isnan()


def test_a_second_backward_is_refused_or_right():
    hidden, weight, labels = judged(20, 30, 8, torch.float32)
    made = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    made.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute=True"):
        made.backward()
    hidden.grad = None
    made = linear_cross_entropy(hidden, weight, labels, recompute=True)
    made.backward(retain_graph=True)
    once = hidden.grad.clone()
    made.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_cross_entropy_says_what_is_wrong():
    hidden, weight, labels = judged(20, 30, 8, torch.float32)
    with pytest.raises(ValueError, match=r"weight: expected \[vocab, 8\], got \(30, 7\)"):
        linear_cross_entropy(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match=r"labels: expected -100 or 0 to 29, got 30"):
        linear_cross_entropy(hidden, weight, labels.clamp(0).fill_(30))
    with pytest.raises(TypeError, match=r"labels: expected int64, got torch.float32"):
        linear_cross_entropy(hidden, weight, labels.float())
    with pytest.raises(ValueError, match=r"loss_weights: expected \(20,\).*got \(3,\)"):
        linear_cross_entropy(hidden, weight, labels, loss_weights=torch.ones(3))
    with pytest.raises(TypeError, match=r"weight: expected hidden's dtype torch.float32, got torch.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r'engine: expected "own" on cpu'):
        linear_cross_entropy(hidden, weight, labels, engine="liger")
    with pytest.raises(ValueError, match=r"reduction: .* got 'max'"):
        linear_cross_entropy(hidden, weight, labels, reduction="max")


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        made = f(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, torch.Tensor):
                self.found = max(self.found, t.numel())
        return made


@pytest.mark.parametrize("keep", ["attention", "inputs"])
def test_neither_logits_nor_gates_are_ever_whole(keep):
    model = testing.tiny_model(intermediate_size=512).train()
    ids = testing.random_ids(1, 400)
    with Largest() as seen:
        loss(model, ids, keep=keep, chunk=16, ce_chunk=32).backward()
    whole = 400 * 64
    assert seen.found <= max(4 * whole, model.lm_head.weight.numel(), 64 * 512)
    assert seen.found < 400 * model.config.vocab_size
    assert seen.found < 400 * 512


# -- a model ------------------------------------------------------------------------------------------------------------


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stock_loss(model, ids, labels=None, factors=None, **more):
    """Through the model's own forward, whole logits in the model's dtype."""
    logits = model(ids, use_cache=False, **more).logits
    labels, factors = shift(ids if labels is None else labels, factors)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(exact.transpose(1, 2), labels, reduction="none")
    return (
        losses.sum() / (labels != -100).sum()
        if factors is None
        else (losses * factors).sum() / factors[labels != -100].sum()
    )


def in_float64(model):
    """The same weights; angles as exact as ours."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("chunk", [7, 16, 47, 48, 2048])
def test_gradients_of_a_model(keep, chunk):
    model = testing.tiny_model().train()
    ids = testing.random_ids(2, 48)
    other = copy.deepcopy(model)
    theirs = stock_loss(other, ids)
    theirs.backward()
    ours = loss(model, ids, keep=keep, chunk=chunk, ce_chunk=33)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    mine, yours = gradients(model), gradients(other)
    assert mine.keys() == yours.keys()
    for name, g in mine.items():
        assert error(g, yours[name].double()) < 2e-5, name
    assert not llama1m_ext.stats(model).stock


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_no_farther_from_float64_than_stock(dtype, keep):
    """On average over the parameters: a single one's rounding is chance."""
    model = testing.tiny_model(dtype=dtype, num_hidden_layers=3).train()
    ids = testing.random_ids(1, 200)
    truth, stock = in_float64(model), copy.deepcopy(model)
    stock_loss(truth, ids).backward()
    stock_loss(stock, ids).backward()
    loss(model, ids, keep=keep, chunk=64, ce_chunk=50).backward()
    right = gradients(truth)
    ours = [error(g, right[name]) for name, g in gradients(model).items()]
    theirs = [error(g, right[name]) for name, g in gradients(stock).items()]
    assert sum(ours) <= 1.1 * sum(theirs)


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' norms compute in float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.parametrize("keep", KEEP)
def test_gradients_in_float64_are_those_of_differences(keep, exact_norms):
    model = testing.tiny_model(dtype=torch.float64, num_hidden_layers=1, hidden_size=16, intermediate_size=24).train()
    ids = testing.random_ids(1, 9)
    p = model.model.layers[0].self_attn.k_proj.weight
    loss(model, ids, keep=keep, chunk=4).backward()
    for at in ((0, 0), (3, 5), (p.shape[0] - 1, 2)):
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                p[at] += step
                values.append(float(loss(model, ids, chunk=4)))
                p[at] -= step
        assert abs((values[0] - values[1]) / 2e-6 - float(p.grad[at])) < 1e-7


@pytest.mark.parametrize("keep", KEEP)
def test_labels_and_weights(keep):
    model = testing.tiny_model().train()
    ids = testing.random_ids(2, 40)
    labels, factors = ids.clone(), torch.rand(2, 40)
    labels[0, :11] = -100
    factors[1, 20:30] = 0
    other = copy.deepcopy(model)
    theirs = stock_loss(other, ids, labels, factors)
    theirs.backward()
    ours = loss(model, ids, labels, factors, keep=keep, chunk=16)
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    for name, g in gradients(model).items():
        assert error(g, gradients(other)[name].double()) < 2e-5, name


def test_rows_computed_apart_add_up():
    """What gradient accumulation rests on."""
    model = testing.tiny_model().train()
    ids, factors = testing.random_ids(4, 30), torch.rand(4, 30)
    whole = loss(model, ids, loss_weights=factors)
    whole.backward()
    expected = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    denominator = factors[:, 1:].sum()
    parts = [loss(model, ids[i : i + 1], loss_weights=factors[i : i + 1], denominator=denominator) for i in range(4)]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole)
    for name, g in gradients(model).items():
        assert error(g, expected[name].double()) < 1e-5, name


def test_reductions_and_shifted_labels():
    model = testing.tiny_model()
    ids = testing.random_ids(2, 20)
    with torch.no_grad():
        each = loss(model, ids, reduction="none")
        assert each.shape == (2, 20) and (each[:, -1] == 0).all()
        torch.testing.assert_close(loss(model, ids, reduction="sum"), each.sum())
        torch.testing.assert_close(loss(model, ids), each.sum() / 38)
        labels, _ = shift(ids)
        torch.testing.assert_close(loss(model, ids, labels, shifted=True), loss(model, ids))
        theirs = model(ids, labels=ids).loss
        torch.testing.assert_close(loss(model, ids), theirs)


@pytest.mark.parametrize("keep", ["attention", "inputs"])
def test_what_is_kept_may_wait_on_the_disk(keep, tmp_path):
    model = testing.tiny_model().train()
    ids = testing.random_ids(1, 50)
    loss(model, ids, keep=keep).backward()
    expected = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    loss(model, ids, keep=keep, offload="disk", offload_dir=str(tmp_path / "new")).backward()
    assert all(torch.equal(g, expected[name]) for name, g in gradients(model).items())
    assert not list((tmp_path / "new").iterdir()), "the file has no name"


@pytest.mark.parametrize("keep", KEEP)
def test_tied_embeddings(keep):
    model = testing.tiny_model(tie_word_embeddings=True).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = testing.random_ids(2, 30)
    other = copy.deepcopy(model)
    stock_loss(other, ids).backward()
    loss(model, ids, keep=keep).backward()
    for name, g in gradients(model).items():
        assert error(g, gradients(other)[name].double()) < 2e-5, name


@pytest.mark.parametrize("keep", KEEP)
def test_lora(keep):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(testing.tiny_model(), config).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    other = copy.deepcopy(model)
    ids = testing.random_ids(2, 30)
    theirs = stock_loss(other, ids)
    theirs.backward()
    ours = loss(model, ids, keep=keep, chunk=8, ce_chunk=16)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    mine, yours = gradients(model), gradients(other)
    assert mine.keys() == yours.keys() and all("lora_" in name for name in mine)
    for name, g in mine.items():
        assert error(g, yours[name].double()) < 5e-5, name


@pytest.mark.parametrize("keep", ["attention", "inputs"])
def test_dropout_of_adapters_is_the_same_in_backward(keep, exact_norms):
    """Gradients by differences under one seed: with other masks in backward they would be off by far."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj", "up_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(testing.tiny_model(dtype=torch.float64, num_hidden_layers=1), config).double().train()
    ids = testing.random_ids(1, 21)

    def value():
        torch.manual_seed(5)
        return loss(model, ids, keep=keep, chunk=6)

    value().backward()
    for p in [p for name, p in model.named_parameters() if "lora_B" in name]:
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                p[1, 1] += step
                values.append(float(value()))
                p[1, 1] -= step
        assert abs((values[0] - values[1]) / 2e-6 - float(p.grad[1, 1])) < 1e-6


def test_a_frozen_body():
    model = testing.tiny_model().train()
    model.model.requires_grad_(False)
    ids = testing.random_ids(1, 30)
    loss(model, ids).backward()
    assert set(gradients(model)) == {"lm_head.weight"}


@pytest.mark.parametrize("keep", KEEP)
def test_autocast(keep):
    model = testing.tiny_model().train()
    ids = testing.random_ids(2, 60)
    truth, stock = in_float64(model), copy.deepcopy(model)
    stock_loss(truth, ids).backward()
    with torch.autocast("cpu", torch.bfloat16):
        stock_loss(stock, ids).backward()
        made = loss(model, ids, keep=keep, chunk=32)
    made.backward()
    right = gradients(truth)
    assert all(g.dtype == torch.float32 for g in gradients(model).values())
    ours = [error(g, right[name]) for name, g in gradients(model).items()]
    theirs = [error(g, right[name]) for name, g in gradients(stock).items()]
    assert sum(ours) <= 1.1 * sum(theirs)


def test_positions():
    """Packed rows may begin again; and far ones are exact."""
    model = testing.tiny_model().train()
    ids = testing.random_ids(1, 24)
    places = torch.arange(24)[None] + 1000
    other = copy.deepcopy(model)
    stock_loss(other, ids, position_ids=places).backward()
    loss(model, ids, position_ids=places, chunk=10).backward()
    for name, g in gradients(model).items():
        assert error(g, gradients(other)[name].double()) < 2e-4, name


@pytest.mark.usefixtures("families_as_they_were")
@pytest.mark.parametrize("name", ["qwen3", "smollm3", "qwen2"])
def test_other_families(name):
    import importlib

    llama1m_ext.enable(families=name)
    module = importlib.import_module(f"transformers.models.{name}")
    prefix = {"qwen3": "Qwen3", "smollm3": "SmolLM3", "qwen2": "Qwen2"}[name]
    fields = testing.tiny_config().to_dict()
    wanted = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    config = getattr(module, f"{prefix}Config")(
        **{key: fields[key] for key in wanted}, num_hidden_layers=4, pad_token_id=None
    )
    torch.manual_seed(0)
    model = getattr(module, f"{prefix}ForCausalLM")(config).train()
    ids = testing.random_ids(1, 30)
    other = copy.deepcopy(model)
    stock_loss(other, ids).backward()
    for keep in KEEP:
        model.zero_grad()
        loss(model, ids, keep=keep, chunk=16).backward()
        for key, g in gradients(model).items():
            assert error(g, gradients(other)[key].double()) < 1e-4, key


def test_models_that_are_not_served_are_refused():
    with pytest.raises(ValueError, match=r"attention_dropout=0.1"):
        loss(testing.tiny_model(attention_dropout=0.1), testing.random_ids(1, 8))
    with pytest.raises(TypeError, match="expected a LlamaForCausalLM"):
        loss(nn.Linear(2, 2), testing.random_ids(1, 8))
    model = testing.tiny_model()
    with pytest.raises(ValueError, match=r"input_ids: expected int64 \[batch, n\]"):
        loss(model, torch.arange(4))
    with pytest.raises(ValueError, match="keep: expected one of all, attention, inputs, got 'some'"):
        loss(model, testing.random_ids(1, 8), keep="some")
    with pytest.raises(ValueError, match="offload: expected"):
        loss(model, testing.random_ids(1, 8), offload="moon")
    with pytest.raises(ValueError, match=r"labels: expected \(1, 8\)"):
        loss(model, testing.random_ids(1, 8), testing.random_ids(1, 7))


def test_rows_with_several_inputs_and_outputs():
    linear = nn.Linear(4, 6).double()
    x, y = (torch.randn(2, 11, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(x, y):
        return linear(x) * linear(y), y.cos()

    expected = torch.autograd.grad(sum(t.sum() for t in f(x, y)), [x, y, *linear.parameters()])
    made = by_rows(f, (x, y), trainable(linear), 3)
    found = torch.autograd.grad(sum(t.sum() for t in made), [x, y, *linear.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
