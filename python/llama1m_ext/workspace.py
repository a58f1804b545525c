"""Memory for what a chunk makes in a layer: the same for every chunk and layer of a prefill.

Without it each chunk would ask the system for some hundred megabytes again and again, page by page; or, where they are
small enough for malloc's own heap, leave holes there that take as much as what is in use.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

# No other class: whoever puts another one there means it.
_SILU = (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU))
_LARGE = 1 << 20
NORM_ROWS = 256
"""Tokens that a norm sees at a time, about: it makes four copies in float32."""
GPU_NORM_ROWS = 4096
"""Likewise on a GPU, which is slow where work comes in small pieces."""


class Workspace:
    """Memory by name, made when first asked for, and larger when more is asked for.

    What was taken under a name is overwritten when the name is taken again.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of that shape, contiguous, in dtype and device of `like`, not initialised."""
        n = 1
        for size in shape:
            n *= size
        slot = self._slots.get(name)
        if slot is None or slot.numel() < n or slot.dtype != like.dtype or slot.device != like.device:
            self._slots.pop(name, None)
            del slot  # before its successor is made
            slot = self._slots[name] = _memory(n, like)
        return slot[:n].view(shape)

    def linear(self, name: str, module: Any, x: Tensor) -> Tensor:
        """`module(x)`, under that name where it is a plain linear layer; x `[batch, n, in]`, contiguous then."""
        if not is_plain(module, x):
            return module(x)
        weight, bias = module.weight, module.bias
        out = self.take(name, (*x.shape[:-1], weight.shape[0]), x)
        rows = x.reshape(-1, x.shape[-1])
        into = out.view(rows.shape[0], -1)
        if bias is None:
            torch.mm(rows, weight.t(), out=into)
        else:
            torch.addmm(bias, rows, weight.t(), out=into)
        return out

    def norm(self, name: str, module: Any, hidden: Tensor) -> Tensor:
        """`module(hidden)`, a few tokens at a time; hidden `[batch, n, hidden]`."""
        n = hidden.shape[1]
        rows = NORM_ROWS if hidden.device.type == "cpu" else GPU_NORM_ROWS
        parts = max(1, round(hidden.shape[0] * n / rows))
        size = -(-n // parts)
        if torch.is_grad_enabled() or size >= n:
            return module(hidden)
        out: Tensor | None = None
        for a in range(0, n, size):
            part = module(hidden[:, a : a + size])
            if out is None:
                out = self.take(name, (*hidden.shape[:-1], part.shape[-1]), part)
            out[:, a : a + size] = part
        assert out is not None
        return out

    def mlp(self, mlp: Any, x: Tensor) -> Tensor:
        """`mlp(x)` of a `LlamaMLP`; x may be memory taken as "x", which is overwritten with the result."""
        if (
            mlp._forward_hooks
            or mlp.act_fn._forward_hooks
            or "forward" in mlp.__dict__
            or type(mlp.act_fn) not in _SILU
        ):
            return mlp(x)
        gate = self.linear("a", mlp.gate_proj, x)
        own = is_plain(mlp.gate_proj, x) and is_plain(mlp.up_proj, x)
        gate = nn.functional.silu(gate, inplace=own)
        up = self.linear("b", mlp.up_proj, x)
        gate = gate.mul_(up) if own else gate * up
        return self.linear("x", mlp.down_proj, gate)


def _memory(n: int, like: Tensor) -> Tensor:
    """Memory for n elements. Large ones come from the system, to which they go back at once: malloc would keep what lies
    below something that is still in use, and that is more than 5% of the peak then."""
    size = n * like.element_size()
    if size >= _LARGE and like.device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE"):
        try:
            return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=like.dtype)
        except OSError:
            pass  # no room: torch says so in its own words
    return torch.empty(n, dtype=like.dtype, device=like.device)


def is_plain(module: Any, x: Tensor) -> bool:
    """Whether a module is a linear layer and nothing else, so that its product can be written where we like."""
    if type(module) is not nn.Linear or module._forward_hooks or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and weight.device == x.device
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )
