"""`llama1m convert`: what comes out is the same model and the same tokenizer, or nothing."""

from __future__ import annotations

import base64
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import original
from conftest import stock
from llama1m_ext import convert as converting
from llama1m_ext import convert_tokenizer, convert_weights
from llama1m_ext.convert import ConvertError, convert
from llama1m_ext.testing import error

pytestmark = pytest.mark.usefixtures("one_thread")
SCALED = {**original.PARAMS, "use_scaled_rope": True}


def tokens(n: int = 40) -> torch.Tensor:
    return torch.randint(0, 384, (2, n), generator=torch.Generator().manual_seed(1))


def load(folder: Path, dtype: torch.dtype | str = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype).eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    original.checkpoint(tmp_path / "original")
    return tmp_path / "original"


def nothing_left(folder: Path, *but: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(but)


# -- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("params", [original.PARAMS, SCALED], ids=["3", "3.1"])
def test_logits_are_those_of_the_original(tmp_path, n, params):
    whole = original.checkpoint(tmp_path / "m" / "original", n, params=params)
    made = convert(tmp_path / "m", tmp_path / "hf")
    truth = original.reference(whole, tokens(), params)
    with stock(), torch.no_grad():
        logits = load(made.folder)(tokens()).logits
    assert error(logits, truth) < 1e-5 * truth.std(), "float32, 2 layers"
    with torch.no_grad():
        ours = load(made.folder)(tokens()).logits
    assert error(ours, truth) < 1e-5 * truth.std()


def test_scaled_frequencies_matter(tmp_path):
    """The reference's own check: otherwise the test above could not fail for 3.1."""
    whole = original.weights()
    plain, scaled = original.reference(whole, tokens()), original.reference(whole, tokens(), SCALED)
    assert error(plain, scaled) > 1e-3 * plain.std()


def test_bfloat16_is_kept_bit_for_bit(tmp_path):
    from safetensors.torch import load_file

    whole = original.checkpoint(tmp_path / "m", 2, torch.bfloat16)
    convert(tmp_path / "m", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    same = {
        "embed_tokens": "tok_embeddings",
        "norm": "norm",
        "layers.1.self_attn.v_proj": "layers.1.attention.wv",
        "layers.1.self_attn.o_proj": "layers.1.attention.wo",
        "layers.0.mlp.down_proj": "layers.0.feed_forward.w2",
        "layers.0.mlp.up_proj": "layers.0.feed_forward.w3",
        "layers.0.post_attention_layernorm": "layers.0.ffn_norm",
    }
    for new, old in same.items():
        assert torch.equal(found[f"model.{new}.weight"], whole[f"{old}.weight"]), new
    assert torch.equal(found["lm_head.weight"], whole["output.weight"])
    assert len(found) == len(whole)
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], whole["layers.0.attention.wq.weight"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["torch_dtype"] == "bfloat16"
    assert load(tmp_path / "hf", "auto").dtype == torch.bfloat16


def test_files_of_a_size_with_an_index(tmp_path, source):
    made = convert(source, tmp_path / "hf", shard_size=100_000)
    assert made.files > 3
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "hf").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == made.nbytes
    largest = max(p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors"))
    assert largest < 640 * 64 * 4 + 4096, "one tensor, the embedding, is larger than the limit"
    truth = original.reference(original.weights(), tokens())
    with stock(), torch.no_grad():
        assert error(load(made.folder)(tokens()).logits, truth) < 1e-5 * truth.std()


def test_theta_and_length_of_a_long_model(tmp_path, source):
    from transformers import AutoConfig

    convert(source, tmp_path / "hf", theta=3_580_165_449.0, max_len=1_048_576)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.max_position_embeddings == 1_048_576
    truth = original.reference(original.weights(), tokens(), {**original.PARAMS, "rope_theta": 3_580_165_449.0})
    with stock(), torch.no_grad():
        assert error(load(tmp_path / "hf")(tokens()).logits, truth) < 1e-5 * truth.std()


def test_an_output_that_is_the_embedding(tmp_path, source):
    whole = torch.load(source / "consolidated.00.pth", weights_only=True)
    del whole["output.weight"]
    torch.save(whole, source / "consolidated.00.pth")
    with pytest.raises(ConvertError, match=r"output.weight: expected shape \(640, 64\), got no such tensor"):
        convert(source, tmp_path / "hf")
    convert(source, tmp_path / "hf", tied=True)
    truth = original.reference({**whole, "output.weight": whole["tok_embeddings.weight"]}, tokens())
    with stock(), torch.no_grad():
        assert error(load(tmp_path / "hf")(tokens()).logits, truth) < 1e-5 * truth.std()


@pytest.mark.parametrize("n", [1, 2])
def test_an_embedding_that_is_there_twice(tmp_path, n):
    """Once in the file, by two names: that is seen. Two copies: what is asked for decides, where they are alike."""
    source = tmp_path / "original"
    whole = original.checkpoint(source, n)
    want = original.reference({**whole, "output.weight": whole["tok_embeddings.weight"]}, tokens())
    paths = sorted(source.glob("*.pth"))
    for path in paths:
        shard = torch.load(path, weights_only=True)
        torch.save({**shard, "output.weight": shard["tok_embeddings.weight"]}, path)
    made = convert(source, tmp_path / "seen")
    assert made.config["tie_word_embeddings"] is True
    for path in paths:
        shard = torch.load(path, weights_only=True)
        torch.save({**shard, "output.weight": shard["tok_embeddings.weight"].clone()}, path)
    assert convert(source, tmp_path / "apart").config["tie_word_embeddings"] is False
    assert convert(source, tmp_path / "asked", tied=True).nbytes == made.nbytes
    for name in ("seen", "apart", "asked"):
        with stock(), torch.no_grad():
            assert error(load(tmp_path / name)(tokens()).logits, want) < 1e-5 * want.std()
    shard = torch.load(paths[-1], weights_only=True)
    shard["output.weight"] = shard["output.weight"] + 1
    torch.save(shard, paths[-1])
    with pytest.raises(ConvertError, match=r"output\.weight: expected the numbers of tok_embeddings\.weight"):
        convert(source, tmp_path / "other", tied=True)


def test_dtypes_that_differ_are_not_rounded(tmp_path, source):
    whole = torch.load(source / "consolidated.00.pth", weights_only=True)
    whole["tok_embeddings.weight"] = whole["tok_embeddings.weight"].bfloat16()
    torch.save(whole, source / "consolidated.00.pth")
    assert convert(source, tmp_path / "hf").config["torch_dtype"] == "float32"
    assert torch.equal(load(tmp_path / "hf", "auto").lm_head.weight, whole["output.weight"])


def test_a_file_larger_than_may_be_mapped(tmp_path, source, monkeypatch):
    """Linux refuses a private mapping larger than memory and swap: a shared one is made then."""
    path, load, flags = source / "consolidated.00.pth", torch.load, []

    def strict(*args, **given):
        flags.append(torch.serialization.get_default_mmap_options())
        if flags[-1] != mmap.MAP_SHARED:
            raise RuntimeError("unable to mmap 32212254720 bytes from file <x>: Cannot allocate memory (12)")
        return load(*args, **given)

    monkeypatch.setattr(convert_weights.torch, "load", strict)
    before = path.read_bytes()
    convert(source, tmp_path / "hf")
    assert flags == [mmap.MAP_PRIVATE, mmap.MAP_SHARED]
    assert torch.serialization.get_default_mmap_options() == mmap.MAP_PRIVATE
    assert path.read_bytes() == before

    def never(*args, **given):
        raise RuntimeError("unable to mmap 32212254720 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(convert_weights.torch, "load", never)
    with pytest.raises(OSError, match="larger than memory can't be mapped"):
        convert(source, tmp_path / "hf2")


def test_an_embedding_cut_along_its_other_axis(tmp_path):
    """As Llama 2's program does it."""
    whole = original.checkpoint(tmp_path / "m", 2)
    for rank, part in enumerate(whole["tok_embeddings.weight"].chunk(2, 1)):
        path = tmp_path / "m" / f"consolidated.{rank:02}.pth"
        torch.save(
            {**torch.load(path, weights_only=True), "tok_embeddings.weight": part.clone(), "rope.freqs": torch.ones(8)},
            path,
        )
    convert(tmp_path / "m", tmp_path / "hf")
    assert torch.equal(load(tmp_path / "hf").model.embed_tokens.weight, whole["tok_embeddings.weight"])


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """The largest part that is put together, of tensors a hundred times as large."""
    monkeypatch.setattr(convert_weights, "_PART", 4096)
    original.checkpoint(tmp_path / "m", 2)
    seen = []
    parts = convert_weights.Weight.parts
    monkeypatch.setattr(convert_weights.Weight, "parts", lambda self: (seen.append(p.nbytes) or p for p in parts(self)))
    convert(tmp_path / "m", tmp_path / "hf")
    assert len(seen) > 100
    assert max(seen) <= 4096
    truth = original.reference(original.weights(), tokens())
    with stock(), torch.no_grad():
        assert error(load(tmp_path / "hf")(tokens()).logits, truth) < 1e-5 * truth.std()


# -- the same tokens ---------------------------------------------------------------------------------------------------


def tiktoken_encoding(v31: bool = False):
    import tiktoken

    special = {token: 384 + i for i, token in enumerate(convert_tokenizer.special_tokens(v31))}
    return tiktoken.Encoding(
        name="t", pat_str=convert_tokenizer.PATTERN, mergeable_ranks=original.ranks(), special_tokens=special
    )


def test_tokens_are_tiktokens(tmp_path, source):
    from transformers import AutoTokenizer

    convert(source, tmp_path / "hf", max_len=1_048_576)
    tokenizer, judge = AutoTokenizer.from_pretrained(tmp_path / "hf"), tiktoken_encoding()
    texts = [
        original.TEXT,
        "",
        " ",
        "\n\n\n",
        "a",
        "12345678",
        "'LL it'll",
        "\u00e9\u0301 e\u0301",
        "\x00\x7f\u200d",
        "🦜" * 5,
    ]
    texts += [original.TEXT[i : i + 7] for i in range(0, 150, 3)]
    for text in texts:
        expected = judge.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == expected, text
        assert tokenizer(text).input_ids == [384, *expected], text
        assert tokenizer.decode(expected) == text
    assert len(judge.encode(original.TEXT)) < len(original.TEXT.encode()) / 2, "merges were at work"
    chat = "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    assert tokenizer(chat, add_special_tokens=False).input_ids == judge.encode(chat, allowed_special="all")
    assert len(tokenizer) == 640
    assert tokenizer.model_max_length == 1_048_576
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (384, 393)


def test_it_is_what_transformers_own_converter_makes(tmp_path, source):
    import inspect

    from transformers.convert_slow_tokenizer import TikTokenConverter

    convert(source, tmp_path / "hf")
    names = inspect.signature(TikTokenConverter.__init__).parameters
    name = "extra_special_tokens" if "extra_special_tokens" in names else "additional_special_tokens"
    theirs = TikTokenConverter(
        str(source / "tokenizer.model"), convert_tokenizer.PATTERN, **{name: convert_tokenizer.special_tokens()}
    ).converted()
    ours = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    theirs = json.loads(theirs.to_str())
    assert len(ours["model"]["merges"]) > 100
    for key in ("model", "pre_tokenizer", "decoder", "added_tokens", "normalizer"):
        assert ours[key] == theirs[key], key


def test_chat_template_and_the_ends_of_an_answer(tmp_path, source):
    from transformers import AutoTokenizer, GenerationConfig

    convert(source, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [385, 393]
    convert(source, tmp_path / "base", instruct=False)
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert base.chat_template is None
    assert base.eos_token == "<|end_of_text|>"
    assert GenerationConfig.from_pretrained(tmp_path / "base").eos_token_id == 385
    assert load(tmp_path / "base").generation_config.do_sample is not True


def test_special_tokens():
    """Ids of the releases, less 128000."""
    three, one = convert_tokenizer.special_tokens(), convert_tokenizer.special_tokens(True)
    assert len(set(three)) == len(set(one)) == 256
    assert [three.index(t) for t in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")] == [0, 1, 9]
    assert three.index("<|reserved_special_token_4|>") == 8
    assert three[255] == "<|reserved_special_token_250|>"
    assert one.index("<|eom_id|>") == 8 and one.index("<|python_tag|>") == 10
    assert one[255] == "<|reserved_special_token_247|>"


# -- what is not a checkpoint -----------------------------------------------------------------------------------------


def params_with(source: Path, **changes) -> None:
    params = {k: v for k, v in {**original.PARAMS, **changes}.items() if v != "gone"}
    (source / "params.json").write_text(json.dumps(params), encoding="utf-8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": "gone"}, "dim: expected an integer from 1 on, got null"),
        ({"dim": -64}, "dim: expected an integer from 1 on, got -64"),
        ({"dim": True}, "dim: expected an integer"),
        ({"n_layers": 2.5}, "n_layers: expected an integer"),
        ({"n_layers": 10**30}, "n_layers: expected an integer"),
        ({"n_layers": 10**9}, r"layers.2.attention.wq.weight: expected shape \(64, 64\), got no such tensor"),
        ({"n_layers": 1}, r"a Llama 3 of 1 layers, got layers.1.attention.wk.weight as well, and 8 more"),
        ({"n_heads": 3}, "expected n_heads to divide dim=64"),
        ({"n_kv_heads": 3}, "expected n_kv_heads to divide n_heads=4, got n_kv_heads=3"),
        ({"n_kv_heads": 4}, r"layers.0.attention.wk.weight: expected shape \(64, 64\), got \(32, 64\)"),
        ({"dim": 32}, r"tok_embeddings.weight: expected shape \(640, 32\), got \(640, 64\)"),
        ({"multiple_of": 256}, r"feed_forward.w1.weight: expected shape \(256, 64\), got \(224, 64\)"),
        ({"vocab_size": 32000}, "expected vocab_size=640, as the tokenizer has 384 tokens and 256 special ones, got 32000"),
        ({"rope_theta": "big"}, "rope_theta: expected a number above 0"),
        ({"rope_theta": 10**400}, "rope_theta: expected a number above 0"),
        ({"norm_eps": 10**400}, "norm_eps: expected a number above 0"),
        ({"ffn_dim_multiplier": 1e29}, "ffn_dim_multiplier: expected an MLP of at most"),
        ({"ffn_dim_multiplier": 1e308}, "ffn_dim_multiplier: expected a number above 0"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope: expected true or false"),
        ({"moe_args": {"num_experts": 16}}, "expected a Llama 3's parameters, got moe_args"),
    ],
)  # fmt: skip
def test_params_that_are_wrong(tmp_path, source, changes, message):
    params_with(source, **changes)
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "hf")
    assert nothing_left(tmp_path, "original")


def test_a_factor_without_scaled_frequencies(tmp_path, source):
    with pytest.raises(ConvertError, match="expected use_scaled_rope, as rope_factor=32 is given"):
        convert(source, tmp_path / "hf", rope_factor=32)


def test_two_files_of_a_rank(tmp_path, source):
    (source / "consolidated.0.pth").write_bytes((source / "consolidated.00.pth").read_bytes())
    with pytest.raises(ConvertError, match="expected one file of rank 0, got consolidated"):
        convert(source, tmp_path / "hf")


def test_params_that_may_be_left_out(tmp_path, source):
    params_with(source, vocab_size=-1, norm_eps="gone", rope_theta="gone", max_seq_len=2048, lora_args=None)
    assert convert(source, tmp_path / "hf").config["rope_theta"] == 500000.0


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00"])
def test_params_that_are_no_json_object(tmp_path, source, text):
    (source / "params.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConvertError, match=r"params\.json: expected"):
        convert(source, tmp_path / "hf")


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["LLAMA1M_TEST_EVIL"],))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_is_a_program_is_not_run(tmp_path, source, monkeypatch, how):
    monkeypatch.setenv("LLAMA1M_TEST_EVIL", str(tmp_path / "evil"))
    path = source / "consolidated.00.pth"
    path.write_bytes(pickle.dumps({"x": Evil()})) if how == "pickle" else torch.save({"x": Evil()}, path)
    with pytest.raises(ConvertError, match=r"consolidated\.00\.pth: expected"):
        convert(source, tmp_path / "hf")
    assert nothing_left(tmp_path, "original")


def damaged(source: Path, change) -> Path:
    path = source / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    torch.save(change(tensors), path)
    return path


WQ = "layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: list(t.values()), "expected tensors by name, got list"),
        (lambda t: {**t, 3: t[WQ]}, "expected names, got a int"),
        (lambda t: {**t, WQ: [1.0]}, "wq.weight: expected a dense tensor, got list"),
        (lambda t: {**t, WQ: t[WQ].to_sparse()}, "wq.weight: expected a dense tensor, got torch.sparse_coo"),
        (lambda t: {**t, WQ: t[WQ].long()}, "wq.weight: expected bfloat16, float16 or float32, got torch.int64"),
        (lambda t: {**t, WQ: torch.zeros(1).expand(64, 64)}, r"wq.weight: expected \(64, 64\) elements, got 1 in memory"),
        (lambda t: {**t, WQ: t[WQ][:, :0]}, r"wq.weight: expected \(64, 0\) elements"),
        (lambda t: {**t, WQ: t[WQ].view(32, 128)}, r"wq.weight: expected shape \(64, 64\), got \(32, 128\)"),
        (lambda t: {k: v for k, v in t.items() if k != WQ}, "wq.weight: expected shape .*, got no such tensor"),
        (lambda t: {**t, WQ: torch._neg_view(t[WQ])}, "wq.weight: expected numbers as they are, got a view"),
        (lambda t: {**t, "lora_A.weight": t[WQ]}, "got lora_A.weight as well"),
    ],
)  # fmt: skip
def test_weights_that_are_wrong(tmp_path, source, change, message):
    path = damaged(source, change)
    with pytest.raises(ConvertError, match=message) as caught:
        convert(source, tmp_path / "hf")
    assert str(path) in str(caught.value)
    assert nothing_left(tmp_path, "original")


