"""RoPE theta for a longer context: the laws that have been published or found, exact to the last digit.

Nothing is imported here but arithmetic: theta can be asked for before torch is loaded. A rotary pair i turns by
`position * theta^(-2i / head_dim)`; a larger theta slows the pairs down, the last ones most.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

ALPHA = 4.0
"""The factor of dynamic NTK that the model card's thetas follow from."""
CARD_LENGTHS = (65_536, 262_144, 524_288, 1_048_576)
"""The stages of the model card."""
_ANCHORS = (1, 8, 32)  # times original_max_len: 8192, 65536, 262144


@dataclass(frozen=True)
class Stage:
    """One length of a schedule, and the theta that a law gives for it."""

    length: int
    theta: int


def theta_for(
    length: int,
    *,
    method: str,
    theta: float = 500_000.0,
    original_max_len: int = 8192,
    head_dim: int = 128,
    factor: float = ALPHA,
) -> int:
    """The theta for a context of `length` tokens, by one of these laws (L0 = original_max_len, d = head_dim, s = length / L0):

    - `"ntk"`: `theta * s^(d / (d - 2))`, NTK-aware scaling (bloc97, 2023): the slowest pair turns as far over `length` as it
      did over L0.
    - `"dynamic"`: `theta * (factor * s - (factor - 1))^(d / (d - 2))`, what transformers' rope type "dynamic" takes at that
      length, kept for all lengths. With factor 1 it is "ntk".
    - `"gradient-v1"`: the thetas of the Llama-3-8B-Instruct-1048k card, to the last digit: 15296098 at 65536, 207112184 at
      262144, 1062356830 at 524288, 2804339835 at 1048576. "dynamic" with factor 4, in steps, each from the theta of the
      step before, truncated to a whole number: to 8 * L0, on to 32 * L0, and any longer length from there in one step
      (so the card's 1048576 is no continuation of its 524288). Lengths between take one step from the last of L0, 8 * L0 and
      32 * L0 that is not longer, which makes theta grow with the length without a jump. Another theta, L0 or head_dim goes
      through the same steps.
    - `"critical-base"`: `theta^(ln(length / 2 pi) / ln(L0 / 2 pi))`, the scaling law of Liu et al. (arXiv 2310.05209), which
      later releases of the same makers follow (3580165449 at 1048576): as many pairs as before turn less than once over
      the length.

    All are truncated to a whole number. At L0 itself each gives theta.

    Args:
        length: tokens, at least `original_max_len`.
        method: a law, see above. YaRN is none: it leaves theta alone (`llama1m_ext.extend(model, length, method="yarn")`).
        theta: of the model as it was before any extension.
        original_max_len: the context that it had then, in tokens.
        head_dim: elements of a head that are rotated.
        factor: of "dynamic" only.

    Raises:
        TypeError: a length that is no whole number, or a theta that is none at all.
        ValueError: an unknown law; a length below the original; a value for which the law has no result.
    """
    law = LAWS.get(method) if isinstance(method, str) else None
    if law is None:
        more = '; YaRN leaves theta alone: llama1m_ext.extend(model, length, method="yarn")' if method == "yarn" else ""
        raise ValueError(f"method: expected one of {', '.join(LAWS)}; got {method!r}{more}")
    length, original_max_len = whole("length", length), whole("original_max_len", original_max_len)
    theta, factor, head_dim = real("theta", theta), real("factor", factor), whole("head_dim", head_dim)
    if original_max_len < 8:
        raise ValueError(f"original_max_len: expected at least 8 tokens, got {original_max_len}")
    if length < original_max_len:
        raise ValueError(f"length: expected at least original_max_len={original_max_len}, got {length}")
    if theta <= 1:
        raise ValueError(f"theta: expected more than 1, got {theta:g}")
    if head_dim < 4 or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number from 4 on, got {head_dim}")
    if factor < 1:
        raise ValueError(f"factor: expected at least 1, got {factor:g}")
    if factor != ALPHA and method != "dynamic":
        raise ValueError(f'factor: expected the method "dynamic" with it, got {method!r}')
    try:
        return law(length, theta, original_max_len, head_dim, factor)
    except OverflowError:
        raise ValueError(
            f"length: expected one that {method} has a theta for, got {length} (from theta={theta:g} at {original_max_len})"
        ) from None


