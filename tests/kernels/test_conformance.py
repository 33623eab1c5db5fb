"""What every operator keeps to, on every backend: one test per rule, run over the table in ``operators``.

What an operator does beyond that (windows, strides, routes, configs) its own file tests.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from tests.kernels.operators import OPERATORS, Operator
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, INTERPRETED, assert_close

BACKENDS = ("reference", "eager", "triton")
OURS = BACKENDS[1:]
BY_NAME = pytest.mark.parametrize("operator", OPERATORS, ids=[operator.name for operator in OPERATORS])
ON_ALL = pytest.mark.parametrize("backend", BACKENDS)
ON_OURS = pytest.mark.parametrize("backend", OURS)


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def run(
    operator: Operator, tensors: dict[str, Tensor], backend: str, grad: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients; of its sum unless ``grad`` is given, and then the output's gradient overlaps itself."""
    inputs = leaves(tensors)
    with kernels.use_backend(backend):
        out = operator(inputs)
    return out, torch.autograd.grad(
        out, tuple(inputs.values()), torch.ones_like(out[:1, :1]).expand_as(out) if grad is None else grad
    )


@ON_OURS
@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_definition(operator, backend, dtype):
    tensors = operator.tensors(batch=2, dtype=dtype)
    expected, inputs = operator.exact(tensors)
    grad = torch.randn_like(expected).to(dtype)
    out, grads = run(operator, tensors, backend, grad)
    assert out.dtype == dtype
    assert_close(out, expected, operator.rounding * FORWARD_TOLERANCE[dtype])
    exact = torch.autograd.grad(expected, tuple(inputs.values()), grad.double())
    for name, ours, right in zip(inputs, grads, exact, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, right, operator.rounding * GRADIENT_TOLERANCE[dtype], f"gradient of {name}")


@ON_ALL
@BY_NAME
def test_empty_batch(operator, backend):
    tensors = operator.tensors(batch=0)
    out, grads = run(operator, tensors, backend)
    assert out.shape == operator.exact(tensors)[0].shape
    for tensor, grad in zip(tensors.values(), grads, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@functools.cache
def _kept(name: str, backend: str) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
    """Inputs, output and gradients of a run that several tests look at."""
    operator = next(operator for operator in OPERATORS if operator.name == name)
    tensors = operator.tensors(batch=2)
    return tensors, *run(operator, tensors, backend)


@ON_OURS
@BY_NAME
def test_same_bits(operator, backend):
    tensors, out, grads = _kept(operator.name, backend)
    again, grads_again = run(operator, tensors, backend)
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, grads_again))


@ON_ALL
@BY_NAME
def test_no_gradient_shares_memory(operator, backend):
    """Not with another, an input or the output, and none overlaps itself, though the output's gradient does."""
    tensors, out, grads = _kept(operator.name, backend)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (out, *tensors.values(), *grads)]
    assert len(set(storages)) == len(storages)
    for grad in grads:
        assert all(stride > 0 for stride, size in zip(grad.stride(), grad.shape, strict=True) if size > 1)


@ON_ALL
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.logits], ids=lambda operator: operator.name)
def test_huge_logits(operator, backend):
    """exp of these overflows; the softmax does not."""
    tensors = operator.tensors()
    for name in operator.logits:
        tensors[name] = 1e4 * tensors[name]
    expected, _ = operator.exact(tensors)
    out, grads = run(operator, tensors, backend)
    assert_close(out, expected, 2e-3)  # float32 logits of 1e4 are known to 1e-3 only
    assert all(grad.isfinite().all() for grad in grads)


@BY_NAME
def test_wide_offsets(operator, monkeypatch):
    """Kernels with 64-bit offsets compute the same bits."""
    tensors, out, grads = _kept(operator.name, "triton")
    asked = []
    for module in [module for name, module in sys.modules.items() if name.startswith("kernels.")]:
        if hasattr(module, "fits_int32"):
            monkeypatch.setattr(module, "fits_int32", lambda *tensors: asked.append(tensors))
    wide_out, wide_grads = run(operator, tensors, "triton")
    if not asked:
        pytest.skip("the offsets of these kernels always have 64 bits, or PyTorch computes what is this small")
    assert torch.equal(out, wide_out)
    assert all(map(torch.equal, grads, wide_grads))


@BY_NAME
def test_one_graph(operator):
    """torch.compile(fullgraph=True), forward and backward: the same numbers in the same memory order."""
    torch.compiler.reset()
    tensors = operator.tensors(batch=1)
    out, grads = run(operator, tensors, "eager")
    inputs = leaves(tensors)
    with kernels.use_backend("eager"):
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")(inputs)
    assert_close(compiled, out, FORWARD_TOLERANCE[torch.float32])
    assert compiled.stride() == out.stride()
    for ours, right in zip(torch.autograd.grad(compiled.sum(), tuple(inputs.values())), grads, strict=True):
        assert_close(ours, right, GRADIENT_TOLERANCE[torch.float32], "gradient")


