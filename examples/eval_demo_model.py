"""Twenty needles in one long text: the demo model reads it once and is asked for each of them.

    python examples/eval_demo_model.py --tokens 131072 --seed 1

The needles have different keys and stand at equal distances from the beginning to the end. The text is the book from a
random place on (from its beginning with --seed 0). An answer counts when greedy decoding gives the needle's sentence and
then the end of the turn; "least probability" is that of the answer's least probable token: far above 0.9, sampling
gives the same.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
import transformers

import llama1m_ext  # noqa: F401  (this import is the whole integration)
from llama1m_ext.demo import MODEL_PATH
from llama1m_ext.demo.book import load_book
from llama1m_ext.demo.needle import SYSTEM, draw_needles


def main() -> None:
    """Prints how many needles were found, where those stood that were not, and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_PATH))
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, torch_dtype=torch.bfloat16)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    book = encode(load_book())
    start = random.Random(args.seed).randrange(len(book)) if args.seed else 0
    needles = draw_needles(args.seed, args.needles)
    head = encode(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    )
    sentences = [encode(f" {needle.sentence}") for needle in needles]
    room = args.tokens - len(head) - sum(map(len, sentences)) - 64
    text = [book[(start + i) % len(book)] for i in range(room)]
    cuts = [room * i // (len(needles) - 1) for i in range(len(needles))]
    ids = list(head)
    for begin, end, sentence in zip([0, *cuts], cuts, sentences, strict=False):
        ids += [*text[begin:end], *sentence]

    with torch.inference_mode():
        began = time.perf_counter()
        cache = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
        seconds = time.perf_counter() - began
        least, lost = 1.0, []
        for i, needle in enumerate(needles):
            question = f"\n\n{needle.question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            answer = encode(f"{needle.sentence}<|eot_id|>")
            turn = torch.tensor([encode(question) + answer])
            logits = model(turn, past_key_values=cache, use_cache=True).logits[0, -len(answer) - 1 : -1].float()
            cache.crop(-turn.shape[1])
            chances = logits.softmax(-1)[range(len(answer)), answer]
            least = min(least, chances.min().item())
            if logits.argmax(-1).tolist() != answer:
                lost.append(f"{i / (len(needles) - 1):.2f}")
    print(
        f"{len(ids):,} tokens, seed {args.seed}: {len(needles) - len(lost)} of {len(needles)} found"
        f"{', lost at depth ' + ' '.join(lost) if lost else ''}; least probability {least:.3f}; prefill {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
