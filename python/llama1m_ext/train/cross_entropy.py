"""Cross-entropy of a projection to the vocabulary, a chunk of positions at a time: the logits are never whole.

Of a million positions and 128,256 tokens they would take 501 GiB in float32. The loss is a sum over positions, so the
gradients of a chunk can be made as soon as its logits are there (Liger's fused linear cross-entropy, 2410.10989; Cut
Cross-Entropy, 2411.09009, goes further and keeps not even a chunk). Liger's kernels need Triton and a GPU: `engine="liger"` takes them, where
they are installed; what is here runs everywhere.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import rows

CHUNK_BYTES = 256 << 20
"""Logits in float32 that are alive at a time on a CPU; more makes nothing faster."""
GPU_CHUNK_BYTES = 1 << 30
IGNORED = -100
"""The label of a position that has none, as torch and transformers have it."""
ENGINES = ("own", "liger")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    loss_weights: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = IGNORED,
    chunk: int | None = None,
    recompute: bool = False,
    denominator: Tensor | float | None = None,
    engine: str = "own",
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, labels)`, softmax in float32 (float64 for float64), without its logits.

    Args:
        hidden: `[..., hidden]`, float64, float32, bfloat16 or float16.
        weight: `[vocab, hidden]` in hidden's dtype, or any under autocast; the embeddings themselves where they are tied.
        labels: int64 `[...]`, each `ignore_index` or from 0 to vocab - 1.
        bias: `[vocab]`.
        loss_weights: `[...]`, a factor of each position's loss. "mean" then divides by their sum, over positions with a label.
        reduction: "mean", "sum", or "none": the loss of each position, in float32.
        chunk: positions whose logits are alive at a time. Default: as many as 256 MiB of float32 hold (1 GiB on a GPU).
        recompute: make the logits again in backward, instead of making the gradients in forward: a third more
            arithmetic, and no gradient of `weight` that waits for backward; backward may pass more than once. "none"
            always does.
        denominator: what "mean" divides by: of all rows of a step, for one, where they come in several calls. Default: labels in
            this call, or the sum of their weights.
        engine: "own", or "liger": the kernels of liger-kernel, on a GPU.

    Returns:
        A scalar in float32 (float64 for float64), or `[...]` with "none".

    Raises:
        ValueError, TypeError: shapes, dtypes or labels that don't fit; the message names the argument and both values.
        ImportError: liger-kernel was asked for, and is not there.
    """
    _check(hidden, weight, labels, bias, loss_weights, reduction, ignore_index, engine)
    shape = labels.shape
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    factors = None if loss_weights is None else loss_weights.reshape(-1).detach()
    if engine == "liger":
        return _liger(flat, weight, targets, bias, factors, reduction, ignore_index)
    if chunk is None:
        chunk = chunk_len(weight.shape[0], flat.device)
    each, over = reduction == "none", None
    if reduction == "mean":
        over = total_weight(targets, factors, ignore_index) if denominator is None else denominator
        over = torch.as_tensor(over, dtype=torch.float64, device=flat.device)
    made: Tensor = _LinearCrossEntropy.apply(
        flat, weight, bias, targets, factors, over, ignore_index, chunk, recompute or each, rows.autocast_of(flat), each
    )
    return made.view(shape) if each else made


def total_weight(labels: Tensor, loss_weights: Tensor | None = None, ignore_index: int = IGNORED) -> Tensor:
    """What "mean" divides by: positions that have a label, or the sum of their weights; float64, a scalar."""
    valid = labels != ignore_index
    if loss_weights is None:
        return valid.sum(dtype=torch.float64)
    return torch.where(valid, loss_weights.double(), 0.0).sum()


