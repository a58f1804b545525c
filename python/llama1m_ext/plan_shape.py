"""The numbers of a Llama that its memory and time follow from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .families import FAMILIES

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element of each dtype that the kernels know."""
_ALIASES = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16", "fp16": "float16"}
_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: as in its config.
        tied: whether logits are made with the embeddings' weights.
        dtype: "float32", "bfloat16" or "float16".
        biases: elements of biases.
        loaded: bytes of a real model's parameters in memory; None: there is only a config.
        brought: bytes of weights that come from a file, or to a GPU, for one layer at a time: of the largest.
        unpacked: bytes of the largest quantised matrix in float32, as which it is multiplied; 0: none is quantised.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    dtype: str
    biases: int = 0
    loaded: int | None = None
    brought: int = 0
    unpacked: int = 0

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZES[self.dtype]

    @property
    def q_dim(self) -> int:
        """Elements of a token's queries."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Elements of a token's keys, or of its values."""
        return self.kv_heads * self.head_dim

    @property
    def linear_elements(self) -> int:
        """Weights of the matrices of all layers."""
        return self.layers * self.hidden * (2 * self.q_dim + 2 * self.kv_dim + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_elements + norms + self.biases + (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that are in memory at a time: a real model's own, else by arithmetic."""
        return self.resident_bytes + self.brought

    @property
    def resident_bytes(self) -> int:
        """Of those that stay."""
        return self.parameters * self.size if self.loaded is None else self.loaded

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one decoded token reads: all but the table of embeddings, of which it reads a row."""
        return self.weight_bytes - (0 if self.tied else self.vocab * self.hidden * self.size)

    def linear_flops(self, tokens: int) -> float:
        """Floating-point operations of the matrices of all layers."""
        return 2.0 * self.linear_elements * tokens

    def attention_flops(self, tokens: int) -> float:
        """Of causal attention in all layers."""
        return 4.0 * self.q_dim * self.layers * tokens * (tokens + 1) / 2


PRESETS = {
    "gradientai/Llama-3-8B-Instruct-Gradient-1048k": Shape(
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        tied=False,
        dtype="bfloat16",
    )
}
"""Known by name, so that a plan for them needs no network."""


def dtype_name(dtype: Any) -> str:
    """From "bf16", "bfloat16", `torch.bfloat16`, ...

    Raises:
        ValueError: a dtype that the kernels don't know.
    """
    name = str(dtype).removeprefix("torch.").lower()
    name = _ALIASES.get(name, name)
    if name not in SIZES:
        raise ValueError(f"dtype: expected one of {', '.join(SIZES)}, got {dtype!r}")
    return name


def shape_of(source: Any, dtype: Any = None) -> tuple[str, Shape]:
    """(name, sizes) of a model, a config, a folder with a config.json, or a name on the hub.

    Args:
        source: a Llama of transformers or something that holds one, a `LlamaConfig`, a path or a name. A name that
            `PRESETS` does not have is looked up as transformers does: in its cache, then on the network.
        dtype: to reckon with; None: the model's or the config's own, bfloat16 where it has none.

    Raises:
        ValueError: nothing is found there, it is no Llama, or the dtype is unknown.
        TypeError: something else.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        if name in PRESETS and not Path(name).exists():
            return name, _with_dtype(PRESETS[name], dtype)
        return name, of_config(_read_config(name), dtype)
    if hasattr(source, "num_hidden_layers"):
        return getattr(source, "_name_or_path", "") or "a Llama", of_config(source, dtype)
    from .options import llama_models

    try:
        inner = llama_models(source)[0]
    except TypeError:
        raise TypeError(
            "model: expected a Llama of transformers, its config, a folder or a name, got " + type(source).__name__
        ) from None
    outer = source if hasattr(source, "parameters") else getattr(source, "model", inner)
    return getattr(inner.config, "_name_or_path", "") or "a Llama", of_model(inner, outer)


def of_config(config: Any, dtype: Any = None) -> Shape:
    """The sizes that a `LlamaConfig` gives.

    Raises:
        ValueError: another kind of model, or a size is missing.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"model: expected a Llama or another model of {', '.join(FAMILIES)} (model_type), got {kind!r}"
        )
    for name in _FIELDS:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"model: expected a config with {name}, an int from 1 on, got {value!r}")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    biases = 0
    if kind == "qwen2":  # always, and only these three
        biases += config.num_hidden_layers * (heads + 2 * kv_heads) * head_dim
    elif getattr(config, "attention_bias", False):
        biases += config.num_hidden_layers * ((heads + 2 * kv_heads) * head_dim + config.hidden_size)
    if getattr(config, "mlp_bias", False):
        biases += config.num_hidden_layers * (2 * config.intermediate_size + config.hidden_size)
    if dtype is None:
        own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        dtype = "bfloat16" if own is None else own
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        dtype=dtype_name(dtype),
        biases=biases,
    )


def of_model(llama_model: Any, outer: Any = None, dtype: Any = None) -> Shape:
    """The sizes of a `LlamaModel`.

    Args:
        outer: what holds it; its weights are counted, each memory once. None: not needed.
        dtype: of the hidden states; None: the model's.
    """
    import dataclasses

    shape = of_config(llama_model.config, llama_model.dtype if dtype is None else dtype)
    if outer is None:
        return shape
    from .weights import bytes_of, unpacked_bytes

    held, brought = bytes_of(outer, llama_model.layers)
    return dataclasses.replace(shape, loaded=held, brought=brought, unpacked=unpacked_bytes(llama_model.layers))


def _with_dtype(shape: Shape, dtype: Any) -> Shape:
    import dataclasses

    return shape if dtype is None else dataclasses.replace(shape, dtype=dtype_name(dtype))


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as why:
        known = ", ".join(PRESETS)
        first = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
        raise ValueError(
            f"model: expected a folder with a config.json, a name on the hub, or one known here ({known}); "
            f"got {name!r}: {first}"
        ) from None
