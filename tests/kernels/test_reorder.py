"""How maps lie in memory: copies between channels first and channels last; rows far apart."""

import pytest
import torch

import kernels
from kernels.reorder import in_channels_last, in_order_of
from tests.support import random_tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 9), (1, 2, 72, 7, 8), (2, 2, 3, 4, 1, 6), (1, 1, 4, 4), (0, 2, 3, 4, 4)])
def test_the_order_changes_and_nothing_else(shape, dtype):
    maps = random_tensor(*shape, dtype=dtype)
    last = in_channels_last(maps)
    assert torch.equal(last, maps)
    assert last.movedim((-2, -1), (1, 2)).is_contiguous()
    back = in_order_of(maps, last)
    assert torch.equal(back, maps)
    assert back.is_contiguous()


def test_what_is_in_order_is_not_copied():
    last = random_tensor(2, 4, 5, 3).permute(0, 3, 1, 2)
    assert in_channels_last(last) is last
    groups = last.unflatten(1, (3, 1))
    assert in_channels_last(groups) is groups
    expanded = random_tensor(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert torch.equal(in_channels_last(expanded), expanded)


def test_rows_far_apart():
    """A row stride near 2^31, as that of a crop of a huge map: outlook attention."""
    values = random_tensor(3 * 4)
    logits, far = random_tensor(1, 1, 4, 1, 9, 9), values.as_strided((1, 1, 4, 3), (0, 2**31 - 8, 3, 1))
    with kernels.use_backend("triton"):
        expected = kernels.outlook_attention2d(logits, far.contiguous())
        assert torch.equal(kernels.outlook_attention2d(logits, far), expected)
