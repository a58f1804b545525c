"""Which model made a cache's keys and values: a saved one is that model's, and nobody else's."""

from __future__ import annotations

import copy
import weakref
from typing import Any, NamedTuple

from .fingerprint import Trace

EVERY = 256
"""Tokens after which all of a model is looked at again."""
LAYER_EVERY = 16
"""Decoded tokens after which one layer is looked at, another one each time: what is switched for a model (an adapter) is
switched in all of its layers, as a rule. So it is when more than one token comes: somebody asks something new."""


class _Writer(NamedTuple):
    """A model that has written to a cache.

    Attributes:
        model: a reference that keeps nobody alive.
        trace: what it was then.
    """

    model: weakref.ref[Any]
    trace: Trace


class Maker:
    """The models that have written to a cache, and whether each is still what it was. Pickled, they are forgotten.

    Attributes:
        mixed: why keys and values are not of one model, in words; None: they are, as far as anybody knows.
    """

    def __init__(self, mixed: str | None = None) -> None:
        self.mixed = mixed
        self._writers: list[_Writer] = []
        self._length = self._checked = self._looked = self._turn = 0

    @property
    def model(self) -> Any:
        """The one that wrote last; None: nobody did, or it is gone."""
        return self._writers[-1].model() if self._writers else None

    @property
    def gone(self) -> int:
        """How many of the models are not there any more."""
        return sum(writer.model() is None for writer in self._writers)

    def wrote(self, model: Any, length: int) -> None:
        """A `LlamaModel` has written to the cache.

        Args:
            length: tokens that it has now.
        """
        last, n = self._writers[-1] if self._writers else None, length - self._length
        self._length, change = length, None
        if last is None or last.model() is not model:
            last = next((writer for writer in self._writers if writer.model() is model), None)
            self._checked = self._looked = length
            if last is None:
                self._writers.append(_Writer(weakref.ref(model), Trace(model)))
                return
            self._writers.remove(last)
            self._writers.append(last)
            change = last.trace.change(model)
        elif abs(length - self._checked) >= EVERY:
            self._checked = self._looked = length
            change = last.trace.change(model)
        elif n != 1 or length - self._looked >= LAYER_EVERY:
            self._looked = length
            self._turn += 1
            change = last.trace.change_of_layer(model, self._turn)
        if change and self.mixed is None:
            self.mixed = f"the model that made the first of them was changed, and made more: {change}"

    def changed(self) -> str | None:
        """In words, what has changed in a model since it wrote to the cache, that is still there; None: nothing."""
        for writer in self._writers:
            model = writer.model()
            change = None if model is None else writer.trace.change(model)
            if change:
                return change
        return None

    def others(self, model: Any) -> list[Any]:
        """The models beside this one that have written to the cache, and are still there."""
        return [other for other in (writer.model() for writer in self._writers) if other not in (None, model)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Maker:
        made = Maker(self.mixed)
        made.__dict__.update(self.__dict__, _writers=[_Writer(model, copy.deepcopy(t)) for model, t in self._writers])
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Maker, (self.mixed,)
