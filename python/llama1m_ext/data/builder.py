"""Documents in, packed rows out: `build`."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import encode, statistics
from .assembly import STATISTICS, Assembly, Batch, Shortfall, lacking
from .checks import check_needles, check_options, look_at
from .crew import Crew
from .documents import SOURCE_FIELD, TEXT_FIELD, Fields, stream
from .journal import Journal, difference, tidy
from .mixture import Selection
from .mixture import read as read_mixture
from .needles import Needles
from .packer import Packing, Tails
from .shards import FACTS, SHARD_TOKENS, must_be_free, must_have_room
from .sources import resolve

__all__ = ["Built", "Note", "Shortfall", "build"]
_VERSION = 1
"""Of what the rows are for given options: a build isn't gone on with by another one."""


class Note(UserWarning):
    """Something about the rows that were made; it is in their statistics too."""


@dataclass(frozen=True)
class Built:
    """What was made.

    Attributes:
        path: the folder; `open` reads it.
        rows: how many.
        length: tokens of each.
        statistics: as they are in statistics.json there.
    """

    path: Path
    rows: int
    length: int
    statistics: dict[str, Any]

    def __str__(self) -> str:
        cuts = self.statistics["documents_cut"]
        lines = [
            f"{self.path}: {self.rows:,} rows of {self.length:,} tokens",
            statistics.table(self.statistics),
            f"cut: {cuts['longer']:,} documents longer than a row, {cuts['fitting']:,} that would have fit "
            f"(the longest of these: {cuts['longest_fitting']:,} tokens)",
        ]
        return "\n".join([*lines, *self.statistics["notes"]])