def test_a_file_cut_at_any_length(tmp_path, source):
    path = source / "consolidated.00.pth"
    whole = path.read_bytes()
    for n in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ConvertError, match="expected a checkpoint in torch's zip format"):
            convert(source, tmp_path / "hf")
    assert nothing_left(tmp_path, "original")


def test_shards(tmp_path):
    folder = tmp_path / "m"
    original.checkpoint(folder, 2)
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    tensors = torch.load(second, weights_only=True)

    def refused(message: str) -> None:
        with pytest.raises(ConvertError, match=message):
            convert(folder, tmp_path / "hf")
        assert nothing_left(tmp_path, "m")

    torch.save({**tensors, WQ: tensors[WQ][:16].clone()}, second)
    refused(
        r"01.pth: layers.0.attention.wq.weight: expected shape \(32, 64\), one of 2 shards of \(64, 64\), got \(16, 64\)"
    )
    torch.save({**tensors, WQ: tensors[WQ].half()}, second)
    refused("01.pth: layers.0.attention.wq.weight: expected torch.float32 as in consolidated.00.pth, got torch.float16")
    torch.save({**tensors, "norm.weight": tensors["norm.weight"] + 1}, second)
    refused("01.pth: norm.weight: expected the numbers that consolidated.00.pth has, got others")
    second.unlink()
    refused(r"00.pth: tok_embeddings.weight: expected shape \(640, 64\), got \(320, 64\)")
    second.write_bytes(b"")
    second.rename(folder / "consolidated.02.pth")
    refused(r"expected consolidated.01.pth, as there is consolidated.02.pth")
    (folder / "consolidated.02.pth").unlink()
    first.unlink()
    refused(r"expected consolidated.00.pth, got no such file")


