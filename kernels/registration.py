"""What every registered operator needs: how a schema spells a window, and dtypes that autocast leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.windows import Window

__all__ = ["WINDOW", "fields_of", "window_of", "without_autocast"]

WINDOW = "int[] stride, int[] padding, int[] dilation, bool clamped, str backend"
Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Run an implementation in the dtypes it was handed: autocast has had its say in ``check_tensors``."""

    @functools.wraps(function)
    def wrapper(first: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if first.device.type == "meta" or not torch.is_autocast_enabled(first.device.type):
            return function(first, *arguments, **keywords)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments, **keywords)

    return wrapper  # pyright: ignore[reportReturnType]


def window_of(kernel_size: Sequence[int], *fields: Any) -> Window:
    """The window of a schema's arguments."""
    stride, padding, dilation, clamped = fields[:4]
    size, strides, paddings, dilations = ((pair[0], pair[1]) for pair in (kernel_size, stride, padding, dilation))
    return Window(size, strides, paddings, dilations, clamped)


def fields_of(window: Window) -> tuple[Any, ...]:
    """The window as the schema spells it, its kernel size left to the operators that need it."""
    return list(window.stride), list(window.padding), list(window.dilation), window.clamped
