"""A model of Llama-3-8B-Instruct-1048k's shape with random weights made on the card, and a byte-level tokenizer: nothing is
downloaded, and times do not depend on what the weights say."""

from __future__ import annotations

import time
from typing import Any

import torch

from .machine import Machine

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1048576,
}
DRY = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1048576,
}
THETA = 3580165449.0


def build(machine: Machine, layers: int | None = None, attn: str | None = None) -> Any:
    """The model, in bfloat16, on the device. attn: what stock transformers is to use; None: its default."""
    import transformers

    shape = dict(DRY if machine.dry else SHAPE)
    if layers:
        shape["num_hidden_layers"] = layers
    more: dict[str, Any] = {"attn_implementation": attn} if attn else {}
    rope = {"rope_type": "default", "rope_theta": THETA}
    five = int(transformers.__version__.split(".")[0]) >= 5
    more |= {"rope_parameters": rope} if five else {"rope_theta": THETA}
    config = transformers.LlamaConfig(
        **shape,
        **more,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(machine.device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def prompt_of(tokenizer: Any, tokens: int) -> str:
    """A text that the model card's chat template makes into so many tokens (a byte is a token here, a special token too)."""
    words = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    )

    def made(text: str) -> str:
        messages = [
            {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
            {"role": "user", "content": text},
        ]
        prompt: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return prompt

    around = len(tokenizer(made("x"), add_special_tokens=False)["input_ids"]) - 1
    if tokens <= around:
        raise ValueError(f"tokens: expected more than the {around} of the template, got {tokens}")
    text = (words * ((tokens - around) // len(words) + 1))[: tokens - around].rstrip()
    text += "." * (tokens - around - len(text))
    return made(text)


class Clock:
    """A logits processor that notes when each new token's scores are there."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.start = time.perf_counter()
        self.moments: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.machine.wait()
        self.moments.append(time.perf_counter() - self.start)
        return scores

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.moments[0]

    @property
    def each(self) -> float:
        """Seconds of a later token: the median, without the first two."""
        from statistics import median

        gaps = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]
        return median(gaps[2:] if len(gaps) > 4 else gaps)
