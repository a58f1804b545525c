"""Compact pages at the level of operations: written as the plain rule says, read back, attended to; bad input refused.

The whole file runs once per instruction-set level in CI (`LLAMA1M_ISA`).
"""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama1m_ext import _core, formats, ops
from llama1m_ext.formats import Compact, KvFormat, Page
from llama1m_ext.testing import compact_reference, dense_reference

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
COMPACT = ["int8", "int4", "fp8"]


def keys_like_llama(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., :: max(1, shape[-1] // 3)] += 12
    return x.to(dtype)


def page_of(fmt: str, k: torch.Tensor, v: torch.Tensor) -> Page:
    parsed = KvFormat.parse(fmt)
    page = Page(formats.empty(parsed.k, "k", tuple(k.shape), k), formats.empty(parsed.v, "v", tuple(v.shape), v))
    ops.kv_append(k, v, page, 0)
    return page


def attention_f64(q, k, v, q_start, softmax_scale=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (softmax_scale or q.shape[-1] ** -0.5)
    hidden = torch.arange(k.shape[2]) > q_start + torch.arange(q.shape[2])[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [128, 64, 80, 8, 256])
def test_codes_are_those_of_the_plain_rule(name, dtype, head_dim):
    torch.manual_seed(0)
    k, v = keys_like_llama(2, 3, 200, head_dim, dtype=dtype), torch.randn(2, 3, 200, head_dim).to(dtype)
    page = page_of(name, k, v)
    for side, x, which in ((page.k, k, "k"), (page.v, v, "v")):
        want = compact_reference(x, name, which)
        assert torch.equal(side.params.view(torch.int16), want.params.view(torch.int16))
        whole = 3 if which == "k" else 200  # groups of 64 tokens; what a last group lacks is nobody's
        assert torch.equal(side.codes[:, :, :whole].view(torch.uint8), want.codes[:, :, :whole].view(torch.uint8))


@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_what_codes_stand_for(name, dtype):
    k, v = keys_like_llama(1, 2, 150, 96, dtype=dtype), torch.randn(1, 2, 150, 96).to(dtype)
    page = page_of(name, k, v)
    for start, end in ((0, 150), (0, 64), (63, 65), (100, 101), (64, 64), (149, 150)):
        read = ops.kv_read(page, start, end, 96, dtype)
        for got, side, which in zip(read, (page.k, page.v), "kv", strict=True):
            want = dense_reference(side, which, 96)[:, :, start:end]
            assert got.dtype == dtype and got.shape == want.shape
            assert torch.allclose(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_writing_in_parts_is_writing_at_once():
    k, v = keys_like_llama(1, 2, 320, 64), torch.randn(1, 2, 320, 64)
    for fmt in ("int8", "int4", "fp8", "int8/int4", "model/int4", "int8/model"):
        whole, parts = page_of(fmt, k, v), page_of(fmt, torch.zeros_like(k), torch.zeros_like(v))
        for a, b in ((256, 320), (0, 64), (64, 256)):
            ops.kv_append(k[:, :, a:b], v[:, :, a:b], parts, a)
        for name, t in whole.tensors().items():
            assert torch.equal(t.view(torch.uint8), parts.tensors()[name].view(torch.uint8)), (fmt, name)


def test_appending_touches_nothing_else():
    k, v = keys_like_llama(1, 1, 64, 64), torch.randn(1, 1, 64, 64)
    page = page_of("int4", k.repeat(1, 1, 4, 1), v.repeat(1, 1, 4, 1))
    before = {name: t.clone() for name, t in page.tensors().items()}
    ops.kv_append(k * 3, v * 3, page, 128)
    for name, t in page.tensors().items():
        axis = 3 if name == "v.params" else 2
        size = 64 if name.startswith("v") else 1
        for i in (0, 1, 3):
            same = t.narrow(axis, i * size, size), before[name].narrow(axis, i * size, size)
            assert torch.equal(*(x.contiguous().view(torch.uint8) for x in same)), name
        assert not torch.equal(t.view(torch.uint8), before[name].view(torch.uint8))


@pytest.mark.parametrize("fmt", [f"{k}/{v}" for k, v in itertools.product(formats.NAMES, formats.NAMES)])
@pytest.mark.parametrize("q_len", [1, 2, 40])
def test_attention_is_that_of_what_codes_stand_for(fmt, q_len):
    torch.manual_seed(1)
    for dtype, heads, head_dim in (
        (torch.bfloat16, (8, 2), 128),
        (torch.float32, (3, 3), 64),
        (torch.float16, (4, 1), 80),
    ):
        q = torch.randn(2, heads[0], q_len, head_dim).to(dtype)
        k, v = (
            keys_like_llama(2, heads[1], 300, head_dim, dtype=dtype),
            torch.randn(2, heads[1], 300, head_dim).to(dtype),
        )
        page = page_of(fmt, k, v)
        held = [dense_reference(side, which, head_dim)[:, :, :300] for side, which in ((page.k, "k"), (page.v, "v"))]
        # Compact pages, then a dense tail: as a cache has them.
        cut = page.narrow(0, 256)
        mixed = [torch.cat([x[:, :, :256], y[:, :, 256:].double()], 2) for x, y in zip(held, (k, v), strict=True)]
        for pages, dense in (([page], held), ([cut, Page(k[:, :, 256:], v[:, :, 256:])], mixed)):
            want, want_lse = attention_f64(q, *dense, q_start=300 - q_len)
            out, lse = ops.attention(
                q, [p.k for p in pages], [p.v for p in pages], kv_len=300, return_lse=True, out_dtype=torch.float32
            )
            # Dequantised keys of a prefill are rounded to the model's dtype, as any keys are.
            bound = {torch.bfloat16: 2e-2, torch.float32: 4e-6, torch.float16: 3e-3}[dtype]
            assert (out - want).pow(2).mean().sqrt() < bound * want.pow(2).mean().sqrt(), (fmt, dtype)
            assert (lse - want_lse).abs().max() < bound * 2, (fmt, dtype)


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8", "int8/int4"])
def test_partials_over_pages_merge_to_the_whole(fmt):
    k, v = keys_like_llama(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
    q = torch.randn(1, 4, 5, 64)
    page = page_of(fmt, k, v)
    whole = ops.attention(q, [page.k], [page.v])
    outs, lses = [], []
    for a in range(0, 512, 128):
        part = page.narrow(a, a + 128)
        out, lse = ops.attention(q, [part.k], [part.v], q_start=507 - a, return_lse=True, out_dtype=torch.float32)
        outs.append(out)
        lses.append(lse)
    assert torch.allclose(ops.merge_partials(outs, lses)[0], whole, atol=2e-6)


def test_padding_may_begin_anywhere_in_a_group():
    k, v = keys_like_llama(1, 1, 256, 64), torch.randn(1, 1, 256, 64)
    q = torch.randn(1, 2, 1, 64)
    page = page_of("int4", k, v)
    held = [dense_reference(side, which, 64) for side, which in ((page.k, "k"), (page.v, "v"))]
    for start, end in ((1, 256), (63, 200), (64, 129), (100, 101), (255, 256)):
        want, _ = attention_f64(q, *(x[:, :, start:end] for x in held), q_start=end - start - 1)
        out = ops.attention(q, [page.k], [page.v], kv_start=start, kv_end=end)
        assert torch.allclose(out.double(), want, atol=1e-5), (start, end)


def test_views_of_larger_memory_serve():
    k, v = keys_like_llama(3, 4, 128, 64), torch.randn(3, 4, 128, 64)
    page = page_of("int4", k, v)
    part = Page(*(Compact(side.codes[1:2, 1:3], side.params[1:2, 1:3]) for side in (page.k, page.v)))
    q = torch.randn(1, 4, 1, 64)
    held = [dense_reference(side, which, 64) for side, which in ((part.k, "k"), (part.v, "v"))]
    assert torch.allclose(
        ops.attention(q, [part.k], [part.v]).double(), attention_f64(q, *held, q_start=127)[0], atol=1e-5
    )


def test_a_nan_is_loud_and_stays_in_its_group():
    k, v = torch.randn(1, 1, 192, 64), torch.randn(1, 1, 192, 64)
    k[0, 0, 70, 5] = torch.nan
    v[0, 0, 3, 9] = torch.inf
    page = page_of("int8", k, v)
    read_k, read_v = ops.kv_read(page, 0, 192, 64, torch.float32)
    assert read_k[0, 0, 64:128, 5].isnan().all() and read_k.isnan().sum() == 64
    assert read_v[0, 0, 3].isnan().all() and read_v.isnan().sum() == 64


def test_compiled_calls_take_compact_pages():
    k, v = keys_like_llama(1, 2, 192, 64), torch.randn(1, 2, 192, 64)
    q = torch.randn(1, 4, 1, 64)
    page = page_of("int8/int4", k[:, :, :128], v[:, :, :128])
    tail = Page(k[:, :, 128:], v[:, :, 128:])

    def step(q, page, tail):
        return ops.attention(q, [page.k, tail.k], [page.v, tail.v], return_lse=True)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, page, tail)
    for a, b in zip(got, step(q, page, tail), strict=True):
        assert torch.equal(a, b)


def test_formats_pickle():
    k, v = keys_like_llama(1, 1, 64, 64), torch.randn(1, 1, 64, 64)
    for fmt in ("int8", "int4", "fp8"):
        page = page_of(fmt, k, v)
        back = pickle.loads(pickle.dumps(page))
        for name, t in page.tensors().items():
            assert (
                torch.equal(back.tensors()[name].view(torch.uint8), t.view(torch.uint8))
                and back.k.codes.dtype == page.k.codes.dtype
            )


@pytest.mark.parametrize("spec", ["int8", "k8v4", "int8/int4", "kf8v16", "model", "fp8/int8", "k4v4"])
def test_format_names_round_trip(spec):
    fmt = KvFormat.parse(spec)
    assert KvFormat.parse(fmt.name) == fmt


@pytest.mark.parametrize(
    "spec", ["", "int3", "int8/", "/int8", "k8", "k8v", "k3v4", "int8/int4/int4", "INT8", "k", "v4"]
)
def test_other_names_are_refused(spec):
    with pytest.raises(ValueError, match="kv: expected one of model, int8, int4, fp8"):
        KvFormat.parse(spec)
    with pytest.raises(TypeError, match="kv: expected"):
        KvFormat.parse(8)


def test_bytes_of_a_million_tokens():
    # DESIGN.md, section 1: 32 layers of Llama-3-8B at 2^20 tokens.
    gib = {
        f: 32 * 2**20 * KvFormat.parse(f).token_bytes(8, 128, 2) / 2**30
        for f in ("model", "int8", "k8v4", "int4", "fp8")
    }
    assert gib == {"model": 128, "int8": 68, "k8v4": 52, "int4": 36, "fp8": 68}
    k = torch.empty(1, 8, 4096, 128, dtype=torch.bfloat16)
    for fmt in gib:
        assert page_of(fmt, k.normal_(), k).nbytes == 4096 * KvFormat.parse(fmt).token_bytes(8, 128, 2)


def good_page() -> Page:
    return page_of("int8", keys_like_llama(1, 2, 128, 64), torch.randn(1, 2, 128, 64))


def test_bad_pages_are_refused_by_name():
    page, q = good_page(), torch.randn(1, 2, 1, 64)
    k, v = page.k, page.v

    def attend(k_side, v_side, query=q):
        return ops.attention(query, [k_side], [v_side])

    for call, error, message in (
        (lambda: attend(Compact(k.codes, k.params[:, :, :1]), v), ValueError, "k params"),
        (lambda: attend(Compact(k.codes, k.params.float()), v), TypeError, "k params: expected float16"),
        (lambda: attend(Compact(k.codes[..., :100], k.params), v), ValueError, "k: expected"),
        (lambda: attend(Compact(k.codes.float(), k.params), v), TypeError, "k: expected codes"),
        (lambda: attend(Compact(k.codes.view(torch.uint8), k.params), v), ValueError, "k"),
        (lambda: attend(Compact(v.codes, v.params), v), ValueError, "k"),
        (lambda: attend(k, Compact(k.codes, k.params)), ValueError, "v"),
        (lambda: attend(k, page.narrow(0, 64).v), ValueError, "v"),
        (lambda: attend(k, v, torch.randn(1, 2, 1, 128)), ValueError, "k"),
        (lambda: attend(k, v, torch.randn(2, 2, 1, 64)), ValueError, "k"),
        (lambda: attend(Compact(k.codes.expand(1, 2, 2, 4096)[..., ::2], k.params), v), ValueError, "k"),
        (lambda: attend((k.codes, k.params), v), TypeError, "k: expected a torch.Tensor, got tuple"),
        (lambda: attend(Compact(k.codes.to("meta"), k.params), v), TypeError, "CPU tensor"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_bad_appends_are_refused_and_change_nothing():
    page = good_page()
    before = {name: t.clone() for name, t in page.tensors().items()}
    k, v = torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64)
    for args, error, message in (
        ((k, v, page, 32), ValueError, "multiple of 64"),
        ((k, v, page, 128), ValueError, "room for 64"),
        ((k, v, page, 1 << 62), ValueError, "room for 64"),
        ((k, v, page, -64), (ValueError, OverflowError), ""),
        ((torch.randn(1, 2, 64, 100), v, page, 0), ValueError, "k: expected rows that fit"),
        ((k[:, :1], v, page, 0), ValueError, "v: expected the batch, heads"),
        ((k.double(), v, page, 0), TypeError, "k"),
        ((k.clone().requires_grad_(), v, page, 0), TypeError, "gradient"),
    ):
        with pytest.raises(error, match=message):
            ops.kv_append(*args)
    with pytest.raises(ValueError, match="of: expected k or v"):
        _core.kv_append(k.detach(), page.k, 0, "w")
    with pytest.raises(ValueError, match="start, end"):
        ops.kv_read(page, 5, 3, 64, torch.float32)
    with pytest.raises(ValueError, match="k: expected tokens"):
        ops.kv_read(page, 100, 200, 64, torch.float32)
    with pytest.raises(ValueError, match="k: expected an output that fits"):
        ops.kv_read(page, 0, 64, 200, torch.float32)
    for name, t in page.tensors().items():
        assert torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)), name


def test_the_core_wants_pairs():
    page, q = good_page(), torch.randn(1, 2, 1, 64)
    for k in ((page.k.codes,), (*page.k, page.k.params), ()):
        with pytest.raises(ValueError, match="codes, params"):
            _core.attention(q, [k], [page.v], torch.empty_like(q))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_input_crashes(data):
    """Shapes, dtypes, strides and numbers at random: a result or an error, never a crash or a read out of bounds."""
    draw = data.draw
    small = st.integers(0, 3)
    dtypes = st.sampled_from([torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float16, torch.float32, torch.int64])

    def tensor():
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 64, 128]), min_size=draw(small) + 1, max_size=4))
        t = torch.zeros(shape, dtype=torch.uint8).to(draw(dtypes))
        if shape and draw(st.booleans()):
            t = t.transpose(0, -1)
        return t.expand(draw(st.integers(1, 2)), *t.shape) if draw(st.booleans()) else t

    def side():
        kind = draw(st.integers(0, 3))
        if kind == 0:
            return tensor()
        if kind == 1:
            return (tensor(), tensor())
        page = page_of(
            draw(st.sampled_from(["int8", "int4", "fp8"])), torch.randn(1, 2, 70, 64), torch.randn(1, 2, 70, 64)
        )
        return draw(st.sampled_from([page.k, page.v]))

    q = torch.randn(1, draw(st.sampled_from([2, 4, 3])), draw(st.integers(1, 9)), draw(st.sampled_from([64, 8, 128])))
    for call in (
        lambda: ops.attention(q, [side()], [side()], kv_len=draw(st.sampled_from([None, 0, 1, 70, 71, 1 << 40]))),
        lambda: _core.kv_append(
            tensor(), side(), draw(st.sampled_from([0, 1, 64, 1 << 60])), draw(st.sampled_from("kv"))
        ),
        lambda: _core.kv_read(
            side(), draw(st.sampled_from([0, 1, 64, 1 << 60])), tensor(), draw(st.sampled_from("kv"))
        ),
        lambda: _core.checksum(tensor()),
    ):
        try:
            call()
        except (ValueError, TypeError, OverflowError):
            pass


def test_checksums_are_of_the_bytes():
    x = torch.arange(1000, dtype=torch.int64)
    assert _core.checksum(x) == _core.checksum(x.clone()) == _core.checksum(x.view(torch.uint8))
    y = x.clone()
    y[999] += 1
    assert _core.checksum(y) != _core.checksum(x)
    assert _core.checksum(torch.empty(0, dtype=torch.uint8)) == 0x2D06800538D394C2  # xxh3's own value of nothing
    with pytest.raises(ValueError, match="contiguous"):
        _core.checksum(x[::2])
