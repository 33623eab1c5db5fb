"""Steps of models in one kernel: the end of a residual block; the convolution of images; the backward pass of a batch
norm and GELU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from kernels import images, normed, pointwise, tolerances
from tests.support import DEVICE, assert_close, channels_last, random_tensor


def last(*shape, dtype):
    return channels_last(random_tensor(*shape, dtype=dtype))


def expected_of(x, scale, shift, weight, bias, skipped, second=None, stride=1):
    x, scale, shift, weight, bias, skipped = (each.double() for each in (x, scale, shift, weight, bias, skipped))
    entering = F.relu(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    if second is not None:
        skipped = F.conv2d(skipped, second.double()[:, :, None, None], stride=stride)
    return F.relu(F.conv2d(entering, weight[:, :, None, None], bias) + skipped)


# The last has several blocks of pixels and outputs, all partly empty; its products take several steps.
@pytest.mark.parametrize("shape", [(2, 16, 3, 5, 24), (1, 6, 1, 1, 2), (3, 72, 7, 9, 264)])
@pytest.mark.parametrize("stride", [0, 1, 2])  # 0: without a second product
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [pointwise.LARGE, pointwise.OF_FEW_CHANNELS, pointwise.SMALL])
def test_end_of_a_residual_block(shape, stride, dtype, blocks, monkeypatch):
    monkeypatch.setattr(pointwise, "blocks_of", lambda *_: blocks)
    batch, channels, height, width, outputs = shape
    x = last(batch, channels, height, width, dtype=dtype)
    scale, shift = random_tensor(channels, dtype=dtype), random_tensor(channels, dtype=dtype)
    weight, bias = random_tensor(channels, outputs, dtype=dtype).t(), random_tensor(outputs, dtype=dtype)
    skipped, beside = last(batch, outputs, height, width, dtype=dtype), ()
    if stride:
        skipped = last(batch, 80, stride * (height - 1) + 1, stride * width, dtype=dtype)  # odd and even
        beside = random_tensor(outputs, 80, dtype=dtype), stride
    assert pointwise.fits(x, skipped)
    arguments: Any = (x, scale, shift, weight, bias, skipped, *beside)
    out = pointwise.residual_pointwise_conv2d(*arguments)
    assert_close(out, expected_of(*arguments), tolerances.OUTPUT[dtype])
    assert out.is_contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:  # which sees the operator
        assert torch.equal(pointwise.residual_pointwise_conv2d(*arguments), out)
    assert counter.get_total_flops() == 2 * out.numel() * (channels + (80 if stride else 0))
    if DEVICE == "cuda":  # PyTorch traces no interpreted kernels
        definition = pointwise.residual_pointwise_conv2d.definition
        torch.library.opcheck(definition, arguments if beside else (*arguments, None, 1))


def test_blocks_of_a_residual_block(monkeypatch):
    """RedNet-50's last blocks, of one image and of as many as fill half of a GPU with large ones; its first blocks."""
    monkeypatch.setattr(pointwise, "is_hopper", lambda: True)
    large = pointwise.LARGE._replace(num_stages=3)
    assert pointwise.blocks_of(49, 2048, 512, 2) == pointwise.SMALL
    assert pointwise.LARGE.programs(23 * 49, 2048) == 72
    assert pointwise.blocks_of(23 * 49, 2048, 512, 2) == pointwise.blocks_of(128 * 49, 2048, 512, 2) == large
    assert pointwise.blocks_of(23 * 49, 2048, 512, 4) == pointwise.LARGE
    assert pointwise.blocks_of(128 * 56**2, 256, 64 + 64, 2) == pointwise.OF_FEW_CHANNELS
    assert pointwise.blocks_of(128 * 56**2, 256, 64 + 64, 4) == pointwise.LARGE
    batch: Any = ShapeEnv().create_unbacked_symint()
    assert pointwise.blocks_of(batch * 49, 2048, 512, 2) == large
    monkeypatch.setattr(pointwise, "is_hopper", lambda: False)
    assert pointwise.blocks_of(128 * 56**2, 256, 64 + 64, 2) == pointwise.LARGE


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite(bad):
    """It reaches its own pixel alone, of each argument as in PyTorch."""
    tensors = [last(1, 4, 3, 3, dtype=torch.float32), *(torch.ones(4, device=DEVICE) for _ in range(2))]
    tensors += [torch.eye(4, device=DEVICE) + 1, torch.zeros(4, device=DEVICE), last(1, 4, 3, 3, dtype=torch.float32)]
    for index in (0, 5):
        changed: Any = [tensor.clone() for tensor in tensors]
        changed[index][0, 1, 2, 1] = bad
        out = pointwise.residual_pointwise_conv2d(*changed)
        torch.testing.assert_close(out.double(), expected_of(*changed), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit():
    x = channels_last(torch.zeros(2, 4, 3, 3, device=DEVICE))
    assert pointwise.fits(x, x)
    assert not pointwise.fits(x, x.contiguous())  # channels first
    assert not pointwise.fits(x[:, :2], x)  # a slice of channels
    assert not pointwise.fits(x[:0], x[:0])
    assert not pointwise.fits(x.to("meta"), x.to("meta"))  # which holds no numbers


# ---- the convolution of images

# Channels, outputs, kernel size, stride, padding, height and width. The second and the last have several blocks of rows
# and columns, the last also of outputs; rows of taps begin at even places, at odd ones, and without padding.
IMAGES = [(3, 28, 3, 2, 1, 14, 12), (3, 20, 7, 2, 3, 19, 35), (1, 5, 5, 1, 0, 6, 9), (4, 70, 2, 3, 1, 28, 52)]


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_convolution_of_images(case, relu, dtype):
    channels, outputs, size, stride, padding, *sides = case
    x = last(2, channels, *sides, dtype=dtype)
    weight, bias = random_tensor(outputs, channels, size, size, dtype=dtype), random_tensor(outputs, dtype=dtype)
    given: list[Any] = [x, weight, bias]
    for tensors in (given, [x, channels_last(weight), None]):
        exact: Any = [each if each is None else each.double() for each in tensors]
        expected = F.conv2d(exact[0], exact[1], exact[2], stride, padding)
        expected = F.relu(expected) if relu else expected
        out = images.image_conv2d(*tensors, stride, padding, relu)
        assert_close(out, expected, tolerances.OUTPUT[dtype])
        assert out.is_contiguous(memory_format=torch.channels_last)
    exact = [each.double().requires_grad_() for each in given]
    given = [each.requires_grad_() for each in given]
    expected = F.conv2d(exact[0], exact[1], exact[2], stride, padding)
    with FlopCounterMode(display=False) as counter:  # which sees the operator
        out = images.image_conv2d(*given, stride, padding, relu)
    assert counter.get_total_flops() == 2 * out.numel() * channels * size**2
    kept, grad = (out.detach() > 0).double() if relu else 1, torch.randn_like(out)  # near zero, rounding decides
    grads = torch.autograd.grad(out, given, grad)
    assert_close(grads, torch.autograd.grad(expected * kept, exact, grad.double()), tolerances.GRADIENT[dtype])
    if DEVICE == "cuda":  # PyTorch traces no interpreted kernels
        torch.library.opcheck(images.image_conv2d.definition, (*given, stride, padding, relu))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_images_that_are_not_finite(bad):
    """It reaches the windows that it stands in, and no neighbour."""
    for channels, outputs, size, stride, padding, *sides in IMAGES:
        x, weight = last(1, channels, *sides, dtype=torch.float32), torch.ones(outputs, channels, size, size)
        x[0, channels - 1, 5, 2:5:2] = bad  # left of a window, and inside another
        weight = weight.to(DEVICE)
        out = images.image_conv2d(x, weight, None, stride, padding, False)
        expected = F.conv2d(x, weight, None, stride, padding)
        assert torch.equal(out.isfinite(), expected.isfinite())
        assert not expected.isfinite().all()


def test_which_images_fit():
    x, weight = channels_last(torch.zeros(2, 3, 9, 8, device=DEVICE)), torch.zeros(4, 3, 7, 7, device=DEVICE)
    assert images.fits(x, weight)
    assert not images.fits(x.contiguous(), weight)  # channels first
    assert not images.fits(x.double(), weight.double())
    assert not images.fits(x.to(torch.uint8), weight)  # which autocast leaves as they are, too
    assert not images.fits(x, weight.to("meta"))
    assert not images.fits(x[:0], weight)
    assert not images.fits(x[:, :, :6], weight)  # smaller than a window
    assert not images.fits(x, weight.new_zeros(4, 2, 7, 7))
    assert not images.fits(x.repeat(1, 4, 1, 1), weight.new_zeros(4, 12, 7, 7))  # a row of 84 taps
    assert not images.fits(x.to("meta"), weight)  # which holds no numbers


# ---- the backward pass of a batch norm and GELU


@pytest.mark.parametrize("shape", [(2, 28, 9, 8), (3, 340, 3, 5), (1, 5, 1, 2), (2, 32, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normed_gelu_backward(shape, dtype, monkeypatch):
    monkeypatch.setattr(normed, "PARTS", 3)  # of several tiles
    x, grad = (channels_last(random_tensor(*shape, dtype=dtype)) for _ in range(2))
    weight, bias = random_tensor(shape[1], dtype=dtype) + 1, random_tensor(shape[1], dtype=dtype)
    x += 2
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    z = F.batch_norm(exact[0], None, None, exact[1], exact[2], True, 0.1, 1e-3)
    expected = torch.autograd.grad(F.gelu(z), exact, grad.double())
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    rstd = torch.rsqrt(variance + 1e-3)
    scale = weight.float() * rstd
    statistics = scale, bias.float() - mean * scale, mean, rstd
    arguments = grad, x, weight, *statistics
    out = normed.normed_gelu_backward(*arguments)
    assert_close(out, expected, tolerances.GRADIENT[dtype])
    assert out[0].stride() == x.stride()
    assert all(map(torch.equal, out, normed.normed_gelu_backward(*arguments)))
    if DEVICE == "cuda":  # PyTorch traces no interpreted kernels
        torch.library.opcheck(normed.normed_gelu_backward.definition, arguments)
