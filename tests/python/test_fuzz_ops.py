"""Mistakes: each is a ValueError or TypeError that names the argument; nothing reachable from Python crashes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama1m_ext import _core, ops
from llama1m_ext.formats import Page

Q, K = (1, 4, 5, 64), (1, 2, 9, 64)
# Cases whose names begin with "host" don't hold on a GPU: what is there, the host can't look at (test_cuda_driver.py).


def call(**kw):
    args = {"q": torch.randn(Q), "k": torch.randn(K), "v": torch.randn(K)}
    args.update(kw)
    return ops.attention(args.pop("q"), args.pop("k"), args.pop("v"), **args)


@pytest.mark.parametrize(
    "kw,error,words",
    [
        ({"q": torch.randn(4, 5, 64)}, ValueError, ["q: expected [batch, heads, len, head_dim]", "[4, 5, 64]"]),
        ({"q": torch.randn(Q).double()}, TypeError, ["q", "float64"]),
        ({"q": torch.randint(0, 9, Q)}, TypeError, ["q", "int64"]),
        ({"q": torch.randn(Q, dtype=torch.complex64)}, TypeError, ["q", "complex64"]),
        ({"q": torch.randn(Q).bfloat16()}, TypeError, ["k", "bfloat16", "float32"]),
        ({"v": torch.randn(K).half()}, TypeError, ["v", "float16", "float32"]),
        ({"k": torch.randn(1, 3, 9, 64)}, ValueError, ["v", "[1, 3, 9, 64]", "[1, 2, 9, 64]"]),
        (
            {"k": torch.randn(1, 3, 9, 64), "v": torch.randn(1, 3, 9, 64)},
            ValueError,
            ["k: expected kv_heads to divide q_heads=4, got 3"],
        ),
        ({"k": torch.randn(2, 2, 9, 64), "v": torch.randn(2, 2, 9, 64)}, ValueError, ["k", "[2, 2, 9, 64]"]),
        (
            {"q": torch.randn(1, 4, 5, 4), "k": torch.randn(1, 2, 9, 4), "v": torch.randn(1, 2, 9, 4)},
            ValueError,
            ["head_dim", "4"],
        ),
        ({"q": torch.randn(1, 4, 64, 5).transpose(2, 3)}, ValueError, ["q", "stride 1", "stride 5"]),
        pytest.param({"q": torch.randn(Q, device="meta")}, TypeError, ["q", "CPU", "meta"], id="host-device"),
        ({"q": torch.randn(Q).to_sparse()}, TypeError, ["q", "strided", "sparse"]),
        ({"q": np.zeros(Q, np.float32)}, TypeError, ["q", "torch.Tensor", "ndarray"]),
        ({"q": None}, TypeError, ["q", "NoneType"]),
        ({"k": [], "v": []}, ValueError, ["at least one"]),
        ({"k": [torch.randn(K), 3], "v": [torch.randn(K)] * 2}, TypeError, ["k", "int"]),
        ({"softmax_scale": math.nan}, ValueError, ["softmax_scale", "NaN"]),
        ({"softmax_scale": math.inf}, ValueError, ["softmax_scale", "inf"]),
        ({"kv_len": 10}, ValueError, ["kv_len", "9", "10"]),
        ({"kv_len": -1}, (ValueError, OverflowError), []),
        pytest.param({"kv_start": torch.tensor([-1])}, ValueError, ["kv_start", "-1"], id="host-bounds"),
        ({"kv_start": -1}, ValueError, ["kv_start", "-1"]),
        ({"kv_start": torch.tensor([0, 0])}, ValueError, ["kv_start", "[1]", "[2]"]),
        ({"kv_end": torch.tensor([1.0])}, TypeError, ["kv_end", "int64", "float32"]),
        ({"q_start": 2**62}, ValueError, ["q_start"]),
        ({"q_start": 2**70}, (ValueError, OverflowError), []),
    ],
)
def test_attention_mistakes_are_named(kw, error, words):
    with pytest.raises(error) as e:
        call(**kw)
    for word in words:
        assert word in str(e.value), str(e.value)


@pytest.mark.parametrize(
    "args,error,words",
    [
        (([torch.randn(Q)], [torch.randn(1, 4, 4)]), ValueError, ["lses[0]", "[1, 4, 5]", "[1, 4, 4]"]),
        (([torch.randn(Q)], [torch.randn(1, 4, 5).double()]), TypeError, ["lses[0]", "float64"]),
        (([torch.randn(Q)], []), ValueError, ["lses"]),
        (([], []), ValueError, ["outs", "at least one"]),
        ((torch.randn(Q), torch.randn(1, 4, 5)), ValueError, ["outs", "rank 5"]),
        ((3, 4), TypeError, ["outs", "int"]),
        (([torch.randn(Q), torch.randn(K)], [torch.randn(1, 4, 5)] * 2), ValueError, ["outs[1]"]),
    ],
)
def test_merge_mistakes_are_named(args, error, words):
    with pytest.raises(error) as e:
        ops.merge_partials(*args)
    for word in words:
        assert word in str(e.value), str(e.value)


@pytest.mark.parametrize(
    "kw,error,words",
    [
        ({"positions": torch.arange(4)}, ValueError, ["positions", "[5]", "[4]"]),
        ({"positions": torch.arange(5).float()}, TypeError, ["positions", "int64", "float32"]),
        pytest.param({"positions": torch.tensor([0, 1, 2, 3, -4])}, ValueError, ["positions", "-4"], id="host-low"),
        pytest.param(
            {"positions": torch.tensor([0, 1, 2, 3, 2**41])}, ValueError, ["positions", str(2**41)], id="host-high"
        ),
        ({"inv_freq": torch.rand(32)}, TypeError, ["inv_freq", "float64", "float32"]),
        ({"inv_freq": torch.rand(33).double()}, ValueError, ["q", "66", "64"]),
        ({"inv_freq": torch.rand(0).double()}, ValueError, ["inv_freq"]),
        ({"inv_freq": torch.tensor([math.nan]).double()}, ValueError, ["inv_freq", "NaN"]),
        ({"inv_freq": torch.rand(2, 3).double()}, ValueError, ["inv_freq", "[2, 3]"]),
        ({"attention_scaling": math.inf}, ValueError, ["attention_scaling", "inf"]),
        ({"q_out": torch.empty(1, 4, 6, 64)}, ValueError, ["q_out"]),
        ({"q_out": torch.empty(Q).half()}, ValueError, ["q_out", "float16"]),
        ({"q_out": torch.empty(1, 1, 5, 64).expand(Q)}, ValueError, ["q_out", "stride 0"]),
        ({"k": torch.randn(2, 2, 5, 64)}, ValueError, ["k", "batch 1"]),
    ],
)
def test_rope_mistakes_are_named(kw, error, words):
    args = {"q": torch.randn(Q), "k": None, "positions": torch.arange(5), "inv_freq": torch.rand(32).double()}
    args.update(kw)
    with pytest.raises(error) as e:
        ops.rope_apply(args.pop("q"), args.pop("k"), args.pop("positions"), args.pop("inv_freq"), **args)
    for word in words:
        assert word in str(e.value), str(e.value)


def test_outputs_of_the_core_are_checked_too():
    q, k = torch.randn(Q), torch.randn(K)
    for out in (torch.empty(1, 4, 4, 64), torch.empty(Q).half(), torch.empty(1, 1, 1, 64).expand(Q), 7, None):
        with pytest.raises((ValueError, TypeError), match="out"):
            _core.attention(q, k, k, out)
    frozen = np.empty(Q, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writeable array"):
        _core.attention(q, k, k, frozen)
    with pytest.raises(ValueError, match="path"):
        _core.attention(q, k, k, torch.empty(Q), path="sideways")
    flipped = np.zeros(Q, np.float32)[:, ::-1]
    with pytest.raises(ValueError, match="q: expected strides"):
        _core.attention(flipped, k, k, torch.empty(Q))
    swapped = np.zeros(Q, np.float32).astype(">f4")
    with pytest.raises(TypeError, match="q"):
        _core.attention(swapped, k, k, torch.empty(Q))


def test_views_over_freed_or_shrunk_storage_are_refused():
    k = torch.randn(K)
    k.untyped_storage().resize_(16)
    with pytest.raises(ValueError, match="storage of 16 bytes"):
        call(k=k)
    k.untyped_storage().resize_(0)
    with pytest.raises((ValueError, TypeError), match="k"):
        call(k=k)


objects = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.sampled_from([torch.float32, object(), torch.tensor(1.0), torch.zeros(0), torch.zeros(1, 0, 3, 8), np.zeros(3)]),
    st.builds(
        lambda shape, dtype, flip: (
            torch.zeros(shape, dtype=dtype).transpose(*flip) if len(shape) > 1 else torch.zeros(shape, dtype=dtype)
        ),
        st.lists(st.integers(0, 9), max_size=5),
        st.sampled_from(
            [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool]
        ),
        st.sampled_from([(0, 1), (0, 0), (1, 0)]),
    ),
    st.builds(
        lambda size, stride, offset: torch.zeros(4096).as_strided(size, stride, offset),
        st.tuples(*[st.integers(0, 3)] * 4),
        st.tuples(*[st.integers(0, 40)] * 4),
        st.integers(0, 100),
    ),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    args=st.lists(objects, min_size=4, max_size=5),
    kw=st.dictionaries(
        st.sampled_from(["causal", "softmax_scale", "q_start", "kv_start", "kv_end", "kv_len", "threads", "path"]),
        objects,
    ),
)
def test_no_arguments_crash_the_core(args, kw):
    for function, n in ((_core.attention, 5), (_core.merge_partials, 4), (_core.rope_apply, 6)):
        allowed = ("threads",) if function is not _core.attention else tuple(kw)
        given_kw = {k: v for k, v in kw.items() if k in allowed}
        try:
            function(*(args + args)[:n], **given_kw)
        except (TypeError, ValueError, OverflowError, AttributeError):
            pass


@settings(max_examples=300, deadline=None)
@given(
    dims=st.tuples(
        st.integers(0, 3),
        st.integers(0, 4),
        st.integers(0, 20),
        st.integers(0, 40),
        st.sampled_from([0, 7, 8, 64, 256, 257]),
    ),
    kv_heads=st.integers(0, 4),
    kw=st.fixed_dictionaries(
        {},
        optional={
            "causal": st.booleans(),
            "softmax_scale": st.floats(),
            "q_start": st.integers(-(2**63), 2**63 - 1),
            "kv_start": st.integers(-(2**63), 2**63 - 1),
            "kv_end": st.integers(-(2**63), 2**63 - 1),
            "kv_len": st.integers(0, 2**63),
            "return_lse": st.booleans(),
        },
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_numbers_crash_attention(dims, kv_heads, kw, dtype):
    batch, q_heads, q_len, kv_len, head_dim = dims
    q = torch.randn(batch, q_heads, q_len, head_dim).to(dtype)
    k = torch.randn(batch, kv_heads, kv_len, head_dim).to(dtype)
    try:
        out = ops.attention(q, k, k, **kw)
    except (TypeError, ValueError, OverflowError):
        return
    out = out[0] if isinstance(out, tuple) else out
    assert out.shape == q.shape
    # Scores beyond 2^24 are further apart than 1: float32 can't say what their weights are.
    if abs(kw.get("softmax_scale", 1.0)) < 1e4:
        assert not out.isnan().any()


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def test_an_unknown_isa_is_an_error_with_the_levels():
    code = "import torch\nfrom llama1m_ext import ops\nq = torch.randn(1, 1, 1, 8)\nops.attention(q, q, q)"
    r = run(code, LLAMA1M_ISA="mmx", LLAMA1M_DISABLE="1")
    assert r.returncode == 1 and "LLAMA1M_ISA" in r.stderr and "portable" in r.stderr and "mmx" in r.stderr, r.stderr


def test_a_forked_process_has_threads_of_its_own():
    code = """
        import os, torch
        from llama1m_ext import ops
        torch.set_num_threads(2)
        q = torch.randn(1, 4, 300, 64)
        want = ops.attention(q, q, q)
        pid = os.fork()
        if pid == 0:
            # Compared by numpy: torch's own OpenMP operations don't survive a fork.
            ok = (ops.attention(q, q, q).numpy() == want.numpy()).all()
            os._exit(0 if ok else 3)
        assert os.waitpid(pid, 0)[1] == 0
        print("fine")
    """
    r = run(code, LLAMA1M_DISABLE="1")
    assert r.returncode == 0 and "fine" in r.stdout, r.stderr


def test_ctrl_c_stops_a_long_call():
    code = """
        import os, signal, threading, time, torch
        from llama1m_ext import ops
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        q = torch.randn(1, 8, 60000, 64)
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.perf_counter()
        try:
            ops.attention(q, q[:, :1], q[:, :1], causal=False)
        except KeyboardInterrupt:
            print("interrupted", time.perf_counter() - start)
    """
    r = run(code, LLAMA1M_DISABLE="1", LLAMA1M_ISA="portable")
    assert r.returncode == 0 and "interrupted" in r.stdout, (r.stdout, r.stderr)
    assert float(r.stdout.split()[1]) < 60
    assert signal.SIGINT  # the signal is the same on every platform we serve


def test_the_negative_bit_is_refused():
    """A view that stands for its memory with the other sign (of a conjugate's imaginary part): read as it is, it would be wrong."""
    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    out, lse = ops.attention(q, k, v, return_lse=True)
    page = Page(torch.zeros_like(k), torch.zeros_like(v))
    places, inv_freq = torch.arange(8)[None], torch.rand(8, dtype=torch.float64)
    minus = torch._neg_view
    for name, call in {
        "q": lambda: ops.attention(minus(q), k, v),
        "k": lambda: ops.attention(q, [minus(k)], [v]),
        "v": lambda: ops.attention(q, k, minus(v)),
        "grad_out": lambda: ops.attention_backward(minus(out), q, k, v, out, lse),
        "lse": lambda: ops.attention_backward(out, q, k, v, out, minus(lse)),
        "outs": lambda: ops.merge_partials([out, minus(out)], [lse, lse]),
        "lses": lambda: ops.merge_partials([out, out], [lse, minus(lse)]),
        "q_out": lambda: ops.rope_apply(q, None, places, inv_freq, q_out=minus(q)),
        "page.k": lambda: ops.kv_append(k, v, Page(minus(page.k), page.v), 0),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: .*negative bit; call resolve_neg"):
            call()
    with pytest.raises(TypeError, match="negative bit"):
        ops.kv_read(Page(minus(page.k), page.v), 0, 4, 16, torch.float32)
    torch.testing.assert_close(ops.attention(minus(q).resolve_neg(), k, v), ops.attention(-q, k, v))