def test_more_shards_than_heads_of_keys(tmp_path):
    original.checkpoint(tmp_path / "m", 4)
    with pytest.raises(ConvertError, match=r"expected a number of shards that divides n_kv_heads=2, got 4"):
        convert(tmp_path / "m", tmp_path / "hf")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines[:100], "expected all 256 bytes among 100 tokens, got no b'd'"),
        (lambda lines: [*lines[:300], *lines[301:]], "expected ranks 0 to 382 of 383 tokens, got no rank 300"),
        (lambda lines: [*lines, lines[299]], "line 385: expected a new token and a new rank, got token .* again"),
        (lambda lines: [b"\n\x0e\n\x05<unk>\x15"], "got a sentencepiece model"),
        (lambda lines: [b"not base64! 0\n"], "line 1: expected a token in base64 and its rank, got b'not base64! 0'"),
        (lambda lines: [b"\xff\xfe\x00"], "line 1: expected a token in base64"),
        (lambda lines: [*lines, b"Q1FDUUM= 7\n"], "line 385: expected a new token and a new rank, got rank 7 again"),
        (lambda lines: [b"QQ== 0 1"], "line 1: expected a token in base64"),
        (lambda lines: lines[:-1], "expected vocab_size=639"),
        (lambda lines: [*lines, b"PHxlb3RfaWR8Pg== 384\n"], r"got <\|eot_id\|> as an ordinary one"),
    ],
)  # fmt: skip
def test_tokenizers_that_are_wrong(tmp_path, source, change, message):
    path = source / "tokenizer.model"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "hf")
    assert nothing_left(tmp_path, "original")


