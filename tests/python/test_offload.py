"""Pages in files: the same result as from memory, whatever is stored, and nothing lost or left behind."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import pickle
import threading
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from llama1m_ext import LongCache, offload, ops, pagefile, set_options, stats, stored
from llama1m_ext.formats import GROUP, Compact, KvFormat, Page, empty
from llama1m_ext.offload import Store, StoredPage
from llama1m_ext.pagefile import PageFile
from llama1m_ext.stored import CacheDamaged, PageSource, Span
from llama1m_ext.testing import assert_no_worse, dense_reference, error, random_ids, tiny_model

HEAD_DIM = 32


class Layer:
    """What `offload` asks of a layer."""

    def __init__(self, pages: Sequence[Page | StoredPage], length: int, store: Store | None = None) -> None:
        self.pages = list(pages)
        self.length = length
        self.store = store

    @property
    def settled(self) -> int:
        return len(self.pages) - 1

    def replace(self, index: int, page: Page | StoredPage) -> None:
        self.pages[index] = page

    def split(self, index: int, size: int) -> None:
        page = self.pages[index]
        self.pages[index : index + 1] = [page.narrow(a, min(a + size, page.size)) for a in range(0, page.size, size)]


def make_page(kv: str, batch: int, heads: int, tokens: int, dtype: torch.dtype, seed: int) -> Page:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, HEAD_DIM)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    form = KvFormat.parse(kv)
    page = Page(empty(form.k, "k", shape, k), empty(form.v, "v", shape, v))
    ops.kv_append(k, v, page, 0)
    return page


def make_pages(
    kv: str = "model",
    batch: int = 1,
    heads: int = 2,
    dtype: torch.dtype = torch.float32,
    count: int = 6,
    size: int = 128,
) -> list[Page]:
    """A dense page of 64 tokens, pages of one size in the format, and a dense one, as caches have them."""
    made = [make_page("model", batch, heads, GROUP, dtype, 0)]
    made += [make_page(kv, batch, heads, size, dtype, 1 + i) for i in range(count)]
    return [*made, make_page("model", batch, heads, 100, dtype, 99)]


def in_memory(q: torch.Tensor, pages: list[Page], length: int, **more) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.attention(q, [p.k for p in pages], [p.v for p in pages], kv_len=length, return_lse=True, **more)


def float64(q, pages: list[Page], length: int, starts=None, ends=None, q_start: int | None = None) -> torch.Tensor:
    """Causal attention over what the pages stand for."""
    k = torch.cat([dense_reference(p.k, "k", HEAD_DIM) for p in pages], 2)[:, :, :length]
    v = torch.cat([dense_reference(p.v, "v", HEAD_DIM) for p in pages], 2)[:, :, :length]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.double() @ k.transpose(2, 3) / HEAD_DIM**0.5
    q_start = length - q.shape[2] if q_start is None else q_start
    keys = torch.arange(length)
    hidden = (keys > q_start + torch.arange(q.shape[2])[:, None])[None].repeat(q.shape[0], 1, 1)
    for row in range(q.shape[0]):
        hidden[row] |= keys < (0 if starts is None else starts[row])
        hidden[row] |= keys >= (length if ends is None else ends[row])
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


def same(a: Page, b: Page) -> bool:
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return all(torch.equal(stored.as_bytes(x.contiguous()), stored.as_bytes(y.contiguous())) for x, y in pairs)


@pytest.fixture
def file(tmp_path) -> PageFile:
    return PageFile(str(tmp_path))


def spilled(file: PageFile, pages: list[Page], which: Sequence[int]) -> list[Page | StoredPage]:
    """Copies of the pages, some of them in the file and nowhere else."""
    found: list[Page | StoredPage] = [file.put(copy.deepcopy(p)) if i in which else p for i, p in enumerate(pages)]
    file.flush()
    assert all(not found[i].at_hand for i in which)
    return found


# -- the same result ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["model", "int8", "k8v4", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_as_in_memory(file, kv, dtype):
    ours_all, theirs_all, truth_all = [], [], []
    shapes = itertools.product((1, 2), (1, 4), (1, 5, 150), ((), (1, 2, 3, 4, 5, 6), (0, 2, 3, 6)))
    for seed, (batch, group, q_len, which) in enumerate(shapes):
        pages = make_pages(kv, batch, 2, dtype)
        length = sum(p.size for p in pages) - 31
        q = torch.randn(batch, 2 * group, q_len, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
        theirs, their_lse = in_memory(q, pages, length)
        layer = Layer(spilled(file, pages, which), length)
        ours, lse = offload.attention(q, layer, return_lse=True)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
        truth = float64(q, pages, length)
        assert_no_worse(ours, theirs, truth, 2.0)
        for found, x in ((ours_all, ours), (theirs_all, theirs), (truth_all, truth)):
            found.append(x.flatten())
        assert error(lse, their_lse) < (1e-6 if dtype == torch.float32 else 2e-3)
    # Partials are float32, and their merge is rounded once, as one call's result is: no worse over all of them.
    assert_no_worse(*map(torch.cat, (ours_all, theirs_all, truth_all)), 1.05)


@pytest.mark.parametrize("q_start", [None, 0, 300, 5000])
def test_padding_and_shifted_queries(file, q_start):
    pages = make_pages("int8", batch=3)
    length = sum(p.size for p in pages)
    layer = Layer(spilled(file, pages, range(7)), length)
    q = torch.randn(3, 4, 70, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    starts, ends = torch.tensor([0, 200, 500]), torch.tensor([length, 450, 400])
    for kv_start, kv_end in ((starts, None), (None, ends), (starts, ends), (130, None), (130, 700)):
        more = {"kv_start": kv_start, "kv_end": kv_end, "q_start": q_start}
        theirs, their_lse = in_memory(q, pages, length, **more)
        ours, lse = offload.attention(q, layer, return_lse=True, **more)
        rows = [x if isinstance(x, torch.Tensor) or x is None else torch.full((3,), x) for x in (kv_start, kv_end)]
        assert_no_worse(ours, theirs, float64(q, pages, length, *rows, q_start=q_start), 2.0)
        assert torch.equal(lse.isinf(), their_lse.isinf())  # rows that see no key
        assert torch.equal(ours[lse.isinf()], torch.zeros_like(ours[lse.isinf()]))


@pytest.mark.parametrize("which", [(2,), (1, 3, 5), (0, 2, 4, 6), (3, 4)], ids=str)
def test_queries_over_many_pages(file, which):
    """Pages in memory lie apart, with stored ones between them, and some queries see some of them only."""
    pages = make_pages("k8v4", batch=2)
    length = sum(p.size for p in pages) - 10
    layer = Layer(spilled(file, pages, which), length)
    q = torch.randn(2, 2, 500, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    for q_start in (0, 100, 130, length - 500):
        for starts in (None, torch.tensor([0, 333])):
            theirs, _ = in_memory(q, pages, length, q_start=q_start, kv_start=starts)
            ours = offload.attention(q, layer, q_start=q_start, kv_start=starts)
            assert_no_worse(ours, theirs, float64(q, pages, length, starts, q_start=q_start), 2.0)


def test_not_causal_and_other_arguments(file):
    pages = make_pages("int4")
    length = sum(p.size for p in pages) - 3
    layer = Layer(spilled(file, pages, (1, 2, 5)), length)
    q = torch.randn(1, 2, 9, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    pages_16 = [Page(*(s if isinstance(s, Compact) else s.bfloat16() for s in (p.k, p.v))) for p in pages]
    layer.pages[0], layer.pages[-1] = pages_16[0], pages_16[-1]
    theirs, _ = in_memory(q, pages_16, length, causal=False, softmax_scale=0.3, out_dtype=torch.float32)
    ours = offload.attention(q, layer, causal=False, softmax_scale=0.3, out_dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert error(ours, theirs) < 2e-3
    # Fewer tokens than there are, ending within a page that is not the last.
    theirs, _ = in_memory(q, pages_16[:4], 300)
    assert error(offload.attention(q, layer, kv_len=300), theirs) < 4e-3


def test_pages_in_memory_are_one_call(monkeypatch):
    calls = []
    real = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: calls.append(k) or real(*a, **k))
    pages = make_pages()
    q = torch.randn(1, 2, 1, HEAD_DIM)
    out = offload.attention(q, Layer(pages, 800))
    assert len(calls) == 1 and not calls[0]["return_lse"]
    assert torch.equal(out, in_memory(q, pages, 800)[0])


def test_pages_not_seen_are_not_loaded(file):
    pages = make_pages()  # 64, 6 x 128, 100
    length = sum(p.size for p in pages)
    layer = Layer(spilled(file, pages, range(1, 7)), length, Store(1 << 20))
    q = torch.randn(2, 2, 10, HEAD_DIM)[:1]

    def loaded(**more) -> int:
        before = layer.store.traffic.pages
        offload.attention(q, layer, **more)
        return layer.store.traffic.pages - before

    assert loaded() == 6
    assert loaded(q_start=64 + 128 - 10) == 1
    assert loaded(q_start=64 + 128 - 9) == 2  # the last query sees the first key of the next page
    assert loaded(kv_start=64 + 2 * 128) == 4
    assert loaded(kv_start=torch.tensor([64 + 2 * 128 - 1])) == 5
    assert loaded(kv_end=64 + 128) == 1
    assert loaded(kv_start=length, kv_end=5) == 0
    assert loaded(q_start=-10) == 0


def test_few_partials_are_alive(file, monkeypatch):
    pages = make_pages(count=12)
    layer = Layer(spilled(file, pages, range(1, 13)), sum(p.size for p in pages))
    most = []
    real = ops.merge_partials
    monkeypatch.setattr(ops, "merge_partials", lambda outs, lses: most.append(len(outs)) or real(outs, lses))
    monkeypatch.setattr(offload, "_WAITING", 2 * 4 * 2 * 50 * HEAD_DIM)
    offload.attention(torch.randn(1, 2, 50, HEAD_DIM), layer)
    assert max(most) <= 3 and len(most) >= 5


def test_loading_runs_beside_computing(file, monkeypatch):
    """Each load but the first two waits until computing over the page before has begun: one after the other, it would
    wait for ever."""
    pages = make_pages(count=8)
    layer = Layer(spilled(file, pages, range(1, 9)), sum(p.size for p in pages), Store(1 << 20))
    computing = threading.Semaphore(0)
    loaders = set()
    read, attend = PageSource.read, ops.attention

    def slow_read(self, offset, into):
        loaders.add(threading.get_ident())
        if len(loads) >= 2 * offload.BUFFERS:  # k and v of each page
            assert computing.acquire(timeout=20), "nothing is computed while a page is loaded"
        loads.append(offset)
        read(self, offset, into)

    def attention(*args, **kwargs):
        computing.release(2)
        return attend(*args, **kwargs)

    loads: list[int] = []
    monkeypatch.setattr(PageSource, "read", slow_read)
    monkeypatch.setattr(ops, "attention", attention)
    q = torch.randn(1, 2, 1, HEAD_DIM)
    out = offload.attention(q, layer)
    monkeypatch.undo()
    assert len(loads) == 16 and loaders and threading.get_ident() not in loaders
    traffic = layer.store.traffic
    assert (traffic.pages, traffic.nbytes) == (8, sum(p.nbytes for p in pages[1:9]))
    assert traffic.load_seconds > 0 and traffic.compute_seconds > 0
    assert error(out, in_memory(q, pages, layer.length)[0]) < 1e-6


def test_the_next_layer_is_loaded_ahead(file, monkeypatch):
    """After each layer the first pages of the one that came next last time are loaded, with nobody waiting for them."""
    store = Store(1 << 20)
    pages = [[make_page("model", 1, 2, 128, torch.float32, 10 * n + i) for i in range(4)] for n in range(3)]
    layers = [Layer([*spilled(file, p, range(3)), p[3]][:4], 512, store) for p in pages]
    for layer, p in zip(layers, pages, strict=True):
        layer.pages[3] = p[3]
    q = torch.randn(1, 2, 1, HEAD_DIM)
    loaded: list[int] = []
    read = PageSource.read
    monkeypatch.setattr(PageSource, "read", lambda self, at, into: loaded.append(at) or read(self, at, into))

    def run(layer: Layer, right: list[Page]) -> int:
        """Pages loaded during the call, those that nobody asked for yet included."""
        store.stream._worker.submit(int).result()
        before = len(loaded)
        assert error(offload.attention(q, layer), in_memory(q, right, layer.length)[0]) < 1e-6
        store.stream._worker.submit(int).result()
        return (len(loaded) - before) // 2

    once = [run(*pair) for pair in zip(layers, pages, strict=True)]
    again = [run(*pair) for _ in range(3) for pair in zip(layers, pages, strict=True)]
    assert once == [3, 3, 3] and sum(again) in (27, 29) and again[3:] == [3] * 6
    assert store.traffic.pages == 9 * 4
    # Another one comes, in the place of the one expected: nothing wrong, and no page of it is taken for another's.
    assert run(layers[2], pages[2]) >= 3
    assert run(layers[0], pages[0]) >= 1
    layers[1].pages[1], pages[1][1] = spilled(file, [pages[2][2]], (0,))[0], pages[2][2]
    for n in (1, 2, 0, 1, 2):
        run(layers[n], pages[n])
    # A larger page than the buffers have room for.
    large = make_page("model", 1, 2, 1024, torch.float32, 77)
    layers[0].pages[2:], pages[0][2:] = spilled(file, [large, pages[0][3]], (0,)), [large, pages[0][3]]
    layers[0].length = 256 + 1024 + 128
    for n in (0, 1, 2, 0):
        run(layers[n], pages[n])


def test_threads_end_with_their_store(file):
    layer = Layer(spilled(file, make_pages(), range(1, 7)), 800, Store(1 << 20))
    offload.attention(torch.randn(1, 2, 1, HEAD_DIM), layer)
    threads = [t for t in threading.enumerate() if t.name.startswith("llama1m-read")]
    assert threads
    del layer
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_two_threads_on_one_cache(file):
    pages = make_pages("int8", count=10)
    store = Store(1 << 20)
    layers = [Layer(spilled(file, pages, range(1, 11)), 64 + n * 128, store) for n in (5, 10)]
    q = torch.randn(1, 2, 1, HEAD_DIM)
    expected = [in_memory(q, pages, layer.length)[0] for layer in layers]
    wrong = []

    def work(layer, right):
        for _ in range(50):
            if error(offload.attention(q, layer), right) > 1e-6:
                wrong.append(layer)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupted_call_leaves_nothing_wrong(file, monkeypatch):
    pages = make_pages(count=8)
    layer = Layer(spilled(file, pages, range(1, 9)), sum(p.size for p in pages), Store(1 << 20))
    q = torch.randn(1, 2, 1, HEAD_DIM)
    calls = itertools.count()
    real = ops.attention

    def interrupted(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offload.attention(q, layer)
    monkeypatch.undo()
    for _ in range(5):
        assert error(offload.attention(q, layer), in_memory(q, pages, layer.length)[0]) < 1e-6


# -- where pages go -----------------------------------------------------------------------------------------------------


def test_the_first_pages_stay_as_far_as_the_share_goes(tmp_path):
    pages = make_pages("int8", count=40)
    total = sum(p.nbytes for p in pages)
    store = Store(total // 2, str(tmp_path), layers=1)
    layer = Layer(pages, sum(p.size for p in pages), store)
    q = torch.randn(1, 2, 1, HEAD_DIM)
    expected = in_memory(q, pages, layer.length)[0]
    store.settle(layer)
    store.flush()
    kept = [i for i, p in enumerate(layer.pages) if type(p) is Page]
    assert kept == [*range(len(kept) - 1), len(pages) - 1]
    assert total // 4 < sum(layer.pages[i].nbytes for i in kept) <= store.share < total // 2
    assert error(offload.attention(q, layer), expected) < 1e-6
    assert store.stream.nbytes + store.share + store.file.in_flight <= store.budget
    # Nothing new: nothing is looked at.
    before, layer.replace = list(layer.pages), None
    store.settle(layer)
    assert all(a is b for a, b in zip(before, layer.pages, strict=True))


def test_what_fits_stays_in_memory_and_no_file_is_made(tmp_path):
    pages = make_pages()
    store = Store(8 * sum(p.nbytes for p in pages), str(tmp_path / "not there"))
    layer = Layer(pages, 800, store)
    store.settle(layer)
    assert all(type(p) is Page for p in layer.pages)


@pytest.mark.parametrize("budget", [1, 1 << 16, 1 << 24, 1 << 33])
@pytest.mark.parametrize("layers", [1, 32])
def test_a_store_keeps_within_its_budget(budget, layers):
    store = Store(budget, None, layers)
    tail = buffer = store.page_bytes
    if budget > 1:
        assert offload.BUFFERS * buffer + store.file.in_flight + layers * store.share <= budget
        assert layers * tail <= budget / 2
    tokens = store.page_tokens(2048)
    assert tokens % GROUP == 0 and tokens >= GROUP and (tokens == GROUP or tokens * 2048 <= store.page_bytes)


def test_copies_of_a_store_have_files_of_their_own(tmp_path):
    store = Store(1 << 20, str(tmp_path), 2)
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert other.file is not store.file
        assert (other.budget, other.folder, other.layers, other.share) == (1 << 20, str(tmp_path), 2, store.share)


@pytest.mark.parametrize("kv", ["model", "k8v4", "fp8"])
def test_stored_pages_copy_and_pickle(file, kv):
    page = make_page(kv, 1, 2, 192, torch.float32, 0)
    kept = spilled(file, [page], (0,))[0]
    assert copy.deepcopy(kept) is kept and copy.copy(kept) is kept
    unpickled = pickle.loads(pickle.dumps(kept))
    narrowed = kept.narrow(64, 130)
    assert type(unpickled) is Page and narrowed.size == 66
    for found, right in ((unpickled, page), (narrowed.load(), page.narrow(64, 130)), (kept.load(), page)):
        assert same(found, right)
    assert narrowed.narrow(64, 66).load().size == 2
    with pytest.raises(ValueError, match="expected 0 <= start <= end <= 66, got 1 and 67"):
        narrowed.narrow(1, 67)


# -- the file -----------------------------------------------------------------------------------------------------------


def test_pages_stay_in_memory_until_they_are_written(file, monkeypatch):
    go = threading.Event()
    write = os.pwrite
    monkeypatch.setattr(pagefile.os, "pwrite", lambda *args: go.wait(20) and write(*args))
    pages = [make_page("model", 1, 2, 128, torch.float32, i) for i in range(3)]
    file.in_flight = 2 * pages[0].nbytes
    first, second = file.put(pages[0]), file.put(pages[1])
    assert first.at_hand and first.load() is pages[0] and second.narrow(3, 9).load().size == 6
    third: list[StoredPage] = []
    thread = threading.Thread(target=lambda: third.append(file.put(pages[2])))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()  # no more than in_flight waits
    go.set()
    thread.join(20)
    file.flush()
    for page, kept in zip(pages, (first, second, third[0]), strict=True):
        assert not kept.at_hand
        assert torch.equal(kept.load().k, page.k) and torch.equal(kept.load().v, page.v)


def test_room_of_forgotten_pages_is_used_again(file):
    for _ in range(10):
        pages = [file.put(make_page("int8", 1, 2, 128, torch.float32, i)) for i in range(4)]
        file.flush()
        size = os.fstat(pages[0].source.fd).st_size
        kept = pages[0].narrow(0, 64)  # a part of it keeps all of it
        del pages
    assert size <= 5 * 128 * 2 * 2 * 64 * 2
    assert torch.equal(kept.load().v.codes, make_page("int8", 1, 2, 128, torch.float32, 0).v.codes[:, :, :64])


def test_the_file_closes_itself(tmp_path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    file = PageFile(str(tmp_path))
    kept = file.put(make_page("model", 1, 2, 128, torch.float32, 0))
    file.flush()
    assert len(os.listdir("/proc/self/fd")) == before + 1 and not os.listdir(tmp_path)
    del file
    gc.collect()
    assert kept.load().size == 128
    del kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number, said", [(28, "No space left on device"), (5, "Input/output error")])
def test_an_error_of_the_disk_loses_nothing(file, monkeypatch, number, said):
    def fails(fd, view, at):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pagefile.os, "pwrite", fails)
    pages = make_pages()
    kept = file.put(pages[1])
    with pytest.raises(OSError, match=f"{said}: offload_dir: {pages[1].nbytes} bytes of a page .* bytes are free") as e:
        file.flush()
    assert e.value.errno == number and e.value.filename == file.folder
    assert kept.at_hand and kept.load() is pages[1]
    # It goes on, when there is room again.
    monkeypatch.undo()
    again = file.put(pages[2])
    file.flush()
    assert not again.at_hand and torch.equal(again.load().k, pages[2].k)


def test_a_folder_that_is_not_there(tmp_path):
    folder = str(tmp_path / "none")
    for act in (lambda f: f.put(make_pages()[0]), lambda f: f.check_room(1)):
        with pytest.raises(FileNotFoundError, match="offload_dir: expected a folder that can be written to") as e:
            act(PageFile(folder))
        assert e.value.filename == folder


def test_a_folder_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PageFile("~/pages").folder == str(tmp_path / "pages")


def test_a_folder_in_memory_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(pagefile, "is_memory", lambda folder: True)
    with pytest.warns(UserWarning, match=f"offload_dir: {tmp_path} lies in memory itself"):
        PageFile(str(tmp_path)).put(make_pages()[0])


def test_room_is_checked_before(file):
    file.check_room(1)
    with pytest.raises(OSError, match=rf"offload_dir: {1 << 60} bytes of pages are to be written, \d+ bytes are free"):
        file.check_room(1 << 60)


def test_a_disk_that_is_really_full(run_python, tmp_path):
    """On a file system of 2 MiB where we may mount one, else with a limit on the size of files."""
    script = """
