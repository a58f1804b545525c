"""Files that were damaged, cut, or made to do harm: each gives a clear error or exactly what was saved, never anything else."""

from __future__ import annotations

import copy
import json
import math
import random
import struct

import pytest
import torch

from llama1m_ext import LongCache, saved, tensorfile, testing
from llama1m_ext.dense import loaded
from llama1m_ext.stored import checksum

META = "llama1m.cache"
LENGTH = 450
"""Dense tokens at both ends, compact ones between."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny layers: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Good:
    """A saved cache: its bytes, and the parts that they consist of."""

    def __init__(self, folder, kv):
        self.model = testing.tiny_model(num_hidden_layers=2)
        self.path = folder / f"{kv.replace('/', '-')}.safetensors"
        cache = LongCache(kv=kv)
        with torch.no_grad():
            self.model(testing.random_ids(1, LENGTH), past_key_values=cache, logits_to_keep=1)
        cache.save(self.path)
        self.data = self.path.read_bytes()
        self.contents = contents(cache)
        self.start = 8 + struct.unpack("<Q", self.data[:8])[0]
        self.header = json.loads(self.data[8 : self.start])
        self.metadata = self.header.pop("__metadata__")
        sums = self.metadata.pop(tensorfile.CHECKSUMS)
        del self.metadata[tensorfile.HEADER]
        self.sums = [int(sums[i : i + 16], 16) for i in range(0, len(sums), 16)]
        self.body = json.loads(self.metadata[META])
        self.tensors = self.data[self.start :]

    def forged(self, *, body=None, text=None, header=None, sums=None, tensors=None):
        """A file with other parts, and checksums that fit them."""
        import hashlib

        if text is None:
            text = json.dumps(self.body if body is None else body, sort_keys=True)
        metadata = {**self.metadata, META: text}
        metadata[f"{META}.sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        header = self.header if header is None else header
        if sums is None:
            sums = self.sums
        return tensorfile._packed(header, metadata, sums) + (self.tensors if tensors is None else tensors)

    def outcome(self, data):
        """What comes of a file: an error that says which file, or the cache."""
        self.path.write_bytes(data)
        try:
            cache = LongCache.load(self.path, self.model)
            contents(cache)
            return cache
        except ValueError as e:
            error = e
        assert str(self.path) in str(error), error
        assert len(str(error)) < 2000, "nobody reads that"
        return error

    def check(self, data, what):
        """An error, or exactly what was saved."""
        found = self.outcome(data)
        if isinstance(found, LongCache):
            assert same(contents(found), self.contents), what
        return not isinstance(found, LongCache)

    def check_forged(self, data, what):
        """An error, or a cache that can be used: whoever makes the checksums fit may say what he likes."""
        found = self.outcome(data)
        if isinstance(found, LongCache):
            before = found.get_seq_length()
            with torch.no_grad():
                for ids in (testing.random_ids(1, 1), testing.random_ids(1, 70)):
                    ids = ids.expand(found.layers[0].kind.batch, -1)
                    logits = self.model(ids, past_key_values=found).logits
                    assert logits.shape[:2] == ids.shape, what
            assert found.get_seq_length() == before + 71, what
        return not isinstance(found, LongCache)


def contents(cache):
    found = [
        (name, t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for layer in cache.layers
        for part in layer._used(layer.length)
        for name, t in loaded(part).tensors().items()
    ]
    return cache.get_seq_length(), cache.tokens, [layer.format for layer in cache.layers], found


def same(a, b):
    known = (a[1] is None) == (b[1] is None) and (a[1] is None or torch.equal(a[1], b[1]))
    return known and a[0] == b[0] and a[2:] == b[2:]


@pytest.fixture(scope="module", params=["model", "int8/int4", "fp8"])
def good(request, tmp_path_factory):
    return Good(tmp_path_factory.mktemp("saved"), request.param)


def test_the_yardstick(good):
    """What was not touched is what was saved, forged or not; other words of the same meaning too."""
    assert not good.check(good.data, "itself")
    assert not good.check(good.forged(), "put together again")
    assert not good.check_forged(good.forged(), "put together again")


# -- damage --------------------------------------------------------------------------------------------------------------


def damages(good, count, seed):
    draw = random.Random(seed)
    data, size, start = good.data, len(good.data), good.start
    for _ in range(count):
        at = draw.randrange(start if draw.random() < 0.5 else size)
        kind = draw.randrange(8)
        made = bytearray(data)
        if kind <= 1:
            bit = draw.randrange(8)
            made[at] ^= 1 << bit
            yield f"bit {bit} of byte {at}", made
        elif kind == 2:
            value = draw.choice(b'\x00\xff"0123456789{}[]:,-eE \\')
            made[at] = value
            yield f"byte {at} is {value}", made
        elif kind == 3:
            n = min(draw.choice([2, 64, 512, 4096]), size - at)
            made[at : at + n] = draw.randbytes(n) if draw.random() < 0.5 else bytes(n)
            yield f"{n} bytes from {at} on", made
        elif kind == 4:
            yield f"cut at {at}", made[:at]
        elif kind == 5:
            n = draw.choice([1, 8, 64, 4096])
            yield f"{n} bytes more", made + (bytes(n) if draw.random() < 0.5 else data[-n:])
        elif kind == 6:
            n = draw.choice([1, 8, 64, 4096])
            yield f"without {n} bytes at {at}", made[:at] + made[at + n :]
        else:
            n = min(draw.choice([1, 16, 64, 4096]), size - at)
            to = draw.randrange(size - n)
            made[to : to + n] = data[at : at + n]
            yield f"{n} bytes of {at} at {to}", made


def some_damage(good, count, seed):
    refused = sum(good.check(bytes(made), what) for what, made in damages(good, count, seed))
    # Where bytes happen to be the same there is no damage.
    assert refused > 0.9 * count


def test_damage(good):
    some_damage(good, 250, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_much_damage(good, seed):
    some_damage(good, 2000, seed)


def test_cut_at_every_border(good):
    borders = {0, 7, 8, 9, good.start - 1, good.start, len(good.data) - 1}
    for entry in good.header.values():
        for at in entry["data_offsets"]:
            borders |= {good.start + at - 1, good.start + at, good.start + at + 1}
    for size in sorted(border for border in borders if border < len(good.data)):
        assert good.check(good.data[:size], size), "it is not whole"


def test_each_bit_of_the_prefix(good):
    for bit in range(64):
        made = bytearray(good.data)
        made[bit // 8] ^= 1 << bit % 8
        assert good.check(bytes(made), bit)


def test_one_byte_of_each_tensor(good):
    for name, entry in good.header.items():
        a, b = entry["data_offsets"]
        if b > a and not name.startswith("llama1m.pad"):
            made = bytearray(good.data)
            made[good.start + (a + b) // 2] ^= 1
            found = good.outcome(bytes(made))
            assert isinstance(found, tensorfile.CacheDamaged), name
            assert "damaged" in str(found)


def test_damage_after_the_file_was_opened(good):
    """What is read later is checked later."""
    good.path.write_bytes(good.data)
    cache = LongCache.load(good.path, good.model)
    span = next(span for name, (span, _) in tensorfile.read(good.path)[1].items() if name.startswith("1.0."))
    with open(good.path, "r+b") as file:
        file.seek(span.offset)
        byte = file.read(1)
        file.seek(span.offset)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(tensorfile.CacheDamaged, match="damaged"), torch.no_grad():
        good.model(testing.random_ids(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == LENGTH


def test_cut_after_the_file_was_opened(good):
    good.path.write_bytes(good.data)
    cache = LongCache.load(good.path, good.model)
    contents(cache)
    with open(good.path, "r+b") as file:
        file.truncate(good.start + 100)
    with pytest.raises(tensorfile.CacheDamaged, match="truncated"), torch.no_grad():
        good.model(testing.random_ids(1, 1), past_key_values=cache)


# -- malice: the checksums fit -------------------------------------------------------------------------------------------

VALUES = [None, True, -1, 0, 1, 3, 1 << 31, 1 << 40, 1 << 63, 10**40, 1.5, "", "x", "int8", [], {}, [[]], [1], {"a": 1}]


def places(value, path=()):
    """Where something is in JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for i, (key, inner) in enumerate(items):
        if i < 3 or isinstance(value, dict):
            yield from places(inner, (*path, key))


