"""What the tests of compact caches share: stock's cache with the same rounding in plain torch, and how to compare bits."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llama1m_ext import dense, testing
from llama1m_ext.formats import KvFormat

FORMATS = ["int8", "fp8", "int4", "int8/int4", "model/int4", "int8/model"]
SINK, KEPT, TAIL = 64, 64, 320
STEPS = {"int8": 1 / 510, "int4": 1 / 30, "fp8": 1 / 56, "model": 0.0}
"""Largest rounding error of a code, as a part of its group's range: half a step of 255 or 15; 16 of 896 for e4m3."""
PARAMS = 3 * 2**-11
"""Likewise that of the scale and the offset in float16: the offset may be 1.5 times the range."""


class Rounded(DynamicLayer):
    """Stock's layer with the rule of when tokens become compact, and their rounding by `testing`, in plain torch."""

    kv = KvFormat("int8", "int8")
    sealed = 0

    def update(self, key_states, value_states, *args, **kwargs):
        found = super().update(key_states, value_states)
        self.keys, self.values = (x.clone() for x in found)
        length = self.keys.shape[2]
        start = self.sealed
        sink = max(0, SINK - start)
        if length - start >= TAIL + sink:
            a = start + sink
            b = a + (length - a - KEPT) // 64 * 64
            for x, name, which in ((self.keys, self.kv.k, "k"), (self.values, self.kv.v, "v")):
                if name != "model":
                    x[:, :, a:b] = as_kept(x[:, :, a:b], name, which).to(x.dtype)
            self.sealed = b
        return found

    def crop(self, tokens):
        super().crop(tokens)
        length = self.get_seq_length()
        self.sealed = 0 if length <= SINK else min(self.sealed, length)


def as_kept(x, name, which):
    return testing.dense_reference(testing.compact_reference(x, name, which), which, x.shape[3])


def rounded_cache(model, kv: str) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [Rounded() for _ in cache.layers]
    for layer in cache.layers:
        layer.kv = KvFormat.parse(kv)
    return cache


HEADS = 2


def new_tokens(batch: int, n: int, seed: int, head_dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, n, HEADS, head_dim, generator=generator).transpose(1, 2) for _ in range(2))
    return k.clamp(-4, 4), v.clamp(-4, 4)


def tensors(layer) -> list[torch.Tensor]:
    return [t for page in layer._used(layer.length) for t in dense.loaded(page).tensors().values()]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def copies(layer) -> list[torch.Tensor]:
    return [t.clone() for t in tensors(layer)]
