"""involution2d against its float64 definition, on every backend."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.aggregation.configs import CONFIGS
from kernels.involution import forward, generate
from kernels.windows import Window
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, check_operator, random_tensor

# (x, groups, kernel size, options): odd and non-square maps, strides, dilations, even and per-axis windows, one group
# of all channels, one channel a group, no padding.
CASES = {
    "rednet": ((2, 6, 9, 7), 2, (3, 3), {}),
    "stride 2": ((1, 4, 9, 8), 1, (3, 3), {"stride": 2}),
    "stride 3, dilation 2": ((2, 3, 11, 10), 3, (3, 3), {"stride": 3, "dilation": 2}),
    "even window": ((1, 4, 6, 7), 2, (4, 4), {"padding": 1}),
    "per axis": ((1, 2, 8, 9), 1, (1, 5), {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}),
    "unpadded": ((1, 5, 7, 7), 5, (7, 7), {"padding": 0}),
}


def _inputs(shape, groups, kernel_size, stride=1, padding=None, dilation=1):
    stride, dilation = ((v, v) if isinstance(v, int) else v for v in (stride, dilation))
    if padding is None:
        padding = tuple((k - 1) * d // 2 for k, d in zip(kernel_size, dilation, strict=True))
    padding = (padding, padding) if isinstance(padding, int) else padding
    size = [
        (shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel_size[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    return {
        "x": random_tensor(*shape, dtype=torch.float64),
        "weight": random_tensor(shape[0], groups, *kernel_size, *size, dtype=torch.float64),
    }


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_matches_definition(case, backend):
    shape, groups, kernel_size, options = CASES[case]
    check_operator("involution2d", _inputs(shape, groups, kernel_size, **options), backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, backend):
    check_operator("involution2d", _inputs((1, 4, 6, 7), 2, (3, 3)), backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_channels_last_and_strided_inputs(backend):
    inputs = _inputs((2, 8, 6, 5), 2, (3, 3))
    channels_last = inputs["x"].to(memory_format=torch.channels_last)
    strided = random_tensor(2, 8, 6, 10, dtype=torch.float64)[..., ::2]
    for x in (channels_last, strided):
        check_operator("involution2d", {**inputs, "x": x}, backend=backend)
    with kernels.use_backend(backend):
        out = kernels.involution2d(channels_last, inputs["weight"])
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_empty_batch(backend):
    x = torch.randn(0, 4, 5, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(0, 2, 3, 3, 5, 5, device=DEVICE, requires_grad=True)
    with kernels.use_backend(backend):
        out = kernels.involution2d(x, weight)
        out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_derivatives_of_both_orders(backend):
    x = random_tensor(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    weight = random_tensor(1, 1, 3, 3, 2, 2, dtype=torch.float64).requires_grad_()

    def function(x, weight):
        return kernels.involution2d(x, weight, stride=2)

    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, weight), fast_mode=True)


def test_gradient_only_where_asked():
    inputs = {key: tensor.float() for key, tensor in _inputs((1, 4, 5, 5), 2, (3, 3)).items()}
    x, weight = inputs["x"], inputs["weight"].requires_grad_()
    kernels.involution2d(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_a_static_kernel_is_a_convolution(backend):
    """Independent of the reference: one kernel for every pixel is what torch calls a grouped convolution."""
    x, kernel = random_tensor(2, 6, 9, 8), random_tensor(3, 5, 5)
    weight = kernel[None, :, :, :, None, None].expand(2, -1, -1, -1, 5, 4)
    per_channel = kernel.double().repeat_interleave(2, 0)[:, None]
    expected = torch.nn.functional.conv2d(x.double(), per_channel, stride=2, padding=2, groups=6)
    with kernels.use_backend(backend):
        out = kernels.involution2d(x, weight, stride=2)
    assert_close(out, expected, FORWARD_TOLERANCE[torch.float32])


def test_autocast_casts_every_input():
    x, weight = random_tensor(1, 4, 5, 5), random_tensor(1, 2, 3, 3, 5, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = kernels.involution2d(x, weight.half())
    assert out.dtype == torch.bfloat16
    expected = kernels.reference.involution2d(x.bfloat16().double(), weight.half().bfloat16().double())
    assert_close(out, expected, FORWARD_TOLERANCE[torch.bfloat16])


def test_a_dynamic_batch_and_size_compile_once():
    """torch.compile(fullgraph=True) traces forward and backward, and a new size does not recompile for ever."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, w: kernels.involution2d(x, w).sin(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch, height, width in ((2, 6, 5), (3, 7, 8), (4, 9, 6)):
        inputs = {key: t.float() for key, t in _inputs((batch, 4, height, width), 2, (3, 3)).items()}
        x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
        grads = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
        expected = torch.autograd.grad(kernels.reference.involution2d(x, weight).sin().sum(), (x, weight))
        for ours, reference in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, reference)