def changed(body, path, value):
    made = copy.deepcopy(body)
    if not path:
        return value
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return made


def without(body, path):
    made = copy.deepcopy(body)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return made


def test_words_that_are_not_what_they_should_be(good):
    every = list(places(good.body))
    draw = random.Random(0)
    cases = [(path, value) for path in every for value in VALUES if path[:1] != ("model",)]
    cases += [(path, value) for path in every if path[:1] == ("model",) for value in draw.sample(VALUES, 3)]
    refused = 0
    for path, value in cases:
        refused += good.check_forged(good.forged(body=changed(good.body, path, value)), (path, value))
    assert refused > 0.9 * len(cases)
    for path in every[1:]:
        good.check_forged(good.forged(body=without(good.body, path)), path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        "{",
        "[" * 100_000,
        '{"version":1,"version":1}',
        '{"version":Infinity}',
        '{"version":1,"length":' + "9" * 5000 + "}",
        '"\\ud800"',
        "\ud800",
        '{"version":1,"length":1,"layers":[],"model":{}}',
    ],
    ids=lambda text: text[:20],
)
def test_a_text_that_is_no_description(good, text):
    assert isinstance(good.outcome(good.forged(text=text)), ValueError)


def test_pages_in_other_sizes(good):
    draw = random.Random(0)
    for _ in range(150):
        body = copy.deepcopy(good.body)
        layer = draw.choice(body["layers"])
        sizes = layer["sizes"]
        kind = draw.randrange(5)
        if kind == 0 and len(sizes) > 1:  # the sum is the same
            i, j = draw.sample(range(len(sizes)), 2)
            n = draw.randrange(1, max(2, sizes[i]))
            sizes[i] -= n
            sizes[j] += n
        elif kind == 1:
            draw.shuffle(sizes)
        elif kind == 2:
            sizes.append(draw.choice([1, 64, 1 << 39]))
        elif kind == 3:
            sizes.pop()
        else:
            body["length"] = sum(sizes) + draw.choice([-1, 1, 64])
            if draw.random() < 0.5:
                sizes[-1] += body["length"] - sum(sizes)
        made = good.forged(body=body)
        if body == good.body:
            assert not good.check(made, sizes)
        else:
            assert good.check_forged(made, (kind, sizes)), "pages are of the size that they are"


