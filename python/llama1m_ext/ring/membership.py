"""Models that several ranks share: `distributed` names the process group, and the model's options remember the layout's name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..options import Options, llama_models, read, set_options
from . import agreement
from .layout import Layout

__all__ = ["distributed", "generating", "layout_of", "share_logits"]

FEW = 16
"""Positions of a call, at most, that have rank 0's logits on all ranks: `generate` asks for one, or for those of a guess."""

_layouts: dict[str, Layout] = {}
"""By name: what is on a model is copied and pickled with it, which a process group can't be."""


def distributed(
    model: Any,
    group: Any = None,
    *,
    sharding: str = "zigzag",
    inner: int | None = None,
    outer: int = 1,
    ranks_per_node: int | None = None,
    kv_format: str = "model",
    timeout: float | None = None,
) -> Layout:
    """From now on the ranks of a process group run a model together: each holds the whole model and a share of every context.

    Every rank makes the same calls with the same arguments, as `torchrun --nproc-per-node N script.py` does, and gets the same
    results. A prompt is spread over the ranks, with ring attention between them (Liu et al., 2310.01889); each keeps its share of the
    KV cache; a decoded token asks all of them, and one keeps it. Rank 0's logits count on all ranks, and in `generate` its random
    state, so that CPUs of different types choose the same tokens.

    Args:
        model: a Llama of transformers, or something that holds one (a pipeline).
        group: the process group: gloo for models on CPUs, NCCL for those on GPUs ("cpu:gloo,cuda:nccl" is best), where each process has
            a GPU of its own (`device_map={"": int(os.environ["LOCAL_RANK"])}`). None: the default one, which is made of what torchrun
            says where there is none.
        sharding, inner, outer, ranks_per_node, kv_format, timeout: as `Layout` takes them.

    Returns:
        The layout; `links.sent` counts the bytes that this rank sent.

    Raises:
        TypeError, ValueError: no Llama inside, or arguments that make no layout.
        RuntimeError: no process group, and torchrun did not start this process.
    """
    models = llama_models(model)
    if group is None and not (dist.is_available() and dist.is_initialized()):
        _join(timeout)
    layout = Layout(
        group,
        sharding=sharding,
        inner=inner,
        outer=outer,
        ranks_per_node=ranks_per_node,
        kv_format=kv_format,
        timeout=timeout,
    )
    for inner_model in models:
        layout.check_device(inner_model.embed_tokens.weight.device)
    name = f"ring-{len(_layouts)}"
    _layouts[name] = layout
    set_options(model, ring=name)
    return layout


def layout_of(model: Any, options: Options | None = None) -> Layout | None:
    """The layout of a `LlamaModel` that several ranks share; None: it is this process's alone.

    Raises:
        RuntimeError: it was one of another process.
    """
    options = read(model) if options is None else options
    if options.ring is None:
        return None
    layout = _layouts.get(options.ring)
    if layout is None:
        raise RuntimeError(
            f"ring: expected a layout of this process, got {options.ring!r}, of the process that the model was copied from; "
            "call llama1m_ext.distributed(model), or set_options(model, ring=None)"
        )
    return layout


@contextlib.contextmanager
def generating(owner: Any, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, a model generates: its ranks do so alike, from one random state.

    Args:
        owner: the `LlamaForCausalLM`.
        kwargs: of `generate`.

    Raises:
        ValueError: something by which ranks would stop at different tokens.
        DisagreementError: ranks were asked different things.
        LinkError: a rank is silent.
    """
    inner = owner.model
    layout = layout_of(inner)
    if layout is None or layout.world_size == 1:
        yield
        return
    config = kwargs.get("generation_config") or getattr(owner, "generation_config", None)
    problem = None
    if (kwargs.get("max_time") if "max_time" in kwargs else getattr(config, "max_time", None)) is not None:
        problem = ValueError("max_time: expected None where several ranks generate: each has a clock of its own")
    asked = {name: value for name, value in kwargs.items() if _is_plain(value)}
    same = {"generate": asked, "generation_config": None if config is None else config.to_dict()}
    agreement.agree(layout.links, same, 0, problem, layout.control_device())
    _share_random_state(layout, inner.embed_tokens.weight.device)
    yield


def share_logits(model: Any, result: Any) -> None:
    """The logits of a call of few positions become rank 0's, on all ranks: what each chooses by them is the same.

    All of them have computed these, but CPUs of different types round differently, and two tokens may be as good as equally likely.

    Args:
        model: the `LlamaModel`.
        result: of its `LlamaForCausalLM`'s forward; its logits are written to.

    Raises:
        LinkError: a rank is silent.
    """
    layout = layout_of(model)
    if layout is None or layout.world_size == 1:
        return
    logits = result.logits if hasattr(result, "logits") else result[0]
    if logits.dim() != 3 or logits.shape[1] > FEW or logits.requires_grad:
        return
    carried = logits.contiguous()
    layout.links.from_first([carried], "sharing logits")
    if carried is not logits:
        logits.copy_(carried)


def _is_plain(value: object) -> bool:
    """Whether a `repr` says all there is."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _share_random_state(layout: Layout, device: torch.device) -> None:
    """Rank 0's, on all ranks: what is sampled is what one process would sample."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    carried = [state.to(layout.control_device()) for state in states]
    layout.links.from_first(carried, "sharing the random state")
    if layout.rank:
        torch.set_rng_state(carried[0].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(carried[1].cpu(), device)


def _join(timeout: float | None) -> None:
    """The default process group, of what torchrun says."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"group: expected a process group, or a process that torchrun started, got neither ({', '.join(missing)} not set)"
        )
    if not dist.is_available():
        raise RuntimeError("group: expected a torch with torch.distributed, got one without")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=None if timeout is None else timedelta(seconds=timeout))
