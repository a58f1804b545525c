"""The compiled core. `llama1m_ext.ops` is the interface meant for people; this one allocates nothing."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch

Array = torch.Tensor | npt.NDArray[np.generic]
Side = Array | tuple[torch.Tensor, torch.Tensor]
"""Keys or values of a page: dense, or codes and params (`formats.Compact`)."""

__version__: str

def attention(
    q: Array,
    k: Array | Sequence[Side],
    v: Array | Sequence[Side],
    out: Array,
    lse: Array | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_start: int | None = None,
    kv_start: Array | int | None = None,
    kv_end: Array | int | None = None,
    kv_len: int | None = None,
    threads: int = 1,
    path: Literal["auto", "prefill", "decode"] = "auto",
) -> None:
    """Exact attention on CPU tensors or numpy arrays, written to `out` and `lse`."""

def attention_backward(
    grad_out: Array,
    q: Array,
    k: Array | Sequence[Side],
    v: Array | Sequence[Side],
    out: Array,
    lse: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_start: int | None = None,
    kv_start: Array | int | None = None,
    kv_end: Array | int | None = None,
    kv_len: int | None = None,
    grad_lse: Array | None = None,
    threads: int = 1,
) -> None:
    """Gradients of exact attention on CPU tensors or numpy arrays, written to `dq`, `dk` and `dv`."""

def merge_partials(
    outs: Array | Sequence[Array],
    lses: Array | Sequence[Array],
    out: Array,
    lse: Array | None = None,
    *,
    threads: int = 1,
) -> None:
    """Joins partials `(outs[i], lses[i])` over disjoint keys into `out` and `lse`."""

def kv_append(rows: Array, page: Side, at: int, of: str, *, threads: int = 1) -> None:
    """Writes rows at token `at` of a page's keys (`of="k"`) or values (`of="v"`)."""

def kv_read(page: Side, start: int, out: Array, of: str, *, threads: int = 1) -> None:
    """Tokens `start ..` of a page's keys or values as dense rows, as many as `out` has."""

def checksum(tensor: Array) -> int:
    """64-bit xxh3 of a contiguous tensor's bytes."""

def checksums(tensors: Sequence[Array], *, threads: int = 1) -> list[int]:
    """64-bit xxh3 of the bytes of each of some contiguous tensors."""

def rope_apply(
    q: Array,
    k: Array | None,
    q_out: Array,
    k_out: Array | None,
    positions: Array,
    inv_freq: Array,
    *,
    attention_scaling: float = 1.0,
    threads: int = 1,
) -> None:
    """Rotates q and k by their positions into q_out and k_out."""

