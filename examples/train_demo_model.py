"""Trains the demo model: a two-layer Llama that finds a key's number anywhere in a million tokens.

    python examples/train_demo_model.py --out DIR            # the model that ships with the package
    python examples/train_demo_model.py --out DIR --smoke    # a few seconds, learns nothing: shows that it runs

Four ideas make a quarter of an hour on two cores enough, although no training row is longer than 512 tokens:

- An easy-first curriculum. Straight training on long rows learns nothing at all for thousands of steps; three facts in
  a row of 96 tokens are learned in a few hundred, and every later stage starts from a model that can do the one before.
- Positions with gaps. A row is cut in the filler, and its pieces are placed in order, at random, in [0, 2^20): a few
  hundred tokens meet every distance, and the retrieving head learns to use only RoPE's slow dimensions.
- Filler that counts many times. A key of the filler gets log(weight) added to its attention logits, which is exactly
  what `weight` copies of it would do to the softmax. With weights up to 2^20 / 256 and more, the model has to
  find one token among a million, and it is trained against the hardest of them.
- A structured beginning (`DemoLlama.init_weights`): heads that look a few tokens back, and heads that look for what
  resembles the query. Random weights get there too, but need six times as many steps for the first stage.

The running accuracy decides when a stage ends, and nothing depends on the clock: the same seed on the same machine gives
the same model. With bfloat16 products on two cores of a Zen 5 it takes about 10 minutes; without them several times that.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_model import Config, DemoLlama, save_model
from demo_rows import Rows, Stage
from demo_tokenizer import MAX_LEN, make_tokenizer, save_tokenizer

from llama1m_ext.demo.book import HELD_OUT_CHARS, load_book
from llama1m_ext.demo.needle import KEYS

STAGES = [
    Stage(length=96, facts=3, keys=8, repeats=5, questions=0, span=96, weight=1, rows=21, lr=2e-3),
    Stage(length=128, facts=4, keys=133, repeats=5, questions=0, span=128, weight=1, rows=16, lr=2e-3),
    Stage(length=160, facts=3, keys=133, repeats=2, questions=2, span=160, weight=1, rows=16, lr=2e-3),
    Stage(length=256, facts=4, keys=133, repeats=2, questions=3, span=1024, weight=1, rows=12, lr=2e-3),
    Stage(length=256, facts=4, keys=133, repeats=1, questions=3, span=16384, weight=16, rows=16, lr=1e-3),
    Stage(length=320, facts=5, keys=133, repeats=1, questions=4, span=MAX_LEN, weight=256, rows=16, lr=1e-3),
    Stage(length=448, facts=6, keys=133, repeats=1, questions=5, span=MAX_LEN, weight=16384, rows=12, lr=1e-3),
    Stage(length=512, facts=16, keys=133, repeats=1, questions=5, span=MAX_LEN, weight=16384, rows=10, lr=1e-3),
]


def loss_and_accuracy(model: DemoLlama, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The weighted cross entropy, and the share of right tokens among the numbers that can be known."""
    with torch.autocast("cpu", torch.bfloat16):  # four times as fast as float32 where the CPU has bfloat16 products
        hidden = model(batch["ids"], batch["positions"], batch["bias"])[:, :-1]
    target, weight = batch["ids"][:, 1:], batch["loss"][:, 1:]
    wanted = weight > 0
    target, weight = target[wanted], weight[wanted]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(hidden[wanted]).float()
    loss = F.cross_entropy(logits, target, reduction="none")
    known = weight >= 10
    right = (logits[known].argmax(-1) == target[known]).float().mean().item()
    return (loss * weight).sum() / weight.sum(), right


def learning_rate(step: int, peak: float, finish_from: int | None, finish_steps: int) -> float:
    """Warm-up, a plateau while the curriculum lasts, then a cosine to nearly nothing."""
    if finish_from is None:
        return peak * min(1.0, (step + 1) / 100)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - finish_from) / finish_steps))))


def train(
    model: DemoLlama, rows: Rows, stages: list[Stage], args: argparse.Namespace, save: Callable[[], None]
) -> None:
    """Goes to the next stage whenever the running accuracy passes the mark; ends after `finish` steps of the last."""
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.98)
    )
    at, ema, finish_from, began = 0, 0.0, None, time.perf_counter()
    for step in range(args.max_steps):
        last = at == len(stages) - 1
        if last and finish_from is None and ema > 0.95:
            finish_from = step
        if finish_from is not None and step - finish_from >= args.finish:
            break
        # Every fourth batch is from an earlier stage, so that nothing is forgotten.
        stage = stages[rows.draw.integers(2 if at > 2 else 0, at)] if at and step % 4 == 3 else stages[at]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stages[at].lr, finish_from, args.finish)
        loss, right = loss_and_accuracy(model, rows.batch(stage))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if stage is stages[at]:
            ema = 0.9 * ema + 0.1 * right
        if step % args.log_every == 0:
            seconds = time.perf_counter() - began
            print(f"{seconds:7.1f} s  step {step:5d}  stage {at}  loss {loss.item():.4f}  right {ema:.3f}", flush=True)
        if step % 100 == 99:
            save()
        if not last and ema > 0.93:
            at, ema = at + 1, 0.0
            save()
            print(f"step {step}: stage {at}", flush=True)
    save()


def main() -> None:
    """Makes the tokenizer, trains the model and writes both to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and the model")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a smaller model: shows that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finish", type=int, default=1200, help="steps of the last stage, once it is learned")
    parser.add_argument("--max-steps", type=int, default=12_000, help="gives up after so many")
    parser.add_argument("--log-every", type=int, default=25)
    args = parser.parse_args()
    config, stages = Config(), STAGES
    if args.smoke:
        config = replace(config, hidden=128, intermediate=128)
        args.max_steps, args.log_every = 4, 1
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    book = load_book()
    words = ["What", "The", "\n\n", "user", "assistant", "system"]
    words += [f" {word}" for word in "special magic number for is the The What".split()] + [f" {key}" for key in KEYS]
    tokenizer = make_tokenizer(book[:200_000] if args.smoke else book, words)
    save_tokenizer(tokenizer, args.out)
    # The first novel, where the default demo hides its needle, is not trained on.
    text = book[HELD_OUT_CHARS : HELD_OUT_CHARS + 100_000] if args.smoke else book[HELD_OUT_CHARS:]
    rows = Rows(tokenizer, np.array(tokenizer.encode(text, add_special_tokens=False).ids), args.seed)
    model = DemoLlama(config)
    keys = [tokenizer.token_to_id(f"Ġ{key}") for key in KEYS]
    model.init_weights([rows.numbers, keys], torch.Generator().manual_seed(args.seed))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, rows, stages, args, lambda: save_model(model, args.out, MAX_LEN, tokenizer.get_vocab()))
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