def build(
    sources: Any,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any,
    length: int,
    tokens: int | None = None,
    mixture: str | os.PathLike[str] | Mapping[str, float] | None = None,
    seed: int = 42,
    text_field: str = TEXT_FIELD,
    source_field: str | None = SOURCE_FIELD,
    upsample_below: int = 4096,
    keep: float = 0.1,
    chars_per_token: float | None = None,
    separator: str = encode.AUTO,
    packing: Packing = "whole",
    tails: Tails = "keep",
    cross_document: bool = True,
    needles: float = 0.0,
    needles_per_row: int = 8,
    shuffle: int = 1000,
    workers: int = 1,
    bad_rows: Literal["error", "skip"] = "error",
    shortfall: Literal["keep", "error"] = "keep",
    tolerance: float = 0.02,
    resume: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    plot: bool = True,
    progress: bool | Literal["auto"] = "auto",
) -> Built:
    """Packs documents into rows of `length` tokens, upsampled by length and mixed by source (Fu et al., arXiv 2402.10171).

    The rows, to the byte, depend on the sources and the options alone: not on `workers`, nor on whether the build was
    killed and resumed. Memory doesn't grow with the data: a few rows, the documents that are being shuffled (64 million
    characters at most), and the longest document's tokens.

    Args:
        sources: files (.jsonl, .json with a row a line, plain or .gz, .xz, .bz2, .zst; .parquet), folders of such files,
            folders that `datasets` saved (`FOLDER@SPLIT`), names on the hub (`NAME:CONFIG@SPLIT`, streamed), a
            `datasets.Dataset`, rows: one of these or several.
        out: the folder to make. It must not be there. Until it is whole its name ends with ".partial".
        tokenizer: transformers', or the folder or name to load it from.
        length: tokens of a row.
        tokens: of all rows; those of a last, incomplete row are left out. Default: all that the sources give.
        mixture: shares of the tokens by source: "slimpajama", a file (JSON, TOML), "NAME=SHARE,...", or a mapping. A
            document whose source has its share, or isn't in the mixture, is passed over; a source's last document is
            taken or not, whichever is nearer to its share.
        seed: of the order and of chance.
        text_field: the field of a row that has the text; `a.b` is field b in field a.
        source_field: the one with the source's name. None: a document's source is the file it is in.
        upsample_below: documents of fewer tokens are short.
        keep: the share of short documents that is taken, by chance; the others always are.
        chars_per_token: a document's length is estimated with it, and many short ones need not be tokenised (3.68 in Fu
            et al.). Default: lengths are counted.
        separator: "auto": BOS (if the tokenizer has one) and EOS around each document; "none"; or a text after each.
        packing: "whole": documents that fit into a row are not cut, but for the shortest waiting one at the end of a row;
            "stream": they follow each other and are cut where a row ends.
        tails: of documents longer than a row: "keep": what is left goes on in the next row; "drop": it is left out.
        cross_document: False: `open` gives position ids that keep documents apart.
        needles: the share of rows with facts (a name, a number) at random places and questions for them, with answers, at
            the end. They come on top of the mixture, as the source "needles".
        needles_per_row: facts in such a row.
        shuffle: documents among which the next one is drawn, while 16 files are read side by side. 0: as they lie.
        workers: processes that tokenise; 1: this one.
        bad_rows: a row without text or source, or that isn't JSON: "error", or "skip" it.
        shortfall: the sources have less than `tokens`: "keep" what there is and warn, or "error".
        tolerance: a share that differs by more from the mixture is warned of.
        resume: go on where a build with the same options was ended; begin if there is none.
        shard_tokens: tokens of a file, about, and of what a killed build makes again.
        plot: draw the document lengths to lengths.png, where matplotlib is there.
        progress: a bar; "auto": if it takes longer than two seconds.

    Raises:
        FileExistsError: `out` is there, or a build was begun there and `resume` is off.
        FileNotFoundError: a source or the tokenizer isn't there.
        OSError: there is no room for the rows, or no more room. What was made stays, for `resume`.
        Shortfall: see `shortfall`. What was made stays.
        ValueError: an option or a source is not as it should be; `resume` with other options than before.
    """
    check_options(
        length,
        tokens,
        upsample_below,
        keep,
        chars_per_token,
        shuffle,
        workers,
        shard_tokens,
        packing,
        tails,
        bad_rows,
        shortfall,
        tolerance,
    )
    target = Path(out)
    if not target.name:
        raise ValueError(f"out: expected a folder to make, got {os.fspath(out)!r}")
    shares = read_mixture(mixture)
    if shares is not None and tokens is None:
        raise ValueError("mixture: expected tokens with it, of which it gives the shares, got None")
    parts = resolve(sources)
    loaded = encode.load(tokenizer)
    before, after = encode.borders(loaded, separator)
    encoder = encode.Encoder(loaded)
    options = {
        "version": _VERSION,
        "sources": f"{len(parts)} parts {_digest([[part.name, part.digest] for part in parts])}",
        "tokenizer": encoder.digest(),
        "borders": [before, after],
        **{"length": length, "tokens": tokens, "mixture": shares, "seed": seed},
        **{"text_field": text_field, "source_field": source_field, "shuffle": shuffle},
        **{"upsample_below": upsample_below, "keep": keep, "chars_per_token": chars_per_token},
        **{"packing": packing, "tails": tails, "cross_document": cross_document, "shard_tokens": shard_tokens},
        **{"needles": needles, "needles_per_row": needles_per_row},
    }
    check_needles(needles, needles_per_row, encoder, length)
    journal = Journal(target, options)
    if resume and target.is_dir() and not journal.folder.exists():
        return _made_before(target, journal.options)
    must_be_free(target)
    there = sum(file.stat().st_size for file in journal.folder.glob("data-*")) if journal.folder.is_dir() else 0
    must_have_room(target.parent, (tokens or 0) // length, length, there=there)
    fields = Fields(text_field, source_field, bad_rows == "skip")
    if not (resume and journal.folder.is_dir()):
        look_at(parts, fields, seed, shuffle, shares)
    hidden = Needles(encoder, needles, needles_per_row, seed) if needles else None
    of_documents = tokens if tokens is None or hidden is None else tokens - hidden.tokens(tokens // length)
    selection = Selection(of_documents, shares, upsample_below, keep, seed)
    state = journal.begin(resume)
    try:
        if not (state and state["complete"]):
            crew: Crew[Batch] = Crew(encoder, workers, lambda batch: batch[1])
            run = Assembly(journal, selection, hidden, crew, options, (before, after), state)
            with crew, _bar(progress, tokens) as bar:
                run.documents(stream(parts, fields, seed, shuffle), bar)
                run.rest()
            missing = selection.missing() if run.ended else {}
            if missing and shortfall == "error":
                run.note()
                raise Shortfall(
                    f"{lacking(missing)}; the rows made stay in {journal.folder}: resume with shortfall keep"
                )
            run.write(missing, tolerance, plot)
        journal.end()
    finally:
        journal.release()
    made = _made_before(target, journal.options)
    for note in made.statistics["notes"]:
        warnings.warn(note, Note, stacklevel=2)
    return made


def _made_before(target: Path, options: Mapping[str, Any]) -> Built:
    facts = json.loads((target / FACTS).read_text(encoding="utf-8")) if (target / FACTS).is_file() else {}
    if facts.get("options") != options:
        other = difference(facts["options"], options, "made") if "options" in facts else "got none in it"
        raise FileExistsError(f"{target}: it is there already, and not made with these options: {other}")
    tidy(target)
    made = json.loads((target / STATISTICS).read_text(encoding="utf-8"))
    return Built(target, facts["rows"], facts["length"], made)


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


class _bar:
    """Tokens taken; nothing where it isn't wanted."""

    def __init__(self, show: bool | Literal["auto"], tokens: int | None) -> None:
        self.show, self.tokens, self.bar = show, tokens, None

    def __enter__(self) -> Any:
        if self.show:
            from tqdm.auto import tqdm

            options = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True, "delay": 2.0 * (self.show == "auto")}
            self.bar = tqdm(total=self.tokens, desc="data", **options)
        return self.bar

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