def cos_sin(
    position: int, inv_freq: Array, *, attention_scaling: float = 1.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The `(cos, sin)` vectors that `rope_apply` uses at one position."""

def ring_shard(sharding: str, length: int, ranks: int, rank: int) -> list[tuple[int, int, int]]:
    """Which positions a rank holds, in its local order, which is ascending.

    Args:
        sharding: "contiguous"; "zigzag": rank r holds chunks r and 2R-1-r of 2R; "striped": r, r + R, r + 2R, ...
        length: of the sequence, 0 to 2^40; need not be a multiple of anything. Shards may be empty.
        ranks: 1 to 4096.
        rank: from 0 on.

    Returns:
        Runs `(start, stop, step)` as of `range`, none of them empty.

    Raises:
        TypeError, ValueError: an argument is none of these; the message names it.
    """

def ring_schedule(
    sharding: str,
    length: int,
    inner: int,
    outer: int,
    rank: int,
    causal: bool = True,
    documents: Sequence[int] | None = None,
) -> list[tuple[int, int, bool, list[tuple[int, int, int, int, bool, int]], int | None, int | None, int | None]]:
    """The steps of a rank of a double ring (LoongTrain, 2406.18485) of `inner x outer` ranks; `outer=1`: a plain ring.

    Rank = outer rank x inner + inner rank. In step `lap * inner + turn` the block (keys and values) of the rank that is `lap`
    back on the outer ring and `turn` back on the inner one has its turn. A block goes no farther than somebody needs it.

    Args:
        sharding, length: as in `ring_shard`.
        causal: whether a query sees no later key.
        documents: start positions of packed documents, ascending, the first 0; no query sees another document. In striped shards
            at most `2^28 / ranks`.

    Returns:
        `inner * outer` steps `(step, source, needed, pieces, receive_from, inner_to, outer_to)`:

        pieces: `(q_lo, q_hi, k_lo, k_hi, causal, q_start)` in local indices of the rank's queries and of the block of `source`:
            `ops.attention(q[:, :, q_lo:q_hi], k[:, :, k_lo:k_hi], v[:, :, k_lo:k_hi], causal=causal, q_start=q_start)`. Over all
            ranks and steps they cover each visible pair once. `needed`: there are some.
        receive_from: whom the block of this step comes from; None in step 0, and where nobody from here on needs it: then it
            does not come, and `needed` is False.
        inner_to: whom to send the block to during this step; there it is the block of the next step.
        outer_to: likewise (first step of a lap only); there it is the block of `inner` steps later.

    Raises:
        TypeError, ValueError: an argument is none of these; the message names it.
    """

def ring_gradients(
    sharding: str,
    length: int,
    inner: int,
    outer: int,
    rank: int,
    causal: bool = True,
    documents: Sequence[int] | None = None,
) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """How gradients of keys and values come home in the backward pass, whose blocks travel as `ring_schedule` says.

    A rank keeps a sum for each source whose block was at hand: what it computed itself in that step (nothing, if the block was not
    needed), and what it received. It sends each sum but its own once.

    Returns:
        `inner * outer + 1` exchanges `(sends, receives)` of `(other rank, source)`. Exchange e comes after step e, the last one after
        all; what it receives is added to the sum of `source` before exchange e + 1 begins. Messages of two ranks in one exchange
        are in the same order on both sides. In the end the sum of the rank's own block is its gradient.
    """

def ring_bytes(
    sharding: str,
    length: int,
    inner: int,
    outer: int,
    *,
    per_node: int,
    kv_bytes: int,
    kv_group_bytes: int | None = None,
    gradient_bytes: int | None = None,
    causal: bool = True,
    documents: Sequence[int] | None = None,
) -> list[tuple[int, int, int, int]]:
    """Bytes that each rank sends, following `ring_schedule` and `ring_gradients`.

    Args:
        per_node: ranks `n * per_node` to `(n + 1) * per_node - 1` are on node n.
        kv_bytes: of a token's keys and values together.
        kv_group_bytes: what each 64 tokens of a block take beside that, the last ones rounded up (compact keys); default 0.
        gradient_bytes: of a token's gradients; default 0.

    Returns:
        For each rank `(forward_within, forward_across, backward_within, backward_across)`: to ranks of its node and to other nodes;
        backward are keys and values again, and gradients.
    """

def ring_balance(
    sharding: str, length: int, ranks: int, causal: bool = True, documents: Sequence[int] | None = None
) -> float:
    """Largest over mean number of visible (query, key) pairs of a rank: 1.0 is even."""

class _Pass(TypedDict):
    seconds: float
    compute: float
    exchange: float
    within: int
    across: int
    ring_within: int
    ring_across: int

class _Layout(TypedDict):
    heads: int
    inner: int
    outer: int
    messages: int
    replication: float
    forward: _Pass
    backward: _Pass

def ring_topology(
    *,
    nodes: int,
    gpus: int,
    intra: float,
    inter: float,
    rails: int,
    latency: float,
    flops: float,
    length: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool = True,
    training: bool = False,
) -> list[_Layout]:
    """Every layout of a cluster, the best first, the others by time: what one layer's attention over one sequence costs.

    GPU = (outer rank x inner + inner rank) x heads + place; GPUs `n * gpus ..` are node n. Work is taken to be even (zigzag,
    striped), as are shards. The model is in `src/ring/cost.rs`.

    Args:
        nodes, gpus: GPUs of a node; at most 32768 in all.
        intra: bytes/s that a GPU sends within its node, while it receives as much.
        inter: bytes/s of one link of a node to the others, likewise; rails: such links of a node.
        latency: seconds that a message takes beside its bytes.
        flops: that a GPU sustains in attention, each second.
        length: tokens of the sequence, from 1 on.
        itemsize: bytes of an element of keys and values.
        training: the backward pass counts too when layouts are compared.

    Returns:
        heads, inner, outer: the layout. messages: that a GPU sends in a forward pass. replication: KV heads held, over `kv_heads`.
        forward, backward: `seconds`, of these `compute` (attention itself) and `exchange` (of heads); bytes that all GPUs together
        send `within` and `across` nodes, the ring's share of them in `ring_within` and `ring_across`. Backward is
        without recomputation; gradients travel in float32.

    Raises:
        TypeError, ValueError: an argument is none of these; the message names it.
    """

def isa() -> str:
    """The instruction-set level in use."""

def isa_levels() -> list[str]:
    """The levels this CPU has, best first."""

def peak_flops(dtype: str, threads: int = 1, seconds: float = 0.2) -> float:
    """Measured FLOP/s of multiply-adds in registers, in the operand type that attention uses for `dtype`."""

def read_seconds(tensor: Array, threads: int = 1) -> float:
    """Seconds that one pass over a contiguous tensor's memory takes."""

def cuda_info() -> dict[str, Any]:
    """What there is of CUDA: driver, devices, NVRTC, kernels. Raises nothing where something is missing."""

def cuda_set_up(packed: str | None, cache: str | None, nvrtc: Sequence[str]) -> None:
    """Says where cubins, compiled kernels and NVRTC are."""

def cuda_sources() -> dict[str, str]:
    """The kernels' sources: name to the hash that cubins are known by."""

def nvrtc_compile(source: str, arch: str, *, nvrtc: str | None = None) -> tuple[bytes, str]:
    """Compiles one of the kernels' sources for an architecture: the image and the compiler's log."""

def cuda_attention(
    q: torch.Tensor,
    k: torch.Tensor | Sequence[Side],
    v: torch.Tensor | Sequence[Side],
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_start: int | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    kv_len: int | None = None,
    workspace: torch.Tensor | None = None,
    stream: int = 0,
    path: str = "auto",
) -> None:
    """Exact attention on one GPU, written to `out` and `lse`."""

def cuda_attention_workspace(
    q: torch.Tensor,
    k: torch.Tensor | Sequence[Side],
    v: torch.Tensor | Sequence[Side],
    *,
    kv_len: int | None = None,
    path: str = "auto",
    out_f32: bool = False,
) -> int:
    """Bytes of workspace that `cuda_attention` wants for such a call."""

def cuda_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | Sequence[Side],
    v: torch.Tensor | Sequence[Side],
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    q_start: int | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    kv_len: int | None = None,
    grad_lse: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    stream: int = 0,
    path: str = "auto",
) -> None:
    """Gradients of exact attention on one GPU, written to `dq`, `dk` and `dv`."""