def test_a_tokenizer_elsewhere(tmp_path, source):
    path = (source / "tokenizer.model").rename(tmp_path / "t.model")
    with pytest.raises(ConvertError, match=r"tokenizer\.model: expected Llama 3's tokenizer, got no such file"):
        convert(source, tmp_path / "hf")
    convert(source, tmp_path / "hf", tokenizer=path)
    path.rename(tmp_path / "tokenizer.model")  # as Hugging Face has it: beside original/
    convert(tmp_path, tmp_path / "hf2")
    assert base64.b64encode(b"a") in (tmp_path / "tokenizer.model").read_bytes()


# -- the folder appears whole, or not at all ---------------------------------------------------------------------------


def test_what_is_there_is_left_alone(tmp_path, source):
    for name, make in {
        "dir": lambda p: p.mkdir(),
        "file": lambda p: p.write_text("mine"),
        "link": lambda p: p.symlink_to("nowhere"),
    }.items():
        make(tmp_path / name)
        with pytest.raises(FileExistsError, match="expected a folder that is not there yet"):
            convert(source, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="parent"):
        convert(source, tmp_path / "no" / "hf")


def test_too_little_room_is_said_before_anything_is_written(tmp_path, source, monkeypatch):
    import shutil

    monkeypatch.setattr(converting.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OSError, match=r"it takes 6[0-9]{7} bytes, and 1000000 are free"):
        convert(source, tmp_path / "hf")
    assert nothing_left(tmp_path, "original")


