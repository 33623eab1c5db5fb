"""The end of a residual block in one kernel, against PyTorch in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import tolerances
from tests.support import DEVICE, assert_close, random_tensor, triton_device

pointwise = pytest.importorskip("kernels.pointwise")


@pytest.fixture(autouse=True)
def _where_triton_runs():
    triton_device()


def last(*shape, dtype):
    return random_tensor(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


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
def test_definition(shape, stride, dtype):
    batch, channels, height, width, outputs = shape
    x = last(batch, channels, height, width, dtype=dtype)
    scale, shift = random_tensor(channels, dtype=dtype), random_tensor(channels, dtype=dtype)
    weight, bias = random_tensor(outputs, channels, dtype=dtype), random_tensor(outputs, dtype=dtype)
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


def test_weights_in_any_order():
    x, skipped = last(2, 6, 3, 3, dtype=torch.float32), last(2, 5, 3, 3, dtype=torch.float32)
    scale, shift, bias = random_tensor(6), random_tensor(6), random_tensor(4)
    weights = random_tensor(6, 4).t(), random_tensor(5, 4).t()
    arguments: Any = (x, scale, shift, weights[0], bias, skipped, weights[1])
    assert_close(pointwise.residual_pointwise_conv2d(*arguments), expected_of(*arguments), tolerances.OUTPUT[x.dtype])


def test_what_does_not_fit():
    x = torch.zeros(2, 4, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert pointwise.fits(x, x)
    assert not pointwise.fits(x, x.contiguous())  # channels first
    assert not pointwise.fits(x[:, :2], x)  # a slice of channels
    assert not pointwise.fits(x[:0], x[:0])
    assert not pointwise.fits(x.to("meta"), x.to("meta"))  # which holds no numbers
