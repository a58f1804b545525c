"""Wrong answers that came without an error elsewhere: for each, what would have caught it here.

| where it happened, and what | the test |
|---|---|
| axolotl 3928: a new attention key went past the patch, wrong loss | `test_attention_changed_by_others`, `test_attention_functions_of_somebody_else`; test_patch.py, `test_set_attn_implementation` |
| accelerate 4177: the mask was dropped | `test_padding_is_never_dropped` |
| trl 6843: packed sequences saw each other (transformers 4.57 with torch 2.5 as well) | `test_packed_sequences_do_not_see_each_other` |
| Megatron-Bridge 2665: the feature was off, and looked fast | test_differential.py, `check_counts`: whoever is expected must have computed it |
| NeMo Automodel 3157: stale keys and values | `test_nothing_is_left_of_the_call_before`; test_generate.py, `test_unwritten_memory_of_pages_is_never_read` |
| ring-flash-attention 42: backward off, loss fine | test_stock_path.py, `test_training_has_stock_s_gradients`; test_autograd.py |
| vLLM with fp8: too narrow an accumulator at 128k | `test_long_sums_keep_their_precision` |
| transformers 5: the scale of fp8 frozen by the first update, NaN | `test_scales_follow_what_comes_later` |
| transformers 4.57: prefill_chunk_size counts padding | test_generation_modes.py, `test_prefill_chunk_size` |
| transformers 47942: device_map | test_patch.py, `test_disk_offload`, `test_accelerate_hooks_put_on_before_the_import`; test_cuda_devices.py |
| LMCache 4385: another request's keys from the disk | test_remember.py, `test_another_model_never_takes_it`, `test_a_changed_token_ends_what_is_taken`; test_saved.py, `test_another_model`; `test_a_cache_of_other_tokens` |
| LMCache 207: read while it was written | test_remember.py, `test_processes_share_a_folder`; test_saved.py, `test_kills_leave_the_old_cache_or_the_new_one` |
| llama.cpp 26676: restored, it said, and read it all again | test_remember.py, `test_ten_questions_in_the_pipeline_read_the_book_once` |
| ollama 17427: a long prompt was cut | `test_no_prompt_is_ever_cut` |
| kekzl/imp 114: chunks that attend only to themselves | `test_every_chunk_sees_every_token_before` |
| EasyContext 14: exp overflowed | `test_huge_scores`; test_merge.py, `test_far_apart_log_sums_do_not_overflow` |
| long contexts elsewhere: 32-bit offsets | cargo's tests; test_offload.py |
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, _compat, ops, testing
from llama1m_ext.formats import KvFormat
from llama1m_ext.pages import PagedLayer
from test_differential import exact
from test_generate import GREEDY

CACHE = _compat.cache_name()
V5 = int(transformers.__version__.split(".")[0]) >= 5
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return testing.tiny_model()


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def near(a, b, bound=2e-4):
    torch.testing.assert_close(a, b, rtol=bound, atol=bound)


# -- attention that is somebody else's, or was asked for later ---------------------------------------------------------------


def by_method(model):
    model.set_attn_implementation("eager")


def by_config(model):
    model.config._attn_implementation = "eager"


def by_the_inner_config(model):
    model.model.config._attn_implementation = "eager"


def past_the_setter(model):
    model.config._attn_implementation_internal = "eager"


def by_a_new_config(model):
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    model.config = model.model.config = config
    for layer in model.model.layers:
        layer.self_attn.config = config


@pytest.mark.parametrize("change", [by_method, by_config, by_the_inner_config, past_the_setter, by_a_new_config])
def test_attention_changed_by_others(model, change):
    """After loading, in the midst of a talk. What was asked for is what runs, and the counter says so."""
    ids, cache = testing.random_ids(1, 40), LongCache(config=model.config)
    logits(model, ids[:, :20], past_key_values=cache)
    assert llama1m_ext.stats(model, reset=True).served == 2
    seen = []

    def eager(original):
        def forward(*args, **kwargs):
            seen.append(original)
            return original(*args, **kwargs)

        return forward

    from transformers.models.llama import modeling_llama

    change(model)
    before = modeling_llama.eager_attention_forward
    modeling_llama.eager_attention_forward = eager(before)
    try:
        found = logits(model, ids[:, 20:], past_key_values=cache)
    finally:
        modeling_llama.eager_attention_forward = before
    assert len(seen) == 2, "eager attention was asked for, and something else ran"
    assert llama1m_ext.stats(model) == llama1m_ext.Stats(stock={"attn_implementation='eager'": 2})
    near(found, logits(testing.tiny_model(), ids)[:, 20:])


@pytest.mark.parametrize("where", ["attention", "mask", "create_causal_mask"])
def test_attention_functions_of_somebody_else(model, where, monkeypatch):
    """Put where transformers looks for its own "sdpa": they run, and not ours past them."""
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    called = []

    def watched(inner):
        def function(*args, **kwargs):
            called.append(inner)
            return inner(*args, **kwargs)

        return function

    ids = testing.random_ids(1, 30)
    want = logits(model, ids)
    assert llama1m_ext.stats(model, reset=True).served == 2
    table = {"attention": ALL_ATTENTION_FUNCTIONS, "mask": masking_utils.ALL_MASK_ATTENTION_FUNCTIONS}.get(where)
    if table is None:
        monkeypatch.setattr(modeling_llama, "create_causal_mask", watched(modeling_llama.create_causal_mask))
    else:
        monkeypatch.setitem(type(table)._global_mapping, "sdpa", watched(table["sdpa"]))
    with pytest.warns(UserWarning, match="somebody else's"):
        near(logits(model, ids), want)
    assert called
    (reason,) = llama1m_ext.stats(model, reset=True).stock
    assert reason.startswith({"attention": "the attention function", "mask": "the mask function"}.get(where, where))
    monkeypatch.undo()
    logits(model, ids)
    assert llama1m_ext.stats(model).served == 2


def test_attentions_then_off_and_on_again(model):
    """transformers 4 leaves forward functions behind after output_attentions and output_hidden_states; ours of before must
    not be strangers."""
    ids, every = testing.random_ids(1, 30), {"output_attentions": True, "output_hidden_states": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = logits(model, ids, **every)
        for _ in range(2):
            with stock():
                near(logits(model, ids, **every), want)
            llama1m_ext.stats(model, reset=True)
            near(logits(model, ids), want)
            assert llama1m_ext.stats(model).served == 2
            logits(model, ids, **every)
    with stock():
        pass
    llama1m_ext.stats(model, reset=True)
    llama1m_ext.set_options(model, chunk=8)
    near(logits(model, ids), want)
    counts = llama1m_ext.stats(model)
    assert not counts.stock and counts.layer_major == 1


# -- masks and sequences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk": 7, "page_size": 5}], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_never_dropped(model, side, options):
    """A row says the same whatever stands in its padding, and whatever else is in the batch. Judged by the row alone."""
    llama1m_ext.set_options(model, **options)
    row, (a, b) = testing.random_ids(1, 20), {"left": (11, 0), "right": (0, 11), "both": (4, 7)}[side]
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[0, :a] = mask[0, 31 - b :] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    want = logits(model, row)
    for seed in (1, 2):  # what stands there, and the other row
        ids = testing.random_ids(2, 31, seed)
        ids[0, a : 31 - b] = row
        cache = LongCache(config=model.config)
        found = logits(model, ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        near(found[0, a : 31 - b], want[0])
        if side == "left":
            more = {"attention_mask": torch.ones(2, 32, dtype=torch.long), "past_key_values": cache}
            more["attention_mask"][:, :31] = mask
            found = logits(model, row[:, :1].expand(2, 1), position_ids=torch.tensor([[20], [31]]), **more)
            near(found[0, 0], logits(model, torch.cat([row, row[:, :1]], dim=1))[0, -1])
    assert llama1m_ext.stats(model).served and not llama1m_ext.stats(model).stock


@pytest.mark.parametrize("chunk", ["auto", 7])
def test_packed_sequences_do_not_see_each_other(model, chunk):
    llama1m_ext.set_options(model, chunk=chunk)
    parts = [testing.random_ids(1, n, seed=n) for n in (9, 14, 1, 16)]
    places = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = logits(model, torch.cat(parts, dim=1), position_ids=places, use_cache=False)
    assert list(llama1m_ext.stats(model, reset=True).stock) == ["position_ids are packed sequences"]
    near(found, torch.cat([logits(model, part) for part in parts], dim=1))
    model.train()  # with gradients
    near(model(torch.cat(parts, dim=1), position_ids=places, use_cache=False).logits.detach(), found)
    model.eval()
    # A mask of the user's own says the same where there is a cache.
    number = torch.cat([torch.full((part.shape[1],), i) for i, part in enumerate(parts)])
    own = ((number[:, None] == number) & torch.ones(40, 40, dtype=torch.bool).tril())[None, None]
    with pytest.warns(UserWarning, match="not 2-D"):
        near(logits(model, torch.cat(parts, dim=1), position_ids=places, attention_mask=own), found)


@pytest.mark.parametrize("way", ["option", "prefill_chunk_size", "pieces"])
def test_every_chunk_sees_every_token_before(model, way):
    """Judged by logits: decoding hides it, and a needle in the last chunk is found all the same."""
    ids = testing.random_ids(1, 64)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 256

    def run(ids):
        if way == "option":
            llama1m_ext.set_options(model, chunk=16)
            return logits(model, ids)
        cache = LongCache(config=model.config)
        if way == "pieces":
            return torch.cat(
                [logits(model, ids[:, a : a + 16], past_key_values=cache) for a in range(0, 64, 16)], dim=1
            )
        more = {"prefill_chunk_size": 16, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(ids, past_key_values=cache, **{**GREEDY, "max_new_tokens": 1}, **more)
        return out.logits[0][:, None]

    found, changed = run(ids), run(other)
    last = found.shape[1]
    with stock():
        near(found, logits(model, ids)[:, -last:])
        near(changed, logits(model, other)[:, -last:])
    moved = (found - changed).abs().amax(-1)[0]
    assert (moved > 1e-3).all(), "the first token does not matter somewhere"
    assert not llama1m_ext.stats(model).stock


def test_no_prompt_is_ever_cut():
    """Beyond max_position_embeddings, in the pipeline with its defaults: the first token still matters."""
    small = testing.tiny_model(max_position_embeddings=32)
    tokenizer = testing.tiny_tokenizer()
    tokenizer.model_max_length = 32
    pipe = transformers.pipeline("text-generation", model=small, tokenizer=tokenizer)
    text = "The sea was calm. " * 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = pipe(text, max_new_tokens=4, do_sample=False, return_full_text=True)[0]["generated_text"]
    assert answer.startswith(text)
    asked = tokenizer(text, return_tensors="pt").input_ids
    assert llama1m_ext.stats(small).computed in (asked.shape[1] + 3, asked.shape[1] + 2)
    other = asked.clone()
    other[0, 1] = 7
    assert (logits(small, asked)[0, -1] - logits(small, other)[0, -1]).abs().max() > 1e-3


# -- what is left over -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk": 8}, {"chunk": 8, "page_size": 8}], ids=str)
def test_nothing_is_left_of_the_call_before(model, options, nan_in_new_pages):
    """Other prompts, batches and lengths in between, with and without a cache, cropped and reset: the same bits again."""
    llama1m_ext.set_options(model, **options)
    ids = testing.random_ids(2, 30)
    cache = LongCache(config=model.config)
    want = [logits(model, ids), logits(model, ids, use_cache=False), logits(model, ids, past_key_values=cache)]
    for seed, (batch, n) in enumerate([(1, 50), (3, 9), (2, 30), (1, 1)]):
        between = testing.random_ids(batch, n, seed + 1)
        logits(model, between, use_cache=False)
        logits(model, between)
        if batch == 2:
            cache.crop(-20)
            logits(model, between, past_key_values=cache)
            cache.crop(10 - cache.get_seq_length())
            near(logits(model, ids[:, 10:], past_key_values=cache), want[0][:, 10:])
        cache.reset()
        found = [logits(model, ids), logits(model, ids, use_cache=False), logits(model, ids, past_key_values=cache)]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_cache_of_other_tokens(model, tmp_path, loaded):
    """`generate` takes what is in a cache for the beginning of its ids. Where they are not, it is said."""
    ids, cache = testing.random_ids(1, 40), LongCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    if loaded:
        cache.save(tmp_path / "kv", model)
        cache = LongCache.load(tmp_path / "kv", model)
    other = torch.cat([ids, ids[:, :5]], dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(other, **{CACHE: copy.deepcopy(cache)}, **GREEDY)
        model.generate(input_ids=other, **{CACHE: copy.deepcopy(cache)}, **GREEDY)
    other[0, 17] += 1
    with pytest.warns(UserWarning, match="first 40 tokens of input_ids in the cache, got others from token 17 on"):
        model.generate(other, **{CACHE: copy.deepcopy(cache)}, **GREEDY)


# -- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("times", [100, 3000])
def test_huge_scores(dtype, times):
    """Scores of thousands: exp of none of them must be taken bare. The judge is float64."""
    model = testing.tiny_model(2, dtype, rope_theta=10_000.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= times
    truth = exact(model)
    ids = testing.random_ids(8, 80)
    with torch.no_grad():
        embeds = model.model.embed_tokens(ids)
        layer = model.model.layers[0]
        q = layer.self_attn.q_proj(layer.input_layernorm(embeds))[0].view(80, 4, 16)
        k = layer.self_attn.k_proj(layer.input_layernorm(embeds))[0].view(80, 2, 16)
        assert (torch.einsum("qd,kd->qk", q[:, 0].float(), k[:, 0].float()) / 4).abs().max() > 5 * times
        with stock():
            want, yardstick = truth(ids).logits, model(ids).logits
        for chunk in ("auto", 16):
            llama1m_ext.set_options(model, chunk=chunk)
            ours = model(ids).logits
            assert ours.isfinite().all()
            # Nearly one-hot: errors are those of a few rows where two keys are close, for stock as for us (in one seed or
            # another 0.3 to 4 times stock's, on average the same).
            testing.assert_no_worse(ours, yardstick, want, factor=2)
    assert not llama1m_ext.stats(model).stock


@pytest.mark.parametrize("kv", ["model", "fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sums_keep_their_precision(dtype, kv):
    """The mean of 131072 values around 1: an accumulator of the values' own dtype would stop at 256 of them."""
    n, layer = 1 << 17, PagedLayer("auto", KvFormat.parse(kv))
    v = (1 + 0.25 * torch.randn(1, 1, n, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    layer.append(torch.zeros(1, 1, n, 64, dtype=dtype), v)
    layer.seal()
    from llama1m_ext import offload

    for q_len in (1, 80):
        out = offload.attention(torch.zeros(1, 2, q_len, 64, dtype=dtype), layer, softmax_scale=0.125, q_start=n - 1)
        truth = v.double().mean(2)[0, 0]
        step = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11  # half of the last bit of numbers from 1 on, twice
        assert (out[0, :, -1].double() - truth).abs().max() <= step + (0 if kv == "model" else 0.25 * 2**-4 / 256)


@pytest.mark.parametrize("kv", ["fp8", "int8", "int4", "int8/int4"])
def test_scales_follow_what_comes_later(kv):
    """The first keys small, later ones 300 times as large: no scale is that of the first."""
    generator = torch.Generator().manual_seed(0)
    layer, parts = PagedLayer(64, KvFormat.parse(kv)), []
    for size, n in ((0.01, 200), (3.0, 200), (1.0, 100)):
        x = torch.randn(1, 2, n, 32, generator=generator) * size
        parts.append(x)
        layer.append(x, -x)
        layer.seal()
    keys, values = layer.dense()
    whole = torch.cat(parts, dim=2)
    assert keys.isfinite().all() and values.isfinite().all()
    for at, part in ((0, parts[0]), (200, parts[1]), (400, parts[2])):
        span = slice(at + 64, at + 192) if at else slice(64, 128)  # within one size: a group takes its largest
        for ours, sign in ((keys, 1), (values, -1)):
            error = (ours[:, :, span] - sign * whole[:, :, span]).pow(2).mean().sqrt() / part.pow(2).mean().sqrt()
            assert error < 0.2, (at, error)
    q = torch.randn(1, 4, 1, 32, generator=generator)
    assert ops.attention(q, keys, values).isfinite().all()
