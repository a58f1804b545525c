"""Models on GPUs that are not there: torch's fake tensors have a device, shapes and dtypes, and no numbers.

So whatever a call of the model asks of a GPU's numbers raises, but for the questions that it asks in one go.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import llama1m_ext
import test_pinned
from llama1m_ext import (
    LongCache,
    call,
    cuda,
    intervals,
    memory,
    offload,
    ops,
    pinned,
    placement,
    plan_bytes,
    plan_call,
    plan_choice,
    plan_shape,
    prefill,
    progress,
    questions,
    rope,
    saved,
    tensorfile,
    testing,
    tokens,
    weights,
)
from llama1m_ext.formats import Page
from llama1m_ext.stored import StoredPage

CONFIG = testing.tiny_model().config
ONE, TWO = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def asked(fake_gpu, monkeypatch):
    """Fake GPUs that can be computed on. Gives the sizes of the questions asked; mask and positions are ordinary, unless
    `answers` says more."""
    found = types.SimpleNamespace(sizes=[], answers=lambda n: [False] * n)

    def answers(self):
        found.sizes.append(sum(t.numel() for t in self._asked))
        return found.answers(found.sizes[-1])

    class Unpaced(progress.Pace):
        def step(self, work, device):
            self.progress.step(work)

    monkeypatch.setattr(cuda, "unserved", lambda device: None)
    monkeypatch.setattr(questions.Questions, "answers", answers)
    monkeypatch.setattr(call, "Tensor", FakeTensor)
    monkeypatch.setattr(memory, "_of_gpu", lambda device: 80 << 30)
    monkeypatch.setattr(prefill, "Pace", Unpaced)
    # Its numbers decide whether a cast rounded it.
    monkeypatch.setattr(rope, "frequencies", lambda rotary, ids: (torch.empty(8, dtype=torch.float64), 1.0))
    with FakeTensorMode():
        yield found


class HostCopies(TorchDispatchMode):
    """Counts what is read from a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda and kwargs.get("device") == torch.device("cpu"):
            self.count += 1
        return func(*args, **kwargs)


def model_on(*devices):
    """A model with a layer on each device, as accelerate spreads it where there are several."""
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = len(devices)
    models = []
    for device in devices:
        with device:
            models.append(LlamaForCausalLM(config).eval())
    first, last = models[0], models[-1]
    if len(devices) == 1:
        return first
    for i, other in enumerate(models):
        first.model.layers[i] = other.model.layers[i]
    first.model.norm, first.lm_head = last.model.norm, last.lm_head
    parts = [(first.model.embed_tokens, devices[0]), (first.model.rotary_emb, devices[0])]
    parts += [
        (first.model.norm, devices[-1]),
        (first.lm_head, devices[-1]),
        *zip(first.model.layers, devices, strict=True),
    ]
    for part, device in parts:
        for module in part.modules():
            if module is part or next(module.parameters(), None) is not None:
                add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    add_hook_to_module(first, AlignDevicesHook(execution_device=devices[0], io_same_device=True))
    llama1m_ext.patch_model(first)
    return first


@pytest.mark.parametrize(
    ("devices", "kv", "padded"),
    [((ONE,), "model", False), ((ONE,), "int8", True), ((ONE, TWO), "model", True), ((ONE, TWO), "int8", False)],
)
def test_each_call_of_the_model_asks_once(asked, monkeypatch, devices, kv, padded):
    attention = ops.attention

    def checked(q, k, v, *, kv_start=None, **more):
        assert (kv_start is not None) == padded
        assert kv_start is None or kv_start.device == q.device
        return attention(q, k, v, kv_start=kv_start, **more)

    monkeypatch.setattr(ops, "attention", checked)
    if padded:
        asked.answers = lambda n: [False] * (n - 2) + [True, False]  # some start hides keys
    model, n = model_on(*devices), len(devices)
    llama1m_ext.set_options(model, chunk=128, kv=kv, progress=False)
    cache = LongCache()

    def forward(tokens, **more):
        length = cache.get_seq_length() + tokens
        places = torch.arange(length - tokens, length, device=ONE)
        with torch.no_grad():
            return model(
                torch.zeros(2, tokens, dtype=torch.long, device=ONE),
                attention_mask=torch.ones(2, length, dtype=torch.long, device=ONE),
                position_ids=places[None],
                past_key_values=cache,
                cache_position=places,
                **more,
            ).logits

    logits = forward(1000, logits_to_keep=1)
    assert (logits.device, logits.shape[1]) == (ONE, 1)
    assert len(asked.sizes) == 1
    assert {layer.kind.device for layer in cache.layers} == set(devices)
    assert all(
        t.device == layer.kind.device for layer in cache.layers for p in layer.pages for t in p.tensors().values()
    )
    with HostCopies() as copies:
        for _ in range(300):  # over the end of a tail
            logits = forward(1)
    assert logits.device == ONE
    assert copies.count == 0
    assert len(asked.sizes) == 301
    stats = llama1m_ext.stats(model)
    assert (stats.stock, stats.layer_major, stats.served) == ({}, 1, stats.served)
    assert stats.served == n * 300 + (n - 1) * 8 + 1
    assert cache.format.name == kv


