"""The rotary embedding of a stage."""

from __future__ import annotations

from typing import Any

from .stages import Stage, StagesError


def turn_to(model: Any, stage: Stage) -> tuple[float, int]:
    """Gives the model the stage's theta and length. Returns (theta, positions) as they are now.

    Raises:
        StagesError: a theta that the model can't have, or none where it needs one.
    """
    config = _config(model)
    known = int(config.max_position_embeddings)
    if stage.theta is None and stage.method is None:
        if stage.length > known:
            raise StagesError(
                f"stage {stage.name}: expected theta or method, as the model's config has {known} positions and rows have "
                f"{stage.length} tokens; got neither"
            )
        return theta_of(config), known
    try:
        from ..extension import extend  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return _without(model, stage)
    try:
        done = extend(model, stage.length, theta=stage.theta, method=stage.method)
    except (TypeError, ValueError) as e:
        raise StagesError(f"stage {stage.name}: {e}") from None
    return float(done.theta), int(done.max_len)


def theta_of(config: Any) -> float:
    """What the config says."""
    parameters = getattr(config, "rope_parameters", None)  # since 5.0
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def _config(model: Any) -> Any:
    from .forward import causal_of

    return causal_of(model).config


def _without(model: Any, stage: Stage) -> tuple[float, int]:
    from .forward import causal_of

    causal = causal_of(model)
    config, inner = causal.config, causal.model
    if stage.theta is None:
        raise StagesError(f"stage {stage.name}: expected theta, got method {stage.method!r}")
    if getattr(config, "rope_parameters", None):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": stage.theta}
    config.rope_theta = stage.theta
    config.max_position_embeddings = stage.length
    inner.rotary_emb = type(inner.rotary_emb)(config).to(inner.rotary_emb.inv_freq.device)
    return stage.theta, stage.length
