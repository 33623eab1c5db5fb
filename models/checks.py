"""Argument checks of models and layers: every error names the argument, what was expected and what came."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST = 2**16  # bound of channels, blocks, heads and pixels per side


def integer(name: str, value: Any, minimum: int = 1, maximum: int = MOST) -> int:
    """An integer of any library in minimum..maximum, as an int."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    result = int(value)
    if result < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
    if result > maximum:
        raise ValueError(f"{name} must be <= {maximum}, got {value}")
    return result


def odd(name: str, value: Any) -> int:
    """An odd integer of at least 1."""
    if integer(name, value) % 2 == 0:
        raise ValueError(f"{name} must be odd, got {value}")
    return int(value)


def integers(
    name: str, values: Any, length: int | None = None, minimum: int = 1, maximum: int = MOST
) -> tuple[int, ...]:
    """A sequence of ``length`` integers (None: of at least one), each in minimum..maximum, as a tuple of ints."""
    what = f"{'positive ' if minimum == 1 else ''}ints, {'one or more' if length is None else length} of them"
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str | bytes):
        raise TypeError(f"{name} must be {what}, got {values!r}")
    if len(values) != length if length is not None else len(values) == 0:
        raise ValueError(f"{name} must be {what}, got {values!r}")
    return tuple(integer(f"{name}[{i}]", value, minimum, maximum) for i, value in enumerate(values))


def number(name: str, value: Any, minimum: float, below: float) -> float:
    """A number in [minimum, below), as a float."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    result = float(value)
    if not minimum <= result < below:  # false for NaN, too
        raise ValueError(f"{name} must lie in [{minimum:g}, {below:g}), got {value}")
    return result


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
