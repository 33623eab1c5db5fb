"""depthwise_conv2d against its float64 definition on every backend, and its Triton kernels config by config."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from autotune.tuner import measure_candidates
from kernels import dtypes
from kernels.depthwise import triton_kernels, triton_tiles
from kernels.depthwise.triton_tiles import CONFIGS, LIBRARY, SMALL, Config, Problem, heuristic, tile_width
from kernels.launch import record_launches
from kernels.tuning.choose import forget, observing
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, check_operator, random_tensor


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    """Natively PyTorch would be given all that is tested here; it is our kernels that are to be tested."""
    monkeypatch.setattr(triton_tiles, "SMALL", 0)
    heuristic.cache_clear()
    forget()
    yield
    heuristic.cache_clear()
    forget()


# (batch, channels, height, width, K). 9x21 cuts tiles of 4x16 short on both axes; 7x7 is one tile, of which only the
# input rows inside the map are walked; K = 31 is wider than the map; 70 channels are two blocks of 64.
SHAPES = {
    "K=17": (2, 3, 9, 21, 17),
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
    r"weight must have shape \[C=3, 1=1, K=5, K=5\]": {"weight": torch.zeros(3, 1, 3, 5)},
    r"bias must have shape \[C=3\]": {"bias": torch.zeros(3, 1)},
    "bias must be on the device of x": {"bias": torch.zeros(3, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = {"x": torch.zeros(2, 3, 5, 4), "weight": torch.zeros(3, 1, 3, 3), "bias": torch.zeros(3)}
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.depthwise_conv2d(**good | BAD[message])


def _problem(weight_gradient, dtype=torch.bfloat16, vector=8):
    return Problem(128, 64, 3136, 5, vector, dtype, weight_gradient)


def _tiles(weight_gradient):
    """One config of each tile: warps only schedule the same blocks, which in the interpreter changes nothing."""
    valid = [c for c in CONFIGS if c.valid(_problem(weight_gradient))]
    assert LIBRARY in valid
    return list({(c.tile_height, c.block_tiles, c.block_rows): c for c in valid}.values())


def test_every_config():
    x, weight, grad = random_tensor(3, 2, 11, 18), random_tensor(2, 1, 5, 5), random_tensor(3, 2, 11, 18)
    exact = weight.double().requires_grad_()
    expected = kernels.reference.depthwise_conv2d(x.double(), exact)
    (expected_gradient,) = torch.autograd.grad(expected, exact, grad.double())
    for config in _tiles(weight_gradient=False):
        out = triton_kernels.convolve(x, weight, config=config)
        assert_close(out, expected, FORWARD_TOLERANCE[x.dtype], str(config))
    for config in _tiles(weight_gradient=True):
        gradient = triton_kernels.weight_gradient(grad, x, 5, config=config)
        assert_close(gradient, expected_gradient, GRADIENT_TOLERANCE[x.dtype], str(config))


def test_pytorch_computes_small_problems_and_is_always_tried(monkeypatch):
    monkeypatch.setattr(triton_tiles, "interpreting", lambda: False)
    monkeypatch.setattr(triton_tiles, "SMALL", SMALL)
    small = Problem(1, 256, 196, 13, 2, torch.bfloat16)
    assert heuristic.__wrapped__(small) == LIBRARY
    assert heuristic.__wrapped__(small._replace(images=128)) != LIBRARY
    assert heuristic.__wrapped__(small._replace(channels_last=True)) != LIBRARY  # no thread per output there
    for problem in (small, small._replace(images=128, weight_gradient=True, channels_last=True)):
        assert LIBRARY in triton_kernels.convolve.candidates(problem)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pytorch_instead(channels_last):
    """What the tuner may choose: the same numbers in the same memory order, and nothing launched."""
    x, weight, bias = random_tensor(2, 3, 6, 7), random_tensor(3, 1, 5, 5), random_tensor(3)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with record_launches() as launches:
        plain, flipped = (triton_kernels.convolve(x, weight, bias, flag, config=LIBRARY) for flag in (False, True))
        gradient = triton_kernels.weight_gradient(x, x, 5, config=LIBRARY)
    assert not launches
    for ours, flag in ((plain, False), (flipped, True)):
        expected = triton_kernels.convolve(x, weight, bias, flag)
        assert ours.stride() == expected.stride() == x.stride()
        assert_close(ours, expected, FORWARD_TOLERANCE[x.dtype])
    assert_close(gradient, triton_kernels.weight_gradient(x, x, 5), GRADIENT_TOLERANCE[x.dtype])


def test_tuning_takes_pytorch_where_it_wins():
    x, weight = random_tensor(1, 2, 8, 16), random_tensor(2, 1, 5, 5)
    requests = []
    with observing(requests.append):
        triton_kernels.convolve(x, weight)
        triton_kernels.weight_gradient(x, x, 5)

    def launches(call):
        with record_launches() as recorded:
            call()
        return float(len(recorded))

    assert [request.launcher for request in requests] == [triton_kernels.convolve, triton_kernels.weight_gradient]
    for request in requests:
        outcomes = measure_candidates(request, launches, most=2)
        assert [(outcome.milliseconds, outcome.config == LIBRARY) for outcome in outcomes] == [(0, True), (1, False)]


def test_weight_gradient_in_chunks_of_the_batch(monkeypatch):
    """On a GPU the batch is cut into chunks and maps into blocks of tiles; the interpreter takes both in one."""
    monkeypatch.setattr(triton_kernels, "interpreting", lambda: False)
    x, grad = random_tensor(5, 1, 17, 41), random_tensor(5, 1, 17, 41)
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(kernels.reference.depthwise_conv2d(x.double(), weight), weight, grad.double())
    for config in (
        Config(8, 16, 2),
        Config(8, 64, 2),
    ):  # one image at a time in two blocks of tiles, then two at a time
        with record_launches() as launches:
            triton_kernels.weight_gradient(grad.to("meta"), x.to("meta"), 3, config=config)
        assert launches[0].arguments["chunk_images"] < len(x)
        gradient = triton_kernels.weight_gradient(grad, x, 3, config=config)
        assert_close(gradient, expected, GRADIENT_TOLERANCE[x.dtype], str(config))


def test_heuristic_is_a_valid_config(monkeypatch):
    monkeypatch.setattr(triton_tiles, "interpreting", lambda: False)
    dtypes = ((torch.bfloat16, (1, 2, 4, 8)), (torch.float32, (1, 2, 4)))
    for (dtype, vectors), kernel_size, pixels, images in itertools.product(
        dtypes, (1, 3, 7, 9, 13, 17), (196, 3136), (2, 128)
    ):
        for vector, weight_gradient in itertools.product(vectors, (False, True)):
            problem = Problem(images, 64, pixels, kernel_size, vector, dtype, weight_gradient)
            assert heuristic.__wrapped__(problem).valid(problem), problem


def test_a_config_that_cannot_pay_is_invalid():
    problem = _problem(weight_gradient=False)
    assert Config(8, 128, 4).valid(problem)
    assert not Config(4, 128, 4).valid(problem)  # a tile of 32 outputs: less than half of the loads used
    assert not Config(16, 128, 4).valid(problem)  # 128 sums a thread
    assert not Config(8, 128, 4).valid(problem._replace(images=1, pixels=49))  # one tile
    assert not Config(8, 128, 4).valid(problem._replace(vector=1))  # 96 loads a thread
    assert not Config(8, 128, 4).valid(problem._replace(dtype=torch.float32))


def test_loads_are_as_wide_as_rows_are_aligned():
    """What the kernels are told of alignment, for maps of OverLoCK's widths and for a crop."""
    weight = torch.empty(4, 1, 7, 7, device="meta", dtype=torch.bfloat16)
    for width, vector in ((56, 8), (28, 4), (14, 2), (7, 1)):
        x = torch.empty(2, 4, width, width, device="meta", dtype=torch.bfloat16)
        for view in (x, x.to(memory_format=torch.channels_last)):  # reordered, then as aligned as channels first
            with record_launches() as launches:
                triton_kernels.convolve(view, weight)
            assert [launch.arguments["VECTOR"] for launch in launches if "VECTOR" in launch.arguments] == [vector]
    with record_launches() as launches:
        triton_kernels.convolve(torch.empty(2, 4, 56, 60, device="meta", dtype=torch.bfloat16)[..., :56], weight)
    assert launches[0].arguments["VECTOR"] == 4


def test_wide_offsets_compute_the_same(monkeypatch):
    x, weight = random_tensor(2, 3, 9, 10).to(memory_format=torch.channels_last), random_tensor(3, 1, 5, 5)

    def run():
        return triton_kernels.convolve(x, weight), triton_kernels.weight_gradient(x, x, 5)

    narrow = run()
    monkeypatch.setattr(dtypes, "fits_int32", lambda *tensors: False)
    assert all(torch.equal(first, second) for first, second in zip(narrow, run(), strict=True))


def test_tile_is_as_wide_as_its_halo():
    for kernel_size in range(1, 32, 2):
        width = tile_width(kernel_size)
        assert width + kernel_size - 1 <= 2 * width
        assert width == 8 or kernel_size - 1 > width // 2
