"""Training at length: a loss whose memory is known, and progressive extension of a Llama's context, stage by stage."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cross_entropy import linear_cross_entropy
    from .forward import Trainee, loss
    from .layer import How
    from .loop import Result, Step, extend
    from .planning import TrainingPlan, plan
    from .signals import Interrupted
    from .stages import Lora, Run, Settings, Stage, StagesError

_FROM = {
    "How": "layer",
    "Interrupted": "signals",
    "Lora": "stages",
    "Result": "loop",
    "Run": "stages",
    "Settings": "stages",
    "Stage": "stages",
    "StagesError": "stages",
    "Step": "loop",
    "Trainee": "forward",
    "extend": "loop",
    "linear_cross_entropy": "cross_entropy",
    "loss": "forward",
    "plan": "planning",
    "TrainingPlan": "planning",
}
__all__ = [
    "How",
    "Interrupted",
    "Lora",
    "Result",
    "Run",
    "Settings",
    "Stage",
    "StagesError",
    "Step",
    "Trainee",
    "TrainingPlan",
    "extend",
    "linear_cross_entropy",
    "loss",
    "plan",
]


def __getattr__(name: str) -> Any:
    # What imports torch and transformers waits until it is asked for (PEP 562).
    if name in _FROM:
        return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
