"""Attention, merges and RoPE over torch tensors.

q, k, v are `[batch, heads, len, head_dim]` views with any strides but a contiguous last axis; float32, bfloat16 or
float16. Tensors on the CPU are computed there, on `torch.get_num_threads()` threads; those on an NVIDIA GPU on that GPU,
in torch's current stream, and nothing waits for it. All tensors of a call are on one device, but `inv_freq`, which is on
the CPU. `attention` over dense keys and values, `merge_partials` and `rope_apply` have gradients. Inside `torch.compile`, and
where something needs a gradient, the calls are custom operators (`torch.ops.llama1m_ext`), so that no graph breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import _core, cuda, gradients
from .formats import Compact, Page, Side

__all__ = ["attention", "attention_backward", "kv_append", "kv_read", "merge_partials", "rope_apply"]

Pages = Side | Sequence[Side]
Tensors = Tensor | Sequence[Tensor]
_DEVICES = ("cpu", "cuda")


def attention(
    q: Tensor,
    k: Pages,
    v: Pages,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_start: int | None = None,
    kv_start: Tensor | int | None = None,
    kv_end: Tensor | int | None = None,
    kv_len: int | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention, blockwise: `softmax(softmax_scale * q k^T) v` over the visible keys.

    Key j is visible to query i of batch row b when `kv_start[b] <= j < min(kv_end[b], kv_len)` and, if causal,
    `j <= q_start + i`. A query that sees no key gets out 0 and lse -inf. Memory beyond the result is a few hundred
    rows per thread, whatever the lengths (online softmax: Milakov and Gimelshein, 1805.02867; Dao et al., 2205.14135).

    Args:
        q: `[batch, q_heads, q_len, head_dim]`, head_dim 8 to 256.
        k: `[batch, kv_heads, kv_len, head_dim]` in q's dtype, kv_heads dividing q_heads; or pages of it: a list of
            tensors `[batch, kv_heads, page_size, head_dim]` (sizes may differ) that follow each other. A page may be
            `formats.Compact`: decode then takes its codes in registers, prefill makes a block at a time dense.
        v: as k; a page's k and v may be in different formats.
        causal: hide keys after the query's own position.
        softmax_scale: multiplies the scores; default `1 / sqrt(head_dim)`. Scores beyond 2^24 have no weights that float32
            could tell apart: they may give NaN.
        q_start: absolute position of the first query; default `kv_len - q_len`.
        kv_start: first visible key of each batch row, int64 `[batch]`, or one int for all.
        kv_end: one past the last visible key of each batch row, likewise.
        kv_len: how many tokens of k and v are in use; default all. What lies beyond is never read.
        return_lse: also return the natural log-sum-exp of the scores.
        out_dtype: q's dtype (default), or float32, for partials that are merged.

    Where q, k or v needs a gradient, out and lse have one; see `attention_backward` for what that costs. Keys and values must
    be dense then.

    Returns:
        out `[batch, q_heads, q_len, head_dim]` in q's dtype (or `out_dtype`), laid out `[batch, q_len, q_heads, head_dim]` in memory, so
        that `out.transpose(1, 2).reshape(batch, q_len, -1)` costs nothing; with `return_lse` also lse, float32
        `[batch, q_heads, q_len]`.

    Raises:
        TypeError: a dtype, device or kind of argument that is not served; a gradient that we can't give.
        ValueError: shapes, strides or numbers that don't fit; the message names the argument and both values.
        cuda.Missing: tensors on a GPU, and its driver or kernels for it are not there; the message says which.
    """
    traced = _traced(q)
    if not traced:
        _tensors("q", [q])
        for name, pages in (("k", k), ("v", v)):
            for page in _pages(pages):
                _tensors(name, page if isinstance(page, Compact) else [page])
    graded = torch.is_grad_enabled() and _needs_gradient(q, k, v)
    if traced or graded:
        pages_k, pages_v = _flat(k), _flat(v)
        starts, ends = _row_tensor(kv_start, q), _row_tensor(kv_end, q)
        with_lse = return_lse or graded  # which the backward pass needs
        out, lse = torch.ops.llama1m_ext.attention(
            q, pages_k, pages_v, causal, softmax_scale, q_start, starts, ends, kv_len, with_lse, out_dtype
        )
        return (out, lse) if return_lse else out
    return _attention(q, k, v, causal, softmax_scale, q_start, kv_start, kv_end, kv_len, return_lse, out_dtype)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensors,
    v: Tensors,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_start: int | None = None,
    kv_start: Tensor | int | None = None,
    kv_end: Tensor | int | None = None,
    kv_len: int | None = None,
    grad_lse: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensors, Tensors]:
    """Gradients of q, k and v, blockwise, from what `attention` returned (Dao, 2307.08691).

    The weights are computed again, a block at a time: 10 head_dim operations for each query head, query and key that it sees,
    where the forward pass took 4. Memory beyond the results: float32 dk and dv of one kv head per thread (at most of all).
    The same bits in every run, on any number of threads.

    Args:
        grad_out: the gradient of out, `[batch, q_heads, q_len, head_dim]`, q's dtype or float32.
        q, k, v: as in `attention`, dense; pages as lists.
        out: what `attention` returned, q's dtype or float32.
        lse: likewise, float32 `[batch, q_heads, q_len]`. Log-sum-exps over more keys than these (of a merge, with its out)
            give these keys' share of the whole's gradients.
        causal, softmax_scale, q_start, kv_start, kv_end, kv_len: as they were in `attention`.
        grad_lse: the gradient of lse, float32 `[batch, q_heads, q_len]`; None: 0.
        grad_dtype: q's dtype (default), or float32, for gradients that are added up.

    Returns:
        (dq, dk, dv) of the shapes of q, k and v, dk and dv as lists where those are lists; summed over the q heads of each
        kv head. Tokens that nobody sees get zeros.

    Raises:
        TypeError, ValueError, cuda.Missing: as `attention`.
    """
    pages_k, pages_v = _pages(k), _pages(v)
    for name, pages in (("k", pages_k), ("v", pages_v)):
        if any(isinstance(page, Compact) for page in pages):
            raise TypeError(f"{name}: expected dense tensors, which alone have gradients, got Compact")
    flat_k, flat_v = _flat(pages_k), _flat(pages_v)
    with torch.no_grad():
        if _traced(q):
            starts, ends = _row_tensor(kv_start, q), _row_tensor(kv_end, q)
            options = (causal, softmax_scale, q_start, starts, ends, kv_len, grad_lse, grad_dtype)
            dq, dk, dv = torch.ops.llama1m_ext.attention_backward(grad_out, q, flat_k, flat_v, out, lse, *options)
        else:
            for name, tensors in (("k", flat_k), ("v", flat_v)):
                _tensors(name, tensors)
            for name, tensor in (("grad_out", grad_out), ("q", q), ("out", out), ("lse", lse)):
                _tensors(name, [tensor])
            where = (causal, softmax_scale, q_start, kv_start, kv_end, kv_len, grad_lse, grad_dtype)
            dq, dk, dv = gradients.attention_backward(grad_out, q, flat_k, flat_v, out, lse, *where)
    if isinstance(k, Tensor):
        return dq, dk, dv
    return dq, gradients.by_page(dk, flat_k), gradients.by_page(dv, flat_v)


