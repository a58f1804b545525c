"""How many bytes live at the worst moment of a prefill, counted from the code that makes them.

`prefill.layer_major` holds the hidden states and one chunk's activations, beside the weights and the pages of the layers
that are done. Every formula here stands for lines there, in `llama.attend`, in `sealed`, or in transformers' modules,
and `tests/python/test_plan_memory.py` compares the sum with what real processes take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .plan_shape import Shape

LADDER = ("model", "int8", "int8/int4", "int4")
"""Formats as "auto" tries them: each takes less than the one before."""
SIDE_BY_SIDE = ("model", "int8", "fp8", "int8/int4", "int4")
"""Formats as tables list them."""
SCRATCH = 3 << 19
"""Scratch of the attention kernel for each thread: src/cpu/attention.rs keeps it within a second-level cache."""
MATMUL = 1 << 20
"""What the matrix library keeps for its own copies, for each thread."""
NORM_ROWS = 256
"""Tokens that a norm sees at a time (`workspace`)."""
GPU_NORM_ROWS = 4096
GPU_MATMUL = 64 << 20
"""What the matrix library keeps for itself on a GPU, and what torch's allocator can't use of what it has."""
GPU_SEGMENT, GPU_MADE = 65_536, 16_384
"""Keys whose outputs the kernels on a GPU sum before they are merged in float32 (csrc/params.h), and compact keys that are
made dense at a time where a chunk of a prompt sees them (src/cuda/attention.rs)."""
RING_ROWS = 16_384
"""Queries whose partials ranks merge at a time (`ring.blocks`)."""
PARTIALS = 3
"""Outputs in float32 that wait for their merge, at most, where pages are streamed in."""

Offload = Literal["host", "disk"] | None


@dataclass(frozen=True)
class Work:
    """What is to be run.

    Attributes:
        tokens: of the prompt, in each batch row; those in the cache already are not among them.
        past: tokens in the cache already.
        new: tokens to be generated afterwards.
        batch: rows.
        keep: so many last positions are wanted of the last layer; 0: all.
        chunk: queries at a time.
        threads: of the kernels.
        logits: whether the wanted positions get logits.
        held: bytes of the cache's pages in memory before; it matters where they are to go to the disk.
        gpu: whether it runs on a GPU: its kernels have other workspaces, and room in pages is memory.
        ranks: processes that share it. All numbers are those of one of them, then, but
        whole: tokens of the prompt of all ranks, in each row.
        kv_format: in which blocks of keys and values travel between ranks.
    """

    tokens: int
    past: int = 0
    new: int = 0
    batch: int = 1
    keep: int = 1
    chunk: int = 2048
    threads: int = 1
    logits: bool = True
    held: int = 0
    gpu: bool = False
    ranks: int = 1
    whole: int = 0
    kv_format: str = "model"

    @property
    def prompt(self) -> int:
        """Tokens of the whole prompt, in each row."""
        return self.whole if self.ranks > 1 else self.tokens


@dataclass(frozen=True)
class Storage:
    """How the cache is kept.

    Attributes:
        kv: the format.
        offload: where pages go that memory has no room for; None, and "host" on the CPU: nowhere.
        kv_memory: bytes that pages in memory may take, where the others go elsewhere.
    """

    kv: str = "model"
    offload: Offload = None
    kv_memory: int | None = None


@dataclass(frozen=True)
class Parts:
    """Bytes by part, each at its own largest.

    Attributes:
        weights: of the model.
        kv: pages in memory, tokens in use.
        room: that pages have for more tokens: address space, which takes memory only when it is written.
        file: pages on the disk, or on the host behind a GPU.
        hidden: hidden states of all tokens of the prompt.
        scratch: one layer's keys and values before they become compact or go to the disk.
        activations: of a chunk in a layer.
        keys_only: of a chunk in the last layer, where only keys and values are made of most tokens.
        workspace: of the kernels, all threads.
        logits: of the positions that get them.
        ids: token ids and positions.
        ring: where ranks share a prompt: a shard's queries and results in one layer, and blocks of keys and values under way.
    """

    weights: int
    kv: int
    room: int
    file: int
    hidden: int
    scratch: int
    activations: int
    keys_only: int
    workspace: int
    logits: int
    ids: int
    ring: int


@dataclass(frozen=True)
class Peak:
    """The worst moment.

    Attributes:
        phase: which it is, in words.
        bytes: of everything that lives then.
        parts: what lives then, by name of the part, largest first.
    """

    phase: str
    bytes: int
    parts: dict[str, int]


def kv_bytes(shape: Shape, kv: str, tokens: int, batch: int = 1) -> int:
    """Bytes of all layers' pages for `tokens` tokens in use: in a compact format with the first 64 and the newest tokens
    dense."""
    return shape.layers * layer_bytes(shape, kv, tokens, batch)


def layer_bytes(shape: Shape, kv: str, tokens: int, batch: int = 1) -> int:
    """Likewise of one layer."""
    from .formats import GROUP, KvFormat
    from .sealed import KEPT, SINK, TAIL

    fmt = KvFormat.parse(kv)
    dense = 2 * shape.kv_dim * shape.size
    if fmt.is_model or tokens < SINK + TAIL:
        return batch * tokens * dense
    compact = (tokens - SINK - KEPT) // GROUP * GROUP
    return batch * int(
        compact * fmt.token_bytes(shape.kv_heads, shape.head_dim, shape.size) + (tokens - compact) * dense
    )


def least_bytes(shape: Shape, kv: str, tokens: int, batch: int = 1) -> int:
    """Likewise of all layers, with the room that they can't do without: the whole tail of a compact format. What
    `Limit` lets them have."""
    from .formats import GROUP, KvFormat
    from .sealed import KEPT, SINK, TAIL

    fmt, dense = KvFormat.parse(kv), 2 * shape.kv_dim * shape.size
    if fmt.is_model:
        return kv_bytes(shape, kv, tokens, batch)
    compact = max(0, tokens - SINK - KEPT) // GROUP * GROUP if tokens >= SINK + TAIL else 0
    each = compact * fmt.token_bytes(shape.kv_heads, shape.head_dim, shape.size) + (SINK + TAIL) * dense
    return shape.layers * batch * int(each)


def room_bytes(shape: Shape, kv: str, total: int, batch: int = 1) -> int:
    """Bytes of all layers' pages that a prompt of `total` tokens leaves unused (pages of automatic size)."""
    from .formats import KvFormat, rounded
    from .page_list import ROUND, spare

    tokens = rounded(total + spare(total, True), ROUND) - total
    fmt = KvFormat.parse(kv)
    return int(shape.layers * batch * tokens * fmt.token_bytes(shape.kv_heads, shape.head_dim, shape.size))


