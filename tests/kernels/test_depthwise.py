"""depthwise_conv2d against its float64 definition on every backend, and its Triton kernels config by config."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from autotune.tuner import measure_candidates
from kernels import dtypes
from kernels.depthwise import backward, configs, forward
from kernels.depthwise.configs import CONFIGS, LIBRARY, SMALL, Config, Problem, heuristic, tile_shape
from kernels.depthwise.rows import are_rows, in_layout_of, rows_of
from kernels.launch import record_launches
from kernels.tuning.choose import forget, observing
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, check_operator, random_tensor


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    """Natively PyTorch would be given all that is tested here; it is our kernels that are to be tested."""
    monkeypatch.setattr(configs, "SMALL", 0)
    heuristic.cache_clear()
    forget()
    yield
    heuristic.cache_clear()
    forget()


# (batch, channels, height, width, K). 9x21 is one tile wide and cuts it short on both axes; 37 columns are five tiles
# with halos, the last of them cut; K = 31 is wider than the map; 70 channels are two blocks of 64.
SHAPES = {
    "K=17": (2, 3, 9, 21, 17),
    "halos": (2, 2, 5, 37, 9),
    "one tile": (2, 2, 7, 7, 7),
    "K=31": (1, 2, 5, 34, 31),
    "pointwise": (2, 3, 3, 9, 1),
    "two channel blocks": (1, 70, 6, 5, 5),
}


def _inputs(shape):
    batch, channels, height, width, kernel_size = SHAPES[shape]
    return {
        "x": random_tensor(batch, channels, height, width, dtype=torch.float64),
        "weight": random_tensor(channels, 1, kernel_size, kernel_size, dtype=torch.float64),
        "bias": random_tensor(channels, dtype=torch.float64),
    }


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_definition(shape, backend):
    check_operator("depthwise_conv2d", _inputs(shape), backend=backend)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, backend):
    check_operator("depthwise_conv2d", _inputs("K=17"), backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    "kind", ["contiguous", "channels last", "crop", "channels last, cropped", "every other", "expanded"]
)
def test_memory_formats(kind, backend):
    """Any strides are read as they are, the output has the memory format of x, and no bias is given."""
    x = random_tensor(2, 4, 8, 12)
    x = {
        "contiguous": lambda: x,
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "crop": lambda: x[:, 1:, 2:, :9],
        "channels last, cropped": lambda: x.to(memory_format=torch.channels_last)[:, :, 1:, :9],
        "every other": lambda: x.transpose(2, 3)[:, ::2, ::2],
        "expanded": lambda: x[:1, :1].expand(2, 3, 8, 12),
    }[kind]()
    weight = random_tensor(x.shape[1], 1, 5, 5).transpose(2, 3)
    with kernels.use_backend(backend):
        out = kernels.depthwise_conv2d(x, weight)
    assert_close(out, kernels.reference.depthwise_conv2d(x.double(), weight.double()), FORWARD_TOLERANCE[x.dtype], kind)
    if kind == "channels last":
        assert out.is_contiguous(memory_format=torch.channels_last)
    elif kind in ("contiguous", "crop"):
        assert out.is_contiguous()


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_a_single_weight_moves_the_map(backend):
    """Independent of the reference: a kernel with a 1 at (a, b) reads the pixel at (a − K//2, b − K//2) from here."""
    x = random_tensor(1, 1, 6, 19)
    for a, b in ((0, 0), (6, 1), (3, 3), (2, 6)):
        weight = torch.zeros(1, 1, 7, 7, device=DEVICE)
        weight[0, 0, a, b] = 1
        with kernels.use_backend(backend):
            out = kernels.depthwise_conv2d(x, weight)
        expected = torch.nn.functional.pad(x, (3, 3, 3, 3))[:, :, a : a + 6, b : b + 19]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_derivatives_of_both_orders(backend):
    def fresh(*shape):
        return random_tensor(*shape, dtype=torch.float64).requires_grad_()

    inputs = fresh(2, 2, 3, 4), fresh(2, 1, 3, 3), fresh(2)
    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(kernels.depthwise_conv2d, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(kernels.depthwise_conv2d, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_empty_batch(backend):
    x = torch.randn(0, 2, 5, 5, device=DEVICE, requires_grad=True)
    weight, bias = random_tensor(2, 1, 3, 3).requires_grad_(), random_tensor(2).requires_grad_()
    with kernels.use_backend(backend):
        out = kernels.depthwise_conv2d(x, weight, bias)
        out.sum().backward()
    assert out.shape == x.shape
    for gradient in (weight.grad, bias.grad):
        assert gradient is not None
        assert not gradient.any()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_same_input_same_bits(backend):
    inputs = [tensor.float().requires_grad_() for tensor in _inputs("K=17").values()]
    runs = []
    for _ in range(2):
        with kernels.use_backend(backend):
            out = kernels.depthwise_conv2d(*inputs)
            runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_in_one_graph(backend):
    inputs = [tensor.float().requires_grad_() for tensor in _inputs("one tile").values()]
    compiled = torch.compile(kernels.depthwise_conv2d, fullgraph=True, backend="aot_eager")
    with kernels.use_backend(backend):
        out, expected = compiled(*inputs), kernels.depthwise_conv2d(*inputs)
        grads = torch.autograd.grad(out.sum(), inputs)
        expected_grads = torch.autograd.grad(expected.sum(), inputs)
    assert torch.equal(out, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_registration():
    """Schema, fake implementation and autograd of the registered operators agree with what really runs."""
    x = random_tensor(2, 3, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = random_tensor(3, 1, 3, 3).requires_grad_(), random_tensor(3).requires_grad_()
    operators = torch.ops.dynamic_kernels
    torch.library.opcheck(operators.depthwise_conv2d, (x, weight, bias, True))
    torch.library.opcheck(operators.depthwise_conv2d_weight_gradient, (x.detach().clone().requires_grad_(), x, 3))


def test_flops():
    x, weight = torch.randn(2, 3, 5, 4, device=DEVICE, requires_grad=True), random_tensor(3, 1, 3, 3).requires_grad_()
    with kernels.use_backend("triton"), FlopCounterMode(display=False) as counter:
        kernels.depthwise_conv2d(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 9  # forward, and as much again for each gradient


BAD = {
    "x must have shape": {"x": torch.zeros(3, 5, 4)},
    "weight must have shape": {"weight": torch.zeros(2, 1, 3, 3)},
    "weight must be a torch.Tensor": {"weight": 3},
    "weight must have the dtype of x": {"weight": torch.zeros(3, 1, 3, 3).half()},
    "weight must have an odd kernel size": {"weight": torch.zeros(3, 1, 2, 2)},
    "weight must have a kernel size of at most 31": {"weight": torch.zeros(3, 1, 33, 33)},
    r"weight must have shape \[C=3, 1, K, K\]": {"weight": torch.zeros(3, 1, 3, 5)},
    r"bias must have shape \[C=3\]": {"bias": torch.zeros(3, 1)},
    "bias must be on the device of x": {"bias": torch.zeros(3, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = {"x": torch.zeros(2, 3, 5, 4), "weight": torch.zeros(3, 1, 3, 3), "bias": torch.zeros(3)}
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.depthwise_conv2d(**good | BAD[message])


def _problem(weight_gradient, dtype=torch.bfloat16, width=56):
    return Problem(128, 64, width * width, 5, *tile_shape(5, width), dtype, weight_gradient)


def _tiles(weight_gradient, width):
    """One config of each tile: warps only schedule the same blocks, which in the interpreter changes nothing."""
    valid = [c for c in CONFIGS if c.valid(_problem(weight_gradient, width=width))]
    assert LIBRARY in valid
    return list({(c.tile_height, c.block_tiles, c.block_rows): c for c in valid}.values())


@pytest.mark.parametrize("width", [13, 18])
def test_every_config(width):
    """Tiles with halos, and one as wide as the map."""
    x, weight, grad = random_tensor(3, 2, 11, width), random_tensor(2, 1, 5, 5), random_tensor(3, 2, 11, width)
    exact = weight.double().requires_grad_()
    expected = kernels.reference.depthwise_conv2d(x.double(), exact)
    (expected_gradient,) = torch.autograd.grad(expected, exact, grad.double())
    for config in _tiles(weight_gradient=False, width=width):
        out = forward.convolve(x, weight, config=config)
        assert_close(out, expected, FORWARD_TOLERANCE[x.dtype], str(config))
    for config in _tiles(weight_gradient=True, width=width):
        gradient = backward.weight_gradient(grad, x, 5, config=config)
        assert_close(gradient, expected_gradient, GRADIENT_TOLERANCE[x.dtype], str(config))


def test_pytorch_computes_small_problems_and_is_always_tried(monkeypatch):
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    monkeypatch.setattr(configs, "SMALL", SMALL)
    small = Problem(1, 256, 196, 13, *tile_shape(13, 14), torch.bfloat16)
    assert heuristic.__wrapped__(small) == LIBRARY
    assert heuristic.__wrapped__(small._replace(images=128)) != LIBRARY
    assert heuristic.__wrapped__(small._replace(copied=True)) != LIBRARY  # no thread per output there
    for problem in (small, small._replace(images=128, weight_gradient=True, copied=True)):
        assert LIBRARY in forward.convolve.candidates(problem)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pytorch_instead(channels_last):
    """What the tuner may choose: the same numbers in the same memory order, and nothing launched."""
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
        assert [(outcome.milliseconds, outcome.config == LIBRARY) for outcome in outcomes] == [(0, True), (1, False)]


def test_weight_gradient_in_chunks_of_the_batch(monkeypatch):
    """On a GPU the batch is cut into chunks and maps into blocks of tiles; the interpreter takes both in one."""
    monkeypatch.setattr(backward, "interpreting", lambda: False)
    x, grad = random_tensor(5, 1, 17, 41), random_tensor(5, 1, 17, 41)
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(kernels.reference.depthwise_conv2d(x.double(), weight), weight, grad.double())
    for config in (
        Config(8, 16, 2),
        Config(8, 64, 2),
    ):  # one image at a time in two blocks of tiles, then two at a time
        with record_launches() as launches:
            backward.weight_gradient(grad.to("meta"), x.to("meta"), 3, config=config)
        assert launches[-1].arguments["chunk_images"] < len(x)
        gradient = backward.weight_gradient(grad, x, 3, config=config)
        assert_close(gradient, expected, GRADIENT_TOLERANCE[x.dtype], str(config))


def test_heuristic_is_a_valid_config(monkeypatch):
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    for dtype, kernel_size, width, height, images, channels, weight_gradient in itertools.product(
        (torch.bfloat16, torch.float32), range(1, 32, 2), (1, 7, 9, 17, 33, 65), (1, 14, 200), (1, 128), (1, 64), (0, 1)
    ):
        shape = tile_shape(kernel_size, width)
        problem = Problem(images, channels, height * width, kernel_size, *shape, dtype, bool(weight_gradient))
        assert heuristic.__wrapped__(problem).valid(problem), problem


def test_a_config_that_cannot_pay_is_invalid():
    problem = _problem(weight_gradient=False)
    assert Config(8, 128, 4).valid(problem)
    assert not Config(2, 128, 4).valid(problem)  # a tile of 16 outputs: a fifth of the loads used
    assert not Config(16, 256, 2).valid(problem)  # 256 sums per thread
    assert not Config(8, 128, 4).valid(problem._replace(images=1, pixels=49))  # one tile
    assert not Config(8, 128, 16).valid(problem)  # more operands than shared memory holds
    assert not Config(8, 128, 4).valid(problem._replace(dtype=torch.float32))


def test_rows_are_aligned_and_end_in_zeros():
    """A map whose rows cannot be loaded 16 bytes at a time is copied; one whose rows can be is read as it is."""
    for width, copied in ((8, False), (7, True), (12, True)):
        x = random_tensor(2, 3, 5, width, dtype=torch.bfloat16)
        rows = rows_of(x)
        assert (rows is not x) == copied == (not are_rows(x))
        assert are_rows(rows)
        assert torch.equal(rows[..., :width], x)
        assert not rows[..., width:].any()
    crop = random_tensor(2, 3, 5, 16, dtype=torch.bfloat16)[..., 4:12]
    assert not are_rows(crop)  # begins between two vectors
    assert are_rows(crop.clone())
    last = random_tensor(2, 70, 5, 9).to(memory_format=torch.channels_last)
    assert torch.equal(in_layout_of(last, rows_of(last)), last)
    assert in_layout_of(last, rows_of(last)).stride() == last.stride()


def test_a_value_that_is_not_finite_stays_in_its_image_and_channel():
    """Products spread it over tiles of its own image and channel; further away nothing changes."""
    x, weight = random_tensor(2, 3, 9, 40), random_tensor(3, 1, 3, 3)
    with kernels.use_backend("triton"):
        clean = kernels.depthwise_conv2d(x, weight)
        x[1, 2, 4, 20] = float("nan")
        out = kernels.depthwise_conv2d(x, weight)
    assert out[1, 2, 3:6, 19:22].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


def test_maps_beyond_32_bits_are_refused():
    x = torch.empty(1, 1, 2**16, 2**15, device="meta", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x must have fewer than 2"):
        forward.convolve(x, torch.empty(1, 1, 3, 3, device="meta", dtype=torch.bfloat16), config=CONFIGS[1])


def test_wide_offsets_compute_the_same(monkeypatch):
    x, weight = random_tensor(2, 3, 9, 10).to(memory_format=torch.channels_last), random_tensor(3, 1, 5, 5)

    def run():
        return forward.convolve(x, weight), backward.weight_gradient(x, x, 5)

    narrow = run()
    monkeypatch.setattr(dtypes, "fits_int32", lambda *tensors: False)
    assert all(torch.equal(first, second) for first, second in zip(narrow, run(), strict=True))


def test_tile_is_as_wide_as_its_halo_or_the_map():
    for kernel_size, width in itertools.product(range(1, 32, 2), (1, 7, 8, 9, 16, 31, 65)):
        tile, span = tile_shape(kernel_size, width)
        assert tile + kernel_size - 1 <= span or width <= tile == span
