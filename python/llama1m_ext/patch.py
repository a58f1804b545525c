"""What is put in the place of transformers' own code, and taken off again.

One table. Its entries are applied where their module is loaded already, and otherwise right after it is loaded, by a
finder on `sys.meta_path`; so this package need not import transformers, and may be imported before or after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import types
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .families import FAMILIES, LLAMA, Family, named

_TOKENIZER = "transformers.tokenization_utils_base"
_NOTHING = object()


@dataclass(frozen=True)
class Patch:
    """An attribute of a class, and the function `(original, owner) -> replacement` that makes its new value.

    `original` is what the class has or inherits, None if nothing; a maker that returns it changes nothing.
    """

    module: str
    owner: str
    name: str
    maker: str


def of_family(family: Family) -> tuple[Patch, ...]:
    """What is replaced of a family of models."""
    modeling, configuration, prefix = family.modeling, family.configuration, family.prefix
    return (
        Patch(modeling, f"{prefix}Model", "forward", "model:model_forward"),
        Patch(modeling, f"{prefix}Attention", "forward", "llama:attention_forward"),
        Patch(modeling, f"{prefix}ForCausalLM", "forward", "model:causal_lm_forward"),
        Patch(modeling, f"{prefix}ForCausalLM", "generate", "_compat:generate"),
        Patch(modeling, f"{prefix}ForCausalLM", "_prepare_cache_for_generation", "_compat:prepare_cache"),
        Patch(modeling, f"{prefix}ForCausalLM", "_prefill_chunking", "_compat:prefill_chunking"),
        Patch(modeling, f"{prefix}PreTrainedModel", "set_attn_implementation", "_compat:set_attn_implementation"),
        Patch(configuration, f"{prefix}Config", "_attn_implementation", "_compat:attn_implementation"),
        Patch(configuration, f"{prefix}Config", "to_dict", "_compat:to_dict"),
    )


TABLE = {
    "llama": (
        *of_family(LLAMA),
        Patch(_TOKENIZER, "BatchEncoding", "shape", "_compat:batch_encoding_shape"),
        # The llama package of meta-llama/llama3, where that is what is imported.
        Patch("llama.model", "Transformer", "__init__", "meta_llama:transformer_init"),
        Patch("llama.model", "Transformer", "forward", "meta_llama:transformer_forward"),
        Patch("llama.generation", "Llama", "build", "meta_llama:build"),
        Patch("llama.generation", "Llama", "generate", "meta_llama:generate"),
    ),
    **{family.name: of_family(family) for family in FAMILIES.values() if family is not LLAMA},
}
"""What is replaced, by what has to be switched on for it; "llama" is on from the start."""


@dataclass
class _Applied:
    patch: Patch
    owner: type
    before: Any  # the class's own attribute, or _NOTHING where it had none
    original: Any
    after: Any


_lock = threading.RLock()
_applied: list[_Applied] = []
_enabled = False
_on = ["llama"]
"""The keys of the table that are switched on."""


def is_enabled() -> bool:
    """Whether the patch is on. Our functions ask, because somebody may hold one of them after it was taken off."""
    return _enabled


def enable(families: str | Iterable[str] = ()) -> None:
    """Makes Llama models use this package; importing it does this. Doing it twice is the same as once.

    Args:
        families: other models to serve from now on, whose attention is Llama's: names out of `families.FAMILIES`, e.g.
            "mistral" or ["qwen2", "qwen3"], or "all". They stay on, also through `disable()` and `enable()`.

    Raises:
        ValueError, TypeError: no such family, or one that this transformers does not have.
    """
    global _enabled
    wanted = [family.name for family in named(families)]
    with _lock:
        _enabled = True
        _on.extend(name for name in wanted if name not in _on)
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        for name in {patch.module for patch in _patches()}:
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                _apply(module)


def _patches() -> list[Patch]:
    return [patch for name in _on for patch in TABLE[name]]


def disable() -> None:
    """Puts everything back as it was, for existing models too. Caches keep their pages, which work with stock code."""
    global _enabled
    with _lock:
        _enabled = False
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        while _applied:
            done = _applied.pop()
            name = done.patch.name
            if done.owner.__dict__.get(name) is not done.after:
                # Somebody else's patch lies over ours. Ours passes everything on from now on.
                warnings.warn(
                    f"llama1m_ext: {done.owner.__name__}.{name} was replaced since, and is left", stacklevel=2
                )
            elif done.before is _NOTHING:
                delattr(done.owner, name)
            else:
                setattr(done.owner, name, done.before)


def patch_model(model: Any) -> int:
    """Makes a model use the patched functions that kept transformers' own before this package was imported.

    accelerate's hooks (`device_map` with several devices or offloading) put a model's forward functions away when they
    are attached, out of reach of a patch of the class. Other models need nothing.

    Args:
        model: a model, or something that holds one.

    Returns:
        How many modules were changed.
    """
    root: Any = model if hasattr(model, "modules") else getattr(model, "model", None)
    if not hasattr(root, "modules"):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    changed = 0
    with _lock:
        forwards = {done.original: done for done in _applied if done.patch.name == "forward"}
        for module in root.modules():
            for name in ("_old_forward", "forward"):
                bound = module.__dict__.get(name)
                done = forwards.get(getattr(bound, "__func__", None))
                if done is not None and isinstance(module, done.owner):
                    module.__dict__[name] = types.MethodType(done.after, module)
                    changed += 1
    return changed


def _apply(module: types.ModuleType) -> None:
    with _lock:
        for patch in _patches():
            owner = getattr(module, patch.owner, None) if patch.module == module.__name__ else None
            if owner is None or any(done.patch is patch and done.owner is owner for done in _applied):
                continue
            where, _, function = patch.maker.partition(":")
            maker = getattr(importlib.import_module(f"{__package__}.{where}"), function)
            original = getattr(owner, patch.name, None)
            after = maker(original, owner)
            if after is original:
                continue
            before = owner.__dict__.get(patch.name, _NOTHING)
            setattr(owner, patch.name, after)
            _applied.append(_Applied(patch, owner, before, original, after))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find our modules, and patches them when they have been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(patch.module == name for patch in _patches()):
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """A module's own loader, and a look at the module when it is done. The module keeps the loader of its own."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if _enabled:
            _apply(module)