class _Watcher(ModelHook):
    pass


def test_a_layer_with_another_hook_is_not_gone_past(asked):
    model = model_on(ONE, TWO)
    assert placement.spread(model.model.layers, ONE) == {ONE: 1, TWO: 1}
    layer = model.model.layers[1]
    assert weights.only_brings(layer)
    add_hook_to_module(layer, _Watcher(), append=True)
    assert not weights.only_brings(layer)
    llama1m_ext.set_options(model, chunk=128)
    with torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.long, device=ONE))
    assert llama1m_ext.stats(model).layer_major == 0
    assert llama1m_ext.stats(model).served == 2


def test_questions_are_answered_in_order():
    asked = questions.Questions()
    assert asked.answers() == []
    asked.ask(torch.tensor(True))
    asked.ask(torch.tensor([False, True]))
    assert asked.answers() == [True, False, True]


@pytest.mark.parametrize(
    "rows",
    [[[1, 1, 1, 1]], [[0, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 1, 1, 0]], [[1, 0, 1, 1]]],
)
def test_masks_judged_at_once_are_those_judged_in_turn(rows):
    mask = torch.tensor(rows)
    want = intervals.from_mask(mask, *mask.shape)
    start, end, facts = intervals.ends(mask)
    found = intervals.judged(start, end, facts.tolist())
    if isinstance(want, str) or want is intervals.ALL:
        assert found is want or found == want
    else:
        for a, b in ((want.start, found.start), (want.end, found.end)):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


# -- what is missing -----------------------------------------------------------------------------------------------------


def info(**changes):
    found = {
        "driver": {"found": True, "version": "13.0", "why": None, "fake": False},
        "devices": [
            ("Card 90", (9, 0), 132, 80 << 30),
            ("Card 120", (12, 0), 188, 96 << 30),
            ("Card 70", (7, 0), 80, 1),
        ],
        "nvrtc": {"path": "/somewhere/libnvrtc.so.13", "version": "13.0", "why": None},
        "cubins": ["sm_80", "sm_90a"],
        "cache": "/somewhere",
    }
    return {**found, **changes}


NOTHING = {"path": None, "version": None, "why": "no libnvrtc.so.13 anywhere"}


@pytest.mark.parametrize(
    ("index", "changes", "said"),
    [
        (0, {}, None),
        (0, {"nvrtc": NOTHING}, None),
        (1, {}, None),
        (1, {"nvrtc": NOTHING}, ["Card 120", "sm_120", "sm_80, sm_90a", "NVRTC", "no libnvrtc.so.13 anywhere"]),
        (0, {"nvrtc": NOTHING, "cubins": []}, ["Card 90", "sm_90", "none", "NVRTC"]),
        (2, {}, ["Card 70", "7.0", "8.0"]),
        (3, {}, ["3 devices", "number 3"]),
        (
            0,
            {"driver": {"found": False, "why": "libcuda.so.1: cannot open"}},
            ["NVIDIA driver", "libcuda.so.1: cannot open"],
        ),
        (5, {"driver": {"found": True, "fake": True}}, None),
    ],
)
def test_what_is_missing_is_said(monkeypatch, index, changes, said):
    monkeypatch.setattr(cuda, "info", lambda: info(**changes))
    monkeypatch.setattr(cuda, "_missing", cuda._missing.__wrapped__)
    device = torch.device("cuda", index)
    why = cuda.missing(device)
    if said is None:
        assert why is None
        return
    assert all(word in why for word in said)
    assert cuda.unserved(device) == f"device {device}: {why}"
    with pytest.raises(cuda.Missing, match=f"device cuda:{index}"):
        cuda.check(device)