def test_numbers_that_are_too_large_together(good):
    body = copy.deepcopy(good.body)
    body["length"] = 1 << 39
    for layer in body["layers"]:
        layer["kind"][0], layer["sizes"] = 1 << 39, [1 << 39]
    made = good.forged(body=body)
    assert isinstance(good.outcome(made), tensorfile.CacheDamaged)
    with pytest.raises(tensorfile.CacheDamaged):
        saved.info(good.path)
    for frequency in (10**400, math.inf, math.nan):
        body = copy.deepcopy(good.body)
        body["model"]["rope"]["inv_freq"][0] = frequency
        assert isinstance(good.outcome(good.forged(body=body)), tensorfile.CacheDamaged), frequency


def test_more_and_fewer_layers(good):
    for layers in (good.body["layers"][:1], good.body["layers"] * 2, good.body["layers"][::-1] * 50):
        assert good.check_forged(good.forged(body={**good.body, "layers": layers}), len(layers))


def test_a_file_that_agrees_with_itself_and_not_with_the_model(good):
    """Layers, rows and heads that its tensors really have."""
    one = {name: entry for name, entry in good.header.items() if not name.startswith("1.")}
    ends = [entry["data_offsets"][1] for entry in one.values()]
    assert ends == sorted(ends), "the last layer is at the end"
    body = {**good.body, "layers": good.body["layers"][:1]}
    made = good.forged(body=body, header=one, sums=good.sums[: len(one)], tensors=good.tensors[: ends[-1]])
    assert "layers" in str(good.outcome(made))

    body, header = copy.deepcopy(good.body), copy.deepcopy(good.header)
    for layer in body["layers"]:
        layer["kind"][:2] = layer["kind"][1::-1]
    for name, entry in header.items():
        if name[0] in "01":
            entry["shape"][:2] = entry["shape"][1::-1]
    del header["tokens"]
    ids = good.header["tokens"]["data_offsets"]
    header["llama1m.pad.ids"] = {"dtype": "U8", "shape": [ids[1] - ids[0]], "data_offsets": ids}
    assert "kv_heads" in str(good.outcome(good.forged(body=body, header=header)))


