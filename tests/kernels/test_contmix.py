"""contmix2d against its float64 definition, on every backend."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.contmix import backward_own, configs, eager, passes
from kernels.contmix.backward_own import grad_logits_own, rows_of
from kernels.contmix.backward_shared import Targets, grad_inputs_shared, grad_tables_shared
from kernels.contmix.configs import Inputs, Saved
from kernels.contmix.forward_own import forward_own
from kernels.contmix.forward_shared import forward_shared
from kernels.launch import record_launches
from tests.support import DEVICE, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, random_tensor, relative_error


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


NAMES = ("query", "key", "value", "proj_weight", "proj_bias", "rpb[0]", "rpb[1]", "rpb[2]")


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    ("size", "kernel_sizes", "dtype"),
    [
        ((8, 7), (3, 5), torch.float32),
        ((7, 7), (5, 7), torch.float32),  # one window for every pixel
        ((6, 9), (1, 3), torch.float64),
        ((9, 8), (3, 5, 7), torch.float32),
        ((5, 37), (5,), torch.float32),  # three tiles of inputs side by side, windows clamped in the first and the last
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


@pytest.mark.parametrize(("threshold", "size"), [(0, 19), (10**6, 11)])
def test_windows_of_many_blocks(threshold, size, monkeypatch):
    """Six blocks of a shared window's positions, two tiles of its outputs; as own windows one row after the other."""
    monkeypatch.setattr(configs, "OUTPUTS_PER_WINDOW", threshold)
    ours = [
        tensor.float().requires_grad_() for tensor in _inputs(groups=1, size=(size, size + 1), kernel_sizes=(size,))
    ]
    results = {}
    for backend in ("eager", "triton"):
        with kernels.use_backend(backend):
            out = _contmix(kernels, ours, (size,))
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


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("norm", "kernel_sizes", "context"), [(1.0, (1, 5), 1), (30.0, (3, 7), 1), (1e3, (1, 7), 6)])
def test_rounding_is_no_more_than_the_definitions_own(norm, kernel_sizes, context, dtype, backend):
    """At large logits 16-bit inputs give what they give in float64, as nearly as the definition does in 16 bits."""
    exact = _inputs(size=(7, 8), context=context, kernel_sizes=kernel_sizes)
    exact[0], exact[1] = exact[0] * (norm / exact[0].norm()), exact[1] * (norm / exact[1].norm())
    ours = [tensor.to(dtype) for tensor in exact]
    expected = _contmix(kernels.reference, [tensor.double() for tensor in ours], kernel_sizes)
    naive = relative_error(_contmix(kernels.reference, ours, kernel_sizes), expected)
    with kernels.use_backend(backend):
        assert_close(_contmix(kernels, ours, kernel_sizes), expected, max(FORWARD_TOLERANCE[dtype], naive))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_that_fill_a_tile_are_finite(dtype):
    """Logits of -100 and below everywhere: a filler output, whose softmax is none, must not overflow."""
    tensors = [torch.ones(1, 1, 1, 4, 4), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 4, 4)]
    tensors += [torch.full((9, 1), -100.0), torch.zeros(9), torch.zeros(1, 5, 5)]
    ours = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]
    for threshold in (0, 10**6):
        with pytest.MonkeyPatch.context() as patch, kernels.use_backend("triton"):
            patch.setattr(configs, "OUTPUTS_PER_WINDOW", threshold)
            out = _contmix(kernels, ours, (3,))
            grads = torch.autograd.grad(1000 * out.sum(), ours)
        assert_close(out, torch.ones_like(out).double(), FORWARD_TOLERANCE[dtype])
        for name, grad in zip(NAMES, grads, strict=False):
            assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("threshold", "bad"), [(0, math.nan), (10**6, math.nan), (10**6, math.inf)])
def test_what_a_nan_reaches(threshold, bad, backend, monkeypatch):
    """In value: the outputs whose windows hold its pixel; in grad: their inputs, and its own pixel's query."""
    monkeypatch.setattr(configs, "OUTPUTS_PER_WINDOW", threshold)
    query, key, value, *rest = (tensor.float() for tensor in _inputs(groups=2, size=(8, 13), kernel_sizes=(3,)))
    value[0, 0, 1, 2, 3, 6] = bad
    query, value = query.requires_grad_(), value.requires_grad_()
    with kernels.use_backend(backend):
        out = _contmix(kernels, [query, key, value, *rest], (3,))
        grad = torch.randn_like(out)
        grad[0, 0, 0, 1, 4, 9] = bad
        grad_query, grad_value = torch.autograd.grad(out, (query, value), grad)
    reached = torch.zeros(2, 8, 13, dtype=torch.bool)
    reached[1, 2:5, 5:8] = True
    assert out[0, 0].isfinite().logical_not().any(1).cpu().equal(reached)
    assert out[0, 0, :, 3].isfinite().all(), "channels are sums of their own"
    reached[0, 4, 9] = True
    assert grad_query[0].isfinite().logical_not().any(1).cpu().equal(reached)
    reached = torch.zeros(2, 8, 13, dtype=torch.bool)
    reached[0, 3:6, 8:11] = True
    assert grad_value[0, 0].isfinite().logical_not().any(1).cpu().equal(reached)