def kv_append(
    k: Tensor,
    v: Tensor,
    page: Page,
    at: int,
    *,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_scaling: float = 1.0,
) -> None:
    """Writes keys and values into a page, made compact on the way where the page is compact (see `formats`).

    Compact keys share scales over 64 tokens: they are written whole groups at a time, and a last group of fewer tokens
    can't be added to later. A group with numbers that float16 can't hold becomes NaN.

    Args:
        k, v: `[batch, kv_heads, n, head_dim]`, float32, bfloat16 or float16; the page's dtype where it is dense.
        page: where to.
        at: first token of the page that is written; a multiple of 64 where its k is compact.
        positions, inv_freq, attention_scaling: as `rope_apply`: k is rotated on the way (one pass on a GPU). None: it
            is rotated already.

    Raises:
        TypeError, ValueError: as `attention`, before anything is written to the side that the message names.
    """
    if _traced(k):
        sides = _flat(page.k), _flat(page.v)
        torch.ops.llama1m_ext.kv_append(k, v, *sides, at, positions, inv_freq, attention_scaling)
        return
    for name, t in (("k", k), ("v", v)):
        _tensors(name, [t])
        _without_gradient(name, [t])
    for name, side in (("page.k", page.k), ("page.v", page.v)):
        _tensors(name, _flat(side))
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected the batch, heads and length of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if (positions is None) != (inv_freq is None):
        raise ValueError("inv_freq: expected positions and inv_freq, or neither, got one of them")
    _kv_append(k, v, page.k, page.v, at, positions, inv_freq, attention_scaling)


