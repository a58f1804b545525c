"""`extend`: a loaded model and its config are given a longer context, in place, as stock transformers will read it again.

Whatever was extended keeps in its config what it was before, so that a second stage follows from the original theta and
length, as the laws want it, and not from the first stage's.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .families import FAMILIES, Family
from .theta import ALPHA, LAWS, real, theta_for, whole

DEFAULT = "critical-base"
YARN = "yarn"
GIVEN = "theta"
RECORD = "llama1m_extension"
"""Where a config keeps what it was extended from. transformers keeps and saves it, and reads nothing from it."""
_FIELDS = ("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", RECORD)
_SCALED_BY_THETA = ("default", "linear", "llama3")
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Extension:
    """What `extend` did.

    Attributes:
        method: the law, "yarn", or "theta": it was given.
        max_len: the context now, in tokens (`max_position_embeddings`).
        theta: now.
        rope_type: now, as transformers calls it.
        old_max_len, old_theta: as they were just before.
        original_max_len, original_theta: as they were before any extension; what the law started from.
        factor: of YaRN, `max_len` over the length that it stretches; 1 for all else.
        attention_factor: by which cos and sin are multiplied; 1 without scaling.
    """

    method: str
    max_len: int
    theta: float
    rope_type: str
    old_max_len: int
    old_theta: float
    original_max_len: int
    original_theta: float
    factor: float = 1.0
    attention_factor: float = 1.0

    def __str__(self) -> str:
        yarn = f", factor {self.factor:g}, attention factor {self.attention_factor:.6g}" if self.method == YARN else ""
        return (
            f"{self.method}: {self.old_max_len} -> {self.max_len} tokens, theta {self.old_theta:.0f} -> {self.theta:.0f}"
            f"{yarn} (originally {self.original_max_len} tokens, theta {self.original_theta:.0f})"
        )


def extend(
    model: Any,
    max_len: int,
    *,
    method: str | None = None,
    theta: float | None = None,
    original_max_len: int | None = None,
    original_theta: float | None = None,
    factor: float = ALPHA,
) -> Extension:
    """Gives a loaded model a context of `max_len` tokens: its rotary module and its config, in place.

    Weights stay as they are; without training at that length a model makes more or less of it. What `save_pretrained`
    writes afterwards loads in stock transformers with the same rotation. Caches filled before hold keys of the old
    rotation: throw them away.

    A model that was extended before is extended from what it was originally, also after saving and loading: stages of a
    progressive training are one call each, and a shorter length than the last is no error. If somebody changed the
    config's theta or length in between, that counts as the original.

    Args:
        model: a Llama of transformers, or a model of another family of `llama1m_ext.enable` (switched on or not), or
            something that holds one (PEFT, a pipeline, `torch.compile`).
        max_len: tokens, at least the original length.
        method: a law of `llama1m_ext.rope.theta_for` ("critical-base", "gradient-v1", "ntk", "dynamic"), or "yarn"
            (arXiv 2309.00071): theta stays, slow pairs are interpolated by `max_len / original length`, fast ones are not,
            and cos and sin are multiplied by `0.1 ln(factor) + 1`. Default: "critical-base".
        theta: instead of a method.
        original_max_len: for how many tokens the model was trained, where its config says something else
            (`max_position_embeddings`).
        original_theta: the theta that it was trained with, likewise.
        factor: of the method "dynamic".

    The laws hold for frequencies that are not scaled (`rope_type` "default"). A model with scaled ones is served like this:
    Llama 3.1's scaling ("llama3") and "linear" stay as they are under a theta that is given; "yarn" takes the place of "llama3"
    (stretching its 8192 tokens, with its frequency factors as YaRN's betas: the recipe of arXiv 2504.06214) and of another
    "yarn" (whose betas it keeps). Everything else is refused.

    Returns:
        What was done.

    Raises:
        TypeError: no such model inside, or an argument of the wrong type.
        ValueError: a method that doesn't exist, or not for this model's rotation; a length below the original; a value that
            makes no sense. The model is as it was then.
    """
    inners = inner_models(model)
    made = [_decide(inner, max_len, method, theta, original_max_len, original_theta, factor) for inner in inners]
    for inner, (extension, rope, record) in zip(inners, made, strict=True):
        _apply(inner, _configs(model, inner), extension.max_len, rope, record)
    return made[0][0]


@contextlib.contextmanager
def extended(model: Any, max_len: int, **how: Any) -> Iterator[Extension]:
    """`extend`, with the same arguments, for the time of a `with`: to the last bit as before afterwards, whatever happens.

    Not for two threads at a time, and the model must not be moved to another device meanwhile.
    """
    before = [(inner.rotary_emb, _Kept(inner.rotary_emb, _configs(model, inner))) for inner in inner_models(model)]
    try:
        yield extend(model, max_len, **how)
    finally:
        for rotary, kept in before:
            kept.put_back(rotary)


def inner_models(model: Any) -> list[Any]:
    """The `LlamaModel`s (or those of another family) inside a model, a wrapper of one, or a pipeline.

    Raises:
        TypeError: there is none, or its rotary module is somebody else's.
        ValueError: accelerate has put its frequencies elsewhere.
    """
    root: Any = model if hasattr(model, "modules") else getattr(model, "model", None)
    found = [m for m in root.modules() if _family(m) is not None] if hasattr(root, "modules") else []
    if not found:
        raise TypeError(
            f"model: expected a model of transformers of one of these families: {', '.join(FAMILIES)}, or something that "
            f"holds one; got {type(model).__name__}"
        )
    for inner in found:
        rotary: Any = getattr(inner, "rotary_emb", None)
        family = _family(inner)
        assert family is not None
        wanted = f"{family.prefix}RotaryEmbedding"
        if (type(rotary).__module__, type(rotary).__name__) != (family.modeling, wanted):
            raise TypeError(f"model: expected transformers' {wanted} in it, got {type(rotary).__name__}")
        if rotary.inv_freq.device.type == "meta" and hasattr(rotary, "_hf_hook"):
            raise ValueError(
                "model: expected rotary frequencies in memory, but accelerate keeps them elsewhere (offload_buffers=True): "
                "extend it before it is dispatched"
            )
    return found


def _family(module: Any) -> Family | None:
    """By the names of its classes: neither transformers nor our patches are needed to ask."""
    for c in type(module).__mro__:
        for family in FAMILIES.values():
            if c.__name__ == f"{family.prefix}Model" and c.__module__ == family.modeling:
                return family
    return None


def _configs(root: Any, inner: Any) -> list[Any]:
    """Every config object around an inner model that speaks of it: wrappers may have copies."""
    root = root if hasattr(root, "modules") else root.model
    candidates = [inner.config, inner.rotary_emb.config]
    candidates += [m.config for m in inner.modules() if hasattr(m, "config")]
    candidates += [m.config for m in root.modules() if hasattr(m, "config") and any(x is inner for x in m.modules())]
    return list({id(c): c for c in candidates if type(c) is type(inner.config)}.values())


def original(inner: Any) -> tuple[int, dict[str, Any]]:
    """(length, rope) of an inner model as they were before any extension; rope in the words of `_compat.read_rope`.

    Raises:
        ValueError: a config that doesn't say them.
    """
    from . import _compat

    config = inner.config
    rope = _compat.read_rope(config)
    max_len = getattr(config, "max_position_embeddings", None)
    if not isinstance(max_len, int) or max_len < 1:
        raise ValueError(f"config: expected max_position_embeddings, a number of tokens, got {max_len!r}")
    record = getattr(config, RECORD, None)
    if isinstance(record, Mapping) and record.get("to") == {"max_len": max_len, "rope": rope}:
        first = record.get("from")
        if (
            isinstance(first, Mapping)
            and isinstance(first.get("rope"), Mapping)
            and isinstance(first.get("max_len"), int)
        ):
            return first["max_len"], dict(first["rope"])
    return max_len, rope


def _decide(
    inner: Any,
    max_len: int,
    method: str | None,
    theta: float | None,
    original_max_len: int | None,
    original_theta: float | None,
    factor: float,
) -> tuple[Extension, dict[str, Any], dict[str, Any]]:
    """What is to be done, the new rope, and the record for the config; nothing is changed."""
    from . import _compat

    max_len = whole("max_len", max_len)
    if theta is not None and method is not None:
        raise ValueError(f"extend: expected a method or a theta, got method={method!r} and theta={theta!r}")
    if method is not None and method != YARN and method not in LAWS:
        raise ValueError(f"method: expected one of {', '.join([*LAWS, YARN])}; got {method!r}")
    old = _compat.read_rope(inner.config)
    first_len, first = original(inner)
    if original_max_len is not None:
        first_len = whole("original_max_len", original_max_len)
        if first_len < 1:
            raise ValueError(f"original_max_len: expected a number of tokens, got {original_max_len!r}")
    if original_theta is not None:
        first["rope_theta"] = real("original_theta", original_theta)
        if first["rope_theta"] <= 1:
            raise ValueError(f"original_theta: expected more than 1, got {original_theta!r}")
    if max_len < first_len:
        raise ValueError(
            f"max_len: expected at least the {first_len} tokens that the model had originally, got {max_len}"
        )
    kind, rope, stretch, attention = first["rope_type"], dict(first), 1.0, 1.0
    if theta is not None:
        if kind not in _SCALED_BY_THETA:
            raise ValueError(_refusal("theta", f"one of {', '.join(_SCALED_BY_THETA)}", first))
        method, rope["rope_theta"] = GIVEN, real("theta", theta)
        if rope["rope_theta"] <= 1:
            raise ValueError(f"theta: expected more than 1, got {theta!r}")
    elif method == YARN:
        rope = _yarn(first, first_len, max_len)
        stretch, attention = rope["factor"], rope.get("attention_factor", attention)
    else:
        method = method or DEFAULT
        if kind != "default":
            more = f'; theta=... and method="{YARN}" are for such models' if kind == "llama3" else ""
            raise ValueError(
                _refusal(method, "default (the laws hold for frequencies that are not scaled)", first) + more
            )
        rope["rope_theta"] = float(
            theta_for(
                max_len,
                method=method,
                theta=first["rope_theta"],
                original_max_len=first_len,
                head_dim=2 * inner.rotary_emb.inv_freq.numel(),
                factor=factor,
            )
        )
    extension = Extension(
        method,
        max_len,
        rope["rope_theta"],
        rope["rope_type"],
        inner.config.max_position_embeddings,
        float(old["rope_theta"]),
        first_len,
        float(first["rope_theta"]),
        stretch,
        attention,
    )
    record = {
        "method": method,
        "from": {"max_len": first_len, "rope": first},
        "to": {"max_len": max_len, "rope": rope},
    }
    return extension, rope, record


def _refusal(method: str, expected: str, rope: Mapping[str, Any]) -> str:
    return f"{method}: expected a model of rope_type {expected}; got {rope}"


def _yarn(first: Mapping[str, Any], first_len: int, max_len: int) -> dict[str, Any]:
    """rope of YaRN, in transformers' words."""
    kind = first["rope_type"]
    if kind not in ("default", "llama3", YARN):
        raise ValueError(_refusal(YARN, f"default, llama3 or {YARN}", first))
    rope: dict[str, Any] = {"rope_type": YARN, "rope_theta": first["rope_theta"]}
    if kind == "default":
        short, betas = first_len, (_BETA_FAST, _BETA_SLOW)
    elif kind == "llama3":
        short, betas = first["original_max_position_embeddings"], (first["high_freq_factor"], first["low_freq_factor"])
    else:
        short = first.get("original_max_position_embeddings", first_len)
        betas = first.get("beta_fast", _BETA_FAST), first.get("beta_slow", _BETA_SLOW)
    for name in ("partial_rotary_factor", "mscale", "mscale_all_dim", "truncate"):
        if name in first:
            rope[name] = first[name]
    # As floats: transformers 4.57 warns of anything else.
    rope |= {"factor": max_len / short, "beta_fast": float(betas[0]), "beta_slow": float(betas[1])}
    rope["original_max_position_embeddings"] = short
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):  # from which transformers has another attention factor
        rope["attention_factor"] = 0.1 * math.log(rope["factor"]) + 1.0
    return rope