def _generate_inputs(groups=2, features=5, bias=True, **options):
    inputs = _inputs((2, 6, 9, 7), groups, (3, 3), **options)
    height, width = inputs["weight"].shape[4:]
    return {
        "x": inputs["x"],
        "features": random_tensor(2, features, height, width, dtype=torch.float64),
        "weight": random_tensor(9 * groups, features, dtype=torch.float64),
    } | ({"bias": random_tensor(9 * groups, dtype=torch.float64)} if bias else {})


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    ("options", "features", "bias"),
    [({}, 5, True), ({"stride": 2, "dilation": 2}, 70, False)],
    ids=["plain", "strided"],
)
def test_generate_matches_definition(options, features, bias, backend):
    inputs = _generate_inputs(features=features, bias=bias, **options)
    check_operator("involution2d_generate", inputs, backend=backend, kernel_size=3, groups=2, **options)
    inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    inputs["features"] = inputs["features"].to(memory_format=torch.channels_last)
    check_operator("involution2d_generate", inputs, backend=backend, kernel_size=3, groups=2, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_generate_gradcheck_and_registration(backend):
    inputs = [t[:, :, :3, :3] if t.dim() == 4 else t for t in _generate_inputs(groups=1, features=2).values()]
    inputs = [t.contiguous().requires_grad_() for t in inputs]
    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x, f, w, b: kernels.involution2d_generate(x, f, w, b, kernel_size=3, groups=1),
            inputs,
            fast_mode=True,
        )
    grouped = [t.detach().float().requires_grad_() for t in (inputs[0].unflatten(1, (1, 6)), *inputs[1:])]
    grouped[1] = grouped[1].detach().to(memory_format=torch.channels_last).requires_grad_()
    operator = torch.ops.dynamic_kernels.involution_generate
    torch.library.opcheck(operator, (*grouped, [3, 3], [1, 1], [1, 1], [1, 1], False, backend))


def test_generate_in_steps_and_in_one(monkeypatch):
    inputs = [t.requires_grad_() for t in _generate_inputs().values()]
    results = []
    for budget in (1, 2**30):
        monkeypatch.setattr(generate, "STEP_BYTES", {"cpu": budget, "cuda": budget})
        with kernels.use_backend("eager"):
            out = kernels.involution2d_generate(*inputs, kernel_size=3, groups=2)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for stepwise, whole in zip(*results, strict=True):
        torch.testing.assert_close(stepwise, whole)


