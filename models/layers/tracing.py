"""Modules that ``torch.fx`` records as one node."""

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn


def leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a ``forward`` whose steps depend on its input: ``torch.fx`` records one call of the module."""

    @functools.wraps(forward)
    def traced_as_one(self: nn.Module, *inputs: Any) -> Any:
        for x in inputs:
            if isinstance(x, fx.Proxy):
                tracer: Any = x.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), inputs, {})
        return forward(self, *inputs)

    return traced_as_one