import ctypes, os, resource, sys, torch
from llama1m_ext import ops
from llama1m_ext.formats import Page
from llama1m_ext.offload import Store

folder = sys.argv[1] if len(sys.argv) > 1 else os.environ["FOLDER"]
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWUSER = 0x20000, 0x10000000
mounted = False
if libc.unshare(NEWNS) == 0 or libc.unshare(NEWUSER | NEWNS) == 0:
    libc.mount(b"none", b"/", None, 0x44000, None)  # what is mounted here is seen here only
    mounted = libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=2m") == 0
if not mounted:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))


class Layer:
    pages = [Page(torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)) for _ in range(20)]  # half a MiB each
    settled = 20

    def replace(self, index, page):
        self.pages[index] = page

    def split(self, index, size):
        raise AssertionError("the pages are small enough")


layer = Layer()
sums = [(p.k.sum().item(), p.v.sum().item()) for p in layer.pages]
store = Store(1, folder)
store.page_bytes = 1 << 20
try:
    store.settle(layer)
    store.flush()
except OSError as e:
    print(mounted, e.errno, e.filename == folder, "524288 bytes of a page" in str(e))
stored = [p for p in layer.pages if type(p) is not Page and not p.at_hand]
found = [p if type(p) is Page else p.load() for p in layer.pages]
print(len(stored), sums == [(p.k.sum().item(), p.v.sum().item()) for p in found])
"""
    first, second = run_python(script, FOLDER=str(tmp_path)).splitlines()
    assert first in ("True 28 True True", "False 27 True True")
    count, same = second.split()
    assert 2 <= int(count) <= 4 and same == "True"


def test_nothing_is_left_behind_after_a_kill(run_python, tmp_path):
    script = """
