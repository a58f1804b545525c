"""Llama 3's tokenizer: from Meta's `tokenizer.model`, which is in tiktoken's format, to what transformers loads.

Made of the tokenizers library's parts as transformers' TikTokenConverter does it, and to the same tokenizer.json; that one
can't be used, because it reads files through tiktoken, which keeps a copy of them by path in a folder for temporary
files, and returns it for another file of the same path.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from .convert_params import ConvertError

N_SPECIAL = 256
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 cuts text before it merges bytes."""
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama-3-Instruct's."""
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_NAMED = {
    False: {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: EOT},
    True: {
        0: BOS,
        1: EOS,
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: EOT,
        10: "<|python_tag|>",
    },
}


def special_tokens(v31: bool = False) -> list[str]:
    """Llama 3's special tokens in the order of their ids, which follow those of ordinary tokens.

    Args:
        v31: Llama 3.1's, which have names for three that were reserved.
    """
    named, reserved = _NAMED[v31], iter(range(N_SPECIAL))
    return [named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(N_SPECIAL)]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ids from a file in tiktoken's format: a token in base64 and its rank in every line.

    Raises:
        ConvertError: another format, or a file that is damaged.
        OSError: it can't be read.
    """
    data = path.read_bytes()
    if data[:1] == b"\n":  # the first field of a sentencepiece model
        raise ConvertError(f"{path}: expected tiktoken's format, got a sentencepiece model (Llama 2's)")
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        fields = line.split()
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (ValueError, IndexError, binascii.Error):
            token, rank, fields = b"", -1, []
        if len(fields) != 2 or not token:
            raise ConvertError(f"{path}: line {number}: expected a token in base64 and its rank, got {line[:40]!r}")
        if token in ranks or rank in taken:
            what = f"token {token!r}" if token in ranks else f"rank {rank}"
            raise ConvertError(f"{path}: line {number}: expected a new token and a new rank, got {what} again")
        ranks[token] = rank
        taken.add(rank)
    if taken != set(range(len(ranks))):
        gap = next(rank for rank in range(len(ranks)) if rank not in taken)
        raise ConvertError(f"{path}: expected ranks 0 to {len(ranks) - 1} of {len(ranks)} tokens, got no rank {gap}")
    for special in sorted({*special_tokens(False), *special_tokens(True)}):
        if special.encode() in ranks:
            raise ConvertError(
                f"{path}: expected special tokens to have ids of their own, got {special} as an ordinary one"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ConvertError(f"{path}: expected all 256 bytes among {len(ranks)} tokens, got no {bytes(missing[:1])!r}")
    return ranks


def save(ranks: dict[bytes, int], folder: Path, *, v31: bool, instruct: bool, max_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        ranks: from `read_ranks`.
        folder: where to.
        v31: whether special tokens are Llama 3.1's.
        instruct: an answer ends with <|eot_id|>, and there is a chat template.
        max_len: tokens of a prompt, at most.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    special = special_tokens(v31)
    vocab, merges = _merges(ranks)
    inner = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    bos = (BOS, len(ranks))
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1", special_tokens=[bos]),
        ]
    )
    # Not inner.save, whose errors are no OSError.
    (folder / "tokenizer.json").write_text(inner.to_str(pretty=True), encoding="utf-8")
    settings: dict[str, Any] = {
        "added_tokens_decoder": {
            str(len(ranks) + i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, token in enumerate(special)
        },
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOT if instruct else EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if instruct:
        settings["chat_template"] = CHAT_TEMPLATE
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as byte-level BPE writes them. tiktoken merges whichever neighbours make the token of the
    lowest rank: so every two tokens that make a third are a merge, in the order of the third's rank."""
    letters = _letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        made = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(text[a], text[b]) for _, _, a, b in sorted(made)]
    return {text[token]: rank for token, rank in ranks.items()}, merges


def _letters() -> list[str]:
    """A printable character for each byte, as byte-level BPE has it: its own where that is one, else from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
