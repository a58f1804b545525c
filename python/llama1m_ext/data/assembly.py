"""From documents to finished files, in order: all that decides what the rows are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from . import statistics as figures
from .crew import Crew
from .documents import Document
from .journal import Journal
from .mixture import Selection
from .needles import Needles
from .packer import Packer
from .shards import Shards, write_facts, write_json

STATISTICS, PLOT = "statistics.json", "lengths.png"
_BATCH_CHARS, _BATCH_DOCUMENTS = 1 << 20, 256


class Shortfall(ValueError):
    """The sources have fewer tokens than were asked for."""


class Candidate(NamedTuple):
    """A document, and what is known of it before its turn comes."""

    document: str
    source: str
    text: str
    bad: bool
    lucky: bool
    surely_short: bool
    place: int
    """Among the batch's tokens; -1: it should need none."""


Batch = tuple[list[Candidate], list[str]]
"""The documents, and the texts of those that need tokens."""


class Assembly:
    """A build from where the state says, or from the start.

    Args:
        journal: begun.
        selection: new; it gets what the state says was spent.
        needles: what is hidden in rows, if anything is.
        crew: tokenises.
        options: of the journal.
        borders: tokens before and after each document.
        state: of the journal.
    """

    def __init__(
        self,
        journal: Journal,
        selection: Selection,
        needles: Needles | None,
        crew: Crew[Batch],
        options: Mapping[str, Any],
        borders: tuple[list[int], list[int]],
        state: Mapping[str, Any] | None,
    ) -> None:
        self.journal, self.selection, self.crew, self.options = journal, selection, crew, options
        self.before, self.after = (np.array(ids, dtype=np.int32) for ids in borders)
        self.length: int = options["length"]
        self.most = None if options["tokens"] is None else options["tokens"] // self.length
        self.packer = Packer(self.length, options["packing"])
        self.needles = needles
        self.statistics = figures.Statistics()
        self.consumed = self.rows = 0
        self.ended = False
        names = []
        if state is not None:
            self.consumed, self.rows, names = state["consumed"], state["rows"], state["names"]
            selection.restore(state["selection"])
            self.statistics.restore(state["statistics"])
            self.packer.load(journal.folder / state["packer"])
        shard_tokens = options["shard_tokens"]
        self.shards = Shards(journal.folder, self.length, shard_tokens=shard_tokens, names=names)

    def documents(self, documents: Iterator[Document], bar: Any) -> None:
        """Takes what the selection wants, until budgets are met or documents end (`ended`)."""
        taken = self._tokens_taken()
        if bar is not None:
            bar.initial = bar.n = taken
            bar.refresh()
        self._make_rows()
        if self._enough():
            return
        # What was read before is read again, which is quick, and not tokenised again, which isn't.
        coming = itertools.islice(documents, self.consumed, None)
        for candidates, ids in self.crew.map(self._batches(coming)):
            for candidate in candidates[0]:
                self._consume(candidate, ids)
                if self._enough():
                    return
            if bar is not None:
                taken, last = self._tokens_taken(), taken
                bar.update(taken - last)
        self.ended = True

    def rest(self) -> None:
        """What waits when no more documents come."""
        self._make_rows(last=True)
        self.shards.finish()
        if not self.rows:
            raise Shortfall(f"the sources: expected tokens for one row of {self.length}, got {self.packer.tokens}")

    def write(self, missing: Mapping[str, int], tolerance: float, plot: bool) -> None:
        """Everything but the rows."""
        folder, mixture = self.journal.folder, self.options["mixture"]
        made = figures.report(self.statistics, mixture)
        notes = [f"{lacking(missing)}: the rows have what there was"] if missing else []
        for source, one in made["sources"].items():
            if "wanted" in one and abs(one["share"] - one["wanted"]) > tolerance:
                wanted = f"{one['wanted']:.2%} within {tolerance:.2%}"
                notes.append(f"mixture: {source or '-'}: expected a share of {wanted}, got {one['share']:.2%}")
        facts = {"rows": self.rows, "cross_document": self.options["cross_document"], "options": self.journal.options}
        more = {
            "rows": self.rows,
            "length": self.length,
            "documents_consumed": self.consumed,
            "documents_cut": self.packer.cuts,
            "tokens_left_over": self.packer.tokens,
            "tokens_missing": missing,
            "notes": notes,
        }
        write_json(folder / STATISTICS, {**more, **made})
        if plot:
            figures.draw(made, folder / PLOT)
        write_facts(folder, self.shards, facts)
        self.journal.complete(self.shards)

    def _batches(self, documents: Iterator[Document]) -> Iterator[Batch]:
        candidates: list[Candidate] = []
        texts: list[str] = []
        chars, wrong = 0, None
        try:
            for document in documents:
                candidate = self._candidate(document, len(texts))
                candidates.append(candidate)
                chars += len(document.text)
                if candidate.place >= 0:
                    texts.append(document.text)
                if chars >= _BATCH_CHARS or len(candidates) >= _BATCH_DOCUMENTS:
                    yield candidates, texts
                    candidates, texts, chars = [], [], 0
        except Exception as error:  # after those before it
            wrong = error
        if candidates:
            yield candidates, texts
        if wrong is not None:
            raise wrong

    def _candidate(self, document: Document, place: int) -> Candidate:
        """Read ahead of what is decided: which sources are wanted may change until its turn comes."""
        selection, text = self.selection, document.text
        chars, below = len(text), selection.below
        lucky = selection.lucky(document.id)
        if self.options["chars_per_token"] is not None:
            short = chars < below * self.options["chars_per_token"]
        else:  # a token is a byte at least
            short = chars < below and len(text.encode()) < below
        needed = bool(text) and (lucky or not short) and selection.wants(document.source)
        return Candidate(document.id, document.source, text, document.bad, lucky, short, place if needed else -1)

    def _consume(self, candidate: Candidate, ids: list[np.ndarray]) -> None:
        self.consumed += 1
        selection, statistics, source, chars = self.selection, self.statistics, candidate.source, len(candidate.text)
        if candidate.bad:
            statistics.bad += 1
            return
        if not chars:
            statistics.empty += 1
            return
        if not selection.lists(source):
            statistics.unlisted += 1
        if not selection.wants(source) or (candidate.surely_short and not candidate.lucky):
            statistics.read(source, chars, None)
            return
        # A source that lacked nothing when this was read may be asked for the last tokens.
        found = ids[candidate.place] if candidate.place >= 0 else self.crew.encoder([candidate.text])[0]
        statistics.read(source, chars, len(found))
        by_count = self.options["chars_per_token"] is None
        if by_count and len(found) < selection.below and not candidate.lucky:
            return
        whole = np.concatenate([self.before, found, self.after])
        if self.options["tails"] == "drop" and len(whole) > self.length:
            whole = whole[: len(whole) // self.length * self.length]
        if selection.take(source, len(whole)):
            statistics.taken(source, len(whole), len(found))
            self.packer.put(source, candidate.document, whole)
            self._make_rows()

    def _make_rows(self, *, last: bool = False) -> None:
        while self.packer.ready(last=last) and (self.most is None or self.rows < self.most):
            hidden = None if self.needles is None else self.needles.of(self.rows)
            ids, segments = self.packer.take(self.length - (0 if hidden is None else hidden.tokens))
            if hidden is not None:
                ids, segments = hidden.into(ids, segments)
            self.statistics.written(segments)
            self.rows += 1
            if self.shards.add({"input_ids": ids, "segments": segments}):
                self.note()

    def note(self) -> None:
        """All that is in finished files, and all that waits, is safe when this returns."""
        state = {"consumed": self.consumed, "rows": self.rows, "selection": self.selection.state()}
        self.journal.note(self.shards, self.packer, {**state, "statistics": self.statistics.state()})

    def _enough(self) -> bool:
        return self.selection.done or (self.most is not None and self.rows >= self.most)

    def _tokens_taken(self) -> int:
        return sum(counts["tokens_taken"] for counts in self.statistics.sources.values())


def lacking(missing: Mapping[str, int]) -> str:
    """What `Selection.missing` found, in words."""
    if list(missing) == [""]:
        return f"the sources have {missing['']} tokens less than were asked for"
    listed = ", ".join(f"{source} {count}" for source, count in missing.items())
    return f"sources have less than their shares, in tokens: {listed}"
