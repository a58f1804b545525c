"""Packed rows: what is in them, whatever the number of workers, however often the build is killed, in bounded memory."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama1m_ext import data, testing
from llama1m_ext.data import checks, crew, packer, shards
from llama1m_ext.data.builder import Note
from llama1m_ext.data.mixture import Selection
from llama1m_ext.data.statistics import bin_of, start_of

WORDS = "the of and a to in is it long context tokens rope theta page block merge split rank".split()
SHARES = {"web": 0.7, "book": 0.2, "code": 0.1}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *WORDS]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BYTES = testing.tiny_tokenizer()
"""A byte is a token."""
CODES = {byte: BYTES.get_vocab()[char] for byte, char in bytes_to_unicode().items()}


def ids_of(text: str) -> list[int]:
    """What BYTES makes of a document."""
    return [256, *(CODES[byte] for byte in text.encode()), 257]


def texts(count: int, seed: int = 0, spread: float = 1.0) -> Iterator[str]:
    rng = random.Random(seed)
    for i in range(count):
        yield f"{i} " + " ".join(rng.choices(WORDS, k=1 + int(rng.lognormvariate(3, spread))))


def rows_of(count: int, seed: int = 0, shares: dict[str, float] = SHARES) -> list[dict]:
    rng = random.Random(seed)
    names = rng.choices(list(shares), list(shares.values()), k=count)
    return [
        {"text": text, "meta": {"redpajama_set_name": name}}
        for text, name in zip(texts(count, seed), names, strict=True)
    ]


def write_lines(folder: Path, rows: list[dict], files: int = 3) -> Path:
    folder.mkdir()
    for i in range(files):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[i::files]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def build(sources: Any, out: Path, tokenizer: Any, **options: Any) -> Any:
    """Small rows, small files, a small pool."""
    given = {"length": 128, "upsample_below": 40, "keep": 0.5, "shuffle": 20, "shard_tokens": 2048, "plot": False}
    return data.build(sources, out, tokenizer=tokenizer, progress=False, **{**given, **options})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "WAITING_TOKENS", 1024)


def in_a_child(do: Callable[[], Any]) -> tuple[int, Any]:
    """Its wait status, and what `do` returned there."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.write(write, json.dumps(do()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    return os.waitpid(pid, 0)[1], json.loads(said) if said else None


@settings(max_examples=15, deadline=None)
@given(
    some=st.lists(st.text(max_size=90), min_size=1, max_size=25),
    length=st.integers(1, 60),
    packing=st.sampled_from(["whole", "stream"]),
    shuffle=st.sampled_from([0, 5]),
)
def test_segments_are_the_documents_tokens(tmp_path_factory, some, length, packing, shuffle):
    out: Path = tmp_path_factory.mktemp("build") / "rows"
    rows = [{"text": text, "meta": {"redpajama_set_name": "s"}} for text in some]
    wanted = {f"source0:{i}": ids_of(text) for i, text in enumerate(some) if text and not text.isspace()}
    total = sum(map(len, wanted.values()))
    options = {"packing": packing, "shuffle": shuffle, "length": length, "keep": 1.0}
    if total < length:
        with pytest.raises(data.Shortfall, match=f"expected tokens for one row of {length}, got {total}"):
            build([rows], out, BYTES, **options)
        assert not list(out.parent.iterdir())  # nothing was made, nothing is left
        return
    made = build([rows], out, BYTES, **options)
    assert made.rows == len(data.open(out)) == total // length
    parts: dict[str, list[int]] = {}
    for row in data.open(out):
        assert row["input_ids"].shape == (length,)
        assert row["segments"][0]["start"] == 0 and row["segments"][-1]["end"] == length
        for one in row["segments"]:
            ids = parts.setdefault(one["document"], [])
            assert one["offset"] == len(ids) and one["source"] == "s"
            ids += row["input_ids"][one["start"] : one["end"]].tolist()
    for document, ids in parts.items():
        assert ids == wanted[document][: len(ids)]
    lacking = sum(len(ids) - len(parts.get(document, [])) for document, ids in wanted.items())
    assert lacking == total % length == made.statistics["tokens_left_over"]
    if packing == "stream" and not shuffle:
        joined = [token for ids in wanted.values() for token in ids]
        assert [t for row in data.open(out) for t in row["input_ids"].tolist()] == joined[: made.rows * length]


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, tokenizer, monkeypatch):
    from llama1m_ext.data import assembly

    monkeypatch.setattr(assembly, "_BATCH_DOCUMENTS", 16)
    source = write_lines(tmp_path / "source", rows_of(900))
    options = {"mixture": SHARES, "tokens": 128 * 150, "plot": True}
    for workers in (1, 3):
        made = build(source, tmp_path / f"rows{workers}", tokenizer, workers=workers, **options)
    one, three = contents(tmp_path / "rows1"), contents(tmp_path / "rows3")
    assert one == three and len(one) == 10 + 5
    assert one["lengths.png"].startswith(b"\x89PNG")
    assert made.statistics["documents_consumed"] < 900  # it ended because budgets were met, with batches read ahead
    monkeypatch.setattr(assembly, "_BATCH_DOCUMENTS", 5)
    build(source, tmp_path / "batches", tokenizer, **options)
    assert contents(tmp_path / "batches") == one
    build(source, tmp_path / "seed", tokenizer, seed=1, **options)
    assert contents(tmp_path / "seed")["data-00000.arrow"] != one["data-00000.arrow"]


