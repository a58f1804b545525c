"""Small Llama-3 checkpoints in the layout of the original release, and a forward pass over them in float64.

Written from the layout, with loops and complex numbers: nothing of transformers, and nothing of ours.
"""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 640,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
HIDDEN = 224  # int(2 * 256 / 3) = 170, times 1.3 = 221, up to a multiple of 16
SPREAD = 0.15
TEXT = (
    "The ship sailed on, and the sea was calm. It's 1048576 o'clock; they'll say we've DON'T\n\n  indent\tnaïve café "
    "東京 привет 🦜🏴‍☠️ price: $12345.67!? aren't I'M\r\nlast   line   "
    "Somewhere between breakfast and the afternoon the captain, whose handwriting nobody could decipher, remembered that "
    "international regulations require lanterns; unfortunately the lighthouse keeper's daughter had extinguished them. "
) * 3
# Axis along which a tensor is cut among the ranks of model parallelism.
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "tok_embeddings": 0, "output": 0}


def weights(params: dict[str, Any] = PARAMS, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """All tensors by their original names."""
    g = torch.Generator().manual_seed(seed)
    dim, hidden, vocab = params["dim"], HIDDEN, params["vocab_size"]
    kv_dim = dim // params["n_heads"] * params["n_kv_heads"]

    def make(*shape: int, spread: float = SPREAD) -> Tensor:
        return (torch.randn(shape, generator=g) * spread).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.2 * torch.randn(dim, generator=g)).to(dtype)

    made = {"tok_embeddings.weight": make(vocab, dim, spread=0.5)}
    for i in range(params["n_layers"]):
        layer = {
            "attention.wq": make(dim, dim),
            "attention.wk": make(kv_dim, dim),
            "attention.wv": make(kv_dim, dim),
            "attention.wo": make(dim, dim),
            "feed_forward.w1": make(hidden, dim),
            "feed_forward.w2": make(dim, hidden),
            "feed_forward.w3": make(hidden, dim),
            "attention_norm": norm(),
            "ffn_norm": norm(),
        }
        made |= {f"layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    made |= {"norm.weight": norm(), "output.weight": make(vocab, dim)}
    return made


def shards(tensors: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """The tensors of each of n ranks."""
    made: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for name, tensor in tensors.items():
        axis = CUT.get(name.split(".")[-2])
        parts = [tensor] * n if axis is None else tensor.chunk(n, axis)
        for shard, part in zip(made, parts, strict=True):
            shard[name] = part.clone()
    return made


@functools.cache
def ranks() -> dict[bytes, int]:
    """A vocabulary of 384 tokens, trained on `TEXT` by tiktoken's own trainer."""
    from tiktoken._educational import bpe_train

    from llama1m_ext.convert_tokenizer import PATTERN

    return bpe_train(TEXT, PARAMS["vocab_size"] - 256, PATTERN, visualise=None)


def write_tokenizer(path: Path) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks().items())
    path.write_text("".join(lines), encoding="ascii")


def checkpoint(
    folder: Path, n: int = 1, dtype: torch.dtype = torch.float32, params: dict[str, Any] = PARAMS, seed: int = 0
) -> dict[str, Tensor]:
    """Writes a checkpoint of n shards; returns its tensors, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    write_tokenizer(folder / "tokenizer.model")
    whole = weights(params, dtype, seed)
    for rank, shard in enumerate(shards(whole, n)):
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    return whole


def inv_freq(params: dict[str, Any]) -> Tensor:
    """Frequencies of the pairs, rounded to float32 as the model was trained, with Llama 3.1's scaling if asked for."""
    head_dim = params["dim"] // params["n_heads"]
    freqs = 1.0 / params["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if not params.get("use_scaled_rope"):
        return freqs.double()
    made = []
    for freq in freqs.tolist():
        turns = 8192 * freq / (2 * torch.pi)  # how often it turns within the length trained for
        far = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
        made.append((1 - far) * freq / params.get("rope_scaling_factor", 8.0) + far * freq)
    return torch.tensor(made, dtype=torch.float64)


def reference(
    tensors: dict[str, Tensor], tokens: Tensor, params: dict[str, Any] = PARAMS, last: int | None = None
) -> Tensor:
    """Logits, float64 `[batch, n, vocab]`, of tokens `[batch, n]`, or of the `last` of them."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in tensors.items()}
    heads, kv_heads = params["n_heads"], params["n_kv_heads"]
    n, head_dim = tokens.shape[1], params["dim"] // heads
    angles = torch.outer(torch.arange(n, dtype=torch.float64), inv_freq(params))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    places = torch.arange(n)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * w[name]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = w["tok_embeddings"][tokens]
    for i in range(params["n_layers"]):
        at = f"layers.{i}"
        h = norm(x, f"{at}.attention_norm")
        q = rotate((h @ w[f"{at}.attention.wq"].T).unflatten(-1, (heads, head_dim)))
        k = rotate((h @ w[f"{at}.attention.wk"].T).unflatten(-1, (kv_heads, head_dim)))
        v = (h @ w[f"{at}.attention.wv"].T).unflatten(-1, (kv_heads, head_dim))
        outs = []
        for head in range(heads):
            mine = head // (heads // kv_heads)
            parts = []
            for rows in places.split(1024):  # no more than so many rows of scores at a time
                seen = int(rows[-1]) + 1
                scores = q[:, rows, head] @ k[:, :seen, mine].transpose(1, 2) / head_dim**0.5
                hidden = places[:seen] > rows[:, None]
                parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :seen, mine])
            outs.append(torch.cat(parts, 1))
        x = x + torch.cat(outs, -1) @ w[f"{at}.attention.wo"].T
        h = norm(x, f"{at}.ffn_norm")
        gate = h @ w[f"{at}.feed_forward.w1"].T
        x = x + (gate * gate.sigmoid() * (h @ w[f"{at}.feed_forward.w3"].T)) @ w[f"{at}.feed_forward.w2"].T
    return norm(x if last is None else x[:, -last:], "norm") @ w["output"].T
