"""contmix2d beyond the rules for every operator: both of its forms, what it stores, what rounding and NaN do."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.contmix import configs, eager, passes
from kernels.launch import record_launches
from tests.support import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor, relative_error


def _inputs(batch=1, groups=2, query_channels=3, context=6, value_channels=5, size=(8, 7), kernel_sizes=(3, 5)):
    height, width = size
    positions = sum(k * k for k in kernel_sizes)
    shapes = [
        (batch, groups, query_channels, height, width),
        (batch, groups, query_channels, context),
        (batch, len(kernel_sizes), groups, value_channels, height, width),
        (positions, context),
        (positions,),
        *[(groups, 2 * k - 1, 2 * k - 1) for k in kernel_sizes],
    ]
    return [random_tensor(*shape, dtype=torch.float64) for shape in shapes]


def _contmix(module, tensors, kernel_sizes):
    return module.contmix2d(*tensors[:5], tensors[5:], kernel_sizes=kernel_sizes)


class _LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


NAMES = ("query", "key", "value", "proj_weight", "proj_bias", "rpb[0]", "rpb[1]", "rpb[2]")


@pytest.mark.parametrize(("threshold", "size"), [(0, 19), (10**6, 11)])
def test_windows_of_many_blocks(threshold, size, monkeypatch):
    """Six blocks of a shared window's positions, two tiles of its outputs; as own windows one row after the other."""
    monkeypatch.setattr(configs, "OUTPUTS_PER_WINDOW", threshold)
    ours = [
        tensor.float().requires_grad_() for tensor in _inputs(groups=1, size=(size, size + 1), kernel_sizes=(size,))
    ]
    results = {}
    for backend in ("eager", "triton"):
        with kernels.use_backend(backend):
            out = _contmix(kernels, ours, (size,))
            results[backend] = [out, *torch.autograd.grad(out.square().sum(), ours)]
    for name, result, expected in zip(("out", *NAMES), results["triton"], results["eager"], strict=False):
        assert_close(result, expected, GRADIENT_TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("norm", "kernel_sizes", "context"), [(1.0, (1, 5), 1), (30.0, (3, 7), 1), (1e3, (1, 7), 6)])
def test_rounding_is_no_more_than_the_definitions_own(norm, kernel_sizes, context, dtype, backend):
    """At large logits 16-bit inputs give what they give in float64, as nearly as the definition does in 16 bits."""
    exact = _inputs(size=(7, 8), context=context, kernel_sizes=kernel_sizes)
    exact[0], exact[1] = exact[0] * (norm / exact[0].norm()), exact[1] * (norm / exact[1].norm())
    ours = [tensor.to(dtype) for tensor in exact]
    expected = _contmix(kernels.reference, [tensor.double() for tensor in ours], kernel_sizes)
    naive = relative_error(_contmix(kernels.reference, ours, kernel_sizes), expected)
    with kernels.use_backend(backend):
        assert_close(_contmix(kernels, ours, kernel_sizes), expected, max(FORWARD_TOLERANCE[dtype], naive))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_that_fill_a_tile_are_finite(dtype):
    """Logits of -100 and below everywhere: a filler output, whose softmax is none, must not overflow."""
    tensors = [torch.ones(1, 1, 1, 4, 4), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 4, 4)]
    tensors += [torch.full((9, 1), -100.0), torch.zeros(9), torch.zeros(1, 5, 5)]
    ours = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    for threshold in (0, 10**6):
        with pytest.MonkeyPatch.context() as patch, kernels.use_backend("triton"):
            patch.setattr(configs, "OUTPUTS_PER_WINDOW", threshold)
            out = _contmix(kernels, ours, (3,))
            grads = torch.autograd.grad(1000 * out.sum(), ours)
        assert_close(out, torch.ones_like(out).double(), FORWARD_TOLERANCE[dtype])
        for name, grad in zip(NAMES, grads, strict=False):
            assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("threshold", "bad"), [(0, math.nan), (10**6, math.nan), (10**6, math.inf)])
def test_what_a_nan_reaches(threshold, bad, backend, monkeypatch):
    """In value: the outputs whose windows hold its pixel; in grad: their inputs, and its own pixel's query."""
    monkeypatch.setattr(configs, "OUTPUTS_PER_WINDOW", threshold)
    query, key, value, *rest = (tensor.float() for tensor in _inputs(groups=2, size=(8, 13), kernel_sizes=(3,)))
    value[0, 0, 1, 2, 3, 6] = bad
    query, value = query.requires_grad_(), value.requires_grad_()
    with kernels.use_backend(backend):
        out = _contmix(kernels, [query, key, value, *rest], (3,))
        grad = torch.randn_like(out)
        grad[0, 0, 0, 1, 4, 9] = bad
        grad_query, grad_value = torch.autograd.grad(out, (query, value), grad)
    reached = torch.zeros(2, 8, 13, dtype=torch.bool)
    reached[1, 2:5, 5:8] = True
    assert out[0, 0].isfinite().logical_not().any(1).equal(reached)
    assert out[0, 0, :, 3].isfinite().all(), "channels are sums of their own"
    reached[0, 4, 9] = True
    assert grad_query[0].isfinite().logical_not().any(1).equal(reached)
    reached = torch.zeros(2, 8, 13, dtype=torch.bool)
    reached[0, 3:6, 8:11] = True
    assert grad_value[0, 0].isfinite().logical_not().any(1).equal(reached)


def test_logits_are_never_stored_whole():
    """A 200x320 map with K = 13 and eight heads has 86 million: no tensor that either path makes comes near that."""
    shapes = (1, 8, 16, 200, 320), (1, 8, 16, 169), (169,), (8, 25, 25), (1, 1, 8, 16, 200, 320)
    logits = 8 * 200 * 320 * 169

    def largest(device, run, backward):
        query, projected, bias, rpb, value = (torch.empty(shape, device=device) for shape in shapes)
        with _LargestTensor() as seen:
            out, statistics = run.contmix(query, projected, bias, [rpb], value, [13])
            if backward:
                run.contmix_backward(out, query, projected, bias, [rpb], value, out, statistics, [13])
        return seen.elements

    with record_launches():  # sizes are all that is asked for
        assert largest("meta", passes, backward=False) == 8 * 16 * 200 * 320  # the output
        assert largest("meta", passes, backward=True) <= logits / 5


def test_eager_logits_are_never_stored_whole():
    """One head of such a map, 10.8 million logits."""
    query, value = torch.randn(1, 1, 16, 200, 320), torch.randn(1, 1, 1, 16, 200, 320)
    inputs = query, torch.randn(1, 1, 16, 169), torch.randn(169), [torch.randn(1, 25, 25)], value
    with _LargestTensor() as seen:
        out, statistics = eager.contmix(*inputs, [13])
        eager.contmix_backward(out, *inputs, out, statistics, [13])
    assert seen.elements <= 200 * 320 * 169 / 4  # the values of overlapping tiles, more than twice the map