def test_this_machine_has_a_driver_or_it_is_said_that_it_has_none():
    driver = cuda.info()["driver"]
    why = cuda.missing(ONE)
    assert driver["found"] or ("NVIDIA driver" in why and "libcuda.so.1" in why)
    if not torch.cuda.is_available():
        assert why is not None


@pytest.mark.parametrize(
    ("arch", "capability", "fits"),
    [("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_80", (9, 0), False), ("sm_90a", (9, 0), True),
     ("sm_90a", (9, 1), False), ("sm_90a", (10, 0), False), ("sm_89", (8, 6), False), ("sm_120", (12, 1), True)],
)  # fmt: skip
def test_cubins_run_on_their_own_generation(arch, capability, fits):
    assert cuda._fits(arch, *capability) is fits


def test_a_model_goes_the_stock_path_with_one_warning(monkeypatch):
    model = testing.tiny_model()
    ids = testing.random_ids(1, 20)
    with torch.no_grad():
        want = model(ids).logits
        monkeypatch.setattr(
            cuda, "unserved", lambda device: "device cuda:0: the NVIDIA driver was not found: no libcuda.so.1"
        )
        with pytest.warns(UserWarning, match="no libcuda.so.1"):
            found = model(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids)
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)
    (reason,) = llama1m_ext.stats(model).stock
    assert "NVIDIA driver" in reason


def test_other_devices_are_named():
    assert cuda.unserved(torch.device("cpu")) is None
    assert cuda.unserved(torch.device("meta")) == "device meta"


# -- memory, and how fast the host may go ----------------------------------------------------------------------------------


def test_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 << 30)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    assert memory.free_bytes(ONE) == 13 << 30
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.125, raising=False)
    assert memory.free_bytes(ONE) == 6 << 30
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40 << 30)
    assert memory.free_bytes(ONE) == 0
    monkeypatch.setattr(memory, "available_bytes", lambda: 77)
    assert memory.free_bytes(torch.device("cpu")) == memory.free_bytes() == 77


def test_chunks_on_a_gpu_are_larger(monkeypatch):
    class Llama8B:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads = 4096, 14336, 32, 8

    free = {ONE: 60 << 30, TWO: 60 << 30}
    monkeypatch.setattr(memory, "_of_gpu", free.__getitem__)
    monkeypatch.setattr(memory, "available_bytes", lambda: 64 << 30)
    cpu = placement.chunk_len(Llama8B, 1, 2, [torch.device("cpu")])
    assert placement.chunk_len(Llama8B, 1, 2, free) == 16384 > cpu == memory.chunk_len(Llama8B, 1, 2)
    free[TWO] = 2 << 30  # the smallest decides
    assert placement.chunk_len(Llama8B, 1, 2, free) == 1024


