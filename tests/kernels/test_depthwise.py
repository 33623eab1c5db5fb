"""depthwise_conv2d beyond the rules for every operator: PyTorch's convolution instead, rows, tiles, chunks."""

import pytest
import torch

import kernels
from autotune.tuner import measure_candidates
from kernels.depthwise import backward, configs, forward
from kernels.depthwise.branch_norms import statistics_of
from kernels.depthwise.configs import CONFIGS, LIBRARY, SMALL, Config, Problem, heuristic, tile_shape
from kernels.launch import record_launches
from kernels.tuning.choose import observing
from tests.support import (
    DEVICE,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    assert_close,
    differentiated,
    random_tensor,
    triton_device,
)


def test_pytorch_computes_small_problems_and_is_always_tried(monkeypatch):
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    monkeypatch.setattr(configs, "SMALL", SMALL)
    small = Problem(1, 256, 196, 13, *tile_shape(13, 14), torch.bfloat16)
    assert heuristic(small) == LIBRARY
    assert heuristic(small._replace(images=128)) != LIBRARY
    assert heuristic(small._replace(copied=True)) != LIBRARY  # no thread per output there
    for problem in (small, small._replace(images=128, weight_gradient=True, copied=True)):
        assert LIBRARY in forward.convolve.candidates(problem)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pytorch_instead(channels_last):
    """PyTorch's convolution, which the tuner may choose, gives the same numbers in the same memory order."""
    x, weight, bias = random_tensor(2, 3, 6, 7), random_tensor(3, 1, 5, 5), random_tensor(3)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with record_launches() as launches:
        plain, flipped = (forward.convolve(x, weight, bias, flag, config=LIBRARY) for flag in (False, True))
        gradient = backward.weight_gradient(x, x, 5, config=LIBRARY)
    assert not launches
    for ours, flag in ((plain, False), (flipped, True)):
        expected = forward.convolve(x, weight, bias, flag)
        assert ours.stride() == expected.stride() == x.stride()
        assert_close(ours, expected, FORWARD_TOLERANCE[x.dtype])
    assert_close(gradient, backward.weight_gradient(x, x, 5), GRADIENT_TOLERANCE[x.dtype])


def test_tuning_takes_pytorch_where_it_wins():
    x, weight = random_tensor(1, 2, 8, 16), random_tensor(2, 1, 5, 5)
    requests = []
    with observing(requests.append):
        forward.convolve(x, weight)
        backward.weight_gradient(x, x, 5)

    def launches(call):
        with record_launches() as recorded:
            call()
        return float(len(recorded))

    assert [request.launcher for request in requests] == [forward.convolve, backward.weight_gradient]
    for request in requests:
        outcomes = measure_candidates(request, launches, most=2)
        assert [(outcome.milliseconds, outcome.config == LIBRARY) for outcome in outcomes] == [(0, True), (2, False)]


@pytest.mark.parametrize("chunks", [(5, 1), (2, 2), (1, 3), (1, 1)])
def test_weight_gradient_in_chunks(chunks, monkeypatch):
    """On a GPU images and the tiles of an image are cut into chunks; the interpreter takes both in one."""
    monkeypatch.setattr(backward, "_chunks", lambda programs, image_blocks, tile_blocks: chunks)
    x, grad = random_tensor(5, 1, 17, 117), random_tensor(5, 1, 17, 117)
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(kernels.reference.depthwise_conv2d(x.double(), weight), weight, grad.double())
    config = Config(4, 16, 2)  # five blocks of tiles: chunks of one to five, the last shorter
    with record_launches() as launches:
        backward.weight_gradient(grad.to("meta"), x.to("meta"), 3, config=config)
    (arguments,) = (made.arguments for made in launches if "chunk_images" in made.arguments)
    assert (-(-len(x) // arguments["chunk_images"]), arguments["tile_chunks"]) == chunks
    assert_close(backward.weight_gradient(grad, x, 3, config=config), expected, GRADIENT_TOLERANCE[x.dtype])


# The heuristic's config, and several tiles and steps. Heights are around those where rows of a tile lie apart, which
# parts them unevenly.
@pytest.mark.parametrize("config", [None, Config(2, 16, 2), Config(4, 16, 4)])
@pytest.mark.parametrize("dilation", [2, 3, 7])
@pytest.mark.parametrize("height", [7, 16, 17, 40])
def test_dilated(height, dilation, config):
    x, grad, weight = random_tensor(3, 2, height, 13), random_tensor(3, 2, height, 13), random_tensor(2, 1, 3, 3)

    def definition(x, weight):
        return torch.nn.functional.conv2d(x, weight, None, 1, dilation, dilation, 2)

    out, *gradients = differentiated(definition, (x.double(), weight.double()), [grad.double()])
    options = {} if config is None else {"config": config}
    assert_close(forward.convolve(x, weight, None, False, dilation, **options), out, FORWARD_TOLERANCE[x.dtype])
    through = forward.convolve(grad, weight, None, True, dilation, **options)
    of_weight = backward.weight_gradient(grad, x, 3, dilation, **options)
    assert_close((through, of_weight), gradients, GRADIENT_TOLERANCE[x.dtype])


def test_maps_beyond_32_bits_are_refused():
    x = torch.empty(1, 1, 2**16, 2**15, device="meta", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x must have fewer than 2"):
        forward.convolve(x, torch.empty(1, 1, 3, 3, device="meta", dtype=torch.bfloat16), config=CONFIGS[1])


@pytest.mark.parametrize(
    ("batch", "height", "width"), [(1, 32, 32), (2, 4, 152), (3, 16, 24), (150, 1, 8), (1, 3, 400)]
)
def test_statistics_beside_one_value_that_is_far_from_all_others(batch, height, width):
    """Wherever it lies, of every channel elsewhere: the sums are about another value. The second branch's mean is large
    beside its deviations."""
    triton_device()
    number = batch * height * width
    x = 100 * torch.eye(number, device=DEVICE).view(batch, height, width, number).movedim(-1, 1).contiguous()
    u = torch.stack([x, random_tensor(*x.shape) + 1000])
    mean, variance = statistics_of(x, u)
    exact = u.double().transpose(1, 2).flatten(2)
    for found, expected in ((mean, exact.mean(2)), (variance, exact.var(2, correction=0))):
        assert ((found - expected).abs() / expected).max() < 2e-6
    u[0, :, 0, 0, 0] = float("nan")
    u[1, :, 0, height // 4, width // 4] = float("inf")
    mean, variance = statistics_of(x, u)
    assert mean[0, 0].isnan()
    assert variance[0, 0].isnan()
    assert not mean[1, 0].isfinite()
    assert variance[1, 0].isnan()
    assert mean[:, 1:].isfinite().all()
    assert variance[:, 1:].isfinite().all()
