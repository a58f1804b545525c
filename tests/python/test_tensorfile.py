"""Safetensors files that are written in a stream: what other programs read, and what is left when writing ends early."""

from __future__ import annotations

import json
import os
import re
import struct

import pytest
import torch

from llama1m_ext import tensorfile
from llama1m_ext.stored import CacheDamaged, PageSource, as_bytes, checksum

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def entry(name, tensor, parts=None):
    return (name, tensor.dtype, tuple(tensor.shape), [tensor] if parts is None else parts)


def loaded(path):
    """What our reader finds: tensors by name, with their checksums verified."""
    source = PageSource.open(path)
    found = {}
    for name, (span, expected) in tensorfile.read(source)[1].items():
        memory = torch.empty(span.nbytes, dtype=torch.uint8)
        source.read(span.offset, memory)
        assert checksum(memory) == expected, name
        found[name] = memory.view(span.dtype).view(span.shape)
    return found


def some(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        entry(f"{i}.{dtype}", torch.randn(i % 3, 5, i + 1, generator=draw).mul(3).to(dtype))
        for i, dtype in enumerate(DTYPES)
    ]


# -- what is in them -----------------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_every_dtype(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "f.safetensors"
    entries = some()
    tensorfile.write(path, entries, {"title": "Für Elise \U0001f3b9", "quote": '"\\'})
    ours = loaded(path)
    with safe_open(path, "pt") as theirs:
        assert theirs.metadata()["title"] == "Für Elise \U0001f3b9"
        for name, dtype, shape, (tensor,) in entries:
            for found in (ours[name], theirs.get_tensor(name)):
                assert found.dtype == dtype
                assert found.shape == shape
                assert torch.equal(as_bytes(found.contiguous()), as_bytes(tensor))
    assert tensorfile.read(path)[0] == {"title": "Für Elise \U0001f3b9", "quote": '"\\'}
    assert ours.keys() == {name for name, *_ in entries}


def test_tensors_begin_at_multiples_of_64_bytes(tmp_path):
    tensors = [entry(str(n), torch.arange(n, dtype=torch.uint8)) for n in (1, 63, 64, 65, 0, 7)]
    tensorfile.write(tmp_path / "f", tensors, {})
    for span, _ in tensorfile.read(tmp_path / "f")[1].values():
        assert span.offset % 64 == 0


def test_parts_are_asked_for_one_by_one(tmp_path):
    whole = torch.randn(1000, 64)
    asked = []

    def parts():
        for i, part in enumerate(whole.split(100)):
            # What was given before is in the file.
            (name,) = os.listdir(tmp_path)
            assert os.stat(tmp_path / name).st_size >= i * 100 * 64 * 4
            asked.append(i)
            yield part

    tensorfile.write(tmp_path / "f", [entry("x", whole, parts())], {})
    assert asked == list(range(10))
    assert torch.equal(loaded(tmp_path / "f")["x"], whole)


@pytest.mark.parametrize(
    "parts",
    [
        [torch.zeros(3)],
        [torch.zeros(5)],
        [torch.zeros(2), torch.zeros(2), torch.zeros(1)],
        [torch.zeros(2, dtype=torch.float64)],
        [torch.zeros(4, 2)[:, 0]],
        [],
    ],
    ids=["too few", "too many", "one too many", "another dtype", "strided", "none"],
)
def test_parts_that_are_not_what_was_announced(tmp_path, parts):
    with pytest.raises(ValueError, match="x: expected"):
        tensorfile.write(tmp_path / "f", [("x", torch.float32, (4,), parts)], {})
    assert not os.listdir(tmp_path)


def test_names_must_differ(tmp_path):
    for names in (["a", "a"], ["__metadata__"]):
        with pytest.raises(ValueError, match="expected different names"):
            tensorfile.write(tmp_path / "f", [entry(name, torch.zeros(16)) for name in names], {})
    assert not os.listdir(tmp_path)


def test_paths_that_can_not_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        tensorfile.write(tmp_path / "folder", some(), {})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tensorfile.write(tmp_path / "nowhere" / "f", some(), {})
    assert os.listdir(tmp_path) == ["folder"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "f")
    tensorfile.write(tmp_path / "link", some(), {})
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["f"]


