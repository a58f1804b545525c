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
from miniature_rows import FIRST, MiniatureRows
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


def train_first(
    tokenizer: Tokenizer, rows: MiniatureRows, folder: Path, *, seed: int, finish: int = 300, smoke: bool = False
) -> None:
    """Trains the model and saves it as `LlamaForCausalLM` in bfloat16.

    Args:
        folder: an empty one.
        finish: steps of the last kind of row, once it is learned, while the learning rate falls.
        smoke: two steps of each kind with a smaller model.

    Raises:
        RuntimeError: 4000 steps were not enough.
    """
    config = replace(Config(), theta=THETA)
    kinds, most = FIRST, 4000
    if smoke:
        config = replace(config, hidden=64, intermediate=64, head_dim=16)
        kinds, finish = [replace(kind, rows=2) for kind in FIRST[-3:-1]], 2
    model = DemoLlama(config)
    cities = [tokenizer.token_to_id(f"Ġ{key}") for key in KEYS]
    model.init_weights([rows.numbers, cities], torch.Generator().manual_seed(seed))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=kinds[0].lr, betas=(0.9, 0.98))
    at, ema, since, finish_from, began = 0, 0.0, 0, most, time.perf_counter()
    for step in range(most + finish):
        learned = ema > MASTERED or (smoke and since == 2)
        if learned and at < len(kinds) - 1:
            at, ema, since = at + 1, 0.0, 0
            print(f"{time.perf_counter() - began:7.1f} s  step {step:5d}  rows of {kinds[at].length}", flush=True)
        elif learned and finish_from == most:
            finish_from = step
        if step - finish_from >= finish:
            break
        # Every fourth batch is an easier one, so that nothing is forgotten.
        kind: Stage = kinds[rows.draw.integers(0, at)] if at and step % 4 == 3 else kinds[at]
        for group in optimizer.param_groups:
            group["lr"] = kind.lr * _rate(step, finish_from, finish)
        loss, right = loss_and_accuracy(model, *rows.first_batch(kind, texts=max(1, kind.rows // 4) if at else 0))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        since += 1
        if kind is kinds[at]:
            ema = 0.9 * ema + 0.1 * right
        if step % 50 == 0:
            print(
                f"{time.perf_counter() - began:7.1f} s  step {step:5d}  loss {loss.item():.3f}  right {ema:.3f}",
                flush=True,
            )
    else:
        raise RuntimeError(f"first training: expected {MASTERED} right within {most} steps, got {ema:.3f}")
    save_tokenizer(tokenizer, folder)
    save_model(model, folder, kinds[-1].length, tokenizer.get_vocab())


def _rate(step: int, finish_from: int, finish: int) -> float:
    """Share of the learning rate: it grows for 100 steps, stays, and falls as a cosine at the end."""
    if step < finish_from:
        return min(1.0, (step + 1) / 100)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - finish_from) / finish)))
