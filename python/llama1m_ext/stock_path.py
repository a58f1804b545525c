"""The stock path, which a call takes that we can't serve exactly: who is told, and whether memory holds what it makes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import _compat
from .memory import available_bytes, free_bytes
from .stats import count

SMALL = 64 << 20
"""Bytes that nobody has to ask about."""
# An implementation that was asked for by name, training, and what transformers itself refuses: no warning for these.
_EXPECTED = ("attn_implementation", "gradients", "training", "tracing", "an empty", "input_ids")


def take(model: Any, reason: str, given: Mapping[str, Any]) -> None:
    """A call of a model is about to take the stock path.

    Args:
        model: a `LlamaModel`.
        given: its forward's arguments by name.

    Raises:
        ValueError: memory does not hold the matrix that it would make.
    """
    check_room(model, reason, given)
    tell(model, reason, len(model.layers))


def repaired(model: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments with which transformers keeps packed sequences apart, where it would not; None: as they are."""
    places, source = given.get("position_ids"), given.get("input_ids")
    source = given.get("inputs_embeds") if source is None else source
    if _compat.keeps_packed_apart() or model.config._attn_implementation != "sdpa":
        return None
    use_cache = given.get("use_cache")
    cached = _compat.given_cache(given) is not None or (model.config.use_cache if use_cache is None else use_cache)
    if cached or given.get("attention_mask") is not None or not isinstance(places, Tensor) or source is None:
        return None
    if places.dim() != 2 or places.shape[1] != source.shape[1] or not bool((places.diff(dim=1) != 1).any()):
        return None
    return {**given, "attention_mask": _compat.packed_mask(places, source.shape[0])}


def tell(model: Any, reason: str, calls: int) -> None:
    """Counts attention calls that take the stock path, and says so once for each model and reason."""
    if count(model, stock=reason, calls=calls) and not reason.startswith(_EXPECTED):
        warnings.warn(f"llama1m_ext: transformers' own path is taken, because: {reason}", stacklevel=5)


def check_room(model: Any, reason: str, given: Mapping[str, Any]) -> None:
    """Before the stock path makes a matrix of queries and keys: is there room?

    Raises:
        ValueError: there is not.
    """
    source = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if not isinstance(source, Tensor) or source.dim() not in (2, 3) or source.shape[1] == 1:
        return  # transformers has its own words for it, or it is small
    (batch, q_len), mask = source.shape[:2], given.get("attention_mask")
    kv_len = _keys(given, q_len)
    entry, what = _entry_bytes(model, reason, mask, batch, kv_len != q_len)
    need = entry * q_len * kv_len
    if need <= SMALL:
        return
    room = available_bytes() if source.device.type == "cpu" else free_bytes(source.device)
    if room is None or need <= room:
        return
    if reason.startswith("attention_mask has") or reason.endswith("packed sequences"):
        advice = "Expected a mask that hides keys only at the beginning and at the end of each row: it costs no memory."
    else:
        advice = "Without this reason it would run here, where such a matrix is never made."
    raise ValueError(
        f"{reason}: attention to {kv_len} keys from {q_len} queries of {batch} rows would need {what} of "
        f"{need / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are available. {advice}"
    )


def _keys(given: Mapping[str, Any], q_len: int) -> int:
    """How many keys the queries are compared with."""
    mask, cache = given.get("attention_mask"), _compat.given_cache(given)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        q_len = max(q_len, mask.shape[-1])
    layers = getattr(cache, "layers", None)
    if not layers:
        return q_len
    most = getattr(layers[0], "max_cache_len", None)  # of a static one: all of it is in the mask
    if isinstance(most, int):
        return most
    try:
        return max(q_len, int(cache.get_seq_length()) + q_len)  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError, TypeError):
        return q_len


def _entry_bytes(model: Any, reason: str, mask: Any, batch: int, longer: bool) -> tuple[int, str]:
    """(bytes for each query and key, what they are), at transformers' peak.

    Args:
        longer: there are more keys than queries.
    """
    config = model.config
    if config._attn_implementation == "eager":  # and their softmax, in float32
        return batch * config.num_attention_heads * (model.dtype.itemsize + 4), "attention weights"
    given = isinstance(mask, Tensor) and mask.dim() == 2
    if config._attn_implementation != "sdpa" or not (mask is None or given):
        return 0, ""  # kernels of their own, or a matrix that is there already
    if reason.endswith("packed sequences") or (given and not bool(mask.all())):
        return 3 * batch, "masks"  # the causal part, the padding part and their conjunction
    return (3 if longer else 0), "masks"  # the causal part, and what torch makes of it
