"""outlook_attention2d against its float64 definition on every backend, and its Triton kernels config by config."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import dtypes
from kernels.outlook import backward, configs, forward
from kernels.outlook.configs import CONFIGS, Problem, heuristic
from kernels.outlook.tiles import Windows
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, check_operator, random_tensor

# (batch, height, width, heads, channels of a head, K, stride, padding)
SHAPES = {
    "VOLO": (2, 7, 6, 2, 5, 3, 2, 1),
    "every pixel": (1, 4, 5, 1, 3, 3, 1, 1),
    "touching": (1, 5, 4, 2, 3, 3, 3, 2),
    "even": (1, 3, 5, 3, 2, 2, 1, 0),
    "gaps": (1, 7, 6, 1, 4, 2, 3, 1),
    "pointwise": (1, 2, 3, 2, 2, 1, 1, 0),
}


def _inputs(shape):
    batch, height, width, heads, channels, kernel_size, stride, padding = SHAPES[shape]
    windows = -(-height // stride), -(-width // stride)
    inputs = {
        "logits": 2 * random_tensor(batch, *windows, heads, kernel_size**2, kernel_size**2, dtype=torch.float64),
        "value": random_tensor(batch, height, width, heads * channels, dtype=torch.float64),
    }
    return inputs, {"kernel_size": kernel_size, "stride": stride, "padding": padding, "scale": 0.3}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(shape, backend):
    inputs, options = _inputs(shape)
    check_operator("outlook_attention2d", inputs, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, backend):
    inputs, options = _inputs("VOLO")
    check_operator("outlook_attention2d", inputs, backend=backend, dtype=dtype, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_wide_overlap(backend):
    """K = 4 at stride 3 and the largest padding: windows hold a pixel once, twice or four times, some none at all."""
    logits = random_tensor(1, 2, 2, 1, 16, 16, dtype=torch.float64)
    inputs = {"logits": logits, "value": random_tensor(1, 4, 5, 2, dtype=torch.float64)}
    check_operator("outlook_attention2d", inputs, backend=backend, kernel_size=4, stride=3, padding=3)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_strided_inputs(backend):
    inputs, options = _inputs("VOLO")
    logits = inputs["logits"].mT.contiguous().mT
    value = torch.stack([inputs["value"]] * 2, -1)[..., 0]
    channels_first = inputs["value"].movedim(-1, 1).contiguous().movedim(1, -1)
    for strided in ({"logits": logits, "value": value}, {"logits": inputs["logits"], "value": channels_first}):
        check_operator("outlook_attention2d", strided, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("scale", [0, -0.5, 1e3])
def test_any_scale(scale, backend):
    inputs, options = _inputs("every pixel")
    check_operator("outlook_attention2d", inputs, backend=backend, dtype=torch.float64, **options | {"scale": scale})


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_softmax_survives_huge_and_masked_logits(backend):
    value, logits = random_tensor(1, 4, 4, 2), 1e4 * random_tensor(1, 2, 2, 1, 9, 9)
    logits[..., :4] = float("-inf")  # a caller's mask: those sources get no weight, and nothing becomes NaN
    with kernels.use_backend(backend):
        out = kernels.outlook_attention2d(logits, value, stride=2)
    expected = kernels.reference.outlook_attention2d(logits.double(), value.double(), stride=2)
    assert_close(out, expected, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_uniform_weights_count_pixels(backend):
    """Independent of the reference: equal logits over ones give, per window, its share of pixels inside the image."""
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


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_derivatives(backend):
    logits = random_tensor(1, 2, 1, 1, 4, 4, dtype=torch.float64).requires_grad_()
    value = random_tensor(1, 3, 2, 2, dtype=torch.float64).requires_grad_()
    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda a, v: kernels.outlook_attention2d(a, v, kernel_size=2, stride=2, padding=1, scale=0.7),
            (logits, value),
            fast_mode=True,
        )


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_empty_batch(backend):
    logits = torch.randn(0, 2, 2, 1, 9, 9, device=DEVICE, requires_grad=True)
    value = torch.randn(0, 3, 4, 2, device=DEVICE, requires_grad=True)
    with kernels.use_backend(backend):
        out = kernels.outlook_attention2d(logits, value, stride=2)
        out.sum().backward()
    assert out.shape == value.shape
    assert logits.grad is not None
    assert value.grad is not None


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_same_input_same_bits(backend):
    inputs, options = _inputs("VOLO")
    tensors = [tensor.float().requires_grad_() for tensor in inputs.values()]
    runs = []
    for _ in range(2):
        with kernels.use_backend(backend):
            out = kernels.outlook_attention2d(*tensors, **options)
            runs.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_in_one_graph(backend):
    inputs, options = _inputs("pointwise")
    tensors = [tensor.float().requires_grad_() for tensor in inputs.values()]

    def run(logits, value):
        return kernels.outlook_attention2d(logits, value, **options)

    with kernels.use_backend(backend):
        out = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        expected = run(*tensors)
        expected_grads = torch.autograd.grad(expected.square().sum(), tensors)
    assert torch.equal(out, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_registration(backend):
    """Schema, fake implementation and autograd of the registered operators agree with what really runs."""
    inputs, _ = _inputs("pointwise")
    logits, value = (tensor.float().mT.contiguous().mT.requires_grad_() for tensor in inputs.values())
    options = (1, 1, 0, 0.3, backend)
    operators = torch.ops.dynamic_kernels
    torch.library.opcheck(operators.outlook, (logits, value, *options))
    grad = torch.ones_like(value)
    tests = ("test_schema", "test_faketensor")  # not differentiable: the operator is differentiable once
    torch.library.opcheck(
        operators.outlook_backward, (grad, logits.detach(), value.detach(), *options), test_utils=tests
    )


def test_flops():
    inputs, options = _inputs("pointwise")
    logits, value = (tensor.float().requires_grad_() for tensor in inputs.values())
    with FlopCounterMode(display=False) as counter:
        kernels.outlook_attention2d(logits, value, **options).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * logits.numel() * 2  # two channels per head; backward twice forward


BAD = {
    r"logits must have shape \[B=2, h=3, w=2": {"stride": 1, "value": torch.zeros(2, 3, 2, 6)},
    r"logits must have shape .*, targets=4, sources=4\]": {"kernel_size": 2},
    "logits must have shape": {"logits": torch.zeros(2, 3, 2, 2, 81)},
    "logits have 4 heads": {"logits": torch.zeros(2, 3, 2, 4, 9, 9)},
    "logits must be float16": {"logits": torch.zeros(2, 3, 2, 2, 9, 9, dtype=torch.int32)},
    "value must have shape": {"value": torch.zeros(2, 5, 6)},
    "value must have the dtype of logits": {"value": torch.zeros(2, 5, 4, 6).bfloat16()},
    "value must be on the device of logits": {"value": torch.zeros(2, 5, 4, 6, device="meta")},
    "kernel_size must be an int": {"kernel_size": 3.0},
    "kernel_size must be at least 1": {"kernel_size": 0},
    "stride must be an int": {"stride": (2, 2)},
    "stride must be at least 1": {"stride": -2},
    "padding must be an int": {"padding": True},
    "padding must be at least 0": {"padding": -1},
    "scale must be a real number": {"scale": torch.ones(())},
    "scale must be finite": {"scale": float("nan")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = {"logits": torch.zeros(2, 3, 2, 2, 9, 9), "value": torch.zeros(2, 5, 4, 6), "stride": 2}
    bad = BAD[message]
    if message.startswith("logits must have shape \\[B=2, h=3"):
        good["logits"] = torch.zeros(2, 2, 2, 2, 9, 9)
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.outlook_attention2d(**good | bad)


def test_every_config():
    channels, windows = 33, Windows(2, 2, 1, 0.5)
    logits, value = random_tensor(1, 2, 2, 2, 4, 4), random_tensor(1, 4, 3, 2 * channels)
    grad = torch.randn_like(value)
    exact = logits.double().requires_grad_(), value.double().requires_grad_()
    options = windows._asdict()
    expected = kernels.reference.outlook_attention2d(*exact, **options)
    expected_logits, expected_value = torch.autograd.grad(expected, exact, grad.double())
    gradient, statistics = backward.grad_logits(grad, logits, value, windows)
    # Warps only schedule the same blocks, which in the interpreter changes nothing.
    problem = Problem(channels, 12, 2, 2, value.dtype)
    tiles = {(c.block_items, c.block_channels): c for c in CONFIGS if c.valid(problem)}
    for config in tiles.values():
        out = forward.forward(logits, value, windows, config=config)
        assert_close(out, expected, FORWARD_TOLERANCE[value.dtype], str(config))
        out = backward.grad_value(grad, logits, statistics, windows, config=config)
        assert_close(out, expected_value, GRADIENT_TOLERANCE[value.dtype], str(config))
    problem = problem._replace(grad_logits=True)
    tiles = {(c.block_items, c.block_channels): c for c in CONFIGS if c.valid(problem)}
    for config in tiles.values():
        gradient, _ = backward.grad_logits(grad, logits, value, windows, config=config)
        assert_close(gradient, expected_logits, GRADIENT_TOLERANCE[value.dtype], str(config))


def test_heuristic_is_a_valid_config(monkeypatch):
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    for channels, kernel_size, dtype, grad_logits in itertools.product(
        (1, 12, 32, 33, 64, 96, 200), (1, 2, 3, 5, 7), (torch.bfloat16, torch.float64), (False, True)
    ):
        problem = Problem(channels, 784, kernel_size, 2, dtype, grad_logits)
        config = heuristic.__wrapped__(problem)
        assert config.valid(problem), problem


def test_wide_offsets_compute_the_same(monkeypatch):
    inputs, options = _inputs("VOLO")
    logits, value = (tensor.float() for tensor in inputs.values())
    windows = Windows(**options)

    def run():
        gradients = backward.outlook_backward(value, logits, value, *windows)
        return forward.outlook(logits, value, *windows), *gradients

    narrow = run()
    monkeypatch.setattr(dtypes, "fits_int32", lambda *tensors: False)
    assert all(torch.equal(first, second) for first, second in zip(narrow, run(), strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 2, 1), (3, 1, 0), (3, 2, 3), (4, 2, 1)])
def test_a_value_that_is_not_finite_reaches_only_its_windows(kernel_size, stride, padding, backend):
    height, width, heads = 5, 6, 2
    windows = -(-height // stride), -(-width // stride)
    logits = random_tensor(1, *windows, heads, kernel_size**2, kernel_size**2).expand(height * width, *[-1] * 5)
    value = random_tensor(1, height, width, heads * 3).repeat(height * width, 1, 1, 1)
    expected = torch.zeros(height, width, height, width, dtype=torch.bool)
    for row, column in itertools.product(range(height), range(width)):
        value[row * width + column, row, column, 4] = float("nan")  # another pixel in each batch entry
        for a, b in itertools.product(*map(range, windows)):
            top, left = a * stride - padding, b * stride - padding
            if top <= row < top + kernel_size and left <= column < left + kernel_size:
                rows, columns = (slice(max(first, 0), max(first + kernel_size, 0)) for first in (top, left))
                expected[row, column, rows, columns] = True
    with kernels.use_backend(backend):
        out = kernels.outlook_attention2d(logits, value, kernel_size=kernel_size, stride=stride, padding=padding).cpu()
    assert torch.equal(out[..., 4].isnan(), expected.flatten(0, 1))
    assert not out[..., [0, 1, 2, 3, 5]].isnan().any()


def test_rows_far_apart_and_maps_beyond_32_bits():
    """A row stride near 2^31, as of a crop of a huge map, and more rows than a kernel can count."""
    values = random_tensor(3 * 4)
    logits, far = random_tensor(1, 1, 4, 1, 9, 9), values.as_strided((1, 1, 4, 3), (0, 2**31 - 8, 3, 1))
    with kernels.use_backend("triton"):
        expected = kernels.outlook_attention2d(logits, far.contiguous())
        assert torch.equal(kernels.outlook_attention2d(logits, far), expected)
        huge = torch.empty(1, device=DEVICE).expand(1, 2**31, 1, 1)
        with pytest.raises(ValueError, match=r"2\^31|too large"):
            kernels.outlook_attention2d(huge.view(1, 2**31, 1, 1, 1, 1), huge, kernel_size=1, padding=0)