def test_a_file_that_is_open_stays_as_it_is(tmp_path):
    path = tmp_path / "f"
    tensorfile.write(path, [entry("x", torch.zeros(100))], {"n": "old"})
    source = PageSource.open(path, mapped=True)
    tensorfile.write(path, [entry("y", torch.ones(50))], {"n": "new"})
    metadata, spans = tensorfile.read(source)
    assert metadata == {"n": "old"}
    assert source.view(0) is not None
    assert not source.view(0)[spans["x"][0].offset :].any()
    assert tensorfile.read(path)[0] == {"n": "new"}


# -- ends of all kinds ---------------------------------------------------------------------------------------------------

# A process that forks others, each of which writes file after file until it is ended: they need not import anything.
WRITERS = r"""
import errno, os, random, resource, signal, sys, time
import torch
torch.set_num_threads(1)
from llama1m_ext import tensorfile

path, folder, how = sys.argv[1], os.path.dirname(sys.argv[1]), sys.argv[2]
draw = random.Random(int(sys.argv[3]))


def entries(n):
    return [(f"t{i}", torch.int32, (30000, 7), [torch.full((10000, 7), n, dtype=torch.int32)] * 3) for i in range(3)]


def forever():
    n = 0
    while True:
        n += 1
        tensorfile.write(path, entries(n), {"n": str(n)})


def whole():
    # One version, from the first byte to the last.
    metadata, spans = tensorfile.read(path)
    source = tensorfile.PageSource.open(path)
    for span, expected in spans.values():
        x = torch.empty(span.nbytes, dtype=torch.uint8)
        source.read(span.offset, x)
        assert tensorfile.checksum(x) == expected
        assert (x.view(torch.int32) == int(metadata["n"])).all()
    return int(metadata["n"])


def child(do):
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            do()
            code = 0
        except KeyboardInterrupt:
            code = 3
        except BaseException as e:
            print(type(e), e, flush=True)
        finally:
            os._exit(code)
    return pid


def steps(names, at, end):
    # Calls of the operating system from here on are counted, and the one number `at` is the last: `end` is called.
    count = [0]
    for name in names:
        def counted(*args, real=getattr(os, name), **kwargs):
            count[0] += 1
            if count[0] == at:
                end()
            return real(*args, **kwargs)
        setattr(os, name, counted)
    return count


CALLS = ["open", "pwrite", "fsync", "replace", "unlink", "close", "fstat"]
tensorfile.write(path, entries(0), {"n": "0"})
left = before = 0
if how == "kills":
    for _ in range(int(sys.argv[4])):
        pid = child(forever)
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        before = max(before, whole())
        left += len(os.listdir(folder)) - 1
elif how in ("steps", "interrupts"):
    def end():
        if how == "steps":
            os._exit(7)
        raise KeyboardInterrupt
    at = 0
    while True:
        at += 1
        def once():
            steps(CALLS, at, end)
            tensorfile.write(path, entries(at), {"n": str(at)})
        code = os.waitstatus_to_exitcode(os.waitpid(child(once), 0)[1])
        n = whole()
        assert n in (at - 1, at), (n, at)
        if code == 0:
            assert n == at
            break
        assert code == (7 if how == "steps" else 3), code
        left += len(os.listdir(folder)) - 1
        if n != at:
            tensorfile.write(path, entries(at), {"n": str(at)})
    before = at
print("left", left, "before", before)
tensorfile.write(path, entries(1), {"n": "1"})
assert os.listdir(folder) == [os.path.basename(path)], os.listdir(folder)
assert whole() == 1
"""


def writers(run_script, tmp_path, how, *more):
    out = run_script(WRITERS, str(tmp_path / "f"), how, *map(str, more))
    match = re.fullmatch(r"left (\d+) before (\d+)", out.strip())
    assert match, out
    return int(match[1]), int(match[2])


@pytest.fixture
def run_script(run_python):
    def run(script, *words):
        return run_python(f"import sys; sys.argv[1:] = {list(words)!r}\n{script}")

    return run