import os, signal, torch
from llama1m_ext.formats import Page
from llama1m_ext.offload import PageFile

pid = os.fork()
if pid == 0:
    file = PageFile(os.environ["FOLDER"])
    kept = [file.put(Page(torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64))) for _ in range(8)]
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
print(os.waitpid(pid, 0)[1], os.listdir(os.environ["FOLDER"]))
"""
    assert run_python(script, FOLDER=str(tmp_path)).split() == ["9", "[]"]


def test_a_forked_process_reads_and_does_not_overwrite(run_python, tmp_path):
    script = """
import collections, concurrent.futures, gc, os, torch
torch.set_num_threads(1)
from llama1m_ext.formats import Page
from llama1m_ext.offload import PageFile, Store, attention

class layer:
    store = Store(1 << 20)

def page(x):
    return Page(torch.full((1, 2, 512, 64), float(x)), torch.full((1, 2, 512, 64), -float(x)))

def right(kept):
    layer.length = 512 * len(kept)
    layer.pages = [p for _, p in kept]
    out = attention(torch.zeros(1, 2, 1, 64), layer)  # the mean of all values, streamed
    if not torch.allclose(out, torch.full_like(out, -sum(i for i, _ in kept) / len(kept)), rtol=1e-4):
        return False
    return all(bool((p.load().k == i).all() and (p.load().v == -i).all()) for i, p in kept)

