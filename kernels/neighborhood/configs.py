"""Which config each neighbourhood kernel runs with: dense products where outputs share windows, rows elsewhere."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import interpreting
from kernels.dtypes import multiplies
from kernels.launch import next_power_of_2
from kernels.views import alignment, view
from kernels.windows import Window, windows_and_most

# The least number of outputs that fill the rows of a matrix product.
OUTPUTS_PER_WINDOW = 16


def shares_windows(kernel: Tensor, window: Window, features: Tensor) -> bool:
    """Whether windows serve at least 16 outputs each on average, and ``kernel`` [B, G, Kh, Kw, H, W] has one stride
    along them and a type whose matrices may be multiplied."""
    if not window.clamped or window.dilation != (1, 1) or not multiplies(kernel.dtype):
        return False
    if min(kernel.shape[2:4]) > 1 and kernel.stride(2) != kernel.shape[3] * kernel.stride(3):
        return False
    height, width = features.shape[3:]
    return height * width >= OUTPUTS_PER_WINDOW * windows_and_most(window.kernel_size, height, width)[0]


class Weights(NamedTuple):
    """A dynamic kernel; or logits, with ``statistics``, whose softmax every launch takes for itself."""

    kernel: Tensor  # [B, G, Kh, Kw, H, W]
    rpb: Tensor | None = None  # [G, 2Kh-1, 2Kw-1], added to logits
    out: Tensor | None = None  # [B, G, C, H, W]: mix of a softmax, which fills this and the next
    statistics: Tensor | None = None  # [B, G, H, W]: log Σ_k exp

    @property
    def softmax(self) -> bool:
        return self.statistics is not None


class SharedProblem(NamedTuple):
    """What the choice of a config depends on where windows are shared."""

    channels: int
    pixels: int
    positions: int
    outputs: int  # that share a window, at most
    weighted: bool  # there are weights
    softmax: bool  # made of logits
    correlated: bool  # products of outputs and inputs are written
    dtype: torch.dtype


def shared_problem(
    features: Tensor, weights: Weights | None, window: Window, target: Tensor | None = None
) -> SharedProblem:
    _, _, channels, height, width = features.shape
    positions, most = math.prod(window.kernel_size), windows_and_most(window.kernel_size, height, width)[1]
    flags = weights is not None, weights is not None and weights.softmax, target is not None
    return SharedProblem(channels, height * width, positions, most, *flags, features.dtype)


@dataclass(frozen=True)
class SharedConfig:
    """Outputs of one window and window positions that a matrix product takes."""

    block_outputs: int
    block_steps: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: SharedProblem) -> bool:
        """At most 64 elements of the largest block per thread, and no block of more than twice what it covers."""
        widest = self.block_outputs * max(self.block_steps, 16, next_power_of_2(problem.channels))
        return (
            4 <= widest / (32 * self.num_warps) <= (64 if problem.dtype.itemsize == 2 else 32)
            and self.block_outputs < 2 * max(problem.outputs, 16)
            and self.block_steps < 2 * max(problem.positions, 16)
        )


# Not (64, 32, 8), (64, 64, 4) and (64, 64, 8): of them Triton 3.6 and 3.7 make sm_90 code of ``mix`` with 16 channels
# that gives NaN in an emulator, and an H200 lost its context over one of them.
SHARED_CONFIGS = tuple(
    SharedConfig(*blocks_and_warps)
    for blocks_and_warps in (
        (16, 16, 1), (16, 32, 1), (16, 32, 2), (16, 64, 2), (32, 32, 2), (32, 32, 4), (32, 64, 4), (32, 128, 4),
        (64, 16, 4), (64, 32, 4), (64, 128, 8), (128, 32, 4), (128, 64, 8),
    )
)  # fmt: skip


def shared_heuristic(problem: SharedProblem) -> SharedConfig:
    """The config where nothing was tuned: 16 outputs of a window by 32 positions, on one warp per 32 channels. Small
    blocks leave room for many warps, which hide each other's latency."""
    steps = max(16, next_power_of_2(problem.positions))
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return SharedConfig(min(256, max(16, next_power_of_2(problem.outputs))), min(steps, 256))
    steps = min(32, steps)
    return SharedConfig(16, steps, max(1, min(8, max(steps, next_power_of_2(problem.channels)) // 32)))


class OwnProblem(NamedTuple):
    """What the choice of a config depends on where outputs have windows of their own."""

    channels: int
    pixels: int
    kernel_h: int
    kernel_w: int
    softmax: bool  # of logits
    transposed: bool
    aligned: int  # what divides the channels, which are adjacent in memory, and where a pixel's begin; at most 16
    dtype: torch.dtype

    @property
    def block(self) -> int:
        """Channels of a program, of those that are summed apart."""
        return min(64, next_power_of_2(self.channels))

    @property
    def lane(self) -> int:
        """Channels that a lane loads at once: 16 bytes where they are aligned."""
        return min(self.block, 16 // self.dtype.itemsize, self.aligned)


def own_problem(features: Tensor, weights: Weights | None, window: Window, *, transposed: bool = False) -> OwnProblem:
    _, _, channels, height, width = features.shape
    aligned = alignment(channels, view(features, "b g c h w")) if features.data_ptr() % 16 == 0 else 1
    flags = weights is not None and weights.softmax, transposed
    return OwnProblem(channels, height * width, *window.kernel_size, *flags, aligned, features.dtype)


@dataclass(frozen=True)
class OwnConfig:
    """Rows by columns of outputs (or inputs) that a program owns."""

    rows: int
    columns: int
    num_warps: int = 1
    num_stages: int = 1

    def valid(self, problem: OwnProblem) -> bool:
        """At most 64 taps and 64 sums of a source row per thread, and no idle threads."""
        elements = self.columns * problem.block / (32 * self.num_warps)
        taps = self.rows * next_power_of_2(problem.kernel_w) * max(1, elements / problem.lane)
        return elements >= 1 and (taps <= 64 or self.rows == 1) and self.rows * elements <= 64


OWN_CONFIGS = tuple(
    OwnConfig(*tile_and_warps)
    for tile_and_warps in (
        (4, 8, 1), (2, 8, 1), (1, 8, 1), (4, 16, 1), (2, 16, 1), (1, 16, 1), (4, 4, 1), (2, 4, 1), (1, 4, 1),
        (4, 16, 2), (2, 16, 2), (1, 16, 2), (4, 32, 1), (2, 32, 1), (1, 32, 1), (1, 64, 1),
    )
)  # fmt: skip


def own_heuristic(problem: OwnProblem) -> OwnConfig:
    """The config where nothing was tuned: a warp whose lanes have 16 bytes of channels, or
    8 where less is aligned, and rows for at most 32 taps per lane."""
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return OwnConfig(4, 128)
    rows = max(1, min(4, 32 // next_power_of_2(problem.kernel_w)))
    lane = problem.lane if problem.lane == 1 else max(problem.lane, min(4, 16 // problem.dtype.itemsize))
    columns = max(min(8, 32 * lane // problem.block), 32 // problem.block, 1)
    return OwnConfig(rows, columns, max(1, problem.block // (32 * lane)))


def own_correlate_heuristic(problem: OwnProblem) -> OwnConfig:
    """All channels at once, on more warps where there are many; and two rows of a softmax at most, whose logits take up
    registers, too."""
    config = own_heuristic(problem)
    if interpreting():
        return config
    warps = config.num_warps * max(1, next_power_of_2(problem.channels) // 64)
    rows = min(2, config.rows) if problem.softmax else config.rows
    return replace(config, rows=rows, num_warps=max(1, min(8, warps, config.columns * problem.block // 32)))
