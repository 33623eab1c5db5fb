"""depthwise_conv2d against its float64 definition, on every backend."""

import pytest
import torch

import kernels
from kernels.depthwise import triton_kernels
from tests.support import (
    DEVICE,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    assert_close,
    check_operator,
    random_tensor,
)


def _inputs(batch, channels, height, width, kernel_size, bias=True):
    inputs = {
        "x": random_tensor(batch, channels, height, width, dtype=torch.float64),
        "weight": random_tensor(channels, 1, kernel_size, kernel_size, dtype=torch.float64),
    }
    return inputs | ({"bias": random_tensor(channels, dtype=torch.float64)} if bias else {})


# Kernels smaller and larger than the map, OverLoCK's sizes, the largest, odd maps, one channel.
SHAPES = [
    (2, 3, 9, 7, 3, True),
    (1, 2, 7, 7, 13, False),
    (2, 5, 11, 19, 7, True),
    (1, 1, 20, 5, 17, True),
    (1, 2, 9, 33, 31, False),
]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, backend):
    check_operator("depthwise_conv2d", _inputs(*shape), backend=backend)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, backend):
    check_operator("depthwise_conv2d", _inputs(2, 3, 8, 9, 5), backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_layouts(backend):
    inputs = _inputs(2, 6, 8, 7, 5)
    channels_last = inputs["x"].to(memory_format=torch.channels_last)
    strided = random_tensor(2, 6, 8, 14, dtype=torch.float64)[..., ::2]
    for x in (channels_last, strided):
        check_operator("depthwise_conv2d", {**inputs, "x": x}, backend=backend)
    with kernels.use_backend(backend):
        out = kernels.depthwise_conv2d(channels_last, inputs["weight"])
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_derivatives_of_both_orders(backend):
    inputs = [tensor.requires_grad_() for tensor in _inputs(1, 1, 3, 4, 3).values()]
    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(kernels.depthwise_conv2d, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(kernels.depthwise_conv2d, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_same_bits_and_empty_batch(backend):
    inputs = [tensor.float().requires_grad_() for tensor in _inputs(3, 2, 6, 5, 5).values()]
    with kernels.use_backend(backend):
        runs = []
        for _ in range(2):
            out = kernels.depthwise_conv2d(*inputs)
            runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        empty = torch.zeros(0, 2, 6, 5, device=DEVICE, requires_grad=True)
        out = kernels.depthwise_conv2d(empty, *inputs[1:])
        out.sum().backward()
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert out.shape == empty.shape
    assert not inputs[1].grad.any()


def test_registration():
    x, weight, bias = (tensor.float().requires_grad_() for tensor in _inputs(1, 2, 5, 6, 3).values())
    torch.library.opcheck(torch.ops.dynamic_kernels.depthwise_conv2d, (x, weight, bias, False))


def test_every_config():
    inputs = _inputs(1, 2, 6, 7, 5, bias=False)
    exact = [tensor.requires_grad_() for tensor in inputs.values()]
    expected = kernels.reference.depthwise_conv2d(*exact)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, exact[1:], grad)
    x, weight = (tensor.detach().float() for tensor in exact)
    tiles = {(c.tile_height, c.block_tiles, c.block_rows, c.block_channels): c for c in triton_kernels.CONFIGS}
    for config in tiles.values() if DEVICE == "cpu" else triton_kernels.CONFIGS:
        out = triton_kernels.convolve(x, weight, config=config)
        assert_close(out, expected, FORWARD_TOLERANCE[torch.float32], str(config))
        out = triton_kernels.weight_gradient(grad.float(), x, 5, config)
        assert_close(out, expected_grad, GRADIENT_TOLERANCE[torch.float32], str(config))
