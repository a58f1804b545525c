"""Pages in main memory behind a GPU: what is copied when, and that nothing is lost on the way.

Copies to the CPU itself are done at once; what a GPU's streams would do is told by fake ones that note who waits for whom.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import llama1m_ext
from llama1m_ext import LongCache, pinned, testing
from llama1m_ext.dense import new_page
from llama1m_ext.formats import KvFormat, Page
from llama1m_ext.pinned import HostPage, HostStore, Lane, Slabs

CPU = torch.device("cpu")


def filled(kv="int8", tokens=192, batch=2):
    k = torch.randn(batch, 2, tokens, 64)
    page = new_page(KvFormat.parse(kv), tokens, k, k)
    for t in page.tensors().values():
        t.view(torch.uint8).copy_(torch.randint(0, 100, t.view(torch.uint8).shape, dtype=torch.uint8))
    return page


def same(a, b):
    mine, theirs = a.tensors(), b.tensors()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name].contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8))
        for name in mine
    )


@pytest.mark.parametrize("kv", ["model", "int8", "int8/int4", "fp8"])
def test_a_page_comes_back(kv):
    page = filled(kv, tokens=256)
    part = page.narrow(64, 192)  # not contiguous
    lane = Lane(CPU)
    whole, half = lane.put(page), lane.put(part)
    assert same(whole.load(), page)
    assert same(half.load(), part)
    assert (half.size, whole.size) == (128, 256)
    assert half.dtypes == {name: t.dtype for name, t in page.tensors().items()}
    assert same(whole.narrow(64, 192).narrow(64, 128).load(), page.narrow(128, 192))
    rows = whole.with_rows([1, 1, 0]).with_rows([2, 1]).load()
    assert same(rows, Page(*(type(side)(*(t.view(torch.uint8)[[0, 1]].view(t.dtype) for t in side))
                             if isinstance(side, tuple) else side[[0, 1]] for side in (page.k, page.v))))  # fmt: skip
    found = list(lane.load([whole, half, whole]))
    assert len(found) == 3
    assert (lane.traffic.pages, lane.traffic.nbytes) == (3, 2 * whole.nbytes + half.nbytes)
    for host, want in ((whole, page), (half, part)):
        (again,) = lane.load([host])
        assert same(again, want)
    assert copy.deepcopy(whole) is whole
    assert same(pickle.loads(pickle.dumps(half)), part)
    with pytest.raises(ValueError, match="128"):
        half.narrow(0, 129)


def test_room_is_given_again():
    slabs = Slabs(pinned=False)
    first, second = slabs.take(1 << 20), slabs.take(1 << 20)
    where = first.memory.data_ptr()
    assert abs(second.memory.data_ptr() - where) >= 1 << 20
    del first
    third = slabs.take(1 << 20)
    assert third.memory.data_ptr() == where
    assert slabs.nbytes == pinned.SLAB
    large = slabs.take(pinned.SLAB + 256)
    assert large.memory.numel() == pinned.SLAB + 256
    assert slabs.nbytes == 3 * pinned.SLAB


@pytest.mark.parametrize("kv", ["model", "int8"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_computes_over_them(kv, padded, monkeypatch):
    """A cache of which a small share stays: the answers of one that is all there, and beams that change places."""
    monkeypatch.setattr(pinned, "SLAB", 1 << 20)
    model = testing.tiny_model()
    llama1m_ext.set_options(model, chunk=128)
    ids = testing.random_ids(2, 900)
    mask = torch.ones(2, 1000, dtype=torch.long)
    if padded:
        mask[1, :70] = 0

    def run(store):
        cache = LongCache(kv=kv, config=model.config)
        for layer in cache.layers if store else ():
            layer.keep_in(store)
        with torch.no_grad():
            outs = [model(ids, attention_mask=mask[:, :900], past_key_values=cache, logits_to_keep=1).logits]
            cache.reorder_cache(torch.tensor([1, 1]))
            outs.append(model(ids[:, :90], attention_mask=mask[[1, 1], :990], past_key_values=cache).logits)
            cache.crop(950 if llama1m_ext._compat.V5 is False else -40)
            outs.append(model(ids[:, :1], attention_mask=mask[[1, 1], :951], past_key_values=cache).logits)
        return outs, cache

    want, _ = run(None)
    store = HostStore(1 << 18, 2)
    found, cache = run(store)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for layer in cache.layers:
        far = [page for page in layer.pages if isinstance(page, HostPage)]
        assert far, "everything stayed"
        assert sum(page.nbytes for page in layer.pages[:-1] if isinstance(page, Page)) <= store.share
    assert store.traffic.pages > 0
    again = copy.deepcopy(cache)
    assert again.layers[0].store is not store
    with torch.no_grad():
        more = [model(ids[:, 5:6], past_key_values=c).logits for c in (cache, again, pickle.loads(pickle.dumps(cache)))]
    for other in more[1:]:
        torch.testing.assert_close(more[0], other, rtol=1e-4, atol=1e-4)


def test_saved_from_the_host(tmp_path):
    model = testing.tiny_model()
    cache = LongCache(kv="int8", config=model.config)
    store = HostStore(1 << 16, 2)
    for layer in cache.layers:
        layer.keep_in(store)
    with torch.no_grad():
        model(testing.random_ids(1, 900), past_key_values=cache)
        cache.save(tmp_path / "cache", model)
        again = LongCache.load(tmp_path / "cache", model)
        found = [model(testing.random_ids(1, 1), past_key_values=c).logits for c in (cache, again)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_too_little_main_memory_is_said_before_the_start(monkeypatch):
    monkeypatch.setattr(pinned, "available_bytes", lambda: 10 << 20)
    store = HostStore(1 << 20, 4)
    store.check_room(100, 20_000)
    with pytest.raises(llama1m_ext.DoesNotFit, match=r'offload="host".*10\.0 MiB'):
        store.check_room(100, 40_000)


# -- streams -------------------------------------------------------------------------------------------------------------


class Streams:
    """Two streams that do nothing, and know what must have been done before each thing that is given to them."""

    def __init__(self, monkeypatch):
        self.main, self.side = self.Stream("main"), self.Stream("side")
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def using(self, stream):
        import contextlib

        @contextlib.contextmanager
        def manager():
            before, self.current = self.current, stream
            yield
            self.current = before

        return manager()

    class Stream:
        def __init__(self, name):
            self.name, self.known = name, frozenset()

        def do(self, what):
            """Returns what must be done before."""
            before = self.known
            self.known |= {what}
            return before

        def record_event(self):
            return self.known

        def wait_event(self, event):
            self.known |= event

        def wait_stream(self, stream):
            self.known |= stream.known


class Copies(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.seen(args[0], args[1])
        return func(*args, **(kwargs or {}))


def test_nobody_overtakes_anybody(fake_gpu, monkeypatch):
    streams = Streams(monkeypatch)
    copied = []

    def seen(into, source):
        assert streams.current is streams.side, "the GPU would wait for this copy"
        kind = "out" if into.device.type == "cpu" else "in"
        what = (kind, len(copied))
        copied.append((what, streams.current.do(what)))

    monkeypatch.setattr(pinned, "Slabs", lambda pinned: Slabs(False))
    with FakeTensorMode(), Copies(seen):
        k = torch.randn(1, 2, 128, 64, device="cuda:0")
        page = new_page(KvFormat.parse("int8"), 128, k, k)
        streams.main.do("written")
        lane = Lane(torch.device("cuda:0"))
        pages = [lane.put(page) for _ in range(5)]
        assert all("written" in before for _, before in copied), "a page left before it was written"
        out = {what for what, _ in copied}
        for turn in range(2):
            del copied[:]
            uses = []
            for i, _ in enumerate(lane.load(pages)):
                uses.append(streams.main.do(("use", turn, i)))
            coming = [entry for entry in copied if entry[0][0] == "in"]
            assert len(coming) == 5
            for i, ((what, before), known) in enumerate(zip(coming, uses, strict=True)):
                assert what in known, "computed over before it came"
                assert out <= before | {what}, "came before it had left"
                if i >= 2:
                    assert ("use", turn, i - 2) in before, "a buffer was overwritten before it was used"
                if turn:
                    assert ("use", 0, 3 + i % 2 if i < 2 else 4) in before
                if 1 <= i < 4:
                    assert ("use", turn, i) not in coming[i + 1][1], (
                        "the next page does not come while this one is used"
                    )