def activation_bytes(shape: Shape, chunk: int, batch: int, streamed: bool = False, gpu: bool = False) -> int:
    """Of a chunk through a whole layer, at the worst of its moments, beyond its input."""
    e, h, q, kv = shape.size, shape.hidden, shape.q_dim, shape.kv_dim
    # Of the workspace: normed states and results, q or gate, k or up, v. They stay when attention's output comes.
    kept = e * (h + max(q, shape.intermediate) + max(kv, shape.intermediate) + kv)
    out = q * (e + 4 * PARTIALS if streamed else e)
    # Two of: the input in float32, its squares, the product.
    norm = 8 * h * min(GPU_NORM_ROWS if gpu else NORM_ROWS, batch * chunk)
    return batch * chunk * (kept + out) + norm + unpacked_bytes(shape, chunk, batch)


def unpacked_bytes(shape: Shape, chunk: int, batch: int) -> int:
    """What quantised layers make for themselves, roughly: a matrix of numbers, and a result in float32. Measured, above the
    rest: 0.3 to 2 times as much with bitsandbytes' 4 bits, torchao and quanto; with its 8 bits up to 9 times."""
    return shape.unpacked + 4 * batch * chunk * shape.intermediate if shape.unpacked else 0


def keys_bytes(shape: Shape, chunk: int, batch: int, gpu: bool = False) -> int:
    """Of a chunk of which only keys and values are made."""
    e, h = shape.size, shape.hidden
    norm = 8 * h * min(GPU_NORM_ROWS if gpu else NORM_ROWS, batch * chunk)
    return batch * chunk * e * (h + 2 * shape.kv_dim) + norm + unpacked_bytes(shape, chunk, batch)


def workspace_bytes(shape: Shape, work: Work, storage: Storage) -> int:
    """Of the kernels."""
    if not work.gpu:
        return work.threads * (SCRATCH + MATMUL)
    total, chunk = work.past + work.tokens, min(work.chunk, work.tokens)
    found, out = GPU_MATMUL, work.batch * chunk * shape.q_dim * 4
    if total > GPU_SEGMENT:
        found += out
    if work.past and storage.kv != "model":
        found += 2 * work.batch * min(work.past, GPU_MADE) * shape.kv_dim * shape.size
        found += PARTIALS * out if work.past > GPU_MADE else 0
    return found


def ring_bytes(shape: Shape, work: Work) -> int:
    """Of one layer of a prompt that ranks share (`ring.prefill`)."""
    if work.ranks < 2:
        return 0
    from .formats import KvFormat

    rows, e, dense = work.batch * work.tokens, shape.size, 2 * shape.kv_dim * shape.size
    # Keys and values: this rank's own, those at hand, those on their way; compact ones at hand are there as they came, too.
    form = KvFormat.parse(work.kv_format)
    blocks = 3 * dense if form.is_model else 2 * (dense + int(form.token_bytes(shape.kv_heads, shape.head_dim, e)))
    # Queries; results and log-sum-exps of all of them.
    held = rows * (shape.q_dim * e + blocks + shape.q_dim * 4 + shape.heads * 8)
    return held + 2 * work.batch * min(work.tokens, RING_ROWS) * shape.q_dim * 4


