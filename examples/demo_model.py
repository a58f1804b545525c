"""The demo model in plain torch, under the names that transformers' LlamaForCausalLM gives its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of the model. Few heads: at a million tokens the time goes into heads x layers, and nearly nowhere else."""

    vocab_size: int = 3072
    hidden: int = 256
    intermediate: int = 640
    layers: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    theta: float = 2804339835.0  # the model card's value for 1,048,576 tokens
    norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden, c.q_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.q_heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        """x [batch, len, hidden]; cos, sin [batch, 1, len, head_dim]; bias [batch, 1, len, len] with the causal mask in it."""
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.c.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.c.q_heads // self.c.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class DemoLlama(nn.Module):
    """Llama-3's architecture: GQA, RoPE, RMSNorm, SwiGLU, no biases; the embedding is also the output matrix."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.model.norm = RMSNorm(c.hidden, c.norm_eps)
        exponent = torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
        self.inv_freq = c.theta**-exponent

    def init_weights(self, kinds: list[list[int]], generator: torch.Generator) -> None:
        """Random weights with a structure from which retrieval is learned soon.

        `kinds`: lists of token ids; the tokens of a list share a part of their embedding, and all tokens share another.
        The heads of the first layer begin as heads that look 1, 2, 3 and 4 tokens back (in RoPE's fast dimensions),
        those of the second as heads that look for what resembles the query, at any distance (in the slow dimensions);
        all begin by copying what they find (o_proj is the transpose of v_proj).
        """
        c = self.c

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = 0.5 if "down_proj" in name else 1.0
                weight.data = scale * weight.shape[1] ** -0.5 * normal(*weight.shape)
        shared = normal(c.hidden)
        embedding = 0.06 * (0.7 * normal(c.vocab_size, c.hidden) + 0.5 * shared)
        for ids in kinds:
            embedding[ids] += 0.06 * 0.4 * normal(c.hidden)
        self.model.embed_tokens.weight.data = embedding
        half, group = c.head_dim // 2, c.q_heads // c.kv_heads
        for index, layer in enumerate(self.model.layers):
            attention = layer.self_attn
            basis = torch.linalg.qr(normal(c.hidden, c.kv_heads * c.head_dim))[0].T  # [kv_heads * head_dim, hidden]
            value = basis.view(c.kv_heads, c.head_dim, c.hidden)
            attention.v_proj.weight.data = basis.clone()
            attention.o_proj.weight.data = torch.cat([0.7 * value[h // group].T for h in range(c.q_heads)], dim=1)
            noise = 0.3 * c.hidden**-0.5
            query = noise * normal(c.q_heads, c.head_dim, c.hidden)
            key = noise * normal(c.kv_heads, c.head_dim, c.hidden)
            if index == 0:
                constant = shared / shared.norm() / c.hidden**0.5  # reads about 0.5 from every token
                strength = 6.0 * torch.tensor([1.0, 1.0, 0.9, 0.8, 0.7, 0.6]) ** 0.5
                fast = torch.arange(len(strength))
                key[:, fast] += strength[None, :, None] * constant
                for head in range(c.q_heads):
                    turn = (head + 1) * self.inv_freq[fast].float()
                    query[head, fast] += (strength * turn.cos())[:, None] * constant
                    query[head, fast + half] -= (strength * turn.sin())[:, None] * constant
            else:
                slow = torch.tensor([i for i in range(c.head_dim) if i % half >= half // 2])
                for kv in range(c.kv_heads):
                    match = 1.5 * c.hidden**-0.5 * normal(len(slow), c.hidden)
                    key[kv, slow] += match
                    query[kv * group : (kv + 1) * group, slow] += match
            attention.q_proj.weight.data = query.reshape(-1, c.hidden)
            attention.k_proj.weight.data = key.reshape(-1, c.hidden)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) float32 [batch, 1, len, head_dim] of integer positions [batch, len], from float64 angles."""
        angle = positions.double()[..., None] * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)[:, None]
        return angle.cos().float(), angle.sin().float()

    def forward(self, ids: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
        """Hidden states [batch, len, hidden] after the last norm."""
        x = self.model.embed_tokens(ids)
        cos, sin = self.rope(positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin, bias)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rotate_half convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def save_model(model: DemoLlama, folder: Path, max_len: int, token_ids: dict[str, int]) -> None:
    """config.json, generation_config.json and model.safetensors (bfloat16), as transformers 4.57 and 5 both read them."""
    c = model.c
    eos = [token_ids["<|end_of_text|>"], token_ids["<|eot_id|>"]]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_ids["<|begin_of_text|>"],
        "eos_token_id": eos[0],
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate,
        "max_position_embeddings": max_len,
        "mlp_bias": False,
        "num_attention_heads": c.q_heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": eos[0],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = {name: weight.detach().bfloat16().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