def schedule(
    method: str,
    lengths: Iterable[int] = CARD_LENGTHS,
    *,
    theta: float = 500_000.0,
    original_max_len: int = 8192,
    head_dim: int = 128,
    factor: float = ALPHA,
) -> list[Stage]:
    """The thetas of a whole progressive training, stage by stage; each follows from the model before any extension.

    Args:
        method: a law of `theta_for`.
        lengths: of the stages, in tokens, each longer than the one before. Default: the model card's.
        theta, original_max_len, head_dim, factor: as in `theta_for`.

    Raises:
        TypeError, ValueError: as `theta_for`; lengths that don't grow, or none at all.
    """
    stages: list[Stage] = []
    for length in lengths:
        if stages and not length > stages[-1].length:
            raise ValueError(
                f"lengths: expected each to be longer than the one before, got {length} after {stages[-1].length}"
            )
        made = theta_for(
            length, method=method, theta=theta, original_max_len=original_max_len, head_dim=head_dim, factor=factor
        )
        stages.append(Stage(operator.index(length), made))
    if not stages:
        raise ValueError("lengths: expected at least one, got none")
    return stages


def slow_pairs(theta: float, length: int, head_dim: int = 128) -> int:
    """How many rotary pairs don't complete one turn within `length` tokens: those with `2 pi theta^(2i / head_dim) > length`.

    What they saw of their circle in training is all that they know of it; critical-base keeps their number.
    """
    return sum(2 * math.pi * theta ** (2 * i / head_dim) > length for i in range(head_dim // 2))


def covered(theta: float, *, original_theta: float = 500_000.0, original_max_len: int = 8192) -> int:
    """The length for which "critical-base" gives this theta: how far it reaches by that law, in tokens."""
    return int(
        2 * math.pi * math.exp(math.log(theta) * math.log(original_max_len / (2 * math.pi)) / math.log(original_theta))
    )


def _ntk(length: int, theta: float, original_max_len: int, head_dim: int, factor: float) -> int:
    return _dynamic(length, theta, original_max_len, head_dim, 1.0)


def _dynamic(length: int, theta: float, original_max_len: int, head_dim: int, factor: float) -> int:
    return int(theta * (factor * length / original_max_len - (factor - 1)) ** (head_dim / (head_dim - 2)))


def _gradient_v1(length: int, theta: float, original_max_len: int, head_dim: int, factor: float) -> int:
    at = original_max_len
    for times in _ANCHORS[1:]:
        if times * original_max_len >= length:
            break
        theta = _dynamic(times * original_max_len, theta, at, head_dim, ALPHA)
        at = times * original_max_len
    return _dynamic(length, theta, at, head_dim, ALPHA)


def _critical_base(length: int, theta: float, original_max_len: int, head_dim: int, factor: float) -> int:
    return int(theta ** (math.log(length / (2 * math.pi)) / math.log(original_max_len / (2 * math.pi))))


LAWS: dict[str, Callable[[int, float, int, int, float], int]] = {
    "ntk": _ntk,
    "dynamic": _dynamic,
    "gradient-v1": _gradient_v1,
    "critical-base": _critical_base,
}
"""By name: (length, theta, original_max_len, head_dim, factor) to theta."""


def whole(name: str, value: Any) -> int:
    """A whole number, of whatever type.

    Raises:
        TypeError: something else; `name` is what the message calls it.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {value!r}") from None


def real(name: str, value: Any) -> float:
    """A finite number, of whatever type.

    Raises:
        TypeError, ValueError: something else; `name` is what the message calls it.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        found = float(value)
    except (TypeError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not math.isfinite(found):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return found
