"""Ten questions about one book: it is read once, and each further question takes a moment.

    python examples/05_ask_a_book.py [TOKENS [MODEL]]

TOKENS of six novels of Jane Austen, 65536 by default, with ten numbers hidden in them. MODEL is a path or a name on
the hub; the default is the small model of `llama1m demo`, which finds numbers and knows little else.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import llama1m_ext
from llama1m_ext.demo.book import load_book
from llama1m_ext.demo.needle import SYSTEM, draw_needles, find_value, hide

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 65_536
model_id = sys.argv[2] if len(sys.argv) > 2 else str(Path(llama1m_ext.__file__).parent / "demo" / "model")

pipeline = transformers.pipeline(
    "text-generation", model=model_id, model_kwargs={"torch_dtype": torch.bfloat16}, device_map="auto"
)

# A book of so many tokens, and ten numbers in it.
book = load_book()
offsets = pipeline.tokenizer(book[: 6 * tokens], return_offsets_mapping=True)["offset_mapping"]
book = book[: offsets[min(tokens, len(offsets) - 1)][0]]
needles = draw_needles(seed=5, count=10)
for i, needle in enumerate(needles):
    book = hide(book, needle, i / 10)

with tempfile.TemporaryDirectory() as folder:
    # The one line that this is about. With a folder of your own, tomorrow's questions don't read the book either.
    llama1m_ext.remember(pipeline, folder)

    seconds, right = [], 0
    for needle in needles:
        # What is the same in all prompts comes first: the book, then the question.
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{book}\n\n{needle.question}"},
        ]
        begin = time.perf_counter()
        (answer,) = pipeline(messages, max_new_tokens=32, do_sample=False)
        seconds.append(time.perf_counter() - begin)
        text = answer["generated_text"][-1]["content"]
        right += find_value(text) == needle.value
        print(f"{seconds[-1]:6.2f} s   {needle.question}   {text}")

    stats = llama1m_ext.stats(pipeline)
    others = sorted(seconds[1:])[4]
    print(
        f"{right} of 10 right. Tokens computed: {stats.computed:,}; taken from what was read before: {stats.reused:,}"
    )
    print(
        f"the first question took {seconds[0]:.2f} s, the others {others:.2f} s: {seconds[0] / others:.0f} times less"
    )
    print(f"{llama1m_ext.forget(pipeline)} prompt was kept")
