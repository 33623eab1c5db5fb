"""3×3 depthwise convolution with GELU before and sums of squares after it, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
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


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5, 9), (1, 66, 37, 7), (3, 2, 1, 1), (1, 130, 17, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_definition(shape, gelu, dtype):
    channels = shape[1]
    x = random_tensor(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = random_tensor(channels, 1, 3, 3, dtype=dtype), random_tensor(channels, dtype=dtype)
    assert fused.fits(x)
    out, squares = fused.fused_depthwise_conv2d(x, weight, bias, gelu, True)
    entering = F.gelu(x.double()) if gelu else x.double()
    expected = F.conv2d(entering, weight.double(), bias.double(), padding=1, groups=channels)
    tolerance = 1e-3 if dtype == torch.float16 else 2e-6
    assert_close(out, expected, tolerance)
    assert_close(squares, expected.square().sum((2, 3)), tolerance)
    assert out.stride() == x.stride()
    with FlopCounterMode(display=False) as counter:  # which sees the operator
        (alone,) = fused.fused_depthwise_conv2d(x, weight, bias, gelu, False)
    assert torch.equal(alone, out)
    assert counter.get_total_flops() == 18 * x.numel()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_gelu_of_small_and_large_numbers(scale):
    """By a convolution that copies."""
    x = torch.linspace(-8, 8, 2 * 49 * 16, device=DEVICE).view(2, 16, 7, 7) * scale
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(16, 1, 3, 3, device=DEVICE)
    weight[:, :, 1, 1] = 1
    (out,) = fused.fused_depthwise_conv2d(x, weight, torch.zeros(16, device=DEVICE), True, False)
    assert (out - F.gelu(x.double())).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite(bad, gelu):
    """Infinity gives infinity, its negative by GELU NaN, as in PyTorch; neither reaches more outputs than there."""
    x = torch.zeros(1, 2, 9, 9, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x[0, 1, 4, 4] = bad
    weight, bias = torch.ones(2, 1, 3, 3, device=DEVICE), torch.zeros(2, device=DEVICE)
    out, squares = fused.fused_depthwise_conv2d(x, weight, bias, gelu, True)
    expected = F.conv2d(F.gelu(x.double()) if gelu else x.double(), weight.double(), padding=1, groups=2)
    torch.testing.assert_close(out.double(), expected, equal_nan=True)
    torch.testing.assert_close(squares.double(), expected.square().sum((2, 3)), equal_nan=True)


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
    assert [launched.count(name) for name in ("fused_kernel", "_gradient_kernel")] == [2, 1]
    exact = run([tensor.double() for tensor in tensors], grad.double(), "reference")
    assert_close(found, exact, tolerances.GRADIENT[dtype])
    assert found[0].stride() == found[1].stride() == x.stride()


def test_twice_differentiable_counted_and_traced():
    x = random_tensor(2, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = random_tensor(4, 1, 3, 3).requires_grad_(), random_tensor(4).requires_grad_()

    def penalty(backend):
        with kernels.use_backend(backend):
            out = kernels.depthwise_conv2d(x, weight, bias)
        first = torch.autograd.grad(out.square().sum(), [x, weight], create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [x, weight, bias])

    assert_close(penalty("triton"), penalty("reference"), 1e-5)
    with kernels.use_backend("triton"):
        with FlopCounterMode(display=False) as counter:
            kernels.depthwise_conv2d(x, weight, bias).sum().backward()
        if DEVICE == "cuda":  # PyTorch traces no interpreted kernels
            torch.library.opcheck(sliding._traced, (x, weight, bias, False, True))
            torch.library.opcheck(sliding._traced_gradient, (x, x))
    assert counter.get_total_flops() == 3 * 2 * 9 * x.numel()
