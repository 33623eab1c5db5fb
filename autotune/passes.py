"""A function or module as it is compared and timed: called for its outputs, or for these and the gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import kernels

Function = Callable[..., Any]
PASSES = ("forward", "forward+backward")  # without and with gradients


def tensors_in(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def upcast(structure: Any) -> Any:
    """The same with half-precision tensors in float32."""

    def wide(leaf: Any) -> Any:
        half = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize < 4
        return leaf.detach().float().requires_grad_(leaf.requires_grad) if half else leaf

    return tree_map(wide, structure)


def weights_of(function: Function) -> list[nn.Parameter]:
    return list(function.parameters()) if isinstance(function, nn.Module) else []


@contextlib.contextmanager
def layers_held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Layers are in evaluation mode inside, for comparing gradients: nothing is dropped at random, whose draws depend
    on the precision, and batch norms use their running statistics.

    With the batch's own statistics a random model amplifies rounding: RedNet-26's float32 gradients are then up to
    1e-2 from the float64 ones on either path, and 6e-5 when held; in float64 the paths agree to 1e-12 either way.
    """
    every = [part for module in modules for part in module.modules()]
    layers = [part for part in every if part.training and not any(part.children())]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


class Operations(TorchDispatchMode):
    """The names of the operations that run inside, in order, with the backend that ours are told; and their count.

    ``FlopCounterMode`` counts by the same formulas, but follows modules with hooks that ``autograd.grad`` refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(" ".join([str(func), *(argument for argument in args if isinstance(argument, str))]))
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch imports Dynamo, for two seconds, to have it leave the method above alone."""
        return False


class Pass:
    """``function(*inputs, **options)`` on ``backend``.

    Backward starts from random gradients of the outputs, or with ``squared`` from those of half their sum of squares.
    While results are compared, the layers of the modules in ``held`` are in evaluation mode.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Any],
        options: Mapping[str, Any] | None = None,
        *,
        backward: bool,
        backend: str,
        held: Sequence[nn.Module] = (),
        squared: bool = False,
    ) -> None:
        self.function, self.inputs, self.options = function, tuple(inputs), dict(options or {})
        self.backward, self.backend, self.held, self.squared = backward, backend, held, squared
        given, weights = tensors_in((self.inputs, self.options)), weights_of(function)
        self.tensors = [*{id(tensor): tensor for tensor in (*given, *weights)}.values()]
        self.leaves, self.weights = ([t for t in found if t.requires_grad] for found in (given, weights))
        self.gradients: list[Tensor] = []

    def on(self, backend: str) -> Pass:
        """The same on another backend."""
        other = copy.copy(self)
        other.backend = backend
        return other

    def __call__(self) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs with the inputs' gradients, and the weights' gradients.

        ValueError where the function returns no floating-point tensor, or the gradient reaches nothing.
        """
        with kernels.use_backend(self.backend), torch.set_grad_enabled(self.backward):
            outputs = [t for t in tensors_in(self.function(*self.inputs, **self.options)) if t.is_floating_point()]
            if not outputs:
                raise ValueError("function must return a floating-point tensor, or a structure that holds one")
            results = [output.detach() for output in outputs]
            if not self.backward:
                return results, []
            reached = [output for output in outputs if output.requires_grad]
            wanted = [*self.leaves, *self.weights]
            if not reached or not wanted:
                raise ValueError("backward needs an input or a weight that the gradient reaches, and there is none")
            if not self.gradients and not self.squared:
                random = torch.Generator().manual_seed(1)
                self.gradients = [torch.randn(out.shape, generator=random).to(out) for out in reached]
            starts = [out.detach() for out in reached] if self.squared else self.gradients
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            gradients = torch.autograd.grad(reached, wanted, starts, **options)
        return [*results, *gradients[: len(self.leaves)]], list(gradients[len(self.leaves) :])

    def checked(self) -> list[Tensor]:
        """The same for a comparison: with fixed random numbers, and with the weights' gradients joined to one vector.

        A single weight's gradient may be all but zero, and its relative error mere noise.
        """
        torch.manual_seed(0)
        with layers_held(self.held):
            results, gradients = self()
        return [*results, torch.cat([g.flatten() for g in gradients])] if gradients else results
