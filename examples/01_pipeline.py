"""The model card's pipeline snippet, word for word after the imports: only `import llama1m_ext` is added.

    python examples/01_pipeline.py [MODEL]

MODEL is a path or a name on the hub; the default is the small model of `llama1m demo`, which answers little but runs
anywhere.
"""

import sys
from pathlib import Path

import llama1m_ext

model_id = sys.argv[1] if len(sys.argv) > 1 else str(Path(llama1m_ext.__file__).parent / "demo" / "model")

# --- the model card ---
import transformers
import torch

pipeline = transformers.pipeline(
    "text-generation",
    model=model_id,
    model_kwargs={"torch_dtype": torch.bfloat16},
    device_map="auto",
)

messages = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": "Who are you?"},
]

prompt = pipeline.tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=True
)

terminators = [
    pipeline.tokenizer.eos_token_id,
    pipeline.tokenizer.convert_tokens_to_ids("<|eot_id|>")
]

outputs = pipeline(
    prompt,
    max_new_tokens=256,
    eos_token_id=terminators,
    do_sample=True,
    temperature=0.6,
    top_p=0.9,
)
print(outputs[0]["generated_text"][len(prompt):])