def _apply(inner: Any, configs: list[Any], max_len: int, rope: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    from . import _compat
    from .rope import ATTRIBUTE

    kept = _Kept(inner.rotary_emb, configs)
    try:
        for config in configs:
            config.max_position_embeddings = max_len
            _compat.write_rope(config, copy.deepcopy(dict(rope)))
            setattr(config, RECORD, copy.deepcopy(dict(record)))
        _compat.renew_rotary(inner.rotary_emb)
        inner.rotary_emb.__dict__.pop(ATTRIBUTE, None)
    except BaseException:
        kept.put_back(inner.rotary_emb)
        raise


class _Kept:
    """What `extend` changes of a rotary module and configs, as it was. Hooks and our options are not touched."""

    def __init__(self, rotary: Any, configs: list[Any]) -> None:
        self._buffers = dict(rotary._buffers)
        self._attributes = {name: value for name, value in vars(rotary).items() if not name.startswith("_")}
        self._configs = [
            (config, {name: copy.deepcopy(vars(config)[name]) for name in _FIELDS if name in vars(config)})
            for config in configs
        ]

    def put_back(self, rotary: Any) -> None:
        from .rope import ATTRIBUTE

        rotary._buffers.clear()
        rotary._buffers.update(self._buffers)
        for name in [name for name in vars(rotary) if not name.startswith("_") and name not in self._attributes]:
            del rotary.__dict__[name]
        rotary.__dict__.update(self._attributes)
        rotary.__dict__.pop(ATTRIBUTE, None)
        for config, fields in self._configs:
            for name in _FIELDS:
                config.__dict__.pop(name, None)
            config.__dict__.update(fields)
