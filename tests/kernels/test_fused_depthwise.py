"""3×3 depthwise convolution with GELU before and sums of squares after it, against PyTorch in float64."""

import os
import subprocess
import sys
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import tolerances
from kernels.depthwise.op import residual_depthwise_conv2d
from kernels.launch import watching_launches
from tests.support import DEVICE, assert_close, random_tensor, triton_device

fused = pytest.importorskip("kernels.depthwise.fused")
sliding = pytest.importorskip("kernels.depthwise.sliding")


@pytest.fixture(autouse=True)
def _where_triton_runs():
    triton_device()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5, 9), (1, 66, 37, 7), (3, 2, 1, 1), (1, 130, 17, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gelu_convolution(shape, residual, dtype):
    """Outputs and gradients, through both outputs."""
    channels = shape[1]
    x, grad = (random_tensor(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    tensors = [x, random_tensor(channels, 1, 3, 3, dtype=dtype), random_tensor(channels, dtype=dtype)]
    grads = [grad, random_tensor(*shape[:2]) / 10]
    assert fused.fits(x)

    def run(function, tensors, grads):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        outs = function(*tensors)
        return [*outs, *torch.autograd.grad(outs, tensors, grads)]

    def definition(x, weight, bias):
        entering = F.gelu(x)
        out = F.conv2d(entering, weight, bias, padding=1, groups=channels) + (entering if residual else 0)
        return out, out.square().sum((2, 3))

    found = run(lambda *tensors: sliding.gelu_convolve(*tensors, residual), tensors, grads)
    exact = run(definition, [tensor.double() for tensor in tensors], [grad.double() for grad in grads])
    assert_close(found, exact, 3e-6 if dtype == torch.float32 else tolerances.GRADIENT[dtype])
    assert found[0].stride() == found[2].stride() == x.stride()
    with FlopCounterMode(display=False) as counter:  # which sees the operator
        sliding.gelu_convolve(*tensors, residual)
    assert counter.get_total_flops() == 18 * x.numel()


def test_gelu_convolution_is_differentiable_once():
    x = random_tensor(1, 2, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    out, squares = sliding.gelu_convolve(x, random_tensor(2, 1, 3, 3), None, False)
    (through_one,) = torch.autograd.grad(squares.sum(), x, retain_graph=True)  # the other has no gradient
    assert through_one.abs().sum() > 0
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_gelu_of_small_and_large_numbers(scale):
    """And its slope, by a convolution that copies."""
    x = torch.linspace(-8, 8, 2 * 49 * 16, device=DEVICE).view(2, 16, 7, 7) * scale
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(16, 1, 3, 3, device=DEVICE)
    weight[:, :, 1, 1] = 1
    x.requires_grad_()
    out, _ = sliding.gelu_convolve(x, weight, torch.zeros(16, device=DEVICE), False)
    assert (out - F.gelu(x.double())).abs().max() < 1e-6 * scale
    exact = x.detach().double().requires_grad_()
    (slope,), (expected,) = (torch.autograd.grad(y.sum(), t) for y, t in ((out, x), (F.gelu(exact), exact)))
    assert (slope - expected).abs().max() < 3e-6


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite(bad, gelu):
    """Infinity gives infinity, its negative by GELU NaN, as in PyTorch; neither reaches more outputs than there."""
    x = torch.zeros(1, 2, 9, 9, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[0, 1, 4, 4] = bad
    weight, bias = torch.ones(2, 1, 3, 3, device=DEVICE), torch.zeros(2, device=DEVICE)
    expected = F.conv2d(F.gelu(x.double()) if gelu else x.double(), weight.double(), padding=1, groups=2)
    if gelu:
        out, squares = sliding.gelu_convolve(x, weight, bias, False)
        torch.testing.assert_close(squares.double(), expected.square().sum((2, 3)), equal_nan=True)
    else:
        out = sliding.convolve(x, weight, bias, False)
    torch.testing.assert_close(out.double(), expected, equal_nan=True)


def test_what_does_not_fit():
    x = torch.zeros(2, 4, 3, 3, device=DEVICE)
    assert not fused.fits(x)  # channels first
    assert not fused.fits(x[:, :3].contiguous(memory_format=torch.channels_last))  # pairs of channels
    assert not fused.fits(x[:0].contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 5, 9), (1, 66, 9, 7), (2, 2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_of_channels_last_maps(shape, residual, dtype):
    """Forward and backward pass, each in the kernels for 3×3 windows."""
    channels = shape[1]
    x, grad = (random_tensor(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    tensors = [x, random_tensor(channels, 1, 3, 3, dtype=dtype), random_tensor(channels, dtype=dtype)]
    function = residual_depthwise_conv2d if residual else kernels.depthwise_conv2d

    def run(tensors, grad, backend):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        with kernels.use_backend(backend):
            out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad)]

    launched = []
    with watching_launches(lambda made, _: launched.append(made.kernel.__name__)):
        found = run(tensors, grad, "triton")
    assert [launched.count(name) for name in ("fused_kernel", "gradients_kernel")] == [1, 1]
    exact = run([tensor.double() for tensor in tensors], grad.double(), "reference")
    assert_close(found, exact, tolerances.GRADIENT[dtype])
    assert found[0].stride() == found[1].stride() == x.stride()


def test_twice_differentiable_counted_and_traced():
    x = random_tensor(2, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = random_tensor(4, 1, 3, 3).requires_grad_(), random_tensor(4).requires_grad_()

    def penalty(backend):
        with kernels.use_backend(backend):
            out = kernels.depthwise_conv2d(x, weight, bias)
        first = torch.autograd.grad(out.square().sum(), [x, weight, bias], create_graph=True)
        return torch.autograd.grad(
            torch.stack([gradient.square().sum() for gradient in first]).sum(), [x, weight, bias]
        )

    assert_close(penalty("triton"), penalty("reference"), 1e-5)
    with kernels.use_backend("triton"):
        with FlopCounterMode(display=False) as counter:
            kernels.depthwise_conv2d(x, weight, bias).sum().backward()
        if DEVICE == "cuda":  # PyTorch traces no interpreted kernels
            for operator in (sliding.convolve, sliding.gelu_convolve):
                torch.library.opcheck(operator.definition, (x, weight, bias, True))
            torch.library.opcheck(sliding.gradients.definition, (x, x, weight, True))
    assert counter.get_total_flops() == 3 * 2 * 9 * x.numel()


def test_meta_tensors_have_shapes_alone():
    x = torch.empty(2, 4, 5, 6, device="meta").contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.empty(4, 1, 3, 3, device="meta")
    with kernels.use_backend("triton"):
        for function in (kernels.depthwise_conv2d, residual_depthwise_conv2d):
            out = function(x, weight, None)
            assert out.stride() == x.stride()
            assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("shapes", [((4, 1, 3, 3), None), ((8, 1, 5, 3), None), ((8, 1, 3, 3), (4,))])
def test_what_does_not_fit_together_is_refused(shapes):
    x = torch.zeros(1, 8, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight, bias = (None if shape is None else torch.zeros(shape, device=DEVICE) for shape in shapes)
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="must have shape"):
        residual_depthwise_conv2d(x, cast("torch.Tensor", weight), bias)


def test_forward_mode_through_a_recorded_graph_is_refused():
    x = random_tensor(2, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    with kernels.use_backend("triton"):
        out = kernels.depthwise_conv2d(x, random_tensor(4, 1, 3, 3))
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=r"use_backend\(\"reference\"\)"):
            torch.autograd.grad(out, x, grad)


def test_pytorch_knows_the_kernels_of_operators_that_it_traces():
    """Its caches of compiled graphs hold for the code of the kernels that they launch."""
    code = """
from kernels import normed, pointwise
from kernels.depthwise import sliding
from torch._library.triton import triton_ops_to_kernels
found = {name: kernels for name, kernels in triton_ops_to_kernels.items() if name.startswith("dynamic_kernels::")}
assert len(found) >= 6, found
assert all(found.values()), found
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
