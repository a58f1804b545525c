"""The `llama` package of meta-llama/llama3, served by us: a stand-in of its public structure, with and without."""

from __future__ import annotations

import copy
import importlib
import io
import json
import pickle
import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llama1m_ext
import original
import stand_in
from conftest import stock
from llama1m_ext.face import Unmade
from llama1m_ext.testing import assert_no_worse, error

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture
def llama(tmp_path, monkeypatch):
    stand_in.write(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    stand_in.forget()
    yield importlib.import_module("llama")
    stand_in.forget()


@pytest.fixture
def build(llama, tmp_path):
    """Builds a model by the package's own function."""

    def made(max_seq_len=256, max_batch_size=4, dtype=torch.float32, params=original.PARAMS):
        folder = tmp_path / "checkpoint"
        made.whole = original.checkpoint(folder, dtype=dtype, params=params)
        return llama.Llama.build(str(folder), str(folder / "tokenizer.model"), max_seq_len, max_batch_size)

    return made


def ids(batch: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 640, (batch, n), generator=torch.Generator().manual_seed(seed))


def in_parts(built, tokens: torch.Tensor, *cuts: int) -> torch.Tensor:
    """Logits of tokens given in several calls."""
    at = [0, *cuts, tokens.shape[1]]
    return torch.cat([built.model.forward(tokens[:, a:b], a) for a, b in zip(at, at[1:], strict=False)], 1)


def served(built, reset: bool = True) -> int:
    counts = llama1m_ext.stats(built, reset=reset)
    assert not counts.stock
    return counts.served


# -- the same numbers --------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200])
def test_logits(build, dtype, n):
    tokens = ids(3, n)
    with stock():
        theirs = build(dtype=dtype).model.forward(tokens, 0)
    built = build(dtype=dtype)
    ours = built.model.forward(tokens, 0)
    assert served(built) == 2
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    assert ours.is_inference() == theirs.is_inference()
    truth = original.reference(build.whole, tokens)
    # Rounding differs, and few numbers decide: 30% beside theirs, and never more than what the dtype gives.
    assert_no_worse(ours, theirs, truth, 1.3)
    assert error(ours, truth) < (2e-6 if dtype == torch.float32 else 2e-2) * truth.std()


@DTYPES
def test_a_conversation_of_several_calls(build, dtype):
    tokens, cuts = ids(2, 90), (30, 31, 32, 70)
    with stock():
        theirs = in_parts(build(dtype=dtype), tokens, *cuts)
    built = build(dtype=dtype)
    ours = in_parts(built, tokens, *cuts)
    assert served(built) == 2 * 5
    assert_no_worse(ours, theirs, original.reference(build.whole, tokens), 1.3)


@pytest.mark.parametrize("kv_heads", [1, 4, None])
def test_groups_of_heads(build, kv_heads):
    params = {**original.PARAMS, "n_kv_heads": kv_heads or 4}
    built = build(params=params)
    tokens = ids(2, 50)
    truth = original.reference(build.whole, tokens, params)
    assert error(in_parts(built, tokens, 20), truth) < 2e-6 * truth.std()
    assert served(built) == 4


def test_layer_after_layer_in_chunks(build):
    built = build(2048, 2)
    llama1m_ext.set_options(built, chunk=130, progress=False)
    tokens = ids(2, 1000)
    ours = built.model.forward(tokens, 0)
    counts = llama1m_ext.stats(built)
    assert counts.layer_major == 1 and counts.served == 2 * 8 and not counts.stock
    truth = original.reference(build.whole, tokens)
    assert error(ours, truth) < 2e-6 * truth.std()
    assert error(built.model.forward(tokens[:, :500], 500), truth[:, 500:]) > 0.1 * truth.std(), "other tokens"


def test_logits_in_parts(build, monkeypatch):
    from llama1m_ext import face

    built, tokens = build(), ids(2, 100)
    whole = built.model.forward(tokens, 0)
    seen = []
    built.model.output.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    monkeypatch.setattr(face, "_ROWS", 2 * 640 * 4 * 33)
    torch.testing.assert_close(built.model.forward(tokens, 0), whole)
    assert seen == [33, 33, 33, 1]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor) and not getattr(function, "is_view", False):
                self.numel = max(self.numel, made.untyped_storage().nbytes() // made.dtype.itemsize)
        return out


def test_9000_tokens_without_anything_that_grows_with_their_square(build):
    n = 9000
    params = {**original.PARAMS, "n_heads": 2, "n_kv_heads": 1}
    with stock(), pytest.raises(AssertionError, match="max_seq_len must be between 1 and 8192, got 10000"):
        build(10_000)
    built = build(10_000, params=params)
    assert built.model.params.max_seq_len == 10_000
    llama1m_ext.set_options(built, chunk=1024, progress=False)
    prompt = ids(1, n)
    with Largest() as largest:
        tokens, _ = built.generate(prompt.tolist(), 8)
    assert largest.numel <= 2 * n * 64, f"expected hidden states and keys [{n}, 64], got {largest.numel} elements"
    counts = llama1m_ext.stats(built)
    assert counts.layer_major == 1 and counts.computed == n + 7 and not counts.stock
    whole = torch.cat([prompt, torch.tensor(tokens)], 1)
    truth = original.reference(build.whole, whole[:, :-1], params, last=8)
    assert torch.equal(truth.argmax(-1), whole[:, -8:])
    logits = built.model.forward(whole[:, n:], n)
    assert error(logits[:, :7], truth[:, 1:]) < 1e-5 * truth.std()
    with stock(), Largest() as largest:
        build(2048).model.forward(ids(1, 512), 0)
    assert largest.numel >= 4 * 512 * 512, "what it looks for in theirs is seen"


def test_nothing_is_made_before_it_is_needed(build):
    with Largest() as largest:
        built = build(1_000_000, 8)
    assert largest.numel <= 640 * 64
    attention = built.model.layers[1].attention
    assert isinstance(attention.cache_k, Unmade) and isinstance(built.model.freqs_cis, Unmade)
    assert attention.cache_k.shape == (8, 1_000_000, 2, 16)
    assert built.model.freqs_cis.shape == (2_000_000, 8)
    assert built.model.params.max_seq_len == 1_000_000


def test_compact_keys_and_values(build):
    built, tokens = build(2048), ids(1, 600)
    llama1m_ext.set_options(built, kv="int8")
    in_parts(built, tokens, 500)
    logits = in_parts(built, tokens, 500, *range(501, 600))
    truth = original.reference(build.whole, tokens)
    assert built.model._llama1m_face.cache.format.name == "int8"
    assert 1e-4 < error(logits[:, 500:], truth[:, 500:]) / truth.std() < 0.05, "not exact, and near"


# -- generation --------------------------------------------------------------------------------------------------------

PROMPTS = [ids(1, n, n)[0].tolist() for n in (40, 25, 33)]


@pytest.mark.parametrize("options", [{}, {"logprobs": True}, {"echo": True}, {"logprobs": True, "echo": True}])
@pytest.mark.parametrize("prompts, n", [(PROMPTS, 20), (PROMPTS[:1], 20), (PROMPTS[:1], 0), (PROMPTS, 1000)])
def test_generate(build, options, prompts, n):
    with stock():
        theirs, their_logprobs = build(64).generate(prompts, n, **options)
    built = build(64)
    ours, logprobs = built.generate(prompts, n, **options)
    assert ours == theirs
    assert served(built) > 0
    if their_logprobs is None:
        assert logprobs is None
    else:
        for ours_of, theirs_of in zip(logprobs, their_logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(ours_of), torch.tensor(theirs_of), rtol=1e-4, atol=1e-4)


def test_only_generate_gets_the_last_position(build):
    built = build()
    seen = []
    inner = built.model.output.forward
    built.model.output.forward = lambda x: seen.append(x.shape[1]) or inner(x)
    built.generate(PROMPTS, 5)
    assert set(seen) == {1}
    seen.clear()
    built.generate(PROMPTS, 5, logprobs=True)
    assert seen[0] == 25
    assert built.model.forward(ids(1, 30), 0).shape == (1, 30, 640)
    with pytest.raises(AssertionError):
        built.generate([[1] * 1000], 5)
    assert built.model.forward(ids(1, 30), 0).shape == (1, 30, 640), "also after an error"


# -- calls in any order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 1])
def test_back_to_an_earlier_position(build, rows):
    tokens, other = ids(2, 60), ids(rows, 30, 1)
    results = []
    for patched in (False, True):
        with stock():
            if patched:
                llama1m_ext.enable()
            built = build()
            built.model.forward(tokens, 0)
            results.append(built.model.forward(other, 25))
            if patched:
                assert served(built) == 4
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    assert results[0].shape[0] == rows


def test_what_can_not_be_right_is_an_error(build):
    built = build(64, 2)
    with pytest.raises(ValueError, match="start_pos: expected at most 0, the tokens so far, got 3"):
        built.model.forward(ids(1, 5), 3)
    built.model.forward(ids(1, 10), 0)
    for tokens, at, message in (
        (ids(1, 5), 11, "start_pos: expected at most 10, the tokens so far, got 11"),
        (ids(2, 5), 10, "tokens: expected at most 1 rows, as before start_pos=10, got 2"),
        (ids(3, 5), 0, "tokens: expected at most max_batch_size=2 rows, got 3"),
        (ids(1, 55), 10, "tokens: expected at most max_seq_len=64, got 55 from start_pos=10 on"),
        (ids(1, 5), -1, "expected at most max_seq_len=64"),
    ):
        with pytest.raises(ValueError, match=message):
            built.model.forward(tokens, at)
    truth = original.reference(build.whole, torch.cat([ids(1, 10), ids(1, 54, 2)], 1))[:, 10:]
    assert error(built.model.forward(ids(1, 54, 2), 10), truth) < 1e-5 * truth.std(), "and nothing is lost"


def test_switched_off_and_on_in_the_middle(build):
    tokens = ids(2, 80)
    built = build()
    truth = original.reference(build.whole, tokens)
    parts = [built.model.forward(tokens[:, :30], 0)]
    with stock():
        parts.append(built.model.forward(tokens[:, 30:50], 30))
        assert built.model.layers[0].attention.cache_k.shape == (4, 256, 2, 16)
        parts.append(built.model.forward(tokens[:, 50:51], 50))
    parts.append(built.model.forward(tokens[:, 51:70], 51))
    assert isinstance(built.model.layers[0].attention.cache_k, Unmade), "its memory is given back"
    parts.append(built.model.forward(tokens[:, 70:], 70))
    assert served(built) == 2 * 3
    assert error(torch.cat(parts, 1), truth) < 1e-5 * truth.std()


def test_a_model_that_was_there_before(llama, build):
    tokens = ids(2, 60)
    with stock():
        built = build()
        first = built.model.forward(tokens[:, :30], 0)
    ours = torch.cat([first, built.model.forward(tokens[:, 30:], 30)], 1)
    truth = original.reference(build.whole, tokens)
    assert error(ours, truth) < 1e-5 * truth.std()
    assert served(built) == 2
    with stock():
        built.model.forward(ids(2, 60, 3), 0)
    ours = in_parts(built, tokens, 30)  # what theirs left in its buffers is not looked at
    assert error(ours, truth) < 1e-5 * truth.std()


def test_theirs_fails_on_the_way(llama, build, monkeypatch):
    tokens = ids(2, 60)
    built = build()
    built.model.forward(tokens[:, :30], 0)
    theirs = llama.model.Attention.forward

    def fails(self, *args):
        if self is built.model.layers[1].attention:
            raise RuntimeError("in layer 1")
        return theirs(self, *args)

    with stock(), monkeypatch.context() as m:
        m.setattr(llama.model.Attention, "forward", fails)
        with pytest.raises(RuntimeError, match="in layer 1"):
            built.model.forward(tokens[:, 30:], 30)
    truth = original.reference(build.whole, tokens)
    assert error(built.model.forward(tokens[:, 30:], 30), truth[:, 30:]) < 1e-5 * truth.std()


def test_with_other_defaults_of_torch(build):
    """Theirs makes CUDA the default device, and bfloat16 the default dtype, and leaves them so."""
    built, tokens = build(2048), ids(2, 600)
    truth = original.reference(build.whole, tokens)
    before = torch.get_default_dtype()
    for chunk in ("auto", 100):
        for name in ("_llama1m_face", "_llama1m_freqs_cis"):
            built.model.__dict__.pop(name, None)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):  # whatever is made without saying where can't be computed with
                llama1m_ext.set_options(built, chunk=chunk, progress=False)
                ours = in_parts(built, tokens, 500, 501)
        finally:
            torch.set_default_dtype(before)
        assert error(ours, truth) < 1e-5 * truth.std()
    assert llama1m_ext.stats(built).layer_major == 1


