"""Rows are full, documents are whole where they can be, and nothing is lost or turned round: for any documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama1m_ext.data.packer import Packer

SIZES = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 70)), min_size=1, max_size=80)


def documents_of(sizes: list[int]) -> list[np.ndarray]:
    """Every token is another number: where it came from shows."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end, dtype=np.int32) for size, end in zip(sizes, ends, strict=True)]


def pack(documents: list[np.ndarray], length: int, packing: str, waiting: int = 1) -> tuple[list, Packer]:
    """All rows, and beside each what waited when it was made."""
    packer, rows = Packer(length, packing, waiting), []
    for i, ids in enumerate(documents):
        packer.put("s", str(i), ids)
        while packer.ready():
            rows.append((waiting_in(packer), *packer.take()))
    while packer.ready(last=True):
        rows.append((waiting_in(packer), *packer.take()))
    return rows, packer


def waiting_in(packer: Packer) -> dict[str, int]:
    return {piece.document: len(piece.ids) for piece in packer._by_order}


def check(rows: list, documents: list[np.ndarray], length: int) -> dict[str, list[tuple[int, int, int]]]:
    """What holds for all rows. Returns the pieces of each document: row, offset, tokens."""
    pieces: dict[str, list[tuple[int, int, int]]] = {}
    for number, (_, ids, segments) in enumerate(rows):
        assert ids.shape == (length,) and ids.dtype == np.int32
        at = 0
        for one in segments:
            assert one["start"] == at < one["end"] and one["source"] == "s"
            at, size = one["end"], one["end"] - one["start"]
            document = documents[int(one["document"])]
            assert np.array_equal(ids[one["start"] : at], document[one["offset"] : one["offset"] + size])
            pieces.setdefault(one["document"], []).append((number, one["offset"], size))
        assert at == length
    for several in pieces.values():  # in order, without gaps: each goes on where it was left, in a later row
        assert [offset for _, offset, _ in several] == [0, *np.cumsum([size for _, _, size in several])[:-1]]
        assert all(a < b for (a, _, _), (b, _, _) in zip(several, several[1:], strict=False))
    return pieces


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, length=st.integers(1, 40), waiting=st.integers(1, 200))
def test_whole(sizes, length, waiting):
    documents = documents_of(sizes)
    rows, packer = pack(documents, length, "whole", waiting)
    pieces = check(rows, documents, length)
    assert len(rows) == sum(sizes) // length and packer.tokens == sum(sizes) % length
    cut = {"longer": set(), "fitting": set()}
    for there, _, segments in rows:
        waited = dict(there)
        for i, one in enumerate(segments):
            size, waiting_size = one["end"] - one["start"], waited.pop(one["document"])
            if size == waiting_size:
                continue
            kind = "longer" if sizes[int(one["document"])] > length else "fitting"
            cut[kind].add(one["document"])
            assert i == len(segments) - 1
            if i:  # it isn't the start of a row: the shortest that waited, and none would have fit
                assert all(waiting_size <= other for other in waited.values())
            else:  # at the start of a row only what is longer than one is cut
                assert waiting_size > length
    assert packer.cuts["fitting"] == len(cut["fitting"])
    assert packer.cuts["longest_fitting"] == max((sizes[int(i)] for i in cut["fitting"]), default=0)
    assert packer.cuts["longer"] == len(cut["longer"])
    for document, several in pieces.items():  # a long one fills row after row
        full = [row for row, _, size in several if size == length]
        assert full == list(range(full[0], full[0] + len(full))) if full else document


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, length=st.integers(1, 40))
def test_stream_is_concatenation_cut_at_the_ends_of_rows(sizes, length):
    documents = documents_of(sizes)
    rows, _ = pack(documents, length, "stream")
    check(rows, documents, length)
    joined = np.concatenate(documents)
    assert np.array_equal(
        np.concatenate([np.zeros(0, int), *(ids for _, ids, _ in rows)]), joined[: len(rows) * length]
    )
    assert len(rows) == len(joined) // length


def test_long_documents_stay_whole_where_short_ones_are_about():
    """Lengths as a web corpus has them, scaled down; 4 % have 100 tokens or more, and half of the tokens."""
    rng = np.random.default_rng(0)
    sizes = [int(n) for n in np.minimum(rng.lognormal(2.5, 1.2, 10_000), 1000) + 2]
    documents = documents_of(sizes)
    rows, packer = pack(documents, 1000, "whole", 8000)
    pieces = check(rows, documents, 1000)
    long = [document for document in pieces if 100 <= sizes[int(document)] <= 1000]
    assert len(long) > 350 and all(len(pieces[document]) == 1 for document in long)
    assert packer.cuts["longest_fitting"] < 100 and packer.cuts["fitting"] < len(rows)


def test_no_document_waits_for_ever():
    """One of exactly a row's length fits only where a row begins, and rows end with cut documents that go on."""
    documents = documents_of([3] * 10 + [20] + [3] * 200)
    rows, _ = pack(documents, 20, "whole", 60)
    first = next(i for i, (_, _, segments) in enumerate(rows) if segments[0]["document"] == "10")
    assert first <= 10 and len(rows[first][2]) == 1  # each row before it began with one of the 10 older ones


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, length=st.integers(1, 20), at=st.integers(0, 80), packing=st.sampled_from(["whole", "stream"]))
def test_saved_and_loaded_it_goes_on_alike(tmp_path_factory, sizes, length, at, packing):
    documents = documents_of(sizes)
    expected, _ = pack(documents, length, packing, 50)
    path = tmp_path_factory.mktemp("packer") / "waiting.npz"
    packer, rows = Packer(length, packing, 50), []
    for i, ids in enumerate(documents):
        packer.put("s", str(i), ids)
        if i == at:
            packer.save(path)
            packer = Packer(length, packing, 50)
            packer.load(path)
        while packer.ready():
            rows.append(packer.take())
    while packer.ready(last=True):
        rows.append(packer.take())
    assert [(ids.tolist(), segments) for ids, segments in rows] == [(i.tolist(), s) for _, i, s in expected]


@pytest.mark.parametrize("packing", ["whole", "stream"])
def test_memory_is_bounded(packing):
    packer = Packer(64, packing, 1000)
    most = 0
    for i, size in enumerate(np.random.default_rng(1).integers(1, 300, 3000)):
        packer.put("s", str(i), np.zeros(size, np.int32))
        most = max(most, packer.tokens)
        while packer.ready():
            packer.take()
    assert most < 1000 + 300 + 64
