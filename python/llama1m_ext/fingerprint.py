"""Which model made keys and values: all that they depend on, in a few words."""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import weights
from .stored import as_bytes, checksums
from .weights import STOCK, Far

_CONFIG = (
    "model_type",
    "vocab_size",
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
_OF_FAMILIES = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers")
"""Likewise, where a config has them: in what the families differ."""
# Attributes of transformers' own modules that decide what they compute; all plain ones of other modules count, but those
# of torch's that have no bearing on results outside of training.
_ATTRIBUTES = ("scaling", "variance_epsilon", "attention_scaling", "rope_type", "sliding_window", "use_rope")
_OF_TORCH = ("torch.nn.modules.", "transformers.activations")
_TRAINING = ("training", "inplace", "p")
_RUNS, _RUN = 16, 64 << 10
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Identity:
    """What keys and values depend on, beside the tokens.

    Attributes:
        config: shapes, activation, epsilon.
        rope: theta, scaling, and the frequencies that follow from them.
        modules: their types, what decides how foreign ones compute (an adapter that is switched off), and the names of what
            was put around or in the place of their forward.
        dtype: of the weights.
        weights: every bit of them.
    """

    config: dict[str, Any]
    rope: dict[str, Any]
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
        if not isinstance(entry, dict) or entry.keys() != set(cls.__dataclass_fields__):
            raise ValueError(f"model: expected {', '.join(cls.__dataclass_fields__)}, got {entry!r:.80}")
        for name, value in entry.items():
            if not isinstance(value, dict if name in ("config", "rope") else str):
                raise ValueError(f"model: {name}: expected something else, got {value!r:.80}")
        frequencies = entry["rope"].get("inv_freq")
        numbers: list[Any] = [None]
        if isinstance(frequencies, list):
            numbers = [*frequencies, entry["rope"].get("attention_scaling")]
        # NaN is not between, nor what no float holds.
        if not all(type(x) in (int, float) and -1e300 < x < 1e300 for x in numbers):
            raise ValueError(f"model: rope: expected frequencies, got {frequencies!r:.80}")
        return cls(**entry)

    def difference(self, other: Identity) -> list[str]:
        """In words how another model differs from this one, field by field; empty if it doesn't."""
        found = _differences(self.config, other.config)
        if not _same_rope(self.rope, other.rope):
            found += _differences(self.rope, other.rope)
        for name, of in (
            ("dtype", "dtype of the weights"),
            ("modules", "the modules (an adapter, a hook?)"),
            ("weights", "the weights"),
        ):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{of}: expected {getattr(self, name)}, this model has {getattr(other, name)}")
        return found


def identity(model: Any) -> Identity:
    """The identity of a `LlamaModel` as it is now.

    All weights are read once for each model object: two models may differ in a few rows only. After that, 16 runs of
    64 KiB of each tensor are read each time, which takes some 20 ms for a model of 8B: whoever changes weights in
    place behind torch's back (`.data`) leaves no trace but that. Of weights in files, which accelerate's hooks bring,
    the files' times are looked at.

    Raises:
        ValueError: weights that are nowhere, or that can't be compared.
    """
    found = {name: (module, at, weight) for name, module, at, weight in weights.parts(model) if "inv_freq" not in name}
    for name, (_, _, weight) in found.items():
        if isinstance(weight, Tensor) and weight.device.type == "meta":
            raise ValueError(f"model: expected weights in memory, but {name} is not")
    memory = [tensor for module, at, weight in found.values() for tensor in _near(module, at, weight)]
    files = {weight.file() for _, _, weight in found.values() if isinstance(weight, Far)} - {None}
    state = (
        *zip(map(_state, memory), checksums(map(_sample, memory)), strict=True),
        *((file, _stamp(str(file))) for file in sorted(files, key=str)),
    )
    before, digits = _known.get(model, ((), ""))
    if before != state:
        digest = hashlib.blake2b(digest_size=16)
        lines: list[str] = []

        def all_of_them() -> Iterator[Tensor]:
            for name in sorted(found):
                module, at, weight = found[name]
                now = weight.load() if isinstance(weight, Far) else weight
                said = weights.words(now)
                for part, tensor in weights.canonical(module, at, now):
                    lines.append(f"{name.removesuffix(at)}{part} {said}{tensor.dtype} {tuple(tensor.shape)}")
                    yield _memory(tensor)

        for total, line in zip(checksums(all_of_them()), lines, strict=True):
            digest.update(f"{line} {total:016x}\n".encode())
        digits = digest.hexdigest()
        _known[model] = state, digits
    dtypes = {(weight.empty if isinstance(weight, Far) else weight).dtype for _, _, weight in found.values()}
    return Identity(
        config={
            **{name: _plain(getattr(model.config, name, None)) for name in _CONFIG},
            **{name: _plain(getattr(model.config, name)) for name in _OF_FAMILIES if hasattr(model.config, name)},
        },
        rope=_rope(model),
        modules=_modules(model),
        dtype=" ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        weights=digits,
    )


def _near(module: Any, at: str, weight: Tensor | Far) -> list[Tensor]:
    """Tensors in memory that hold a weight: none, where it is in a file."""
    if isinstance(weight, Far):
        if weight.file() is not None:
            return []
        weight = weight.load()
    return [tensor for _, tensor in weights.tensors(module, at, weight)]


def _stamp(file: str) -> tuple[int, ...]:
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def fingerprint(model: Any) -> str:
    """The identity of a `LlamaModel` in 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(identity(model).as_dict(), sort_keys=True).encode(), digest_size=16).hexdigest()


_known: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()
"""For each model the state of its tensors when all weights were read, and what came of it."""


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Something that changes when torch writes to a tensor, or another one takes its place."""
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _memory(tensor: Tensor) -> Tensor:
    return _bytes_of(tensor).cpu()


def _bytes_of(tensor: Tensor) -> Tensor:
    """Its elements in order, uint8 `[nbytes]`, where they are."""
    tensor = tensor.detach()
    if type(tensor) is not Tensor:
        tensor = tensor.as_subclass(Tensor)
    return as_bytes(tensor.contiguous())


def _sample(tensor: Tensor) -> Tensor:
    """The bytes that are looked at each time. From a GPU only these come."""
    memory = _bytes_of(tensor)
    if memory.numel() > _RUNS * _RUN:
        last = memory.numel() - _RUN
        memory = torch.cat([memory[a : a + _RUN] for a in (last * i // (_RUNS - 1) for i in range(_RUNS))])
    return memory.cpu()


def _rope(model: Any) -> dict[str, Any]:
    from .rope import frequencies  # which needs transformers' Llama: a file's header can be read without

    rotary = model.rotary_emb
    words = getattr(rotary.config, "rope_parameters", None)  # since 5.0
    if not isinstance(words, Mapping):
        words = {
            "rope_theta": getattr(rotary.config, "rope_theta", None),
            **(getattr(rotary.config, "rope_scaling", None) or {}),
        }
    found = {"rope_type" if key == "type" else key: _plain(value) for key, value in words.items() if value is not None}
    found["rope_type"] = str(getattr(rotary, "rope_type", "?"))
    if _depends_on_length(found):
        found["max_position_embeddings"] = getattr(rotary.config, "max_position_embeddings", None)
    now = frequencies(rotary, torch.zeros((1, 1), dtype=torch.long, device=rotary.inv_freq.device))
    inv_freq, scaling = (rotary.inv_freq, 0.0) if now is None else now
    found["module"] = type(rotary).__qualname__
    return {**found, "inv_freq": inv_freq.detach().cpu().tolist(), "attention_scaling": float(scaling)}


def _depends_on_length(rope: Mapping[str, Any]) -> bool:
    kind = str(rope.get("rope_type"))
    return "dynamic" in kind or kind == "longrope"


def _same_rope(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether positions are rotated alike: powers of theta may differ in their last bits between machines."""
    exact = ["rope_type", "module"]
    if _depends_on_length(a):
        exact = [name for name in {*a, *b} if name not in ("inv_freq", "attention_scaling")]
    numbers = [[*x["inv_freq"], x["attention_scaling"]] for x in (a, b)]
    return (
        all(a.get(name) == b.get(name) for name in exact)
        and len(numbers[0]) == len(numbers[1])
        and all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip(*numbers, strict=True))
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: expected {_short(a.get(name))}, this model has {_short(b.get(name))}"
        for name in sorted({*a, *b}, key=str)
        if a.get(name) != b.get(name)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _modules(model: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, module in model.named_modules():
        where, words = _words(module)
        digest.update(f"{name} {where} {json.dumps(words, sort_keys=True)}\n".encode())
        for around in _around(name, module):
            digest.update(f"{name} {around}\n".encode())
    return digest.hexdigest()


def _words(module: Any) -> tuple[str, dict[str, Any]]:
    """A module's class, and its attributes that decide what it computes."""
    kind = type(module)
    where = f"{kind.__module__}.{kind.__qualname__}"
    attributes = vars(module)
    if where.startswith(_OF_TORCH):
        found = {key: x for key, x in attributes.items() if key not in _TRAINING and not key.startswith("_")}
    elif where.startswith(STOCK):
        found = {key: attributes[key] for key in _ATTRIBUTES if key in attributes}
    else:
        found = {
            key: value for key, value in attributes.items() if key != "training" and not key.startswith("_llama1m")
        }
    words = ((key, _plain(value)) for key, value in found.items())
    return where, {key: value for key, value in words if value is not None}


def _around(name: str, module: Any) -> Iterator[str]:
    """Names of functions that may change what a module computes: hooks, and a forward of its own. What they do can't be
    told: another one of the same name is taken for the same."""
    from . import _compat
    from .call import own_forward  # which needs transformers

    for hook in module._forward_pre_hooks.values():
        yield f"before {_name(hook)}"
    if name:  # the model's own result is no key and no value
        for hook in module._forward_hooks.values():
            if not _compat.is_capturing_hook(hook):
                yield f"after {_name(hook)}"
    if "_hf_hook" not in vars(module) or weights.hooks_of(module) is None:
        forward = own_forward(module)
        if forward is not None:
            yield f"forward {_name(forward)}"


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


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


# -- whether a model is still what it was ------------------------------------------------------------------------------

_Look = dict[str, tuple[Any, ...]]


class Trace:
    """What a model was at some moment, without reading its weights: that nobody wrote to them since by torch's means, or
    put others in their place; and its modules, adapters and rotation. Weights that hooks bring for each call are left
    out, and so is what is written behind torch's back (`.data`): only `identity` sees that.

    Args:
        model: a `LlamaModel`.
    """

    def __init__(self, model: Any) -> None:
        self._rest = _look(model, _beside(model))
        self._layers = [_look(model, [(f"layers.{i}", layer)]) for i, layer in enumerate(model.layers)]

    def change(self, model: Any) -> str | None:
        """In words, the first thing that is not as it was; None: there is none."""
        if len(model.layers) != len(self._layers):
            return f"it had {len(self._layers)} layers, and has {len(model.layers)}"
        for i in range(len(self._layers)):
            found = self.change_of_layer(model, i)
            if found:
                return found
        now = _look(model, _beside(model))
        before, self._rest = self._rest, now
        return _changed(before, now)

    def change_of_layer(self, model: Any, i: int) -> str | None:
        """Likewise, of one layer alone; they are counted around."""
        if not self._layers:
            return None
        i %= len(self._layers)
        if i >= len(model.layers):
            return f"it had {len(self._layers)} layers, and has {len(model.layers)}"
        now = _look(model, [(f"layers.{i}", model.layers[i])])
        before, self._layers[i] = self._layers[i], now
        return _changed(before, now)


def _beside(model: Any) -> list[tuple[str, Any]]:
    """The parts of a model beside its layers that keys and values depend on."""
    return [(name, part) for name, part in model.named_children() if name not in ("layers", "norm")]


def _look(model: Any, tops: list[tuple[str, Any]]) -> _Look:
    found: _Look = {}
    for at, top in tops:
        for inner, module in top.named_modules():
            name = f"{at}.{inner}" if inner else at
            where, words = _words(module)
            held = [*module._parameters.items(), *module._buffers.items()]
            if not where.startswith(STOCK):
                held += weights._loose(module)
            found[name] = (where, words, list(_around(name, module)))
            for key, weight in held:
                moves = "inv_freq" in key and _depends_on_length({"rope_type": getattr(module, "rope_type", "")})
                if weight is not None and weight.device.type != "meta" and not moves:
                    for part, tensor in weights.tensors(module, key, weight):
                        found[f"{name}.{part}"] = (*_state(tensor), tensor.device)
    return found


def _changed(before: _Look, now: _Look) -> str | None:
    if before == now:
        return None
    for name in {**before, **now}:
        a, b = before.get(name), now.get(name)
        # To another device the same tensor goes with other memory.
        same = a is not None and b is not None and len(a) == len(b) == 7 and a[6] != b[6] and _but(a) == _but(b)
        if a != b and not same:
            return name
    return None


def _but(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a tensor's state, what stays when it goes to another device."""
    return (state[0], *state[2:5])
