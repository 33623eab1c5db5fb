"""contmix2d against its float64 definition, on every backend."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.contmix import (
    eager,
    triton_forward,
    triton_grad_inputs,
    triton_grad_parameters,
    triton_kernels,
    triton_tiles,
)
from kernels.contmix.triton_tiles import Config
from kernels.launch import record_launches
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor


def _inputs(batch=1, groups=2, query_channels=3, context=6, value_channels=5, size=(8, 7), kernel_sizes=(3, 5)):
    height, width = size
    positions = sum(k * k for k in kernel_sizes)
    shapes = [
        (batch, groups, query_channels, height, width),
        (batch, groups, query_channels, context),
        (batch, len(kernel_sizes), groups, value_channels, height, width),
        (positions, context),
        (positions,),
        *[(groups, 2 * k - 1, 2 * k - 1) for k in kernel_sizes],
    ]
    return [random_tensor(*shape, dtype=torch.float64) for shape in shapes]


def _contmix(module, tensors, kernel_sizes):
    return module.contmix2d(*tensors[:5], tensors[5:], kernel_sizes=kernel_sizes)


class _LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


GRADIENTS = ("query", "projected", "bias", "rpb", "value")
NAMES = ("query", "key", "value", "proj_weight", "proj_bias", "rpb[0]", "rpb[1]", "rpb[2]")


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    ("size", "kernel_sizes", "dtype"),
    [
        ((8, 7), (3, 5), torch.float32),
        ((7, 7), (5, 7), torch.float32),  # one window for every pixel
        ((6, 9), (1, 3), torch.float64),
        ((9, 8), (3, 5, 7), torch.float32),
        ((5, 37), (5,), torch.float32),  # three tiles side by side, windows clamped in the first and the last
    ],
)
def test_matches_definition(size, kernel_sizes, dtype, backend):
    exact = [t.to(dtype).double().requires_grad_() for t in _inputs(size=size, kernel_sizes=kernel_sizes)]
    expected = _contmix(kernels.reference, exact, kernel_sizes)
    grad = torch.randn_like(expected).to(dtype)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    ours = [t.detach().to(dtype).requires_grad_() for t in exact]
    with kernels.use_backend(backend):
        out = _contmix(kernels, ours, kernel_sizes)
        grads = torch.autograd.grad(out, ours, grad)
    # Two matrix products stand between the inputs and the softmax: their rounding enters the exponent.
    assert_close(out, expected, 2 * FORWARD_TOLERANCE[dtype])
    for name, ours_grad, expected_grad in zip(NAMES, grads, expected_grads, strict=False):
        assert_close(ours_grad, expected_grad, GRADIENT_TOLERANCE[dtype], f"gradient of {name}")


def test_spans_of_more_than_two_tiles(monkeypatch):
    """With K = 19 sixteen adjacent outputs see 34 inputs, and as many outputs see sixteen inputs."""
    monkeypatch.setattr(triton_tiles, "OUTPUTS_PER_WINDOW", 10**6)
    ours = [tensor.float().requires_grad_() for tensor in _inputs(groups=1, size=(19, 20), kernel_sizes=(19,))]
    results = {}
    for backend in ("eager", "triton"):
        with kernels.use_backend(backend):
            out = _contmix(kernels, ours, (19,))
            results[backend] = [out, *torch.autograd.grad(out.square().sum(), ours)]
    for name, result, expected in zip(("out", *NAMES), results["triton"], results["eager"], strict=False):
        assert_close(result, expected, GRADIENT_TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend):
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in _inputs(size=(7, 8), kernel_sizes=(3, 7))]
    expected = _contmix(kernels.reference, exact, (3, 7))
    grad = torch.randn_like(expected).to(dtype)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    ours = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    with kernels.use_backend(backend):
        out = _contmix(kernels, ours, (3, 7))
        grads = torch.autograd.grad(out, ours, grad)
    # The projected keys are rounded once more than the definition rounds anything.
    assert_close(out, expected, 2 * FORWARD_TOLERANCE[dtype])
    for name, ours_grad, expected_grad in zip(NAMES, grads, expected_grads, strict=False):
        assert ours_grad.dtype == dtype
        assert_close(ours_grad, expected_grad, 2 * GRADIENT_TOLERANCE[dtype], f"gradient of {name}")


@pytest.mark.parametrize(
    ("threshold", "size", "kernel_size"),
    [
        (16, (4, 18), 3),  # own windows: two tiles side by side
        (0, (6, 5), 5),  # every window counts as shared
    ],
)
def test_every_config(threshold, size, kernel_size, monkeypatch):
    """Both formulations, forward and backward, with blocks smaller and larger than the map and the window."""
    monkeypatch.setattr(triton_tiles, "OUTPUTS_PER_WINDOW", threshold)
    height, width = size
    assert triton_tiles.shares_windows(height, width, kernel_size) == (threshold == 0)
    query, key, value, proj_weight, bias, table = (
        tensor.float() for tensor in _inputs(groups=1, size=size, kernel_sizes=(kernel_size,))
    )
    value, projected = value[:, 0], (key @ proj_weight.t())
    out, statistics = torch.empty_like(value), torch.empty(1, 1, height, width, device=DEVICE)
    inputs = triton_forward.Inputs(query, projected, bias, table.flatten(1), value[:, None])
    grad, delta = torch.randn_like(value), torch.empty_like(statistics)
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)

    features, parameters = (query.double(), projected.double(), bias.double()), table.flatten(1).double()
    wide = (*features, parameters, value[:, None].double())
    expected, log_sum_exp = eager.contmix(*wide, [kernel_size])
    expected_grads = eager.contmix_backward(grad[:, None].double(), *wide, expected, log_sum_exp, [kernel_size])

    saved = triton_tiles.Saved(grad, query, projected, bias, table, value, out, statistics)
    configs = [config for config in triton_tiles.CONFIGS if threshold == 0 or config.block_steps == 16]
    tiles = {(config.block_pixels, config.block_steps): config for config in configs}
    for config in tiles.values() if DEVICE == "cpu" else configs:
        outputs = out.fill_(torch.nan)[:, None], statistics.fill_(torch.nan)[:, None]
        triton_forward.forward(inputs, *outputs, [kernel_size], {0: config})
        assert_close(out, expected[:, 0], 2 * FORWARD_TOLERANCE[torch.float32], f"{config}")
        assert_close(statistics, log_sum_exp[:, 0], 2 * FORWARD_TOLERANCE[torch.float32], f"{config}")
        triton_grad_inputs.grad_query(saved, grad_query.fill_(torch.nan), delta.fill_(torch.nan), config=config)
        triton_grad_inputs.grad_value(saved, grad_value.fill_(torch.nan), config=config)
        grad_projected = triton_grad_parameters.grad_projected(saved, delta, config=config)
        grad_bias, grad_table = triton_grad_parameters.grad_tables(saved, delta, config=config)
        ours = grad_query, grad_projected, grad_bias, grad_table.flatten(1), grad_value[:, None]
        for name, ours_grad, expected_grad in zip(GRADIENTS, ours, expected_grads, strict=True):
            assert_close(ours_grad, expected_grad, GRADIENT_TOLERANCE[torch.float32], f"{config}: {name}")


@pytest.mark.parametrize(
    ("size", "folded", "programs"), [((9, 6), 2, 1), ((9, 6), 2, 1024), ((9, 6), 3, 40), ((4, 69), 16, 40)]
)
def test_sums_do_not_depend_on_how_they_are_cut(size, folded, programs, monkeypatch):
    """Rows folded onto few, tiles of columns onto one, terms in one chunk or in many; no side is a multiple."""
    monkeypatch.setattr(triton_grad_parameters, "FOLDED", folded)
    monkeypatch.setattr(triton_grad_parameters, "PROGRAMS", programs)
    exact = [tensor.requires_grad_() for tensor in _inputs(batch=2, groups=1, size=size, kernel_sizes=(3,))]
    expected = _contmix(kernels.reference, exact, (3,))
    grad = torch.randn_like(expected)
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    with kernels.use_backend("triton"):
        grads = torch.autograd.grad(_contmix(kernels, ours, (3,)), ours, grad.float())
    for name, ours_grad, expected_grad in zip(NAMES, grads, torch.autograd.grad(expected, exact, grad), strict=False):
        assert_close(ours_grad, expected_grad, GRADIENT_TOLERANCE[torch.float32], f"gradient of {name}")


def test_layouts_are_kept():
    """Channels-last maps in, channels-last output and gradients out, on the eager path and in what is traced."""
    query = random_tensor(2, 8, 8, 3 * 2).permute(0, 3, 1, 2).unflatten(1, (2, 3)).requires_grad_()
    value = random_tensor(2, 8, 8, 2 * 2 * 5).permute(0, 3, 1, 2).unflatten(1, (2, 2, 5)).requires_grad_()
    _, key, _, proj_weight, proj_bias, *tables = (tensor.float() for tensor in _inputs(batch=2))
    out = kernels.contmix2d(query, key, value, proj_weight, proj_bias, tables, kernel_sizes=(3, 5))
    out.sum().backward()
    assert out.stride() == value.stride()
    assert query.grad is not None
    assert value.grad is not None
    assert (query.grad.stride(), value.grad.stride()) == (query.stride(), value.stride())


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_registered_operators(backend, channels_last):
    """Schemas, fakes (their strides too) and autograd are what the operators do."""

    def maps(*channels):
        pixels = random_tensor(1, 4, 5, math.prod(channels)).permute(0, 3, 1, 2)
        return (pixels if channels_last else pixels.contiguous()).unflatten(1, channels)

    query, value = maps(2, 3), maps(2, 2, 2)
    inputs = (
        query,
        random_tensor(1, 2, 3, 10),
        random_tensor(10),
        [random_tensor(2, 1, 1), random_tensor(2, 5, 5)],
        value,
    )
    sizes = [1, 3]
    operators = torch.ops.dynamic_kernels
    out, statistics = operators.contmix(*inputs, sizes, backend)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.contmix.default, (*inputs, sizes, backend), test_utils=checks)
    saved = (torch.randn_like(out), *inputs, out, statistics, sizes, backend)
    torch.library.opcheck(operators.contmix_backward.default, saved, test_utils=checks)


def test_never_more_than_a_few_megabytes_of_logits():
    """A 200x320 map with K = 13 has 43 MB of them a head: no tensor that either path makes comes near that."""
    shapes = (1, 1, 16, 200, 320), (1, 1, 16, 169), (169,), (1, 625), (1, 1, 1, 16, 200, 320)
    logits = 200 * 320 * 169

    def largest(device, run):
        query, projected, bias, rpb, value = (torch.randn(shape, device=device) for shape in shapes)
        with _LargestTensor() as seen:
            out, statistics = run.contmix(query, projected, bias, rpb, value, [13])
            run.contmix_backward(out, query, projected, bias, rpb, value, out, statistics, [13])
        return seen.elements

    with record_launches():  # sizes are all that is asked for
        assert largest("meta", triton_kernels) <= logits / 8
    assert largest("cpu", eager) <= logits / 4  # the values of overlapping tiles, more than twice the map


def test_one_launch_for_all_kernel_sizes():
    """Or one for each number of warps and stages that their configs ask for; the same numbers."""
    query, key, value, proj_weight, bias, *tables = (tensor.float() for tensor in _inputs(kernel_sizes=(3, 5, 7)))
    tables_side_by_side = torch.cat([table.flatten(1) for table in tables], 1)
    inputs = triton_forward.Inputs(query, key @ proj_weight.t(), bias, tables_side_by_side, value)
    results = []
    for configs, launches in ((None, 1), ({0: Config(16, 16), 1: Config(32, 16, 8), 2: Config(64, 16, 8)}, 2)):
        out, statistics = eager.empty_outputs(value)
        arguments = inputs, out.fill_(torch.nan), statistics.fill_(torch.nan), [3, 5, 7], configs
        with record_launches() as recorded:
            triton_forward.forward(*arguments)
        assert len(recorded) == launches
        triton_forward.forward(*arguments)
        results.append((out, statistics))
    for first, second in zip(*results, strict=True):
        assert_close(first, second.double(), FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradcheck(backend):
    tensors = _inputs(groups=1, query_channels=2, context=3, value_channels=1, size=(3, 4), kernel_sizes=(3,))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *t: _contmix(kernels, t, (3,)), tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_no_affinity_means_a_static_kernel(backend):
    """Independent of the reference: with a zero query the kernels are softmax(bias), the same at every pixel."""
    query, key, value, proj_weight, proj_bias, rpb = _inputs(kernel_sizes=(3,))
    kernel = proj_bias.softmax(0).expand(1, 2, 8, 7, 9)
    expected = kernels.reference.na2d_av(kernel, value[:, 0].movedim(2, -1), 3).movedim(-1, 2)
    with kernels.use_backend(backend):
        out = kernels.contmix2d(0 * query, key, value, proj_weight, proj_bias, [0 * rpb], kernel_sizes=(3,))
    torch.testing.assert_close(out[:, 0], expected)


def test_empty_batch():
    tensors = [t.requires_grad_() for t in _inputs(batch=0)]
    out = _contmix(kernels, tensors, (3, 5))
    out.sum().backward()
    assert out.shape == tensors[2].shape
    assert all(t.grad is not None and not t.grad.isnan().any() for t in tensors)