file = PageFile(os.environ["FOLDER"])
kept = [(i, file.put(page(i))) for i in range(8)]
file.flush()
assert right(kept) and right(kept)
stream = layer.store.stream
coming = stream._coming
assert coming  # pages are loaded ahead: here they are on their way still, when the thread that loads them is gone
stream._coming = collections.deque((page, concurrent.futures.Future()) for page, _ in coming)
there, here = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    ok = right(kept)
    mine = [(100 + i, file.put(page(100 + i))) for i in range(8)]  # by a thread of its own
    file.flush()
    ok = ok and right(mine) and not mine[0][1].at_hand
    os.write(there[1], b"x")
    os.read(here[0], 1)
    os._exit(0 if ok and right(kept) and right(mine) else 1)
stream._coming = coming
os.read(there[0], 1)
ours = right(kept)
layer.store, layer.pages, kept = Store(1 << 20), [], kept[4:]
del stream, coming
gc.collect()
more = [(200 + i, file.put(page(200 + i))) for i in range(8)]  # not where the child still reads
file.flush()
os.write(here[1], b"x")
print(ours and right(kept) and right(more), os.waitpid(pid, 0)[1])
"""
    assert run_python(script, FOLDER=str(tmp_path)).split() == ["True", "0"]


def test_a_folder_in_memory_is_not_the_default(monkeypatch):
    assert pagefile.is_memory("/dev/shm") is True
    assert pagefile.is_memory("/proc") is False and pagefile.is_memory("/no such folder") is False
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(pagefile, "is_memory", lambda folder: folder != "/var/tmp")
    assert offload.default_folder() == "/var/tmp"
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr(pagefile.tempfile, "gettempdir", lambda: "/tmp")
    assert offload.default_folder() == "/tmp"  # asked for by name
    assert offload.free_bytes("/tmp") > 0


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_that_ulimit_leaves(run_python, limit):
    script = f"""
