"""What every registered operator needs: how it is registered, how a schema spells a window, what it refuses.

The operators are ``torch.library.custom_op``s and not ``triton_op``s, whose bodies PyTorch traces: ours look configs up
in files, record launches, and run an eager path or Triton's interpreter. The backend's name travels in the schemas
because the backward pass must run what the forward pass ran, and it comes when the ``use_backend`` block is over, on a
thread of PyTorch's own.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._autograd import _profiler_enabled
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.utils import _pytree

from kernels.windows import Window

# Before 2.14 Inductor may read a view by padded strides that the buffer below it does not keep in the end: wrong values
# and no error (pytorch/pytorch#192575). OverLoCK-XT met that, and whatever views a map before an operator can.
if torch.__version__ < "2.14" and "TORCHINDUCTOR_COMPREHENSIVE_PADDING" not in os.environ:
    torch._inductor.config.comprehensive_padding = False

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


class Operator:
    """``dynamic_kernels::<name>``, registered with PyTorch; an eager call that nothing there is to see goes past it.

    PyTorch's dispatcher, and the Python of ``torch.library`` around it, cost the host more than a launch does.
    """

    def __init__(self, definition: CustomOpDef, implementation: Callable[..., Any]) -> None:
        functools.update_wrapper(self, implementation)
        self.definition, self.implementation = definition, implementation
        self.register_fake = definition.register_fake
        self._function: type[_Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As of a ``CustomOpDef``."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        members = {"run": staticmethod(self.implementation), "save": setup_context, "differentiate": backward}
        members |= {name: staticmethod(function) for name, function in members.items()}
        self._function = type(self.implementation.__name__, (_Function,), members)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # before anything that a compiler cannot follow
            return self.definition(*arguments)
        tensors: list[Tensor] = []
        lengths: list[int | None] = []
        flat: list[Any] = []
        for argument in arguments:
            several = isinstance(argument, (list, tuple)) and len(argument) > 0 and isinstance(argument[0], Tensor)
            parts = argument if several else (argument,)
            lengths.append(len(parts) if several else None)
            flat.extend(parts)
            tensors.extend(part for part in parts if isinstance(part, Tensor))
        if _is_seen(tensors):
            return self.definition(*arguments)
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return self.implementation(*arguments)
        return self.definition(*arguments) if self._function is None else self._function.apply(*flat, lengths)


class _Function(torch.autograd.Function):
    """An operator's derivative for PyTorch, which follows no tensors in lists: these come one by one."""

    run: Callable[..., Any]
    save: Callable[..., Any]
    differentiate: Callable[..., Any]

    @classmethod
    def _gathered(cls, flat: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
        left = iter(flat)
        return tuple(next(left) if n is None else [next(left) for _ in range(n)] for n in lengths)

    @classmethod
    def forward(cls, ctx: Any, *flat_and_lengths: Any) -> Any:
        *flat, lengths = flat_and_lengths
        arguments = cls._gathered(flat, lengths)
        ctx.lengths = lengths
        output = cls.run(*arguments)
        cls.save(ctx, arguments, output)
        return output

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        found = cls.differentiate(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        spread = ((grad,) if n is None else grad for n, grad in zip(ctx.lengths, found, strict=True))
        return *itertools.chain.from_iterable(spread), None


def _is_seen(tensors: Sequence[Tensor]) -> bool:
    """Whether more than autograd is to know of a call: a mode, a transform, a trace, a profiler or a kind of tensor."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or tensors[0].is_meta
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated implementation as ``dynamic_kernels::<name>``."""

    def register(function: Callable[..., Any]) -> Operator:
        run = without_autocast(function)

        @functools.wraps(function)
        def implementation(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, _pytree.tree_leaves(arguments))):
                raise NotImplementedError(
                    f"dynamic_kernels::{name} has no forward-mode derivative: record the graph that one is to pass "
                    'through inside the dual level, or under kernels.use_backend("reference")'
                )
            return run(*arguments)

        definition = torch.library.custom_op(f"dynamic_kernels::{name}", implementation, mutates_args=(), schema=schema)
        return Operator(definition, implementation)

    return register


def once_differentiable(backward: Operator, name: str) -> None:
    """Make the second derivative through ``backward`` an error that says how to get one."""

    def refuse(ctx: Any, *_grads: Any) -> None:
        raise NotImplementedError(
            f"{name} can be differentiated once. For a second derivative, as of a gradient penalty, compute it under "
            'kernels.use_backend("reference")'
        )

    backward.definition.register_autograd(refuse)


def derivative(forward: Operator, backward: Operator, tensors: int, name: str) -> None:
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
