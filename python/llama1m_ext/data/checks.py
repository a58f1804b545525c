"""What is wrong, said before the work."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import get_args

from .documents import Fields, stream
from .encode import Encoder
from .needles import Needles
from .packer import Packing, Tails
from .sources import Part, SourceError

LOOKED_AT = 2000
"""Documents read before the work."""


def check_options(
    length: int,
    tokens: int | None,
    upsample_below: int,
    keep: float,
    chars_per_token: float | None,
    shuffle: int,
    workers: int,
    shard_tokens: int,
    packing: str,
    tails: str,
    bad_rows: str,
    shortfall: str,
    tolerance: float,
) -> None:
    """Of `build`.

    Raises:
        ValueError: one is not as it should be.
    """
    for name, text, kinds in (
        ("packing", packing, get_args(Packing)),
        ("tails", tails, get_args(Tails)),
        ("bad_rows", bad_rows, ("error", "skip")),
        ("shortfall", shortfall, ("keep", "error")),
    ):
        if text not in kinds:
            raise ValueError(f"{name}: expected {' or '.join(kinds)}, got {text!r}")
    if not 1 <= length < 1 << 31:
        raise ValueError(f"length: expected 1 to 2147483647 tokens, got {length}")
    if tokens is not None and tokens < length:
        raise ValueError(f"tokens: expected those of one row at least, {length}, got {tokens}")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: expected a probability, 0 to 1, got {keep}")
    if chars_per_token is not None and not 0 < chars_per_token < math.inf:
        raise ValueError(f"chars_per_token: expected a finite number over 0, got {chars_per_token}")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance: expected a difference of shares, 0 to 1, got {tolerance}")
    for name, value, least in (
        ("upsample_below", upsample_below, 0),
        ("shuffle", shuffle, 0),
        ("workers", workers, 1),
        ("shard_tokens", shard_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected {least} at least, got {value}")


def check_needles(share: float, count: int, encoder: Encoder, length: int) -> None:
    """Of `build`.

    Raises:
        ValueError: an option is not as it should be, or a row has no room.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"needles: expected a share of rows, 0 to 1, got {share}")
    if count < 1:
        raise ValueError(f"needles_per_row: expected 1 at least, got {count}")
    if share:
        hidden = Needles(encoder, 1.0, count, 0).of(0)
        assert hidden is not None
        if hidden.tokens > length // 2:
            raise ValueError(f"needles_per_row: expected half a row of {length} tokens at most, got {hidden.tokens}")


def look_at(
    parts: Sequence[Part], fields: Fields, seed: int, shuffle: int, mixture: Mapping[str, float] | None
) -> None:
    """What is wrong with all documents, as far as the first ones tell.

    Raises:
        SourceError: one has no text or no source, or all are to be skipped.
        ValueError: the mixture has a source that isn't there.
    """
    seen: dict[str, int] = {}
    count = good = 0
    for document in itertools.islice(stream(parts, fields, seed, min(shuffle, LOOKED_AT)), LOOKED_AT):
        count += 1
        if not document.bad:
            good += 1
            seen[document.source] = seen.get(document.source, 0) + 1
    if not good:
        raise SourceError(f"the sources: expected documents, got {count} rows without {fields.text} or {fields.source}")
    if mixture is None:
        return
    known = ", ".join(sorted(seen))
    if not seen.keys() & mixture.keys():
        raise ValueError(f"mixture: expected some of the sources there are, {known}, got {', '.join(mixture)}")
    missing = sorted(mixture.keys() - seen.keys())
    if missing and count < LOOKED_AT:
        raise ValueError(f"mixture: {missing[0]}: expected one of the sources there are, {known}")
    if missing:
        some = f"not among the first {count} documents, which have {known}"
        warnings.warn(f"mixture: {', '.join(missing)}: {some}", stacklevel=4)
