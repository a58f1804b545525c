"""The laws of theta against what was published, and `extend` against models that transformers makes from such a config."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import llama1m_ext
from conftest import stock
from llama1m_ext import extend, rope, testing
from llama1m_ext._compat import V5, read_rope
from llama1m_ext.extension import RECORD, extended
from llama1m_ext.rope import theta_for
from llama1m_ext.theta import CARD_LENGTHS, LAWS, Stage, covered, schedule, slow_pairs

PUBLISHED = {
    # The card says 15.3M, 207.1M, 1.06B, 2.80B; the configs of 262K and 1048K say it to the last digit.
    "gradient-v1": [15_296_098, 207_112_184, 1_062_356_830, 2_804_339_835],
    # Configs of the later releases: 262K, 1048K (and 45.2B for 4194K).
    "critical-base": [22_443_169, 283_461_213, 1_007_391_702, 3_580_165_449],
}


# -- laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_published_thetas_to_the_last_digit(method):
    assert [theta_for(n, method=method) for n in CARD_LENGTHS] == PUBLISHED[method]
    assert schedule(method) == [Stage(n, t) for n, t in zip(CARD_LENGTHS, PUBLISHED[method], strict=True)]


def test_other_published_thetas():
    of_llama_2 = {"method": "critical-base", "theta": 1e4, "original_max_len": 4096}  # AMD's Instella-Long
    assert theta_for(65_536, **of_llama_2) == 514_640
    assert theta_for(262_144, **of_llama_2) == 3_691_949
    assert theta_for(4_194_304, method="critical-base") == 45_218_125_209  # Llama-3-8B-Instruct-Gradient-4194k
    # bloc97's own example: 8 times as far for a head_dim of 128.
    assert theta_for(16_384, method="ntk", theta=10_000, original_max_len=2048) == int(10_000 * 8 ** (128 / 126))


def test_dynamic_is_what_transformers_rotates_by():
    length, factor = 1000, 4.0
    config = testing.tiny_config(
        max_position_embeddings=128,
        head_dim=128,
        rope_theta=5e5,
        **{
            "rope_parameters" if V5 else "rope_scaling": {
                "rope_type": "dynamic",
                "factor": factor,
                **({"rope_theta": 5e5} if V5 else {}),
            }
        },
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), position_ids=torch.arange(length)[None])
    made = theta_for(length, method="dynamic", original_max_len=128, factor=factor)
    want = [made ** (-2 * i / 128) for i in range(64)]
    torch.testing.assert_close(rotary.inv_freq, torch.tensor(want), rtol=1e-5, atol=0)
    assert theta_for(length, method="dynamic", original_max_len=128, factor=1) == theta_for(
        length, method="ntk", original_max_len=128
    )


LENGTHS = st.integers(8192, 1 << 22)


@settings(max_examples=100, deadline=None)
@given(
    method=st.sampled_from(sorted(LAWS)),
    a=LENGTHS,
    b=LENGTHS,
    theta=st.sampled_from([1e4, 5e5, 1e6]),
    head_dim=st.sampled_from([16, 64, 128]),
)
def test_theta_grows_with_the_length(method, a, b, theta, head_dim):
    a, b = sorted((a, b))
    first, second = (theta_for(n, method=method, theta=theta, head_dim=head_dim) for n in (a, b))
    assert theta <= first <= second
    if b - a > 8192:
        assert first < second


@pytest.mark.parametrize("method", sorted(LAWS))
def test_the_original_length_has_the_original_theta(method):
    for theta, n, head_dim in itertools.product((1e4, 5e5), (8, 512, 8192), (4, 64, 128)):
        assert theta_for(n, method=method, theta=theta, original_max_len=n, head_dim=head_dim) == theta


@settings(max_examples=100, deadline=None)
@given(method=st.sampled_from(["ntk", "critical-base"]), a=LENGTHS, b=LENGTHS)
def test_two_steps_are_one(method, a, b):
    """Of the laws that are powers; truncation in between costs one unit of the first theta."""
    a, b = sorted((a, b))
    between = theta_for(a, method=method)
    composed = theta_for(b, method=method, theta=between, original_max_len=a)
    assert math.isclose(composed, theta_for(b, method=method), rel_tol=4 / between)


def test_the_card_s_steps():
    """Each stage of gradient-v1 from the one that the card started from: the same whole numbers."""
    first, second, third, last = PUBLISHED["gradient-v1"]

    def step(length, theta, at):
        return theta_for(length, method="gradient-v1", theta=theta, original_max_len=at)

    assert step(262_144, first, 65_536) == second
    assert [step(n, second, 262_144) for n in (524_288, 1_048_576)] == [third, last]
    assert step(1_048_576, third, 524_288) > 1.9 * last  # which is why extend starts from the original
    for anchor in (65_536, 262_144):  # no jump where a step begins
        around = [theta_for(anchor + i, method="gradient-v1") for i in (-1, 0, 1)]
        assert around[0] < around[1] < around[2] < 1.0001 * around[0]
    assert theta_for(2_097_152, method="gradient-v1") == step(2_097_152, second, 262_144)


def test_pairs_that_do_not_turn_once():
    """The laws that were used keep their number; NTK loses some."""
    assert slow_pairs(500_000, 8192) == 29
    assert [slow_pairs(s.theta, s.length) for s in schedule("critical-base")] == [29] * 4
    assert all(slow_pairs(s.theta, s.length) in (28, 29) for s in schedule("gradient-v1"))
    assert [slow_pairs(s.theta, s.length) for s in schedule("ntk")] == [25, 23, 22, 21]


def test_how_far_a_theta_reaches():
    assert [covered(t) for t in PUBLISHED["gradient-v1"]] == [53_145, 220_821, 539_736, 917_524]
    for n, t in zip(CARD_LENGTHS, PUBLISHED["critical-base"], strict=True):
        assert math.isclose(covered(t), n, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"method": "ntk-aware"},
            ValueError,
            "method: expected one of ntk, dynamic, gradient-v1, critical-base; got 'ntk-aware'",
        ),
        ({"method": None}, ValueError, "got None"),
        ({"method": "yarn"}, ValueError, 'llama1m_ext.extend(model, length, method="yarn")'),
        ({"length": 8191}, ValueError, "length: expected at least original_max_len=8192, got 8191"),
        ({"length": 65536.5}, TypeError, "length: expected a whole number, got 65536.5"),
        ({"length": True}, TypeError, "got True"),
        ({"length": "64K"}, TypeError, "got '64K'"),
        ({"theta": 1.0}, ValueError, "theta: expected more than 1, got 1"),
        ({"theta": float("nan")}, ValueError, "theta: expected a finite number, got nan"),
        ({"theta": "5e5"}, TypeError, "theta: expected a number, got '5e5'"),
        ({"original_max_len": 7}, ValueError, "original_max_len: expected at least 8 tokens, got 7"),
        ({"head_dim": 2}, ValueError, "head_dim: expected an even number from 4 on, got 2"),
        ({"head_dim": 127}, ValueError, "got 127"),
        ({"method": "dynamic", "factor": 0.5}, ValueError, "factor: expected at least 1, got 0.5"),
        ({"factor": 2}, ValueError, "factor: expected the method \"dynamic\" with it, got 'ntk'"),
        ({"length": 10**400}, ValueError, "length: expected one that ntk has a theta for"),
    ],
)
def test_wrong_arguments_of_a_law(changes, error, words):
    with pytest.raises(error) as raised:
        theta_for(**{"length": 65_536, "method": "ntk", **changes})
    assert words in str(raised.value)


def test_schedules_grow():
    for lengths in ([65_536, 65_536], [65_536, 16_384]):
        with pytest.raises(ValueError, match=f"longer than the one before, got {lengths[1]} after 65536"):
            schedule("ntk", lengths)
    with pytest.raises(ValueError, match="at least one"):
        schedule("ntk", [])


def test_a_theta_needs_no_transformers(run_python):
    run_python(
        "import sys, llama1m_ext; from llama1m_ext.theta import theta_for; assert 'torch' not in sys.modules\n"
        "assert llama1m_ext.rope.theta_for(65536, method='gradient-v1') == 15296098\n"
        "assert 'transformers' not in sys.modules"
    )


# -- extend ---------------------------------------------------------------------------------------------------------------

LONG = 1_048_576


def short_model(**changes):
    return testing.tiny_model(**{"max_position_embeddings": 8192, **changes})


def logits(model, ids=None):
    with torch.no_grad():
        return model(testing.random_ids(1, 200) if ids is None else ids).logits


def same_everywhere(model):
    """The model's logits on our path and on stock's, close to each other."""
    ours = logits(model)
    with stock():
        theirs = logits(model)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    return ours


def from_config(model):
    """transformers' own model of that config, with these weights: what its rotation should be."""
    made = type(model)(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("method", [*LAWS, "yarn", None])
def test_extend_is_what_transformers_makes_of_the_config(method):
    model = short_model(head_dim=128)
    before = same_everywhere(model)
    did = extend(model, LONG, method=method)
    after = same_everywhere(model)
    assert (after - before).abs().max() > 0.01
    assert torch.equal(after, logits(from_config(model)))
    want = 500_000 if method == "yarn" else theta_for(LONG, method=method or "critical-base")
    assert (did.method, did.max_len, did.theta) == (method or "critical-base", LONG, want)
    assert (did.old_max_len, did.old_theta, did.original_max_len, did.original_theta) == (8192, 5e5, 8192, 5e5)
    assert read_rope(model.config)["rope_theta"] == want == model.config.rope_theta
    assert model.config.max_position_embeddings == LONG
    assert llama1m_ext.stats(model).served and not llama1m_ext.stats(model).stock
    assert f"8192 -> {LONG} tokens" in str(did)


@pytest.mark.parametrize("save", [False, True])
def test_stages_start_from_the_original(save, tmp_path):
    model = short_model(head_dim=128)
    for n, theta in zip(CARD_LENGTHS, PUBLISHED["gradient-v1"], strict=True):
        assert extend(model, n, method="gradient-v1").theta == theta
        if save:
            model.save_pretrained(tmp_path)
            model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert extend(model, 65_536, method="yarn").theta == 5e5
    assert extend(model, 65_536).theta == 22_443_169
    back = extend(model, 8192)
    assert (back.theta, back.rope_type, back.old_theta) == (5e5, "default", 22_443_169)
    assert torch.equal(logits(model), logits(short_model(head_dim=128)))


def test_a_config_that_was_changed_since_counts_as_the_original():
    model = short_model(head_dim=128)
    extend(model, 65_536)
    model.config.max_position_embeddings = 131_072
    did = extend(model, 262_144)
    assert (did.original_max_len, did.original_theta) == (131_072, 22_443_169)
    assert did.theta == theta_for(262_144, method="critical-base", theta=22_443_169, original_max_len=131_072)


def test_original_values_may_be_said():
    model = testing.tiny_model(head_dim=128)  # says a million, whatever it was trained for
    did = extend(model, 65_536, method="gradient-v1", original_max_len=8192, original_theta=5e5)
    assert did.theta == 15_296_098
    assert extend(model, 262_144, method="gradient-v1").theta == 207_112_184


def test_yarn_of_the_paper():
    model = short_model(head_dim=128)
    did = extend(model, 128 * 8192, method="yarn")
    assert math.isclose(did.attention_factor, 0.1 * math.log(128) + 1) and did.factor == 128
    plain = [5e5 ** (-2 * i / 128) for i in range(64)]
    got = model.model.rotary_emb.inv_freq.double()
    for i, f in enumerate(plain):
        turns = 8192 * f / (2 * math.pi)
        if turns > 40:  # fast ones stay, slow ones are interpolated, and between them it goes from one to the other
            assert math.isclose(got[i], f, rel_tol=1e-6)
        elif turns < 0.9:
            assert math.isclose(got[i], f / 128, rel_tol=1e-6)
        else:
            assert f / 128 * 0.999 < got[i] < f * 1.001
    assert all(a > b for a, b in itertools.pairwise(got.tolist()))
    q = torch.ones(1, 1, 4, 128)
    positions = torch.tensor([[0, 5, 8191, 1_000_000]])
    tables = model.model.rotary_emb(q, position_ids=positions)
    assert math.isclose(tables[0][0, 0, 0], did.attention_factor, rel_tol=1e-6)
    found, scaling = rope.frequencies(model.model.rotary_emb, positions)
    assert torch.equal(found, got) and scaling == did.attention_factor


def llama3(**changes):
    words = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    more = {"rope_parameters": {**words, "rope_theta": 5e5}} if V5 else {"rope_scaling": words}
    return testing.tiny_model(max_position_embeddings=131_072, rope_theta=5e5, **more, **changes)


def test_llama_3_1():
    model = llama3()
    with pytest.raises(ValueError) as raised:
        extend(model, LONG)
    assert "critical-base: expected a model of rope_type default" in str(raised.value)
    assert "'llama3'" in str(raised.value) and 'theta=... and method="yarn"' in str(raised.value)
    did = extend(model, LONG, theta=2e7)
    assert (did.method, did.theta, did.rope_type) == ("theta", 2e7, "llama3")
    assert torch.equal(same_everywhere(model), logits(from_config(model)))
    did = extend(model, LONG, method="yarn")
    assert (did.factor, did.theta, did.original_max_len, did.rope_type) == (128, 5e5, 131_072, "yarn")
    words = read_rope(model.config)
    assert (words["beta_fast"], words["beta_slow"], words["original_max_position_embeddings"]) == (4, 1, 8192)
    assert torch.equal(same_everywhere(model), logits(from_config(model)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear"])
def test_rotations_that_are_refused(kind):
    words = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        words |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 2048}
    more = {"rope_parameters": {**words, "rope_theta": 5e5}} if V5 else {"rope_scaling": words}
    model = short_model(**more)
    before = copy.deepcopy(vars(model.config))
    for how in ({"method": "ntk"}, {"method": "yarn"}, {"theta": 1e8}):
        if kind == "linear" and "theta" in how:
            assert extend(model, LONG, **how).rope_type == "linear"
            assert torch.equal(same_everywhere(model), logits(from_config(model)))
            continue
        with pytest.raises(ValueError, match=f"expected a model of rope_type .*{kind}"):
            extend(model, LONG, **how)
        assert vars(model.config) == before


@pytest.mark.parametrize(
    ("max_len", "how", "error", "words"),
    [
        (8191, {}, ValueError, "max_len: expected at least the 8192 tokens that the model had originally, got 8191"),
        (
            LONG,
            {"method": "linear"},
            ValueError,
            "method: expected one of ntk, dynamic, gradient-v1, critical-base, yarn; got 'linear'",
        ),
        (
            LONG,
            {"method": "ntk", "theta": 1e6},
            ValueError,
            "expected a method or a theta, got method='ntk' and theta=1000000.0",
        ),
        (LONG, {"theta": 0.5}, ValueError, "theta: expected more than 1, got 0.5"),
        (LONG, {"theta": "many"}, TypeError, "theta: expected a number, got 'many'"),
        (LONG, {"original_theta": -1}, ValueError, "original_theta: expected more than 1, got -1"),
        (LONG, {"original_max_len": 0}, ValueError, "original_max_len: expected a number of tokens, got 0"),
        (1e6, {}, TypeError, "max_len: expected a whole number, got 1000000.0"),
        (LONG, {"factor": 2}, ValueError, 'factor: expected the method "dynamic"'),
    ],
)
def test_wrong_arguments_of_extend(max_len, how, error, words):
    model = short_model()
    before, inv_freq = copy.deepcopy(vars(model.config)), model.model.rotary_emb.inv_freq
    with pytest.raises(error) as raised:
        extend(model, max_len, **how)
    assert words in str(raised.value)
    assert vars(model.config) == before and model.model.rotary_emb.inv_freq is inv_freq


def test_what_is_no_model():
    for thing in (torch.nn.Linear(2, 2), object(), None, "meta-llama/Meta-Llama-3-8B"):
        with pytest.raises(TypeError, match="model: expected a model of transformers of one of these families: llama"):
            extend(thing, LONG)
    model = short_model()
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(TypeError, match="expected transformers' LlamaRotaryEmbedding in it, got Identity"):
        extend(model, LONG)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_other_families(family):
    kind = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}[family]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, rope_theta=1e6, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    before = logits(model)
    did = extend(model, 65_536)
    assert did.theta == theta_for(65_536, method="critical-base", theta=1e6, original_max_len=4096, head_dim=16)
    after = logits(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(from_config(model)))
    extend(model, 65_536, method="yarn")
    assert torch.equal(logits(model), logits(from_config(model)))


def test_wrapped_models(tmp_path):
    peft = pytest.importorskip("peft")
    want = logits(from_config_extended())
    model = short_model()
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=testing.tiny_tokenizer())
    extend(pipeline, LONG)
    assert torch.equal(logits(model), want)
    model = short_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    extend(wrapped, LONG)
    assert torch.equal(logits(wrapped), want)
    assert wrapped.config.max_position_embeddings == LONG
    model = short_model()
    model.model.config = copy.deepcopy(model.config)  # wrappers may have copies
    extend(model, LONG)
    assert model.config.max_position_embeddings == model.model.config.max_position_embeddings == LONG
    assert torch.equal(logits(model), want)


