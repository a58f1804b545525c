"""What treats each position alone, over a chunk of positions at a time, and again in backward.

Norms, projections and the MLP of a layer are such functions: their activations (of the MLP's gate and up 3.5 times the hidden
states each) are alive for one chunk only, and what is kept between forward and backward is the input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Rows = Callable[..., tuple[Tensor, ...]]
"""Tensors `[batch, n, ...]` to tensors `[batch, n, ...]`, each position alone."""


def forward_rows(f: Rows, inputs: Sequence[Tensor], chunk: int) -> tuple[Tensor, ...]:
    """`f(*inputs)`, chunk by chunk."""
    n = inputs[0].shape[1]
    if n <= chunk:
        return f(*inputs)
    outs: tuple[Tensor, ...] | None = None
    for a in range(0, n, chunk):
        parts = f(*(x[:, a : a + chunk] for x in inputs))
        if outs is None:
            outs = tuple(p.new_empty((p.shape[0], n, *p.shape[2:])) for p in parts)
        for out, part in zip(outs, parts, strict=True):
            out[:, a : a + chunk] = part
        del parts
    assert outs is not None
    return outs


def backward_rows(
    f: Rows,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    chunk: int,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of `inputs` and `params`, from those of the outputs: `f` runs again, chunk by chunk.

    Gradients of parameters are summed in float32 where there is more than one chunk.

    Args:
        needs: which inputs' are wanted.
        grads: of each output.
    """
    n = inputs[0].shape[1]
    into: list[Tensor | None] = [None] * len(inputs)
    sums: list[Tensor | None] = [None] * len(params)
    for a in range(0, n, chunk):
        with torch.enable_grad():
            parts = [x[:, a : a + chunk].detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
            outs = f(*parts)
        pairs = [(out, g[:, a : a + chunk]) for out, g in zip(outs, grads, strict=True) if out.requires_grad]
        wanted = [part for part in parts if part.requires_grad] + list(params)
        if not pairs or not wanted:
            continue
        given = [g.to(out.dtype) for out, g in pairs]
        found = iter(torch.autograd.grad([out for out, _ in pairs], wanted, given, allow_unused=True))
        del outs, pairs, given
        for i, part in enumerate(parts):
            if not part.requires_grad:
                continue
            g = next(found)
            if g is None:
                continue
            whole = into[i]
            if n <= chunk:
                into[i] = g
                continue
            if whole is None:
                whole = into[i] = torch.zeros_like(inputs[i])
            whole[:, a : a + chunk] = g
        for i, g in enumerate(found):
            if g is None:
                continue
            known = sums[i]
            if known is None:
                sums[i] = g if n <= chunk else g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
            else:
                known += g
        del found
    return into, [None if s is None else s.to(p.dtype) for s, p in zip(sums, params, strict=True)]


def by_rows(f: Rows, inputs: Sequence[Tensor], params: Sequence[Tensor], chunk: int) -> tuple[Tensor, ...]:
    """`f(*inputs)` with gradients: chunk by chunk, and again in backward.

    Args:
        params: the parameters in `f` that need gradients.
    """
    made = _ByRows.apply(f, chunk, len(inputs), *inputs, *params)
    return made if isinstance(made, tuple) else (made,)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Rows, chunk: int, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[:n_inputs]
        ctx.f, ctx.chunk, ctx.params = f, chunk, tensors[n_inputs:]
        ctx.around = Around(inputs[0])
        ctx.save_for_backward(*inputs)
        return forward_rows(f, inputs, chunk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[3 : 3 + len(inputs)]
        with ctx.around.again():
            into, params = backward_rows(ctx.f, inputs, needs, grads, ctx.params, ctx.chunk)
        return (None, None, None, *into, *params)


def trainable(*modules: nn.Module) -> list[Tensor]:
    """Parameters that need gradients, each once."""
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def is_random(*modules: nn.Module) -> bool:
    """Whether running them twice gives two results."""
    return any(
        isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
        for module in modules
        for m in module.modules()
    )


def autocast_of(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on x's device; None: it is off."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


class Around:
    """What was around a forward, so that backward can run the same again.

    Args:
        like: a tensor on the device.
        random: whether random numbers are drawn: their generators' states are kept, too.
    """

    def __init__(self, like: Tensor, random: bool = False) -> None:
        self.device, self.autocast = like.device, autocast_of(like)
        self.states: tuple[Tensor, Tensor | None] | None = None
        if random:
            gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            self.states = torch.get_rng_state(), gpu

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        on = self.autocast is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, self.autocast if on else None, enabled=on))
            if self.states is not None:
                gpus = [self.device] if self.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices=gpus))
                torch.set_rng_state(self.states[0])
                if self.states[1] is not None:
                    torch.cuda.set_rng_state(self.states[1], self.device)
            yield