FULL = """
import resource, signal, sys
from llama1m_ext.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, destination, limit = sys.argv[1:]
limit = int(limit)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    convert(source, destination)
except OSError as e:
    print("OSError", e)
"""


@pytest.mark.parametrize("limit", [1_000, 20_000, 100_000])
def test_a_full_disk(tmp_path, source, limit):
    """While config.json, tokenizer.json or the weights are written."""
    words = [sys.executable, "-c", FULL, source, tmp_path / "hf", str(limit)]
    answer = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=120)
    assert answer.stdout.startswith("OSError [Errno 27] File too large"), answer.stdout + answer.stderr
    assert nothing_left(tmp_path, "original")


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
from llama1m_ext import convert_weights
from llama1m_ext.convert import convert
parts = convert_weights.Weight.parts
def slow(self):
    for part in parts(self):
        print("part", flush=True)
        time.sleep(0.01)
        yield part
convert_weights.Weight.parts = slow
convert(*sys.argv[1:])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_on_the_way(tmp_path, source, how):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, source, tmp_path / "hf"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    for _ in range(3):
        assert process.stdout.readline() == "part\n", process.stderr.read()
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-how, 130) or "KeyboardInterrupt" in errors
    left = [path.name for path in tmp_path.iterdir() if path.name != "original"]
    if how == signal.SIGINT:
        assert left == []
    else:
        assert len(left) == 1 and left[0].startswith(".hf.") and left[0].endswith(".tmp"), left
    convert(source, tmp_path / "hf")  # and the next one is not in its way
    assert nothing_left(tmp_path, "original", "hf"), "what a killed one left is swept away"


