"""Attention over your own tensors: a chunk against a history, the history in parts and merged, and in pages.

python examples/03_ops.py [KV_LEN]
"""

import math
import sys

import torch

from llama1m_ext import ops

kv_len = int(sys.argv[1]) if len(sys.argv) > 1 else 65536
q_heads, kv_heads, head_dim, q_len = 8, 2, 128, 64
torch.manual_seed(0)
q = torch.randn(1, q_heads, q_len, head_dim, dtype=torch.bfloat16)
k = torch.randn(1, kv_heads, kv_len, head_dim, dtype=torch.bfloat16)
v = torch.randn(1, kv_heads, kv_len, head_dim, dtype=torch.bfloat16)

# The queries are the last q_len positions: q_start defaults to kv_len - q_len. No mask, no repeated heads.
whole, whole_lse = ops.attention(q, k, v, causal=True, return_lse=True)
print("whole history:", tuple(whole.shape), "lse", tuple(whole_lse.shape))

# Any partition of the keys gives partials, and one merge joins them: two devices, two files, two moments.
# The first part ends before the first query, so nothing in it is hidden: causal=False.
cut = kv_len // 2
far, far_lse = ops.attention(q, k[:, :, :cut], v[:, :, :cut], causal=False, return_lse=True)
near, near_lse = ops.attention(q, k[:, :, cut:], v[:, :, cut:], causal=True, return_lse=True)
merged, merged_lse = ops.merge_partials([far, near], [far_lse, near_lse])
apart = (merged.float() - whole.float()).abs().max().item()
print(f"two halves merged: at most {apart:.1e} from the whole")
# Each partial was rounded to bf16 (a relative 2^-8) before the merge.
assert apart < 2**-6 * whole.float().abs().max().item()
assert torch.allclose(merged_lse, whole_lse, atol=1e-3)

# A cache in pages of its own memory, the last one partly used. What is unused may hold anything, NaN included.
page_size = 1000
count = math.ceil(kv_len / page_size)
k_pages = [torch.full((1, kv_heads, page_size, head_dim), math.nan, dtype=torch.bfloat16) for _ in range(count)]
v_pages = [torch.full((1, kv_heads, page_size, head_dim), math.nan, dtype=torch.bfloat16) for _ in range(count)]
for i in range(count):
    here = slice(i * page_size, min((i + 1) * page_size, kv_len))
    k_pages[i][:, :, : here.stop - here.start] = k[:, :, here]
    v_pages[i][:, :, : here.stop - here.start] = v[:, :, here]
paged = ops.attention(q, k_pages, v_pages, kv_len=kv_len)
apart = (paged.float() - whole.float()).abs().max().item()
print(f"{count} pages of {page_size}: at most {apart:.1e} from the whole")
assert apart < 2**-6 * whole.float().abs().max().item()