def parts(shape: Shape, work: Work, storage: Storage) -> Parts:
    """Bytes by part."""
    total, chunk = work.past + work.tokens, min(work.chunk, work.tokens)
    final = total + work.new
    # Memory of the host is no other place for what runs there.
    compact, disk = storage.kv != "model", storage.offload == "disk" or (work.gpu and storage.offload == "host")
    kv, file, room = kv_bytes(shape, storage.kv, final, work.batch), 0, 0
    if disk and storage.kv_memory is not None and kv > storage.kv_memory:
        kv, file = storage.kv_memory, kv - storage.kv_memory
    elif not disk:
        room = max(
            0,
            room_bytes(shape, storage.kv, total, work.batch)
            - kv_bytes(shape, storage.kv, final, work.batch)
            + kv_bytes(shape, storage.kv, total, work.batch),
        )
    keep = work.tokens if work.keep <= 0 else min(work.keep, work.tokens)
    row = work.batch * work.tokens
    return Parts(
        weights=shape.weight_bytes,
        kv=kv,
        room=room,
        file=file,
        hidden=row * shape.hidden * shape.size,
        scratch=2 * row * shape.kv_dim * shape.size if compact or disk else 0,
        activations=activation_bytes(shape, chunk, work.batch, bool(file), work.gpu),
        keys_only=keys_bytes(shape, chunk, work.batch, work.gpu),
        workspace=workspace_bytes(shape, work, storage),
        logits=work.batch * keep * shape.vocab * shape.size if work.logits else 0,
        ids=2 * 8 * work.batch * work.prompt,
        ring=ring_bytes(shape, work),
    )


def peaks(shape: Shape, work: Work, storage: Storage) -> list[Peak]:
    """Everything that lives in each phase, weights included, the worst first."""
    p = parts(shape, work, storage)
    total = work.past + work.tokens
    done = kv_bytes(shape, storage.kv, work.past, work.batch)

    def kv_after(layers: int) -> int:
        """Pages in memory when the call's tokens are in so many layers."""
        full = kv_bytes(shape, storage.kv, total, work.batch)
        now = done + (full - done) * layers // shape.layers
        return min(now, p.kv)

    common = {"weights": p.weights, "ids": p.ids, "workspace": p.workspace}
    layers = shape.layers
    sealed = bool(p.scratch)  # then the layer at work is in the scratch, not in pages
    found = []

    def phase(name: str, **parts: int) -> None:
        if work.gpu and p.kv:
            parts["room"] = p.room * parts.get("kv", 0) // p.kv
        alive = {k: v for k, v in sorted({**common, **parts}.items(), key=lambda x: -x[1]) if v}
        found.append(Peak(name, sum(alive.values()), alive))

    if work.held > p.kv:  # the other layers' pages go to the disk when the layer's turn comes
        phase("layer 1, its last chunk", kv=work.held, hidden=p.hidden, scratch=p.scratch, activations=p.activations)
    whole = layers if work.keep <= 0 or work.keep >= work.tokens else layers - 1
    if whole:
        phase(
            f"layer {whole} of {layers}, its last chunk",
            kv=kv_after(whole - sealed),
            hidden=p.hidden,
            scratch=p.scratch,
            activations=p.activations,
            ring=p.ring,
        )
    if whole < layers:
        phase(
            "the last layer's keys and values",
            kv=kv_after(layers - sealed),
            hidden=p.hidden,
            scratch=p.scratch,
            activations=p.keys_only,
            ring=p.ring,
        )
    if sealed:
        # The workspace of the chunks before is still there.
        out = work.batch * min(work.chunk, work.tokens) * shape.q_dim * shape.size
        if whole:
            kept = p.activations - out
            now = {"kv": kv_after(whole), "hidden": p.hidden, "scratch": p.scratch, "activations": kept, "ring": p.ring}
            phase(f"layer {whole}'s pages", **now)
        if whole < layers:
            last = {"kv": kv_after(layers), "hidden": p.hidden, "scratch": p.scratch, "activations": p.keys_only}
            last["ring"] = p.ring
            phase("the last layer's pages", **last)
    phase("logits", kv=kv_after(layers), hidden=p.hidden, scratch=p.scratch, logits=p.logits)
    if work.new:
        phase("generating", kv=p.kv, logits=work.batch * shape.vocab * (shape.size + 4))
    return sorted(found, key=lambda x: -x.bytes)


def peak(shape: Shape, work: Work, storage: Storage) -> Peak:
    """The worst moment."""
    return peaks(shape, work, storage)[0]
