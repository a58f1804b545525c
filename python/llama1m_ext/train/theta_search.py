"""The theta that suits a model at a length, found by trying: `llama1m theta-search`.

The published laws differ by a quarter and more, and none knows the model. Here each theta is put into the model as it is,
without training, and judged by

    objective = nll + needle_weight * (1 - accuracy)

nll is the mean over the tokens of held-out text that have at least half the length before them (nats a token), accuracy the
share of needles found in a prompt of that length. Which thetas are tried stands in `theta_trials`: it follows from what was
found before, so a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _compat
from ..eval import needle as hidden
from ..eval import plot, ppl
from ..eval.cells import CELLS, Cells, model_settings, text_digest, write_json
from ..eval.haystack import Haystack
from ..eval.load import pieces_of
from ..eval.reader import Show
from ..eval.reader import bar as bar_of
from ..extension import extended, inner_models, original
from ..theta import LAWS, real, theta_for, whole
from .theta_report import Searched, ThetaSearch
from .theta_trials import Search, Trial, thetas

LEAST = 16
"""Tokens of a length."""
DEFAULT = Search()


def theta_search(
    model: Any,
    tokenizer: Any,
    text: str,
    lengths: Sequence[int],
    *,
    needles: int = 8,
    kind: str = "passkey",
    windows: int = 1,
    seed: int = 0,
    search: Search = DEFAULT,
    original_max_len: int | None = None,
    original_theta: float | None = None,
    repeat: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Show = "auto",
) -> ThetaSearch:
    """Finds for each length the theta under which the model does best as it is. The model is left as it was.

    Args:
        model: a causal language model that `llama1m_ext.extend` takes.
        tokenizer: its tokenizer.
        text: what it was not trained on, of at least `windows` times the greatest length.
        lengths: tokens. Where one is less than the model's own, its theta is sought around the one it has.
        needles: hidden in one prompt of each length, at evenly spaced depths; 0: the text alone decides.
        kind: of the needles, as for `llama1m_ext.eval.needle.needle`.
        windows: pieces of the text, from its beginning on, each of them `length` tokens.
        seed: of the needles.
        search: how thetas are chosen.
        original_max_len, original_theta: what the laws start from, where the config says something else.
        repeat: a text that is too short begins again where it ends.
        out: a folder. Each evaluation is kept there as soon as it is made, and in the end `theta-search.json` and
            `theta-search.png`.
        resume: go on with what is in that folder.
        progress: a bar; "auto": where there are 16384 tokens or more to read.

    Raises:
        TypeError, ValueError: arguments that make no sense, a text that is too short, a rotation that has no theta to choose;
            a folder with results where `resume` was not asked for, or with those of another model, text or needles.
        KeyboardInterrupt: what was evaluated is kept, and the model is as it was.
    """
    sizes = sorted({whole("lengths", n) for n in lengths})
    if not sizes or sizes[0] < LEAST:
        raise ValueError(f"lengths: expected numbers of tokens from {LEAST} on, got {list(lengths)}")
    for name, value, least in (("windows", windows, 1), ("needles", needles, 0)):
        if whole(name, value) < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not isinstance(text, str):
        raise TypeError(f"text: expected a text, got {type(text).__name__}")
    base = _Base.of(model, original_max_len, original_theta)
    judge = _Judge(
        model,
        tokenizer,
        Haystack(text, tokenizer, repeat=repeat, name="text"),
        needles,
        kind,
        windows,
        seed,
        base,
        progress,
    )
    judge.check(sizes)
    settings: dict[str, Any] = {}
    if out is not None:
        plot.require()
        if not resume and (Path(out) / CELLS).is_file() and (Path(out) / CELLS).stat().st_size:
            raise ValueError(f"out: {str(out)!r} has results already; resume=True (--resume) goes on with them")
        settings = {
            "command": "theta-search",
            "model": model_settings(model, tokenizer),
            "text": text_digest(judge.stack.text),
            "repeat": repeat,
            "windows": windows,
            "needles": {"number": needles, "kind": kind, "seed": seed} if needles else None,
        }
    found: list[Searched] = []
    evaluations = search.evaluations * len(sizes)
    with (
        Cells(out, settings, ("length", "theta")) as cells,
        bar_of("theta", " thetas", progress, evaluations * judge.tokens(sizes) // len(sizes), evaluations) as bar,
    ):
        for n in sizes:
            found.append(_searched(n, base, search, judge, cells, bar))
    result = ThetaSearch(found, search.needle_weight, needles, kind if needles else None, windows)
    if out is not None:
        write_json(Path(out) / "theta-search.json", result.to_dict())
        result.plot(Path(out) / "theta-search.png")
    return result


@dataclass(frozen=True)
class _Base:
    """A model's rotation: what it is now, and what the laws start from."""

    now: float
    max_len: int
    theta: float
    head_dim: int

    @classmethod
    def of(cls, model: Any, max_len: int | None, theta: float | None) -> _Base:
        inner = inner_models(model)[0]
        first_len, rope = original(inner)
        return cls(
            float(_compat.read_rope(inner.config)["rope_theta"]),
            first_len if max_len is None else whole("original_max_len", max_len),
            float(rope["rope_theta"]) if theta is None else real("original_theta", theta),
            2 * inner.rotary_emb.inv_freq.numel(),
        )

    def laws(self, length: int) -> dict[str, int]:
        """Their thetas; none where the length is less than the model's own."""
        words: dict[str, Any] = {"theta": self.theta, "original_max_len": self.max_len, "head_dim": self.head_dim}
        return {name: theta_for(length, method=name, **words) for name in LAWS} if length > self.max_len else {}