KILLED_BEFORE = ("fsync", "replace", "rename", "unlink")


def test_a_bad_row_matters_when_its_turn_comes(tmp_path, tokenizer, monkeypatch):
    """Not when it is read ahead, which is further with more workers."""
    monkeypatch.setattr("llama1m_ext.data.assembly._BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(checks, "LOOKED_AT", 4)
    good, bad = {"text": "rope " * 30, "source": "web"}, {"text": None, "source": "web"}
    options = {"source_field": "source", "shuffle": 0, "upsample_below": 0}
    for workers in (1, 2):
        rows = [*[good] * 20, bad]
        made = build([rows], tmp_path / f"enough-{workers}", tokenizer, tokens=128 * 4, workers=workers, **options)
        assert made.rows == 4
        rows = [*[good] * 60, bad]
        with pytest.raises(ValueError, match="source0:60: text: expected text, got NoneType"):
            build([rows], tmp_path / f"all-{workers}", tokenizer, workers=workers, **{**options, "shard_tokens": 128})
        state = json.loads((tmp_path / f"all-{workers}.partial" / "progress.json").read_text())
        assert state["rows"] == 8  # all that 60 documents give, but for what waits
    assert contents(tmp_path / "enough-1") == contents(tmp_path / "enough-2")


def kill_at(step: int, source: Path, out: Path, tokenizer: Any, **options: Any) -> int:
    """A build killed before its call number `step` of those that change the disk. Returns its wait status."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return instead

    def do() -> None:
        for name in KILLED_BEFORE:
            setattr(os, name, counted(getattr(os, name)))
        build(source, out, tokenizer, resume=True, **options)

    return in_a_child(do)[0]


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_change_of_the_disk_it_goes_on_to_the_same_bytes(tmp_path, tokenizer, stride):
    source = write_lines(tmp_path / "source", rows_of(400))
    options = {"mixture": SHARES, "tokens": 128 * 60}
    build(source, tmp_path / "whole", tokenizer, **options)
    whole = contents(tmp_path / "whole")
    assert sum(name.endswith(".arrow") for name in whole) == 4
    step, killed = 1, 0
    while True:
        out = tmp_path / f"rows{step}"
        status = kill_at(step, source, out, tokenizer, **options)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
        build(source, out, tokenizer, resume=True, **options)
        assert contents(out) == whole, step
        assert not out.with_name(f"{out.name}.partial").exists()
        step += stride
    assert killed >= 40 // stride


def all_of_the_group_end(group: int) -> None:
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes of group {group} go on")


def test_killed_again_and_again_it_goes_on_to_the_same_bytes(tmp_path, tokenizer):
    """At random times, with processes that tokenise: they end too."""
    source = write_lines(tmp_path / "source", rows_of(1500))
    options = {"mixture": SHARES, "tokens": 128 * 200, "workers": 2, "resume": True, "keep": 0.9}
    build(source, tmp_path / "whole", tokenizer, **options)
    out, rng, kills = tmp_path / "rows", random.Random(0), 0

    def finished() -> int:
        try:
            return len(list(out.with_name("rows.partial").glob("data-*.arrow")))
        except FileNotFoundError:  # renamed while we looked
            return 0

    while True:
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, 0)
                build(source, out, tokenizer, **options)
            finally:
                os._exit(0)
        # After a file was finished, and a little later: each run gets further.
        there = finished()
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if finished() > there + 4:
                time.sleep(rng.random() * 0.02)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                all_of_the_group_end(pid)
                break
        else:
            break
    assert kills >= 2
    assert contents(out) == contents(tmp_path / "whole")


def test_going_on_does_not_tokenise_again(tmp_path, tokenizer, monkeypatch):
    from llama1m_ext.data import assembly, encode

    monkeypatch.setattr(assembly, "_BATCH_DOCUMENTS", 16)
    source = write_lines(tmp_path / "source", rows_of(400))
    encoded: list[str] = []
    call = encode.Encoder.__call__

    def noted(self: Any, some: list[str]) -> Any:
        encoded.extend(some)
        return call(self, some)

    monkeypatch.setattr(encode.Encoder, "__call__", noted)
    build(source, tmp_path / "whole", tokenizer)
    once = len(encoded)
    assert os.WTERMSIG(kill_at(16, source, tmp_path / "rows", tokenizer)) == signal.SIGKILL
    encoded.clear()
    build(source, tmp_path / "rows", tokenizer, resume=True)
    assert 0 < len(encoded) < once * 2 / 3
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")


def test_no_room_left_on_the_way_loses_nothing(tmp_path, tokenizer):
    import resource

    source = write_lines(tmp_path / "source", rows_of(400))
    build(source, tmp_path / "whole", tokenizer)

    def do() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # a file of rows has 2048 tokens
        with pytest.raises(OSError) as caught:
            build(source, tmp_path / "rows", tokenizer)
        return str(caught.value)

    status, said = in_a_child(do)
    assert status == 0 and "File too large" in said
    build(source, tmp_path / "rows", tokenizer, resume=True)
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")


def test_shares_are_kept_and_counted(tmp_path, tokenizer):
    rows = rows_of(4000, shares={"web": 0.5, "book": 0.2, "code": 0.2, "other": 0.1})
    made = build([rows], tmp_path / "rows", tokenizer, mixture=SHARES, tokens=128 * 400)
    found: Counter[str] = Counter()
    documents: dict[str, set[str]] = {}
    for row in data.open(tmp_path / "rows"):
        for one in row["segments"]:
            found[one["source"]] += one["end"] - one["start"]
            documents.setdefault(one["source"], set()).add(one["document"])
    assert sum(found.values()) == 128 * 400 and set(found) == set(SHARES)
    longest = max(len(row["text"].split()) for row in rows) + 2
    for source, share in SHARES.items():
        one = made.statistics["sources"][source]
        assert found[source] == one["tokens_written"]
        # Each source is off its budget by half a document at most, and what is too much is left out at the end.
        assert abs(found[source] - share * 128 * 400) <= 1.5 * longest
        assert one["share"] == pytest.approx(found[source] / (128 * 400), abs=1e-6) and one["wanted"] == share
        assert len(documents[source]) <= one["documents_taken"] < one["documents_read"]
        assert sum(one["lengths_read"].values()) == one["documents_read"]
        assert sum(one["lengths_taken"].values()) == one["documents_taken"]
    assert made.statistics["sources"]["other"]["documents_taken"] == 0
    assert made.statistics["passed_over"]["not_in_the_mixture"] > 0
    assert made.statistics["notes"] == []
    for word in ("web", "70.00%", "400 rows of 128 tokens"):
        assert word in str(made)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=300, max_size=300),
    tokens=st.integers(1, 3000),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_a_budget_is_missed_by_half_a_document_at_most(sizes, tokens, share, seed):
    selection = Selection(tokens, {"a": share, "b": 1 - share}, 0, 1.0, 0)
    rng, filled, took = random.Random(seed), 0, {"a": 0, "b": 0}
    for size in sizes:
        source = rng.choice("ab")
        if not selection.wants(source):
            continue
        filling = selection.filling
        if selection.take(source, size):
            took[source] += size
            filled += size if filling else 0
        selection.restore(json.loads(json.dumps(selection.state())))
    assert took == selection.spent
    if selection.done:
        assert tokens <= sum(took.values()) < tokens + 61
        for source, budget in (("a", tokens * share), ("b", tokens * (1 - share))):
            assert abs(took[source] - budget) <= 30 + filled
        assert filled <= 60 + 60 and not selection.missing()
    else:
        assert set(selection.missing()) == selection.open and all(lack > 0 for lack in selection.missing().values())


def test_a_source_asked_again_for_the_last_tokens_was_read_ahead_without(tmp_path, tokenizer, monkeypatch):
    """a is through with 98 tokens lacking, because its last document would have been 302; later b is, and a gives more."""
    from llama1m_ext.data import assembly, encode

    monkeypatch.setattr(assembly, "_BATCH_DOCUMENTS", 1)
    order = [("a", 200), ("a", 198), ("a", 300), ("b", 246), ("b", 248), *(("a", 58), ("b", 58)) * 8]
    rows = [{"text": "it " * size, "meta": {"redpajama_set_name": name}} for name, size in order]
    options = {"mixture": {"a": 0.5, "b": 0.5}, "tokens": 1000, "shuffle": 0, "length": 100, "tolerance": 0.1}
    build([rows], tmp_path / "one", tokenizer, **options)
    here: list[str] = []
    call = encode.Encoder.__call__
    monkeypatch.setattr(encode.Encoder, "__call__", lambda self, some: here.extend(some) or call(self, some))
    made = build([rows], tmp_path / "three", tokenizer, workers=3, **options)
    assert here and contents(tmp_path / "one") == contents(tmp_path / "three")
    assert made.rows == 10 and made.statistics["sources"]["a"]["tokens_taken"] > 402


def test_short_documents_are_kept_with_the_probability_given(tmp_path, tokenizer):
    rows = [{"text": "it " * (20 if i % 5 else 50), "meta": {"redpajama_set_name": "s"}} for i in range(4000)]
    few = {"keep": 0.1, "shard_tokens": 1 << 20}
    made = build([rows], tmp_path / "rows", tokenizer, **few)
    lengths = made.statistics["sources"]["s"]["lengths_taken"]
    long, short = (lengths[str(start_of(bin_of(size)))] for size in (50, 20))
    assert long == 800
    spread = math.sqrt(3200 * 0.1 * 0.9)
    assert abs(short - 320) < 4 * spread
    # Chance belongs to the document: whatever else is there, and in whatever order.
    taken = [
        {one["document"] for row in data.open(out) for one in row["segments"]}
        for out in (
            tmp_path / "rows",
            build([rows], tmp_path / "lie", tokenizer, **few, shuffle=0, packing="stream", workers=2).path,
        )
    ]
    assert len(taken[0] ^ taken[1]) <= 6  # in the last row or left over
    for keep, count in ((0.0, 800), (1.0, 4000)):
        again = build([rows], tmp_path / f"{keep}", tokenizer, keep=keep, shard_tokens=1 << 20).statistics["sources"][
            "s"
        ]
        assert again["documents_taken"] == count


def test_lengths_by_characters(tmp_path, tokenizer):
    rows = [{"text": "x" * n, "meta": {"redpajama_set_name": "s"}} for n in (39, 40, 41, 60, 79, 80, 81) * 10]
    made = build([rows], tmp_path / "rows", BYTES, keep=0.0, chars_per_token=2.0)
    assert made.statistics["sources"]["s"]["documents_taken"] == 20
    made = build([rows], tmp_path / "counted", BYTES, keep=0.0)
    assert made.statistics["sources"]["s"]["documents_taken"] == 60


def test_bytes_count_where_a_character_is_several_tokens(tmp_path, tokenizer):
    rows = [{"text": "漢" * 14, "meta": {"redpajama_set_name": "s"}}] * 20  # 42 tokens
    assert build([rows], tmp_path / "rows", BYTES, keep=0.0).statistics["sources"]["s"]["documents_taken"] == 20


@pytest.mark.parametrize(
    "separator, before, after", [("auto", [256], [257]), ("none", [], []), ("\n<|eot_id|>", [], [CODES[10], 260])]
)
def test_separators(tmp_path, separator, before, after):
    rows = [{"text": "ab", "meta": {"redpajama_set_name": "s"}}] * 30
    options = {"keep": 1.0, "shuffle": 0, "separator": separator, "packing": "stream", "length": 20}
    build([rows], tmp_path / "rows", BYTES, **options)
    one = [*before, *ids_of("ab")[1:-1], *after]
    assert data.open(tmp_path / "rows")[0]["input_ids"].tolist() == (one * 20)[:20]


def test_special_tokens_in_a_text_are_text(tmp_path):
    text = "a <|end_of_text|> b <|begin_of_text|>"
    build([[{"text": text}]], tmp_path / "rows", BYTES, source_field=None, length=len(text) + 2, keep=1.0)
    assert data.open(tmp_path / "rows")[0]["input_ids"].tolist() == ids_of(text)
    assert BYTES(text)["input_ids"].count(257) == 1  # the one given is as it was


def test_a_slow_tokenizer_gives_the_same(tmp_path):
    class Slow:
        """What is not fast is called, and pickled for workers."""

        is_fast, bos_token_id, eos_token_id = False, 256, 257

        def __call__(self, text: str, **options: Any) -> dict:
            assert options["add_special_tokens"] is False and options["split_special_tokens"] is True
            return {"input_ids": ids_of(text)[1:-1]}

    rows = rows_of(60)
    build([rows], tmp_path / "fast", BYTES)
    from llama1m_ext.data import encode

    monkey = pytest.MonkeyPatch()
    monkey.setattr(encode.pickle, "dumps", lambda given: b"slow")
    monkey.setattr(encode.pickle, "loads", lambda given: Slow())
    with monkey.context():
        build([rows], tmp_path / "slow", Slow())
    monkey.undo()
    fast, slow = contents(tmp_path / "fast"), contents(tmp_path / "slow")
    assert [fast[name] for name in fast if name.startswith("data")] == [slow[n] for n in slow if n.startswith("data")]


def test_tails_are_kept_or_dropped(tmp_path, tokenizer):
    rows = [{"text": "it " * n, "meta": {"redpajama_set_name": "s"}} for n in (126, 200, 300, 126, 500, 126)]
    options = {"keep": 1.0, "shuffle": 0}
    made = build([rows], tmp_path / "keep", tokenizer, **options)
    assert made.rows == (3 * 128 + 202 + 302 + 502) // 128 and made.statistics["documents_cut"]["longer"] == 3
    made = build([rows], tmp_path / "drop", tokenizer, tails="drop", **options)
    assert made.rows == 3 + 1 + 2 + 3 and made.statistics["tokens_left_over"] == 0
    assert all(len(row["segments"]) == 1 for row in data.open(tmp_path / "drop"))


def test_documents_apart(tmp_path, tokenizer):
    build([rows_of(60)], tmp_path / "rows", tokenizer, cross_document=False)
    row = data.open(tmp_path / "rows")[0]
    starts = [one["start"] for one in row["segments"]]
    assert row["position_ids"].eq(0).nonzero().flatten().tolist() == starts == row["cu_seqlens"].tolist()[:-1]


def test_needles_are_hidden_and_asked_for(tmp_path):
    rows = [{"text": text, "meta": {"redpajama_set_name": "web"}} for text in texts(200)]
    options = {"needles": 0.5, "needles_per_row": 3, "length": 1024, "tokens": 1024 * 20, "keep": 1.0}
    made = build([rows], tmp_path / "rows", BYTES, **options)
    build([rows], tmp_path / "again", BYTES, workers=2, shard_tokens=2048, **options)
    assert contents(tmp_path / "rows") == contents(tmp_path / "again")
    parts: dict[str, list[int]] = {}
    with_needles, depths = 0, []
    for i, row in enumerate(data.open(tmp_path / "rows")):
        assert row["input_ids"].shape == (1024,)
        assert [one["start"] for one in row["segments"][1:]] == [one["end"] for one in row["segments"][:-1]]
        for one in row["segments"]:
            ids = parts.setdefault(one["document"], [])
            assert one["offset"] == len(ids)
            ids += row["input_ids"][one["start"] : one["end"]].tolist()
        mine = [one for one in row["segments"] if one["source"] == "needles"]
        if mine:
            with_needles += 1
            assert {one["document"] for one in mine} == {f"needles:{i}"} and mine[-1]["end"] == 1024
            said = BYTES.decode(parts[f"needles:{i}"])
            facts = re.findall(r"Note: the access code of (\w+ \w+) is (\d{7})\.\n", said)
            asked = re.findall(r"Question: what is the access code of (\w+ \w+)\?\nAnswer: (\d{7})\n", said)
            assert len(facts) == 3 and sorted(facts) == sorted(asked)
            depths += [one["start"] / 1024 for one in mine[:-1]]
    assert 4 <= with_needles <= 16 and min(depths) < 0.3 and max(depths) > 0.5
    for i, row in enumerate(rows):  # the documents are whole in between
        ids = parts.get(f"source0:{i}", [])
        assert ids == ids_of(row["text"])[: len(ids)]
    written = made.statistics["sources"]["needles"]["tokens_written"]
    assert written == sum(len(ids) for name, ids in parts.items() if name.startswith("needles"))
    assert not made.statistics["notes"]


def test_too_few_tokens(tmp_path, tokenizer):
    rows = rows_of(300)
    options = {"mixture": {"web": 0.05, "code": 0.95}, "tokens": 128 * 400, "shard_tokens": 1 << 20}
    with pytest.raises(data.Shortfall, match=r"less than their shares, in tokens: code \d+; the rows made stay in"):
        build([rows], tmp_path / "rows", tokenizer, shortfall="error", **options)
    assert not (tmp_path / "rows").exists()
    # Fewer than a file has stay all the same.
    stayed = (tmp_path / "rows.partial" / "data-00000.arrow").read_bytes()
    with pytest.warns(Note) as said:
        made = build([rows], tmp_path / "rows", tokenizer, resume=True, **options)
    with pytest.warns(Note):
        build([rows], tmp_path / "at-once", tokenizer, **options)
    assert contents(tmp_path / "rows") == contents(tmp_path / "at-once")
    assert stayed == contents(tmp_path / "rows")["data-00000.arrow"]
    notes = [str(one.message) for one in said]
    assert notes == made.statistics["notes"] and made.rows < 1000
    assert (
        notes[0].startswith("sources have less than their shares")
        and "mixture: code: expected a share of 95.00%" in notes[2]
    )
    assert made.statistics["tokens_missing"]["code"] > 0
    with pytest.warns(
        Note, match=r"the sources have \d+ tokens less than were asked for: the rows have what there was"
    ):
        build([rows], tmp_path / "all", tokenizer, tokens=1 << 20)


def test_bad_and_empty_rows_are_counted(tmp_path, tokenizer):
    rows = [*rows_of(50), {"text": "  ", "meta": {"redpajama_set_name": "web"}}, {"body": 1}]
    made = build([rows], tmp_path / "rows", tokenizer, bad_rows="skip")
    assert made.statistics["passed_over"] == {"empty": 1, "bad": 1, "not_in_the_mixture": 0}
    assert made.statistics["documents_consumed"] == 52


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer):
    """Peak resident memory of processes that read 2 MB and 25 MB."""
    from llama1m_ext.demo.measure import peak_rss_bytes, reset_peak_rss

    def made_of(times: int) -> Path:
        path = tmp_path / f"{times}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for i in range(1000 * times):
                size = 7000 if i % 10 == 0 else 300
                row = {"text": "context " * (size // 8), "meta": {"redpajama_set_name": "web"}}
                file.write(json.dumps(row) + "\n")
        return path

    def peak(times: int) -> int:
        source, out = made_of(times), tmp_path / f"rows{times}"

        def do() -> int:
            assert reset_peak_rss()
            before = peak_rss_bytes()
            build(source, out, tokenizer, upsample_below=800, keep=0.0, length=4096, shard_tokens=1 << 16)
            return peak_rss_bytes() - before

        status, grown = in_a_child(do)
        assert status == 0
        return grown

    small, large = peak(2), peak(25)
    assert large < small + (8 << 20), (small, large)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "source", rows_of(60))


WRONG = [
    ({"length": 0}, "length: expected 1 to 2147483647 tokens, got 0"),
    ({"tokens": 100}, "tokens: expected those of one row at least, 128, got 100"),
    ({"keep": 1.5}, "keep: expected a probability, 0 to 1, got 1.5"),
    ({"chars_per_token": 0.0}, "chars_per_token: expected a finite number over 0, got 0.0"),
    ({"workers": 0}, "workers: expected 1 at least, got 0"),
    ({"packing": "tight"}, "packing: expected whole or stream, got 'tight'"),
    ({"chars_per_token": math.inf}, "chars_per_token: expected a finite number over 0, got inf"),
    ({"tolerance": math.nan}, "tolerance: expected a difference of shares, 0 to 1, got nan"),
    ({"tails": "cut"}, "tails: expected keep or drop, got 'cut'"),
    ({"bad_rows": "no"}, "bad_rows: expected error or skip, got 'no'"),
    ({"shortfall": "no"}, "shortfall: expected keep or error, got 'no'"),
    ({"separator": ""}, "separator: expected a text with tokens, got ''"),
    ({"mixture": SHARES}, "mixture: expected tokens with it"),
    ({"mixture": {"web": 0.5}, "tokens": 256}, "mixture: expected shares that sum to 1, got 0.5"),
    ({"mixture": "web=0.5,book=x", "tokens": 256}, "mixture: book: expected a share over 0 and at most 1, got 'x'"),
    (
        {"mixture": "slimpajama", "tokens": 256},
        "expected some of the sources there are, book, code, web, got RedPajamaC4",
    ),
    (
        {"mixture": "web=0.5,boook=0.5", "tokens": 256},
        "mixture: boook: expected one of the sources there are, book, code, web",
    ),
    ({"text_field": "content"}, "expected a field 'content', got the keys text, meta"),
    ({"text_field": "content", "bad_rows": "skip"}, "got 60 rows without content or meta.redpajama_set_name"),
    ({"source_field": "meta.set"}, "expected a field 'meta.set', got in meta the keys redpajama_set_name"),
    ({"needles": 2.0}, "needles: expected a share of rows, 0 to 1, got 2.0"),
    ({"needles": 0.5, "needles_per_row": 0}, "needles_per_row: expected 1 at least, got 0"),
    ({"needles": 0.5, "needles_per_row": 20}, "needles_per_row: expected half a row of 128 tokens at most, got "),
    ({"tokenizer": "/none"}, "tokenizer: expected a folder or a name that has one, got '/none'"),
]


@pytest.mark.parametrize("options, said", WRONG)
def test_what_is_wrong_is_said_before_the_work(tmp_path, tokenizer, source, options, said):
    with pytest.raises(ValueError) as caught:
        build(source, tmp_path / "rows", options.pop("tokenizer", tokenizer), **options)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_missing_or_there_is_said_before_the_work(tmp_path, tokenizer, source, monkeypatch):
    with pytest.raises(FileNotFoundError, match="mixture: expected slimpajama, none, "):
        build(source, tmp_path / "rows", tokenizer, mixture="shares.toml", tokens=256)
    without = testing.tiny_tokenizer()
    without.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an EOS token, got None"):
        build(source, tmp_path / "rows", without)
    for out in (".", "/", ""):
        with pytest.raises(ValueError, match=f"out: expected a folder to make, got '{out}'"):
            build(source, out, tokenizer)
    with pytest.raises(FileExistsError, match="source: it is there already"):
        build(source, source, tokenizer)
    with pytest.raises(FileExistsError, match="not made with these options"):
        build(source, source, tokenizer, resume=True)
    with pytest.raises(FileNotFoundError, match="expected a folder to make rows in"):
        build(source, tmp_path / "none" / "rows", tokenizer)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 30}))
    with pytest.raises(OSError, match=r"expected room for \d+ bytes of rows, got 1073741824 bytes free"):
        build(source, tmp_path / "rows", tokenizer, tokens=1 << 30)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mixtures_from_files_and_text(tmp_path, tokenizer, source):
    (tmp_path / "shares.json").write_text(json.dumps(SHARES))
    (tmp_path / "shares.toml").write_text("\n".join(f"{name} = {share}" for name, share in SHARES.items()))
    given = [SHARES, tmp_path / "shares.json", str(tmp_path / "shares.toml"), "web=0.7, book=0.2, code=0.1"]
    made = []
    for i, mixture in enumerate(given):
        options = {"mixture": mixture, "tokens": 640, "tolerance": 0.1}  # a document is much of 5 rows
        made.append(contents(build(source, tmp_path / f"{i}", tokenizer, **options).path))
    assert made[0] == made[1] == made[2] == made[3]
    assert sum(data.SLIMPAJAMA.values()) == pytest.approx(1, abs=1e-7)
    (tmp_path / "shares.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"shares\.json: expected JSON or TOML, got .*0xff"):
        build(source, tmp_path / "rows", tokenizer, mixture=tmp_path / "shares.json", tokens=640)


def test_a_mixtures_source_that_does_not_come_soon_is_warned_of(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(checks, "LOOKED_AT", 30)
    rows = [*rows_of(400, shares={"web": 1.0}), *rows_of(100, shares={"book": 1.0})]
    options = {"mixture": {"web": 0.5, "book": 0.5}, "tokens": 1280}
    with pytest.warns(UserWarning, match="mixture: book: not among the first 30 documents, which have web"):
        made = build([rows], tmp_path / "rows", tokenizer, **options)
    assert made.rows == 10 and not made.statistics["notes"]


def test_going_on_needs_the_same(tmp_path, tokenizer, source):
    out = tmp_path / "rows"
    options = {"shard_tokens": 128}
    assert os.WTERMSIG(kill_at(60, source, out, tokenizer, **options)) == signal.SIGKILL
    with pytest.raises(FileExistsError, match=r"rows\.partial: a build was begun there"):
        build(source, out, tokenizer, **options)
    with pytest.raises(ValueError, match=r"rows\.partial: keep: expected 0\.5 as it was begun, got 0\.4"):
        build(source, out, tokenizer, resume=True, keep=0.4, **options)
    (source / "3.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r'sources: expected "3 parts \w+" as it was begun, got "4 parts'):
        build(source, out, tokenizer, resume=True, **options)
    (source / "3.jsonl").unlink()
    first = tmp_path / "rows.partial" / "data-00000.arrow"
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"data-00000\.arrow: expected {len(whole)} bytes as they were written"):
        build(source, out, tokenizer, resume=True, **options)
    first.write_bytes(whole)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # somebody else is at it
        import fcntl

        fd = os.open(tmp_path / "rows.partial" / "lock", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(write, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    with pytest.raises(BlockingIOError, match="another process is building there"):
        build(source, out, tokenizer, resume=True, **options)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    made = build(source, out, tokenizer, resume=True, **options)
    again = build(source, out, tokenizer, resume=True, **options)  # it is whole
    assert again == made
    with pytest.raises(
        FileExistsError, match=r"not made with these options: keep: expected 0\.5 as it was made, got 0\.4"
    ):
        build(source, out, tokenizer, resume=True, keep=0.4, **options)
    with pytest.raises(FileExistsError, match="it is there already"):
        build(source, out, tokenizer, **options)


def test_going_on_removes_nothing_of_others(tmp_path, tokenizer, source):
    mine = tmp_path / "rows.partial"
    mine.mkdir()
    for name in ("data-00000.arrow", "notes.txt"):
        (mine / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"expected what a build has left there, got {name} in it"):
            build(source, tmp_path / "rows", tokenizer, resume=True)
        assert [path.read_text() for path in mine.iterdir()] == ["mine"]
        (mine / name).unlink()
    build(source, tmp_path / "rows", tokenizer, resume=True)

    out, options = tmp_path / "more", {"shard_tokens": 128}
    assert os.WTERMSIG(kill_at(60, source, out, tokenizer, **options)) == signal.SIGKILL
    (tmp_path / "more.partial" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"more\.partial: expected .*, got notes\.txt in it"):
        build(source, out, tokenizer, resume=True, **options)
    assert (tmp_path / "more.partial" / "notes.txt").read_text() == "mine"


def test_a_worker_that_is_killed_is_said(tmp_path, tokenizer, source, monkeypatch):
    start = crew.subprocess.Popen

    def killed(*args: Any, **more: Any) -> Any:
        process = start(*args, **more)
        process.kill()
        return process

    monkeypatch.setattr(crew.subprocess, "Popen", killed)
    with pytest.raises(RuntimeError, match="a process that tokenises ended with -9; out of memory"):
        build(source, tmp_path / "rows", tokenizer, workers=2)
    monkeypatch.undo()
    monkeypatch.setattr(packer, "WAITING_TOKENS", 1024)
    assert build(source, tmp_path / "rows", tokenizer, workers=2, resume=True).rows > 0


def test_the_command(tmp_path, tokenizer, source):
    from typer.testing import CliRunner

    from llama1m_ext.cli import app

    tokenizer.save_pretrained(str(tmp_path / "model"))
    some = f"--tokenizer {tmp_path / 'model'} --length 64 --tokens 1280 --mixture web=0.7,book=0.2,code=0.1 --keep 1"
    command = ["data", str(source), "--out", str(tmp_path / "rows"), *some.split(), "--workers", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    assert "20 rows of 64 tokens" in answer.output and "book" in answer.output
    assert len(data.open(tmp_path / "rows")) == 20 and (tmp_path / "rows" / "lengths.png").is_file()
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 1 and f"error: {tmp_path / 'rows'}: it is there already" in answer.output
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0


def test_datasets_reads_what_was_built(tmp_path, tokenizer, source):
    import datasets

    made = build(source, tmp_path / "rows", tokenizer)
    loaded = datasets.load_from_disk(str(tmp_path / "rows"))
    assert len(loaded) == made.rows
    assert np.array_equal(loaded.with_format("numpy")[3]["input_ids"], data.open(made.path)[3]["input_ids"].numpy())
    assert loaded[3]["segments"] == data.open(made.path)[3]["segments"]
