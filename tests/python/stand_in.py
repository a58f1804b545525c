"""A `llama` package for tests, with the public structure of that of meta-llama/llama3: its modules, classes, arguments and
attributes. Our own code, for one process on a CPU: it needs neither fairscale nor CUDA.

`check_real_llama.py` compares with the real one.
"""

from __future__ import annotations

import sys
from pathlib import Path

INIT = """
from .generation import Llama
from .model import ModelArgs, Transformer
"""

MODEL = '''
import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn


@dataclass
class ModelArgs:
    dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: Optional[int] = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: Optional[float] = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000
    max_batch_size: int = 32
    max_seq_len: int = 2048


class Linear(nn.Module):
    """Stands for the layers that are cut among ranks: a class of its own, with a weight."""

    def __init__(self, width, height):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(height, width))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Table(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


def precompute_freqs_cis(dim, end, theta=10000.0):
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(end, dtype=torch.float32)[:, None] * freqs
    return torch.polar(torch.ones_like(angles), angles)


def turn(x, freqs_cis):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_kv_heads = args.n_kv_heads or args.n_heads
        self.n_local_heads, self.n_local_kv_heads = args.n_heads, self.n_kv_heads
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = args.dim // args.n_heads
        self.wq = Linear(args.dim, args.n_heads * self.head_dim)
        self.wk = Linear(args.dim, self.n_kv_heads * self.head_dim)
        self.wv = Linear(args.dim, self.n_kv_heads * self.head_dim)
        self.wo = Linear(args.n_heads * self.head_dim, args.dim)
        shape = (args.max_batch_size, args.max_seq_len, self.n_local_kv_heads, self.head_dim)
        self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x, start_pos, freqs_cis, mask):
        rows, n, _ = x.shape
        q, k, v = (w(x).view(rows, n, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = turn(q, freqs_cis), turn(k, freqs_cis)
        self.cache_k, self.cache_v = self.cache_k.to(q), self.cache_v.to(q)
        self.cache_k[:rows, start_pos : start_pos + n] = k
        self.cache_v[:rows, start_pos : start_pos + n] = v
        keys, values = (
            cache[:rows, : start_pos + n].repeat_interleave(self.n_rep, 2).transpose(1, 2)
            for cache in (self.cache_k, self.cache_v)
        )
        scores = q.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        out = scores.float().softmax(-1).to(q.dtype) @ values
        return self.wo(out.transpose(1, 2).reshape(rows, n, -1))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, multiple_of, ffn_dim_multiplier):
        super().__init__()
        hidden_dim = int((ffn_dim_multiplier or 1) * int(2 * hidden_dim / 3))
        hidden_dim = -(-hidden_dim // multiple_of) * multiple_of
        self.w1, self.w2, self.w3 = Linear(dim, hidden_dim), Linear(hidden_dim, dim), Linear(dim, hidden_dim)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, layer_id, args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
        self.layer_id = layer_id
        self.attention_norm, self.ffn_norm = RMSNorm(args.dim, args.norm_eps), RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, start_pos, freqs_cis, mask):
        x = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params, self.vocab_size, self.n_layers = params, params.vocab_size, params.n_layers
        self.tok_embeddings = Table(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = Linear(params.dim, params.vocab_size)
        self.freqs_cis = precompute_freqs_cis(
            params.dim // params.n_heads, params.max_seq_len * 2, params.rope_theta
        )

    @torch.inference_mode()
    def forward(self, tokens, start_pos):
        n = tokens.shape[1]
        x = self.tok_embeddings(tokens)
        self.freqs_cis = self.freqs_cis.to(x.device)
        mask = None
        if n > 1:
            mask = torch.full((n, start_pos + n), -torch.inf).triu(start_pos + 1).to(x)
        for layer in self.layers:
            x = layer(x, start_pos, self.freqs_cis[start_pos : start_pos + n], mask)
        return self.output(self.norm(x)).float()
'''

GENERATION = '''
import json
from pathlib import Path
from typing import List, Optional

import torch

from llama.model import ModelArgs, Transformer


class Llama:
    @staticmethod
    def build(
        ckpt_dir: str,
        tokenizer_path: str,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: Optional[int] = None,
        seed: int = 1,
    ) -> "Llama":
        assert 1 <= max_seq_len <= 8192, f"max_seq_len must be between 1 and 8192, got {max_seq_len}."
        weights = torch.load(next(Path(ckpt_dir).glob("*.pth")), weights_only=True)
        params = json.loads((Path(ckpt_dir) / "params.json").read_text(encoding="utf-8"))
        args = ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size, **params)
        before = torch.get_default_dtype()
        torch.set_default_dtype(weights["norm.weight"].dtype)  # theirs stays changed
        try:
            model = Transformer(args)
        finally:
            torch.set_default_dtype(before)
        model.load_state_dict(weights, strict=False)
        return Llama(model)

    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def generate(
        self,
        prompt_tokens: List[List[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ):
        """Greedy. Like theirs it begins with the shortest prompt, and reads only the last logits."""
        params = self.model.params
        shortest, longest = min(map(len, prompt_tokens)), max(map(len, prompt_tokens))
        assert longest <= params.max_seq_len
        total = min(params.max_seq_len, max_gen_len + longest)
        tokens = torch.full((len(prompt_tokens), total), -1)
        for row, prompt in zip(tokens, prompt_tokens):
            row[: len(prompt)] = torch.tensor(prompt)
        given, chances, done = tokens != -1, torch.zeros(tokens.shape), 0

        def note(logits, a, b):
            chances[:, a:b] = -torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), tokens[:, a:b], reduction="none", ignore_index=-1
            )

        if shortest == total:
            note(self.model.forward(tokens, 0), 0, total)
        for at in range(shortest, total):
            logits = self.model.forward(tokens[:, done:at], done)
            tokens[:, at] = torch.where(given[:, at], tokens[:, at], logits[:, -1].argmax(-1))
            if logprobs:
                note(logits, done + 1, at + 1)
            done = at
        starts = [0 if echo else len(prompt) for prompt in prompt_tokens]
        ends = [len(prompt) + max_gen_len for prompt in prompt_tokens]
        out = [row[a:b] for row, a, b in zip(tokens.tolist(), starts, ends)]
        rows = [row[a:b] for row, a, b in zip(chances.tolist(), starts, ends)]
        return out, rows if logprobs else None
'''


def write(folder: Path, model: str = MODEL, generation: str = GENERATION, init: str = INIT) -> None:
    """Puts the package into a folder."""
    package = folder / "llama"
    package.mkdir()
    for name, text in {"__init__": init, "model": model, "generation": generation}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")


def forget() -> None:
    """The next import reads it again."""
    for name in [name for name in sys.modules if name == "llama" or name.startswith("llama.")]:
        del sys.modules[name]
