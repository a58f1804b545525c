"""Ranks agree on what they are about to do, before they do it: all go on, or all raise and say who differs in what."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from .transfer import Links

__all__ = ["DisagreementError", "agree"]

_HEADER = struct.Struct(
    "<q16sqq"
)  # this rank's number, the digest of what all must have, bytes of that, bytes of an error


class DisagreementError(ValueError):
    """Ranks differ in what must be the same, or one of them can't do what it was asked. Nothing was begun."""


def agree(
    links: Links,
    same: Mapping[str, object],
    own: int = 0,
    problem: Exception | None = None,
    device: torch.device | None = None,
) -> list[int]:
    """Waits for all ranks, and compares.

    Args:
        same: by name, what must be the same on all ranks; values are compared by their `repr`.
        own: a number that may differ.
        problem: why this rank can't go on: all will know then.
        device: where messages are: the CPU, or this rank's GPU.

    Returns:
        `own` of each rank.

    Raises:
        DisagreementError: on every rank; the message names the ranks and their values.
        Exception: `problem`, on the rank that had it.
        LinkError: a rank is silent.
    """
    said = json.dumps({name: repr(value) for name, value in same.items()}).encode()
    wrong = (f"{type(problem).__name__}: {problem}" if problem is not None else "").encode()
    header = _HEADER.pack(own, hashlib.sha256(said).digest()[:16], len(said), len(wrong))
    headers = [_HEADER.unpack(h) for h in _all(links, header, [_HEADER.size] * links.world_size, device)]
    if all(h[1] == headers[0][1] and h[3] == 0 for h in headers):
        return [h[0] for h in headers]
    bodies = _all(links, said + wrong, [h[2] + h[3] for h in headers], device)
    if problem is not None:
        raise problem
    texts = [(json.loads(b[: h[2]]), b[h[2] :].decode(errors="replace")) for b, h in zip(bodies, headers, strict=True)]
    problems = [f"rank {r}: {text}" for r, (_, text) in enumerate(texts) if text]
    if problems:
        raise DisagreementError(f"rank {links.rank} stops, as another one can't go on: " + "; ".join(problems))
    raise DisagreementError("expected the same on all ranks, got " + _differences([of for of, _ in texts]))


def _differences(values: list[dict[str, str]]) -> str:
    found = list[str]()
    for name in sorted({name for of in values for name in of}):
        by_value: dict[str, list[str]] = {}
        for rank, of in enumerate(values):
            by_value.setdefault(of.get(name, "nothing"), []).append(str(rank))
        if len(by_value) > 1:
            rarest_first = sorted(by_value.items(), key=lambda item: len(item[1]))
            sides = (f"{v} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for v, ranks in rarest_first)
            found.append(f"{name}: " + "; ".join(sides))
    return " | ".join(found)


def _all(links: Links, mine: bytes, sizes: list[int], device: torch.device | None) -> list[bytes]:
    """Everybody's bytes, directly from each: whoever is silent is known by number."""
    sent = _tensor(mine).to(device or "cpu")
    got = links.gather(sent, lambda r: sent.new_empty(sizes[r]), "agreeing on what comes", control=True)
    return [mine if r == links.rank else bytes(t.cpu().numpy()) for r, t in enumerate(got)]


def _tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
