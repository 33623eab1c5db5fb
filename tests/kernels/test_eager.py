"""The eager path's functions, called directly, against the definitions in float64 and their derivatives by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from autotune.timing import peak_memory
from kernels import reference
from kernels.aggregation import eager as algebra
from kernels.aggregation.eager_tiles import cut
from kernels.depthwise import eager as depthwise
from kernels.layout import empty_kernel_layout, empty_like_layout
from kernels.neighborhood import eager as neighborhood
from kernels.outlook import eager as outlook
from kernels.windows import Window
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor

# Memory order of a view [B, G, channels..., H, W], and a view that is not dense at all.
LAYOUTS = ("channels first", "heads last", "image last", "sliced")

# (window, height, width)
ZERO_PADDED = {
    "same": (Window((7, 7), padding=(3, 3)), 9, 11),
    "strided": (Window((3, 5), stride=(2, 3), padding=(1, 2)), 10, 13),
    "dilated": (Window((3, 3), padding=(2, 3), dilation=(2, 3)), 9, 8),
    "strided and dilated": (Window((3, 2), stride=(2, 3), padding=(2, 1), dilation=(3, 2)), 11, 10),
    "even kernel": (Window((4, 2), padding=(1, 0)), 6, 7),
    "padding beyond the kernel": (Window((2, 3), padding=(4, 5)), 4, 3),
    "one pixel": (Window((1, 1)), 1, 1),
}
CLAMPED = {
    "interior and borders": (Window.neighborhood((3, 5)), 11, 12),
    "four windows": (Window.neighborhood((5, 5)), 6, 6),
    "one window": (Window.neighborhood((7, 7)), 7, 7),
    "dilated": (Window.neighborhood((3, 3), (2, 3)), 9, 10),
}


def _laid_out(layout: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rank = len(shape)
    channels = tuple(range(2, rank - 2))
    if layout == "sliced":
        return random_tensor(*shape[:-2], shape[-2] * 2, shape[-1] + 3, dtype=dtype)[..., ::2, 1:-2]
    order = {
        "channels first": tuple(range(rank)),
        "heads last": (0, 1, rank - 2, rank - 1, *channels),
        "image last": (0, rank - 2, rank - 1, 1, *channels),
    }[layout]
    dense = random_tensor(*(shape[d] for d in order), dtype=dtype)
    return dense.permute(sorted(range(rank), key=order.__getitem__))


def _aggregate_reference(weight: torch.Tensor, x: torch.Tensor, window: Window) -> torch.Tensor:
    if window.clamped:
        attn, value = weight.permute(0, 1, 4, 5, 2, 3).flatten(4), x.permute(0, 1, 3, 4, 2)
        return reference.na2d_av(attn, value, window.kernel_size, window.dilation).permute(0, 1, 4, 2, 3)
    options = {"stride": window.stride, "padding": window.padding, "dilation": window.dilation}
    return reference.involution2d(x.flatten(1, 2), weight, **options).unflatten(1, x.shape[1:3])


def _check_algebra(window: Window, height: int, width: int, layout: str, dtype: torch.dtype = torch.float64) -> None:
    outputs = window.output_size(height, width)
    weight = _laid_out(layout, 2, 3, *window.kernel_size, *outputs, dtype=dtype)
    x = _laid_out(layout, 2, 3, 4, height, width, dtype=dtype)
    g = _laid_out(layout, 2, 3, 4, *outputs, dtype=dtype)
    exact_weight, exact_x = (tensor.detach().double().requires_grad_() for tensor in (weight, x))
    expected = _aggregate_reference(exact_weight, exact_x, window)
    grad_weight, grad_x = torch.autograd.grad(expected, (exact_weight, exact_x), g.double())

    out = algebra.aggregate(weight, x, window)
    assert_close(out, expected, FORWARD_TOLERANCE[dtype], "aggregate")
    assert out.stride() == empty_like_layout(x, out.shape).stride()
    out = algebra.correlate(g, x, window)
    assert_close(out, grad_weight, FORWARD_TOLERANCE[dtype], "correlate")
    assert out.stride() == empty_kernel_layout(g, window.kernel_size).stride()
    out = algebra.transpose(weight, g, (height, width), window)
    assert_close(out, grad_x, FORWARD_TOLERANCE[dtype], "transpose")
    assert out.stride() == empty_like_layout(g, out.shape).stride()


@pytest.mark.parametrize("case", [*ZERO_PADDED.values(), *CLAMPED.values()], ids=[*ZERO_PADDED, *CLAMPED])
def test_algebra(case):
    window, height, width = case
    for layout in LAYOUTS:
        _check_algebra(window, height, width, layout)


@pytest.mark.parametrize("limit", [1, 150, 4000])
def test_algebra_in_small_steps(monkeypatch, limit):
    """Tiles of one output, tiles of unequal size, one group at a time: all give the same sums."""
    monkeypatch.setattr(algebra, "STEP_ELEMENTS", {DEVICE: limit})
    for case in ("strided", "dilated"):
        _check_algebra(*ZERO_PADDED[case], "channels first")
    for case in ("interior and borders", "dilated"):
        _check_algebra(*CLAMPED[case], "heads last")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_algebra_accumulates_in_float32(dtype):
    _check_algebra(Window((7, 7), padding=(3, 3)), 20, 17, "channels first", dtype)
    _check_algebra(Window.neighborhood((7, 7)), 17, 20, "heads last", dtype)


def test_empty_batch():
    window = Window.neighborhood((3, 3))
    weight, x = random_tensor(0, 2, 3, 3, 5, 6), random_tensor(0, 2, 4, 5, 6)
    assert algebra.aggregate(weight, x, window).shape == x.shape
    assert algebra.correlate(x, x, window).shape == weight.shape
    assert algebra.transpose(weight, x, (5, 6), window).shape == x.shape
    rpb = random_tensor(2, 5, 5)
    out, log_sum_exp = neighborhood.softmax_aggregate(weight, x, rpb, window)
    assert (out.shape, log_sum_exp.shape) == (x.shape, (0, 2, 5, 6))
    *_, grad_rpb = neighborhood.softmax_aggregate_backward(x, weight, x, rpb, out, log_sum_exp, window)
    assert grad_rpb is not None
    assert not grad_rpb.any()
    value = random_tensor(0, 6, 6, 8)
    assert outlook.outlook(random_tensor(0, 3, 3, 2, 9, 9), value, 3, 2, 1, 1.0).shape == value.shape


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cuts_state_the_window_rules(data):
    """Every output in exactly one tile, and the tiles' runs give back its neighbours."""
    kernel_size, dilation = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        window = Window.neighborhood((kernel_size, 1), (dilation, 1))
        length = kernel_size * dilation + data.draw(st.integers(0, 12))
    else:
        stride, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 8))
        window = Window((kernel_size, 1), (stride, 1), (padding, 0), (dilation, 1))
        length = max(1, dilation * (kernel_size - 1) + 1 - 2 * padding) + data.draw(st.integers(0, 12))
    neighbours = window.neighbours(length, 0)
    found = {}
    for tiles in cut(window, length, 0, data.draw(st.integers(1, 9)), data.draw(st.booleans())):
        outputs = range(*tiles.outputs.indices(len(neighbours)))
        assert len(outputs) == len(tiles.segments) * tiles.count
        for n, segment in enumerate(tiles.segments):
            for run in tiles.runs:
                for t in range(run.count):
                    first = segment.begin + run.begin + t * run.slope
                    assert first + kernel_size <= segment.begin + segment.span
                    output = outputs[n * tiles.count + run.first + t]
                    assert output not in found
                    found[output] = first * segment.dilation + segment.residue
    assert [found[output] for output in range(len(neighbours))] == neighbours[:, 0].tolist()


