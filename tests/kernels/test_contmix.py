"""contmix2d against its float64 definition, on every backend."""

import itertools

import pytest
import torch

import kernels
from kernels.contmix import chunked, triton_kernels
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


NAMES = ("query", "key", "value", "proj_weight", "proj_bias", "rpb[0]", "rpb[1]", "rpb[2]")


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    ("size", "kernel_sizes", "dtype"),
    [
        ((8, 7), (3, 5), torch.float32),
        ((7, 7), (5, 7), torch.float32),  # one window for every pixel
        ((6, 9), (3,), torch.float64),
        ((9, 8), (3, 5, 7), torch.float32),
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


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_forward(dtype, backend):
    tensors = [tensor.to(dtype) for tensor in _inputs(size=(7, 8), kernel_sizes=(3, 7))]
    expected = _contmix(kernels.reference, [tensor.double() for tensor in tensors], (3, 7))
    with kernels.use_backend(backend):
        out = _contmix(kernels, tensors, (3, 7))
    # The projected keys are rounded once more than the definition rounds anything.
    assert_close(out, expected, 2 * FORWARD_TOLERANCE[dtype])


def test_every_config():
    """Both formulations, with blocks smaller and larger than the map and the window."""
    tensors = [tensor.float() for tensor in _inputs(size=(6, 5), kernel_sizes=(3, 5))]
    expected = _contmix(kernels.reference, [tensor.double() for tensor in tensors], (3, 5))
    query, key, value, proj_weight, proj_bias, *tables = tensors
    projected = (key @ proj_weight.t()).split([9, 25], 3)
    biases = proj_bias.split([9, 25])
    assert [triton_kernels.shares_windows(6, 5, size) for size in (3, 5)] == [False, False]
    tiles = {(c.block_pixels, c.block_steps): c for c in triton_kernels.CONFIGS}
    for config, m in itertools.product(tiles.values() if DEVICE == "cpu" else triton_kernels.CONFIGS, (0, 1)):
        for threshold in (16, 0):  # 0: every window counts as shared
            out = torch.empty_like(value[:, m])
            statistics = torch.empty(1, 2, 6, 5, device=DEVICE)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_kernels, "OUTPUTS_PER_WINDOW", threshold)
                arguments = query, projected[m], biases[m], tables[m], value[:, m], out, statistics
                triton_kernels.contmix_one_size(*arguments, config)
            assert_close(out, expected[:, m], 2 * FORWARD_TOLERANCE[torch.float32], f"{config}, {threshold}")
            assert not statistics.isnan().any()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_steps_do_not_change_the_result(backend, monkeypatch):
    """One group of one image at a time, and everything at once."""
    results = []
    for budget in (1, 2**30):
        monkeypatch.setattr(chunked, "STEP_BYTES", {"cpu": budget, "cuda": budget})
        torch.manual_seed(1)
        tensors = [tensor.requires_grad_() for tensor in _inputs(batch=2)]
        with kernels.use_backend(backend):
            out = _contmix(kernels, tensors, (3, 5))
            results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for stepwise, whole in zip(*results, strict=True):
        torch.testing.assert_close(stepwise, whole)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_gradcheck(backend):
    tensors = _inputs(groups=1, query_channels=2, context=3, value_channels=1, size=(3, 4), kernel_sizes=(1, 3))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with kernels.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *t: _contmix(kernels, t, (1, 3)), tensors, fast_mode=True)


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
