"""The model families whose layers are Llama's: which classes they have, and in what they differ.

Llama is always on. The others wait to be asked for, `llama1m_ext.enable(families="mistral")`, because whoever imports this
package for a Llama need not want his Mistral changed. A family belongs here when transformers' own code of its decoder
layer, rotation and rotary tables is Llama's but for the names, and its attention differs in nothing but what the fields
below say; `tests/python/test_families.py` compares each with transformers.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: the `model_type` of its configs, and the name of its module in transformers.
        prefix: how the names of its classes begin.
        plain_mlp: whether its MLP is Llama's, `down(silu(gate(x)) * up(x))`; else it is called as a module.
        one_window: `config.sliding_window` is that of every layer; else `config.layer_types` says which have one.
        returns_unused_cache: whether a cache given with `use_cache=False` comes back in the output.
    """

    name: str
    prefix: str
    plain_mlp: bool = True
    one_window: bool = False
    returns_unused_cache: bool = False

    @property
    def modeling(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def configuration(self) -> str:
        return f"transformers.models.{self.name}.configuration_{self.name}"

    @property
    def is_known(self) -> bool:
        """Whether this transformers has it. Nothing is imported to find out."""
        spec = importlib.util.find_spec("transformers")
        folders = [] if spec is None else spec.submodule_search_locations or []
        return any(Path(at, "models", self.name, f"modeling_{self.name}.py").is_file() for at in folders)


LLAMA = Family("llama", "Llama", returns_unused_cache=True)
FAMILIES = {
    family.name: family
    for family in (
        LLAMA,
        Family("arcee", "Arcee", plain_mlp=False, returns_unused_cache=True),
        Family("cwm", "Cwm"),
        Family("ministral", "Ministral"),
        Family("mistral", "Mistral", one_window=True),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("seed_oss", "SeedOss", plain_mlp=False, returns_unused_cache=True),
        Family("smollm3", "SmolLM3"),
    )
}
"""By name. One line each; what a line means stands at `Family`."""


def named(families: str | Iterable[str]) -> list[Family]:
    """Families by name; "all": every one that this transformers has.

    Raises:
        ValueError: a name that is not in the table, or that this transformers does not have.
        TypeError: something else than names.
    """
    names = [families] if isinstance(families, str) else list(families)
    if names == ["all"]:
        return [family for family in FAMILIES.values() if family.is_known]
    found = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f'families: expected names or "all", got {name!r}')
        family = FAMILIES.get(name)
        if family is None:
            raise ValueError(f'families: expected "all" or names out of {", ".join(FAMILIES)}; got {name!r}')
        if not family.is_known:
            raise ValueError(f"families: expected models of this transformers, which has no {name!r}")
        found.append(family)
    return found


@dataclass(frozen=True, eq=False)
class Classes:
    """A family's classes as they were when they were patched, and those of their functions that ours stand for."""

    family: Family
    module: ModuleType
    model: type
    decoder_layer: Any
    rotary: Any
    mlp: type
    layer_forward: Callable[..., Any]
    rotary_forward: Callable[..., Any]
    apply_rotary: Callable[..., Any]

    def window(self, config: Any, layer_idx: int) -> int | None:
        """How many keys a query of a layer sees, its own among them; None: all that are not after it.

        Raises:
            ValueError: a type of layer that we don't know.
        """
        if self.family.one_window:
            return config.sliding_window
        types = getattr(config, "layer_types", None)
        if types is None or self.family is LLAMA:  # whose layers ask no config
            return None
        if types[layer_idx] == "sliding_attention":
            return config.sliding_window
        if types[layer_idx] != "full_attention":
            raise ValueError(f"a layer of type {types[layer_idx]!r}")
        return None


_by_class: dict[type, Classes] = {}


def register(model: type) -> Classes:
    """Notes the classes around a model class, e.g. `LlamaModel`, that is being patched."""
    known = _by_class.get(model)
    if known is not None:
        return known
    family = next(f for f in FAMILIES.values() if f.modeling == model.__module__)
    module = sys.modules[model.__module__]
    part = {name: getattr(module, family.prefix + name) for name in ("DecoderLayer", "RotaryEmbedding", "MLP")}
    found = Classes(
        family,
        module,
        model,
        part["DecoderLayer"],
        part["RotaryEmbedding"],
        part["MLP"],
        part["DecoderLayer"].forward,
        part["RotaryEmbedding"].forward,
        module.apply_rotary_pos_emb,
    )
    _by_class[model] = _by_class[found.rotary] = found
    return found


def classes_of(thing: Any) -> Classes | None:
    """The family's classes of a model (`LlamaModel`, or what inherits from it) or of its rotary module; None: no family of
    ours, or one that was never switched on."""
    return next((_by_class[c] for c in type(thing).__mro__ if c in _by_class), None)


def is_model(module: Any) -> bool:
    """Whether a module is the inner model of a family that is or was switched on: a `LlamaModel`, a `MistralModel`."""
    found = classes_of(module)
    return found is not None and isinstance(module, found.model)


def waiting(module: Any) -> Family | None:
    """The family of a model that could be served, if it were switched on."""
    for c in type(module).__mro__:
        for family in FAMILIES.values():
            if c.__module__ == family.modeling and c.__name__ == f"{family.prefix}Model" and c not in _by_class:
                return family
    return None
