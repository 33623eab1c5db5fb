"""Facts about the operators that hold whatever their definitions say, on every backend, the reference among them."""

import itertools

import pytest
import torch

import kernels
from kernels import reference
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor

ON_ALL = pytest.mark.parametrize("backend", ["reference", "eager", "triton"])


@ON_ALL
def test_a_static_kernel_is_a_convolution(backend):
    """An involution with the same kernel at every pixel is a grouped convolution."""
    x, kernel = random_tensor(2, 6, 9, 8), random_tensor(3, 5, 5)
    weight = kernel[None, :, :, :, None, None].expand(2, -1, -1, -1, 5, 4)
    per_channel = kernel.double().repeat_interleave(2, 0)[:, None]
    expected = torch.nn.functional.conv2d(x.double(), per_channel, stride=2, padding=2, groups=6)
    with kernels.use_backend(backend):
        out = kernels.involution2d(x, weight, stride=2)
    assert_close(out, expected, FORWARD_TOLERANCE[torch.float32])


@ON_ALL
def test_every_output_has_all_its_neighbours(backend):
    """Uniform weights over constant values give the constant, at the border too."""
    value = torch.ones(1, 1, 6, 7, 2, device=DEVICE)
    attn = torch.full((1, 1, 6, 7, 25), 1 / 25, device=DEVICE)
    with kernels.use_backend(backend):
        torch.testing.assert_close(kernels.na2d_av(attn, value, 5), value)


@ON_ALL
def test_a_position_bias_sums_in_float32(backend):
    """The gradient of a table's entry sums over the pixels of a map; in bfloat16 a sum of ones would stop at 256."""
    query = torch.ones(1, 1, 28, 28, 1, dtype=torch.bfloat16, device=DEVICE)
    rpb = torch.zeros(1, 5, 5, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with kernels.use_backend(backend):
        kernels.na2d_qk(query, query, 3, rpb=rpb).sum().backward()
    exact = torch.zeros(1, 5, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    reference.na2d_qk(query.double(), query.double(), 3, rpb=exact).sum().backward()
    assert rpb.grad is not None
    assert exact.grad is not None
    assert_close(rpb.grad, exact.grad, GRADIENT_TOLERANCE[torch.bfloat16])


@ON_ALL
def test_no_affinity_means_a_static_kernel(backend):
    """With a zero query the kernels are softmax(bias), the same at every pixel."""
    shapes = (1, 2, 3, 8, 7), (1, 2, 3, 6), (1, 1, 2, 5, 8, 7), (9, 6), (9,), (2, 5, 5)
    query, key, value, weight, bias, table = (random_tensor(*shape, dtype=torch.float64) for shape in shapes)
    kernel = bias.softmax(0).expand(1, 2, 8, 7, 9)
    expected = kernels.reference.na2d_av(kernel, value[:, 0].movedim(2, -1), 3).movedim(-1, 2)
    with kernels.use_backend(backend):
        out = kernels.contmix2d(0 * query, key, value, weight, bias, [0 * table], kernel_sizes=(3,))
    torch.testing.assert_close(out[:, 0], expected)


@ON_ALL
def test_uniform_weights_count_pixels(backend):
    """With equal logits and ones as values, each window adds the share of its pixels that lie inside the image."""
    height, width, stride = 5, 4, 2
    expected = torch.zeros(height, width)
    for row, column in itertools.product(range(-1, height - 1, stride), range(-1, width - 1, stride)):
        inside = [
            (i, j)
            for i, j in itertools.product(range(row, row + 3), range(column, column + 3))
            if 0 <= i < height and 0 <= j < width
        ]
        for pixel in inside:
            expected[pixel] += len(inside) / 9
    logits, value = torch.zeros(1, 3, 2, 2, 9, 9, device=DEVICE), torch.ones(1, height, width, 4, device=DEVICE)
    with kernels.use_backend(backend):
        out = kernels.outlook_attention2d(logits, value, stride=stride)
    torch.testing.assert_close(out.cpu(), expected[None, :, :, None].expand(1, height, width, 4))


@ON_ALL
def test_a_single_weight_moves_the_map(backend):
    """A kernel with a 1 at (a, b) reads the pixel at (a − K//2, b − K//2) from here."""
    x = random_tensor(1, 1, 6, 19)
    for a, b in ((0, 0), (6, 1), (3, 3), (2, 6)):
        weight = torch.zeros(1, 1, 7, 7, device=DEVICE)
        weight[0, 0, a, b] = 1
        with kernels.use_backend(backend):
            out = kernels.depthwise_conv2d(x, weight)
        expected = torch.nn.functional.pad(x, (3, 3, 3, 3))[:, :, a : a + 6, b : b + 19]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