def from_config_extended():
    model = short_model()
    extend(model, LONG)
    return from_config(model)


def test_cast_models_and_hooks_of_accelerate():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    want = logits(from_config_extended().to(torch.bfloat16))
    model, hook = short_model().to(torch.bfloat16), Count()  # rounds inv_freq too
    add_hook_to_module(model.model.rotary_emb, hook)
    extend(model, LONG)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(logits(model), want)
    with stock():
        logits(model)
    assert hook.calls


def test_frequencies_that_accelerate_has_put_elsewhere():
    from accelerate import cpu_offload

    model = short_model()
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    if model.model.rotary_emb.inv_freq.device.type == "meta":
        with pytest.raises(ValueError, match="expected rotary frequencies in memory"):
            extend(model, LONG)
    else:
        extend(model, LONG)
        assert torch.equal(logits(model), logits(from_config_extended()))
    model = short_model()
    cpu_offload(model, torch.device("cpu"))
    extend(model, LONG)
    assert torch.equal(logits(model), logits(from_config_extended()))


def test_a_compiled_model_rotates_anew():
    model = short_model()
    compiled = torch.compile(model, backend="eager")
    with stock():
        logits(compiled)
        extend(compiled, LONG)
        torch.testing.assert_close(logits(compiled), logits(from_config_extended()), rtol=1e-4, atol=1e-4)


