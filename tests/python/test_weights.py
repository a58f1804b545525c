"""Checkpoints in other forms, and models that were cast, made empty or saved: the same numbers as in stock, and the same
identity for the same weights."""

from __future__ import annotations

import json

import accelerate
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralModel

import llama1m_ext
from conftest import stock
from llama1m_ext import LongCache, testing
from llama1m_ext.fingerprint import fingerprint

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)
load = AutoModelForCausalLM.from_pretrained


def ready(model):
    llama1m_ext.set_options(model, chunk=64, progress=False)
    return model.eval()


def serves(model, rtol=2e-4):
    """Prompt and decode are ours, and as stock's."""
    ids = testing.random_ids(1, 150)
    layers = len(model.model.layers)
    with torch.no_grad():
        ours = model(ids).logits
    tokens = model.generate(ids, **GREEDY)
    counts = llama1m_ext.stats(model)
    # Three chunks each time; of the last layer's, the second time, two make only keys and values.
    assert (counts.served, counts.layer_major, counts.stock) == (6 * layers - 2 + 5 * layers, 2, {})
    with torch.no_grad(), stock():
        torch.testing.assert_close(ours, model(ids).logits, rtol=rtol, atol=rtol)
        assert torch.equal(tokens, model.generate(ids, **GREEDY))


def shards(model, folder):
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return load(folder)


def pickled(model, folder):
    if OLD_TORCH:
        pytest.skip(f"transformers refuses .bin files under torch {torch.__version__}: it wants 2.6")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return load(folder)


def low_cpu_mem_usage(model, folder):
    model.save_pretrained(folder)
    return load(folder, low_cpu_mem_usage=True)


def torch_dtype_auto(model, folder):
    model.save_pretrained(folder)
    return load(folder, torch_dtype="auto")


def device_map_auto(model, folder):
    model.save_pretrained(folder)
    return load(folder, device_map="auto")


def from_meta(model, folder):
    with accelerate.init_empty_weights():
        made = LlamaForCausalLM(model.config)
    made.load_state_dict(model.state_dict(), assign=True)
    return made


def checkpoint_and_dispatch(model, folder):
    model.save_pretrained(folder)
    with accelerate.init_empty_weights():
        made = LlamaForCausalLM(model.config)
    made.tie_weights()
    return accelerate.load_checkpoint_and_dispatch(made, folder, device_map={"": "cpu"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "way",
    [shards, pickled, low_cpu_mem_usage, torch_dtype_auto, device_map_auto, from_meta, checkpoint_and_dispatch],
)
def test_ways_to_load(tmp_path, way, tied, one_thread):
    model = testing.tiny_model(tie_word_embeddings=tied)
    found = ready(way(model, tmp_path))
    assert found.dtype == torch.float32
    if way is not from_meta:  # which ties nothing by itself
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert fingerprint(found.model) == fingerprint(model.model)
    serves(found)
    model.save_pretrained(tmp_path / "plain")
    whole = llama1m_ext.plan(load(tmp_path / "plain"), 100, measure=False).shape.loaded
    assert llama1m_ext.plan(found, 100, measure=False).shape.loaded == whole


def test_the_saved_dtype_is_kept_by_auto(tmp_path, one_thread):
    testing.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = ready(load(tmp_path, torch_dtype="auto"))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        ours = model(testing.random_ids(1, 150)).logits
        with stock():
            theirs = model(testing.random_ids(1, 150)).logits
            truth = model.double()(testing.random_ids(1, 150)).logits
    testing.assert_no_worse(ours, theirs, truth, factor=1.1)
    assert llama1m_ext.stats(model).served == 6


CASTS = {
    "half": lambda model: model.half(),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "to bfloat16 and float": lambda model: model.to(torch.bfloat16).float(),
    "half and float": lambda model: model.half().float(),
    "double and float": lambda model: model.double().float(),
}


@pytest.mark.parametrize("how", CASTS)
def test_models_that_were_cast(tmp_path, how, one_thread):
    """Casting rounds the frequencies of the rotation too: we compute them again, stock does not."""
    testing.tiny_model().save_pretrained(tmp_path)
    model, ids = ready(CASTS[how](load(tmp_path))), testing.random_ids(1, 150)
    exact = load(tmp_path)
    with torch.no_grad():
        for p, cast in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(cast)
        ours = model(ids).logits
        with stock():
            theirs, truth = model(ids).logits, exact.double()(ids).logits
    testing.assert_no_worse(ours, theirs, truth, factor=1.5 if how == "double and float" else 1)
    counts = llama1m_ext.stats(model)
    assert (counts.served, counts.layer_major, counts.stock) == (6, 1, {})


def test_frequencies_that_are_nowhere_are_stock_s_error():
    model = testing.tiny_model()
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config).eval()
    empty.load_state_dict(model.state_dict(), assign=True)  # which has no frequencies: they are no part of a checkpoint
    with torch.no_grad():
        with stock(), pytest.raises(NotImplementedError) as theirs:
            empty(testing.random_ids(1, 5))
        with pytest.raises(NotImplementedError) as ours:
            empty(testing.random_ids(1, 5))
    assert str(ours.value) == str(theirs.value)


