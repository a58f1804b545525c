"""Makes the demo model's tokenizer: Llama-3's pre-tokenizer, special tokens and chat template on a vocabulary of 3072."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 3072
MAX_LEN = 1_048_576
# The 16 places after the base vocabulary, in Llama-3's order (there are 256 of them in Llama-3).
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 11)),
]
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _bytelevel(text: str) -> str:
    """`text` in the byte-level alphabet of the vocabulary (a space is Ġ)."""
    return "".join(
        piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )


def make_tokenizer(text: str, words: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `text`.

    Every group of one to three digits and each of `words` (a leading space counts) is one token: they are put into the
    vocabulary as they are, and `ignore_merges` (Llama-3 has it too) takes a pre-token that is in the vocabulary whole.
    """
    whole = [f"{i:0{n}d}" for n in (2, 3) for i in range(10**n)] + [_bytelevel(word) for word in words]
    base_size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Words that the merges make anyway take no second place: train a few more and stop at the size.
    learner.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=base_size, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    vocab = {token: i for i, token in enumerate(sorted(alphabet))}
    whole_left = set(whole) - set(vocab)
    merges = []
    for left, right in (pair if isinstance(pair, list) else pair.split(" ") for pair in learned["merges"]):
        token = left + right
        if len(vocab) + len(whole_left - {token}) + (token not in vocab) > base_size:
            break
        merges.append((left, right))
        vocab.setdefault(token, len(vocab))
        whole_left.discard(token)
    for token in whole:
        vocab.setdefault(token, len(vocab))
    while len(vocab) < base_size:  # a text too small to fill it: places that stand for nothing
        vocab[f"<unused_{len(vocab)}>"] = len(vocab)

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers 4.57 and 5 both read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    config = {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        **names,
        "chat_template": LLAMA3_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_LEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
