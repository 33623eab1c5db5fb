"""The Triton algebra beyond the rules for every operator."""

from typing import Any

import pytest
import torch

from kernels.aggregation import eager, rows
from kernels.aggregation.tiles import in_pairs
from kernels.launch import fits_int32, record_launches
from kernels.windows import Window
from tests.kernels.operators import OPERATORS, generated
from tests.kernels.rules import check
from tests.support import DEVICE, FORWARD_TOLERANCE, assert_close, random_tensor, watching


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
    row = next(operator for operator in OPERATORS if operator.name == "involution2d_generate")
    row = row.at(generated((5, 6), 2, 1, 3, features))
    with watching(lambda launch, _: launches.append(launch.arguments)):
        launches: list[dict[str, Any]] = []
        check(row, row.tensors(), "triton")
    blocks = [made["FEATURES"] % made["BLOCK_FEATURES"] for made in launches if made.get("FEATURES")]
    assert blocks == [0, 0]


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
