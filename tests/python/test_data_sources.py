"""Documents from every kind of source, in an order that depends on the seed alone; what is wrong is said with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama1m_ext.data.documents import Fields, stream
from llama1m_ext.data.sources import SourceError, resolve

ROWS = [{"text": f"text {i} é 漢", "meta": {"redpajama_set_name": "ab"[i % 2], "more": i}} for i in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode()
EXPECTED = [(row["text"], row["meta"]["redpajama_set_name"]) for row in ROWS]


def zstd(content: bytes) -> bytes:
    halves = content[: len(content) // 2], content[len(content) // 2 :]  # frames that follow each other
    return b"".join(pa.compress(half, codec="zstd", asbytes=True) for half in halves)


def read(sources, fields: Fields | None = None, seed: int = 0, shuffle: int = 0) -> list:
    return list(stream(resolve(sources), fields or Fields(), seed, shuffle))


def pairs(documents: list) -> list:
    return [(document.text, document.source) for document in documents]


@pytest.mark.parametrize("lines", [".jsonl", ".json", ".ndjson"])
@pytest.mark.parametrize(
    "suffix, packed",
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), (".zst", zstd)],
)
def test_json_lines(tmp_path, lines, suffix, packed):
    path = tmp_path / f"rows{lines}{suffix}"
    path.write_bytes(packed(LINES + b"\n  \n"))
    documents = read(path)
    assert pairs(documents) == EXPECTED
    assert [document.id for document in documents] == [f"{path.name}:{i}" for i in range(40)]


def test_parquet_and_what_datasets_saved(tmp_path):
    import datasets

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=7)
    assert pairs(read(tmp_path / "rows.parquet")) == EXPECTED
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": whole, "test": whole.select(range(3))}).save_to_disk(str(tmp_path / "splits"))
    assert pairs(read(tmp_path / "saved")) == pairs(read(whole)) == pairs(read([whole])) == EXPECTED
    assert pairs(read(tmp_path / "splits")) == pairs(read(f"{tmp_path}/splits@train")) == EXPECTED
    assert pairs(read(f"{tmp_path}/splits@test")) == EXPECTED[:3]
    with pytest.raises(SourceError, match="splits@dev: expected one of the splits train, test"):
        read(f"{tmp_path}/splits@dev")
    assert pairs(read(whole.to_iterable_dataset())) == pairs(read(ROWS)) == EXPECTED
    chosen = whole.select([5, 3])  # an order of its own
    assert pairs(read(chosen)) == [EXPECTED[5], EXPECTED[3]]


def test_a_folder_is_read_by_name_and_names_are_unique(tmp_path):
    for name in ("b/2.jsonl", "a.jsonl", "b/10.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "notes.txt").write_text("not a source")
    assert [part.name for part in resolve(tmp_path)] == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    again = [part.name for part in resolve([tmp_path, str(tmp_path / "a.jsonl")])]
    assert again == ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "a.jsonl~2"]


def test_fields(tmp_path):
    rows = [{"body": {"text": "a"}, "meta": json.dumps({"set": {"name": "s"}})}]
    assert pairs(read([rows], Fields("body.text", "meta.set.name"))) == [("a", "s")]
    path = tmp_path / "wiki.2024.jsonl"
    path.write_text('{"text": "a"}\n{"text": " \\n"}\n')
    documents = read(path, Fields(source=None))
    assert pairs(documents) == [("a", "wiki"), ("", "wiki")]


def test_half_a_surrogate_pair_is_no_text_that_can_be_tokenised():
    rows = [{"text": "a\ud83d b \ud83d\ude00", "meta": {"redpajama_set_name": "s"}}]
    assert pairs(read([rows])) == [("a\ufffd b \U0001f600", "s")]


def test_names_that_are_not_utf_8_become_it(tmp_path):
    """They are written into the rows."""
    rows = [{"text": "a", "meta": {"redpajama_set_name": "\ud83d"}}]
    assert pairs(read([rows])) == [("a", "\ufffd")]
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_bytes(LINES)
    assert read(path)[0].id == "\ufffd.jsonl:0"
    assert [part.name for part in resolve([path, path])] == ["\ufffd.jsonl", "\ufffd.jsonl~2"]


def test_text_of_arrow_that_is_not_utf_8_is_named_or_skipped(tmp_path):
    import datasets

    some = pa.array([b"some text", *[b"more"] * 30, b"\xff", b"last"])
    wrong = pa.Array.from_buffers(pa.string(), len(some), some.buffers())
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    saved = datasets.Dataset(pa.table({"text": wrong}))
    for source, who in ((tmp_path / "a.parquet", r"a\.parquet"), (saved, "source0")):
        with pytest.raises(SourceError, match=f"{who}: row 31: expected text in UTF-8, got .*0xff"):
            read([source], Fields(source=None))
        documents = read([source], Fields(source=None, skip_bad=True))
        assert [document.text for document in documents] == ["some text", *["more"] * 30, "", "last"]
        assert [document.bad for document in documents] == [False] * 31 + [True, False]


WRONG = [
    ('{"content": "a", "id": 3}', "rows.jsonl:0: expected a field 'text', got the keys content, id"),
    (
        '{"text": "a", "meta": {"set": "b"}}',
        "rows.jsonl:0: expected a field 'meta.redpajama_set_name', got in meta the keys set",
    ),
    ('{"text": "a"}', "rows.jsonl:0: expected a field 'meta.redpajama_set_name', got the keys text"),
    ('{"text": "a", "meta": null}', "got in meta the keys NoneType, no keys"),
    ('{"text": 3, "meta": {"redpajama_set_name": "a"}}', "rows.jsonl:0: text: expected text, got int"),
    ('{"text": "a"', r"rows\.jsonl: line 1: expected a JSON object, got "),
    ("[1]", r"rows\.jsonl: line 1: expected a JSON object, got list"),
    ('{"text": ' + "[" * 100_000, r"rows\.jsonl: line 1: expected a JSON object, got maximum recursion depth"),
    ('{"text": "a", "meta": "' + "[" * 100_000 + '"}', "got in meta the keys str, no keys"),
]


@pytest.mark.parametrize("line, said", WRONG, ids=[said for _, said in WRONG])
def test_a_bad_row_is_named_or_skipped(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n" + LINES.decode())
    with pytest.raises(SourceError, match=said):
        read(path)
    documents = read(path, Fields(skip_bad=True))
    assert documents[0].bad and not any(document.bad for document in documents[1:])
    assert pairs(documents[1:]) == EXPECTED


@pytest.mark.parametrize("suffix, packed", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_damaged_file_is_named(tmp_path, suffix, packed, skip_bad):
    path = tmp_path / f"rows.jsonl{suffix}"
    whole = packed(LINES * 50)
    for damaged in (whole[: len(whole) * 2 // 3], whole[:20] + bytes(20) + whole[40:], b"no such thing at all"):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=rf"rows\.jsonl{suffix}: after line \d+: expected more of the file"):
            read(path, Fields(skip_bad=skip_bad))


def test_what_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: expected a file, a folder"):
        resolve(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: expected files named \*\.jsonl"):
        resolve(tmp_path / "empty")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SourceError, match="expected a name that ends with"):
        resolve(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_text("a")
    with pytest.raises(SourceError, match=r"a\.parquet: expected parquet, got"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"b\.parquet: expected a field 'text', got the columns body"):
        read(tmp_path / "b.parquet", Fields(skip_bad=True))
    with pytest.raises(SourceError, match="at least one, got none"):
        resolve([])
    with pytest.raises(
        SourceError, match="source0: expected a path, a dataset or rows that can be read more than once"
    ):
        resolve([iter(ROWS)])
    with pytest.raises(SourceError, match="nobody/nothing: expected a file, a folder, or a dataset on the hub"):
        resolve("nobody/nothing")  # HF_HUB_OFFLINE in tests


def test_the_order_depends_on_the_seed_alone(tmp_path):
    for i in range(20):
        lines = (json.dumps({"text": f"{i} {j}", "meta": {"redpajama_set_name": "a"}}) for j in range(i + 1))
        (tmp_path / f"{i:02}.jsonl").write_text("\n".join(lines))
    as_they_lie = read(tmp_path)
    for shuffle in (1, 7, 1000):
        first, again, other = (read(tmp_path, seed=seed, shuffle=shuffle) for seed in (1, 1, 2))
        assert first == again != other
        assert Counter(first) == Counter(other) == Counter(as_they_lie)
    # Parts are mixed: of the first quarter, most are not of the first quarter's parts.
    assert len({document.text.split()[0] for document in first[: len(first) // 4]}) > 10


def test_books_that_wait_to_be_shuffled_have_a_limit(monkeypatch):
    from llama1m_ext.data import documents

    monkeypatch.setattr(documents, "BUFFER_CHARS", 1000)
    rows = [{"text": "x" * 300, "meta": {"redpajama_set_name": str(i)}} for i in range(100)]
    read_so_far = []
    noted = (read_so_far.append(row) or row for row in rows)
    part = resolve([rows])[0]
    part = type(part)(part.name, "", 0, lambda columns: noted)
    for i, _ in enumerate(stream([part], Fields(), 0, 1000)):
        assert len(read_so_far) <= i + 1 + 1000 // 300
