"""Training on rows that are spread over processes, in a loop of your own with accelerate: ring attention in each layer.

    torchrun --nproc-per-node 2 examples/11_train_over_processes.py [LENGTH]

A small Llama learns which tokens come at all; LENGTH tokens a row, 2048 by default. One process, without
torchrun, gives the same losses. `llama1m extend --sequence-parallel N` is the same with stages, checkpoints and a plan.
"""

import sys

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from llama1m_ext import train
from llama1m_ext.ring import Layout
from llama1m_ext.ring.training import RingAttention, share

length = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
# Its forward is the loss: that is what wrappers (here DDP, which averages gradients over ranks) have to see.
trainee, optimizer = accelerator.prepare(train.Trainee(model.train()), optimizer)
layout = Layout(sharding="zigzag")

for step in range(8):
    # Every rank makes the whole row, and takes its share of it.
    generator = torch.Generator().manual_seed(step)
    row = torch.randint(0, 16, (1, 64), generator=generator).repeat(1, length // 64 + 1)[:, :length]
    mine = share(layout, row.to(accelerator.device))
    how = train.How(attention=RingAttention(layout, length))
    loss = trainee(mine.input_ids, mine.labels, None, mine.position_ids, how=how, denominator=mine.denominator)
    # Losses of shares add up to the row's; DDP takes the mean, so each is multiplied by their number.
    accelerator.backward(loss * layout.world_size)
    norm = accelerator.clip_grad_norm_(trainee.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total = accelerator.reduce(loss.detach(), "sum")
    accelerator.print(f"step {step + 1}: loss {total.item():.4f}, gradient norm {norm.item():.3f}")
accelerator.end_training()
