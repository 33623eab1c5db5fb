"""The very calls that a model makes to ``kernels``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import kernels

DYNAMIC = ("involution2d", "involution2d_generate", "contmix2d", "outlook_attention2d")
Function = Callable[..., Any]


@contextmanager
def around(wrap: Callable[[str, Function], Function], operators: Sequence[str] = DYNAMIC) -> Iterator[None]:
    """Inside the block models call ``wrap(name, operator)`` where they call ``kernels.<name>``; in one thread only."""
    originals = {name: getattr(kernels, name) for name in operators}
    for name, function in originals.items():
        setattr(kernels, name, wrap(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)


@dataclass(frozen=True)
class Call:
    """One call of an operator: its name, every argument by name, and what it returned."""

    operator: str
    arguments: dict[str, Any]
    output: Tensor


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls of dynamic kernels that models make inside the block, in order."""
    calls: list[Call] = []

    def recording(name: str, function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Tensor:
            output = function(*arguments, **options)
            bound = inspect.signature(function).bind(*arguments, **options)
            bound.apply_defaults()
            calls.append(Call(name, dict(bound.arguments), output))
            return output

        return call

    with around(recording):
        yield calls