def chunk_len(vocab: int, device: torch.device) -> int:
    """Positions whose logits are alive at a time."""
    room = CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(16, room // (4 * vocab))


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    loss_weights: Tensor | None,
    reduction: str,
    ignore_index: int,
    engine: str,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    for name, t in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating-point dtype, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected [vocab, {hidden.shape[-1]}], got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype and rows.autocast_of(hidden) is None:
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, of in (("labels", labels), ("loss_weights", loss_weights)):
        if of is not None and of.shape != hidden.shape[:-1]:
            raise ValueError(f"{name}: expected {tuple(hidden.shape[:-1])} as hidden has it, got {tuple(of.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if labels.device.type == "cpu" and labels.numel():  # a GPU says so itself, later
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if wrong.numel():
            raise ValueError(
                f"labels: expected {ignore_index} or 0 to {weight.shape[0] - 1}, got {int(wrong.flatten()[0])}"
            )


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden `[n, d]`, weight `[vocab, d]`: the weighted sum of the positions' losses, or each of them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factors: Tensor | None,
        over: Tensor | None,
        ignore_index: int,
        chunk: int,
        recompute: bool,
        autocast: torch.dtype | None,
        each: bool,
    ) -> Tensor:
        ctx.chunk, ctx.recompute, ctx.autocast, ctx.each = chunk, recompute, autocast, each
        valid = labels != ignore_index
        if factors is not None:
            valid &= factors != 0
        at = None if bool(valid.all()) else valid.nonzero().squeeze(1)
        needs = ctx.needs_input_grad[:3]
        ctx.needs = needs
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Work(hidden, weight, bias, labels, factors, autocast, at)
            # Gradients are rounded once, divided already; float16 could not hold small ones: there all but a power of two.
            ctx.late = scale = None
            if over is not None:
                ctx.late, scale = _split(over, recompute, work.dtype)
            if each or recompute or not any(needs):
                losses, lse = work.losses(chunk)
                if any(needs):
                    ctx.save_for_backward(hidden, weight, bias, labels, factors, at, lse)
                if each:
                    found = losses.new_zeros(len(hidden))
                    return losses if at is None else found.index_copy_(0, at, losses)
                total = losses.sum(dtype=torch.float64)
                return (total if over is None else total / over).to(losses.dtype)
            total, *grads = work.with_gradients(chunk, needs, grad=None if scale is None else scale.expand(len(hidden)))
            if over is not None and not work.n:
                total = total / over  # nan, as torch has it
            total = (total if ctx.late is None else total / ctx.late).to(work.exact)
            ctx.grads = grads
            return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.late is not None:
            grad = (grad / ctx.late).to(grad.dtype)
        if ctx.recompute:
            hidden, weight, bias, labels, factors, at, lse = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                work = _Work(hidden, weight, bias, labels, factors, ctx.autocast, at)
                picked = grad.expand(len(hidden)) if at is None or not ctx.each else grad[at]
                _, *grads = work.with_gradients(ctx.chunk, ctx.needs, lse, picked)
        else:
            if ctx.grads is None:
                raise RuntimeError("backward: expected one pass, got a second one; recompute=True allows more")
            grads = [None if g is None else g.mul_(grad) for g in ctx.grads]
            ctx.grads = None
        return (*grads, *[None] * 8)


def _split(over: Tensor, recompute: bool, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(what gradients are divided by late, what they are multiplied by early) for a denominator."""
    if recompute:
        return over, None
    if dtype != torch.float16:
        return None, 1 / over
    late = torch.exp2(torch.floor(torch.log2(over)))
    return late, late / over


class _Work:
    """The positions that count, `at`, or all."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        factors: Tensor | None,
        autocast: torch.dtype | None,
        at: Tensor | None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.at = hidden, weight, bias, at
        dtype = hidden.dtype if autocast is None else autocast
        self.dtype, self.exact = dtype, torch.promote_types(dtype, torch.float32)
        self.w = weight.to(dtype)
        self.b = None if bias is None else bias.to(dtype)
        self.labels = labels if at is None else labels[at]
        self.factors = None if factors is None else (factors if at is None else factors[at]).to(self.exact)
        self.n = len(self.labels)

    def part(self, a: int, b: int) -> Tensor:
        picked = self.hidden[a:b] if self.at is None else self.hidden.index_select(0, self.at[a:b])
        return picked.to(self.dtype)

    def logits(self, part: Tensor) -> Tensor:
        return torch.nn.functional.linear(part, self.w, self.b).to(self.exact)

    def losses(self, chunk: int) -> tuple[Tensor, Tensor]:
        """(weighted losses, log-sum-exps), each `[n]`."""
        losses = torch.empty(self.n, dtype=self.exact, device=self.hidden.device)
        lse = torch.empty_like(losses)
        for a in range(0, self.n, chunk):
            b = min(a + chunk, self.n)
            logits = self.logits(self.part(a, b))
            lse[a:b] = logits.logsumexp(-1)
            losses[a:b] = lse[a:b] - logits.gather(1, self.labels[a:b, None]).squeeze(1)
        return losses if self.factors is None else losses.mul_(self.factors), lse

    def with_gradients(
        self, chunk: int, needs: tuple[bool, ...], lse: Tensor | None = None, grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(sum of the weighted losses, gradients of hidden, weight and bias).

        Args:
            lse: as `losses` gave it; None: it is not known yet.
            grad: the loss's by each position's loss, `[n]`; None: 1. The sum is one of losses times this.
        """
        device, exact = self.hidden.device, self.exact
        total = torch.zeros((), dtype=torch.float64, device=device)
        g_hidden = torch.zeros_like(self.hidden) if needs[0] else None
        g_weight = torch.zeros(self.w.shape, dtype=exact, device=device) if needs[1] else None
        g_bias = torch.zeros(self.w.shape[:1], dtype=exact, device=device) if needs[2] else None
        for a in range(0, self.n, chunk):
            b = min(a + chunk, self.n)
            part, labels = self.part(a, b), self.labels[a:b, None]
            p = self.logits(part)
            z = p.logsumexp(-1, keepdim=True) if lse is None else lse[a:b, None]
            losses = z - p.gather(1, labels)
            p.sub_(z).exp_()
            p.scatter_add_(1, labels, torch.full_like(losses, -1))
            for factors in (self.factors, grad):
                if factors is not None:
                    losses *= factors[a:b, None]
                    p *= factors[a:b, None]
            total += losses.sum(dtype=torch.float64)
            if g_bias is not None:
                g_bias += p.sum(0)
            if g_weight is not None and p.dtype != self.dtype and device.type == "cpu":
                g_weight.addmm_(p.t(), part.to(exact))
            p = p.to(self.dtype)
            if g_hidden is not None:
                found = (p @ self.w).to(g_hidden.dtype)
                if self.at is None:
                    g_hidden[a:b] = found
                else:
                    g_hidden.index_copy_(0, self.at[a:b], found)
            if g_weight is None or (p.dtype != exact and device.type == "cpu"):
                pass
            elif p.dtype == exact:
                g_weight.addmm_(p.t(), part)
            elif hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 on, on GPUs
                g_weight += torch.mm(p.t(), part, out_dtype=exact)
            else:
                g_weight += p.t() @ part
        if g_weight is not None:
            g_weight = g_weight.to(self.weight.dtype)
        if g_bias is not None and self.bias is not None:
            g_bias = g_bias.to(self.bias.dtype)
        return total, g_hidden, g_weight, g_bias


def _liger(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    factors: Tensor | None,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """The same by liger-kernel."""
    if hidden.device.type != "cuda":
        raise ValueError(f"engine: expected \"own\" on {hidden.device.type}; liger's kernels are Triton's, for GPUs")
    if factors is not None:
        raise ValueError('engine: expected "own" where there are loss_weights; liger has no weights of positions')
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found,unused-ignore]
            LigerFusedLinearCrossEntropyFunction as Liger,
        )
    except ImportError:
        raise ImportError('engine: "liger" needs liger-kernel: pip install liger-kernel') from None
    made = Liger.apply(hidden, weight, labels, bias, None, ignore_index, 0.0, 0.0, reduction)
    return made[0] if isinstance(made, tuple) else made