# -- the command -------------------------------------------------------------------------------------------------------


def llama1m(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llama1m_ext", "convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)


def test_the_command(tmp_path, source):
    began = time.perf_counter()
    answer = llama1m(source, tmp_path / "hf", "--theta", "3580165449", "--max-len", "1048576", "--shard-size", "200KB")
    assert answer.returncode == 0, answer.stderr
    assert "2 layers" in answer.stdout and "1048576 positions, theta 3580165449" in answer.stdout
    assert "convert: 100%" in answer.stderr
    assert time.perf_counter() - began < 60
    answer = llama1m(source, tmp_path / "hf")
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr and "expected a folder that is not there yet" in answer.stderr
    answer = llama1m(tmp_path / "no", tmp_path / "hf2")
    assert answer.returncode == 1
    assert "expected a folder with params.json" in answer.stderr and "Traceback" not in answer.stderr


def test_the_command_s_other_options(tmp_path):
    """Llama 3.2's small ones: scaled by 32, and the output is the embedding, in the file by two names."""
    params = {**original.PARAMS, "use_scaled_rope": True}
    whole = original.checkpoint(tmp_path / "o", params=params)
    tensors = {**whole, "output.weight": whole["tok_embeddings.weight"]}
    torch.save(tensors, tmp_path / "o" / "consolidated.00.pth")
    file = (tmp_path / "o" / "tokenizer.model").rename(tmp_path / "t.model")
    answer = llama1m(
        tmp_path / "o", tmp_path / "hf", "--tied", "--rope-factor", "32", "--base", "--tokenizer", str(file)
    )
    assert answer.returncode == 0, answer.stderr
    settings = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert settings["tie_word_embeddings"] is True
    assert settings["rope_scaling"]["factor"] == 32
    truth = original.reference(tensors, tokens(), {**params, "rope_scaling_factor": 32})
    with stock(), torch.no_grad():
        assert error(load(tmp_path / "hf")(tokens()).logits, truth) < 1e-5 * truth.std()
    words = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "chat_template" not in words
