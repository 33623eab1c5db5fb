"""outlook_attention2d beyond the rules for every operator: rows that lie far apart in memory."""

import torch

import kernels
from tests.support import random_tensor


def test_rows_far_apart():
    """A row stride near 2^31, as that of a crop of a huge map."""
    values = random_tensor(3 * 4)
    logits, far = random_tensor(1, 1, 4, 1, 9, 9), values.as_strided((1, 1, 4, 3), (0, 2**31 - 8, 3, 1))
    with kernels.use_backend("triton"):
        expected = kernels.outlook_attention2d(logits, far.contiguous())
        assert torch.equal(kernels.outlook_attention2d(logits, far), expected)