def test_extended_puts_everything_back():
    model = short_model()
    extend(model, 65_536)
    rotary, before = model.model.rotary_emb, logits(model)
    words, config, buffers = dict(vars(rotary)), copy.deepcopy(vars(model.config)), dict(rotary._buffers)
    for how in ({"method": "yarn"}, {"theta": 1e7}, {}):
        with extended(model, LONG, **how) as did:
            assert did.max_len == model.config.max_position_embeddings == LONG
            assert not torch.equal(logits(model), before)
        assert vars(model.config) == config
        assert torch.equal(logits(model), before)
    with pytest.raises(KeyboardInterrupt), extended(model, LONG):
        raise KeyboardInterrupt
    with pytest.raises(ValueError), extended(model, 1):
        pass
    assert vars(model.config) == config
    assert all(rotary._buffers[name] is tensor for name, tensor in buffers.items())
    public = [name for name in words if not name.startswith("_")]
    assert all(getattr(rotary, name) is words[name] for name in public)


def test_a_prompt_after_another_rotation_is_computed_anew(tmp_path):
    """What `remember` keeps belongs to the rotation that it was made with."""
    model = short_model()
    llama1m_ext.remember(model, tmp_path)
    ids = testing.random_ids(1, 600)
    first = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=258)
    extend(model, LONG)
    llama1m_ext.stats(model, reset=True)
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=258)
    assert first.shape == (1, 602) and llama1m_ext.stats(model).reused == 0


