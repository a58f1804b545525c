"""Rows on disk: what is written is read, by us, by `datasets` and in a DataLoader's workers; what is wrong is said."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama1m_ext import data
from llama1m_ext.data import shards


def some_rows(count: int, length: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "input_ids": rng.integers(0, 128_256, length),
            "labels": rng.integers(-100, 128_256, length),
            "loss_weights": rng.random(length, dtype=np.float32),
            "segments": [
                {"source": "a", "document": f"{i}", "start": 0, "end": 3, "offset": 7},
                {"source": "b", "document": "b", "start": 3, "end": length, "offset": 0},
            ],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("shard_tokens", [1, 64, 1 << 20])
def test_what_is_written_is_read(tmp_path, shard_tokens, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_TOKENS", 40)  # 3 rows of a file share a record batch, or 1
    made = some_rows(23, 16)
    rows = data.write(iter(made), tmp_path / "rows", shard_tokens=shard_tokens)
    assert len(rows) == 23 and rows.length == 16
    assert len(list((tmp_path / "rows").glob("*.arrow"))) == {1: 23, 64: 6, 1 << 20: 1}[shard_tokens]
    for i in [*range(23), -1, -23]:
        row = rows[i]
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        assert row["loss_weights"].dtype == torch.float32
        for name in ("input_ids", "labels", "loss_weights"):
            assert np.array_equal(row[name].numpy(), made[i][name])
        assert row["segments"] == made[i]["segments"]
    for i in (23, -24):
        with pytest.raises(IndexError, match=f"from -23 to 22, got {i}"):
            rows[i]
    assert [row["input_ids"][0].item() for row in rows] == [row["input_ids"][0] for row in made]  # ends by IndexError


def test_datasets_reads_it(tmp_path):
    import datasets

    made = some_rows(5, 8)
    data.write(made, tmp_path / "rows", shard_tokens=16)
    loaded = datasets.load_from_disk(str(tmp_path / "rows"))
    assert len(loaded) == 5 and loaded.column_names == ["input_ids", "labels", "loss_weights", "segments"]
    assert loaded[3]["input_ids"] == made[3]["input_ids"].tolist()
    assert loaded[3]["segments"] == made[3]["segments"]
    assert loaded.with_format("torch")[4]["input_ids"].tolist() == made[4]["input_ids"].tolist()
    assert loaded.cache_files  # mapped, not loaded
    # And what it saves again is read here.
    loaded.filter(lambda row: row["segments"][0]["document"] != "1").save_to_disk(str(tmp_path / "fewer"))
    fewer = data.open(tmp_path / "fewer")
    assert len(fewer) == 4 and fewer.length is None
    assert fewer[1]["segments"] == made[2]["segments"]
    assert fewer[1]["loss_weights"].tolist() == made[2]["loss_weights"].tolist()


def test_ids_alone(tmp_path):
    rows = data.write([[1, 2, 3], np.array([4, 5, 6], np.uint32), torch.tensor([7, 8, 9])], tmp_path / "r", source="s")
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert rows[0]["segments"] == [{"source": "s", "document": "", "start": 0, "end": 3, "offset": 0}]
    assert rows.columns == ["input_ids", "segments"]


def test_position_ids_begin_anew_in_each_segment(tmp_path):
    data.write(some_rows(2, 8), tmp_path / "apart", cross_document=False)
    row = data.open(tmp_path / "apart")[1]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4] and row["position_ids"].dtype == torch.int64
    assert row["cu_seqlens"].tolist() == [0, 3, 8] and row["cu_seqlens"].dtype == torch.int32
    assert "position_ids" not in data.open(tmp_path / "apart", position_ids=False)[0]
    data.write(some_rows(2, 8), tmp_path / "together")
    assert "position_ids" not in data.open(tmp_path / "together")[0]
    only = data.open(tmp_path / "together", columns=["input_ids"], position_ids=True, segments=False)
    assert only.columns == list(only[0]) == ["input_ids", "position_ids", "cu_seqlens"]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_in_workers_of_a_data_loader(tmp_path, context):
    made = some_rows(6, 8)
    rows = data.write(made, tmp_path / "rows", shard_tokens=16)
    rows[0]  # mapped here before the workers are made
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, num_workers=1, collate_fn=data.collate, multiprocessing_context=context
    )
    batches = list(loader)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8)] * 3
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == [row["input_ids"].tolist() for row in made]
    assert batches[1]["segments"] == [made[2]["segments"], made[3]["segments"]]
    assert len(pickle.dumps(rows)) < 4096


def test_default_collate_takes_rows_without_segments(tmp_path):
    rows = data.write(some_rows(4, 8), tmp_path / "rows")
    loader = torch.utils.data.DataLoader(data.open(tmp_path / "rows", segments=False), batch_size=4)
    assert next(iter(loader))["input_ids"].tolist() == [rows[i]["input_ids"].tolist() for i in range(4)]


def test_a_row_is_copied_once(tmp_path):
    """The file stays mapped: a long row allocates its tensor and nothing of its size beside it."""
    import pyarrow

    length = 1 << 20
    rows = data.write((np.arange(i, i + length) for i in range(2)), tmp_path / "rows")
    before = pyarrow.total_allocated_bytes()
    import tracemalloc

    tracemalloc.start()  # numpy reports what it allocates; torch's allocation is the row itself
    row = rows[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16 and pyarrow.total_allocated_bytes() - before < 1 << 16
    assert row["input_ids"][-1] == length


WRONG = [
    ([[1, 2], [1, 2, 3]], r"row 1: input_ids: expected 2 values in one dimension, got the shape \(3,\)"),
    ([[[1, 2]]], r"row 0: input_ids: expected 1 values in one dimension, got the shape \(1, 2\)"),
    ([[0.5, 2.0]], "row 0: input_ids: expected integers, got float64"),
    ([[1, -1]], "row 0: input_ids: expected values from 0 to 2147483647, got -1 to 1"),
    ([[1, 1 << 31]], "got 1 to 2147483648"),
    ([], "rows: expected at least one, got none"),
    ([[]], "length: expected at least 1 token, got 0"),
    ([{"ids": [1]}], r"expected input_ids, labels, loss_weights, segments, got the keys \['ids'\]"),
    (
        [{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}],
        "row 1: expected the columns of the first row, input_ids, ",
    ),
    ([{"input_ids": [1, 2], "loss_weights": [1.0, float("nan")]}], "finite numbers, got float64 with nan at 1"),
    ([{"input_ids": [1, 2], "segments": [{"start": 1, "end": 2}]}], "expected one that begins at 0, got 1 to 2"),
    ([{"input_ids": [1, 2], "segments": [{"start": 0, "end": 1}]}], "expected them to end at 2, got 1"),
]


@pytest.mark.parametrize("rows, said", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        data.write(iter(rows), tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(FileExistsError, match="it is there already"):
        data.write([[1]], tmp_path / "rows")
    with pytest.raises(FileNotFoundError, match="expected a folder to make rows in"):
        data.write([[1]], tmp_path / "none" / "rows")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"] and not list((tmp_path / "rows").iterdir())


def test_no_room_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="expected room for 8256 bytes of rows, got 1000 bytes free"):
        data.write([[1] * 8, [2] * 8], tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_opening_what_is_no_folder_of_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of rows"):
        data.open(tmp_path / "none")
    with pytest.raises(ValueError, match=r"with a state\.json"):
        data.open(tmp_path)
    data.write(some_rows(2, 8), tmp_path / "rows")
    with pytest.raises(ValueError, match=r"columns: expected some of input_ids, labels, .*, got label"):
        data.open(tmp_path / "rows", columns=["label"])
    file = tmp_path / "rows" / "data-00000.arrow"
    whole = file.read_bytes()
    for cut in (0, 7, len(whole) // 3, len(whole) - 20):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"data-00000\.arrow|no rows"):
            data.open(tmp_path / "rows")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a file that state\.json names"):
        data.open(tmp_path / "rows")
    for state in ("{}", '{"_data_files": 5}', '{"_data_files": ["a"]}', '{"_data_files": [{"name": "a"}]}'):
        (tmp_path / "rows" / "state.json").write_text(state)
        with pytest.raises(ValueError, match=r"state\.json: expected _data_files with filenames, got "):
            data.open(tmp_path / "rows")


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 9), count=st.integers(1, 12), shard=st.integers(1, 40), batch=st.integers(1, 20))
def test_any_sizes(tmp_path_factory, length, count, shard, batch):
    out: Path = tmp_path_factory.mktemp("any") / "rows"
    ids = np.arange(count * length).reshape(count, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BATCH_TOKENS", batch)
        rows = data.write(ids, out, shard_tokens=shard)
    assert [row["input_ids"].tolist() for row in rows] == ids.tolist()
    facts = json.loads((out / "llama1m.json").read_text())
    assert facts == {"length": length, "columns": ["input_ids"], "rows": count, "cross_document": True}