# -- what is saved ----------------------------------------------------------------------------------------------------


def saved_by(model, folder):
    model.save_pretrained(folder)
    model.config.save_pretrained(folder / "config")
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.*")) if file.is_file()}


def test_nothing_of_ours_is_saved(tmp_path, one_thread):
    with stock():
        testing.tiny_model().save_pretrained(tmp_path / "start")
        model = load(tmp_path / "start")
        model.set_attn_implementation("sdpa")
        want = saved_by(model, tmp_path / "stock")
        assert "config.json" in want and "model.safetensors" in want
    model = ready(load(tmp_path / "start"))
    model.set_attn_implementation("sdpa")
    llama1m_ext.set_options(model, chunk=64, kv="int8", replace_sdpa=True, checkpoint=tmp_path / "checkpoint")
    llama1m_ext.remember(model, tmp_path / "kept")
    with torch.no_grad():
        model(testing.random_ids(1, 300), past_key_values=LongCache())
    model.generate(testing.random_ids(1, 20), **GREEDY)
    assert llama1m_ext.stats(model).served and llama1m_ext.stats(model).layer_major
    assert saved_by(model, tmp_path / "ours") == want
    assert "llama1m" not in json.dumps(model.config.to_dict(), default=str)
    assert "llama1m" not in model.config.to_json_string(use_diff=False)
    with stock():
        again = load(tmp_path / "ours")
        with torch.no_grad():
            theirs = again(testing.random_ids(1, 150)).logits
    ready(again)
    with torch.no_grad():
        torch.testing.assert_close(again(testing.random_ids(1, 150)).logits, theirs, rtol=2e-4, atol=2e-4)
    assert llama1m_ext.stats(again).layer_major == 1, "asked for by name before it was saved, not now"


# -- GGUF -------------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": testing.VOCAB_SIZE + 2}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, model, kind):
    """A Llama and a byte-level tokenizer with two merges, as llama.cpp's converter writes them: q and k with the pairs of
    the rotation side by side."""
    config, out = model.config, gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(500_000.0)
    out.add_rope_dimension_count(config.head_dim)
    out.add_vocab_size(config.vocab_size)
    tokenizer = testing.tiny_tokenizer()
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("llama-bpe")
    out.add_token_list([*tokenizer.convert_ids_to_tokens(list(range(testing.VOCAB_SIZE))), "Ġt", "he"])
    out.add_token_types([1] * 256 + [3] * len(testing.SPECIAL_TOKENS) + [1, 1])
    out.add_token_merges(["Ġ t", "h e"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(257)
    out.add_chat_template(testing.CHAT_TEMPLATE)
    for name, weight in model.state_dict().items():
        name, x = name.removesuffix(".weight"), weight.float().numpy()
        if name in TOP:
            name = TOP[name]
        else:
            _, _, layer, name = name.split(".", 3)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            if name in heads:
                x = x.reshape(heads[name], 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
            name = f"blk.{layer}.{IN_LAYER[name]}"
        if x.ndim == 1:
            out.add_tensor(f"{name}.weight", x)
        elif kind == Kind.F16:
            out.add_tensor(f"{name}.weight", x.astype(np.float16))
        else:
            out.add_tensor(f"{name}.weight", gguf.quants.quantize(x, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_gguf_files(tmp_path, kind, one_thread):
    original = testing.tiny_model(**SHAPE)
    write_gguf(tmp_path / "model.gguf", original, kind)
    model = ready(load(tmp_path, gguf_file="model.gguf", dtype=torch.float32))
    # A step of a code, of blocks of 32 whose largest is about 2.2 times the spread: what the file can hold.
    step = {Kind.F16: 2**-11, Kind.Q8_0: 2.2 / 127, Kind.Q4_0: 2.2 / 8}[kind] * testing.SPREAD
    for mine, its in zip(model.model.layers.parameters(), original.model.layers.parameters(), strict=True):
        assert testing.error(mine, its) <= step
    serves(model)
    assert fingerprint(model.model) != fingerprint(original.model)
    again = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert fingerprint(again.model) == fingerprint(model.model)


def test_a_gguf_file_s_tokenizer(tmp_path, one_thread):
    write_gguf(tmp_path / "model.gguf", testing.tiny_model(**SHAPE), Kind.F16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = tokenizer("on the way to them", add_special_tokens=False).input_ids
    assert (ids.count(261), ids.count(262)) == (3, 2) and tokenizer.decode(ids) == "on the way to them"
    model = ready(load(tmp_path, gguf_file="model.gguf", dtype=torch.float32))
    chat = [{"role": "user", "content": "the way to them"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert {258, 259, 260} <= set(ids[0].tolist())
    more = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(ids, **more)
    assert llama1m_ext.stats(model).served and not llama1m_ext.stats(model).stock
    with stock():
        assert torch.equal(tokens, model.generate(ids, **more))


def test_models_of_a_family_differ_by_their_windows():
    found = set()
    for window in (16, 32, None):
        config = MistralConfig(**{**testing.tiny_config().to_diff_dict(), "sliding_window": window})
        torch.manual_seed(0)
        found.add(fingerprint(MistralModel(config)))
    assert len(found) == 3
