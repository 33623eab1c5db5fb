"""outlook_attention2d beyond the rules for every operator: which windows a value reaches, far rows, huge maps."""

import itertools

import pytest
import torch

import kernels
from tests.support import DEVICE, random_tensor


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 2, 1), (3, 1, 0), (3, 2, 3), (4, 2, 1)])
def test_a_value_that_is_not_finite_reaches_only_its_windows(kernel_size, stride, padding, backend):
    height, width, heads = 5, 6, 2
    windows = -(-height // stride), -(-width // stride)
    logits = random_tensor(1, *windows, heads, kernel_size**2, kernel_size**2).expand(height * width, *[-1] * 5)
    value = random_tensor(1, height, width, heads * 3).repeat(height * width, 1, 1, 1)
    expected = torch.zeros(height, width, height, width, dtype=torch.bool)
    for row, column in itertools.product(range(height), range(width)):
        value[row * width + column, row, column, 4] = float("nan")  # another pixel in each batch entry
        for a, b in itertools.product(*map(range, windows)):
            top, left = a * stride - padding, b * stride - padding
            if top <= row < top + kernel_size and left <= column < left + kernel_size:
                rows, columns = (slice(max(first, 0), max(first + kernel_size, 0)) for first in (top, left))
                expected[row, column, rows, columns] = True
    with kernels.use_backend(backend):
        out = kernels.outlook_attention2d(logits, value, kernel_size=kernel_size, stride=stride, padding=padding).cpu()
    assert torch.equal(out[..., 4].isnan(), expected.flatten(0, 1))
    assert not out[..., [0, 1, 2, 3, 5]].isnan().any()


def test_rows_far_apart_and_maps_beyond_32_bits():
    """A row stride near 2^31, as of a crop of a huge map, and more rows than a kernel can count."""
    values = random_tensor(3 * 4)
    logits, far = random_tensor(1, 1, 4, 1, 9, 9), values.as_strided((1, 1, 4, 3), (0, 2**31 - 8, 3, 1))
    with kernels.use_backend("triton"):
        expected = kernels.outlook_attention2d(logits, far.contiguous())
        assert torch.equal(kernels.outlook_attention2d(logits, far), expected)
        huge = torch.empty(1, device=DEVICE).expand(1, 2**31, 1, 1)
        with pytest.raises(ValueError, match=r"2\^31|too large"):
            kernels.outlook_attention2d(huge.view(1, 2**31, 1, 1, 1, 1), huge, kernel_size=1, padding=0)