def kv_read(page: Page, start: int, end: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens `start` to `end` of a page as dense keys and values, `[batch, kv_heads, end - start, head_dim]` each.

    Args:
        page: any format.
        dtype: float32, bfloat16 or float16; the page's own where it is dense.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    if not 0 <= start <= end:
        raise ValueError(f"start, end: expected 0 <= start <= end, got {start} and {end}")
    found = []
    for of, side in (("k", page.k), ("v", page.v)):
        first = side.codes if isinstance(side, Compact) else side
        if _traced(first):
            found.append(torch.ops.llama1m_ext.kv_read(_flat(side), of, start, end, head_dim, dtype))
        else:
            _tensors(f"page.{of}", _flat(side))
            found.append(_kv_read(side, of, start, end, head_dim, dtype))
    return found[0], found[1]


def merge_partials(outs: Tensors, lses: Tensors) -> tuple[Tensor, Tensor]:
    """Joins attention over disjoint sets of keys: `lse = ln sum exp(lse_i)`, `out = sum exp(lse_i - lse) out_i`.

    Args:
        outs: the partial outputs, each `[batch, q_heads, q_len, head_dim]`; or one tensor `[n, batch, ...]`.
        lses: their log-sum-exps, float32, each `[batch, q_heads, q_len]`; or one tensor `[n, batch, ...]`. A partial
            whose lse is -inf saw no key: it is not read.

    Returns:
        (out in the dtype of `outs[0]`, lse float32), accumulated in float32.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    out_list, lse_list = _unstack("outs", outs, 4), _unstack("lses", lses, 3)
    traced = _traced(out_list[0])
    if not traced:
        _tensors("outs", out_list)
        _tensors("lses", lse_list)
    if traced or (torch.is_grad_enabled() and any(t.requires_grad for t in (*out_list, *lse_list))):
        merged: tuple[Tensor, Tensor] = torch.ops.llama1m_ext.merge_partials(out_list, lse_list)
        return merged
    return _merge_partials(out_list, lse_list)


def rope_apply(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotary embedding in Llama's layout, with exact phases (Su et al., 2104.09864).

    The first `2 * len(inv_freq)` elements of each head turn as `(x1 cos - x2 sin, x2 cos + x1 sin)` over their two
    halves; the rest is copied. `position * inv_freq` is reduced in u64 fixed point, (cos, sin) are within 1e-7 at any
    position below 2^24, the rotation is float32 and rounded once.

    Args:
        q: `[batch, q_heads, len, head_dim]`.
        k: `[batch, kv_heads, len, head_dim]`, or None.
        positions: int64 `[batch, len]`, `[1, len]` or `[len]`, each from 0 to 2^40 (on a GPU, which nobody waits for,
            another one gives NaN).
        inv_freq: float64 `[rotary_dim / 2]`, radians a token, the other way round where negative; on the CPU, wherever the
            others are. It has no gradient.
        attention_scaling: multiplies cos and sin (YaRN, longrope).
        q_out: where to write; may be q itself. Default: a new tensor.
        k_out: likewise for k.

    Returns:
        (q_out, k_out), of the shapes and dtypes of q and k.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    _without_gradient("inv_freq", [inv_freq])
    graded = torch.is_grad_enabled() and (_graded(q) or _graded(k))
    if graded and not (q_out is None and k_out is None):
        raise TypeError(
            "q_out, k_out: expected None where q or k needs a gradient, which a result written in place has not; "
            "call without them, or under torch.no_grad()"
        )
    traced = _traced(q)
    if not traced:
        _tensors("q", [q])
        if k is not None:
            _tensors("k", [k])
        for name, given in (("q_out", q_out), ("k_out", k_out)):
            if given is not None:
                _tensors(name, [given])
    if traced or graded:
        q_new, k_new = torch.ops.llama1m_ext.rope_apply(q, k, positions, inv_freq, attention_scaling)
        if q_out is not None:
            q_new = q_out.copy_(q_new)
        if k is not None and k_out is not None:
            k_new = k_out.copy_(k_new)
        return q_new, k_new if k is not None else None
    return _rope_apply(q, k, positions, inv_freq, attention_scaling, q_out, k_out)


def _traced(x: object) -> bool:
    """Whether the compiler looks at this call, or torch only asks for shapes (`FakeTensorMode`)."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(x, Tensor) and type(x) is not Tensor and isinstance(x, FakeTensor)


def transform() -> str | None:
    """What is going on around this call that looks into tensors where we can't: their memory is not all there is to them."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode gradients"
    return None


def _tensors(name: str, tensors: Sequence[object]) -> None:
    """Raises where an argument is no tensor, or inside something that looks into tensors."""
    around = transform()
    if around is not None:
        raise TypeError(
            f"{name}: expected a tensor outside of vmap, grad, jvp and dual levels, got one inside {around}; "
            "torch.nn.functional.scaled_dot_product_attention can be transformed"
        )
    for t in tensors:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.is_neg():  # its memory has the numbers with the other sign
            raise TypeError(
                f"{name}: expected a tensor whose memory is what it stands for, got one with torch's negative bit; "
                "call resolve_neg()"
            )


def _without_gradient(name: str, tensors: Sequence[object]) -> None:
    """Raises where an argument needs a gradient that we can't give."""
    if torch.is_grad_enabled() and any(map(_graded, tensors)):
        raise TypeError(
            f"{name}: expected a tensor without gradient, got requires_grad=True; "
            "call under torch.no_grad() or torch.inference_mode()"
        )


def _graded(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _needs_gradient(q: Tensor, k: Pages, v: Pages) -> bool:
    """Whether attention needs one; raises where it needs one that we can't give."""
    pages = [("k", page) for page in _pages(k)] + [("v", page) for page in _pages(v)]
    for name, page in pages:
        if isinstance(page, Compact):
            _without_gradient(name, page)
    needed = _graded(q) or any(_graded(page) for _, page in pages)
    if needed:
        for name, page in pages:
            if isinstance(page, Compact):
                raise TypeError(
                    f"{name}: expected dense tensors where something needs a gradient, got Compact; "
                    "call under torch.no_grad() or torch.inference_mode()"
                )
    return needed


def _pages(x: Pages) -> list[Side]:
    if isinstance(x, Compact) or not isinstance(x, (list, tuple)):
        return [x]  # type: ignore[list-item]
    return list(x)


def _flat(x: Pages) -> list[Tensor]:
    """Pages as an operator's schema can say them: codes are followed by their params."""
    return [t for page in _pages(x) for t in (page if isinstance(page, Compact) else (page,))]


def _unflat(x: Sequence[Tensor]) -> list[Side]:
    """What `_flat` made flat; codes are told by their dtype."""
    rest, found = iter(x), list[Side]()
    for t in rest:
        found.append(Compact(t, next(rest)) if t.dtype.itemsize == 1 else t)
    return found


def _unstack(name: str, x: Tensors, rank: int) -> list[Tensor]:
    if isinstance(x, Tensor):
        if x.dim() != rank + 1:
            raise ValueError(f"{name}: expected a list, or one tensor of rank {rank + 1}, got shape {tuple(x.shape)}")
        return list(x.unbind(0))
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(x).__name__}")
    if not x:
        raise ValueError(f"{name}: expected at least one partial, got none")
    return list(x)


def _row_tensor(x: Tensor | int | None, q: Tensor) -> Tensor | None:
    if x is None or isinstance(x, Tensor):
        return x
    return torch.full((q.shape[0],), x, dtype=torch.int64, device=q.device)


def _attention(
    q: Tensor,
    k: Pages,
    v: Pages,
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | int | None,
    kv_end: Tensor | int | None,
    kv_len: int | None,
    return_lse: bool,
    out_dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, Tensor]:
    out = gradients.like(q, out_dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    k = [k] if isinstance(k, Compact) else k
    v = [v] if isinstance(v, Compact) else v
    where: dict[str, Any] = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "q_start": q_start,
        "kv_start": kv_start,
        "kv_end": kv_end,
        "kv_len": kv_len,
    }
    if cuda.serves(q):
        cuda.attention(q, k, v, out, lse, **where)
    else:
        _core.attention(q, k, v, out, lse, **where, threads=torch.get_num_threads())
    return out if lse is None else (out, lse)


def _kv_append(
    k: Tensor,
    v: Tensor,
    page_k: Side,
    page_v: Side,
    at: int,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    attention_scaling: float,
) -> None:
    if cuda.serves(k):
        cuda.kv_append(k, v, page_k, page_v, at, positions, inv_freq, attention_scaling)
        return
    if positions is not None and inv_freq is not None:
        k, _ = _rope_apply(k, None, positions, inv_freq, attention_scaling)
    threads = torch.get_num_threads()
    _core.kv_append(k, page_k, at, "k", threads=threads)
    _core.kv_append(v, page_v, at, "v", threads=threads)


def _kv_read(side: Side, of: str, start: int, end: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    first = side.codes if isinstance(side, Compact) else side
    out = torch.empty((*first.shape[:2], end - start, head_dim), dtype=dtype, device=first.device)
    if cuda.serves(first):
        cuda.kv_read(side, start, out, of)
    else:
        _core.kv_read(side, start, out, of, threads=torch.get_num_threads())
    return out


def _merge_partials(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    out = gradients.like(outs[0])
    lse = torch.empty(outs[0].shape[:3], dtype=torch.float32, device=outs[0].device)
    if cuda.serves(out):
        cuda.merge_partials(outs, lses, out, lse)
    else:
        _core.merge_partials(outs, lses, out, lse, threads=torch.get_num_threads())
    return out, lse


def _rope_apply(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    attention_scaling: float,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    q_out = gradients.like(q) if q_out is None else q_out
    if k is not None and k_out is None:
        k_out = gradients.like(k)
    if cuda.serves(q):
        cuda.rope_apply(q, k, q_out, k_out, positions, inv_freq, attention_scaling)
        return q_out, k_out
    _core.rope_apply(
        q,
        k,
        q_out,
        k_out,
        positions,
        inv_freq,
        attention_scaling=attention_scaling,
        threads=torch.get_num_threads(),
    )
    return q_out, k_out


# The same calls as operators of torch, with shapes for the compiler. Optional results are empty tensors, because an
# operator's schema has no optional results.


# No defaults: torch 2.5 leaves out arguments that have their default, and counts gradients by what is left.
@torch.library.custom_op("llama1m_ext::attention", mutates_args=(), device_types=_DEVICES)
def _attention_op(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    kv_len: int | None,
    return_lse: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    pages_k, pages_v = _unflat(k), _unflat(v)
    r = _attention(q, pages_k, pages_v, causal, softmax_scale, q_start, kv_start, kv_end, kv_len, return_lse, out_dtype)
    return r if isinstance(r, tuple) else (r, q.new_empty(0, dtype=torch.float32))


@_attention_op.register_fake
def _(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    causal: bool,
    softmax_scale: float | None,
    q_start: int | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    kv_len: int | None,
    return_lse: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return gradients.like(q, out_dtype), q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


@torch.library.custom_op("llama1m_ext::merge_partials", mutates_args=(), device_types=_DEVICES)
def _merge_partials_op(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return _merge_partials(list(outs), list(lses))


@_merge_partials_op.register_fake
def _(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return gradients.like(outs[0]), outs[0].new_empty(outs[0].shape[:3], dtype=torch.float32)


@torch.library.custom_op("llama1m_ext::rope_apply", mutates_args=(), device_types=_DEVICES)
def _rope_apply_op(
    q: Tensor, k: Tensor | None, positions: Tensor, inv_freq: Tensor, attention_scaling: float
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _rope_apply(q, k, positions, inv_freq, attention_scaling)
    return q_out, q.new_empty(0) if k_out is None else k_out


@_rope_apply_op.register_fake
def _(
    q: Tensor, k: Tensor | None, positions: Tensor, inv_freq: Tensor, attention_scaling: float
) -> tuple[Tensor, Tensor]:
    return gradients.like(q), q.new_empty(0) if k is None else gradients.like(k)


@torch.library.custom_op("llama1m_ext::kv_append", mutates_args=("page_k", "page_v"), device_types=_DEVICES)
def _kv_append_op(
    k: Tensor,
    v: Tensor,
    page_k: Sequence[Tensor],
    page_v: Sequence[Tensor],
    at: int,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_scaling: float = 1.0,
) -> None:
    (side_k,), (side_v,) = _unflat(page_k), _unflat(page_v)
    _kv_append(k, v, side_k, side_v, at, positions, inv_freq, attention_scaling)


@_kv_append_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    page_k: Sequence[Tensor],
    page_v: Sequence[Tensor],
    at: int,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
    attention_scaling: float = 1.0,
) -> None:
    return None


@torch.library.custom_op("llama1m_ext::kv_read", mutates_args=(), device_types=_DEVICES)
def _kv_read_op(side: Sequence[Tensor], of: str, start: int, end: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    (found,) = _unflat(side)
    return _kv_read(found, of, start, end, head_dim, dtype)


@_kv_read_op.register_fake
def _(side: Sequence[Tensor], of: str, start: int, end: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return side[0].new_empty((*side[0].shape[:2], end - start, head_dim), dtype=dtype)


gradients.register()
