"""Which documents are taken: shares of sources, and fewer short ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SLIMPAJAMA = {
    "RedPajamaC4": 0.26609933,
    "RedPajamaCommonCrawl": 0.53374772,
    "RedPajamaStackExchange": 0.03169647,
    "RedPajamaWikipedia": 0.03402128,
    "RedPajamaGithub": 0.05004782,
    "RedPajamaArXiv": 0.04290379,
    "RedPajamaBook": 0.0414836,
}
"""Shares of tokens in SlimPajama, as Fu et al. 2024 (arXiv 2402.10171) keep them."""


def read(given: str | os.PathLike[str] | Mapping[str, float] | None) -> dict[str, float] | None:
    """Shares by source.

    Args:
        given: "slimpajama"; a file of JSON or TOML with them; text `NAME=SHARE,NAME=SHARE`; a mapping; None or "none".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a share is not a number over 0, or they don't sum to 1.
    """
    if given is None or given == "none":
        return None
    shares: Any = given
    if given == "slimpajama":
        shares = SLIMPAJAMA
    elif isinstance(given, str) and "=" in given:
        shares = dict(one.strip().rpartition("=")[::2] for one in given.split(","))
    elif isinstance(given, (str, os.PathLike)):
        shares = _file(Path(given))
    if not isinstance(shares, Mapping) or not shares:
        raise ValueError(f"mixture: expected shares by source, got {shares!r}")
    made = {str(source): _share(source, share) for source, share in shares.items()}
    if abs(sum(made.values()) - 1) > 1e-3:
        raise ValueError(f"mixture: expected shares that sum to 1, got {sum(made.values()):.6g}")
    return made


def _file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"mixture: expected slimpajama, none, NAME=SHARE,... or a file, got {str(path)!r}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            return tomllib.loads(text)
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON or TOML, got {error}") from None


def _share(source: Any, share: Any) -> float:
    try:
        value = float(share)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1:
        raise ValueError(f"mixture: {source}: expected a share over 0 and at most 1, got {share!r}")
    return value


class Selection:
    """Takes a document or not, by Fu et al.'s rule: short ones by chance, none of a source whose budget is spent.

    A source's last document is taken whole, so a budget is met and exceeded by less than that document. Chance depends
    on the seed and the document's id, not on what came before.

    Args:
        tokens: of all sources together; None: no budgets.
        mixture: shares by source; None: one budget for all.
        below: documents of fewer tokens are short.
        keep: the probability that a short one is taken.
        seed: of chance.
    """

    def __init__(
        self, tokens: int | None, mixture: Mapping[str, float] | None, below: int, keep: float, seed: int
    ) -> None:
        self.budgets: dict[str, float] | None = None
        if tokens is not None:
            total = sum(mixture.values()) if mixture else 1.0
            self.budgets = {s: tokens * share / total for s, share in mixture.items()} if mixture else {"": tokens}
        self.by_source = mixture is not None
        self.below, self.keep, self.seed = below, keep, seed
        self.spent: dict[str, int] = dict.fromkeys(self.budgets or (), 0)

    def wants(self, source: str) -> bool:
        """Is there budget left for this source? Once there is none, there never will be."""
        if self.budgets is None:
            return True
        key = source if self.by_source else ""
        return key in self.budgets and self.spent[key] < self.budgets[key]

    def lists(self, source: str) -> bool:
        """Does the mixture know it?"""
        return not self.by_source or self.budgets is None or source in self.budgets

    def lucky(self, document: str) -> bool:
        """Is it taken even if it is short?"""
        if self.keep >= 1:
            return True
        drawn = hashlib.blake2b(f"{self.seed} {document}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "little") < self.keep * 2.0**64

    def take(self, source: str, tokens: int) -> None:
        """A document was taken."""
        if self.budgets is not None:
            self.spent[source if self.by_source else ""] += tokens

    @property
    def done(self) -> bool:
        """All budgets are met."""
        return self.budgets is not None and all(self.spent[key] >= budget for key, budget in self.budgets.items())

    def missing(self) -> dict[str, int]:
        """Tokens that budgets lack, by source ("": of all)."""
        budgets = self.budgets or {}
        return {key: math.ceil(b - self.spent[key]) for key, b in budgets.items() if self.spent[key] < b}
