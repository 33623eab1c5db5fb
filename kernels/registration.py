"""How operators are registered with PyTorch and differentiated, and how a schema spells a window.

Most operators are ``torch.library.custom_op``s and not ``triton_op``s, whose bodies PyTorch traces: they look configs
up in files, and run an eager path or Triton's interpreter. ``triton_op``s are those with one config and no other path.
The backend's name travels in the schemas because the backward pass must run what the forward pass ran, and it comes
when the ``use_backend`` block is over, on a thread of PyTorch's own.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.utils import _pytree
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import under_autocast
from kernels.launch import recording
from kernels.windows import Window

# Before 2.14 Inductor may read a view by padded strides that the buffer below it does not keep in the end: wrong values
# and no error (pytorch/pytorch#192575). OverLoCK-XT met that, and whatever views a map before an operator can. Inductor
# reads this variable when it is imported, which takes a second and is left to whoever compiles.
PADDING = "TORCHINDUCTOR_COMPREHENSIVE_PADDING"
if torch.__version__ < "2.14" and PADDING not in os.environ:
    os.environ[PADDING] = "0"
    imported: Any = sys.modules.get("torch._inductor.config")
    if imported is not None:
        imported.comprehensive_padding = False

# A Window, as ``spelled`` and ``window_of`` translate it.
WINDOW = "int[] window"


def without_autocast(function: Callable[..., Any], first: Tensor, *arguments: Any, **keywords: Any) -> Any:
    """Call ``function`` in the dtypes of its arguments: ``check_tensors`` has applied autocast already."""
    if not under_autocast(first):
        return function(first, *arguments, **keywords)
    with torch.autocast(first.device.type, enabled=False):
        return function(first, *arguments, **keywords)


def _refuse_tangents(name: str, values: Iterable[Any]) -> None:
    if forward_ad._current_level >= 0 and any(map(_has_tangent, values)):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative: run the forward pass inside the dual level, or under "
            'kernels.use_backend("reference")'
        )


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


class _Tensors(NamedTuple):
    """Stands for an argument that is a list of so many tensors."""

    number: int


_TENSOR = _Tensors(0)  # for one that is a tensor itself


def _spread(arguments: Iterable[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among arguments and in their lists, and the arguments with stand-ins for these."""
    tensors: list[Tensor] = []
    form: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            form.append(_TENSOR)
        elif isinstance(argument, (list, tuple)) and len(argument) > 0 and isinstance(argument[0], Tensor):
            tensors += argument
            form.append(_Tensors(len(argument)))
        else:
            form.append(argument)
    return tensors, form


def _gathered(left: Iterator[Any], form: Iterable[Any]) -> list[Any]:
    """The arguments again; takes from ``left`` what it needs."""
    arguments = []
    for argument in form:
        if argument is _TENSOR:
            argument = next(left)
        elif type(argument) is _Tensors:
            argument = [next(left) for _ in range(argument.number)]
        arguments.append(argument)
    return arguments


class Operator:
    """``dynamic_kernels::<name>``, registered with PyTorch.

    An eager call that nothing else needs to see goes past PyTorch's dispatcher, which, with the Python of
    ``torch.library`` around it, costs the host more than a launch does.
    """

    def __init__(self, definition: Any, function: Callable[..., Any]) -> None:
        self.definition, self.function = definition, function
        self._differentiable: type[_Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # before anything that a compiler cannot follow
            return self.definition(*arguments)
        tensors, form = _spread(arguments)
        if is_seen(tensors):
            _refuse_tangents(self.definition._qualname, tensors)
            return self.definition(*arguments)
        run = self.function
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            if self._differentiable is None:
                return self.definition(*arguments)
            run, arguments = self._differentiable.apply, (*tensors, form)
        return without_autocast(run, *arguments)

    def differentiable(self, *gradients: Callable[..., Tensor]) -> None:
        """``gradients[n](grad, *arguments)`` is the gradient of argument n, computed where somebody wants it.

        Tensors are the leading arguments.
        """

        def differentiate(ctx: Any, grads: Sequence[Any], arguments: list[Any], _outputs: Any) -> list[Any]:
            wanted = zip(gradients, ctx.needs_input_grad, strict=False)
            return [gradient(*grads, *arguments) if wants else None for gradient, wants in wanted]

        self._register(differentiate)

    def differentiable_together(self, gradients: Callable[..., Sequence[Tensor | None]]) -> None:
        """``gradients(grads, *arguments)`` are those of the leading arguments, given each output's or None."""
        self._register(lambda _ctx, grads, arguments, _outputs: gradients(grads, *arguments), keeps=False)

    def differentiable_once(self, backward: Operator, name: str, derivatives: int = 1) -> None:
        """``backward(*grads, *arguments, *outputs)`` is the only derivative: a gradient for each of the leading
        arguments that are tensors, lists of tensors or None. ``derivatives`` is how many outputs have one, and how many
        grads there are; a single output is left out of the arguments.

        A second derivative is an error that says how to get one of ``kernels.<name>``.
        """

        def refuse(ctx: Any, *_grads: Any) -> None:
            raise NotImplementedError(
                f"{name} can be differentiated once. For a second derivative, such as a gradient penalty's, compute it "
                'under kernels.use_backend("reference")'
            )

        def differentiate(_ctx: Any, grads: Sequence[Any], arguments: list[Any], outputs: Any) -> list[Any]:
            found = backward(*grads[:derivatives], *arguments, *outputs)
            return [None if argument is None else grad for argument, grad in zip(arguments, found, strict=False)]

        backward.definition.register_autograd(refuse)
        self._register(differentiate, derivatives)

    def _register(self, differentiate: Callable[..., Sequence[Any]], derivatives: int = 1, keeps: bool = True) -> None:
        """``differentiate(ctx, grads of the outputs, arguments, outputs)`` are the gradients of the leading arguments;
        ``keeps``: of several outputs only the first ones, so many, have ``derivatives``, and all are kept for them."""

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found: Sequence[Any] = ()
            if any(grad is not None for grad in grads):
                left = iter(ctx.saved_tensors)  # asked for once: under gradient checkpointing a second time is an error
                found = differentiate(ctx, grads, _gathered(left, ctx.form), left)
            return (*found, *[None] * (len(ctx.form) - len(found)))

        def save(ctx: Any, tensors: Iterable[Tensor], form: list[Any], output: Any) -> None:
            outputs = output if keeps and isinstance(output, tuple) else ()
            ctx.save_for_backward(*tensors, *outputs)
            ctx.form = form
            ctx.mark_non_differentiable(*outputs[derivatives:])
            ctx.set_materialize_grads(keeps and derivatives > 1)  # else no zeros, for what has no derivative

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, *_spread(inputs), output)

        self.definition.register_autograd(backward, setup_context=setup_context)
        members = {"function": self.function, "differentiate": backward, "save": save}
        members = {name: staticmethod(member) for name, member in members.items()}
        self._differentiable = type(self.function.__name__, (_Function,), members)


