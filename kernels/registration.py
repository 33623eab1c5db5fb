"""What every registered operator needs: how it is registered, how a schema spells a window, what it refuses.

The operators are ``torch.library.custom_op``s and not ``triton_op``s, whose bodies PyTorch traces: ours look configs up
in files, record launches, and run an eager path or Triton's interpreter. The backend's name travels in the schemas
because the backward pass must run what the forward pass ran, and it comes when the ``use_backend`` block is over, on a
thread of PyTorch's own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.utils import _pytree

from kernels.windows import Window

WINDOW = "int[] stride, int[] padding, int[] dilation, bool clamped, str backend"


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` in the dtypes of its arguments: ``check_tensors`` has applied autocast already."""

    @functools.wraps(function)
    def wrapper(first: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if first.device.type == "meta" or not torch.is_autocast_enabled(first.device.type):
            return function(first, *arguments, **keywords)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments, **keywords)

    return wrapper


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register the decorated implementation as ``dynamic_kernels::<name>``."""

    def register(function: Callable[..., Any]) -> CustomOpDef:
        run = without_autocast(function)

        @functools.wraps(function)
        def implementation(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, _pytree.tree_leaves(arguments))):
                raise NotImplementedError(
                    f"dynamic_kernels::{name} has no forward-mode derivative: record the graph that one is to pass "
                    'through inside the dual level, or under kernels.use_backend("reference")'
                )
            return run(*arguments)

        return torch.library.custom_op(f"dynamic_kernels::{name}", implementation, mutates_args=(), schema=schema)

    return register


def once_differentiable(backward: CustomOpDef, name: str) -> None:
    """Make the second derivative through ``backward`` an error that says how to get one."""

    def refuse(ctx: Any, *_grads: Any) -> None:
        raise NotImplementedError(
            f"{name} can be differentiated once. For a second derivative, as of a gradient penalty, compute it under "
            'kernels.use_backend("reference")'
        )

    backward.register_autograd(refuse)


def derivative(forward: CustomOpDef, backward: CustomOpDef, tensors: int, name: str) -> None:
    """Make ``backward(grad, *arguments)``, one gradient per tensor, the only derivative of ``forward(*arguments)``,
    whose first arguments are so many tensors or None."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: under gradient checkpointing a second time is an error
        grads = backward(grad, *saved, *ctx.options)
        found = [None if tensor is None else grad for tensor, grad in zip(saved, grads, strict=True)]
        return *found, *[None] * len(ctx.options)

    forward.register_autograd(differentiate, setup_context=save)
    once_differentiable(backward, name)


def gradients(ctx: Any, *functions: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
    """The first arguments' gradients, each computed if somebody wants it, and None for the rest of ``ctx.number``."""
    found = [function() if wants else None for function, wants in zip(functions, ctx.needs_input_grad, strict=False)]
    return *found, *[None] * (ctx.number - len(found))


def window_of(kernel_size: Sequence[int], *fields: Any) -> Window:
    """The window of a schema's arguments."""
    stride, padding, dilation, clamped = fields[:4]
    size, strides, paddings, dilations = ((pair[0], pair[1]) for pair in (kernel_size, stride, padding, dilation))
    return Window(size, strides, paddings, dilations, clamped)


def fields_of(window: Window) -> tuple[Any, ...]:
    """The window as the schema spells it, its kernel size left to the operators that need it."""
    return list(window.stride), list(window.padding), list(window.dilation), window.clamped
