"""What a row of the table of operators says, and how a rule calls its operator."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from tests.support import DEVICE, random_tensor

Shapes = dict[str, tuple[Any, ...]]


class Case(NamedTuple):
    """Shapes of an operator's tensors, with "B" for the batch, and its other arguments."""

    inputs: Shapes
    options: dict[str, Any] = {}  # noqa: RUF012


class Operator(NamedTuple):
    """``kernels.<name>``; ``rpb[0]``, ``rpb[1]`` are the entries of a list argument ``rpb``.

    Every rule looks at the first of ``cases``, some at all of them; every config of a kernel runs on the first of the
    others that reaches it. ``scales`` are shapes for which configs are chosen and nothing is computed.
    """

    name: str
    cases: dict[str, Case]
    scales: tuple[Case, ...]
    multiply_adds: tuple[int, int]  # of one image of the first case: forward, backward
    twice: bool  # whether a second derivative exists
    like: str = ""  # the argument whose memory order the output takes
    logits: tuple[str, ...] = ()  # arguments that enter a softmax
    masked: bool = False  # whether the first of them may be -inf where a caller wants no weight
    # A NaN in these may spread in Triton's kernels through a tile's product: to what depends on a block of theirs, all
    # numbers that share so many leading indices with it.
    spreads: dict[str, int] = {}  # noqa: RUF012
    free: dict[str, tuple[int, ...]] = {}  # noqa: RUF012  (axes whose size no other argument's must fit)
    steps: tuple[str, ...] = ()  # what bounds a step of the eager path, by module and name
    rounding: int = 1  # times the output's tolerance, and 16-bit gradients': products round, a softmax amplifies it

    @property
    def inputs(self) -> Shapes:
        return next(iter(self.cases.values())).inputs

    def at(self, case: Case) -> Operator:
        """The same operator with another first case."""
        return self._replace(cases={"": case})

    def tensors(self, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict[str, Tensor]:
        shapes = {name: [batch if size == "B" else size for size in shape] for name, shape in self.inputs.items()}
        if device == "meta":
            return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        return {name: random_tensor(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if name.endswith("]"):
                arguments.setdefault(name.partition("[")[0], []).append(tensor)
            else:
                arguments[name] = tensor
        return arguments | next(iter(self.cases.values())).options

    def __call__(self, tensors: dict[str, Tensor], module: ModuleType = kernels) -> Tensor:
        return getattr(module, self.name)(**self.arguments(tensors))

    def exact(self, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The float64 definition of the same values: output, and the inputs that its gradients belong to."""
        inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
        return self(inputs, kernels.reference), inputs
