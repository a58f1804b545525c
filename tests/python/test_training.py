"""Training-time use: gradients are our attention's, within rounding of stock's, and what follows without gradients goes by
the weights as they are then."""

from __future__ import annotations

import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer, TrainingArguments

import llama1m_ext
from conftest import assert_near, stock
from llama1m_ext import testing


@pytest.fixture(autouse=True)
def _apart(one_thread, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    # accelerate keeps what the first Trainer asked for, bfloat16 for one, for all that come after it.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def made(**changes):
    return testing.tiny_model(**changes)


def stock_reasons(model) -> set[str]:
    return set(llama1m_ext.stats(model, reset=True).stock)


def both(run):
    """What `run` gives with us and without."""
    ours = run()
    with stock():
        return ours, run()


def near_weights(a, b, share=2e-4) -> None:
    assert_near(a.state_dict().values(), b.state_dict().values(), share)


def rows() -> list[dict[str, list[int]]]:
    lengths = (9, 14, 20, 5, 17, 11, 20, 8)
    return [{"input_ids": testing.random_ids(1, n, seed=n)[0].tolist()} for n in lengths]


def trained(tmp_path, collator, **arguments):
    torch.manual_seed(0)
    model = made()
    given = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "seed": 0, "report_to": "none"}
    given |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, **arguments}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **given),
        train_dataset=rows(),
        data_collator=collator,
    )
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def padding(side: str) -> DataCollatorForLanguageModeling:
    tokenizer = testing.tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"label_smoothing_factor": 0.1}]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_trainer(tmp_path, side, arguments):
    if arguments and side == "left":
        arguments = {**arguments, "gradient_accumulation_steps": 2}
    (model, losses), (other, others) = both(lambda: trained(tmp_path, padding(side), **arguments))
    share = (
        3e-2 if arguments.get("bf16") else 2e-3
    )  # six steps of AdamW, which takes the sign of what is nearly nothing
    assert losses == pytest.approx(others, rel=share)
    assert losses[-1] < losses[0]
    near_weights(model, other, 0.3 if arguments.get("bf16") else 2e-2)
    assert llama1m_ext.stats(model).served >= 2 * 6
    assert not stock_reasons(model)
    model.eval()
    with torch.no_grad():
        model(testing.random_ids(1, 20))
    assert llama1m_ext.stats(model).served == 2


