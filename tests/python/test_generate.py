"""`generate()` with us gives the tokens that it gives without us, in each of its ways; and our kernel computed them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

import llama1m_ext
from conftest import needs_prefill_chunks, stock
from llama1m_ext import testing

GREEDY = {
    "do_sample": False,
    "max_new_tokens": 16,
    "eos_token_id": None,
    "pad_token_id": 258,
}  # 258: in no prompt, where generate would take it for padding


@pytest.fixture
def model():
    return testing.tiny_model()


def both(model, *args, **kwargs):
    """(ours, stock's) result of one `generate`; checks that each side was computed by whom it should be."""
    llama1m_ext.stats(model, reset=True)
    torch.manual_seed(0)
    ours = model.generate(*args, **kwargs)
    counts = llama1m_ext.stats(model)
    assert counts.served > 0, counts
    assert not counts.stock, counts
    with stock():
        torch.manual_seed(0)
        theirs = model.generate(*args, **kwargs)
    assert llama1m_ext.stats(model) == counts, "the stock run used our path"
    return ours, theirs


def left_padded(lengths: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = testing.random_ids(len(lengths), width, seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
        ids[row, : width - length] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("chunk", "length"), [("auto", 1), ("auto", 150), (1, 2), (7, 50), (64, 63), (64, 64), (64, 65), (64, 150)]
)
def test_greedy(model, chunk, length):
    llama1m_ext.set_options(model, chunk=chunk)
    ours, theirs = both(model, testing.random_ids(1, length), **GREEDY)
    assert torch.equal(ours, theirs)
    assert llama1m_ext.stats(model).layer_major == (chunk != "auto" and length > chunk)


def test_greedy_with_pages_of_a_few_tokens(model):
    llama1m_ext.set_options(model, page_size=5, chunk=16)
    ours, theirs = both(model, testing.random_ids(2, 83), **GREEDY)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chunk", ["auto", 16])
def test_left_padded_batch(model, chunk):
    llama1m_ext.set_options(model, chunk=chunk)
    ids, mask = left_padded([40, 3, 25, 1])
    ours, theirs = both(model, ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, theirs)
    alone = model.generate(ids[2:3, 15:], **GREEDY)
    assert torch.equal(ours[2, 15:], alone[0]), "padding changed a row's tokens"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "eos_token_id": [17, 40]},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 260},
        {"use_cache": False, "max_new_tokens": 6},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 16},
        {"eos_token_id": [3, 5, 7, 39, 87]},
        {"cache_implementation": "dynamic"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_ways_of_decoding(model, changes):
    needs_prefill_chunks("prefill_chunk_size" in changes)
    ids = testing.random_ids(1 if "prompt_lookup_num_tokens" in changes else 2, 50, seed=3)
    ours, theirs = both(model, ids, **{**GREEDY, **changes})
    assert torch.equal(ours, theirs)


def test_beams_of_a_left_padded_batch_in_small_pages(model):
    llama1m_ext.set_options(model, page_size=8)
    ids, mask = left_padded([30, 11])
    ours, theirs = both(model, ids, attention_mask=mask, **{**GREEDY, "num_beams": 3})
    assert torch.equal(ours, theirs)


def test_assisted_decoding(model):
    helper = testing.tiny_model(seed=0, num_hidden_layers=1)
    ours, theirs = both(model, testing.random_ids(1, 40), assistant_model=helper, **GREEDY)
    assert torch.equal(ours, theirs)
    assert llama1m_ext.stats(helper).served > 0


def test_inputs_embeds(model):
    embeds = model.model.embed_tokens(testing.random_ids(1, 40)).detach()
    before = embeds.clone()
    llama1m_ext.set_options(model, chunk=8)
    ours, theirs = both(model, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(ours, theirs)
    assert torch.equal(embeds, before)


def test_streamer_sees_every_token(model):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen += tokens.flatten().tolist()

        def end(self):
            self.seen.append(None)

    streamer = Streamer()
    out = model.generate(testing.random_ids(1, 20), streamer=streamer, **GREEDY)
    assert streamer.seen == [*out[0].tolist(), None]


def test_scores_and_hidden_states_of_generate(model):
    more = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    ours, theirs = both(model, testing.random_ids(2, 30), **{**GREEDY, "max_new_tokens": 4}, **more)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert [len(step) for step in ours.hidden_states] == [len(step) for step in theirs.hidden_states]
    for a, b in zip(ours.hidden_states[0], theirs.hidden_states[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def conversation(model, cache):
    """Three turns over one cache: prompt and answer, then more of each."""
    tokens = testing.random_ids(1, 30, seed=5)
    for turn in range(3):
        tokens = model.generate(tokens, past_key_values=cache, **{**GREEDY, "max_new_tokens": 8})
        tokens = torch.cat([tokens, testing.random_ids(1, 12, seed=6 + turn)], dim=1)
    return tokens


@pytest.mark.parametrize("kind", ["LongCache", "LongCache without config", "DynamicCache", "small pages"])
def test_cache_from_call_to_call(model, kind):
    with stock():
        theirs = conversation(model, DynamicCache(config=model.config))
    cache = {
        "LongCache": lambda: llama1m_ext.LongCache(config=model.config),
        "LongCache without config": llama1m_ext.LongCache,
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "small pages": lambda: llama1m_ext.LongCache(config=model.config, page_size=7),
    }[kind]()
    llama1m_ext.set_options(model, chunk=16)
    assert torch.equal(conversation(model, cache), theirs)
    assert not llama1m_ext.stats(model).stock
    assert cache.get_seq_length() == 30 + 3 * 8 + 2 * 12 - 1
    if kind == "small pages":
        assert len(cache.layers[0].pages) == -(-cache.get_seq_length() // 7)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "adopted from stock", "given back to stock"])
def test_a_prompt_s_cache_is_copied_and_continued(model, how):
    prompt, tail = testing.random_ids(1, 40, seed=8), testing.random_ids(1, 6, seed=9)
    everything = torch.cat([prompt, tail], dim=1)
    with stock():
        theirs = model.generate(everything, **GREEDY)
    cache = DynamicCache(config=model.config)
    with stock() if how == "adopted from stock" else torch.no_grad(), torch.no_grad():
        model(prompt, past_key_values=cache)
    if how == "deepcopy":
        first, cache = cache, copy.deepcopy(cache)
        model.generate(torch.cat([prompt, prompt], dim=1), past_key_values=first, **GREEDY)  # must not show in the copy
    elif how == "pickle":
        cache = pickle.loads(pickle.dumps(cache))
    with stock() if how == "given back to stock" else torch.no_grad():
        ours = model.generate(everything, past_key_values=cache, **GREEDY)
    assert torch.equal(ours, theirs)


def test_inference_mode_then_no_grad(model):
    ids = testing.random_ids(1, 30)
    cache = llama1m_ext.LongCache(config=model.config)
    with torch.inference_mode():
        first = model.generate(ids, past_key_values=cache, **GREEDY)
    again = model.generate(torch.cat([first, ids], dim=1), past_key_values=cache, **GREEDY)
    with stock():
        theirs = model.generate(torch.cat([first, ids], dim=1), **GREEDY)
    assert torch.equal(again, theirs)


def test_unwritten_memory_of_pages_is_never_read(model, nan_in_new_pages):
    ids, mask = left_padded([45, 20])
    for options, beams in (({"page_size": 9}, 2), ({"page_size": 64, "chunk": 10}, 1), ({"page_size": "auto"}, 1)):
        llama1m_ext.set_options(model, **options)
        more = {**GREEDY, "num_beams": beams, "max_new_tokens": 12}
        ours, theirs = both(model, ids, attention_mask=mask, **more)
        assert torch.equal(ours, theirs)


def test_bfloat16_logits_are_no_further_from_float64_than_stock_s():
    """The same weights in float64 are the truth; the yardstick is stock in bfloat16."""
    model = testing.tiny_model(dtype=torch.bfloat16, num_hidden_layers=3)
    # The same frequencies too: the float32 ones that both were made with.
    truth = copy.deepcopy(model).double()
    truth.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.double()
    ids, mask = left_padded([300, 210])
    with torch.no_grad():
        with stock():
            want, yardstick = truth(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
        seen = mask.bool()
        for chunk in ("auto", 64):
            llama1m_ext.set_options(model, chunk=chunk)
            ours = model(ids, attention_mask=mask).logits
            testing.assert_no_worse(ours[seen], yardstick[seen], want[seen], factor=1.02)
    assert llama1m_ext.stats(model).served and not llama1m_ext.stats(model).stock
