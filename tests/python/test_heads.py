"""Llama with other heads than a language model's: all of them go through `LlamaModel.forward`, and so through ours."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import pipeline

import llama1m_ext
from conftest import assert_near, stock
from llama1m_ext import testing

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]


def made(head: str, dtype: torch.dtype = torch.float32):
    config = testing.tiny_config(num_labels=2 if head == "QuestionAnswering" else 3, pad_token_id=258)
    model = getattr(transformers, f"LlamaFor{head}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * testing.SPREAD)
    return model.to(dtype)


def outputs(found) -> list[torch.Tensor]:
    names = ("logits", "start_logits", "end_logits")
    return [getattr(found, name) for name in names if getattr(found, name, None) is not None]


def padded(n: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = testing.random_ids(3, n), torch.ones(3, n, dtype=torch.long)
    hidden = {"left": slice(0, n // 3), "right": slice(n - n // 3, n), "none": slice(0, 0)}[side]
    mask[1, hidden] = 0
    ids[1, hidden] = 258
    return ids, mask


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("chunk", ["auto", 16])
def test_against_stock(head, side, chunk):
    model = made(head)
    llama1m_ext.set_options(model, chunk=chunk)
    ids, mask = padded(50, side)
    with torch.no_grad():
        ours = outputs(model(ids, attention_mask=mask))
        with stock():
            theirs = outputs(model(ids, attention_mask=mask))
    assert len(ours) == len(theirs) == (2 if head == "QuestionAnswering" else 1)
    for a, b in zip(ours, theirs, strict=True):
        seen = mask.bool() if a.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(a[seen], b[seen], rtol=2e-4, atol=2e-4)
    found = llama1m_ext.stats(model)
    assert found.served and not found.stock
    assert bool(found.layer_major) == (chunk == 16)


@pytest.mark.parametrize("head", HEADS)
def test_one_row_depends_on_its_own_tokens_only(head):
    """What a head says of a padded row is what it says of the row alone; the oracle that stock is may be wrong itself."""
    model = made(head)
    ids, mask = padded(50, "left")
    with torch.no_grad():
        batch = outputs(model(ids, attention_mask=mask))
        alone = outputs(model(ids[1:2, 16:]))
    for a, b in zip(batch, alone, strict=True):
        row = a[1:2, 16:] if a.shape[:2] == mask.shape else a[1:2]
        torch.testing.assert_close(row, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("head", HEADS)
def test_labels_and_hidden_states(head):
    model = made(head)
    ids, mask = padded(40, "right")
    labels = {
        "SequenceClassification": {"labels": torch.tensor([0, 1, 2])},
        "TokenClassification": {"labels": torch.arange(120).view(3, 40) % 3},
        "QuestionAnswering": {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])},
    }[head]
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, output_hidden_states=True, **labels)
        with stock():
            theirs = model(ids, attention_mask=mask, output_hidden_states=True, **labels)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=2e-4, atol=2e-4)
    assert llama1m_ext.stats(model).served


@pytest.mark.parametrize("head", HEADS)
def test_training_takes_a_right_path(head):
    """Gradients are our attention's, within rounding of stock's."""
    model = made(head).train()
    ids, _ = padded(20, "none")
    found = []
    for off in (False, True):
        model.zero_grad()
        torch.manual_seed(0)  # a classifier has a dropout of its own
        if off:
            with stock():
                sum(x.float().square().sum() for x in outputs(model(ids))).backward()
        else:
            sum(x.float().square().sum() for x in outputs(model(ids))).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_near(*found)
    assert llama1m_ext.stats(model).served and not llama1m_ext.stats(model).stock


def test_bfloat16_is_no_worse():
    model = made("SequenceClassification", torch.bfloat16)
    ids, mask = padded(60, "left")
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        with stock():
            theirs = model(ids, attention_mask=mask).logits
            truth = model.double()(ids, attention_mask=mask).logits
    testing.assert_no_worse(ours, theirs, truth, factor=1.5)


def test_pipeline(tmp_path):
    """`pipeline("text-classification")` over texts of different lengths, which are padded."""
    made("SequenceClassification").save_pretrained(tmp_path)
    tokenizer = testing.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    texts = ["The sea was calm.", "A ship sailed on, and nobody knew where it would go.", "No."]
    classify = pipeline("text-classification", model=str(tmp_path), batch_size=3, dtype=torch.float32)
    classify.model.config.pad_token_id = tokenizer.pad_token_id
    ours = classify(texts)
    assert llama1m_ext.stats(classify).served
    with stock():
        theirs = classify(texts)
    for a, b in zip(ours, theirs, strict=True):
        assert a["label"] == b["label"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
