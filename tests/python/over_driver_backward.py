"""Gradients of attention over the driver of tests/cuda, against float64 and eager attention's autograd. Run by test_cuda_driver.py."""

from __future__ import annotations

import math

import pytest
import torch

from llama1m_ext import _core, cuda

torch.set_num_threads(1)
PATHS = ["any", "sm90" if _core.cuda_info()["devices"][0][1] == (9, 0) else "sm80"]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def visible(q_len, kv_len, batch, *, causal=True, q_start=None, kv_start=None, kv_end=None):
    """bool [batch, 1, q_len, kv_len]."""
    i = torch.arange(q_len)[:, None] + (kv_len - q_len if q_start is None else q_start)
    j = torch.arange(kv_len)[None, :]
    seen = (j <= i if causal else torch.ones(q_len, kv_len, dtype=torch.bool)).expand(batch, 1, q_len, kv_len)
    if kv_start is not None:
        seen = seen & (j >= kv_start.reshape(-1, 1, 1, 1))
    if kv_end is not None:
        seen = seen & (j < kv_end.reshape(-1, 1, 1, 1))
    return seen


def eager(q, k, v, mask, dtype, scale=None):
    """(out, lse) with autograd; products in the dtype, softmax in float32 or float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    scores = scores.to(torch.promote_types(dtype, torch.float32)).masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights.to(dtype) @ v, scores.masked_fill(empty, 0).logsumexp(-1)


def gradients(dtype, tensors, mask, grad_out, grad_lse, scale=None):
    """Those of q, k and v by autograd in a dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse = eager(*leaves, mask, dtype, scale)
    loss = (
        (out.float() if dtype != torch.float64 else out)
        .mul(grad_out.to(torch.promote_types(dtype, torch.float32)))
        .sum()
    )
    if grad_lse is not None:
        loss = loss + (lse * grad_lse.masked_fill(~mask.any(-1).expand_as(lse), 0)).sum()
    loss.backward()
    return [x.grad for x in leaves]


def check(
    dtype, path, *, head_dim=64, q_len=70, kv_len=70, batch=1, kv_heads=2, group=2, spare=0, strided=False, with_lse=False,
    grad_dtype=None, scale=None, mode=None, **where,
):  # fmt: skip
    """Ours against float64: no further from it than eager attention in the same dtype, or than two roundings."""
    torch.manual_seed(q_len + kv_len)
    q, grad_out = (torch.randn(batch, kv_heads * group, q_len, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads, kv_len, head_dim).to(dtype) for _ in range(2))
    grad_lse = torch.randn(batch, kv_heads * group, q_len) if with_lse else None
    mask = visible(q_len, kv_len, batch, **where)
    double = [x.double() for x in (q, k, v)]
    out, lse = eager(*double, mask, torch.float64, scale)
    lse = lse.masked_fill(~mask.any(-1).expand_as(lse), -math.inf).float()
    want = gradients(torch.float64, double, mask, grad_out, grad_lse, scale)
    yardstick = gradients(dtype, (q, k, v), mask, grad_out, grad_lse, scale)

    def held(x):
        """Inside something larger: what is beside it is NaN."""
        if not strided:
            return x
        room = torch.full((x.shape[0], x.shape[2] + 3, x.shape[1] + 1, x.shape[3]), math.nan, dtype=x.dtype)
        view = room[:, 1 : x.shape[2] + 1, : x.shape[1]].transpose(1, 2)
        return view.copy_(x)

    def longer(x):
        """With rows that are not in use, and NaN where nobody may look."""
        for name, hidden in (("kv_start", lambda b, at: x[b, :, :at]), ("kv_end", lambda b, at: x[b, :, at:])):
            if where.get(name) is not None:
                for b, at in enumerate(where[name].tolist()):
                    hidden(b, at).fill_(math.nan)
        room = torch.full((batch, kv_heads, kv_len + spare, head_dim), math.nan, dtype=dtype)
        room[:, :, :kv_len] = x
        return held(room)

    found = [
        torch.full(shape, math.nan, dtype=grad_dtype or dtype)
        for shape in (q.shape, (batch, kv_heads, kv_len + spare, head_dim), (batch, kv_heads, kv_len + spare, head_dim))
    ]
    found = [held(x) for x in found]
    given = (held(grad_out), held(q), longer(k.clone()), longer(v.clone()), out.to(dtype), lse)
    how = {"causal": True, "q_start": None, "kv_start": None, "kv_end": None, **where}
    cuda.attention_backward(*given, *found, softmax_scale=scale, kv_len=kv_len, grad_lse=grad_lse, path=path, **how)
    for name, ours, truth, theirs in zip(("dq", "dk", "dv"), found, want, yardstick, strict=True):
        if name != "dq":
            assert (ours[:, :, kv_len:] == 0).all(), name
            ours = ours[:, :, :kv_len]
        error = (ours.double() - truth).abs().max().item()
        # float32 sums of eager attention lie in another order: a seed may do twice as much to them.
        allowed = max(
            (theirs.double() - truth).abs().max().item() * (2 if dtype == torch.float32 else 1),
            2 * HALF_ULP[dtype] * max(1.0, truth.abs().max().item()),
        )
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    again = [x.clone() for x in found]
    for x in found:
        x.fill_(math.nan)
    cuda.attention_backward(*given, *found, softmax_scale=scale, kv_len=kv_len, grad_lse=grad_lse, path=path, **how)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not the same bits again"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_against_float64(dtype, head_dim, path):
    check(dtype, path, head_dim=head_dim, q_len=100, kv_len=140)


