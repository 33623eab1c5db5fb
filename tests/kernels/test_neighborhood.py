"""na2d_av, na2d_qk and na2d_softmax_av against their float64 definitions, on every backend."""

import pytest
import torch

import kernels
from tests.support import DEVICE, FORWARD_TOLERANCE, assert_close, check_operator, random_tensor

# (batch, heads, height, width, channels, kernel size, dilation). At 14x14 with K = 13 nearly every window is clamped,
# at 7x7 with K = 7 all outputs share one; 13x10 with dilation 3 has residue classes of different sizes.
SHAPES = {
    "border": (1, 2, 14, 14, 3, 13, 1),
    "one window": (2, 1, 7, 7, 4, 7, 1),
    "interior": (1, 2, 12, 9, 5, 3, 1),
    "dilated": (1, 1, 13, 10, 3, 3, 3),
    "per axis": (1, 1, 9, 8, 2, (3, 5), (2, 1)),
}


def _tensors(shape):
    batch, heads, height, width, channels, kernel_size, dilation = SHAPES[shape]
    rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    feature = random_tensor(batch, heads, height, width, channels, dtype=torch.float64)
    kernel = random_tensor(batch, heads, height, width, rows * columns, dtype=torch.float64)
    rpb = random_tensor(heads, 2 * rows - 1, 2 * columns - 1, dtype=torch.float64)
    return feature, kernel, rpb, {"kernel_size": kernel_size, "dilation": dilation}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_av_matches_definition(shape, backend):
    value, attn, _, options = _tensors(shape)
    check_operator("na2d_av", {"attn": attn, "value": value}, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_matches_definition(shape, backend):
    query, _, rpb, options = _tensors(shape)
    inputs = {"query": query, "key": torch.randn_like(query)}
    check_operator("na2d_qk", inputs | ({} if shape == "border" else {"rpb": rpb}), backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_av_matches_definition(shape, backend):
    value, logits, rpb, options = _tensors(shape)
    inputs = {"logits": 4 * logits, "value": value, "rpb": rpb}
    check_operator("na2d_softmax_av", inputs, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, backend):
    value, logits, rpb, options = _tensors("interior")
    check_operator("na2d_av", {"attn": logits, "value": value}, backend=backend, dtype=dtype, **options)
    inputs = {"logits": logits, "value": value, "rpb": rpb}
    check_operator("na2d_softmax_av", inputs, backend=backend, dtype=dtype, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_strided_inputs_and_no_bias(backend):
    value, logits, _, options = _tensors("interior")
    channels_first = value.movedim(-1, 2).contiguous().movedim(2, -1)
    every_other = torch.stack([logits, logits], -1)[..., 0]
    check_operator("na2d_softmax_av", {"logits": every_other, "value": channels_first}, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_softmax_survives_huge_and_masked_logits(backend):
    value = random_tensor(1, 1, 5, 5, 2)
    logits = 1e4 * random_tensor(1, 1, 5, 5, 9)
    logits[..., :4] = float("-inf")  # a caller's mask: those neighbours get no weight, and nothing becomes NaN
    with kernels.use_backend(backend):
        out = kernels.na2d_softmax_av(logits, value, 3)
    expected = kernels.reference.na2d_softmax_av(logits.double(), value.double(), 3)
    assert_close(out, expected, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_every_output_has_all_its_neighbours(backend):
    """Independent of the reference: uniform weights over constant values give the constant, at the border too."""
    value = torch.ones(1, 1, 6, 7, 2, device=DEVICE)
    attn = torch.full((1, 1, 6, 7, 25), 1 / 25, device=DEVICE)
    with kernels.use_backend(backend):
        torch.testing.assert_close(kernels.na2d_av(attn, value, 5), value)
