"""How many bytes live at the worst moments of a training step, counted from the code that makes them.

Formulas stand for lines in `layer`, `rows`, `cross_entropy` and `optimizer`; `tests/python/test_train_plan.py` compares the sum with
what real processes take. All counts are of one device.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan_bytes import Peak
from ..plan_shape import Shape

MATMUL = 4 << 20
"""What the matrix library keeps for itself, for each thread."""


@dataclass(frozen=True)
class Step:
    """What a device does between two steps of the optimizer.

    Attributes:
        length: tokens of a row, or of this device's share of it.
        rows: computed at a time.
        passes: of so many rows each.
        keep: what layers keep for backward.
        offload: where it waits: "none", "host" or "disk".
        chunk, ce_chunk: positions of a chunk, and those whose logits are alive.
        autocast: float32 weights, bfloat16 arithmetic.
        trained: elements that are trained; None: all.
        gpu: whether it runs on a GPU.
        shards: processes that weights, gradients and optimizer states are spread over.
        threads: of the arithmetic.
        ring: devices that share a row.
        outer: rings of them, one on each node (double ring).
    """

    length: int
    rows: int = 1
    passes: int = 1
    keep: str = "attention"
    offload: str = "none"
    chunk: int = 2048
    ce_chunk: int = 0
    autocast: bool = False
    trained: int | None = None
    gpu: bool = False
    shards: int = 1
    threads: int = 1
    ring: int = 1
    outer: int = 1


@dataclass(frozen=True)
class Parts:
    """Bytes by part, each at its own largest.

    Attributes:
        weights: of the model, in the dtype that computes.
        masters: float32 weights beside bfloat16 ones.
        moments: of AdamW.
        gradients: of all trained weights.
        kept: what layers keep between forward and backward, in memory.
        file: likewise, elsewhere.
        layer: what backward through one layer makes.
        head: last norm, logits of a chunk, their gradients.
        rows: token ids and labels of a step.
        checkpoint: on the disk, one of the run's.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    kept: int
    file: int
    layer: int
    head: int
    rows: int
    checkpoint: int


class _Sizes:
    """Bytes of a token's tensors."""

    def __init__(self, shape: Shape, step: Step) -> None:
        self.s = shape.size  # of the hidden states
        self.c = 2 if step.autocast else shape.size  # of what matrices make
        self.hidden = self.s * shape.hidden
        self.q, self.kv = self.c * shape.q_dim, self.c * shape.kv_dim
        self.lse = 4 * shape.heads
        self.tokens = step.rows * step.length
        self.chunk = step.rows * min(step.chunk, step.length)
        # transformers' norm: a float32 copy, its normalised product, the product in the hidden states' dtype, the result.
        wide = 4 * shape.hidden
        self.norm = (wide if self.s == 2 else 0) + 2 * wide + 2 * self.hidden
        self.norm_kept = (wide if self.s == 2 else 0) + self.hidden
        self.inner = self.c * shape.intermediate


def parts(shape: Shape, step: Step) -> Parts:
    """Bytes by part."""
    z = _Sizes(shape, step)
    trained = shape.parameters if step.trained is None else step.trained
    narrow = shape.size == 2
    kept = shape.layers * kept_token(shape, step) * z.tokens
    away = step.offload == "disk" or (step.offload == "host" and step.gpu)
    return Parts(
        weights=shape.resident_bytes // step.shards,
        masters=4 * trained // step.shards if narrow else 0,
        moments=8 * trained // step.shards,
        gradients=4 * trained // step.shards,
        kept=0 if away and step.keep != "all" else kept,
        file=kept if away and step.keep != "all" else 0,
        layer=_layer(shape, step, z),
        head=_head(shape, step, z),
        rows=step.rows * step.passes * step.length * step.ring * 8 * 2,
        checkpoint=12 * trained,
    )


def kept_token(shape: Shape, step: Step) -> int:
    """Bytes that one layer keeps of one token."""
    z = _Sizes(shape, step)
    if step.keep == "inputs":
        return z.hidden
    if step.keep == "attention":
        return z.hidden + z.q + z.lse
    copies = 2 * shape.hidden if step.autocast else 0
    front = z.hidden + z.norm_kept + z.hidden + 3 * copies + 2 * z.q + 2 * z.kv + z.lse
    return front + z.hidden + z.norm_kept + z.hidden + 2 * copies + 4 * z.inner


def _layer(shape: Shape, step: Step, z: _Sizes) -> int:
    """What backward through a layer makes, beside what was kept."""
    n = z.tokens
    whole = z.hidden * n  # the gradient that came in
    linear = shape.linear_elements // shape.layers
    trains = step.trained is None or step.trained > linear
    tail_weights = shape.hidden * (shape.q_dim + 3 * shape.intermediate) if trains else 0
    front_weights = shape.hidden * (shape.q_dim + 2 * shape.kv_dim) if trains else 0
    many = step.length > step.chunk
    per_weight = (4 if many else 0) + shape.size + (4 if shape.size == 2 else 0) * 0
    around = _ring_token(shape, step, z)
    if step.keep == "all":  # what the tail kept is given back by the time that attention's turn comes
        in_tail = n * (4 * z.inner + 2 * z.hidden)
        in_attention = n * (z.hidden + z.q + around - 2 * z.hidden - z.norm_kept - 4 * z.inner)
        return whole + max(in_tail, in_attention) + shape.size * tail_weights
    m = z.chunk
    tail = m * (z.norm + 3 * z.hidden + 7 * z.inner)
    front = m * (z.norm + z.hidden + 2 * z.q + 4 * z.kv)
    qkv = (z.q + 2 * z.kv) * n
    back = step.offload == "disk" or (step.offload == "host" and step.gpu)
    got = n * (z.hidden + (z.q + z.lse if step.keep == "attention" else 0)) if back else 0
    made = n * (z.q + z.lse) if step.keep == "inputs" else 0  # attention's output, again
    in_tail = n * (z.hidden + z.q) + tail + per_weight * tail_weights + (qkv if step.keep == "inputs" else 0)
    in_attention = n * (z.hidden + z.q + around) + qkv + shape.size * tail_weights
    in_front = n * (2 * z.hidden) + qkv + front + shape.size * tail_weights + per_weight * front_weights
    return whole + got + made + max(in_tail, in_attention, in_front)