@pytest.mark.parametrize("config", configs.SHARED, ids=str)
def test_every_config_of_shared_windows(config):
    _check_config(config, (6, 5), 5)


@pytest.mark.parametrize("config", configs.OWN, ids=str)
def test_every_config_of_own_windows(config):
    _check_config(config, (4, 18), 3)


def _check_config(config, size, kernel_size):
    """Forward and backward, blocks smaller and larger than map, window and heads, on both sides of float64."""
    shared = isinstance(config, configs.Shared)
    query, key, value, proj_weight, bias, table = (
        tensor.float() for tensor in _inputs(batch=2, groups=3, size=size, kernel_sizes=(kernel_size,))
    )
    inputs = Inputs(query, key @ proj_weight.t(), bias, table, value[:, 0])
    query64, projected64, bias64 = (tensor.double() for tensor in inputs[:3])
    wide = query64, projected64, bias64, [table.double()], value.double()
    expected, log_sum_exp = eager.contmix(*wide, [kernel_size])
    grad = torch.randn_like(value)
    expected_grads = eager.contmix_backward(grad.double(), *wide, expected, log_sum_exp, [kernel_size])
    expected_grads = *expected_grads[:3], expected_grads[3][0], expected_grads[4]

    out, statistics = eager.empty_outputs(value)
    (forward_shared if shared else forward_own)(inputs, out[:, 0], statistics[:, 0], config=config)
    assert_close(out, expected, 2 * FORWARD_TOLERANCE[torch.float32])
    assert_close(statistics, log_sum_exp, 2 * FORWARD_TOLERANCE[torch.float32])
    saved = Saved(*inputs, grad[:, 0], out[:, 0], statistics[:, 0])
    targets = Targets(torch.empty_like(query), torch.empty_like(inputs.projected), torch.empty_like(saved.value), query)
    if shared:
        delta = torch.empty_like(statistics[:, 0])
        grad_inputs_shared(saved, targets, delta, config=config)
        grad_bias, grad_table = grad_tables_shared(saved, delta, config=config)
        found = targets.query - query, targets.projected, grad_bias, grad_table, targets.value[:, None]
    else:
        grad_logits_own(saved, targets.query, query, rows_of(saved, 0, size[0] - 1), config=config)
        found = (targets.query - query,)
    for name, ours, expected_grad in zip(
        ("query", "projected", "bias", "rpb", "value"), found, expected_grads, strict=False
    ):
        assert_close(ours, expected_grad, GRADIENT_TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("most", [1, 1500, 4000])
def test_backward_pass_in_parts(most, monkeypatch):
    """Of own windows no more is stored at a time than memory may take: rows, images, or everything."""
    monkeypatch.setattr(backward_own, "MOST_STORED", most)
    exact = [tensor.requires_grad_() for tensor in _inputs(batch=2, groups=1, size=(9, 6), kernel_sizes=(3,))]
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


def test_logits_are_never_stored_whole():
    """A 200x320 map with K = 13 and eight heads has 86 million: no tensor that either path makes comes near that."""
    shapes = (1, 8, 16, 200, 320), (1, 8, 16, 169), (169,), (8, 25, 25), (1, 1, 8, 16, 200, 320)
    logits = 8 * 200 * 320 * 169

    def largest(device, run, backward):
        query, projected, bias, rpb, value = (torch.empty(shape, device=device) for shape in shapes)
        with _LargestTensor() as seen:
            out, statistics = run.contmix(query, projected, bias, [rpb], value, [13])
            if backward:
                run.contmix_backward(out, query, projected, bias, [rpb], value, out, statistics, [13])
        return seen.elements

    with record_launches():  # sizes are all that is asked for
        assert largest("meta", passes, backward=False) == 8 * 16 * 200 * 320  # the output
        assert largest("meta", passes, backward=True) <= logits / 5


def test_eager_logits_are_never_stored_whole():
    """One head of such a map, 10.8 million logits."""
    query, value = torch.randn(1, 1, 16, 200, 320), torch.randn(1, 1, 1, 16, 200, 320)
    inputs = query, torch.randn(1, 1, 16, 169), torch.randn(169), [torch.randn(1, 25, 25)], value
    with _LargestTensor() as seen:
        out, statistics = eager.contmix(*inputs, [13])
        eager.contmix_backward(out, *inputs, out, statistics, [13])
    assert seen.elements <= 200 * 320 * 169 / 4  # the values of overlapping tiles, more than twice the map


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
