"""AdamW over float32 weights, whatever dtype computes, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .stages import Stage


class Optimizer:
    """AdamW (Loshchilov and Hutter, 1711.05101). bfloat16 weights have float32 masters, from which they are rounded after each
    step: an update of 2e-5 is far below what bfloat16 can add to a weight. Their gradients are summed in float32.

    Args:
        named: names and parameters that are trained.
        stage: its hyperparameters.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], stage: Stage) -> None:
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.masters: list[Tensor] = []
        self._hooks: list[Any] = []
        for p in self.params:
            if p.dtype in (torch.bfloat16, torch.float16):
                master = p.detach().float()
                self._hooks.append(p.register_post_accumulate_grad_hook(_into(master)))
            else:
                master = p
            self.masters.append(master)
        decayed = [m for m in self.masters if m.dim() >= 2]
        others = [m for m in self.masters if m.dim() < 2]
        groups = [
            {"params": each, "weight_decay": decay}
            for each, decay in ((decayed, stage.weight_decay), (others, 0.0))
            if each
        ]
        self.inner = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=stage.eps, fused=True)
        self.clip = stage.clip

    def step(self, rate: float) -> None:
        """One step with this learning rate, from the gradients that were summed since the last one."""
        for group in self.inner.param_groups:
            group["lr"] = rate
        self.inner.step()
        with torch.no_grad():
            for p, master in zip(self.params, self.masters, strict=True):
                if p is not master:
                    p.copy_(master)
        self.clear()

    def clear(self) -> None:
        """Forgets gradients."""
        for t in (*self.params, *self.masters):
            t.grad = None

    def gradients(self) -> list[Tensor]:
        """Those that there are, in float32."""
        return [m.grad for m in self.masters if m.grad is not None]

    def clipped(self) -> float:
        """Scales the gradients to a norm of at most `clip`; returns their norm before."""
        norm: Any = torch.nn.utils.clip_grad_norm_(self.masters, self.clip or math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """All that a step changes, by name."""
        for name, master in zip(self.names, self.masters, strict=True):
            yield f"weight.{name}", master.detach()
            for key, value in sorted(self.inner.state.get(master, {}).items()):
                yield f"{key}.{name}", value

    def load(self, read: Any) -> None:
        """The opposite of `state`.

        Args:
            read: gives the tensor of a name, or None.
        """
        with torch.no_grad():
            for name, p, master in zip(self.names, self.params, self.masters, strict=True):
                _fill(master, read(f"weight.{name}"))
                if p is not master:
                    p.copy_(master)
                kept = {}
                for key in ("exp_avg", "exp_avg_sq", "step"):
                    value = read(f"{key}.{name}")
                    if value is None:
                        continue
                    if key == "step":
                        kept[key] = value.to(_local(master).device)
                    else:
                        kept[key] = torch.zeros_like(master)
                        _fill(kept[key], value)
                self.inner.state.pop(master, None)
                if kept:
                    self.inner.state[master] = kept

    def close(self) -> None:
        """Takes its hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.clear()


def rate(stage: Stage, step: int) -> float:
    """The learning rate of step `step`, from 0 on."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    left = max(1, stage.steps - stage.warmup)
    done = min(1.0, (step - stage.warmup) / left)
    if stage.schedule == "linear":
        share = 1 - done
    elif stage.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        return stage.learning_rate
    return stage.learning_rate * (stage.least_rate + (1 - stage.least_rate) * share)


def _into(master: Tensor) -> Any:
    def add(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return add


def _local(x: Any) -> Tensor:
    """This rank's share."""
    return x.to_local() if hasattr(x, "to_local") else x


def _fill(x: Tensor, value: Tensor | None) -> None:
    assert value is not None
    _local(x).copy_(value)