class _Judge:
    """Evaluates thetas of a model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stack: Haystack,
        needles: int,
        kind: str,
        windows: int,
        seed: int,
        base: _Base,
        progress: Show,
    ) -> None:
        self.model, self.tokenizer, self.stack, self.base = model, tokenizer, stack, base
        self.needles, self.kind, self.windows, self.seed = needles, kind, windows, seed
        self._inside: Show = False if progress is False else "auto"

    def check(self, sizes: Sequence[int]) -> None:
        """That all can be evaluated, before the first is.

        Raises:
            TypeError, ValueError: something is missing.
        """
        with self._with(sizes[-1], self.base.now):
            self.base.laws(sizes[-1])
        pieces_of(self.stack, sizes[-1], self.windows)

    def tokens(self, sizes: Sequence[int]) -> int:
        """That are read for one theta of each length."""
        return sum(sizes) * (self.windows + (self.needles > 0))

    def __call__(self, length: int, theta: float) -> tuple[float, float | None]:
        """(nll, accuracy)."""
        accuracy = None
        with self._with(length, theta):
            if self.needles:
                report = hidden.needle(
                    self.model,
                    self.tokenizer,
                    lengths=[length],
                    depths=self.needles,
                    kind=self.kind,
                    hay=self.stack.text,
                    seed=self.seed,
                    repeat=self.stack.repeat,
                    progress=False,
                )
                accuracy = report.accuracy(length)
            rows = pieces_of(self.stack, length, self.windows)
            half = ppl.perplexity(self.model, rows, buckets=[length // 2, length], progress=self._inside).buckets[0]
        return half.nll, accuracy

    def _with(self, length: int, theta: float) -> Any:
        base = self.base
        return extended(
            self.model,
            max(length, base.max_len),
            theta=theta,
            original_max_len=base.max_len,
            original_theta=base.theta,
        )


def _searched(length: int, base: _Base, search: Search, judge: _Judge, cells: Cells, bar: Any) -> Searched:
    laws, trials = base.laws(length), list[Trial]()
    for theta, why in thetas(trials, base.now, laws, search):
        at = f"{length:,} tokens, theta {theta:,.0f}"
        bar.set_postfix_str(f"{at}, best {min(t.objective for t in trials):.4f}" if trials else at)
        if (length, theta) not in cells:
            began = time.perf_counter()
            nll, accuracy = judge(length, theta)
            record = {"length": length, "theta": theta, "nll": nll if math.isfinite(nll) else None}
            cells.add({**record, "accuracy": accuracy, "seconds": round(time.perf_counter() - began, 3)})
        record = cells.get((length, theta))
        nll = math.nan if record["nll"] is None else record["nll"]
        trials.append(Trial(theta, nll, record["accuracy"], search.objective(nll, record["accuracy"]), why))
        bar.update()
    bar.total += len(trials) - search.evaluations
    bar.refresh()
    return Searched(length, base.now, laws, trials)
