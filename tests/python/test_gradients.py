"""Gradients of attention, merges and rotations: against float64 autograd, in eager code and compiled, and what is refused."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from conftest import assert_near
from llama1m_ext import formats, memory, ops

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.5e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def tensors(q_len=40, kv_len=40, heads=(4, 2), head_dim=16, batch=2, dtype=torch.float32) -> list[torch.Tensor]:
    shapes = [(batch, heads[0], q_len, head_dim), *[(batch, heads[1], kv_len, head_dim)] * 2]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def exact(q, k, v, *, causal=True, softmax_scale=None, q_start=None, kv_start=0, kv_end=None, kv_len=None):
    """(out, lse) in float64 and by the book, of the same inputs; differentiable. kv_start and kv_end by batch row or one."""
    q, k, v = (x.double() for x in (q, k, v))
    length = k.shape[2] if kv_len is None else kv_len
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    start = length - q.shape[2] if q_start is None else q_start
    at, j = start + torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    first = torch.as_tensor(kv_start).reshape(-1, 1, 1, 1)
    last = torch.as_tensor(length if kv_end is None else kv_end).clamp(max=length).reshape(-1, 1, 1, 1)
    seen = (j >= first) & (j < last) & ((j <= at) if causal else True)
    scores = q @ k.transpose(2, 3) * (1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale)
    scores = scores.masked_fill(~seen, -math.inf)
    empty = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return weights @ v, lse


def off(got, want) -> float:
    """The largest error, in proportion to numbers of the tensor's size and of order 1."""
    want = want.double()
    return ((got.double() - want).abs() / (1 + want.square().mean().sqrt() + want.abs())).max().item()