def test_every_generate_config():
    inputs = {key: tensor.float() for key, tensor in _generate_inputs(features=20).items()}
    inputs["x"], inputs["features"] = inputs["x"][:1, ..., :5], inputs["features"][:1, ..., :5]
    x, features, weight, bias = (tensor.double().requires_grad_() for tensor in inputs.values())
    expected = kernels.reference.involution2d_generate(x, features, weight, bias, kernel_size=3, groups=2)
    g = random_tensor(*expected.shape)
    expected_grad = torch.autograd.grad(expected, x, g.double())[0]
    rest = (*list(inputs.values())[1:], Window((3, 3), padding=(1, 1)))
    grouped, grad = inputs["x"].unflatten(1, (2, 3)), g.unflatten(1, (2, 3))
    # Warps and loads only schedule the same blocks, which the interpreter does not: there one config per tile.
    tiles = {(c.rows, c.columns, c.channels): c for c in CONFIGS}
    for config in tiles.values() if DEVICE == "cpu" else CONFIGS:
        out = forward.involution_generate(grouped, *rest, config=config)
        assert_close(out.flatten(1, 2), expected, FORWARD_TOLERANCE[torch.float32], str(config))
        out = forward.involution_generate_transpose(grad, grouped, *rest, config=config)
        assert_close(out.flatten(1, 2), expected_grad, GRADIENT_TOLERANCE[torch.float32], str(config))


@pytest.mark.parametrize("operator", ["involution2d", "involution2d_generate"])
def test_a_nan_pixel_reaches_only_windows_that_hold_it(operator):
    """Neither the map's border nor a neighbouring row, image or channel block may read it."""
    x, features = random_tensor(2, 4, 9, 6), random_tensor(2, 3, 9, 6)
    weight, dynamic = random_tensor(2 * 15, 3), random_tensor(2, 2, 5, 3, 9, 6)
    x[0, 1, 4, 0] = torch.nan
    x[1, 2, 8, 5] = torch.inf
    for tensor in (x, x.to(memory_format=torch.channels_last)):
        tensor = tensor.clone().requires_grad_()
        with kernels.use_backend("triton"):
            if operator == "involution2d":
                out = kernels.involution2d(tensor, dynamic)
            else:
                out = kernels.involution2d_generate(tensor, features, weight, kernel_size=(5, 3), groups=2)
            grad = torch.zeros_like(out)
            grad[0, 0, 0, 3] = torch.nan
            (gradient,) = torch.autograd.grad(out, tensor, grad)
        reached = torch.zeros_like(out, dtype=torch.bool)
        reached[0, 1, 2:7, :2] = True
        reached[1, 2, 6:, 4:] = True
        assert torch.equal(~out.isfinite(), reached)
        reached = torch.zeros_like(out, dtype=torch.bool)
        reached[0, 0, :3, 2:5] = True
        assert torch.equal(gradient.isnan(), reached)


def test_backward_in_chunks_and_in_one(monkeypatch):
    """The same gradients, twice the same bits, and the features' in the memory order of the features."""
    inputs = [
        tensor.float()[..., :4] if tensor.dim() == 4 else tensor.float() for tensor in _generate_inputs().values()
    ]
    inputs[1] = inputs[1].to(memory_format=torch.channels_last)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    results = []
    for budget in (1, 1, 2**30):
        monkeypatch.setattr(generate, "STEP_BYTES_ELSEWHERE", budget)
        with kernels.use_backend("triton"):
            out = kernels.involution2d_generate(*inputs, kernel_size=3, groups=2)
            results.append(torch.autograd.grad(out.square().sum(), inputs))
    for first, second, whole in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert_close(first, whole, GRADIENT_TOLERANCE[torch.float32])
        assert first.stride() == whole.stride()
    assert results[0][1].is_contiguous(memory_format=torch.channels_last)


def test_generate_under_gradient_checkpointing():
    """Saved tensors may be asked for only once there."""
    x, features, weight = random_tensor(1, 4, 5, 5), random_tensor(1, 3, 5, 5), random_tensor(18, 3)
    leaves = [tensor.requires_grad_() for tensor in (x, features, weight)]

    def run(x, features, weight):
        return kernels.involution2d_generate(x, features, weight, kernel_size=3, groups=2)

    expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    out = checkpoint(run, *leaves, use_reentrant=False)
    for ours, plain in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, plain)
