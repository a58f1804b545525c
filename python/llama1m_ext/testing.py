"""Tiny checkpoints and yardsticks for tests.

Weights of q, k, v and o have a spread of 0.15: with transformers' 0.02, attention is nearly uniform, and ignored padding
or a wrong offset would pass unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .convert_tokenizer import CHAT_TEMPLATE
from .formats import GROUP, Compact, Side, name_of, width

SPREAD = 0.15
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer (256 bytes and Llama-3's special tokens) with Llama-3's chat template.

    Returns:
        A `transformers.PreTrainedTokenizerFast`, made in memory.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, inner.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token="<|end_of_text|>",
        model_max_length=1_048_576,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(**changes: Any) -> Any:
    """A `LlamaConfig` of 2 layers, 4 query heads on 2 kv heads, head_dim 16, with a long-context theta.

    Args:
        changes: fields to set otherwise; `rope_theta` and `rope_scaling` are understood in both 4.x and 5.x.
    """
    from transformers import LlamaConfig

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1_048_576,
        "rope_theta": 500_000.0,
        "bos_token_id": 256,
        "eos_token_id": 257,
        **changes,
    }
    return LlamaConfig(**fields)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random `LlamaForCausalLM` in evaluation mode, whose attention is far from uniform.

    Args:
        seed: of the weights.
        dtype: of the weights.
        changes: as in `tiny_config`.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if "embed" in name else SPREAD))
    # Not `.to(dtype)`: it would cast inv_freq as well, which from_pretrained(dtype=...) does not.
    inv_freq = model.model.rotary_emb.inv_freq
    model = model.to(dtype)
    model.model.rotary_emb.inv_freq = inv_freq
    return model


def tiny_checkpoint(path: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Saves `tiny_model` and `tiny_tokenizer` as a checkpoint that `from_pretrained` loads.

    Args:
        path: a directory, made if it is not there.
        seed, dtype, changes: as in `tiny_model`.

    Returns:
        The directory.
    """
    path = Path(path)
    model = tiny_model(seed, dtype, **changes)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids, int64 `[batch, length]`, without special ones."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, truth: Tensor) -> float:
    """Root mean square of `ours - truth`, in float64. A NaN anywhere gives NaN, which no bound admits."""
    return (ours.double() - truth.double()).pow(2).mean().sqrt().item()


def assert_no_worse(ours: Tensor, yardstick: Tensor, truth: Tensor, factor: float = 1.0) -> None:
    """Our error against float64 is at most `factor` times the yardstick's.

    Raises:
        AssertionError: with both errors.
    """
    mine, theirs = error(ours, truth), error(yardstick, truth)
    assert mine <= factor * theirs, f"error against float64: {mine:.3e}, expected at most {factor} x {theirs:.3e}"


def compact_reference(x: Tensor, name: str, which: str) -> Compact:
    """What `ops.kv_append` makes of x `[batch, kv_heads, tokens, head_dim]`, written plainly in torch.

    Args:
        name: "int8", "int4" or "fp8".
        which: "k" (a scale for each channel of 64 tokens) or "v" (for each 64 channels of a token).
    """
    batch, heads, tokens, head_dim = x.shape
    wide, low, top = width(head_dim), *{"int8": (-128, 255), "int4": (-8, 15), "fp8": (-448, 896)}[name]
    x = x.float()
    groups = -(-tokens // GROUP) if which == "k" else wide // GROUP
    codes = torch.zeros(batch, heads, tokens, wide)
    params = torch.zeros(
        batch, heads, *((groups, 2 * wide) if which == "k" else (2 * groups, tokens)), dtype=torch.float16
    )
    for g in range(groups):
        rows, channels = slice(g * GROUP, (g + 1) * GROUP), slice(0, head_dim)
        if which == "v":
            rows, channels = slice(0, tokens), slice(g * GROUP, min((g + 1) * GROUP, head_dim))
        part = x[:, :, rows, channels]
        axis = 2 if which == "k" else 3
        least, most = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
        scale = ((most - least) / top).half()
        offset = (least - low * scale.float()).half()
        # Outside float16, or not a number: not a number, never a wrong one.
        bad = ~(part.isfinite().all(axis, keepdim=True) & offset.isfinite() & scale.isfinite())
        offset = torch.where(bad, torch.nan, offset)
        scale = torch.where(bad, 0, scale)
        code = torch.where(scale == 0, 0, (part - offset.float()) / scale.float()).nan_to_num(0)
        code = code.clamp(low, low + top)
        code = code.to(torch.float8_e4m3fn).float() if name == "fp8" else code.round()
        codes[:, :, rows, channels] = code
        if which == "k":
            params[:, :, g, :head_dim], params[:, :, g, wide : wide + head_dim] = scale.squeeze(2), offset.squeeze(2)
        else:
            params[:, :, g], params[:, :, groups + g] = scale.squeeze(3), offset.squeeze(3)
    if name == "int4":
        codes = (codes + 8).to(torch.uint8)
        if which == "v":
            low, high = codes.unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)
            return Compact((low | high << 4).flatten(-2), params)
        # Units of 8 channels: 0 2 4 6 1 3 5 7 from the lowest bit on.
        units = codes.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].unflatten(-1, (4, 2))
        codes = (units[..., 0] | units[..., 1] << 4).flatten(-2)
    else:
        codes = codes.to(torch.int8 if name == "int8" else torch.float8_e4m3fn)
    if which == "k":
        codes = _turn(codes.view(torch.uint8), groups).view(codes.dtype)
    return Compact(codes, params)


def _turn(rows: Tensor, groups: int) -> Tensor:
    """Keys' bytes `[batch, kv_heads, tokens, row]` as they lie in a page, `[batch, kv_heads, groups, 64 * row]`; tokens that
    are missing from the last group are 0."""
    batch, heads, tokens, row = rows.shape
    whole = torch.zeros(batch, heads, groups * GROUP, row, dtype=rows.dtype)
    whole[:, :, :tokens] = rows
    return (
        whole.view(batch, heads, groups, GROUP, row // 4, 4).transpose(3, 4).reshape(batch, heads, groups, GROUP * row)
    )


def dense_reference(side: Side, which: str, head_dim: int) -> Tensor:
    """What a page's K or V stands for, `scale * code + offset`: float64 `[batch, kv_heads, tokens, head_dim]`; of compact
    keys, whole groups of tokens."""
    if not isinstance(side, Compact):
        return side.double()
    codes, params, name = side.codes.view(torch.uint8), side.params.double(), name_of(side)
    if which == "k":
        batch, heads, groups, size = codes.shape
        codes = codes.view(batch, heads, groups, size // GROUP // 4, GROUP, 4).transpose(3, 4)
        codes = codes.reshape(batch, heads, groups * GROUP, size // GROUP)
    if name != "int4":
        values = codes.contiguous().view(side.codes.dtype).double()
    elif which == "v":
        halves = codes.unflatten(-1, (-1, GROUP // 2))
        values = torch.stack([halves & 15, halves >> 4], -2).flatten(-3).double() - 8
    else:
        halves = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).unflatten(-1, (-1, 8))
        values = halves[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2).double() - 8
    if which == "k":
        scale, offset = params.repeat_interleave(GROUP, 2).chunk(2, -1)
    else:
        scale, offset = params.repeat_interleave(GROUP, 2).transpose(2, 3).chunk(2, -1)
    return (values * scale + offset)[..., :head_dim]