@pytest.mark.parametrize("head_dim", [8, 40, 100, 256])
def test_other_heads_in_float32(head_dim):
    check(torch.float32, "auto", head_dim=head_dim, q_len=20, kv_len=33, with_lse=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "case",
    [
        {"causal": False, "with_lse": True},
        {"q_start": -9, "batch": 2},
        {"q_start": 1 << 50, "q_len": 20},
        {"kv_start": torch.tensor([0, 33]), "batch": 2},
        {"kv_start": torch.tensor([10, 50]), "kv_end": torch.tensor([5, 60]), "batch": 2},
        {"strided": True, "spare": 60, "kv_len": 75},
        {"grad_dtype": torch.float32, "group": 3, "scale": 0.3},
        {"q_len": 1, "kv_len": 1},
    ],
    ids=str,
)
def test_masks_views_and_rows_not_in_use(path, case):
    check(torch.bfloat16, path, **case)


def test_what_autograd_hands_over():
    """Expanded, transposed, float32 for a bf16 call, of any alignment; k and v in pages."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 40, 64).bfloat16(), torch.randn(1, 2, 50, 64).bfloat16()
    out, lse = eager(q.double(), k.double(), k.double(), visible(40, 50, 1), torch.float64)
    out, lse = out.bfloat16(), lse.float()
    how = {"causal": True, "softmax_scale": None, "q_start": None, "kv_start": None, "kv_end": None, "kv_len": None}

    def run(grad_out, k, v):
        found = [torch.full_like(q, math.nan), *(torch.full((1, 2, 50, 64), math.nan, dtype=q.dtype) for _ in range(2))]
        cuda.attention_backward(grad_out, q, k, v, out, lse, *found, **how)
        return found

    grad_out = torch.randn(1, 4, 40, 64).bfloat16()
    want = run(grad_out, k, k)
    moved = torch.empty(grad_out.numel() + 1, dtype=torch.bfloat16)[1:].view(grad_out.shape).copy_(grad_out)
    for other in (grad_out.float(), moved, grad_out.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)):
        assert all(torch.equal(a, b) for a, b in zip(run(other, k, k), want, strict=True))
    pages = [k[:, :, :7], k[:, :, 7:31], k[:, :, 31:]]
    assert all(torch.equal(a, b) for a, b in zip(run(grad_out, pages, pages), want, strict=True))
    ones = run(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).expand_as(q), k, k)
    assert all(torch.equal(a, b) for a, b in zip(run(torch.ones_like(q), k, k), ones, strict=True))


@pytest.mark.parametrize("empty", [{"q_len": 0}, {"kv_len": 0, "causal": False}, {"batch": 0}], ids=str)
def test_nothing_there(empty):
    shape = {"q_len": 5, "kv_len": 6, "batch": 2, **empty}
    causal = shape.pop("causal", True)
    q = torch.randn(shape["batch"], 4, shape["q_len"], 64).bfloat16()
    k = torch.randn(shape["batch"], 2, 6, 64).bfloat16()
    lse = torch.full(q.shape[:3], -math.inf)
    found = [torch.full_like(x, math.nan) for x in (q, k, k)]
    cuda.attention_backward(
        q, q, k, k, torch.zeros_like(q), lse, *found, causal=causal, softmax_scale=None, q_start=None, kv_start=None,
        kv_end=None, kv_len=shape["kv_len"],
    )  # fmt: skip
    assert all((x == 0).all() for x in found)


def test_what_does_not_fit_is_refused():
    q, k = torch.randn(1, 4, 8, 64).bfloat16(), torch.randn(1, 2, 8, 64).bfloat16()
    lse = torch.zeros(1, 4, 8)

    def run(grad_out=q, q=q, k=k, v=k, out=q, lse=lse, dq=q, dk=k, dv=k, **more):
        how = {"causal": True, "softmax_scale": None, "q_start": None, "kv_start": None, "kv_end": None, "kv_len": None}
        cuda.attention_backward(grad_out, q, k, v, out, lse, dq, dk, dv, **{**how, **more})

    for more, words in [
        ({"grad_out": q[:, :, :7]}, "grad_out: expected the shape of q"),
        ({"grad_out": None}, "grad_out: expected a torch.Tensor on a GPU"),
        ({"out": q[..., :32]}, "out: expected the shape of q"),
        ({"lse": lse[..., :5]}, "lse: expected"),
        ({"lse": lse.double()}, "lse: expected"),
        ({"dq": q[:, :2]}, "dq: expected the shape of q"),
        ({"dk": k[:, :, :5]}, "dk: expected the shape of k"),
        ({"dv": k.half()}, "dv: expected the dtype of q, bfloat16, or float32"),
        ({"grad_lse": lse[:, :2]}, "grad_lse: expected"),
        ({"kv_len": 9}, "kv_len: expected at most the 8 tokens"),
        ({"kv_start": torch.zeros(3, dtype=torch.int64)}, "kv_start: expected"),
        ({"path": "decode"}, "path: expected any or auto for gradients"),
        ({"path": "fast"}, "path: expected"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=words):
            run(**more)
    with pytest.raises(ValueError, match="path: expected any or auto for float32 of head_dim 64"):
        run(*[x.float() for x in (q, q, k, k, q)], lse, *[x.float() for x in (q, k, k)], path="sm80")
    long = torch.zeros(1, 1, 1, 64).expand(1, 1, 1 << 30, 64)
    with pytest.raises(ValueError, match="q_len: expected at most 536870912 of them on a GPU"):
        run(long, long, k[:, :1], k[:, :1], long, torch.zeros(1, 1, 1).expand(1, 1, 1 << 30), long, k[:, :1], k[:, :1])


@pytest.mark.parametrize(
    "shape",
    [{"q_len": 4110, "kv_len": 9, "group": 16, "causal": False}, {"q_len": 3, "kv_len": 65_700, "group": 1}],
    ids=str,
)
def test_more_terms_than_a_segment(shape):
    """Sums of more than 65,536 terms go by way of float32 memory, heads of keys in turn."""
    check(torch.bfloat16, PATHS[1], kv_heads=1, **shape)