@pytest.fixture
def events(monkeypatch):
    log = []

    class Event:
        def __init__(self, blocking):
            assert blocking
            self.number = sum(entry[0] == "record" for entry in log)

        def record(self, stream):
            log.append(("record", self.number))

        def synchronize(self):
            log.append(("wait", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return log


def test_the_bar_waits_one_chunk_behind(events):
    class Bar:
        done = 0.0

        def step(self, work):
            self.done += work

    bar = Bar()
    pace = progress.Pace(bar)
    shown = []
    for work in (1, 10, 100):
        pace.step(work, ONE)
        shown.append(bar.done)
    assert shown == [0, 1, 11]
    assert events == [("record", 0), ("record", 1), ("wait", 0), ("record", 2), ("wait", 1)]
    pace.finish()
    assert bar.done == 111
    assert events[-1] == ("wait", 2)
    pace.step(5, torch.device("cpu"))
    assert bar.done == 116
    assert len(events) == 6


def test_a_prefill_waits_for_all_of_it(asked, events, monkeypatch):
    """Also where an interrupt comes while the host waits: the cache is as before."""
    monkeypatch.setattr(prefill, "Pace", progress.Pace)
    model = model_on(ONE)
    llama1m_ext.set_options(model, chunk=128)
    cache = LongCache()
    ids = torch.zeros(1, 1000, dtype=torch.long, device=ONE)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        assert [n for what, n in events if what == "wait"] == list(range(8))
        assert cache.get_seq_length() == 1000

        def interrupted(self):
            raise KeyboardInterrupt

        monkeypatch.setattr(torch.cuda.Event, "synchronize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 1000
        monkeypatch.setattr(prefill, "_layer", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 1000
        assert sum(page.size for page in cache.layers[0].pages[:1]) >= 1000


# -- plans ---------------------------------------------------------------------------------------------------------------

SHAPE = plan_shape.shape_of("gradientai/Llama-3-8B-Instruct-Gradient-1048k")[1]


def test_room_in_pages_is_memory_on_a_gpu():
    work = plan_bytes.Work(4096, gpu=True, chunk=512)
    room = plan_bytes.room_bytes(SHAPE, "model", 4096)
    for phase in plan_bytes.peaks(SHAPE, work, plan_bytes.Storage()):
        whole = phase.phase in ("logits", "generating")
        assert phase.parts["room"] == room if whole else 0.9 * room < phase.parts["room"] <= room
    for phase in plan_bytes.peaks(SHAPE, dataclasses.replace(work, gpu=False), plan_bytes.Storage()):
        assert "room" not in phase.parts


def test_workspace_on_a_gpu_is_what_long_prompts_and_compact_histories_take():
    work = plan_bytes.Work(1000, gpu=True, chunk=512)
    least = plan_bytes.workspace_bytes(SHAPE, work, plan_bytes.Storage())
    long = dataclasses.replace(work, tokens=100_000)
    assert plan_bytes.workspace_bytes(SHAPE, long, plan_bytes.Storage()) - least == 512 * SHAPE.q_dim * 4
    later = dataclasses.replace(work, past=1000)
    assert plan_bytes.workspace_bytes(SHAPE, later, plan_bytes.Storage()) == least
    assert plan_bytes.workspace_bytes(SHAPE, later, plan_bytes.Storage("int8")) - least == 2 * 1000 * SHAPE.kv_dim * 2
    later = dataclasses.replace(work, past=50_000)
    more = 2 * 16_384 * SHAPE.kv_dim * 2 + 3 * 512 * SHAPE.q_dim * 4
    assert plan_bytes.workspace_bytes(SHAPE, later, plan_bytes.Storage("int8")) - least == more


def test_what_a_gpu_has_no_room_for_goes_to_the_host_and_then_to_the_disk():
    work = plan_bytes.Work(100_000, gpu=True, chunk=512)
    whole = plan_bytes.peak(SHAPE, work, plan_bytes.Storage()).bytes
    small = plan_bytes.peak(SHAPE, work, plan_bytes.Storage("int4")).bytes
    pages = plan_bytes.kv_bytes(SHAPE, "model", 100_000)

    def chosen(gpu, host, **more):
        found = plan_choice.choose_on_gpu(SHAPE, work, gpu, host, **more)
        return found.storage.kv, found.storage.offload, found.fits

    assert chosen(2 * whole, 0) == ("model", None, True)
    assert chosen(int(1.06 * small), 0) == ("int4", None, True)
    assert chosen(int(0.99 * small), pages) == ("int4", "host", True)
    assert chosen(int(0.99 * small), pages, kv="model") == ("model", "host", True)
    assert chosen(int(0.99 * small), pages // 2)[1:] == ("host", True)
    assert chosen(int(0.99 * small), 0)[:2] == ("int4", "disk")
    assert chosen(2 * whole, pages, offload="disk")[1] == "disk"
    assert chosen(int(0.99 * small), pages, offload=None)[1:] == (None, False)
    assert chosen(2 * whole, pages, kv="model", kv_memory=pages // 4) == ("model", "host", True)
    host = plan_choice.choose_on_gpu(SHAPE, work, 2 * whole, pages, kv="model", kv_memory=pages // 4).storage
    assert host.kv_memory == pages // 4


def test_a_plan_for_all_devices_is_the_most_careful_one():
    storage = plan_bytes.Storage
    one = storage("int8/int4", "host", 7 << 20)
    assert plan_call._for_all([one]) == one
    assert plan_call._for_all([storage("model"), storage("int8")]) == storage("int8")
    assert plan_call._for_all([storage("int4", None), one]) == storage("int4", "host", 14 << 20)
    assert plan_call._for_all([storage("fp8"), storage("fp8")]) == storage("fp8")


@pytest.mark.parametrize("devices", [(ONE,), (ONE, TWO)])
def test_pages_that_a_gpu_has_no_room_for_go_to_the_host(asked, monkeypatch, devices):
    test_pinned.Streams(monkeypatch)
    monkeypatch.setattr(pinned, "Slabs", lambda pinned: test_pinned.Slabs(False))
    model = model_on(*devices)
    llama1m_ext.set_options(model, chunk=128, kv="model", offload="host", kv_memory=1 << 17, progress=False)
    cache = LongCache()
    with torch.no_grad():
        for n in (1000, 1, 1):
            model(torch.zeros(1, n, dtype=torch.long, device=ONE), past_key_values=cache, logits_to_keep=1)
    assert len({id(layer.store) for layer in cache.layers}) == len(devices)
    for layer, device in zip(cache.layers, devices, strict=True):
        assert layer.store.where == "host"
        far = [page for page in layer.pages if isinstance(page, pinned.HostPage)]
        assert far
        assert {page.lane.device for page in far} == {device}
        assert sum(page.nbytes for page in layer.pages[:-1] if isinstance(page, Page)) <= layer.store.share
        assert layer.store.traffic.pages >= 2 * len(far)
    assert cache.get_seq_length() == 1002


def test_a_prompt_is_refused_where_one_of_the_gpus_is_full(asked, monkeypatch):
    monkeypatch.setattr(plan_call, "SMALL", 0)
    free = {ONE: 1 << 40, TWO: 1 << 40}
    monkeypatch.setattr(memory, "_of_gpu", free.__getitem__)
    model = model_on(ONE, TWO)
    llama1m_ext.set_options(model, chunk=128, offload=None, progress=False)
    cache, ids = LongCache(), torch.zeros(1, 1000, dtype=torch.long, device=ONE)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        free[TWO] = 100_000
        with pytest.raises(llama1m_ext.DoesNotFit, match="available"):
            model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 1000


# -- what was kept elsewhere -------------------------------------------------------------------------------------------------


def test_a_saved_cache_goes_to_the_devices_of_its_layers(fake_gpu, tmp_path, monkeypatch):
    model = testing.tiny_model()
    cache = LongCache(kv="int8")
    with torch.no_grad():
        model(testing.random_ids(1, 700), past_key_values=cache)
    cache.save(tmp_path / "cache")
    free = {ONE: 1 << 30, TWO: 10}
    monkeypatch.setattr(memory, "_of_gpu", free.__getitem__)
    loaded = saved.load(tmp_path / "cache", model)
    assert all(layer.kind.device.type == "cpu" for layer in loaded.layers)
    for layer in loaded.layers:
        for page in layer.pages:
            page.load() if isinstance(page, StoredPage) else None  # whose bytes are checked the first time
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = [torch.nn.Linear(1, 1, device=device) for device in (ONE, TWO)]
        inner = types.SimpleNamespace(embed_tokens=torch.nn.Embedding(1, 1, device=ONE), layers=layers)
        saved._place(loaded, inner)
    assert [layer.kind.device for layer in loaded.layers] == [ONE, TWO]
    first, second = (layer.pages for layer in loaded.layers)
    assert all(t.device == ONE for page in first for t in page.tensors().values())
    assert any(isinstance(page, StoredPage) for page in second), "there is no room for it"
    assert all(t.device == TWO for page in second if isinstance(page, Page) for t in page.tensors().values())


def test_tensors_come_from_a_gpu_in_blocks(monkeypatch):
    monkeypatch.setattr(tensorfile, "_FETCH", 40)
    x = torch.arange(33, dtype=torch.float32)
    parts = list(tensorfile._fetched(x))
    assert [part.numel() for part in parts] == [10, 10, 10, 3]
    assert torch.equal(torch.cat(parts), x)


def test_ids_of_a_cache_follow_the_model():
    with FakeTensorMode(allow_non_fake_inputs=True):
        seen = tokens.Seen()
        seen.append(torch.zeros(1, 5, dtype=torch.long), 0)
        seen.append(torch.zeros(1, 2, dtype=torch.long, device=ONE), 5)
        assert seen.ids.device == ONE
        assert seen.ids.shape == (1, 7)


def test_bounds_of_rows_are_read_from_a_gpu_once(monkeypatch):
    x = torch.tensor([3, 7])
    assert offload._bounds(x) == (3, 7)
    x[0] = 1
    assert offload._bounds(x) == (1, 7), "on the CPU they may change"
    with FakeTensorMode():
        far = torch.empty(2, dtype=torch.long, device=ONE)
    far._llama1m_bounds = (1, 2)
    assert offload._bounds(far) == (1, 2)
