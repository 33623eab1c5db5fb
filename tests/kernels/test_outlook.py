"""outlook_attention2d against its float64 definition, on every backend."""

import itertools

import pytest
import torch

import kernels
from kernels.outlook import triton_kernels
from tests.support import DEVICE, FORWARD_TOLERANCE, assert_close, check_operator, random_tensor

# (batch, height, width, heads, channels a head, options): VOLO's window on odd maps, windows that hang over every edge,
# no padding, a stride as long as the window, one that leaves pixels uncovered, one position only.
CASES = {
    "volo": ((2, 7, 6, 2, 5), {"kernel_size": 3, "stride": 2, "padding": 1, "scale": 0.3}),
    "every pixel": ((1, 5, 4, 1, 3), {"kernel_size": 3, "stride": 1, "padding": 1}),
    "unpadded": ((1, 6, 5, 3, 2), {"kernel_size": 3, "stride": 2, "padding": 0}),
    "even window": ((1, 6, 7, 1, 4), {"kernel_size": 2, "stride": 2, "padding": 0}),
    "wide padding": ((1, 5, 5, 1, 2), {"kernel_size": 4, "stride": 3, "padding": 3}),
    "uncovered": ((1, 7, 5, 2, 1), {"kernel_size": 1, "stride": 2, "padding": 0}),
}


def _inputs(shape, kernel_size, stride, **_):
    batch, height, width, heads, channels = shape
    windows = -(-height // stride), -(-width // stride)
    return {
        "logits": 2 * random_tensor(batch, *windows, heads, kernel_size**2, kernel_size**2, dtype=torch.float64),
        "value": random_tensor(batch, height, width, heads * channels, dtype=torch.float64),
    }


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_matches_definition(case, backend):
    shape, options = CASES[case]
    check_operator("outlook_attention2d", _inputs(shape, **options), backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, backend):
    shape, options = CASES["volo"]
    check_operator("outlook_attention2d", _inputs(shape, **options), backend=backend, dtype=dtype, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_strided_inputs(backend):
    shape, options = CASES["volo"]
    inputs = _inputs(shape, **options)
    inputs["value"] = inputs["value"].movedim(-1, 1).contiguous().movedim(1, -1)
    inputs["logits"] = torch.stack([inputs["logits"]] * 2, -1)[..., 1]
    check_operator("outlook_attention2d", inputs, backend=backend, **options)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_uniform_attention_counts_windows(backend):
    """Independent of the reference: with equal logits every window gives each of its pixels the mean of its nine
    sources, padded ones counting as zeros; overlapping windows add up."""
    value = torch.ones(1, 4, 4, 1, device=DEVICE)
    logits = torch.zeros(1, 2, 2, 1, 9, 9, device=DEVICE)
    with kernels.use_backend(backend):
        out = kernels.outlook_attention2d(logits, value, kernel_size=3, stride=2, padding=1)[0, :, :, 0]
    expected = torch.zeros(4, 4)
    for i, j in itertools.product((-1, 1), (-1, 1)):
        rows, columns = slice(max(i, 0), i + 3), slice(max(j, 0), j + 3)
        inside = expected[rows, columns].numel()
        expected[rows, columns] += inside / 9
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradcheck_and_registration(backend):
    options = {"kernel_size": 2, "stride": 2, "padding": 1}
    inputs = [tensor.requires_grad_() for tensor in _inputs((1, 3, 4, 1, 2), **options).values()]
    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda a, v: kernels.outlook_attention2d(a, v, **options), inputs, fast_mode=True
        )
    floats = [tensor.detach().float().requires_grad_() for tensor in inputs]
    torch.library.opcheck(torch.ops.dynamic_kernels.outlook, (*floats, 2, 2, 1, 1.0, backend))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_same_bits_and_empty_batch(backend):
    shape, options = CASES["volo"]
    inputs = [tensor.float().requires_grad_() for tensor in _inputs(shape, **options).values()]
    with kernels.use_backend(backend):
        runs = []
        for _ in range(2):
            out = kernels.outlook_attention2d(*inputs, **options)
            runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        empty = [tensor.detach()[:0].requires_grad_() for tensor in inputs]
        out = kernels.outlook_attention2d(*empty, **options)
        out.sum().backward()
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert out.shape == empty[1].shape
    assert empty[0].grad is not None


def test_every_config():
    shape, options = (1, 3, 4, 1, 3), {"kernel_size": 3, "stride": 2, "padding": 1, "scale": 0.5}
    inputs = _inputs(shape, **options)
    expected = kernels.reference.outlook_attention2d(**inputs, **options)
    logits, value = (tensor.float() for tensor in inputs.values())
    tiles = {(c.block_items, c.block_channels): c for c in triton_kernels.CONFIGS}
    for config in tiles.values() if DEVICE == "cpu" else triton_kernels.CONFIGS:
        out = triton_kernels.outlook(logits, value, 3, 2, 1, 0.5, config)
        assert_close(out, expected, FORWARD_TOLERANCE[torch.float32], str(config))