import resource
from llama1m_ext import memory
before = memory._of_limits()
fields = open("/proc/self/statm").read().split()
used = int(fields[dict(RLIMIT_AS=0, RLIMIT_DATA=5)["{limit}"]]) * resource.getpagesize()
resource.setrlimit(resource.{limit}, (used + (300 << 20),) * 2)
print(len(before), memory.available_bytes() >> 20)
"""
    count, room = map(int, run_python(script).split())
    assert count == 0 and 250 <= room <= 310


# -- files that are not what was written ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A page in a file with a name: (the path, a function that opens it)."""
    page = make_page("k8v4", 1, 2, 128, torch.float32, 0)
    path, spans, at = tmp_path / "page", {}, 32
    with path.open("wb") as file:
        for name, tensor in page.tensors().items():
            data = stored.as_bytes(tensor)
            file.seek(at)
            file.write(data.numpy().tobytes())
            spans[name] = Span(at, data.numel(), tensor.dtype, tuple(tensor.shape))
            at += data.numel() + 3 * 64
        file.write(b"more")
    sums = {name: stored.checksum(tensor) for name, tensor in page.tensors().items()}
    return path, page, lambda mapped, sums=sums: StoredPage(PageSource.open(path, mapped=mapped), spans, sums)


@pytest.mark.parametrize("mapped", [False, True])
def test_damage_is_found(saved, mapped):
    path, page, opened = saved
    kept = opened(mapped)
    assert kept.at_hand == mapped
    assert torch.equal(kept.load().v.codes, page.v.codes)
    changed = bytearray(path.read_bytes())
    changed[kept._record.spans["v.codes"].offset + 7] ^= 1
    info = path.stat()
    path.write_bytes(bytes(changed))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    for damaged in (kept, opened(mapped), kept.narrow(0, 64)):  # also in a page that was right before
        with pytest.raises(
            CacheDamaged, match=f"{path}: tensor 'v.codes' at offset .* expected checksum [0-9a-f]{{16}}, found"
        ):
            damaged.load()
    assert torch.equal(opened(mapped, {}).load().k.codes, page.k.codes)  # nothing known, nothing verified


