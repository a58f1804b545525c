"""The model card's model over several processes: each holds a share of the context, and all give the same answer.

    torchrun --nproc-per-node 2 examples/10_several_processes.py [TOKENS [MODEL]]

TOKENS of six novels of Jane Austen, 32768 by default, with a number hidden in them. MODEL is a path or a name on the hub; the
default is the small model of `llama1m demo`.
"""

import os
import sys
from pathlib import Path

import torch
import transformers

import llama1m_ext
from llama1m_ext.demo.book import load_book
from llama1m_ext.demo.needle import SYSTEM, draw_needles, hide

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 32_768
model_id = sys.argv[2] if len(sys.argv) > 2 else str(Path(llama1m_ext.__file__).parent / "demo" / "model")
local_rank = int(os.environ["LOCAL_RANK"])
device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"

pipeline = transformers.pipeline(
    "text-generation", model=model_id, model_kwargs={"torch_dtype": torch.bfloat16}, device_map={"": device}
)
# The one line that this is about.
layout = llama1m_ext.distributed(pipeline)

book = load_book()
offsets = pipeline.tokenizer(book[: 6 * tokens], return_offsets_mapping=True)["offset_mapping"]
(needle,) = draw_needles(seed=7, count=1)
book = hide(book[: offsets[min(tokens, len(offsets) - 1)][0]], needle, 0.4)
messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{book}\n\n{needle.question}"}]

(answer,) = pipeline(messages, max_new_tokens=32, do_sample=False)
text = answer["generated_text"][-1]["content"]
sent = sum(layout.links.sent.values()) / 2**20
print(
    f"rank {layout.rank} of {layout.world_size}, {sent:.1f} MiB sent: {needle.question} {text} (it is {needle.value})\n",
    end="",  # one write: lines of several processes don't mix
)
