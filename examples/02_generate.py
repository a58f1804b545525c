"""The model card's generate() snippet, word for word after the imports: only `import llama1m_ext` is added.

    python examples/02_generate.py [MODEL]

MODEL is a path or a name on the hub; the default is the small model of `llama1m demo`, which answers little but runs
anywhere. transformers 5 by itself stops at this snippet with an AttributeError (its apply_chat_template returns a
mapping now); with llama1m_ext it runs as it stands.
"""

import sys
from pathlib import Path

import llama1m_ext

model_id = sys.argv[1] if len(sys.argv) > 1 else str(Path(llama1m_ext.__file__).parent / "demo" / "model")

# --- the model card ---
from transformers import AutoTokenizer, AutoModelForCausalLM
import torch

tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    torch_dtype=torch.bfloat16,
    device_map="auto",
)

messages = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": "Who are you?"},
]

input_ids = tokenizer.apply_chat_template(
    messages,
    add_generation_prompt=True,
    return_tensors="pt"
).to(model.device)

terminators = [
    tokenizer.eos_token_id,
    tokenizer.convert_tokens_to_ids("<|eot_id|>")
]

outputs = model.generate(
    input_ids,
    max_new_tokens=256,
    eos_token_id=terminators,
    do_sample=True,
    temperature=0.6,
    top_p=0.9,
)
response = outputs[0][input_ids.shape[-1]:]
print(tokenizer.decode(response, skip_special_tokens=True))
