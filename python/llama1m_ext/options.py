"""The options of one model: a dataclass for people, a plain dict on the model.

They live on the `LlamaModel` inside, as builtins, so that they survive `copy.deepcopy` and pickling, and a pickled model
can be loaded where this package is not installed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import families

ATTRIBUTE = "_llama1m_options"


@dataclass(frozen=True)
class Options:
    """How one model is run. Tokens are counted per batch row.

    Attributes:
        chunk: how many queries of a long prompt go through a layer at a time; more takes more memory. `"auto"`: as many
            as half a GiB of activations allows (2 GiB on a GPU), or less where memory is short.
        min_layer_major_len: prompts at least this long are run one layer after the other, in chunks. `"auto"`: those
            longer than one chunk.
        progress: show a progress bar during a long prefill. `"auto"`: from 16384 tokens on.
        page_size: tokens of a page of the KV cache. `"auto"`: one page for the prompt with 6% of room, then pages of an
            eighth of the length.
        kv: the format that the KV cache is kept in: `"model"` (the model's own dtype), `"int8"`, `"fp8"`, `"int4"`, or K and
            V apart, `"int8/int4"` (also `"k8v4"`). The first 64 and the newest tokens always stay in the model's dtype, and a
            prompt's own attention is computed before its keys and values become compact. `"auto"`: the first of
            model, int8, int8/int4 and int4 that fits into memory.
        offload: where pages live that don't fit: `"host"` (main memory, behind a GPU), `"disk"` (a file), None (nowhere: an
            error before the start). `"auto"`: the nearest that has room, where no format fits.
        kv_memory: bytes of memory that the pages of a cache may take where they are computed over (a GPU's, for a model
            there), as an int or "8GiB". `"auto"`: what is free.
        offload_dir: the folder of that file. None: where temporary files go.
        checkpoint: a folder. A long prefill leaves there what it needs to go on after a kill, layer by layer.
        remember: a folder. Prompts read are kept there, and a prompt that begins as a kept one goes on from it.
        remember_bytes: bytes that the kept prompts in that folder may take, as an int or "100GiB"; those not used for the
            longest time are removed for new ones. `"auto"`: half of what is free on the disk and what they take already.
        replace_sdpa: serve the model also where `attn_implementation="sdpa"` was asked for by name (which otherwise
            gets transformers' own sdpa, as any other name does).
        ring: the name of the ranks that share the model, as `distributed` sets it. None: this process alone.

    Raises:
        ValueError, TypeError: a value that makes no sense; the message names it.
    """

    chunk: int | Literal["auto"] = "auto"
    min_layer_major_len: int | Literal["auto"] = "auto"
    progress: bool | Literal["auto"] = "auto"
    page_size: int | Literal["auto"] = "auto"
    kv: str = "auto"
    offload: Literal["auto", "host", "disk"] | None = "auto"
    kv_memory: int | str = "auto"
    offload_dir: str | None = None
    checkpoint: str | None = None
    remember: str | None = None
    remember_bytes: int | str = "auto"
    replace_sdpa: bool = False
    ring: str | None = None

    def __post_init__(self) -> None:
        for name in ("chunk", "min_layer_major_len", "page_size"):
            value = getattr(self, name)
            if value == "auto" and isinstance(value, str):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f'{name}: expected "auto" or an int, got {value!r}')
            if value < 1:
                raise ValueError(f'{name}: expected "auto" or at least 1 token, got {value}')
        if self.kv != "auto":
            from .formats import KvFormat  # imports torch, which importing this package does not

            KvFormat.parse(self.kv)
        if self.offload not in ("auto", "host", "disk", None):
            raise ValueError(f'offload: expected "auto", "host", "disk" or None, got {self.offload!r}')
        for name in ("kv_memory", "remember_bytes"):
            if getattr(self, name) != "auto":
                parse_bytes(name, getattr(self, name))
        for name in ("offload_dir", "checkpoint", "remember"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))  # builtins only: see the module's docstring
            elif not (value is None or isinstance(value, str)):
                raise TypeError(f"{name}: expected a path or None, got {value!r}")
        if not (self.ring is None or isinstance(self.ring, str)):
            raise TypeError(f"ring: expected a name that distributed() made, or None, got {self.ring!r}")
        if not (isinstance(self.progress, bool) or self.progress == "auto"):
            raise TypeError(f'progress: expected "auto", True or False, got {self.progress!r}')
        if not isinstance(self.replace_sdpa, bool):
            raise TypeError(f"replace_sdpa: expected True or False, got {self.replace_sdpa!r}")


DEFAULT = Options()
_UNITS = {"": 1, "b": 1, **{f"{p}{u}": 1024**i for i, p in enumerate("kmgt", 1) for u in ("", "ib")}}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes from an int or from "80GiB" (1024s; also "80G"), "80GB" (1000s), "1.5TiB".

    Raises:
        TypeError, ValueError: something else; `name` is what the message calls it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'{name}: expected bytes as an int or "8GiB", got {value!r}')
    if isinstance(value, int):
        bytes_ = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f'{name}: expected bytes as an int or "8GiB", got {value!r}')
        bytes_ = int(float(match[1]) * _UNITS[match[2].lower()])
    if bytes_ < 1:
        raise ValueError(f"{name}: expected at least 1 byte, got {value!r}")
    return bytes_


def options(model: Any) -> Options:
    """The options of a model (or of a pipeline's model).

    Raises:
        TypeError: there is no Llama of transformers inside.
    """
    return read(llama_models(model)[0])


def set_options(model: Any, **changes: Any) -> Options:
    """Changes some options of a model and returns all of them, e.g. `set_options(model, chunk=4096, progress=False)`.

    Args:
        model: a Llama of transformers, something that wraps one (PEFT, a pipeline), or a part of one.
        changes: fields of `Options`.

    Raises:
        TypeError: no Llama inside, an option that does not exist, or a value of the wrong type.
        ValueError: a value out of range.
    """
    models = llama_models(model)
    known = {field.name for field in dataclasses.fields(Options)}
    for name in changes:
        if name not in known:
            raise TypeError(f"set_options: expected one of {', '.join(sorted(known))}; got {name!r}")
    for inner in models:
        new = dataclasses.replace(read(inner), **changes)
        inner.__dict__[ATTRIBUTE] = dataclasses.asdict(new)
    return read(models[0])


def read(llama_model: Any) -> Options:
    """The options of a `LlamaModel`."""
    stored: Mapping[str, Any] | None = llama_model.__dict__.get(ATTRIBUTE)
    return DEFAULT if stored is None else Options(**stored)


def llama_models(model: Any) -> list[Any]:
    """The `LlamaModel`s (or those of another family that is switched on) inside a model, a wrapper of one, or a pipeline."""
    root: Any = model if hasattr(model, "modules") else getattr(model, "model", None)
    if hasattr(root, "modules"):
        found = [m for m in root.modules() if families.is_model(m)]
        if not found and "llama.model" in sys.modules:
            from . import meta_llama

            faces = [meta_llama.face_of(m) for m in root.modules() if meta_llama.is_transformer(m)]
            found = [face.model for face in faces if face is not None]
        if found:
            return found
        for m in root.modules():
            waiting = families.waiting(m)
            if waiting is not None:
                raise TypeError(
                    f"model: {type(m).__name__} is left to transformers until you say "
                    f'llama1m_ext.enable(families="{waiting.name}")'
                )
    raise TypeError(f"model: expected a Llama of transformers, or something that holds one, got {type(model).__name__}")