def cuda_attention_backward_workspace(
    q: torch.Tensor,
    k: torch.Tensor | Sequence[Side],
    v: torch.Tensor | Sequence[Side],
    *,
    kv_len: int | None = None,
) -> int:
    """Bytes of workspace that `cuda_attention_backward` wants for such a call."""

def cuda_merge_partials(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    stream: int = 0,
) -> None:
    """Joins partials over disjoint keys into `out` and `lse`, on one GPU."""

def cuda_rope_apply(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    positions: torch.Tensor,
    inv_freq: Array,
    *,
    attention_scaling: float = 1.0,
    stream: int = 0,
) -> None:
    """Rotates q and k by their positions into q_out and k_out, on one GPU; `inv_freq` on the CPU."""

def cuda_kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    page_k: Side,
    page_v: Side,
    at: int,
    *,
    positions: torch.Tensor | None = None,
    inv_freq: Array | None = None,
    attention_scaling: float = 1.0,
    stream: int = 0,
) -> None:
    """Writes keys, rotated where there are positions, and values at token `at` of a page, on one GPU."""

def cuda_kv_read(side: Side, start: int, out: torch.Tensor, of: str, *, stream: int = 0) -> None:
    """Tokens `start ..` of a page's keys or values as dense rows, on one GPU."""
