"""The miniature's first training, at 512 tokens: the demo's architecture and beginning, in plain torch."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_model import Config, DemoLlama, save_model
from demo_rows import Stage
from demo_tokenizer import save_tokenizer
from miniature_rows import FIRST, SHARP, MiniatureRows
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from llama1m_ext.demo.needle import KEYS

THETA = 10_000.0
"""Of models trained at short lengths; the demo's own model has the card's 2804339835."""
MASTERED = 0.93
"""Running accuracy from which a kind of row counts as learned."""


def loss_and_accuracy(model: DemoLlama, ids: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """The weighted cross entropy of ids `[rows, length]`, and the share of right tokens among the numbers that can be known."""
    hidden = model(ids, torch.arange(ids.shape[1])[None])[:, :-1]
    target, weight = ids[:, 1:], weight[:, 1:]
    wanted = weight > 0
    target, weight = target[wanted], weight[wanted]
    logits = model.logits(hidden[wanted])
    known = weight >= 10
    right = (logits[known].argmax(-1) == target[known]).float().mean().item()
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum(), right


def learn(
    tokenizer: Tokenizer, rows: MiniatureRows, folder: Path, *, seed: int, finish: int = 300, smoke: bool = False
) -> None:
    """Trains a new model on an easy-first curriculum and saves it as `LlamaForCausalLM` in bfloat16.

    Args:
        folder: an empty one.
        finish: steps of the last kind of row, once it is learned, while the learning rate falls.
        smoke: two steps of two kinds with a smaller model.

    Raises:
        RuntimeError: 4000 steps were not enough.
    """
    kinds, most = FIRST, 4000
    if smoke:
        kinds, finish = [replace(kind, rows=2) for kind in FIRST[-3:-1]], 2
    model = DemoLlama(_config(smoke))
    cities = [tokenizer.token_to_id(f"Ġ{key}") for key in KEYS]
    model.init_weights([rows.numbers, cities], torch.Generator().manual_seed(seed))
    steps = _Steps(model, rows)
    at, ema, since, finish_from = 0, 0.0, 0, most
    for step in range(most + finish):
        learned = ema > MASTERED or (smoke and since == 2)
        if learned and at < len(kinds) - 1:
            at, ema, since = at + 1, 0.0, 0
            print(f"step {step}: rows of {kinds[at].length}", flush=True)
        elif learned and finish_from == most:
            finish_from = step
        if step - finish_from >= finish:
            break
        # Every fourth batch is an easier one, so that nothing is forgotten.
        kind: Stage = kinds[rows.draw.integers(0, at)] if at and step % 4 == 3 else kinds[at]
        rate = min(1.0, (step + 1) / 100) if step < finish_from else _falling((step - finish_from) / finish)
        right = steps.step(kind, kind.lr * rate, texts=max(1, kind.rows // 4) if at else 0)
        since += 1
        if kind is kinds[at]:
            ema = 0.9 * ema + 0.1 * right
    else:
        raise RuntimeError(f"first training: expected {MASTERED} right within {most} steps, got {ema:.3f}")
    _save(model, tokenizer, folder, kinds[-1].length)


def sharpen(
    tokenizer: Tokenizer, rows: MiniatureRows, before: Path, folder: Path, *, steps: int = 400, smoke: bool = False
) -> None:
    """Trains the model of `learn` on rows of the same length with more facts in them, and saves it likewise.

    Args:
        before: the folder of `learn`.
        folder: an empty one.
        steps: how many; the learning rate falls as a cosine.
        smoke: as in `learn`, and two steps only.
    """
    model = DemoLlama(_config(smoke))
    model.load_state_dict({name: weight.float() for name, weight in load_file(before / "model.safetensors").items()})
    kind = replace(FIRST[-2], rows=2) if smoke else SHARP
    steps, taken = 2 if smoke else steps, _Steps(model, rows)
    for step in range(steps):
        taken.step(kind, kind.lr * min(1.0, (step + 1) / 20) * _falling(step / steps), texts=1)
    _save(model, tokenizer, folder, kind.length)


class _Steps:
    """AdamW on batches of rows."""

    def __init__(self, model: DemoLlama, rows: MiniatureRows) -> None:
        self.model, self.rows, self.count, self.began = model, rows, 0, time.perf_counter()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))

    def step(self, kind: Stage, rate: float, texts: int) -> float:
        """One step; returns the share of right numbers."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, right = loss_and_accuracy(self.model, *self.rows.first_batch(kind, texts))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.count % 50 == 0:
            seconds = time.perf_counter() - self.began
            print(f"{seconds:7.1f} s  step {self.count:5d}  loss {loss.item():.3f}  right {right:.3f}", flush=True)
        self.count += 1
        return right


def _config(smoke: bool) -> Config:
    config = replace(Config(), theta=THETA)
    return replace(config, hidden=64, intermediate=64, head_dim=16) if smoke else config


def _falling(done: float) -> float:
    """A cosine from 1 to 0.02."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _save(model: DemoLlama, tokenizer: Tokenizer, folder: Path, length: int) -> None:
    save_tokenizer(tokenizer, folder)
    save_model(model, folder, length, tokenizer.get_vocab())
