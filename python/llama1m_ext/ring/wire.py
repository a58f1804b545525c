"""What a block of keys and values is on its way: dense, or compact as `formats` has it, made so once, by the rank that holds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..formats import KvFormat, Page, empty

__all__ = ["arrived", "leaving", "room"]


def leaving(form: KvFormat, k: Tensor, v: Tensor) -> Page:
    """A rank's own block as the others get it: the same bits for all of them, and in every pass.

    Args:
        k, v: `[batch, kv_heads, n, head_dim]`. All of their tokens have a part in the scales, whoever sees them.
    """
    if form.is_model:
        return Page(k.contiguous(), v.contiguous())
    page = room(form, k.shape, k)
    if k.shape[2]:
        ops.kv_append(k, v, page, 0)
    return page


def room(form: KvFormat, shape: Sequence[int], like: Tensor) -> Page:
    """Memory for a block of another rank, not initialised.

    Args:
        shape: `[batch, kv_heads, tokens, head_dim]`.
        like: for the device, and the dtype of what is dense.
    """
    batch, heads, tokens, head_dim = shape
    sizes = batch, heads, tokens, head_dim
    return Page(empty(form.k, "k", sizes, like), empty(form.v, "v", sizes, like))


def arrived(page: Page, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values to compute on, `[batch, kv_heads, tokens, head_dim]` each, in the dtype."""
    if isinstance(page.k, Tensor) and isinstance(page.v, Tensor):
        return page.k, page.v
    return ops.kv_read(page, 0, page.size, head_dim, dtype)
