"""The rotary embedding of a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from .. import _compat
from ..extension import extend, extended
from .stages import Stage, StagesError


def turn_to(model: Any, stage: Stage) -> tuple[float, int]:
    """Gives the model the stage's theta and length. Returns (theta, positions) as they are now.

    Raises:
        StagesError: a theta that the model can't have, or none where it needs one.
    """
    if stage.theta is None and stage.method is None:
        return _as_it_is(model, stage)
    try:
        done = extend(model, stage.length, theta=stage.theta, method=stage.method)
    except (TypeError, ValueError) as e:
        raise StagesError(f"stage {stage.name}: {e}") from None
    return float(done.theta), int(done.max_len)


def check(model: Any, stages: Sequence[Stage]) -> None:
    """Whether all stages' thetas can be, one after the other. The model is as it was then.

    Raises:
        StagesError: as `turn_to`.
    """
    with contextlib.ExitStack() as stack:
        for stage in stages:
            if stage.theta is None and stage.method is None:
                _as_it_is(model, stage)
                continue
            try:
                stack.enter_context(extended(model, stage.length, theta=stage.theta, method=stage.method))
            except (TypeError, ValueError) as e:
                raise StagesError(f"stage {stage.name}: {e}") from None


def _as_it_is(model: Any, stage: Stage) -> tuple[float, int]:
    from .forward import causal_of

    config = causal_of(model).config
    known = int(config.max_position_embeddings)
    if stage.length > known:
        raise StagesError(
            f"stage {stage.name}: expected theta or method, as the model's config has {known} positions and rows have "
            f"{stage.length} tokens; got neither"
        )
    return float(_compat.read_rope(config)["rope_theta"]), known
