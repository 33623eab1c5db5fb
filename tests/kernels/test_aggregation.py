"""The Triton algebra, config by config: what the operators' own tests reach only through the heuristic."""

import itertools

import pytest
import torch

from kernels import dtypes
from kernels.aggregation import configs, gather, rows
from kernels.aggregation.configs import GATHERS, Gather, GatherProblem, gather_heuristic
from kernels.launch import fits_int32, next_power_of_2, record_launches
from kernels.windows import Window
from kernels.windows_triton import inverse_steps
from tests.support import DEVICE, FORWARD_TOLERANCE, assert_close, random_tensor

WINDOWS = {"zero-padded": Window((3, 3), padding=(1, 1)), "clamped": Window.neighborhood((3, 3))}


def _dense(weight, window, height, width):
    """weight as the matrix [B, G, H'·W', H·W] it stands for: an oracle that shares nothing with the kernels."""
    batch, groups, kernel_h, kernel_w, out_h, out_w = weight.shape
    matrix = torch.zeros(batch, groups, out_h * out_w, height * width, dtype=torch.float64)
    rows, columns = window.neighbours(height, 0), window.neighbours(width, 1)
    for i, j, a, b in itertools.product(range(out_h), range(out_w), range(kernel_h), range(kernel_w)):
        row, column = int(rows[i, a]), int(columns[j, b])
        if 0 <= row < height and 0 <= column < width:
            matrix[:, :, i * out_w + j, row * width + column] += weight[:, :, a, b, i, j].cpu().double()
    return matrix


def _last(tensor):
    """[B, G, ..., H, W] with everything but the pixels innermost in memory."""
    return tensor.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))


# In the interpreter every config is a minute of one core; warps and stages only schedule the same blocks there, so
# one config of each tile is enough.
TILES = {(c.block_pixels, c.block_channels, c.block_steps): c for c in GATHERS}


@pytest.mark.parametrize("rule", WINDOWS)
def test_every_config(rule):
    window, height, width, channels = WINDOWS[rule], 4, 5, 9
    weight, x = random_tensor(1, 1, 3, 3, height, width), random_tensor(1, 1, channels, height, width)
    matrix = _dense(weight, window, height, width)
    flat = x.double().cpu().flatten(3)
    aggregated = (flat @ matrix.transpose(2, 3)).view(x.shape)
    transposed = (flat @ matrix).view(x.shape)
    expected_inner = (x.double().cpu() * aggregated).sum()
    for config in TILES.values() if DEVICE == "cpu" else GATHERS:
        out = gather.gather_aggregate(weight, x, window, config=config)
        assert_close(out, aggregated, FORWARD_TOLERANCE[x.dtype], str(config))
        out = gather.gather_transpose(weight, x, (height, width), window, config=config)
        assert_close(out, transposed, FORWARD_TOLERANCE[x.dtype], str(config))
        # correlate is the adjoint of aggregate in the weight: <correlate(g, x), w> = <g, aggregate(w, x)>.
        correlated = gather.gather_correlate(x, x, window, config=config).double().cpu()
        inner = (correlated * weight.double().cpu()).sum()
        assert abs(inner - expected_inner) <= 1e-5 * flat.norm() * aggregated.norm(), config


