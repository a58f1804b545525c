"""The model card's two snippets, verbatim but for the model's path."""

from __future__ import annotations

import os
import re

import pytest
import torch
import transformers

import llama1m_ext
from conftest import stock
from llama1m_ext import testing

V5 = int(transformers.__version__.split(".")[0]) >= 5
PIPELINE = """
import transformers
import torch

pipeline = transformers.pipeline(
    "text-generation",
    model=model_id,
    model_kwargs={"torch_dtype": torch.bfloat16},
    device_map="auto",
)

messages = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": "Who are you?"},
]

prompt = pipeline.tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True
)

terminators = [
    pipeline.tokenizer.eos_token_id,
    pipeline.tokenizer.convert_tokens_to_ids("<|eot_id|>")
]

outputs = pipeline(
    prompt,
    max_new_tokens=256,
    eos_token_id=terminators,
    do_sample=True,
    temperature=0.6,
    top_p=0.9,
)
print(outputs[0]["generated_text"][len(prompt):])
"""

AUTO_MODEL = """
from transformers import AutoTokenizer, AutoModelForCausalLM
import torch

tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    torch_dtype=torch.bfloat16,
    device_map="auto",
)

messages = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": "Who are you?"},
]

input_ids = tokenizer.apply_chat_template(
    messages,
    add_generation_prompt=True,
    return_tensors="pt"
).to(model.device)

terminators = [
    tokenizer.eos_token_id,
    tokenizer.convert_tokens_to_ids("<|eot_id|>")
]

outputs = model.generate(
    input_ids,
    max_new_tokens=256,
    eos_token_id=terminators,
    do_sample=True,
    temperature=0.6,
    top_p=0.9,
)
response = outputs[0][input_ids.shape[-1]:]
print(tokenizer.decode(response, skip_special_tokens=True))
"""
SNIPPETS = {"pipeline": PIPELINE, "AutoModel": AUTO_MODEL}


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    # With the card's theta; float32 on disk: the snippets ask for bfloat16 themselves.
    return str(testing.tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), rope_theta=3_580_165_449.0))


@pytest.mark.parametrize("name", SNIPPETS)
def test_verbatim_in_a_fresh_python(name, model_id, run_python):
    script = f"import llama1m_ext\nmodel_id = {model_id!r}\n{SNIPPETS[name]}"
    model = "pipeline.model" if name == "pipeline" else "model"
    script += f"\nprint('COUNTS', llama1m_ext.stats({model}), {model}.dtype)"
    printed = run_python(script, CUDA_VISIBLE_DEVICES="")
    counts = re.search(r"COUNTS Stats\(served=(\d+), stock=(.*), layer_major=0, .*?\) (.*)", printed)
    assert counts, printed
    assert int(counts[1]) >= 2
    assert counts[2] == "{}"
    assert counts[3] == "torch.bfloat16"
    assert printed.index("COUNTS") > 1, "nothing was generated"


def tokens(name: str, model_id: str, dtype: torch.dtype) -> list[int] | str:
    """What a snippet gives, greedy and in `dtype`."""
    code = SNIPPETS[name].replace("torch.bfloat16", str(dtype)).replace("do_sample=True", "do_sample=False")
    code = code.replace("max_new_tokens=256", "max_new_tokens=40")
    names: dict[str, object] = {"model_id": model_id}
    exec(compile(code, name, "exec"), names)
    counts = llama1m_ext.stats(names.get("model") or names["pipeline"])
    assert bool(counts.served) == os.environ.get("EXPECT_OURS", "1").startswith("1")
    return names["outputs"][0].tolist() if name == "AutoModel" else names["outputs"][0]["generated_text"]


@pytest.mark.parametrize("name", SNIPPETS)
def test_greedy_float32_gives_stock_s_tokens(name, model_id, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ours = tokens(name, model_id, torch.float32)
    monkeypatch.setenv("EXPECT_OURS", "0")
    with stock():
        if name == "AutoModel" and V5:
            # Stock transformers 5 stops at this snippet; the same with the two lines that it needs.
            with pytest.raises(AttributeError):
                tokens(name, model_id, torch.float32)
            monkeypatch.setitem(
                SNIPPETS,
                name,
                AUTO_MODEL.replace('return_tensors="pt"', 'return_tensors="pt", return_dict=False'),
            )
        theirs = tokens(name, model_id, torch.float32)
    assert ours == theirs


def test_batch_encoding_and_mappings(model_id):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForCausalLM.from_pretrained(model_id)
    more = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    tokenizer.pad_token = "<|eot_id|>"
    encoding = tokenizer(["Who are you, and why", "Who"], return_tensors="pt", padding=True, padding_side="left")
    encoding = BatchEncoding({name: encoding[name] for name in ("input_ids", "attention_mask")})
    want = model.generate(**encoding, **more)
    if not V5:
        return
    assert encoding.shape == encoding["input_ids"].shape
    assert torch.equal(model.generate(encoding, **more), want), "the mask in the mapping counts"
    assert torch.equal(model.generate(dict(encoding), **more), want)
    assert not hasattr(BatchEncoding({"input_ids": [1, 2]}), "shape")
    assert not hasattr(BatchEncoding({}), "shape")
    with stock():
        assert not hasattr(encoding, "shape")