@pytest.mark.parametrize("mapped", [False, True])
def test_a_truncated_file_is_an_error_not_a_crash(saved, mapped):
    path, _, opened = saved
    used, fresh = opened(mapped), opened(mapped)
    used.load()
    os.truncate(path, 5000)
    for kept in (used, fresh, opened(mapped)):
        with pytest.raises(CacheDamaged, match=rf"{path}: expected at least \d+ bytes, found 5000: it was truncated"):
            offload.attention(torch.randn(1, 2, 1, HEAD_DIM), Layer([kept], 128))
    os.truncate(path, 0)
    with pytest.raises(CacheDamaged, match="found 0"):
        opened(mapped).load()


def test_truncated_while_it_is_read(saved, monkeypatch):
    path, _, opened = saved
    monkeypatch.setattr(PageSource, "state", lambda self, end: os.truncate(path, 5000) or (0, 0))
    with pytest.raises(CacheDamaged, match=r"expected \d+ bytes at offset \d+, found \d+: it was truncated"):
        opened(False).load()


def test_a_map_and_a_buffer_give_the_same(saved, monkeypatch):
    path, page, opened = saved
    mapped, read = opened(True), opened(False)
    buffer = torch.empty(read.nbytes + 5, dtype=torch.uint8)
    for found in (mapped.load(), read.load(), read.load(buffer)):
        assert same(found, page)
    assert mapped.load() is mapped.load()
    with pytest.raises(ValueError, match="buffer: expected at least"):
        read.load(buffer[:100])
    # A write goes nowhere: neither a crash nor a change of the file.
    before = path.read_bytes()
    mapped.load().k.codes.zero_()
    assert path.read_bytes() == before

    # Where nothing can be mapped, it is read.
    def no_room(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(stored.mmap, "mmap", no_room)
    kept = opened(True)
    assert torch.equal(kept.load().k.codes, page.k.codes) and not kept.at_hand


def test_spans_that_make_no_sense(saved):
    kept = saved[2](False)
    spans, source = kept._record.spans, kept.source
    k = spans["k.codes"]
    for name, wrong in {
        "k.codes": k._replace(offset=-1),
        "k.params": k._replace(shape=(1, 2, 128, 31)),
        "v.codes": k._replace(shape=(1, 2, 64, 64), nbytes=8192),
        "v.params": Span(0, 0, torch.float16, (0,)),
    }.items():
        with pytest.raises(CacheDamaged, match="page: "):
            StoredPage(source, {**spans, name: wrong})
    for missing in spans:
        with pytest.raises(CacheDamaged, match=missing):
            StoredPage(source, {name: span for name, span in spans.items() if name != missing})


# -- in a model -----------------------------------------------------------------------------------------------------------


def offloaded(model, folder, kv: str = "model", kv_memory: int = 150_000) -> None:
    set_options(model, kv=kv, offload="disk", kv_memory=kv_memory, offload_dir=str(folder))


def generate(model, ids, n: int = 12, **more):
    more = {"do_sample": False, "min_new_tokens": n, "max_new_tokens": n, **more}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **more)