# -- the patch ---------------------------------------------------------------------------------------------------------

ENTRIES = [("model", "Transformer", "__init__"), ("model", "Transformer", "forward")]
ENTRIES += [("generation", "Llama", "build"), ("generation", "Llama", "generate")]


def attributes() -> list[object]:
    return [getattr(sys.modules[f"llama.{m}"], owner).__dict__[name] for m, owner, name in ENTRIES]


def test_disable_puts_everything_back(llama):
    during = attributes()
    with stock():
        before = attributes()
        assert not any(a is b for a, b in zip(before, during, strict=False))
    assert not any(a is b for a, b in zip(before, attributes(), strict=False))
    with stock():
        assert all(a is b for a, b in zip(before, attributes(), strict=False))


FIRST = """
import sys
sys.path.insert(0, {folder!r})
import llama, llama1m_ext
assert llama.model.Transformer.forward.__wrapped__ and llama.Llama.build.__wrapped__ and llama.Llama.generate.__wrapped__
assert "transformers" not in sys.modules
"""


def test_imported_before_us(tmp_path, run_python):
    stand_in.write(tmp_path)
    run_python(FIRST.format(folder=str(tmp_path)))


OTHERS = {
    "other arguments": ("freqs_cis, mask", "mask, freqs_cis"),
    "other fields": ("max_batch_size", "rows"),
    "another table": ("(dim, end, theta=", "(dim, theta, end=1, more="),
    "an argument more": ("(self, tokens, start_pos)", "(self, tokens, start_pos, images=None)"),
    "somebody's Attention": (
        "\n    def forward(self, x, start_pos",
        "\n    forward = len\n    def f(self, x, start_pos",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_of_that_name_is_left_alone(tmp_path, monkeypatch, name):
    assert OTHERS[name][0] in stand_in.MODEL
    stand_in.write(tmp_path, stand_in.MODEL.replace(*OTHERS[name]))
    monkeypatch.syspath_prepend(str(tmp_path))
    stand_in.forget()
    importlib.import_module("llama")
    for function in attributes():
        function = getattr(function, "__func__", function)
        assert "llama1m_ext" not in function.__code__.co_filename, function
    stand_in.forget()


@pytest.mark.parametrize("model", [None, "class Transformer:\n    def forward(self, tokens, start_pos): return 1"])
@pytest.mark.parametrize(
    "generation",
    ["x = 1", "class Llama: pass", "class Llama:\n    @staticmethod\n    def build(a, b, max_seq_len, d): return 1"],
)
def test_another_package_of_that_name_is_left_alone(tmp_path, monkeypatch, generation, model):
    stand_in.write(tmp_path, model or "", generation, "from . import generation" + (", model" if model else ""))
    if model is None:
        (tmp_path / "llama" / "model.py").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    stand_in.forget()
    package = importlib.import_module("llama")
    for kind in (
        getattr(package.generation, "Llama", None),
        getattr(getattr(package, "model", None), "Transformer", None),
    ):
        for value in vars(kind).values() if kind else ():
            assert not hasattr(getattr(value, "__func__", value), "__wrapped__")
    assert llama1m_ext.patch.is_enabled()
    with pytest.raises(TypeError, match="expected a Llama"):
        llama1m_ext.stats(torch.nn.Linear(2, 2))
    stand_in.forget()


def test_another_package_makes_us_import_nothing(tmp_path, run_python):
    stand_in.write(tmp_path, "class Transformer: pass", "class Llama: pass", "from . import generation, model")
    run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import llama1m_ext, llama\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )


# -- options, and what is not served -----------------------------------------------------------------------------------


def test_options_and_stats(build):
    built = build()
    assert llama1m_ext.set_options(built.model, chunk=77).chunk == 77
    assert llama1m_ext.options(built).chunk == 77
    assert llama1m_ext.stats(built.model) == llama1m_ext.Stats()
    built.model.forward(ids(1, 20), 0)
    assert llama1m_ext.stats(built).computed == 20
    with pytest.raises(TypeError, match="expected a Llama"):
        llama1m_ext.stats(torch.nn.Linear(2, 2))
    other = build()
    assert llama1m_ext.options(other).chunk == "auto"


def test_a_model_in_parts_takes_the_same_chunks_on_all_ranks(build, monkeypatch):
    """Whatever is free on each: `torchrun check_real_llama.py` runs the real thing. Here a rank is told that it has half of
    the heads."""
    from llama1m_ext import memory

    built = build(4096)
    built.model.forward(ids(1, 3000), 0)
    assert llama1m_ext.stats(built, reset=True).served == 2 * 1
    built.model.params.n_heads *= 2
    monkeypatch.setattr(memory, "CHUNK_BYTES", 2_000_000)
    for free in (1 << 20, 1 << 40):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        built.model.forward(ids(1, 3000), 0)
        assert llama1m_ext.stats(built, reset=True).served == 2 * -(-3000 // 512), free
    assert llama1m_ext.options(built).chunk == "auto"
    for name in ("checkpoint", "remember"):
        llama1m_ext.set_options(built, **{name: "folder"})
        with pytest.raises(ValueError, match=f"{name}: expected None for a model in parts, got 'folder'"):
            built.model.forward(ids(1, 5), 0)
        llama1m_ext.set_options(built, **{name: None})


def test_a_prompt_is_remembered_and_a_killed_prefill_goes_on(build, tmp_path, monkeypatch):
    from llama1m_ext import prefill

    prompt = ids(1, 900)[0].tolist()
    built = build(2048)
    expected, _ = built.generate([prompt], 10)
    llama1m_ext.set_options(
        built, chunk=300, progress=False, checkpoint=str(tmp_path / "c"), remember=str(tmp_path / "r")
    )
    layer, calls = prefill._layer, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return layer(*args)

    monkeypatch.setattr(prefill, "_layer", fails)
    with pytest.raises(KeyboardInterrupt):
        built.generate([prompt], 10)
    llama1m_ext.stats(built, reset=True)
    assert built.generate([prompt], 10)[0] == expected
    # The first layer's 3 chunks were on the disk, or were not worth writing: that is a matter of time.
    assert llama1m_ext.stats(built).served in (1 + 2 * 9, 3 + 1 + 2 * 9)
    for _ in range(2):
        other = build(2048)
        llama1m_ext.remember(other, tmp_path / "r")
        assert other.generate([prompt], 10)[0] == expected
        assert llama1m_ext.stats(other).reused >= 800


def check_stock(built, whole, reason: str) -> None:
    tokens = ids(2, 40)
    with pytest.warns(UserWarning, match=reason):
        logits = built.model.forward(tokens[:, :30], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        logits = torch.cat([logits, built.model.forward(tokens[:, 30:], 30)], 1)
    truth = original.reference(whole, tokens)
    assert error(logits, truth) < 1e-5 * truth.std()
    counts = llama1m_ext.stats(built)
    assert counts.served == 0 and sum(counts.stock.values()) == 4 and reason in next(iter(counts.stock))


def test_hooks_are_called(build):
    built, seen = build(), []
    built.model.layers[1].attention.register_forward_hook(lambda *args: seen.append(1))
    check_stock(built, build.whole, "a hook on a Attention")
    assert len(seen) == 2


@pytest.mark.parametrize("early", [False, True])
def test_other_projections_win(llama, build, early):
    """Three in one, with a forward of its own."""
    built = build()
    if early:
        built.model.forward(ids(1, 9), 0)
        llama1m_ext.stats(built, reset=True)
    part = built.model.layers[1].feed_forward
    part.both = part.w1
    del part.w1
    type(part).w1 = property(lambda self: self.both)
    try:
        tokens = ids(2, 40)
        with pytest.warns(UserWarning, match="a FeedForward without w1"):
            logits = built.model.forward(tokens, 0)
        truth = original.reference(build.whole, tokens)
        assert error(logits, truth) < 1e-5 * truth.std()
    finally:
        del type(part).w1


def test_hooks_on_projections_are_called_on_our_path(build):
    built, seen = build(), []
    for module in (built.model.layers[1].attention.wq, built.model.layers[0].feed_forward.w2, built.model.norm):
        module.register_forward_hook(lambda *args: seen.append(1))
    built.model.forward(ids(1, 20), 0)
    assert len(seen) == 3 and served(built) == 2


@pytest.mark.parametrize("owner", ["Attention", "TransformerBlock", "FeedForward"])
def test_somebody_elses_forward_wins(llama, build, monkeypatch, owner):
    built, seen = build(), []
    kind = getattr(llama.model, owner)
    theirs = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: seen.append(1) or theirs(self, *args))
    check_stock(built, build.whole, f"the forward of a {owner} was replaced")
    assert len(seen) == 4


def test_other_frequencies_win(llama, build):
    built, tokens = build(), ids(1, 40)
    built.model.forward(tokens, 0)
    built.model.freqs_cis = llama.model.precompute_freqs_cis(16, 512, 10_000.0)
    with pytest.warns(UserWarning, match=r"freqs_cis is not that of rope_theta=500000\.0"):
        logits = built.model.forward(tokens, 0)
    truth = original.reference(build.whole, tokens, {**original.PARAMS, "rope_theta": 10_000.0})
    assert error(logits, truth) < 1e-5 * truth.std()


def test_float64_is_theirs(build):
    built, tokens = build(), ids(1, 40)
    built.model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = built.model.forward(tokens, 0)
    truth = original.reference(build.whole, tokens)
    assert error(logits, truth) < 1e-6
    assert list(llama1m_ext.stats(built).stock) == ["dtype torch.float64"]


def test_weights_are_the_models_own(build):
    built, tokens = build(), ids(1, 40)
    names = list(built.model.state_dict())
    first = built.model.forward(tokens, 0)
    assert list(built.model.state_dict()) == names == list(build.whole)
    assert len(list(built.model.modules())) == len(list(build().model.modules()))
    with torch.no_grad():
        built.model.layers[0].attention.wq.weight.mul_(0.5)
    changed = built.model.forward(tokens, 0)
    assert error(changed, first) > 0.01
    build.whole["layers.0.attention.wq.weight"] *= 0.5
    truth = original.reference(build.whole, tokens)
    assert error(changed, truth) < 1e-5 * truth.std()
    built.model.to(torch.bfloat16)
    assert built.model.forward(tokens, 0).dtype == torch.float32


class Lora(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.delta = inner, 0.1 * torch.ones_like(inner.weight)

    def forward(self, x):
        return self.inner(x) + torch.nn.functional.linear(x, self.delta)


def test_modules_put_there_later(build):
    """As adapters and quantisers do it."""
    built, tokens = build(), ids(1, 40)
    before = built.model.forward(tokens, 0)
    for part in ("attention", "feed_forward"):
        for name in ("wq", "wk", "wv", "wo") if part == "attention" else ("w1", "w2", "w3"):
            module = getattr(built.model.layers[1], part)
            setattr(module, name, Lora(getattr(module, name)))
            build.whole[f"layers.1.{part}.{name}.weight"] += 0.1
            truth = original.reference(build.whole, tokens)
            after = built.model.forward(tokens, 0)
            assert error(after, truth) < 1e-5 * truth.std(), name
            assert error(after, before) > 1e-4 * truth.std(), name
            before = after
    del built.model.layers[1]
    truth = original.reference(build.whole, tokens, {**original.PARAMS, "n_layers": 1})
    assert error(built.model.forward(tokens, 0), truth) < 1e-5 * truth.std()
    assert served(built) > 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(build, how):
    built, tokens = build(), ids(1, 60)
    built.model.forward(tokens[:, :30], 0)
    if how == "deepcopy":
        other = copy.deepcopy(built.model)
    else:
        file = io.BytesIO()
        pickle.dump(built.model, file)
        other = pickle.loads(file.getvalue())
    truth = original.reference(build.whole, tokens)
    for model in (other, built.model):  # neither writes into the other's pages
        assert error(model.forward(tokens[:, 30:], 30), truth[:, 30:]) < 1e-5 * truth.std()
    with torch.no_grad():
        other.output.weight.zero_()
    assert not other.forward(tokens, 0).any() and built.model.forward(tokens, 0).any()


def test_a_converted_model_gives_the_same(build, tmp_path):
    """Both ways to use an original checkpoint agree."""
    from transformers import AutoModelForCausalLM

    from llama1m_ext.convert import convert

    built, tokens = build(), ids(2, 50)
    convert(tmp_path / "checkpoint", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(built.model.forward(tokens, 0), model(tokens).logits, rtol=1e-5, atol=1e-4)
    assert json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))["rope_theta"] == 500000.0