STOCK = """
import sys
from pathlib import Path
import torch, transformers

root = Path({root!r})
ids = torch.load(root / "ids.pt")
for folder in sorted(root.glob("model-*")):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save((model(ids).logits, model.config.max_position_embeddings), folder / "logits.pt")
assert not any(name.startswith("llama1m_ext") for name in sys.modules)
"""


def test_stock_transformers_loads_what_was_saved(tmp_path, run_python):
    """In another process, with theta where 4.x and where 5 keep it; with the same logits as ours."""
    ids = testing.random_ids(1, 200)
    torch.save(ids, tmp_path / "ids.pt")
    want = {}
    for method in ("gradient-v1", "yarn", "llama3-yarn"):
        model = llama3() if method == "llama3-yarn" else short_model()
        extend(model, LONG, method=method.removeprefix("llama3-"))
        folder = tmp_path / f"model-{method}"
        model.save_pretrained(folder)
        want[folder] = logits(model, ids)
        saved = json.loads((folder / "config.json").read_text())
        assert saved[RECORD]["method"] == method.removeprefix("llama3-")
        words = read_rope(model.config)
        for place in ("4", "5") if V5 else ("4",):
            other = tmp_path / f"model-{method}-{place}"
            model.save_pretrained(other)
            config = {k: v for k, v in saved.items() if k not in ("rope_theta", "rope_parameters", "rope_scaling")}
            if place == "5":
                config["rope_parameters"] = words
            else:
                config["rope_theta"] = words["rope_theta"]
                scaled = {k: v for k, v in words.items() if k != "rope_theta"}
                config["rope_scaling"] = None if words["rope_type"] == "default" else scaled
            (other / "config.json").write_text(json.dumps(config))
            want[other] = want[folder]
    run_python(STOCK.format(root=str(tmp_path)))
    for folder, ours in want.items():
        theirs, max_len = torch.load(folder / "logits.pt")
        assert max_len == LONG
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
