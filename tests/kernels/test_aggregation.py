"""The Triton algebra beyond the rules for every operator."""

import pytest
import torch

import kernels
from kernels.aggregation import eager, rows
from kernels.aggregation.tiles import in_pairs
from kernels.launch import fits_int32, record_launches
from kernels.windows import Window
from tests.support import DEVICE, FORWARD_TOLERANCE, assert_close, random_tensor


@pytest.mark.parametrize(("channels", "first", "pairs"), [(6, 0, True), (16, 2, True), (6, 1, False), (5, 0, False)])
def test_channels_in_pairs(channels, first, pairs):
    """Two bfloat16 channels are read as one integer where both lie at a multiple of 4 bytes, and only there."""
    groups, window = 3, Window((3, 3), padding=(1, 1))

    def maps(*shape):
        number = groups * shape[0]
        wide = torch.full((2, number + 4, 5, 7), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        part = wide.to(memory_format=torch.channels_last)[:, first : first + number]
        return part.copy_(random_tensor(*part.shape)).unflatten(1, (groups, *shape))

    x, g, weight = maps(channels), maps(channels), maps(9).unflatten(2, (3, 3))
    assert in_pairs(x, g) == pairs
    for name, *tensors in (("aggregate", weight, x), ("transpose", weight, g), ("correlate", g, x)):
        options = ((5, 7), window) if name == "transpose" else (window,)
        expected = getattr(eager, name)(*(tensor.double() for tensor in tensors), *options)
        assert_close(getattr(rows, name)(*tensors, *options), expected, FORWARD_TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("features", [17, 40, 48, 136])
def test_features_fill_their_blocks(features):
    """Of a block that is partly empty each number is masked, which takes kilobytes of a thread's stack."""
    x, seen = (random_tensor(1, number, 5, 6).requires_grad_() for number in (2, features))
    weight, bias = random_tensor(9, features).requires_grad_(), random_tensor(9)

    def run(run_on, *inputs):
        out = run_on.involution2d_generate(*inputs, bias.to(inputs[0].dtype), kernel_size=3, groups=1)
        return out, *torch.autograd.grad(out.sum(), inputs)

    with kernels.use_backend("triton"):
        with record_launches() as launches:
            run(kernels, x, seen, weight)
        found = run(kernels, x, seen, weight)
    generated = [launch.arguments for launch in launches if launch.arguments.get("FEATURES")]
    assert [arguments["FEATURES"] % arguments["BLOCK_FEATURES"] for arguments in generated] == [0, 0]
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, seen, weight)]
    assert_close(found, run(kernels.reference, *inputs), 10 * FORWARD_TOLERANCE[torch.float32])


def test_offsets_are_64_bit_where_32_would_overflow():
    assert fits_int32(torch.empty(2, 1, 3, 4, 4, device="meta"))
    # 2^31 elements inside one batch entry and group; many entries of a smaller map need no wide offsets.
    assert not fits_int32(torch.empty(1, 1, 2, 2**15, 2**15 + 1, device="meta"))
    assert fits_int32(torch.empty(2**20, 1, 8, 2**7, 2**7, device="meta"))
    huge = torch.empty(1, 1, 2, 2**15, 2**15 + 1, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(1, 2, 1, 1, *huge.shape[3:], device="meta", dtype=torch.bfloat16)
    with record_launches() as launches:
        rows.aggregate(weight, huge.transpose(1, 2), Window((1, 1)))
    assert str(launches[0].arguments["OFFSET"]) == "int64"
