"""Documents to rows of one length."""

from __future__ import annotations

import bisect
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .shards import segment

Packing = Literal["whole", "stream"]
Tails = Literal["keep", "drop"]
WAITING_TOKENS = 1 << 20
"""That many wait before a row is made: the more, the closer documents fit."""


class Piece(NamedTuple):
    """What is left of a document: its tokens int32 `[n]` from `offset` on."""

    order: int
    source: str
    document: str
    offset: int
    ids: np.ndarray

    @property
    def key(self) -> tuple[int, int]:
        return len(self.ids), self.order


class Packer:
    """Takes documents in the order of a stream and gives rows of `length` tokens, without gaps.

    "stream": documents follow each other as they come, and go on in the next row where a row ends (Fu et al.).

    "whole": a row begins with the document that has waited longest, then takes the longest waiting one that fits, and
    again (best fit, as Ding et al., arXiv 2404.10830, but of a stream). What is left when none fits is filled with the
    beginning of the shortest waiting one, which goes on in a later row. So a document that fits into a row is cut only
    if it is the last of its row and none shorter waits; one that is longer than a row goes on in the next. Tried and left:
    taking documents as they come while they fit, which uses up the short ones before they are needed to fill rows.

    Args:
        length: tokens of a row.
        packing: see above.
        waiting_tokens: that many wait before a row is made, and 2 rows at least. Default: WAITING_TOKENS.

    Attributes:
        tokens: how many wait.
        cuts: documents cut that are longer than a row (`longer`), or that would have fit (`fitting`), and the most tokens
            that one of these has (`longest_fitting`).
    """

    def __init__(self, length: int, packing: Packing = "whole", waiting_tokens: int | None = None) -> None:
        self.length, self.packing = length, packing
        self.tokens = 0
        self.cuts = {"longer": 0, "fitting": 0, "longest_fitting": 0}
        waiting_tokens = WAITING_TOKENS if waiting_tokens is None else waiting_tokens
        self._enough = max(2 * length, waiting_tokens) if packing == "whole" else length
        self._count = 0
        self._by_order: list[Piece] = []
        self._by_size: list[Piece] = []

    def put(self, source: str, document: str, ids: np.ndarray) -> None:
        """A document waits."""
        if len(ids):
            self._add(Piece(self._count, source, document, 0, ids))
            self._count += 1

    def ready(self, *, last: bool = False) -> bool:
        """Is there a row to take? `last`: no more documents come."""
        return self.tokens >= (self.length if last else self._enough)

    def take(self, tokens: int | None = None) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """A row, or its first `tokens`: int32 `[length or tokens]`, and the segments that it consists of."""
        pieces: list[Piece] = []
        room = self.length if tokens is None else tokens
        while room:
            piece = self._next(room, first=not pieces)
            self._remove(piece)
            if len(piece.ids) > room:
                rest = piece._replace(offset=piece.offset + room, ids=piece.ids[room:])
                self._note_cut(piece)
                piece = piece._replace(ids=piece.ids[:room])
                self._add(rest)
            pieces.append(piece)
            room -= len(piece.ids)
        segments, at = [], 0
        for piece in pieces:
            end = at + len(piece.ids)
            segments.append(segment(piece.source, piece.document, at, end, piece.offset))
            at = end
        return np.concatenate([piece.ids for piece in pieces]), segments

    def _next(self, room: int, first: bool) -> Piece:
        oldest = self._by_order[0]
        if self.packing == "stream" or (first and not room < len(oldest.ids) <= self.length):
            return oldest
        fitting = bisect.bisect_right(self._by_size, (room, self._count), key=_key)
        if fitting:
            return self._by_size[fitting - 1]
        return self._by_size[0]

    def _note_cut(self, piece: Piece) -> None:
        whole = piece.offset + len(piece.ids)
        if whole > self.length:
            self.cuts["longer"] += piece.offset == 0
        elif piece.offset == 0:
            self.cuts["fitting"] += 1
            self.cuts["longest_fitting"] = max(self.cuts["longest_fitting"], whole)

    def _add(self, piece: Piece) -> None:
        bisect.insort(self._by_order, piece, key=_order)
        bisect.insort(self._by_size, piece, key=_key)
        self.tokens += len(piece.ids)

    def _remove(self, piece: Piece) -> None:
        del self._by_order[bisect.bisect_left(self._by_order, piece.order, key=_order)]
        del self._by_size[bisect.bisect_left(self._by_size, piece.key, key=_key)]
        self.tokens -= len(piece.ids)

    def save(self, path: Path) -> None:
        """All that waits, to a file."""
        waiting = self._by_order
        facts = {
            "count": self._count,
            "cuts": self.cuts,
            "waiting": [[p.order, p.source, p.document, p.offset, len(p.ids)] for p in waiting],
        }
        ids = np.concatenate([p.ids for p in waiting]) if waiting else np.zeros(0, np.int32)
        with open(path, "wb") as file:
            np.savez(file, ids=ids, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: Path) -> None:
        """As it was when it was saved."""
        with np.load(path) as saved:
            ids, facts = saved["ids"], json.loads(saved["facts"].tobytes())
        self._count, self.cuts = facts["count"], facts["cuts"]
        self._by_order, self._by_size, self.tokens = [], [], 0
        at = 0
        for order, source, document, offset, count in facts["waiting"]:
            self._add(Piece(order, source, document, offset, ids[at : at + count]))
            at += count


def _key(piece: Piece) -> tuple[int, int]:
    return piece.key


def _order(piece: Piece) -> int:
    return piece.order
