"""The stream of documents: parts interleaved and shuffled, the same each time for a seed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .sources import Part, RowError

TEXT_FIELD = "text"
SOURCE_FIELD = "meta.redpajama_set_name"
"""As SlimPajama has them."""
INTERLEAVED = 16
"""Parts open at a time."""
BUFFER_CHARS = 64 << 20
"""Of text that waits to be shuffled: books must not fill the memory."""


class Document(NamedTuple):
    """A text.

    Attributes:
        id: `PART:ROW`; rows count from 0.
        source: the name that the mixture knows it by.
        text: "" if it is blank, or if its row was not as it should be.
        bad: that it was not.
    """

    id: str
    source: str
    text: str
    bad: bool = False


@dataclass(frozen=True)
class Fields:
    """Where a row has its text and the name of its source.

    Attributes:
        text: a field; `a.b` is field b of the mapping (or of the JSON text) in field a.
        source: another one, or None: a document's source is then the name of its part, up to the first dot.
        skip_bad: rows that are not as they should be are passed over, not raised.
    """

    text: str = TEXT_FIELD
    source: str | None = SOURCE_FIELD
    skip_bad: bool = False

    def of(self, part: Part) -> Iterator[Document]:
        """The documents of a part.

        Raises:
            RowError: a row is not as it should be.
        """
        fields = [self.text] if self.source is None else [self.text, self.source]
        columns = list(dict.fromkeys(field.partition(".")[0] for field in fields))
        by_name = part.name.partition(".")[0]
        for i, row in enumerate(part.read(columns)):
            name = f"{part.name}:{i}"
            try:
                if isinstance(row, RowError):
                    raise row
                text = _encodable(_look_up(row, self.text, name))
                source = by_name if self.source is None else self._source(row, name)
            except RowError:
                if not self.skip_bad:
                    raise
                yield Document(name, "", "", bad=True)
                continue
            yield Document(name, source, text if text and not text.isspace() else "")

    def _source(self, row: Any, name: str) -> str:
        assert self.source is not None
        try:
            return _encodable(_look_up(row, self.source, name))
        except RowError as error:
            raise RowError(f"{error}; without a source field, a source is a file") from None


def _look_up(row: Any, field: str, name: str) -> str:
    value, at = row, ""
    for key in field.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                pass
        if not isinstance(value, Mapping) or key not in value:
            there = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"{type(value).__name__}, no keys"
            within = f" in {at}" if at else ""
            raise RowError(f"{name}: expected a field {field!r}, got{within} the keys {there}")
        value, at = value[key], f"{at}.{key}" if at else key
    if not isinstance(value, str):
        raise RowError(f"{name}: {field}: expected text, got {type(value).__name__}")
    return value


def _encodable(text: str) -> str:
    """JSON may have halves of surrogate pairs; tokenizers take none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def stream(parts: Sequence[Part], fields: Fields, seed: int, shuffle: int) -> Iterator[Document]:
    """All documents, once. The order depends on the parts, the seed and `shuffle`, and on nothing else.

    Args:
        shuffle: documents among which the next one is drawn; with 0 they come as they lie.
    """
    if not shuffle:
        yield from itertools.chain.from_iterable(map(fields.of, parts))
        return
    rng = random.Random(f"documents {seed}")
    waiting: list[Document] = []
    chars = 0
    for document in _interleaved(parts, fields, seed):
        waiting.append(document)
        chars += len(document.text)
        while len(waiting) > shuffle or chars > BUFFER_CHARS:
            drawn = _draw(waiting, rng)
            chars -= len(drawn.text)
            yield drawn
    while waiting:
        yield _draw(waiting, rng)


def _draw(waiting: list[Document], rng: random.Random) -> Document:
    i = rng.randrange(len(waiting))
    waiting[i], waiting[-1] = waiting[-1], waiting[i]
    return waiting.pop()


def _interleaved(parts: Sequence[Part], fields: Fields, seed: int) -> Iterator[Document]:
    rng = random.Random(f"parts {seed}")
    coming = iter(rng.sample(parts, len(parts)))
    being_read = [fields.of(part) for part in itertools.islice(coming, INTERLEAVED)]
    while being_read:
        i = rng.randrange(len(being_read))
        try:
            yield next(being_read[i])
        except StopIteration:
            following = next(coming, None)
            if following is None:
                being_read.pop(i)
            else:
                being_read[i] = fields.of(following)