def in_file(cache) -> int:
    return sum(type(page) is StoredPage for layer in cache.layers for page in layer.pages)


@pytest.mark.parametrize("kv", ["model", "int8", "k8v4", "fp8"])
@pytest.mark.parametrize("chunk", [64, 5000], ids=["layer by layer", "at once"])
def test_generate_from_disk(tmp_path, kv, chunk):
    model = tiny_model()
    ids = random_ids(2, 900)
    mask = torch.ones_like(ids)
    mask[1, :130] = 0
    set_options(model, kv=kv, offload=None, chunk=chunk, min_layer_major_len=chunk)
    right = generate(model, ids, attention_mask=mask)
    offloaded(model, tmp_path, kv)
    cache = LongCache()
    found = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(found.sequences, right.sequences)
    theirs, ours = torch.stack(right.logits), torch.stack(found.logits)
    # Which keys are compact is the same, whatever the pages' sizes: only merges differ.
    assert error(ours, theirs) < 1e-5 * theirs.std()
    store = cache.layers[0].store
    assert all(layer.store is store for layer in cache.layers)
    assert in_file(cache) > 6 and store.traffic.pages >= 11 * in_file(cache) / 2
    if kv == "model":
        with torch.no_grad():
            truth = tiny_model(dtype=torch.float64)(
                found.sequences, attention_mask=F.pad(mask, (0, 12), value=1)
            ).logits
        truth = truth[:, 899:-1].transpose(0, 1)
        assert_no_worse(ours, theirs, truth, 1.1)
    assert not os.listdir(tmp_path)


def test_memory_stays_within_the_budget(tmp_path):
    model = tiny_model(num_hidden_layers=4)
    offloaded(model, tmp_path, kv_memory=300_000)
    cache = LongCache()
    generate(model, random_ids(1, 3000), past_key_values=cache)
    whole = 4 * 3012 * 2 * 2 * 16 * 4
    store = cache.layers[0].store
    store.flush()
    assert whole > 5 * 300_000
    assert 50_000 < cache.nbytes + store.stream.nbytes + store.file.in_flight <= 300_000


@pytest.mark.parametrize("kv", ["model", "int8", "fp8"])
def test_what_is_done_with_caches_works_from_disk(tmp_path, kv):
    """Cropped, gone on with, copied, pickled, reordered, as dense tensors: as in memory."""
    model = tiny_model()
    ids = random_ids(2, 700)
    caches = []
    for on_disk in (False, True):
        set_options(model, kv=kv, offload=None, chunk=128, min_layer_major_len=200)
        if on_disk:
            offloaded(model, tmp_path, kv, kv_memory=50_000)
        cache = LongCache()
        seen = []
        with torch.no_grad():
            for begin, end in ((0, 500), (500, 700)):  # a long prompt, and another one onto stored history
                out = model(ids[:, begin:end], past_key_values=cache, logits_to_keep=5)
                seen.append(out.logits)
            for length in (650, 300, 64, 50, 1):
                cache.crop(length - cache.get_seq_length())
                seen.append(model(ids[:, length : length + 30], past_key_values=cache).logits)
            cache.crop(0) if cache.get_seq_length() == 0 else cache.crop(-cache.get_seq_length())
            seen.append(model(ids, past_key_values=cache, logits_to_keep=2).logits)
            for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
                other.reorder_cache(torch.tensor([1, 0]))
                seen.append(model(ids[:, :9], past_key_values=other).logits)
                seen.append(other.layers[1].keys.clone())
                seen.append(other.layers[0].values.clone())
            cache.batch_repeat_interleave(2)
            seen.append(model(ids.repeat_interleave(2, 0)[:, :70], past_key_values=cache, logits_to_keep=3).logits)
        caches.append((cache, seen))
    (there, right), (disk, found) = caches
    assert in_file(there) == 0 and in_file(disk) > 0
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.shape == b.shape and error(a, b) < 1e-5 * b.std(), i


@pytest.mark.parametrize("kv", ["model", "int8"])
def test_a_cache_from_memory_goes_to_disk(tmp_path, kv):
    """Its pages are as large as the prompt: they are cut, and what follows is bounded."""
    model = tiny_model()
    ids = random_ids(1, 1500)
    set_options(model, kv=kv, offload=None)
    right = generate(model, ids)
    cache = LongCache()
    with torch.no_grad():
        model(ids[:, :1400], past_key_values=cache)
    assert max(page.size for page in cache.layers[0].pages) > 1200
    offloaded(model, tmp_path, kv, 100_000)
    found = generate(model, ids, past_key_values=cache)
    assert torch.equal(found.sequences, right.sequences)
    for layer in cache.layers:
        stored = [page for page in layer.pages if type(page) is StoredPage]
        assert len(stored) > 8
        assert max(page.size for page in stored) <= 2 * 64


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"prefill_chunk_size": 300}], ids=str)
def test_beams_and_chunks_from_disk(tmp_path, more):
    model = tiny_model()
    ids = random_ids(1, 800)
    set_options(model, kv="int8", offload=None)
    right = generate(model, ids, **more)
    offloaded(model, tmp_path, "int8", 60_000)
    cache = LongCache()
    found = generate(model, ids, past_key_values=cache, **more)
    assert in_file(cache) > 0
    assert torch.equal(found.sequences, right.sequences)


