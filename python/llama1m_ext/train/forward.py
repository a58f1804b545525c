"""The loss of a long row and its gradients, in memory that grows with the row's length by little more than its hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import families
from ..rope import Rope
from . import cross_entropy, rows
from .attention import Attention
from .cross_entropy import IGNORED, linear_cross_entropy
from .kept import Place, place
from .layer import KEEP, How, Layer

CHUNK = 2048
"""Positions that go through a norm, a projection or an MLP at a time."""


class Trainee(nn.Module):
    """A model as it is trained: its own modules, in the order of a training step.

    Wrap this where a wrapper's hooks need to see calls (DDP, FSDP): the model's own forward is not called.

    Args:
        model: a `LlamaForCausalLM` (or of a family that is switched on), or what holds one: a `PeftModel`.

    Raises:
        TypeError, ValueError: no such model, or one whose layers can't be run exactly; the message says what was found.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        causal = causal_of(model)
        inner = causal.model
        why = _unserved(inner)
        if why is not None:
            raise ValueError(f"model: expected layers that training can run piece by piece, got {why}")
        self.embed_tokens, self.norm, self.lm_head = inner.embed_tokens, inner.norm, causal.lm_head
        self.layers = nn.ModuleList(Layer(layer) for layer in inner.layers)
        kind = families.classes_of(inner)
        assert kind is not None
        self.module = kind.module
        self.__dict__["model"] = inner  # no submodule: wrappers would meet the layers twice
        self.head_dim = int(inner.layers[0].self_attn.head_dim)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        how: How,
        reduction: str = "mean",
        denominator: Tensor | float | None = None,
        ce_chunk: int | None = None,
        engine: str = "own",
    ) -> Tensor:
        """The loss of each position's own label: labels are shifted already."""
        x = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rope = Rope(self.module, self.__dict__["model"].rotary_emb, x, position_ids, self.head_dim)
        for layer in self.layers:
            inner: Any = layer.inner
            x = layer(x, rope if getattr(inner.self_attn, "use_rope", True) else _still(), how)
        (x,) = rows.by_rows(self._normed, (x,), rows.trainable(self.norm), how.chunk)
        if is_plain_head(self.lm_head):
            return linear_cross_entropy(
                x,
                self.lm_head.weight,
                labels,
                bias=self.lm_head.bias,
                loss_weights=loss_weights,
                reduction=reduction,  # type: ignore[arg-type]
                denominator=denominator,
                chunk=ce_chunk,
                engine=engine,
            )
        chunk = cross_entropy.chunk_len(getattr(self.lm_head, "out_features", 1 << 17), x.device)
        return self._by_calls(x, labels, loss_weights, reduction, denominator, ce_chunk or chunk)

    def _normed(self, x: Tensor) -> tuple[Tensor]:
        return (self.norm(x),)

    def _by_calls(
        self,
        x: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None,
        reduction: str,
        denominator: Tensor | float | None,
        chunk: int,
    ) -> Tensor:
        """For a head with adapters or hooks, which wants to be called."""

        def each(h: Tensor, label: Tensor) -> tuple[Tensor]:
            logits = self.lm_head(h)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), label, ignore_index=IGNORED, reduction="none")
            return (losses,)

        rows_at_a_time = max(1, chunk // len(x))
        (losses,) = rows.by_rows(each, (x, labels), rows.trainable(self.lm_head), rows_at_a_time)
        if loss_weights is not None:
            losses = losses * loss_weights.to(losses.dtype)
        if reduction == "none":
            return losses
        total = losses.sum()
        if reduction == "sum":
            return total
        over = cross_entropy.total_weight(labels, loss_weights) if denominator is None else denominator
        return total / torch.as_tensor(over).to(total)


def loss(
    model: Any,
    input_ids: Tensor,
    labels: Tensor | None = None,
    loss_weights: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    keep: str = "attention",
    offload: str | Place | None = None,
    offload_dir: str | None = None,
    chunk: int = CHUNK,
    ce_chunk: int | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    shifted: bool = False,
    attention: Attention | None = None,
    engine: str = "own",
) -> Tensor:
    """The language-modelling loss of rows, as `model(input_ids, labels=labels).loss`; `.backward()` gives the same gradients
    in less memory.

    Never whole are: logits, the MLP's activations, scores. Of each layer its input is kept (`keep`), elsewhere if so asked
    (`offload`). Modules are called, so adapters (PEFT) and autocast work.

    Args:
        model: a `LlamaForCausalLM`, or what holds one.
        input_ids: int64 `[batch, n]`.
        labels: int64 `[batch, n]`, `input_ids` where a position counts and -100 where not; None: `input_ids`. Position i is
            judged by label i + 1, as transformers do it.
        loss_weights: `[batch, n]`: the weight of each label's loss, beside labels.
        position_ids: int64 `[batch, n]` or `[1, n]`; default: from 0 on.
        keep: "all" (nothing is made again), "attention" (all but attention is), "inputs" (everything is).
        offload: where what is kept waits for backward: None (where it is), "host" (main memory, behind a GPU), "disk".
        offload_dir: the folder of that file.
        chunk: positions that go through an MLP at a time.
        ce_chunk: positions whose logits are alive at a time; default: by bytes.
        reduction: "mean" (over labels, or by their weights), "sum", or "none": each position's, float32 `[batch, n]`.
        denominator: what "mean" divides by; default: labels in this call, or the sum of their weights.
        shifted: labels and loss_weights are beside the positions that they judge: row i of a sequence that is spread over ranks.
        attention: what computes attention; default: this package's kernels (see `train.attention.Attention`).
        engine: of the cross-entropy, "own" or "liger".

    Raises:
        TypeError, ValueError: arguments that don't fit, or a model that is not served; the message names it.
    """
    check(input_ids, labels, loss_weights, keep, chunk)
    if labels is None:
        labels = input_ids
        if shifted:
            raise ValueError("labels: expected labels where they are shifted already, got None")
    if not shifted:
        labels, loss_weights = shift(labels, loss_weights)
    where = place(offload, offload_dir) if offload is None or isinstance(offload, str) else offload
    how = How(keep, where, chunk, attention)
    trainee = Trainee(model)
    made: Tensor = trainee(
        input_ids,
        labels,
        loss_weights,
        position_ids,
        how=how,
        reduction=reduction,
        denominator=denominator,
        ce_chunk=ce_chunk,
        engine=engine,
    )
    return made


def shift(labels: Tensor, loss_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Labels and weights beside the positions that they judge: each position's is the next one's, the last has none."""
    moved = torch.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    if loss_weights is None:
        return moved, None
    weights = torch.zeros_like(loss_weights)
    weights[:, :-1] = loss_weights[:, 1:]
    return moved, weights


def check(input_ids: Tensor, labels: Tensor | None, loss_weights: Tensor | None, keep: str, chunk: int) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected int64 [batch, n], got {got}")
    for name, t in (("labels", labels), ("loss_weights", loss_weights)):
        if t is not None and t.shape != input_ids.shape:
            raise ValueError(f"{name}: expected {tuple(input_ids.shape)} as input_ids, got {tuple(t.shape)}")
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}, got {keep!r}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected an int from 1 on, got {chunk!r}")


def causal_of(model: Any) -> Any:
    """The `LlamaForCausalLM` in a model or around its adapters.

    Raises:
        TypeError: there is none.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    inner = getattr(model, "model", None)
    if inner is None or not hasattr(model, "lm_head") or not hasattr(inner, "layers"):
        raise TypeError(f"model: expected a LlamaForCausalLM, or what holds one, got {type(model).__name__}")
    if families.classes_of(inner) is None:
        waiting = families.waiting(inner)
        if waiting is None:
            raise TypeError(f"model: expected a Llama of transformers, got {type(inner).__name__}")
        if waiting is not families.LLAMA:
            raise TypeError(
                f"model: {type(inner).__name__} is left to transformers until you say "
                f'llama1m_ext.enable(families="{waiting.name}")'
            )
        families.register(next(c for c in type(inner).__mro__ if c.__module__ == waiting.modeling))
    return model


def is_plain_head(head: Any) -> bool:
    """Whether logits are `head.weight` times the hidden states and nothing else."""
    return (
        type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks) and head._backward_hooks == {}
    )


def _unserved(inner: Any) -> str | None:
    kind = families.classes_of(inner)
    assert kind is not None
    for i, layer in enumerate(inner.layers):
        if type(layer) is not kind.decoder_layer:
            return f"a {type(layer).__name__}"
        if layer.self_attn.attention_dropout:
            return f"attention_dropout={layer.self_attn.attention_dropout}"
        width = kind.window(inner.config, i)
        if width is not None:
            return f"a sliding window of {width}"
    return None if len(inner.layers) else "no layers"


def _still() -> Any:
    from ..rope import Still

    return Still()
