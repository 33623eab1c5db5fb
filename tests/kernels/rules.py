"""What the rules of the conformance tests have in common: how an operator is run, checked and watched."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels.launch import record_launches
from kernels.tuning.choose import Request, observing
from tests.kernels.operators import MAPS, OPERATOR, OPERATORS
from tests.kernels.row import Case, Operator
from tests.support import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close

BACKENDS = ("reference", "eager", "triton")
OURS = BACKENDS[1:]
CASES = [(operator.at(case), name) for operator in OPERATORS for name, case in operator.cases.items()]
BY_NAME = pytest.mark.parametrize("operator", OPERATORS, ids=[operator.name for operator in OPERATORS])
EVERY_CASE = pytest.mark.parametrize("operator", [pytest.param(o, id=f"{o.name}, {name}") for o, name in CASES])
ON_ALL = pytest.mark.parametrize("backend", BACKENDS)
ON_OURS = pytest.mark.parametrize("backend", OURS)


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def run(
    operator: Operator, tensors: dict[str, Tensor], backend: str, grad: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients; without ``grad`` those of the output's sum, whose own gradient overlaps itself."""
    inputs = leaves(tensors)
    with kernels.use_backend(backend):
        out = operator(inputs)
    return out, torch.autograd.grad(
        out, tuple(inputs.values()), torch.ones_like(out[:1, :1]).expand_as(out) if grad is None else grad
    )


def check(
    operator: Operator, tensors: dict[str, Tensor], backend: str, layout: Callable[[Tensor], Tensor] = Tensor.detach
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compares output and gradients, for a gradient of that layout, with the float64 definition of the same values."""
    dtype = next(iter(tensors.values())).dtype
    expected, inputs = operator.exact(tensors)
    grad = layout(torch.randn_like(expected).to(dtype))
    out, grads = run(operator, tensors, backend, grad)
    assert out.dtype == dtype
    assert_close(out, expected, operator.rounding * FORWARD_TOLERANCE[dtype])
    exact = torch.autograd.grad(expected, tuple(inputs.values()), grad.double())
    tolerance = GRADIENT_TOLERANCE[dtype] * (operator.rounding if dtype.itemsize == 2 else 1)
    for name, ours, right in zip(inputs, grads, exact, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, right, tolerance, f"gradient of {name}")
    return out, grads


@functools.cache
def kept(name: str, backend: str) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
    """Inputs, output and gradients of a run that several tests look at."""
    operator = OPERATOR[name]
    tensors = operator.tensors(batch=2)
    return tensors, *run(operator, tensors, backend)


def pixels_first(tensor: Tensor) -> Tensor:
    """The tensor with its map's axes right after the batch in memory, as NHWC or heads last."""
    axis = next((n for n in range(1, tensor.dim() - 1) if tensor.shape[n : n + 2] in MAPS), None)
    if axis is None:
        return tensor
    return tensor.movedim((axis, axis + 1), (1, 2)).contiguous().movedim((1, 2), (axis, axis + 1))


Kind = tuple[str, bool, str]


def requests(
    operator: Operator, dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = Tensor.detach
) -> list[Request]:
    """The launches of a forward and a backward pass that need a config; nothing is computed."""
    found: list[Request] = []
    inputs = leaves({name: layout(tensor) for name, tensor in operator.tensors(2, dtype, "meta").items()})
    with record_launches(), observing(found.append), kernels.use_backend("triton"):
        out = operator(inputs)
        torch.autograd.grad(out, tuple(inputs.values()), torch.empty_like(out))
    return found


def kind(request: Request) -> Kind:
    """Its kernel, which of the two window rules it follows, and the flags that tell its forms apart."""
    clamped = any(getattr(argument, "clamped", False) for argument in request.arguments)
    flags = [name for name, value in request.problem._asdict().items() if value is True]
    return request.launcher.name, clamped, " ".join(flags)


@functools.cache
def first_met() -> dict[Kind, tuple[str, Case, torch.dtype]]:
    """Kernel -> the operator that meets it first, the first case there after the smallest, and a type: float32, but for
    kernels that are for 16 bits."""
    found: dict[Kind, tuple[str, Case, torch.dtype]] = {}
    for dtype, operator in itertools.product((torch.float32, torch.float16), OPERATORS):
        smallest, *others = operator.cases.values()
        for case in (*others, smallest):
            for request in requests(operator.at(case), dtype):
                found.setdefault(kind(request), (operator.name, case, dtype))
    return found


def first_cases(operator: Operator) -> list[tuple[Case, torch.dtype]]:
    """The cases of an operator that together run the kernels that no operator before it runs."""
    met = [(case, dtype) for name, case, dtype in first_met().values() if name == operator.name]
    return list({(id(case), dtype): (case, dtype) for case, dtype in met}.values())
