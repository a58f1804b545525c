"""What a KV format costs in answers: needles found, and perplexity of a book's next pages, on the demo model.

The text is read once into a cache in the model's own dtype. A shipped format then reads the same text through its own
path; of the other variants (`kv_variants`) the dense keys and values are replaced by what they would be rounded to, the
first 64 and the last tokens excepted, as a compact cache leaves them too.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama1m_ext import _compat
from llama1m_ext.bench.kv import llama_like
from llama1m_ext.bench.kv_variants import Variant, errors, variants
from llama1m_ext.formats import GROUP

SHIPPED = {"bf16": "model", "int8": "int8", "fp8": "fp8", "int8/int4": "int8/int4", "int4": "int4"}
"""By the first word of a variant's name."""


@dataclass
class Text:
    """A text with needles, the questions for them, and how the text goes on; token ids."""

    ids: list[int]
    turns: list[tuple[list[int], list[int]]]  # question, answer
    rest: list[int]


def text_of(tokenizer: Any, tokens: int, needles: int, rest: int, seed: int = 0) -> Text:
    """The book with `needles` sentences at equal distances, `tokens` long, and the `rest` tokens that come next."""
    from llama1m_ext.demo.book import load_book
    from llama1m_ext.demo.needle import SYSTEM, draw_needles

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    book = encode(load_book()[: 8 * (tokens + rest)])  # far more than so many tokens
    head = encode(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    )
    hidden = draw_needles(seed, needles)
    sentences = [encode(f" {needle.sentence}") for needle in hidden]
    room = tokens - len(head) - sum(map(len, sentences))
    if room < 1:
        raise ValueError(f"tokens: expected room for {needles} needles, got {tokens}")
    body = [book[i % len(book)] for i in range(room + rest)]
    cuts = [room * i // max(1, needles - 1) for i in range(needles)]
    ids = list(head)
    for begin, end, sentence in zip([0, *cuts], cuts, sentences, strict=False):
        ids += [*body[begin:end], *sentence]
    turns = []
    for needle in hidden:
        question = f"\n\n{needle.question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        turns.append((encode(question), encode(f"{needle.sentence}<|eot_id|>")))
    return Text(ids, turns, body[room:])


def judge(model: Any, cache: Any, text: Text) -> tuple[int, float]:
    """(needles whose sentence greedy decoding gives, perplexity of the rest); the cache is as before afterwards."""
    found = 0
    for question, answer in text.turns:
        logits = _after(model, cache, question + answer)[-len(answer) - 1 : -1]
        found += logits.argmax(-1).tolist() == answer
    logits = _after(model, cache, text.rest)[:-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(text.rest[1:]))
    return found, math.exp(float(loss))


def _after(model: Any, cache: Any, ids: list[int]) -> Tensor:
    """float32 logits `[n, vocabulary]` of ids that follow what the cache holds."""
    cache = copy.deepcopy(cache)
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=True, **{_compat.cache_name(): cache}).logits[0].float()


def read(model: Any, ids: list[int], kv: str) -> Any:
    """A cache that has read the ids."""
    from llama1m_ext import LongCache

    cache = LongCache(kv=kv)
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=True, logits_to_keep=1, **{_compat.cache_name(): cache})
    return cache


def rounded(cache: Any, variant: Variant) -> Any:
    """A copy of a dense cache whose keys and values are as the variant would give them back."""
    made = copy.deepcopy(cache)
    for layer in made.layers:
        keys, values = layer.keys.clone(), layer.values.clone()
        end = GROUP + (keys.shape[2] - 2 * GROUP) // GROUP * GROUP
        for x, how in ((keys, variant.k), (values, variant.v)):
            x[:, :, GROUP:end] = how(x[:, :, GROUP:end].float()).to(x.dtype)
        layer.keys, layer.values = keys, values
    return made


def quality(
    tokens: int = 16384, needles: int = 20, rest: int = 1024, seed: int = 0, keys: int = 4096
) -> list[dict[str, Any]]:
    """A row for each variant: bytes per token of a Llama-3-8B layer, errors, needles found, perplexity.

    Errors are of one query on `keys` keys made like Llama's (`kv.llama_like`), and on the demo model's own keys and values.
    """
    import transformers

    from llama1m_ext.demo import MODEL_PATH

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(MODEL_PATH))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), dtype=torch.bfloat16)
    text = text_of(tokenizer, tokens, needles, rest, seed)
    dense = read(model, text.ids, "model")
    k, v = llama_like(8, keys, 128, torch.float32)
    q = torch.empty(8, 4, 128).normal_(generator=torch.Generator().manual_seed(1))
    rows: list[dict[str, Any]] = []
    for variant in variants():
        name = variant.name.split(" ")[0].rstrip(":")
        shipped = SHIPPED.get(name) if "shipped" in variant.name or name == "bf16" else None
        cache = read(model, text.ids, shipped) if shipped else rounded(dense, variant)
        found, perplexity = judge(model, cache, text)
        score, out = errors(variant, q, k[0], v[0])
        own = [errors(variant, _queries(layer), layer.keys[0], layer.values[0])[1] for layer in dense.layers]
        rows.append(
            {
                "name": variant.name,
                "shipped": shipped,
                "bytes_per_token": variant.token_bytes(8, 128),
                "score_error": score,
                "out_error": out,
                "demo_out_error": max(own),
                "found": found,
                "needles": needles,
                "perplexity": perplexity,
            }
        )
        print(line(rows[-1], rows[0]["perplexity"]), flush=True)
    return rows


def _queries(layer: Any) -> Tensor:
    """Queries that look for some of the layer's own keys: 4 a head, `[kv_heads, 4, head_dim]`."""
    keys = layer.keys[0].float()
    at = torch.linspace(0, keys.shape[1] - 1, 6).long()[1:-1]
    return keys[:, at] - keys.mean(1, keepdim=True)


HEADER = f"  {'variant':<46} {'B/token':>8} {'scores':>8} {'output':>8} {'demo':>8} {'needles':>8} {'perplexity':>11} {'change':>8}"


def line(row: dict[str, Any], base: float) -> str:
    """A row of `quality` as text; `base` is the perplexity in bf16."""
    change = (row["perplexity"] / base - 1) * 100
    return (
        f"  {row['name']:<46} {row['bytes_per_token']:8.0f} {row['score_error']:8.4f} {row['out_error']:8.4f}"
        f" {row['demo_out_error']:8.4f} {row['found']:>4}/{row['needles']:<3} {row['perplexity']:11.4f} {change:+7.2f}%"
    )