def gradients(call, inputs, grads):
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    some = [(o, g.to(o.dtype)) for o, g in zip(out, grads, strict=True) if g is not None]
    found = torch.autograd.grad([o for o, _ in some], inputs, [g for _, g in some], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


CASES = {
    "square": ({}, {}),
    "not causal": ({}, {"causal": False}),
    "chunk": ({"q_len": 7}, {}),
    "later": ({"q_len": 9}, {"q_start": 25, "softmax_scale": 0.3}),
    "before the keys": ({"q_len": 30}, {"q_start": -8}),
    "padding": ({}, {"kv_start": torch.tensor([3, 17])}),
    "intervals": ({"q_len": 40}, {"kv_start": torch.tensor([3, 30]), "kv_end": torch.tensor([20, 10])}),
    "one for all": ({}, {"kv_start": 2, "kv_end": 33}),
    "in use": ({"q_len": 5}, {"kv_len": 30}),
    "several blocks": ({"q_len": 210, "kv_len": 210, "heads": (4, 1), "batch": 1}, {}),
    "one head": ({"heads": (1, 1), "head_dim": 20}, {}),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", CASES)
def test_attention_s_gradients_are_those_of_float64(name, dtype):
    shape, options = CASES[name]
    inputs = tensors(**shape, dtype=dtype)
    want_out, want_lse = exact(*inputs, **options)
    of_out = torch.randn_like(want_out).to(dtype)
    of_lse = torch.randn_like(want_lse).masked_fill(want_lse == -math.inf, 0.0).float()
    for grads in ([of_out, None], [None, of_lse], [of_out, of_lse]):
        got = gradients(lambda *x: ops.attention(*x, **options, return_lse=True), inputs, grads)
        want = gradients(lambda *x: exact(*x, **options), inputs, grads)
        for which, g, w, x in zip("qkv", got, want, inputs, strict=True):
            assert g.dtype == x.dtype
            assert g.shape == x.shape
            assert off(g, w) < TOLERANCE[dtype], (which, off(g, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64_than_torch_s(dtype):
    q, k, v = tensors(300, 300, (4, 1), 128, 1, dtype)
    grad = torch.randn_like(q)
    want = gradients(lambda *x: exact(*x)[0], [q, k, v], [grad])
    ours = gradients(ops.attention, [q, k, v], [grad])

    def torch_s(q, k, v):  # repeated: with enable_gqa torch 2.5 takes its float32 math, which rounds once
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    theirs = gradients(torch_s, [q, k, v], [grad])
    for which, a, b, w in zip("qkv", ours, theirs, want, strict=True):
        mine, torchs = ((x.double() - w).square().mean().sqrt() for x in (a, b))
        assert mine < 1.2 * torchs, which  # give or take what a seed may do


@pytest.mark.filterwarnings("ignore:Input #", "ignore:Backwards compatibility")
def test_gradcheck_in_float32():
    """torch's own comparison with differences, as far as float32 lets it: eps 1e-2, and what that leaves out."""
    inputs = tensors(5, 7, (2, 1), 8, 1)
    with torch.autograd.set_multithreading_enabled(False):
        assert torch.autograd.gradcheck(
            lambda *x: ops.attention(*x, return_lse=True), inputs, eps=1e-2, atol=2e-3, rtol=2e-3, nondet_tol=0.0
        )


def test_the_same_bits_every_time_and_on_any_number_of_threads():
    inputs = tensors(400, 400, (8, 2), 32, 1)
    grad = torch.randn(1, 8, 400, 32)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(gradients(ops.attention, inputs, [grad]))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_only_what_needs_a_gradient_gets_one():
    for needed in range(1, 8):
        inputs = [x.detach().requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(tensors())]
        ops.attention(*inputs).sum().backward()  # of which the gradient is one number, expanded
        assert [x.grad is not None for x in inputs] == [x.requires_grad for x in inputs]
    with torch.no_grad():
        assert not ops.attention(*inputs).requires_grad
    assert not ops.attention(*(x.detach() for x in inputs)).requires_grad


def test_strided_views_and_float32_results():
    # As one projection for q, k and v makes them.
    x = torch.randn(2, 40, 3, 4, 24, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (x[:, :, i, :, 4:20].transpose(1, 2) for i in range(3))
    out = ops.attention(q, k, v, out_dtype=torch.float32)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, grad)
    (want,) = torch.autograd.grad(exact(q, k, v)[0], x, grad.double())
    assert off(got, want) < TOLERANCE[torch.bfloat16]
    assert got[..., :4].eq(0).all()


def test_pages_get_gradients_of_their_own():
    q, k, v = tensors(40, 60)
    cuts = [10, 33, 17]
    pages = [[p.detach().requires_grad_() for p in x.split(cuts, 2)] for x in (k, v)]
    grad = torch.randn_like(q)
    whole = torch.autograd.grad(ops.attention(q, k, v, kv_len=50), (q, k, v), grad)
    got = torch.autograd.grad(ops.attention(q, *pages, kv_len=50), (q, *pages[0], *pages[1]), grad)
    assert torch.equal(got[0], whole[0])
    for i in range(3):
        assert torch.equal(got[1 + i], whole[1].split(cuts, 2)[i])
        assert torch.equal(got[4 + i], whole[2].split(cuts, 2)[i])
    assert got[3][:, :, 7:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_by_hand(dtype):
    """What a ring does: each part of the keys gives its share, by out and lse of the whole."""
    q, k, v = (x.detach() for x in tensors(50, 80, dtype=dtype))
    grad = torch.randn_like(q)
    out, lse = ops.attention(q, k, v, return_lse=True)
    want = ops.attention_backward(grad, q, k, v, out, lse, grad_dtype=torch.float32)
    assert [x.dtype for x in want] == [torch.float32] * 3
    shares = []
    for a, b in ((0, 30), (30, 80)):
        part = (k[:, :, a:b], v[:, :, a:b])
        shares.append(ops.attention_backward(grad, q, *part, out, lse, q_start=30 - a, grad_dtype=torch.float32))
    tolerance = TOLERANCE[dtype] / 4
    assert off(shares[0][0] + shares[1][0], want[0]) < tolerance
    for i in (1, 2):
        assert off(torch.cat([shares[0][i], shares[1][i]], 2), want[i]) < tolerance
    own = ops.attention_backward(grad, q, [k], [v], out, lse)
    assert own[0].dtype == dtype
    assert torch.equal(own[1][0], want[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges(dtype):
    """Partials over shares of the keys, one of which some queries don't see: as attention over all of them."""
    q, k, v = tensors(30, 60, dtype=dtype)

    def merged(q, k, v):
        parts = [(0, 20), (20, 55), (55, 60)]
        outs, lses = zip(
            *(ops.attention(q, k[:, :, a:b], v[:, :, a:b], q_start=30 - a, return_lse=True) for a, b in parts),
            strict=True,
        )
        assert lses[2][:, :, :25].eq(-math.inf).all()
        return ops.merge_partials(outs, lses)

    grads = [torch.randn_like(q), torch.randn(q.shape[:3])]
    got, want = gradients(merged, [q, k, v], grads), gradients(exact, [q, k, v], grads)
    for g, w in zip(got, want, strict=True):
        assert off(g, w) < 2 * TOLERANCE[dtype]


def test_merges_of_what_saw_no_key():
    """A partial whose lse is -inf is not read, whatever its out is; where all are, gradients are 0."""
    outs = torch.randn(3, 1, 2, 5, 8)
    lses = torch.randn(3, 1, 2, 5)
    lses[0, :, :, :2] = lses[1, :, 1] = -math.inf
    lses[:, :, :, 4] = -math.inf
    outs[lses == -math.inf] = math.nan
    outs.requires_grad_()
    lses.requires_grad_()
    out, lse = ops.merge_partials(outs, lses)
    (out.square().sum() + lse[:, :, :4].square().sum()).backward()
    dead = lses == -math.inf
    assert outs.grad[dead].eq(0).all()
    assert lses.grad[dead].eq(0).all()
    exact_outs, exact_lses = outs.detach().double().nan_to_num(), lses.detach().double()[:, :, :, :4]
    exact_outs, exact_lses = exact_outs[:, :, :, :4].requires_grad_(), exact_lses.requires_grad_()
    weights = exact_lses.softmax(0)
    ((weights[..., None] * exact_outs).sum(0).square().sum() + exact_lses.logsumexp(0).square().sum()).backward()
    assert off(outs.grad[:, :, :, :4], exact_outs.grad) < 1e-6
    assert off(lses.grad[:, :, :, :4], exact_lses.grad.nan_to_num()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "both", "q alone"])
def test_rotations_turn_back(which, dtype):
    q, k, _ = tensors(30, 30, head_dim=24, dtype=dtype)
    q.requires_grad_(which != "k")
    k.requires_grad_(which in ("k", "both"))
    positions, inv_freq = torch.arange(30)[None] * 1000, torch.rand(8, dtype=torch.float64)

    def turned(x, angle):
        a, b, rest = x.double().split([8, 8, 8], -1)
        cos, sin = 1.5 * angle.cos(), 1.5 * angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    angle = (positions[..., None] * inv_freq)[:, None]
    got = ops.rope_apply(q, None if which == "q alone" else k, positions, inv_freq, attention_scaling=1.5)
    for x, y in zip((q, k), got, strict=True):
        if y is None or not x.requires_grad:
            assert y is None or not y.requires_grad or which in ("q", "k")
            continue
        grad = torch.randn_like(x)
        (g,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        (want,) = torch.autograd.grad(turned(x, angle), x, grad.double())
        assert off(g, want) < TOLERANCE[dtype]
        (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert off(g, torch.autograd.grad(turned(x, angle).sum(), x)[0]) < TOLERANCE[dtype]


def chain(q, k, v, positions, inv_freq):
    q, k = ops.rope_apply(q, k, positions, inv_freq)
    parts = [ops.attention(q, k, v, kv_end=n, return_lse=True) for n in (20, 40)]
    out, lse = ops.merge_partials([o for o, _ in parts], [s for _, s in parts])
    return out.square().sum() + lse.cos().sum() + ops.attention(q, [k], [v], causal=False).sin().sum()


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    inv_freq = torch.rand(8, dtype=torch.float64)
    for n in (40, 41):
        inputs = tensors(n, n)
        given = torch.arange(n)[None], inv_freq
        want = torch.autograd.grad(chain(*inputs, *given), inputs)
        got = torch.autograd.grad(compiled(*inputs, *given), inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    torch._dynamo.reset()


def test_operators_pass_torch_s_own_check():
    q, k, v = tensors(9, 12, batch=1)
    positions, inv_freq = torch.arange(9)[None], torch.rand(8, dtype=torch.float64)
    out, lse = (x.detach().requires_grad_() for x in ops.attention(q, k, v, return_lse=True))
    bounds = torch.tensor([2])
    given = {
        "attention": [
            (q, [k], [v], True, None, None, None, None, None, True, None),
            (q, [k[:, :, :5], k[:, :, 5:]], [v[:, :, :5], v[:, :, 5:]], False, 0.3, 2, bounds, None, 11, True, None),
            (q, [k], [v], True, None, None, None, bounds, None, False, torch.float32),
        ],
        "attention_backward": [
            (out.detach(), q.detach(), [k.detach()], [v.detach()], out.detach(), lse.detach(), True, *[None] * 7),
        ],
        "rope_apply": [(q, k[:, :, :9], positions, inv_freq, 1.25), (q, None, positions, inv_freq, 1.0)],
        "merge_partials": [([out, out.detach()], [lse, lse.detach() - 1])],
    }
    for name, calls in given.items():
        for arguments in calls:
            torch.library.opcheck(getattr(torch.ops.llama1m_ext, name).default, arguments)


def test_checkpointed():
    inputs = tensors()
    given = torch.arange(40)[None], torch.rand(8, dtype=torch.float64)
    want = torch.autograd.grad(chain(*inputs, *given), inputs)
    got = torch.autograd.grad(checkpoint(chain, *inputs, *given, use_reentrant=False), inputs)
    assert all(map(torch.equal, got, want))


def test_a_changed_input_is_noticed():
    q, k, v = tensors()
    out = ops.attention(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_has_no_gradient_says_so():
    q, k, v = tensors(70, 70)
    inv_freq = torch.rand(8, dtype=torch.float64)
    positions = torch.arange(70)[None]
    with pytest.raises(TypeError, match=r"q_out, k_out: expected None where q or k needs a gradient"):
        ops.rope_apply(q, None, positions, inv_freq, q_out=torch.empty_like(q))
    with pytest.raises(TypeError, match=r"inv_freq: expected a tensor without gradient"):
        ops.rope_apply(q, None, positions, inv_freq.requires_grad_())
    page = formats.Page(*(formats.empty("int8", of, (1, 2, 128, 16), torch.empty(0)) for of in ("k", "v")))
    ops.kv_append(k[:1].detach(), v[:1].detach(), page, 0)
    with pytest.raises(TypeError, match=r"k: expected dense tensors where something needs a gradient, got Compact"):
        ops.attention(q[:1], page.k, page.v, kv_len=70)
    with torch.no_grad():
        out, lse = ops.attention(q[:1], page.k, page.v, kv_len=70, return_lse=True)
    with pytest.raises(TypeError, match=r"k: expected dense tensors, which alone have gradients, got Compact"):
        ops.attention_backward(out, q[:1], page.k, page.v, out, lse)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_gradients(causal):
    """Judged by torch's own math in float64, over a part of the keys, with lse and rows that see no key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, 9), (2, 20), (2, 20)))
    start, end = torch.tensor([0, 13]), torch.tensor([20, 19])

    def second(q, k, v, attention):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out, lse = attention(*leaves)
        total = out.pow(2).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [g.detach() for g in first] + [t.grad for t in leaves]

    def ours(q, k, v):
        return ops.attention(q, k, v, causal=causal, kv_start=start, kv_end=end, kv_len=19, q_start=10, return_lse=True)

    def plain(q, k, v):
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        j, i = torch.arange(20), torch.arange(9)[:, None] + 10
        seen = (j >= start.view(-1, 1, 1, 1)) & (j < end.clamp(max=19).view(-1, 1, 1, 1))
        seen = (seen & (j <= i)) if causal else seen.expand(-1, -1, 9, -1)
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(~seen, -1e30)
        dead = ~seen.any(-1)
        weights = scores.softmax(-1) * ~dead[..., None]
        return weights @ v, scores.logsumexp(-1).masked_fill(dead, -torch.inf)

    found, want = second(q, k, v, ours), second(*(t.double() for t in (q, k, v)), plain)
    assert_near(found, want, 2e-5)


def test_gradients_of_gradients_that_memory_does_not_hold(monkeypatch):
    q, k, v = tensors(70, 70)
    out = ops.attention(q, k, v).square().sum()
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"gradients of gradients of attention to 70 keys from 70 queries would need about"
    ):
        torch.autograd.grad(out, q, create_graph=True)
    torch.autograd.grad(ops.attention(q, k, v).square().sum(), q)  # first-order ones need none of it


def test_an_interrupt_stops_it():
    q, k, v = (x.detach() for x in tensors(6000, 6000, (8, 2), 64, 1))
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.process_time()
    with pytest.raises(KeyboardInterrupt):
        ops.attention_backward(out, q, k, v, out, lse)
    assert time.process_time() - begun < 2, "10 s of work alone"