class _Recorded(TorchDispatchMode):
    """Calls of this package's registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dynamic_kernels":
            self.calls.append((func, _pytree.tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


def _registered(operator: Operator, backend: str) -> Iterable[tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    with _Recorded() as recorded:
        run(operator, operator.tensors(), backend)
    return {call[0]: call for call in recorded.calls}.values()


@ON_OURS
@BY_NAME
def test_registration(operator, backend):
    """Schema and fake implementation, strides too, of all that the forward and the backward pass call."""
    calls = _registered(operator, backend)
    assert calls
    for overload, arguments in calls:
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


@ON_OURS
@BY_NAME
def test_flops(operator, backend):
    """Of kernels on meta tensors, so that nothing is computed."""
    inputs = leaves(operator.tensors(batch=3, device="meta" if backend == "triton" else DEVICE))
    with kernels.use_backend(backend), FlopCounterMode(display=False) as forward:
        out = operator(inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), tuple(inputs.values()))
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(6 * n for n in operator.multiply_adds)


@ON_OURS
@BY_NAME
def test_second_derivative(operator, backend):
    """Right, or refused by a sentence that says how to get one; ``test_definition`` holds the first."""
    tensors = leaves(operator.tensors(dtype=torch.float64))
    values = tuple(tensors.values())

    def function(*values):
        return operator(dict(zip(tensors, values, strict=True)))

    with kernels.use_backend(backend):
        if operator.twice:
            assert torch.autograd.gradgradcheck(function, values, fast_mode=True)
            return
        grads = torch.autograd.grad(function(*values).sum(), values, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf'{operator.name} can be .* once.*use_backend\("reference"\)'):
        grads[0].sum().backward()


@ON_ALL
@BY_NAME
def test_forward_mode(operator, backend):
    """The definition's derivative; through a graph that our operators recorded before, an error."""
    tensors = operator.tensors(dtype=torch.float64)
    tangents = [torch.randn_like(tensor) for tensor in tensors.values()]

    def function(*values):
        return operator(dict(zip(tensors, values, strict=True)), kernels.reference)

    expected = torch.func.jvp(function, tuple(tensors.values()), tuple(tangents))[1]
    with kernels.use_backend(backend), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, tensors.values(), tangents)
        found = forward_ad.unpack_dual(operator(dict(zip(tensors, duals, strict=True)))).tangent
    assert found is not None
    assert_close(found, expected, FORWARD_TOLERANCE[torch.float64])


@BY_NAME
def test_forward_mode_through_a_recorded_graph_is_refused(operator):
    if operator.name == "depthwise_conv2d" and DEVICE != "cpu":
        pytest.skip("the eager path is PyTorch's convolution there, which has forward-mode derivatives")
    inputs = leaves(operator.tensors())
    with kernels.use_backend("eager"):
        out = operator(inputs)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=r"use_backend\(\"reference\"\)"):
            torch.autograd.grad(out, tuple(inputs.values()), grad)


@ON_ALL
@BY_NAME
def test_autocast(operator, backend):
    """Every input is cast, as a convolution's, and the output has autocast's type."""
    tensors = operator.tensors()
    with torch.autocast(DEVICE, torch.bfloat16), kernels.use_backend(backend):
        out = operator(tensors)
    with kernels.use_backend(backend):
        expected = operator({name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@ON_ALL
@BY_NAME
def test_a_nan_stays_in_its_image(operator, backend):
    for name, shape in operator.inputs.items():
        if shape[0] != "B":
            continue
        tensors = operator.tensors(batch=2)
        tensors[name][1] = float("nan")
        with kernels.use_backend(backend):
            out = operator(tensors)
        assert out[0].isfinite().all(), name
        assert out[1].isnan().any(), name


def _definition(operator: Operator, tensors: dict[str, Tensor]) -> list[Tensor]:
    out, inputs = operator.exact(tensors)
    return [out, *torch.autograd.grad(out.sum(), tuple(inputs.values()))]


@ON_OURS
@BY_NAME
def test_reach_of_a_nan(operator, backend, request):
    """One NaN reaches every output and gradient that depends on the number in its place, and besides only what the
    definition makes NaN by multiplying it with the zeros around a map."""
    if backend == "eager" and DEVICE != "cpu":
        pytest.skip("off the CPU the eager path does not look for a NaN: it would have to wait for the device")
    if backend in operator.spreads:  # on a GPU only where a problem is too large for PyTorch's convolution
        request.applymarker(pytest.mark.xfail(strict=INTERPRETED, reason="a NaN spreads over a tile"))
    tensors = operator.tensors()
    before = _definition(operator, tensors)
    for name, tensor in tensors.items():
        element = tensor.numel() // 2
        replaced = {key: value.clone() for key, value in tensors.items()}
        replaced[name].view(-1)[element] += 1
        dependent = [(a - b).abs() > 1e-9 for a, b in zip(_definition(operator, replaced), before, strict=True)]
        replaced[name].view(-1)[element] = float("nan")
        allowed = [a.isnan() | b for a, b in zip(_definition(operator, replaced), dependent, strict=True)]
        out, grads = run(operator, replaced, backend)
        whats = ("output", *(f"gradient of {key}" for key in tensors))
        for what, found, least, most in zip(whats, (out, *grads), dependent, allowed, strict=True):
            assert found[least].isnan().all(), f"a NaN in {name} is lost from {what}"
            assert not found[~most].isnan().any(), f"a NaN in {name} goes too far in {what}"