def _ring_token(shape: Shape, step: Step, z: _Sizes) -> int:
    """Bytes a token of what attention's backward makes: gradients of q, k and v; in a ring also the blocks that are on their way
    (`ring.attention.backward` on a zigzag), and all gradients in float32 until the last step."""
    if step.ring == 1:
        return z.q + 2 * z.kv
    dq, dkv, block = 4 * shape.q_dim, 8 * shape.kv_dim, 2 * z.kv
    # The first step: sums and this step's share of them; the block leaves while the next one comes.
    first = 2 * dq + 2 * dkv + 2 * block
    # Later ones: half of the queries see another's keys, or all of them see half. Sums are of q, the own block, and the one at
    # hand. While they are computed, sums of the last block leave, and others come.
    later = dq + 2 * dkv + max(dq // 2 + dkv, dq + dkv // 2) + (2 * dkv if step.ring > 2 else 0)
    laps = 1 < step.outer < step.ring
    later += block * (2 if step.ring // (step.outer if laps else 1) > 3 else 1)
    if laps:  # between nodes two blocks more, but in the last lap; sums of the lap's first, but in the first
        later += 2 * block + dkv if step.outer > 2 else max(2 * block, dkv)
    return max(first, later)


def _head(shape: Shape, step: Step, z: _Sizes) -> int:
    """Last norm, cross-entropy and its gradients."""
    chunk = step.ce_chunk or ce_chunk(shape.vocab, step.gpu)
    chunk = min(chunk, z.tokens)
    weight = shape.vocab * shape.hidden
    trains = step.trained is None or step.trained > weight
    copies = (2 * weight if step.autocast else 0) + (4 * weight if trains else 0)
    in_loss = z.tokens * 3 * z.hidden + chunk * shape.vocab * (4 + z.c) + copies
    in_norm = (
        z.tokens * 4 * z.hidden + z.chunk * (z.norm + 3 * 4 * shape.hidden) + (shape.size * weight if trains else 0)
    )
    return max(in_loss, in_norm)


def ce_chunk(vocab: int, gpu: bool) -> int:
    """Positions whose logits are alive at a time, by default: as `cross_entropy.chunk_len`."""
    return max(16, ((1 << 30) if gpu else (256 << 20)) // (4 * vocab))


def peaks(shape: Shape, step: Step) -> list[Peak]:
    """Everything that lives in each phase, weights included, the worst first."""
    p = parts(shape, step)
    always = {"weights": p.weights, "masters": p.masters, "moments": p.moments, "rows": p.rows}
    always["libraries"] = MATMUL * step.threads
    embedding = 4 * shape.vocab * shape.hidden // step.shards
    head = min(p.gradients, embedding)
    unsharded = _unsharded(shape, step)
    found = []

    def phase(name: str, **more: int) -> None:
        alive = {k: v for k, v in sorted({**always, **more}.items(), key=lambda x: -x[1]) if v}
        found.append(Peak(name, sum(alive.values()), alive))

    # Gradients of an earlier pass are all there; in the only pass they come layer by layer, the embeddings' last.
    before = p.gradients if step.passes > 1 else 0
    one = p.kept // shape.layers
    whole = step.trained is None or step.trained > shape.linear_elements
    mine = 4 * shape.linear_elements // shape.layers // step.shards + embedding if whole else 0
    table = embedding if whole else 0
    phase("the loss", kept=p.kept, head=p.head, gradients=before, gathered=unsharded)
    phase("the last layer's backward", kept=p.kept, layer=p.layer, gradients=before or head, gathered=unsharded)
    later = before or max(0, p.gradients - mine)
    phase("the first layer's backward", kept=one, layer=p.layer, gradients=later, gathered=unsharded)
    phase("the embeddings' backward", gradients=before + table or p.gradients, gathered=unsharded)
    phase("the optimizer's step", gradients=p.gradients)
    return sorted(found, key=lambda x: -x.bytes)


def _unsharded(shape: Shape, step: Step) -> int:
    """Whole weights of what computes, where they are spread: two layers, embeddings and head."""
    if step.shards == 1:
        return 0
    layer = shape.linear_elements // shape.layers
    return shape.size * (2 * layer + (1 if shape.tied else 2) * shape.vocab * shape.hidden)


def flops(shape: Shape, step: Step) -> tuple[float, float]:
    """(of matrices, of attention) of one step: a backward is two forwards of matrices and 2.5 of attention."""
    again = 0 if step.keep == "all" else 1
    attention_again = 1 if step.keep == "inputs" else 0
    tokens = step.rows * step.passes * step.length
    head = 2.0 * shape.vocab * shape.hidden * tokens
    matrices = shape.linear_flops(tokens) * (3 + again) + 3 * head
    attention = step.rows * step.passes * shape.attention_flops(step.length) * (3.5 + attention_again)
    return matrices, attention