@pytest.mark.parametrize("module", [rows, gather], ids=["rows", "blocks"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
def test_stride_dilation_and_shrinking_map(module, channels_last):
    window = Window((3, 2), stride=(2, 3), padding=(2, 0), dilation=(2, 1))
    height, width = window.output_size(9, 11)
    weight, x = random_tensor(2, 2, 3, 2, height, width), random_tensor(2, 2, 3, 9, 11)
    matrix = _dense(weight, window, 9, 11)
    g = random_tensor(2, 2, 3, height, width)
    if channels_last:  # and kernels, so that columns slide and not rows
        x, g, weight = _last(x), _last(g), _last(weight)
    expected = (x.double().cpu().flatten(3) @ matrix.transpose(2, 3)).view(g.shape)
    assert_close(module.aggregate(weight, x, window), expected, FORWARD_TOLERANCE[x.dtype])
    expected = (g.double().cpu().flatten(3) @ matrix).view(x.shape)
    assert_close(module.transpose(weight, g, (9, 11), window), expected, FORWARD_TOLERANCE[x.dtype])
    wide = weight.double().cpu().requires_grad_()
    torch.autograd.backward(
        (_dense(wide, window, 9, 11) @ x.double().cpu().flatten(3).mT).mT, g.double().cpu().flatten(3)
    )
    assert wide.grad is not None
    assert_close(module.correlate(g, x, window), wide.grad, FORWARD_TOLERANCE[x.dtype])


def test_every_rows_config():
    """Even window and odd stride, more columns and channels than a tile; once for each tile, as above."""
    window = Window((4, 3), stride=(1, 2), padding=(2, 1))
    height, width = window.output_size(9, 5)
    weight, x, g = (
        random_tensor(1, 2, 4, 3, height, width),
        random_tensor(1, 2, 5, 9, 5),
        random_tensor(1, 2, 5, height, width),
    )
    matrix = _dense(weight, window, 9, 5)
    aggregated = (x.double().cpu().flatten(3) @ matrix.mT).view(g.shape)
    transposed = (g.double().cpu().flatten(3) @ matrix).view(x.shape)
    inner = (g.double().cpu() * aggregated).sum()
    tiles = {(c.rows, c.columns, c.channels): c for c in configs.CONFIGS}
    for config in tiles.values() if DEVICE == "cpu" else configs.CONFIGS:
        assert_close(
            rows.aggregate(weight, x, window, config=config), aggregated, FORWARD_TOLERANCE[x.dtype], str(config)
        )
        out = rows.transpose(weight, g, (9, 5), window, config=config)
        assert_close(out, transposed, FORWARD_TOLERANCE[x.dtype], str(config))
        for padded in (False, True):
            out = rows.correlate(g, x, window, padded=padded, config=config).double().cpu()
            assert abs((out * weight.double().cpu()).sum() - inner) <= 1e-5 * x.norm().cpu() * aggregated.norm(), config


def test_rows_pad_their_kernels_with_zeros():
    window = Window((3, 3), padding=(1, 1))
    x = random_tensor(1, 2, 3, 5, 4)
    out = rows.correlate(x, x, window, padded=True)
    assert out.shape == (1, 2, 4, 3, 5, 4)
    assert out.permute(0, 4, 5, 3, 1, 2).is_contiguous()
    assert torch.equal(out[:, :, :3], rows.correlate(x, x, window))
    assert not out[:, :, 3].any()


def test_inverse_steps_reach_every_output():
    """The bound of the inverse rule, against the windows themselves, wherever a clamped window fits."""
    for length, dilation, kernel_size in itertools.product(range(1, 32), (1, 2, 3), (1, 3, 5, 9)):
        if kernel_size * dilation > length:
            continue
        window = Window.neighborhood((kernel_size, 1), (dilation, 1))
        reaches = [[i // dilation for i in (window.neighbours(length, 0) == p).any(1).nonzero()] for p in range(length)]
        for position, members in enumerate(reaches):
            member = position // dilation
            first = 0 if member < kernel_size else member - kernel_size // 2
            assert first <= min(members)
            assert max(members) - first < inverse_steps(window, length, 0), (length, dilation, kernel_size)


def test_heuristic_is_a_valid_config(monkeypatch):
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    for sizes in itertools.product((1, 10, 14, 16, 64, 200), (1, 49, 196, 3136), (1, 9, 49, 169), (False, True)):
        problem = GatherProblem(*sizes)
        assert gather_heuristic.__wrapped__(problem).valid(problem), problem


def test_rows_heuristic_is_a_valid_config(monkeypatch):
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    for channels, groups, length, taps, multiple, last in itertools.product(
        (1, 5, 16, 100), (1, 4, 32), (1, 7, 56), (1, 3, 7, 16), (1, 3, 4), (False, True)
    ):
        problem = configs.Problem(
            channels, groups, length**2, length, taps, multiple, multiple > 1, 0, last, last, torch.bfloat16
        )
        for choose in (configs.heuristic, configs.correlate_heuristic):
            config = choose.__wrapped__(problem)
            assert config.valid(problem), problem
            assert next_power_of_2(config.rows) * next_power_of_2(taps) <= 64


def test_a_config_that_cannot_pay_is_invalid():
    problem = GatherProblem(channels=16, pixels=49, steps=49, kernel_fastest=True)
    assert Gather(64, 16, 1).valid(problem)
    assert not Gather(128, 16, 1).valid(problem)  # twice the map
    assert not Gather(64, 32, 1).valid(problem)  # twice the channels
    assert not Gather(64, 16, 16, num_warps=2).valid(problem)  # 256 elements per thread


def test_offsets_are_64_bit_where_32_would_overflow():
    assert fits_int32(torch.empty(2, 1, 3, 4, 4, device="meta"))
    # 2^31 elements inside one batch entry and group; many entries of a smaller map need no wide offsets.
    assert not fits_int32(torch.empty(1, 1, 2, 2**15, 2**15 + 1, device="meta"))
    assert fits_int32(torch.empty(2**20, 1, 8, 2**7, 2**7, device="meta"))
    huge = torch.empty(1, 1, 2, 2**15, 2**15 + 1, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(1, 1, 1, 1, *huge.shape[3:], device="meta", dtype=torch.bfloat16)
    with record_launches() as launches:
        gather.gather_aggregate(weight, huge, Window((1, 1)))
    assert str(launches[0].arguments["OFFSET"]) == "int64"


def test_wide_offsets_compute_the_same(monkeypatch):
    window, weight, x = WINDOWS["clamped"], random_tensor(1, 2, 3, 3, 5, 4), random_tensor(1, 2, 3, 5, 4)
    narrow = gather.gather_aggregate(weight, x, window), gather.gather_correlate(x, x, window)
    monkeypatch.setattr(dtypes, "fits_int32", lambda *tensors: False)
    wide = gather.gather_aggregate(weight, x, window), gather.gather_correlate(x, x, window)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])
