"""Which model made keys and values: all that they depend on, in a few words."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rope import frequencies
from .stored import checksum

_CONFIG = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
)
# Attributes of transformers' own modules that decide what they compute; all plain ones of other modules count.
_ATTRIBUTES = ("scaling", "variance_epsilon", "attention_scaling", "rope_type")
_STOCK = ("torch.nn.modules.", "transformers.models.llama.", "transformers.activations")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Identity:
    """What keys and values depend on, beside the tokens.

    Attributes:
        config: shapes, activation, epsilon.
        rope: the frequencies: theta and scaling.
        modules: their types, and what decides how foreign ones compute (an adapter that is switched off).
        dtype: of the weights.
        weights: every bit of them.
    """

    config: dict[str, Any]
    rope: str
    modules: str
    dtype: str
    weights: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, entry: Any) -> Identity:
        """The opposite of `as_dict`.

        Raises:
            ValueError: something else.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(entry, dict) or entry.keys() != names or not isinstance(entry["config"], dict):
            raise ValueError(f"model: expected {sorted(names)}, got {entry!r:.80}")
        if not all(isinstance(entry[name], str) for name in names - {"config"}):
            raise ValueError(f"model: expected words, got {entry!r:.80}")
        return cls(**entry)

    def difference(self, other: Identity) -> str:
        """In words how another model differs from this one; empty if it doesn't."""
        for name in sorted({*self.config, *other.config}):
            mine, theirs = self.config.get(name), other.config.get(name)
            if mine != theirs:
                return f"{name}: expected {mine!r}, this model has {theirs!r}"
        for name, of in (
            ("dtype", "the dtype of the weights"),
            ("rope", "RoPE's frequencies (theta, scaling)"),
            ("modules", "the modules (an adapter?)"),
            ("weights", "the weights"),
        ):
            if getattr(self, name) != getattr(other, name):
                return f"{of}: expected {getattr(self, name)}, this model has {getattr(other, name)}"
        return ""


def identity(model: Any) -> Identity:
    """The identity of a `LlamaModel` as it is now.

    All weights are read, which takes as long as one decoded token: whoever changes them in place may leave no trace but
    that.

    Raises:
        ValueError: weights that are not in memory.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: b for name, b in model.named_buffers(remove_duplicate=False) if "inv_freq" not in name},
    }
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ValueError(f"model: expected weights in memory, but {name} is not")
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        sums = dict(zip(tensors, pool.map(_sum, tensors.values()), strict=True))
    weights = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums[name]:016x}\n".encode())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return Identity(
        config={name: _plain(getattr(model.config, name, None)) for name in _CONFIG},
        rope=_rope(model),
        modules=_modules(model),
        dtype=" ".join(dtypes),
        weights=weights.hexdigest(),
    )


def fingerprint(model: Any) -> str:
    """The identity of a `LlamaModel` in 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(identity(model).as_dict(), sort_keys=True).encode(), digest_size=16).hexdigest()


def _sum(tensor: Tensor) -> int:
    tensor = tensor.detach()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    return checksum(tensor.cpu().contiguous())


def _rope(model: Any) -> str:
    rotary = model.rotary_emb
    found = frequencies(rotary, torch.zeros((1, 1), dtype=torch.long))
    digest = hashlib.blake2b(type(rotary).__qualname__.encode(), digest_size=8)
    digest.update(str(getattr(rotary, "rope_type", None)).encode())
    inv_freq, scaling = (rotary.inv_freq, 0.0) if found is None else found
    digest.update(inv_freq.detach().cpu().double().numpy().tobytes() + float(scaling).hex().encode())
    kind = str(getattr(rotary, "rope_type", ""))
    if "dynamic" in kind or kind == "longrope":
        words = {name: getattr(model.config, name, None) for name in ("rope_parameters", "rope_scaling")}
        digest.update(json.dumps(_plain(words), sort_keys=True).encode())
    return digest.hexdigest()


def _modules(model: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, module in model.named_modules():
        kind = type(module)
        where = f"{kind.__module__}.{kind.__qualname__}"
        attributes = vars(module)
        if where.startswith(_STOCK):
            found = {key: attributes[key] for key in _ATTRIBUTES if key in attributes}
        else:
            found = {
                key: value for key, value in attributes.items() if key != "training" and not key.startswith("_llama1m")
            }
        words = {
            key: value for key, value in ((key, _plain(value)) for key, value in found.items()) if value is not None
        }
        digest.update(f"{name} {where} {json.dumps(words, sort_keys=True)}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Numbers, words, and lists and mappings of them, for JSON; None for anything else."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(each) for each in value)
    if isinstance(value, dict):
        return {
            str(key): _plain(each) for key, each in value.items() if isinstance(each, (*_PLAIN, list, tuple, dict, set))
        }
    return None
