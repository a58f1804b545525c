"""Every difference between the releases of transformers that we support (4.57 to 5.x)."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from . import final_length
from .options import read as read_options

V5 = int(transformers.__version__.split(".")[0]) >= 5
EXPLICIT = "_llama1m_sdpa_by_name"


# -- caches ---------------------------------------------------------------------------------------------------------


@functools.cache
def _crop_takes_length() -> bool:
    from transformers.cache_utils import DynamicLayer

    return "max_length" in inspect.signature(DynamicLayer.crop).parameters


def cropped_length(tokens: int, length: int) -> int:
    """How long a layer of `length` tokens is after `crop(tokens)`.

    Releases with `crop(max_length)` take the new length, or minus the tokens to remove; those with
    `crop(tokens_to_remove)` take only the latter.
    """
    tokens = int(tokens)  # 5.14's assisted decoding has a tensor
    if tokens > 0 and not _crop_takes_length():
        raise ValueError(
            f"crop: expected minus the number of tokens to remove, got {tokens}; transformers "
            f"{transformers.__version__} does not take a length here"
        )
    if tokens < 0:
        return max(0, length + tokens)
    return min(tokens, length) if _crop_takes_length() else length


@functools.cache
def cache_name() -> str:
    """What forwards and outputs call the cache: 5.24 renamed `past_key_values`, and warns of the old name."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fields = inspect.signature(BaseModelOutputWithPast).parameters
    return "cache" if "cache" in fields else "past_key_values"


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, by this release's name for it or by the older one."""
    return given.get(cache_name(), given.get("past_key_values"))


# -- models ---------------------------------------------------------------------------------------------------------


@functools.cache
def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a forward takes by position, without self: their order differs between releases."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)[1:]


def default_rope(rotary: Any, seq_len: int | None) -> tuple[Tensor, float]:
    """(inv_freq, attention_scaling) as the config says, in float32 whatever happened to the buffer since.

    Args:
        rotary: a `LlamaRotaryEmbedding`.
        seq_len: for the types that depend on the length; None at the beginning.
    """
    device = torch.device("cpu")
    with device:  # transformers makes some tensors where torch does by default
        if rotary.rope_type == "default" and hasattr(rotary, "compute_default_rope_parameters"):
            return rotary.compute_default_rope_parameters(rotary.config)  # since 5.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        init = ROPE_INIT_FUNCTIONS[rotary.rope_type]
        return init(rotary.config, device) if seq_len is None else init(rotary.config, device, seq_len=seq_len)


def original_max_len(rotary: Any) -> int:
    """The length beyond which longrope takes its long factors, found as transformers finds it."""
    config = rotary.config
    parameters = getattr(config, "rope_parameters", None)  # since 5.0
    if isinstance(parameters, Mapping) and "original_max_position_embeddings" in parameters:
        return parameters["original_max_position_embeddings"]
    return getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings


def read_rope(config: Any) -> dict[str, Any]:
    """What a config says of the rotation, in 5's words: rope_type, rope_theta, and what that type needs. A copy.

    Raises:
        ValueError: it says nothing, or something else for each type of layer.
    """
    parameters = getattr(config, "rope_parameters", None)  # since 5.0
    if not isinstance(parameters, Mapping):
        parameters = {
            "rope_theta": getattr(config, "rope_theta", None),
            **(getattr(config, "rope_scaling", None) or {}),
        }
    found = {name: value for name, value in parameters.items() if value is not None}
    found.setdefault("rope_type", found.get("type", "default"))
    found.pop("type", None)
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(f"config: expected one rotation for all layers, got {', '.join(map(str, parameters))}")
    if not isinstance(found.get("rope_theta"), (int, float)):
        raise ValueError(f"config: expected rope_theta, a number, got {found.get('rope_theta')!r}")
    return found