def test_trainer_over_packed_rows(tmp_path):
    """`DataCollatorWithFlattening`: one row of several, told apart by positions that begin again. A loss that looks across
    them falls as well: what is compared is stock's, and each row alone."""
    collator = DataCollatorWithFlattening(return_tensors="pt")
    (model, losses), (other, others) = both(lambda: trained(tmp_path, collator))
    # Packed rows are stock's; those that a cache hides from 4.57 are not.
    assert losses == pytest.approx(others, rel=2e-3)
    near_weights(model, other, 2e-2)
    batch = {key: value for key, value in collator(rows()[:3]).items() if isinstance(value, torch.Tensor)}
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(torch.tensor([row["input_ids"]]), use_cache=False).logits for row in rows()[:3]]
        with stock():
            theirs = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-3, atol=1e-3)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6):  # with older ones stock looks across the rows
        assert torch.equal(packed, theirs)
    assert "position_ids are packed sequences" in stock_reasons(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_and_dropout(reentrant, dropout):
    def run():
        model = made(attention_dropout=dropout).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        torch.manual_seed(1)
        ids = testing.random_ids(2, 24)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model

    ours, theirs = both(run)
    assert_near([p.grad for p in ours.parameters()], [q.grad for q in theirs.parameters()], 0 if dropout else 2e-4)
    found = llama1m_ext.stats(ours)
    assert (set(found.stock) == {"training with dropout"}) if dropout else (found.served and not found.stock)


def test_accelerator():
    from accelerate import Accelerator

    def run():
        model = made().train()
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        for seed in range(3):
            ids = testing.random_ids(2, 16, seed=seed)
            loss = wrapped(ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return accelerator.unwrap_model(wrapped)

    ours, theirs = both(run)
    near_weights(ours, theirs)
    assert llama1m_ext.stats(ours).served == 6


def test_loss_without_gradients_is_ours():
    model = made()
    ids = testing.random_ids(2, 40)
    labels = ids.clone()
    labels[:, :7] = -100
    for chunk in ("auto", 16):
        llama1m_ext.set_options(model, chunk=chunk)
        with torch.no_grad():
            ours = model(ids, labels=labels)
            with stock():
                theirs = model(ids, labels=labels)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    found = llama1m_ext.stats(model)
    assert found.served
    assert not found.stock


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_train_mode_without_gradients_is_ours(mode):
    """RLHF's rollouts and many an evaluation loop leave `train()` on: with no dropout there is nothing to differ."""
    model = made().train()
    ids = testing.random_ids(2, 20)
    with mode():
        ours = model(ids).logits
        with stock():
            theirs = model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert llama1m_ext.stats(model).served == 2


def test_training_and_generating_in_turn(tmp_path):
    """Weights change under what was kept: a prompt that was remembered, and a cache that was saved, are not taken."""
    model = made()
    llama1m_ext.remember(model, str(tmp_path / "shelf"))
    prompt = testing.random_ids(1, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    for step in range(3):
        ours = model.generate(prompt, **given)
        assert llama1m_ext.stats(model, reset=True).reused == 0, "keys and values of other weights"
        assert torch.equal(ours, model.generate(prompt, **given))
        assert llama1m_ext.stats(model, reset=True).reused > 250
        with stock():
            assert torch.equal(ours, model.generate(prompt, **given))
        model.train()
        ids = testing.random_ids(2, 30, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        assert not stock_reasons(model)


def test_a_frozen_base_with_a_trained_head():
    def run():
        model = made().train()
        model.model.requires_grad_(False)
        ids = testing.random_ids(2, 20)
        model(ids, labels=ids).loss.backward()
        return model

    ours, theirs = both(run)
    assert torch.equal(ours.lm_head.weight.grad, theirs.lm_head.weight.grad) or torch.allclose(
        ours.lm_head.weight.grad, theirs.lm_head.weight.grad, rtol=1e-4, atol=1e-5
    )
    assert llama1m_ext.stats(ours).served == 2, "the body needs no gradients: it is served, and its head is trained"


def test_gradients_of_embeddings_through_a_frozen_model():
    """Prompt tuning's way, and saliency maps'."""

    def run():
        model = made().requires_grad_(False)
        embeds = model.get_input_embeddings()(testing.random_ids(2, 20)).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.square().sum().backward()
        return embeds.grad

    ours, theirs = both(run)
    assert_near([ours], [theirs])


def test_backward_hooks_and_retained_gradients():
    def run():
        model, seen = made().train(), []
        for layer in model.model.layers:
            layer.self_attn.register_full_backward_hook(lambda module, into, out: seen.append(out[0].clone()))
        ids = testing.random_ids(2, 20)
        model(ids, labels=ids).loss.backward()
        return seen

    ours, theirs = both(run)
    assert len(ours) == 2
    assert_near(ours, theirs)


def test_autocast_with_gradients():
    def run():
        model = made().train()
        ids = testing.random_ids(2, 20)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        return model

    ours, theirs = both(run)
    assert_near([p.grad for p in ours.parameters()], [q.grad for q in theirs.parameters()], 5e-2)


DDP = """
import os, sys, time, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
if sys.argv[2] == "ours":
    import llama1m_ext
from llama1m_ext import testing
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
model = testing.tiny_model().train()
wrapped = DistributedDataParallel(model)
ids = testing.random_ids(2, 16, seed=rank)
wrapped(ids, labels=ids).loss.backward()
total = torch.cat([p.grad.flatten() for p in model.parameters()])
with torch.no_grad():
    logits = wrapped(ids).logits
print("SUM", total.double().sum().item(), total.double().square().sum().item())
print("SERVED", llama1m_ext.stats(model).served if sys.argv[2] == "ours" else 0)
time.sleep(0.5)  # for gloo's thread, see test_train_devices.py
dist.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    import os
    import subprocess

    def run(who: str) -> list[list[str]]:
        env = {**os.environ, "LLAMA1M_DISABLE": "0" if who == "ours" else "1", "GLOO_SOCKET_IFNAME": "lo"}
        words = [sys.executable, "-c", DDP]
        ranks = [
            subprocess.Popen(
                [*words, str(rank), who, str(tmp_path / who)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                env=env,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
        return [[line for line in words.splitlines() if line.startswith(("SUM", "SERVED"))] for words in said]

    ours, theirs = run("ours"), run("stock")
    assert ours[0][0] == ours[1][0], "gradients are averaged"
    assert theirs[0][0] == theirs[1][0]
    mine, stock_s = ([float(x) for x in said[0][0].split()[1:]] for said in (ours, theirs))
    assert mine == pytest.approx(stock_s, rel=1e-3)
    assert ours[0][1] == ours[1][1] == "SERVED 4", "two layers with gradients, two without"
    assert theirs[0][1] == "SERVED 0"