def test_too_small_a_disk_is_an_error_before_the_start(tmp_path, monkeypatch):
    model = tiny_model()
    ids = random_ids(1, 1500)
    offloaded(model, tmp_path, kv_memory=80_000)
    cache = LongCache()
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        monkeypatch.setattr(pagefile, "free_bytes", lambda folder: 100_000)
        before = stats(model).served
        with pytest.raises(OSError, match=r"offload_dir: \d+ bytes of pages are to be written, 100000 bytes are free"):
            model(ids[:, 100:], past_key_values=cache)
        assert stats(model).served == before and cache.get_seq_length() == 100
        model(ids[:, 100:200], past_key_values=cache)
    set_options(model, offload_dir=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="offload_dir: expected a folder"):
        generate(model, ids)


def test_a_full_disk_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    model = tiny_model()
    ids = random_ids(1, 1500)
    offloaded(model, tmp_path, kv_memory=80_000)
    cache = LongCache()
    right = generate(model, ids, 5)
    with torch.no_grad():
        model(ids[:, :700], past_key_values=cache)
        write, room = os.pwrite, [100_000]

        def full(fd, view, at):
            room[0] -= len(view)
            if room[0] < 0:
                raise OSError(28, os.strerror(28))
            return write(fd, view, at)

        monkeypatch.setattr(pagefile.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left on device: offload_dir: ") as e:
            model(ids[:, 700:], past_key_values=cache)
        assert e.value.filename == str(tmp_path)
        assert {layer.length for layer in cache.layers} == {700}
        monkeypatch.undo()
    found = generate(model, ids, 5, past_key_values=cache)
    assert torch.equal(found.sequences, right.sequences)


@pytest.fixture
def one_thread():
    """More would wait for each other where other programs are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LIMITED = """
import gc, json, os, resource
import torch
from llama1m_ext import LongCache, plan_call, set_options
from llama1m_ext.testing import random_ids, tiny_model

torch.set_num_threads(1)
asked = json.loads(os.environ["ASKED"])
model = tiny_model(**asked["shape"])
set_options(model, kv=asked["kv"], chunk=256, progress=False, min_layer_major_len=300, offload="disk", kv_memory=1 << 20)
model.generate(random_ids(1, 600), max_new_tokens=3, do_sample=False)  # threads, and what torch does once
set_options(model, offload=asked["offload"], kv_memory=asked["kv_memory"])
gc.collect()
if not asked["planned"]:
    plan_call.check = lambda *args: None
there = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (there + asked["room"],) * 2)
try:
    out = model.generate(random_ids(1, asked["tokens"], 1), min_new_tokens=8, max_new_tokens=8, do_sample=False,
                         past_key_values=LongCache(), return_dict_in_generate=True, output_logits=True)
except Exception as e:
    print(json.dumps({"error": f"{type(e).__name__}: {e}"}))
else:
    print(json.dumps({"logits": torch.stack(out.logits).tolist()}))
"""


class Limited:
    """A model whose cache takes several times the `room` MiB of address space that a process of its own gets beyond what it
    has, and the right logits, from memory."""

    def __init__(self, run_python, folder, kv: str, layers: int, tokens: int, room: int) -> None:
        self.run_python, self.folder = run_python, folder
        shape = {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}
        self.asked = {"shape": shape, "kv": kv, "tokens": tokens, "room": room << 20, "planned": True}
        model, cache = tiny_model(**shape), LongCache()
        set_options(model, kv=kv, chunk=256, progress=False, min_layer_major_len=300, offload=None)
        self.right = torch.stack(generate(model, random_ids(1, tokens, 1), 8, past_key_values=cache).logits)
        assert cache.nbytes > 2 * (room << 20)

    def run(self, offload: str | None, kv_memory: int | str = 16 << 20, **more) -> dict:
        asked = {**self.asked, "offload": offload, "kv_memory": kv_memory, **more}
        lines = self.run_python(LIMITED, ASKED=json.dumps(asked), TMPDIR=str(self.folder)).splitlines()
        return json.loads(lines[-1])

    def check(self, found: dict) -> None:
        ours, layers = torch.tensor(found["logits"]), self.asked["shape"]["num_hidden_layers"]
        assert torch.equal(ours.argmax(-1), self.right.argmax(-1))
        # Each layer rounds what the one before it gives.
        assert error(ours, self.right) < layers * 2e-6 * self.right.std()


@pytest.mark.parametrize(
    "kv, layers, tokens, room",
    [("model", 24, 2048, 28), pytest.param("int8", 40, 6144, 48, marks=pytest.mark.slow)],
)
def test_a_cache_larger_than_a_hard_limit(run_python, tmp_path, one_thread, kv, layers, tokens, room):
    limited = Limited(run_python, tmp_path, kv, layers, tokens, room)
    limited.check(limited.run("disk"))
    # It is the disk that makes it possible: without it, and with nobody who says so before, memory ends.
    assert "allocate memory" in limited.run(None, planned=False)["error"]


@pytest.mark.slow
def test_auto_finds_the_disk_under_a_hard_limit(run_python, tmp_path, one_thread):
    limited = Limited(run_python, tmp_path, "model", 24, 2048, 44)
    limited.check(limited.run("auto", "auto"))
    assert "DoesNotFit: 2048 tokens need" in limited.run(None, "auto")["error"]
