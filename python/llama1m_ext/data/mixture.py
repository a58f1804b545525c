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
    try:
        text = path.read_text(encoding="utf-8")
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

    A source's last document is the one that would exceed its budget, and it is taken if that leaves the source nearer to
    it; documents are never cut for a budget. When all sources are through and tokens are lacking all the same, the one
    that lacks most gives them. Chance depends on the seed and the document's id, not on what came before.

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
        self.tokens, self.below, self.keep, self.seed = tokens, below, keep, seed
        self.budgets: dict[str, float] | None = None
        if tokens is not None and mixture is not None:
            total = sum(mixture.values())
            self.budgets = {source: tokens * share / total for source, share in mixture.items()}
        self.spent: dict[str, int] = dict.fromkeys(self.budgets or ("",), 0)
        self.open = set(self.spent)
        self.filling = self.budgets is None
        """Whoever is open is so until there are tokens enough."""

    def lists(self, source: str) -> bool:
        """Does the mixture know it?"""
        return self.budgets is None or source in self.budgets

    def wants(self, source: str) -> bool:
        """Is there budget left for this source?"""
        return ("" if self.budgets is None else source) in self.open

    def lucky(self, document: str) -> bool:
        """Is it taken even if it is short?"""
        if self.keep >= 1:
            return True
        drawn = hashlib.blake2b(f"{self.seed} {document}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "little") < self.keep * 2.0**64

    def take(self, source: str, tokens: int) -> bool:
        """A document of a source that is wanted: is it taken?"""
        key = "" if self.budgets is None else source
        after = self.spent[key] + tokens
        taken = True
        if not self.filling and self.budgets is not None and after >= self.budgets[key]:
            self.open.discard(key)
            taken = after - self.budgets[key] <= self.budgets[key] - self.spent[key]
        if taken:
            self.spent[key] = after
        if self.tokens is not None:
            lacking = self.tokens - sum(self.spent.values())
            if self.filling and lacking <= 0:
                self.open.clear()
            elif not self.open and lacking > 0 and self.budgets is not None:
                most = max(self.budgets, key=lambda one: (self.budgets or {})[one] - self.spent[one])
                self.open, self.filling = {most}, True
        return taken

    @property
    def done(self) -> bool:
        """No more documents are wanted."""
        return not self.open

    def missing(self) -> dict[str, int]:
        """Tokens that are lacking when documents have ended, by source ("": whichever)."""
        if self.tokens is None or self.done:
            return {}
        if self.filling or self.budgets is None:
            return {key: self.tokens - sum(self.spent.values()) for key in self.open}
        return {key: math.ceil(self.budgets[key] - self.spent[key]) for key in self.budgets if key in self.open}

    def state(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"spent": self.spent, "open": sorted(self.open), "filling": self.filling}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As `state` gave it."""
        self.spent, self.open, self.filling = dict(state["spent"]), set(state["open"]), state["filling"]
