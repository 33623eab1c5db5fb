"""Facts about clamped windows that hold whatever their definitions say; those of the other operators' definitions
follow from ``tests/models/test_layers.py``, which computes their layers by unfolding."""

import pytest
import torch

import kernels
from kernels import reference
from tests.support import DEVICE, GRADIENT_TOLERANCE, assert_close, random_tensor


def test_every_output_has_all_its_neighbours():
    """Uniform weights over constant values give the constant, at the border too."""
    value, attn = torch.ones(1, 1, 6, 7, 2), torch.full((1, 1, 6, 7, 25), 1 / 25)
    torch.testing.assert_close(reference.na2d_av(attn, value, 5), value)


def test_no_affinity_means_a_static_kernel():
    """With a zero query the kernels are softmax(bias), the same at every pixel."""
    shapes = (1, 2, 3, 8, 7), (1, 2, 3, 6), (1, 1, 2, 5, 8, 7), (9, 6), (9,), (2, 5, 5)
    query, key, value, weight, bias, table = (random_tensor(*shape, dtype=torch.float64) for shape in shapes)
    kernel = bias.softmax(0).expand(1, 2, 8, 7, 9)
    expected = reference.na2d_av(kernel, value[:, 0].movedim(2, -1), 3).movedim(-1, 2)
    out = reference.contmix2d(0 * query, key, value, weight, bias, [0 * table], kernel_sizes=(3,))
    torch.testing.assert_close(out[:, 0], expected)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_a_position_bias_sums_in_float32(backend):
    """The gradient of a table's entry sums over the pixels of a map; in bfloat16 a sum of ones would stop at 256."""
    query = torch.ones(1, 1, 28, 28, 1, dtype=torch.bfloat16, device=DEVICE)
    rpb = torch.zeros(1, 5, 5, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with kernels.use_backend(backend):
        kernels.na2d_qk(query, query, 3, rpb=rpb).sum().backward()
    exact = torch.zeros(1, 5, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    reference.na2d_qk(query.double(), query.double(), 3, rpb=exact).sum().backward()
    assert rpb.grad is not None
    assert exact.grad is not None
    assert_close(rpb.grad, exact.grad, GRADIENT_TOLERANCE[torch.bfloat16])
