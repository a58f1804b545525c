"""`params.json` of an original Llama-3 checkpoint, and the `config.json` that transformers makes the same model from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THETA = 500_000.0
"""Llama 3's, where params.json has none."""
MAX_LEN, MAX_LEN_SCALED = 8192, 131_072
"""Lengths that Llama 3 and 3.1 were trained for."""
_LARGEST = 1 << 40
# What has no bearing on the model: lengths and batches of the program that ran it.
_IGNORED = {"max_seq_len", "max_batch_size", "use_kv_cache", "model_parallel_size"}
_NUMBERS = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "rope_scaling_factor",
    "use_scaled_rope",
}


class ConvertError(ValueError):
    """The checkpoint is not what it should be; the message names the file, what was expected and what came."""


@dataclass(frozen=True)
class Params:
    """The model's shape.

    Attributes:
        dim, n_layers, n_heads, n_kv_heads, hidden_dim: sizes; `hidden_dim` is the MLP's.
        vocab_size: None where params.json leaves it to the tokenizer.
        norm_eps, theta: as they are.
        rope_factor: of Llama 3.1's scaling of the rotary frequencies; None: they are not scaled.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int | None
    norm_eps: float
    theta: float
    rope_factor: float | None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def read(path: Path, theta: float | None = None, rope_factor: float | None = None) -> Params:
    """Reads params.json.

    Args:
        path: the file.
        theta, rope_factor: to be taken instead of the file's.

    Raises:
        ConvertError: it is not JSON, a size is missing, wrong or does not fit the others, or it has something that makes
            another model than a Llama 3 of it.
        OSError: it can't be read.
    """
    given = load_json(path)
    for name, value in given.items():
        if name not in _NUMBERS and name not in _IGNORED and value not in (None, False):
            raise ConvertError(f"{path}: expected a Llama 3's parameters, got {name}={json.dumps(value)[:80]}")

    def whole(name: str, least: int = 1) -> int:
        value = given.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
            raise ConvertError(f"{path}: {name}: expected an integer from {least} on, got {json.dumps(value)[:80]}")
        return value

    def real(name: str, default: float) -> float:
        value = given.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise ConvertError(f"{path}: {name}: expected a number above 0, got {json.dumps(value)[:80]}")
        return float(value)

    dim, n_layers, n_heads = whole("dim"), whole("n_layers"), whole("n_heads")
    n_kv_heads = n_heads if given.get("n_kv_heads") is None else whole("n_kv_heads")
    if dim % n_heads or dim // n_heads % 2:
        raise ConvertError(f"{path}: expected n_heads to divide dim={dim} into even sizes, got n_heads={n_heads}")
    if n_heads % n_kv_heads:
        raise ConvertError(f"{path}: expected n_kv_heads to divide n_heads={n_heads}, got n_kv_heads={n_kv_heads}")
    multiple = 256 if given.get("multiple_of") is None else whole("multiple_of")
    hidden = int(2 * (4 * dim) / 3)
    if given.get("ffn_dim_multiplier") is not None:
        hidden = int(real("ffn_dim_multiplier", 1.0) * hidden)
    if hidden > _LARGEST:
        raise ConvertError(f"{path}: ffn_dim_multiplier: expected an MLP of at most {_LARGEST}, got {hidden:.3g}")
    scaled = given.get("use_scaled_rope", False)
    if not (scaled is None or isinstance(scaled, bool)):
        raise ConvertError(f"{path}: use_scaled_rope: expected true or false, got {json.dumps(scaled)[:80]}")
    if rope_factor is not None and not scaled:
        raise ConvertError(f"{path}: expected use_scaled_rope, as rope_factor={rope_factor} is given, got none")
    return Params(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden_dim=multiple * -(-hidden // multiple),
        vocab_size=None if given.get("vocab_size") in (None, -1) else whole("vocab_size"),
        norm_eps=real("norm_eps", 1e-5),
        theta=real("rope_theta", THETA) if theta is None else theta,
        rope_factor=(rope_factor or real("rope_scaling_factor", 8.0)) if scaled else None,
    )


def config(params: Params, vocab_size: int, dtype: str, max_len: int | None, base: int, eos: int, tied: bool) -> Any:
    """The contents of config.json.

    Written in the words of transformers 4, which 5 reads as well; not the other way round: 4 would not see 5's
    `rope_parameters`, and rotate by another theta.

    Args:
        params: the model.
        vocab_size: rows of the embedding.
        dtype: of the weights: "bfloat16".
        max_len: positions; None: what Llama 3, or 3.1 if frequencies are scaled, was trained for.
        base: id of the first special token.
        eos: id of the token that ends an answer.
        tied: whether the output layer is the embedding.
    """
    scaling = None
    if params.rope_factor is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": params.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": base,
        "eos_token_id": eos,
        "head_dim": params.head_dim,
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "initializer_range": 0.02,
        "intermediate_size": params.hidden_dim,
        "max_position_embeddings": max_len or (MAX_LEN if scaling is None else MAX_LEN_SCALED),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": params.n_heads,
        "num_hidden_layers": params.n_layers,
        "num_key_value_heads": params.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": params.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": params.theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def load_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ConvertError: it is something else.
        OSError: it can't be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConvertError(f"{path}: expected JSON: {e}") from None
    if not isinstance(found, dict):
        raise ConvertError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