def write_rope(config: Any, rope: Mapping[str, Any]) -> None:
    """The opposite of `read_rope`, where this transformers keeps it. `rope_theta` of 4.x is written by 5 as well: 4 doesn't
    see `rope_parameters`, and would rotate what 5 saved by a theta of 10000."""
    theta = float(rope["rope_theta"])
    config.rope_theta = theta
    if V5:
        config.rope_parameters = {**rope, "rope_theta": theta}
    else:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config.rope_scaling = None if scaling == {"rope_type": "default"} else scaling


def renew_rotary(rotary: Any) -> None:
    """Makes a rotary module what its config now says, in place and where it is. Hooks of accelerate's stay on it."""
    with torch.device("cpu"):
        fresh = type(rotary)(rotary.config)
    device = rotary.inv_freq.device
    for name, buffer in fresh._buffers.items():
        rotary.register_buffer(name, None if buffer is None else buffer.to(device), persistent=False)
    for name, value in vars(fresh).items():
        if not name.startswith("_") and name not in ("training", "config"):
            rotary.__dict__[name] = rotary.inv_freq if value is fresh.inv_freq else value


def is_capturing_hook(hook: Any) -> bool:
    """Whether a forward hook is one of those that 5.x installs for output_hidden_states, and leaves there, asleep."""
    return getattr(hook, "__name__", "") == "output_capturing_hook" and hook.__module__.startswith("transformers.")


# -- an attention implementation asked for by name --------------------------------------------------------------------
# "sdpa" is what transformers picks by itself, and it must be told from "sdpa" that somebody wants. What a user asks for
# goes through the setter of `config._attn_implementation` (from_pretrained, from_config and the config's own keyword
# do), or through `set_attn_implementation`; what transformers picks is written past the setter. Configs made before
# this package is imported don't say: they count as not asked for.


def attn_implementation(original: property, owner: type) -> property:
    """The config's property with a setter that remembers a name that was asked for."""
    base = next(c.__dict__["_attn_implementation"] for c in owner.__mro__ if "_attn_implementation" in c.__dict__)

    def remember(self: Any, value: Any) -> None:
        base.fset(self, value)
        mark_explicit(self, value)

    return property(base.fget, remember, base.fdel, base.__doc__)


def mark_explicit(config: Any, value: Any) -> None:
    name = value.get("") if isinstance(value, Mapping) else value
    if name == "sdpa":
        config.__dict__[EXPLICIT] = True
    elif name is not None:
        config.__dict__.pop(EXPLICIT, None)


