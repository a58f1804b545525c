"""Random ways of calling a Llama, for the differential test: what is drawn, how it becomes arguments, and the one rule of
who serves what."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import llama1m_ext
from conftest import why_no_prefill_chunks
from llama1m_ext import _compat, testing

V5 = int(transformers.__version__.split(".")[0]) >= 5
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}
BY_LENGTH = ("dynamic", "longrope")
"""Their frequencies depend on how much was read at a time: no other way of computing gives the same numbers."""
PADDED = ("left", "right", "both", "holes")
PAD = 258
"""In no prompt, where `generate` would take it for padding."""


@dataclass(frozen=True)
class Scenario:
    """One way of calling a model. Printed by hypothesis when it fails: `Scenario(...)` can be pasted into a test.

    Attributes:
        mode: "forward" (one call), "pieces" (several over one cache), or a way of `generate`.
        length: tokens of the prompt; of the first piece.
        pieces: tokens of the further pieces; negative: so many are cropped off the cache.
        cache: what is given as past_key_values. "default": nothing; "off": use_cache=False.
        mask4: a mask of the user's own, `[batch, 1, length, length]`.
        positions: "shifted": from 7 on; "packed": begin again in the middle; "mask": those that the mask means.
        keep: logits_to_keep; -1: as a tensor of positions.
        more: `max_new_tokens` of generate. again: it is called again, over the same cache, after a crop by `again - 1`.
    """

    seed: int = 0
    mode: str = "forward"
    dtype: str = "f32"
    kv_heads: int = 2
    rope: str = "default"
    eager: bool = False
    batch: int = 1
    length: int = 20
    pieces: tuple[int, ...] = ()
    padding: str = "none"
    mask4: str = "none"
    cache: str = "default"
    positions: str = "default"
    embeds: bool = False
    keep: int = 0
    attentions: bool = False
    hidden: bool = False
    as_tuple: bool = False
    more: int = 4
    again: int = 0
    chunk: int | str = "auto"
    page_size: int | str = "auto"
    min_layer_major_len: int | str = "auto"

    def __repr__(self) -> str:
        changed = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
        return f"Scenario({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @property
    def generates(self) -> bool:
        return self.mode not in ("forward", "pieces")


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "ends": {"eos_token_id": [*range(0, 250, 9)]},
    "sample": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "eos_token_id": [17, 40, 90]},
    "beam samples": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 260},
    "assisted": {"assistant_model": None},  # made with the model
    "prefill_chunk_size": {"prefill_chunk_size": 7},
}


@st.composite
def scenarios(draw: Callable[..., Any]) -> Scenario:
    """Every combination that transformers takes, and some that it refuses."""

    def one(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    chunk, page_size = one("auto", 1, 8, 16), one("auto", 1, 5, 16)
    least = one("auto", "auto", 1, 24)
    edges = sorted(
        {1, 2, 33, 40, *(n + d for n in (chunk, page_size, 2 * 16) if n != "auto" for d in (-1, 0, 1))} - {0}
    )
    base = {"chunk": chunk, "page_size": page_size, "min_layer_major_len": least, "seed": draw(st.integers(0, 10**6))}
    base |= {"kv_heads": one(1, 2, 4), "rope": one("default", "default", *ROPES), "batch": one(1, 1, 2, 3)}
    base |= {"dtype": one("f32", "f32", "bf16", "f16"), "length": one(*edges), "eager": one(*[False] * 15, True)}
    padding = one("none", "none", "ones", "left", *PADDED)
    if base["length"] < {"none": 1, "ones": 1, "left": 2, "right": 2}.get(padding, 4):
        padding = "none"
    kinds = ["default", "DynamicCache", "DynamicCache without config", "LongCache"] * 2 + ["StaticCache", "off"]
    if importlib.util.find_spec("hqq") is not None:
        kinds.append("QuantizedCache")
    mode = one("forward", "forward", "pieces", "generate", "generate", "generate")
    if mode == "forward":
        mask4 = one(*["none"] * 5, "bool", "float") if padding == "none" else "none"
        base |= {
            "padding": padding,
            "mask4": mask4,
            "cache": one(*kinds, *kinds, "off", "off", "tuple"),
            "embeds": one(False, True),
        }
        base |= {"positions": one("default", "default", "explicit", "shifted", "packed", "mask")}
        base |= {"keep": one(0, 0, 1, 3, -1), "attentions": one(*[False] * 9, True), "hidden": one(False, False, True)}
        if base["positions"] == "packed" and not _compat.keeps_packed_apart():
            base["positions"] = "default"  # stock is wrong there: test_silent_errors.py
        if base["positions"] == "packed" and one(True, True, False):  # where packing means something
            base |= {"padding": "none", "mask4": "none", "cache": "off"}
        return Scenario(mode=mode, as_tuple=one(False, False, True), **base)
    if mode == "pieces":
        cache = one(*[kind for kind in kinds if kind not in ("default", "off")])
        pieces = draw(st.lists(st.sampled_from([1, 1, 2, 7, 17, -1, -3]), min_size=1, max_size=4))
        padding = padding if padding in ("none", "ones", "left") else "none"
        return Scenario(mode=mode, padding=padding, cache=cache, pieces=tuple(pieces), keep=one(0, 1), **base)
    mode = one(*[mode for mode in GENERATE if mode != "prefill_chunk_size" or why_no_prefill_chunks() is None])
    if mode in ("lookup", "assisted"):
        base["batch"] = 1
        padding = padding if padding in ("ones", "left") else "none"
    if mode == "prefill_chunk_size" and not V5:
        padding = "none"  # 4.57's own is wrong with a mask: facts of its own, tested elsewhere
    base |= {"padding": padding, "cache": one(*kinds), "more": one(1, 2, 5), "hidden": one(False, False, False, True)}
    simple = mode in ("greedy", "sample") and padding in ("none", "ones", "left")
    if not simple or base["rope"] in BY_LENGTH:
        base["dtype"] = "f32"  # what is compared there: the tokens
    if mode in ("greedy", "sample", "beams") and padding in ("none", "left"):
        base["embeds"] = one(False, False, True)
        if base["embeds"]:
            base["dtype"] = "f32"
    if simple and base["cache"] not in ("default", "off") and not base.get("embeds"):
        base["again"] = one(0, 1, 3)
    return Scenario(mode=mode, **base)


# -- from a scenario to a model and its arguments ---------------------------------------------------------------------


@functools.cache
def model_of(dtype: str, kv_heads: int, rope: str, eager: bool, layers: int = 2) -> Any:
    """A tiny model; one for all scenarios that agree in these."""
    # Beyond the first 32 or 64 tokens the scaled types do what they are for.
    changes: dict[str, Any] = {
        "max_position_embeddings": 128 if "original_max_position_embeddings" in ROPES[rope] else 32
    }
    parameters = {"rope_type": rope, **ROPES[rope]}
    if V5:
        changes |= {"rope_parameters": {**parameters, "rope_theta": 10_000.0}}
    elif rope != "default":
        changes |= {"rope_scaling": parameters}
    # Layers of few weights in f16: products of 64 summands stay far from its range.
    model = testing.tiny_model(
        kv_heads, DTYPES[dtype], num_key_value_heads=kv_heads, num_hidden_layers=layers, rope_theta=10_000.0, **changes
    )
    if eager:
        model.set_attn_implementation("eager")
    return model


def model_for(s: Scenario) -> Any:
    return model_of(s.dtype, s.kv_heads, s.rope, s.eager)


def mask_of(s: Scenario) -> Tensor | None:
    """The 2-D mask of the prompt, int64 `[batch, length]`."""
    if s.padding == "none":
        return None
    mask = torch.ones(s.batch, s.length, dtype=torch.long)
    generator = torch.Generator().manual_seed(s.seed)
    for row in range(s.batch):
        # The first row is padded, the others perhaps; each keeps a token.
        most = max(1, (s.length - 2) // 2)
        a, b = torch.randint(1 if row == 0 else 0, most + 1, (2,), generator=generator).tolist()
        if s.padding in ("left", "both"):
            mask[row, :a] = 0
        if s.padding in ("right", "both"):
            mask[row, s.length - b :] = 0
        if s.padding == "holes" and row == 0:
            mask[row, 1 : 1 + b] = 0
    return mask


def visible(s: Scenario) -> Tensor:
    """Positions of the prompt whose results mean something, bool `[batch, length]`."""
    mask = mask_of(s)
    return torch.ones(s.batch, s.length, dtype=torch.bool) if mask is None else mask.bool()


def mask4_of(s: Scenario) -> Tensor:
    """The causal mask, less a random tenth of the keys, bool or added; each query sees itself."""
    n = s.length
    hidden = torch.rand(s.batch, 1, n, n, generator=torch.Generator().manual_seed(s.seed)) < 0.1
    seen = torch.ones(n, n, dtype=torch.bool).tril() & (~hidden | torch.eye(n, dtype=torch.bool))
    if s.mask4 == "bool":
        return seen
    dtype = DTYPES[s.dtype]
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


def positions_of(s: Scenario) -> Tensor | None:
    """int64 `[batch, length]`."""
    places = torch.arange(s.length).expand(s.batch, -1)
    if s.positions == "default":
        return None
    if s.positions == "shifted":
        places = places + 7
    elif s.positions == "packed":
        places = places % max(1, s.length // 2)
    elif s.positions == "mask":
        mask = mask_of(s)
        places = places if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    return places


def cache_of(s: Scenario, model: Any) -> Any:
    """An empty cache of the kind, or None."""
    if s.cache == "QuantizedCache":
        return transformers.QuantizedCache(
            "hqq", model.config, q_group_size=16, axis_key=1, axis_value=1, residual_length=8
        )
    return {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "DynamicCache without config": lambda: DynamicCache(),
        "LongCache": lambda: llama1m_ext.LongCache(config=model.config),
        "StaticCache": lambda: StaticCache(config=model.config, max_cache_len=160),
        "tuple": lambda: tuple((torch.zeros(s.batch, s.kv_heads, 0, 16),) * 2 for _ in range(2)),
    }.get(s.cache, lambda: None)()


def ids_of(s: Scenario, n: int, more: int = 0) -> Tensor:
    """int64 `[batch, n]`; lookup finds something to look up."""
    if s.mode == "lookup":
        return torch.arange(n).remainder(5).mul(7).add(s.seed % 50).expand(s.batch, -1)
    return testing.random_ids(s.batch, n, s.seed + more)


def keep_of(s: Scenario) -> int | Tensor:
    return s.keep if s.keep >= 0 else torch.arange(0, s.length, 2)


# -- who serves what ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """`served`: our kernel must have computed some calls. `reasons`: some must have taken the stock path, for one of
    these; empty: none may have. `layer_major`: prefills that ran layer by layer, None: not counted here."""

    served: bool
    reasons: frozenset[str]
    layer_major: int | None


def expected(s: Scenario) -> Expected:
    """The rule. Whatever concerns all calls leaves nothing to us; a mask with holes does so from where it has them."""
    always = set()
    if s.eager:
        always.add("attn_implementation='eager'")
    if s.cache in ("StaticCache", "QuantizedCache", "tuple"):
        always.add(f"the cache is a {s.cache}")
    if s.attentions:
        always.add("output_attentions")
    if s.mask4 != "none":
        always.add("attention_mask is not 2-D")
    first = GENERATE.get(s.mode, {}).get("prefill_chunk_size", s.length)
    if s.padding == "holes" and has_holes(mask_of(s)[:, :first]):  # type: ignore[index]
        always.add("attention_mask has holes")
    if s.positions == "packed" and s.cache == "off" and s.padding == "none" and s.length > 1:
        jumps = positions_of(s).diff(dim=-1) != 1  # type: ignore[union-attr]
        if s.mask4 == "none" and jumps.any():
            always.add("position_ids are packed sequences")
    if always:
        return Expected(False, frozenset(always), 0)
    later = set()
    if s.padding == "holes" or (s.generates and s.padding in ("right", "both") and (s.more > 1 or s.again)):
        later.add("attention_mask has holes")  # the new tokens stand behind the padding, further chunks behind the hole
    return Expected(True, frozenset(later), None if s.generates else layer_majors(s))


def has_holes(mask: Tensor) -> bool:
    """Whether a row of `[batch, n]` hides keys between visible ones."""
    return any("10" in "".join(map(str, row)).strip("0") for row in mask.tolist())


def layer_majors(s: Scenario) -> int:
    """How many of the calls of a "forward" or "pieces" run layer by layer."""
    if s.hidden:
        return 0
    least = s.min_layer_major_len if s.min_layer_major_len != "auto" else s.chunk + 1 if s.chunk != "auto" else 10**9
    return sum(n > 1 and n >= least for n in (s.length, *s.pieces))