def test_a_kill_at_a_random_moment_leaves_the_old_file_or_the_new_one(run_script, tmp_path):
    left, written = writers(run_script, tmp_path, "kills", 0, 30)
    assert written, "they were killed before they wrote anything"
    assert left, "none was killed while it wrote"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_thousand_kills(run_script, tmp_path, seed):
    left, written = writers(run_script, tmp_path, "kills", seed, 250)
    assert written > 1
    assert left > 50


def test_a_kill_before_each_call_of_the_system(run_script, tmp_path):
    left, calls = writers(run_script, tmp_path, "steps", 0)
    assert calls > 15, "each part is a call"
    assert left > 12, "a kill can't clean up"


def test_ctrl_c_before_each_call_of_the_system_leaves_nothing_behind(run_script, tmp_path):
    left, calls = writers(run_script, tmp_path, "interrupts", 0)
    assert calls > 15
    # Ctrl-C before the temporary file is unlinked: the next writer removes it.
    assert left <= 3


FULL = """
import os, resource, signal, sys
import torch
torch.set_num_threads(1)
from llama1m_ext import tensorfile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = sys.argv[1]
tensorfile.write(path, [("x", torch.float32, (100,), [torch.ones(100)])], {})
old = open(path, "rb").read()
tensors = [(f"{i}", torch.float32, (5000,), [torch.randn(1000) for _ in range(5)]) for i in range(5)]
size = 5 * 20032
for limit in (10, 100, 1000, 20_000, 33_333, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        tensorfile.write(path, tensors, {})
        raise SystemExit(f"written with a limit of {limit}")
    except OSError as e:
        assert e.filename == path, e.filename
        needed = int(str(e).split("it takes ")[1].split()[0])
        assert size < needed < size + 2048, e
        assert "were free" in str(e), e
    assert open(path, "rb").read() == old
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tensorfile.write(path, tensors, {})
"""


def test_a_full_disk(run_script, tmp_path):
    run_script(FULL, str(tmp_path / "f"))


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    path = tmp_path / "f"
    tensorfile.write(path, some(), {})
    old = path.read_bytes()
    monkeypatch.setattr(tensorfile.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 500))

    def never():
        raise AssertionError("asked for what has no room")
        yield

    with pytest.raises(OSError, match=r"it takes 4[0-9]{5} bytes, and 500 are free") as caught:
        tensorfile.write(path, [("x", torch.float32, (100_000,), never())], {})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["f"]


