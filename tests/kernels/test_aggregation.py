"""The Triton algebra beyond the rules for every operator."""

import pytest
import torch

import kernels
from kernels.aggregation import correlate, eager, rows
from kernels.aggregation.configs import problem_of
from kernels.aggregation.tiles import in_pairs
from kernels.launch import fits_int32, record_launches
from kernels.reorder import in_channels_last, in_order_of
from kernels.windows import Window
from tests.kernels.operators import OPERATOR
from tests.kernels.operators import generated as case_of
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


@pytest.mark.parametrize(
    ("size", "kernel_size", "padding", "channels", "dtype"),
    [
        ((17, 5), (7, 7), (3, 3), 16, torch.bfloat16),
        ((7, 4), (3, 5), (0, 4), 32, torch.float16),
        ((9, 2), (6, 2), (5, 0), 16, torch.bfloat16),
        ((3, 2), (1, 1), (0, 0), 16, torch.float16),
    ],
)
def test_small_windows_are_products(size, kernel_size, padding, channels, dtype, monkeypatch):
    """Of 16-bit numbers; a NaN reaches the taps that it is in and no others, and wide offsets change no bit."""
    window = Window(kernel_size, padding=padding)

    def maps(*size):
        wide = random_tensor(2, 4 * channels + 16, *size).to(dtype).contiguous(memory_format=torch.channels_last)
        return wide[:, 16:].unflatten(1, (4, channels))

    x, g = maps(*size), maps(*window.output_size(*size))
    with watching() as launched:
        out = rows.correlate(g, x, window)
    assert [made.kernel.__name__ for made in launched] == ["_bands_kernel"]
    assert_close(out, eager.correlate(g.double(), x.double(), window), FORWARD_TOLERANCE[dtype])
    for alike in (g[..., :1], g[..., :1, :], g[..., :1, :1]):  # as in the gradient of a sum over pixels
        alike = alike.expand_as(g)
        expected = eager.correlate(alike.double(), x.double(), window)
        assert_close(rows.correlate(alike, x, window), expected, FORWARD_TOLERANCE[dtype])
    monkeypatch.setattr("kernels.dtypes.fits_int32", lambda *_: False)
    assert torch.equal(rows.correlate(g, x.clone(), window), out)
    x[0, 1, 2, size[0] // 2, size[1] // 2] = float("nan")
    found, expected = rows.correlate(g, x, window), eager.correlate(g.double(), x.double(), window)
    assert found.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())


def test_padding_of_taps_is_in_what_a_launch_is_given():
    """It is written, too: who records launches sees every byte."""
    x = torch.empty(2, 7, 6, 4, 16, device="meta", dtype=torch.bfloat16).permute(0, 3, 4, 1, 2)
    with record_launches() as launches:
        out = correlate.correlate(x, x, Window((7, 5), padding=(3, 2)), padded=True)
    (made,) = launches
    assert made.arguments["out"].ptr.shape == out.shape == (2, 4, 8, 5, 7, 6)


@pytest.mark.parametrize("features", [17, 40, 48, 136])
def test_features_fill_their_blocks(features):
    """Of a block that is partly empty each number is masked, which takes kilobytes of a thread's stack."""
    row = OPERATOR["involution2d_generate"].at(case_of((5, 6), 2, 1, 3, features))
    with watching() as launched:
        check(row, row.tensors(), "triton")
    generated = [made.arguments for made in launched if made.arguments.get("FEATURES")]
    assert [arguments["FEATURES"] % arguments["BLOCK_FEATURES"] for arguments in generated] == [0, 0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3, 2), (4, 4)])
def test_phases_of_a_stride(dilation, last):
    """Its launches read the dynamic kernel in the order in which it lies in memory; the config is one for the most taps
    that they have along the rows or columns that slide."""
    window = Window((5, 4), (2, 4), (3, 2), dilation)
    weight, g = torch.empty(2, 3, 5, 4, 3, 2, device="meta"), torch.empty(2, 3, 8, 3, 2, device="meta")
    if last:
        weight = weight.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
        g = g.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    with record_launches() as launches:
        rows.transpose(weight, g, (9, 10), window)
    assert {made.arguments["WEIGHT_LANES"] for made in launches} == {not last}
    problem = problem_of(g, (9, 10), window, kernel=weight, transposed=True)
    assert problem.rows == (3 if last else 5)
    assert problem.taps == max(made.arguments["WINDOW"].kernel_size[0] for made in launches)


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


# ---- how maps lie in memory


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