class _Function(torch.autograd.Function):
    """An operator's derivative for PyTorch, which follows no tensors in lists: these come one by one."""

    function: Callable[..., Any]
    differentiate: Callable[..., Sequence[Any]]
    save: Callable[..., None]

    @classmethod
    def forward(cls, ctx: Any, *tensors_and_form: Any) -> Any:
        *tensors, form = tensors_and_form
        output = cls.function(*_gathered(iter(tensors), form))
        cls.save(ctx, tensors, form, output)
        return output

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        spread: list[Any] = []
        for grad, argument in zip(cls.differentiate(ctx, *grads), ctx.form, strict=True):
            if argument is _TENSOR:
                spread.append(grad)
            elif type(argument) is _Tensors:
                spread += grad or [None] * argument.number
        return *spread, None


def is_seen(tensors: Sequence[Tensor]) -> bool:
    """Whether more than autograd must see a call: a mode, a transform, a trace, a profiler or a subclass of Tensor."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
        or forward_ad._current_level >= 0
        or (tensors[0].is_meta and not recording())
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def operator(
    name: str, schema: str, *, fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated implementation as ``dynamic_kernels::<name>``.

    Args:
        name: without the namespace.
        schema: ``"(Tensor x, ...) -> Tensor"``.
        fake: the arguments -> outputs of the right shapes, strides and dtypes, uninitialised.
        flops: the arguments, with shapes in place of tensors -> floating-point operations, two per multiply-add.
    """

    def register(function: Callable[..., Any]) -> Operator:
        @functools.wraps(function)
        def implementation(*arguments: Any) -> Any:
            _refuse_tangents(f"dynamic_kernels::{name}", _pytree.tree_leaves(arguments))
            return without_autocast(function, *arguments)

        definition = torch.library.custom_op(f"dynamic_kernels::{name}", implementation, mutates_args=(), schema=schema)
        definition.register_fake(fake)
        _count(name, flops)
        return Operator(definition, function)

    return register


def traced_operator(name: str, *, flops: Callable[..., int] | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function as ``dynamic_kernels::<name>``, a ``triton_op``; its annotations are the schema.

    PyTorch finds the kernels, whose code its caches depend on, in the function and in those that it calls by name.
    """

    def register(function: Callable[..., Any]) -> Operator:
        definition = torch.library.triton_op(f"dynamic_kernels::{name}", function, mutates_args=())
        _count(name, flops)
        return Operator(definition, function)

    return register


def _count(name: str, flops: Callable[..., int] | None) -> None:
    if flops is not None:
        count = register_flop_formula(getattr(torch.ops.dynamic_kernels, name))
        count(lambda *shapes, **_: flops(*shapes))


def spelled(window: Window) -> list[int]:
    """The window as WINDOW in a schema, which knows no tuples of tuples."""
    return [*window.kernel_size, *window.stride, *window.padding, *window.dilation, int(window.clamped)]


def window_of(numbers: Sequence[int]) -> Window:
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, clamped = numbers
    pairs = (kernel_h, kernel_w), (stride_h, stride_w), (padding_h, padding_w), (dilation_h, dilation_w)
    return Window(*pairs, bool(clamped))