def to_dict(original: Callable[..., dict[str, Any]], owner: type) -> Callable[..., dict[str, Any]]:
    """The config's `to_dict` without our mark: config.json is none of our business."""

    @functools.wraps(original)
    def without_mark(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = original(self, *args, **kwargs)
        found.pop(EXPLICIT, None)
        return found

    return without_mark


def set_attn_implementation(original: Callable[..., Any], owner: type) -> Callable[..., Any]:
    @functools.wraps(original)
    def remember(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, attn_implementation, *args, **kwargs)
        mark_explicit(self.config, attn_implementation)
        return result

    return remember


# -- the model card's second snippet ------------------------------------------------------------------------------------
# Since 5.0 `apply_chat_template(..., return_tensors="pt")` gives a BatchEncoding where it gave a tensor; the snippet
# hands it to `generate` as it is, and asks for its `.shape`. 4.57 needs neither.


def batch_encoding_shape(original: Any, owner: type) -> Any:
    if not V5 or original is not None:
        return original

    def shape(self: Any) -> torch.Size:
        """Shape of `input_ids`, for code that expects the tensor itself."""
        ids = self.data.get("input_ids")
        if not isinstance(ids, Tensor):
            raise AttributeError("shape")
        return ids.shape

    return property(shape)


def generate(original: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    """`generate` that takes a mapping, where transformers gives one, looks into a `LongCache` that it is given, and lets
    the plan know how long it will be."""

    @functools.wraps(original)
    def generate_from_mapping(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        if V5 and isinstance(inputs, Mapping):
            kwargs = {**inputs, **kwargs}
            inputs = None
        cache = given_cache(kwargs)
        if hasattr(cache, "warn_of_other_tokens"):
            cache.warn_of_other_tokens(kwargs.get("input_ids") if inputs is None else inputs)
        with final_length.generating(self), _ranks(self, kwargs):
            return super(owner, self).generate(inputs, *args, **kwargs)

    return generate_from_mapping


def _ranks(owner: Any, kwargs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """What ranks that share a model do about a `generate`; nothing where it is this process's alone."""
    inner = getattr(owner, "model", None)
    if inner is None or read_options(inner).ring is None:
        return contextlib.nullcontext()
    from .ring import membership

    return membership.generating(owner, kwargs)


def prepare_cache(original: Callable[..., Any] | None, owner: Any) -> Callable[..., Any] | None:
    """Where `generate` makes its cache, it has resolved all that says how long that may get: its arguments, the generation
    config's fields and their defaults, embeddings in the place of ids. Rows are multiplied by then."""
    if original is None or "max_cache_length" not in inspect.signature(original).parameters:
        return original
    signature = inspect.signature(original)

    @functools.wraps(original)
    def with_its_length(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = signature.bind(self, *args, **kwargs).arguments["max_cache_length"]
        if isinstance(tokens, int):
            final_length.note(self, tokens)
        return super(owner, self)._prepare_cache_for_generation(*args, **kwargs)

    return with_its_length


# -- prefill in chunks ----------------------------------------------------------------------------------------------------


def prefill_chunking(original: Callable[..., Any] | None, owner: Any) -> Callable[..., Any] | None:
    """4.57 counts positions in `generate(prefill_chunk_size=...)` as if nothing were padded, and those of the tokens that
    follow from the mask: batches padded on the left get other tokens, and nobody is told. 5 has another function for it."""
    if V5 or original is None:
        return original

    @functools.wraps(original)
    def with_the_mask_s_positions(
        self: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any
    ) -> dict[str, Any]:
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or cache is None or bool(mask.all()):
            return original(self, input_ids, generation_config, **kwargs)
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
        size, end = generation_config.prefill_chunk_size, input_ids.shape[1] - 1  # the last token is generate's
        for a in range(0, end, size):
            b = min(a + size, end)
            self(
                input_ids[:, a:b],
                attention_mask=mask[:, :b],
                position_ids=places[:, a:b],
                cache_position=torch.arange(a, b, device=input_ids.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return {**kwargs, "cache_position": torch.tensor([end], device=input_ids.device)}

    return with_the_mask_s_positions


# -- packed sequences -----------------------------------------------------------------------------------------------------


def keeps_packed_apart() -> bool:
    """Whether transformers makes the mask that packed sequences need: 4.57 with a torch before 2.6 does not, and says
    nothing."""
    from transformers import masking_utils

    return getattr(masking_utils, "_is_torch_greater_or_equal_than_2_6", True)


def packed_mask(position_ids: Tensor, batch: int) -> Tensor:
    """The mask that positions `[batch or 1, n]` mean which begin again with each sequence, bool `[batch, 1, n, n]`."""
    n = position_ids.shape[1]
    number = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1).expand(batch, -1)
    causal = torch.ones(n, n, dtype=torch.bool, device=number.device).tril()
    return ((number[:, :, None] == number[:, None]) & causal)[:, None]


# -- attention of somebody else's -------------------------------------------------------------------------------------------


def foreign_attention(module: Any) -> str | None:
    """Why a model must not be served although it says "sdpa": other people put functions of their own where transformers
    looks for that one, and for its masks.

    Args:
        module: a modeling module, e.g. that of Llama.
    """
    from transformers import masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return "the attention function 'sdpa' is somebody else's"
    if masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not masking_utils.sdpa_mask:
        return "the mask function of 'sdpa' is somebody else's"
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        here = getattr(module, name, None)
        if here is not None and here is not getattr(masking_utils, name):
            return f"{name} is somebody else's"
    return None