def test_an_exception_in_a_part_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    tensorfile.write(path, some(), {})
    old = path.read_bytes()

    def parts():
        yield torch.zeros(10)
        raise CacheDamaged("that page is gone")

    with pytest.raises(CacheDamaged, match="that page is gone"):
        tensorfile.write(path, [("x", torch.float32, (20,), parts())], {})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["f"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    mine = tmp_path / ".f.0123456789abcdef.tmp"
    others = [tmp_path / name for name in (".g.0123456789abcdef.tmp", ".f.tmp", "f.tmp", ".f.0123456789abcdef.tmp.txt")]
    for each in [mine, *others]:
        each.write_bytes(b"x")
    tensorfile.write(path, some(), {})
    assert not mine.exists()
    assert all(each.exists() for each in others)


def test_two_writers_at_once_leave_each_other_alone(tmp_path):
    path = tmp_path / "f"

    def parts():
        yield torch.zeros(10)
        tensorfile.write(path, [entry("y", torch.ones(5))], {})  # somebody else, in the middle of it
        assert len(os.listdir(tmp_path)) == 2
        yield torch.zeros(10)

    tensorfile.write(path, [("x", torch.float32, (20,), parts())], {})
    assert loaded(path).keys() == {"x"}
    assert os.listdir(tmp_path) == ["f"]


# -- files of others -----------------------------------------------------------------------------------------------------


def test_a_file_of_the_safetensors_library(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.arange(7), "b": torch.randn(3, 2).half()}, tmp_path / "f", {"x": "y"})
    metadata, spans = tensorfile.read(tmp_path / "f")
    assert metadata == {"x": "y"}
    assert {name: (span.dtype, span.shape, value) for name, (span, value) in spans.items()} == {
        "a": (torch.int64, (7,), None),
        "b": (torch.float16, (3, 2), None),
    }


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE = {
    "an empty file": b"",
    "seven bytes": b"\1\0\0\0\0\0\0",
    "a header of no bytes": struct.pack("<Q", 0),
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a header of 2**63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "a header of 2**64 - 1 bytes": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "no JSON": b"{]",
    "no UTF-8": b'{"\xff":1}',
    "a list": [],
    "a number": 7,
    "null": None,
    "a hundred thousand brackets": b"[" * 100_000,
    "a number of ten thousand digits": b'{"x":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,16]}}',
    "a name twice": b'{"x":%s,"x":%s}' % ((json.dumps(F32).encode(),) * 2),
    "metadata twice": b'{"__metadata__":{},"__metadata__":{},"x":%s}' % json.dumps(F32).encode(),
    "infinity": b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,16]}}',
    "metadata of numbers": {"__metadata__": {"a": 1}, "x": F32},
    "metadata in a list": {"__metadata__": ["a"], "x": F32},
    "a tensor that is null": {"x": None},
    "no dtype": {"x": {"shape": [4], "data_offsets": [0, 16]}},
    "a fourth field": {"x": {**F32, "extra": 1}},
    "an unknown dtype": {"x": {**F32, "dtype": "F4"}},
    "a dtype in a list": {"x": {**F32, "dtype": ["F32"]}},
    "a negative shape": {"x": {**F32, "shape": [-4]}},
    "two negative axes": {"x": {**F32, "shape": [-2, -2]}},
    "a shape of truths": {"x": {**F32, "shape": [True, 4]}},
    "a shape of strings": {"x": {**F32, "shape": ["4"]}},
    "a shape of floats": {"x": {**F32, "shape": [4.0]}},
    "a shape that wraps around": {"x": {**F32, "shape": [1 << 32, 1 << 32, 4]}},
    "nine axes": {"x": {**F32, "shape": [1] * 8 + [4]}},
    "a million axes": {"x": {**F32, "shape": [1] * 1_000_000}},
    "another dtype": {"x": {**F32, "dtype": "F64"}},
    "offsets the wrong way round": {"x": {**F32, "data_offsets": [16, 0]}},
    "negative offsets": {"x": {**F32, "data_offsets": [-16, 0]}},
    "offsets beyond the file": {"x": {**F32, "shape": [4000], "data_offsets": [0, 16000]}},
    "three offsets": {"x": {**F32, "data_offsets": [0, 16, 32]}},
    "a gap before": {"x": {**F32, "shape": [3], "data_offsets": [4, 16]}},
    "a gap after": {"x": {**F32, "shape": [3], "data_offsets": [0, 12]}},
    "an overlap": {"x": F32, "y": F32},
    "half an overlap": {"x": F32, "y": {**F32, "data_offsets": [8, 24]}},
    "no tensor for the bytes": {},
    "too few checksums": {"__metadata__": {tensorfile.CHECKSUMS: ""}, "x": F32},
    "checksums of letters": {"__metadata__": {tensorfile.CHECKSUMS: "z" * 16}, "x": F32},
    "checksums without the header's": {"__metadata__": {tensorfile.CHECKSUMS: "0" * 16}, "x": F32},
    "a wrong checksum of the header": {
        "__metadata__": {tensorfile.HEADER: "0" * 16, tensorfile.CHECKSUMS: "0" * 16},
        "x": F32,
    },
    "a checksum of the header in other words": {"__metadata__": {tensorfile.HEADER: "é" * 16}, "x": F32},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers(tmp_path, what):
    header = HOSTILE[what]
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    with_length = what in ("an empty file", "seven bytes") or "header of" in what or "longer" in what
    data = header if with_length and "checksum" not in what else struct.pack("<Q", len(header)) + header + bytes(16)
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CacheDamaged, match="expected a safetensors file") as caught:
        tensorfile.read(tmp_path / "f")
    assert str(tmp_path / "f") in str(caught.value)
    assert len(str(caught.value)) < 1000
