"""na2d_av, na2d_qk and na2d_softmax_av against their float64 definitions, on every backend."""

import dataclasses

import pytest
import torch

import kernels
from kernels.aggregation import configs as gathers
from kernels.aggregation import eager as algebra
from kernels.aggregation.configs import GATHERS, GatherProblem, gather_heuristic, wide_gather_heuristic
from kernels.neighborhood import configs, eager
from kernels.windows import Window
from tests.support import (
    DEVICE,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    assert_close,
    check_operator,
    random_tensor,
    triton_device,
)

pytest.importorskip("triton")
from kernels.neighborhood import backward, forward, shared

# (batch, heads, height, width, channels, kernel size, dilation). At 14x14 with K = 13 nearly every window is clamped,
# at 7x7 with K = 7 all outputs share one; 13x10 with dilation 3 has residue classes of different sizes.
SHAPES = {
    "border": (1, 2, 14, 14, 3, 13, 1),
    "one window": (2, 1, 7, 7, 4, 7, 1),
    "interior": (1, 2, 12, 9, 5, 3, 1),
    "dilated": (1, 1, 13, 10, 3, 3, 3),
    "per axis": (1, 1, 9, 8, 2, (3, 5), (2, 1)),
}


def _tensors(shape):
    batch, heads, height, width, channels, kernel_size, dilation = SHAPES[shape]
    rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    feature = random_tensor(batch, heads, height, width, channels, dtype=torch.float64)
    kernel = random_tensor(batch, heads, height, width, rows * columns, dtype=torch.float64)
    rpb = random_tensor(heads, 2 * rows - 1, 2 * columns - 1, dtype=torch.float64)
    return feature, kernel, rpb, {"kernel_size": kernel_size, "dilation": dilation}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_av_matches_definition(shape, backend):
    value, attn, _, options = _tensors(shape)
    check_operator("na2d_av", {"attn": attn, "value": value}, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_matches_definition(shape, backend):
    query, _, rpb, options = _tensors(shape)
    inputs = {"query": query, "key": torch.randn_like(query)}
    check_operator("na2d_qk", inputs | ({} if shape == "border" else {"rpb": rpb}), backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_av_matches_definition(shape, backend):
    value, logits, rpb, options = _tensors(shape)
    inputs = {"logits": 4 * logits, "value": value, "rpb": rpb}
    check_operator("na2d_softmax_av", inputs, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, backend):
    value, logits, rpb, options = _tensors("interior")
    check_operator("na2d_av", {"attn": logits, "value": value}, backend=backend, dtype=dtype, **options)
    inputs = {"logits": logits, "value": value, "rpb": rpb}
    check_operator("na2d_softmax_av", inputs, backend=backend, dtype=dtype, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_strided_inputs_and_no_bias(backend):
    value, logits, _, options = _tensors("interior")
    channels_first = value.movedim(-1, 2).contiguous().movedim(2, -1)
    every_other = torch.stack([logits, logits], -1)[..., 0]
    check_operator("na2d_softmax_av", {"logits": every_other, "value": channels_first}, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_softmax_survives_huge_and_masked_logits(backend):
    value = random_tensor(1, 1, 5, 5, 2)
    logits = 1e4 * random_tensor(1, 1, 5, 5, 9)
    logits[..., :4] = float("-inf")  # a caller's mask: those neighbours get no weight, and nothing becomes NaN
    with kernels.use_backend(backend):
        out = kernels.na2d_softmax_av(logits, value, 3)
    expected = kernels.reference.na2d_softmax_av(logits.double(), value.double(), 3)
    assert_close(out, expected, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_every_output_has_all_its_neighbours(backend):
    """Independent of the reference: uniform weights over constant values give the constant, at the border too."""
    value = torch.ones(1, 1, 6, 7, 2, device=DEVICE)
    attn = torch.full((1, 1, 6, 7, 25), 1 / 25, device=DEVICE)
    with kernels.use_backend(backend):
        torch.testing.assert_close(kernels.na2d_av(attn, value, 5), value)


# (height, width, K): 3x3 windows of their own, two maps with shared windows, one window that is the map.
MAPS = {"own": (6, 7, 3), "shared": (9, 8, 7), "one window": (5, 5, 5)}


def _saved(name, dtype=torch.float32):
    height, width, kernel_size = MAPS[name]
    window = Window.neighborhood((kernel_size, kernel_size))
    logits = random_tensor(2, 3, height, width, kernel_size**2, dtype=dtype)
    logits = logits.unflatten(-1, window.kernel_size).permute(0, 1, 4, 5, 2, 3)
    value = random_tensor(2, 3, height, width, 10, dtype=dtype).permute(0, 1, 4, 2, 3)
    rpb = random_tensor(3, 2 * kernel_size - 1, 2 * kernel_size - 1, dtype=dtype)
    exact = (logits.double(), value.double(), rpb.double())
    out, statistics = eager.softmax_aggregate(*exact, window)
    grad = torch.randn_like(value)
    gradients = eager.softmax_aggregate_backward(grad.double(), *exact, out, statistics, window)
    saved = backward.Saved(grad, logits, value, rpb, out.to(dtype), statistics.float())
    return saved, window, out, gradients


@pytest.mark.parametrize("name", MAPS)
def test_every_config(name):
    triton_device()
    saved, window, out, (grad_logits, grad_value, grad_rpb) = _saved(name)
    assert saved.rpb is not None
    assert grad_rpb is not None
    forward_tolerance, gradient_tolerance = FORWARD_TOLERANCE[torch.float32], GRADIENT_TOLERANCE[torch.float32]
    if name == "own":
        for config in GATHERS:
            ours, _ = forward.gather(saved.logits, saved.value, saved.rpb, window, config=config)
            assert_close(ours, out, forward_tolerance, str(config))
            assert_close(backward.grad_value(saved, window, config=config), grad_value, gradient_tolerance, str(config))
            ours = backward.grad_logits(saved, window, config=config)
            assert_close(ours, grad_logits, gradient_tolerance, str(config))
        return
    softmax = shared.Softmax(saved.logits, saved.rpb, saved.out, saved.statistics)
    for config in dict.fromkeys(dataclasses.replace(c, num_warps=4) for c in configs.SHARED_CONFIGS):
        ours, _ = shared.softmax_mix(saved.logits, saved.value, saved.rpb, window, config=config)
        assert_close(ours, out, forward_tolerance, str(config))
        target = torch.empty_like(saved.logits)
        shared.correlate(saved.grad, saved.value, target, window, softmax, config=config)
        assert_close(target, grad_logits, gradient_tolerance, str(config))
        ours = shared.transpose(saved.logits, saved.grad, window, softmax, config=config)
        assert_close(ours, grad_value, gradient_tolerance, str(config))
    assert_close(backward.grad_rpb(grad_logits.float(), saved.rpb, window), grad_rpb, gradient_tolerance)


@pytest.mark.parametrize("name", ["shared", "one window"])
def test_shared_windows_compute_the_algebra(name):
    triton_device()
    saved, window, *_ = _saved(name)
    weight, x = saved.logits, saved.value
    exact, size = (weight.double(), x.double()), (x.shape[3], x.shape[4])
    tolerance = FORWARD_TOLERANCE[torch.float32]
    assert_close(shared.mix(weight, x, window), algebra.aggregate(*exact, window), tolerance)
    assert_close(shared.transpose(weight, x, window), algebra.transpose(*exact, size, window), tolerance)
    expected = algebra.correlate(exact[1], exact[1], window)
    assert_close(shared.correlate(x, x, torch.empty_like(weight), window), expected, tolerance)


def test_a_nan_reaches_only_outputs_whose_windows_hold_it():
    triton_device()
    for name, (height, width, kernel_size) in MAPS.items():
        saved, window, *_ = _saved(name)
        value = saved.value.contiguous()
        value[0, 1, :, 0, 0] = float("nan")
        with kernels.use_backend("triton"):
            out = kernels.na2d_softmax_av(
                saved.logits.permute(0, 1, 4, 5, 2, 3).flatten(-2), value.permute(0, 1, 3, 4, 2), kernel_size
            )
        reached = out.isnan().any(-1)
        holds = torch.zeros(height, width, dtype=torch.bool, device=out.device)
        rows, columns = (window.neighbours(n, axis, out.device)[:, 0] == 0 for axis, n in enumerate((height, width)))
        holds |= rows[:, None] & columns[None, :]
        assert torch.equal(reached[0, 1], holds), name
        assert not reached[1].any()
        assert not reached[0, [0, 2]].any()


def test_heuristics_are_valid_configs(monkeypatch):
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    monkeypatch.setattr(gathers, "interpreting", lambda: False)
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (1, 10, 16, 32, 64):
            for pixels, positions, outputs in ((49, 49, 49), (196, 169, 49), (25, 9, 16), (784, 529, 144)):
                problem = configs.SharedProblem(channels, pixels, positions, outputs, dtype)
                for heuristic in (
                    configs.shared_heuristic.__wrapped__,
                    configs.shared_gradient_heuristic.__wrapped__,
                ):
                    assert heuristic(problem).valid(problem), problem
            for pixels, steps in ((9, 9), (196, 25), (3136, 49), (64000, 169)):
                for layouts in ((True, True), (False, False)):
                    problem = GatherProblem(channels, pixels, steps, *layouts, dtype)
                    assert gather_heuristic.__wrapped__(problem).valid(problem), problem
                    assert wide_gather_heuristic(problem).valid(problem), problem