def test_tensors_under_other_names(good):
    names = [name for name in good.header if not name.startswith("llama1m.pad")]
    draw = random.Random(0)
    for _ in range(150):
        header = copy.deepcopy(good.header)
        a, b = draw.sample(names, 2)
        kind = draw.randrange(3)
        if kind == 0:
            header[a], header[b] = header[b], header[a]
        elif kind == 1:
            header[draw.choice([f"{a}.x", "9.9.k", "0.0.q", "", ".", "0..k", "-1.0.k", "00.0.k", "k" * 5000])] = (
                header.pop(a)
            )
        else:
            old = header[a]
            header[a] = {**old, "shape": draw.sample(old["shape"], len(old["shape"]))}
        good.check_forged(good.forged(header=header, sums=ordered(good, header)), (kind, a, b))


def ordered(good, header):
    """Checksums in the order of the file."""
    return good.sums if len(header) == len(good.header) else good.sums[: len(header)]


def test_tensors_of_other_dtypes(good):
    """Of the same size: each would be read as something that it is not."""
    alike = [["I8", "U8", "BOOL", "F8_E4M3"], ["F16", "BF16", "I16"], ["F32", "I32"], ["F64", "I64"]]
    for name, entry in good.header.items():
        if name.startswith("llama1m.pad"):
            continue
        for dtype in next(group for group in alike if entry["dtype"] in group):
            if dtype != entry["dtype"]:
                header = {**good.header, name: {**entry, "dtype": dtype}}
                # Codes of another format are a format, too: that much a file may say.
                refused = good.check_forged(good.forged(header=header), (name, dtype))
                assert refused or name.endswith(".codes"), (name, dtype)


def test_any_bytes_as_keys_and_values(good):
    """Codes, scales, infinities and what is no number: nothing that the compiled core could stumble over."""
    draw = random.Random(0)
    for fill in (None, 0x00, 0xFF, 0x7F, 0x7C, 0x80):
        tensors = bytearray(good.tensors)
        sums = []
        for name, entry in good.header.items():
            a, b = entry["data_offsets"]
            if name != "tokens":
                tensors[a:b] = draw.randbytes(b - a) if fill is None else bytes([fill]) * (b - a)
            part = torch.frombuffer(bytearray(tensors[a:b]) or bytearray(1), dtype=torch.uint8)[: b - a]
            sums.append(checksum(part))
        found = good.outcome(good.forged(sums=sums, tensors=bytes(tensors)))
        assert isinstance(found, LongCache), found
        assert not good.check_forged(good.forged(sums=sums, tensors=bytes(tensors)), fill)


def test_files_of_other_programs(good):
    from safetensors.torch import save_file

    for tensors in ({}, {"tokens": torch.zeros(1, 5, dtype=torch.long)}, {"0.0.k": torch.zeros(1, 2, 5, 16)}):
        save_file(tensors, good.path, {"format": "pt"})
        assert isinstance(good.outcome(good.path.read_bytes()), tensorfile.CacheDamaged)
    # Ours, without checksums: nothing would say whether it is whole.
    packed = json.dumps({"__metadata__": good.metadata, **good.header}).encode()
    made = struct.pack("<Q", len(packed)) + packed + good.tensors
    assert "checksum" in str(good.outcome(made))