def _peak(call: Callable[[], object]) -> int:
    """Most bytes alive at one moment of the call, beyond what was there before it; the outputs count."""
    found = peak_memory(call, torch.device(DEVICE))
    assert found is not None
    return found


@pytest.mark.skipif(DEVICE != "cpu", reason="the bound is the CPU's: elsewhere a step may hold more")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_peak_memory_of_involution(channels, size, batch):
    """At RedNet-50's stages, everything that lives at once is at most twice the inputs plus the output."""
    window = Window((7, 7), padding=(3, 3))
    x = random_tensor(batch, channels // 16, 16, size, size)
    weight = random_tensor(batch, channels // 16, 7, 7, size, size)
    calls = {
        "aggregate": (lambda: algebra.aggregate(weight, x, window), x),
        "correlate": (lambda: algebra.correlate(x, x, window), weight),
        "transpose": (lambda: algebra.transpose(weight, x, (size, size), window), x),
    }
    for name, (call, out) in calls.items():
        # The inputs once more, beside themselves and the output; the backward pass has them all, too.
        assert _peak(call) <= out.nbytes + x.nbytes + weight.nbytes, name


@pytest.mark.skipif(DEVICE != "cpu", reason="the bound is the CPU's: elsewhere a step may hold more")
def test_peak_memory_of_a_dense_prediction_map():
    """K = 13 on 50x80: the gathered neighbourhoods would be 346 MB; the operator takes its outputs and 40 MB."""
    window, spare = Window.neighborhood((13, 13)), 40e6
    logits = random_tensor(1, 8, 50, 80, 13, 13).permute(0, 1, 4, 5, 2, 3)
    value, rpb = random_tensor(1, 8, 16, 50, 80), random_tensor(8, 25, 25)
    out, log_sum_exp = neighborhood.softmax_aggregate(logits, value, rpb, window)
    peak = _peak(lambda: neighborhood.softmax_aggregate(logits, value, rpb, window))
    assert peak <= out.nbytes + log_sum_exp.nbytes + spare
    backward = (value, logits, value, rpb, out, log_sum_exp, window)
    assert _peak(lambda: neighborhood.softmax_aggregate_backward(*backward)) <= logits.nbytes + value.nbytes + spare


def _check_softmax_aggregate(
    window: Window, height: int, width: int, layout: str, biased: bool, dtype: torch.dtype = torch.float64
) -> None:
    kernel_size = window.kernel_size
    logits = 3 * _laid_out(layout, 2, 3, *kernel_size, height, width, dtype=dtype)
    value = _laid_out(layout, 2, 3, 5, height, width, dtype=dtype)
    g = _laid_out(layout, 2, 3, 5, height, width, dtype=dtype)
    rpb = random_tensor(3, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1, dtype=dtype) if biased else None
    given = [tensor for tensor in (logits, value, rpb) if tensor is not None]
    inputs = [tensor.detach().double().requires_grad_() for tensor in given]
    exact_logits = inputs[0].permute(0, 1, 4, 5, 2, 3).flatten(4)
    if biased:
        exact_logits = exact_logits + reference.rpb_logits(inputs[2], height, width, window)
    exact_value = inputs[1].permute(0, 1, 3, 4, 2)
    expected = reference.na2d_softmax_av(exact_logits, exact_value, kernel_size, dilation=window.dilation)
    expected = expected.permute(0, 1, 4, 2, 3)
    grads = torch.autograd.grad(expected, inputs, g.double())

    out, log_sum_exp = neighborhood.softmax_aggregate(logits, value, rpb, window)
    assert_close(out, expected, FORWARD_TOLERANCE[dtype], "out")
    assert out.stride() == empty_like_layout(value, value.shape).stride()
    # The statistics keep the accumulator's precision whatever the inputs' is.
    tolerance = FORWARD_TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    assert_close(log_sum_exp, exact_logits.logsumexp(-1), tolerance, "log_sum_exp")
    found = neighborhood.softmax_aggregate_backward(g, logits, value, rpb, out, log_sum_exp, window)
    for name, grad, exact in zip(("logits", "value", "rpb"), found, grads, strict=False):
        assert grad is not None
        assert_close(grad, exact, GRADIENT_TOLERANCE[dtype], f"gradient of {name}")
    assert found[0].stride() == empty_like_layout(logits, logits.shape).stride()
    assert found[1].stride() == empty_like_layout(value, value.shape).stride()
    assert (found[2] is not None) == biased


@pytest.mark.parametrize("case", CLAMPED.values(), ids=CLAMPED)
def test_softmax_aggregate(case):
    window, height, width = case
    for number, layout in enumerate(LAYOUTS):
        _check_softmax_aggregate(window, height, width, layout, biased=number != 1)


@pytest.mark.parametrize("limit", [1, 150, 4000])
def test_softmax_aggregate_in_small_steps(monkeypatch, limit):
    monkeypatch.setattr(algebra, "STEP_ELEMENTS", {DEVICE: limit})
    _check_softmax_aggregate(*CLAMPED["interior and borders"], "heads last", biased=True)
    _check_softmax_aggregate(*CLAMPED["dilated"], "channels first", biased=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax_aggregate_accumulates_in_float32(dtype):
    _check_softmax_aggregate(Window.neighborhood((7, 7)), 13, 16, "heads last", biased=True, dtype=dtype)


def test_softmax_aggregate_of_huge_logits():
    """exp of these overflows; the softmax does not."""
    window = Window.neighborhood((3, 3))
    logits, value = 1e4 * random_tensor(1, 2, 3, 3, 5, 6), random_tensor(1, 2, 4, 5, 6)
    out, log_sum_exp = neighborhood.softmax_aggregate(logits, value, None, window)
    weight = logits.double().flatten(2, 3).softmax(2).view(logits.shape)
    assert_close(out, _aggregate_reference(weight, value.double(), window), FORWARD_TOLERANCE[torch.float32])
    assert_close(log_sum_exp, logits.double().flatten(2, 3).logsumexp(2), FORWARD_TOLERANCE[torch.float32])


# (height, width, kernel_size, stride, padding)
OUTLOOKS = {
    "VOLO": (10, 12, 3, 2, 1),
    "odd map": (9, 7, 3, 2, 1),
    "stride 1": (5, 6, 3, 1, 1),
    "large windows": (7, 8, 5, 3, 2),
    "gaps between windows": (7, 8, 2, 3, 0),
}


def _check_outlook(
    height: int, width: int, kernel_size: int, stride: int, padding: int, dtype: torch.dtype = torch.float64
) -> None:
    heads, scale, positions = 3, 0.4, kernel_size**2
    logits = 3 * random_tensor(2, -(-height // stride), -(-width // stride), heads, positions, positions, dtype=dtype)
    # Channels of a larger tensor, and a gradient that is a transposed view.
    value = random_tensor(2, height, width, 5 * heads, dtype=dtype)[..., : 4 * heads]
    g = random_tensor(2, 4 * heads, height, width, dtype=dtype).permute(0, 2, 3, 1)
    window = (kernel_size, stride, padding, scale)
    exact_logits, exact_value = (tensor.detach().double().requires_grad_() for tensor in (logits, value))
    expected = reference.outlook_attention2d(
        exact_logits, exact_value, kernel_size=kernel_size, stride=stride, padding=padding, scale=scale
    )
    grads = torch.autograd.grad(expected, (exact_logits, exact_value), g.double())
    out = outlook.outlook(logits, value, *window)
    assert_close(out, expected, FORWARD_TOLERANCE[dtype])
    assert out.is_contiguous()
    for grad, exact in zip(outlook.outlook_backward(g, logits, value, *window), grads, strict=True):
        assert_close(grad, exact, GRADIENT_TOLERANCE[dtype], "gradient")
        assert grad.is_contiguous()


@pytest.mark.parametrize("case", OUTLOOKS.values(), ids=OUTLOOKS)
def test_outlook(case):
    _check_outlook(*case)


@pytest.mark.parametrize("limit", [1, 2500])
def test_outlook_in_small_blocks(monkeypatch, limit):
    """One row of windows of one image, then blocks that end in a smaller one: the overlaps between blocks add up."""
    monkeypatch.setattr(outlook, "BLOCK_ELEMENTS", {DEVICE: limit})
    _check_outlook(*OUTLOOKS["odd map"])
    _check_outlook(*OUTLOOKS["large windows"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outlook_accumulates_in_float32(dtype):
    _check_outlook(*OUTLOOKS["VOLO"], dtype)


# Every route: PyTorch's own (3), oneDNN's in both formats (7), a weight padded to 15 (13), the round trip (15, 17).
@pytest.mark.parametrize("kernel_size", [3, 7, 13, 15, 17])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_depthwise_conv2d(kernel_size, memory_format):
    x = random_tensor(2, 20, 9, 12, dtype=torch.float32).contiguous(memory_format=memory_format).requires_grad_()
    weight = random_tensor(20, 1, kernel_size, kernel_size).requires_grad_()
    bias = random_tensor(20).requires_grad_()
    inputs = (x, weight, bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = depthwise.depthwise_conv2d(*inputs), reference.depthwise_conv2d(*exact)
    assert_close(out, expected, FORWARD_TOLERANCE[torch.float32])
    assert out.is_contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert_close(depthwise.depthwise_conv2d(*inputs), expected, FORWARD_TOLERANCE[torch.float32], "without grad")

    g = random_tensor(*out.shape)
    grads = torch.autograd.grad(out, inputs, g, create_graph=True)
    exact_grads = torch.autograd.grad(expected, exact, g.double(), create_graph=True)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert_close(grad, exact_grad, GRADIENT_TOLERANCE[torch.float32], "gradient")
    penalty, exact_penalty = (torch.cat([g.flatten() for g in found]).square().sum() for found in (grads, exact_grads))
    second = torch.autograd.grad(penalty, inputs[:2])
    exact_second = torch.autograd.grad(exact_penalty, exact[:2])
    for grad, exact_grad in zip(second, exact_second, strict=True):
        assert_close(grad, exact_grad, GRADIENT_TOLERANCE[torch.float32], "second derivative")


def test_depthwise_weight_gradient_in_parts(monkeypatch):
    monkeypatch.setattr(depthwise, "GRADIENT_ELEMENTS", 1)
    test_depthwise_conv2d(7, torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_depthwise_conv2d_in_other_dtypes(dtype):
    x, weight = random_tensor(2, 6, 9, 8, dtype=dtype), random_tensor(6, 1, 7, 7, dtype=dtype)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = depthwise.depthwise_conv2d(*inputs, None), reference.depthwise_conv2d(*exact)
    assert_close(out, expected, FORWARD_TOLERANCE[dtype])
    g = random_tensor(*out.shape, dtype=dtype)
    for grad, exact_grad in zip(
        torch.autograd.grad(out, inputs, g), torch.autograd.grad(expected, exact, g.double()), strict=True
    ):
        assert grad.dtype == dtype
        assert_close(grad, exact_grad, GRADIENT_TOLERANCE[dtype], "gradient")


def test_depthwise_conv2d_compiles_whole():
    def loss(x, weight):
        return depthwise.depthwise_conv2d(x, weight, None).square().sum()

    x, weight = random_tensor(2, 16, 9, 9).requires_grad_(), random_tensor(16, 1, 15, 15).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(x, weight), (x, weight))
    for grad, expected in zip(grads, torch.autograd.grad(loss(x, weight), (x, weight)), strict=True):
        assert_close(grad, expected, GRADIENT_TOLERANCE[torch.float32])
    operator = torch.ops.dynamic_kernels.depthwise_weight_gradient.default
    torch.library.opcheck(operator, (random_tensor(2, 16, 9, 9), x, 5))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_position_bias_sums_in_float32(backend):
    """A table entry's gradient is a sum over a map's pixels: in bfloat16 one of ones stands still at 256."""
    query = torch.ones(1, 1, 28, 28, 1, dtype=torch.bfloat16, device=DEVICE)
    rpb = torch.zeros(1, 5, 5, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with kernels.use_backend(backend):
        kernels.na2d_qk(query, query, 3, rpb=rpb).sum().backward()
    exact = torch.zeros(1, 5, 5, dtype=torch.float64, requires_grad=True)
    reference.na2d_qk(query.double(), query.double(), 3, rpb=exact).sum().backward()
    assert rpb.grad is not None
    assert exact.grad is not None
    assert_close(rpb.grad, exact.grad, GRADIENT_TOLERANCE[torch.bfloat16])


# operator -> shapes of its tensors, options; for ContMix see below
REACHED = {
    "na2d_av": ({"attn": (2, 2, 9, 10, 9), "value": (2, 2, 9, 10, 3)}, {"kernel_size": 3}),
    "na2d_qk": ({"query": (2, 2, 9, 10, 3), "key": (2, 2, 9, 10, 3), "rpb": (2, 5, 5)}, {"kernel_size": 3}),
    "na2d_softmax_av": ({"logits": (2, 2, 9, 10, 9), "value": (2, 2, 9, 10, 3), "rpb": (2, 5, 5)}, {"kernel_size": 3}),
    "involution2d": ({"x": (2, 6, 9, 10), "weight": (2, 2, 3, 3, 5, 5)}, {"stride": 2}),
    "outlook_attention2d": ({"logits": (2, 5, 5, 2, 9, 9), "value": (2, 9, 10, 6)}, {"stride": 2}),
    "depthwise_conv2d": ({"x": (2, 16, 20, 18), "weight": (16, 1, 13, 13), "bias": (16,)}, {}),
    "contmix2d": (
        {
            "query": (2, 2, 3, 9, 10),
            "key": (2, 2, 3, 4),
            "value": (2, 1, 2, 3, 9, 10),
            "proj_weight": (9, 4),
            "proj_bias": (9,),
            "rpb": (2, 5, 5),
        },
        {"kernel_sizes": (3,)},
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere products with bands of zeros are not looked at")
@pytest.mark.parametrize("name", REACHED)
def test_what_is_not_finite_reaches_what_the_definition_says(name):
    """One NaN or infinity in one argument, or in the output's gradient."""
    shapes, options = REACHED[name]
    drawn = {key: random_tensor(*shape) for key, shape in shapes.items()}
    if name == "depthwise_conv2d":  # where zeros around the weight make the kernel larger
        drawn["x"] = drawn["x"].contiguous(memory_format=torch.channels_last)
    for place in (*drawn, "gradient"):
        for bad in (float("nan"), float("inf")):
            if (place, bad) == ("proj_weight", float("inf")):
                continue  # keys are projected first, and ∞ − ∞ arises there that does not in the affinities
            found = {}
            for backend in ("eager", "reference"):
                inputs = {key: tensor.clone() for key, tensor in drawn.items()}
                if place in inputs:
                    inputs[place][tuple(size // 2 for size in inputs[place].shape)] = bad
                leaves = [tensor.requires_grad_() for tensor in inputs.values()]
                arguments = inputs | ({"rpb": (inputs["rpb"],)} if name == "contmix2d" else {})
                with kernels.use_backend(backend):
                    out = getattr(kernels, name)(**arguments, **options)
                grad = random_tensor(*out.shape, seed=0)
                if place == "gradient":
                    grad[tuple(size // 2 for size in out.shape)] = bad
                found[backend] = [t.isfinite() for t in (out, *torch.autograd.grad(out, leaves, grad))]
            for what, ours, expected in zip(("output", *drawn), *found.values(), strict=True):
                assert torch.equal(ours, expected), f"{bad} in {place}: {what}"


def test_autocast_changes_no_dtype_of_sums():
    """Depthwise convolution under autocast: operands in autocast's type, the same bits as without it."""
    x, weight = random_tensor(2, 8, 12, 9), random_tensor(8, 1, 7, 7)
    bias = random_tensor(8)
    found = []
    for enabled in (True, False):
        dtype = torch.float32 if enabled else torch.bfloat16
        inputs = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        with kernels.use_backend("eager"), torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            out = kernels.depthwise_conv2d(*inputs)
            grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        assert out.dtype == torch.bfloat16
        found.append([out, *(grad.bfloat16() for grad in grads)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_dilation_far_beyond_the_map():
    """Only the window's centre is inside; there are no more residue classes than outputs."""
    x, weight = random_tensor(1, 2, 4, 5, 6), random_tensor(1, 2, 3, 3, 5, 6)
    far = 2**40
    window = Window((3, 3), padding=(far, far), dilation=(far, far))
    assert torch.equal(algebra.aggregate(weight, x, window), x * weight[:, :, None, 1, 1])
    assert torch.equal(algebra.transpose(weight, x, (5, 6), window), x * weight[:, :, None, 1, 1])
