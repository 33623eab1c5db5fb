"""Configs of the depthwise kernels, and which one a problem gets where nothing was tuned."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.backend import interpreting, is_hopper
from kernels.launch import ceil_divide, next_power_of_2


def tile_shape(kernel_size: int, width: int) -> tuple[int, int]:
    """Outputs a tile is wide, and columns under it: as many again for the halo, or the whole map where that is less.

    Beside a map there is only zero, so that a tile as wide as the map has no halo.
    """
    tile, columns = max(8, next_power_of_2(kernel_size - 1)), max(8, next_power_of_2(width))
    return (columns, columns) if columns <= 2 * tile else (tile, 2 * tile)


class Problem(NamedTuple):
    """What the choice of a config depends on. Channels only repeat it, but where there are few."""

    images: int
    channels: int
    pixels: int
    kernel_size: int
    tile_width: int
    span: int  # input columns under a tile
    dtype: torch.dtype
    weight_gradient: bool = False
    copied: bool = False  # into rows and back, which PyTorch's convolution may not need


@dataclass(frozen=True)
class Config:
    """Rows of a tile; how many tiles, input rows and channels one matrix product takes. Or ``library``: PyTorch's own
    convolution instead, whatever the others say."""

    tile_height: int
    block_tiles: int
    block_rows: int
    block_channels: int = 1
    num_warps: int = 4
    num_stages: int = 3
    library: bool = False

    def valid(self, problem: Problem) -> bool:
        """Products of 16 or more; 4 to 128 sums a thread, 64 of wider types; 32 KiB of operands a stage, or 48 where a
        program has shared memory for four of those."""
        if self.library:
            return True
        outputs, columns = self.tile_height * problem.tile_width, self.block_rows * problem.span
        rows, others, reduced = self.block_tiles, outputs, columns
        if problem.weight_gradient:
            rows, others, reduced = outputs, columns, self.block_tiles
        sums = self.block_channels * rows * others / (32 * self.num_warps)
        operands = self.block_channels * (rows + others) * reduced * problem.dtype.itemsize
        return (
            32 <= outputs <= 256
            and 16 <= columns <= 128
            and 4 <= sums <= (128 if problem.dtype.itemsize == 2 else 64)
            and operands <= (3 * 2**14 if is_hopper() else 2**15)
            and self.block_tiles <= 2 * max(problem.images * ceil_divide(problem.pixels, outputs), 16)
            and self.block_channels < 2 * problem.channels
        )


LIBRARY = Config(1, 1, 1, library=True)
CONFIGS = (
    LIBRARY,
    # 16 bits: forward a product of as many tiles as registers hold, the weight gradient of as many columns.
    Config(8, 256, 1, num_warps=8),
    Config(8, 128, 1, num_warps=8, num_stages=4),
    Config(8, 128, 2, num_warps=8),
    Config(8, 128, 2),
    Config(8, 128, 8),
    Config(4, 128, 2),
    Config(4, 64, 4),
    Config(4, 64, 2, num_warps=8),
    Config(8, 64, 4),
    Config(8, 64, 8),
    Config(2, 64, 2),
    # 32 bits, whose operands take up registers.
    Config(4, 128, 1),
    Config(2, 128, 1),
    Config(4, 16, 4, num_warps=2),
    Config(2, 16, 2, num_warps=2),
)
# Multiply-adds below which PyTorch's one launch is quicker than ours and those that make its band: as many as a thread
# per output, two loads each, needs 5 µs for on an H200's 132 processors of 32 loads a cycle. Predicted, not measured.
SMALL = 2**24


def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned.

    PyTorch's for small problems in its layout, where a thread per output does it: for kernels of 7 and more it has
    nothing else. Otherwise tiles of 64 outputs or more, and in 16 bits:

    - forward, 4 or 8 rows of a tile by as many tiles as registers hold: the band is read once for all of them;
    - the weight gradient, 64 or 128 input columns by 64 tiles, to read gradients less often.

    Wider types take smaller blocks: their operands take up registers. What 16 bits get at OverLoCK's shapes is what was
    fastest on an H200.
    """
    span = problem.span
    if interpreting():  # cost there is per block operation, whatever the size of the block
        height = max(1, 64 // problem.tile_width)
        channels = min(next_power_of_2(problem.channels), 64)
        tiles = next_power_of_2(problem.images * ceil_divide(problem.pixels, height * problem.tile_width))
        return Config(height, max(16, min(tiles, 2**17 // (channels * span))), max(4, 16 // span), channels)
    outputs = problem.images * problem.channels * problem.pixels
    if outputs * problem.kernel_size**2 < SMALL and not problem.copied:
        return LIBRARY
    warps, stages = 8 if problem.tile_width == 64 else 4, 3
    if problem.dtype.itemsize > 2:
        height, warps = max(1, 64 // problem.tile_width), warps // 2
        tiles, columns = (16, 64) if problem.weight_gradient else (32, 32)
    elif problem.weight_gradient:
        height, tiles, columns = max(1, 64 // problem.tile_width), 64, 64 if span == problem.tile_width else 128
        if (problem.tile_width, span) == (16, 32) and is_hopper():  # others spill
            height = 8
    elif span <= 16:
        height, tiles, columns = 8, 128, 64 if span == 8 else 32
    elif span == 32:
        # For kernels of 9 to 17, and for maps of 17 to 32 columns, which fill their tiles.
        height, tiles, columns, warps = (8, 256, 32, 8) if problem.tile_width == 16 else (4, 128, 32, 4)
        stages = 3 if problem.tile_width == 16 else 4
    else:
        height, tiles, columns = 128 // problem.tile_width, 64, 64
    most = max(16, next_power_of_2(problem.images * ceil_divide(problem.pixels, height * problem.tile_width)))
    return Config(height, min(most, tiles), max(1, columns // span), num_warps=warps, num_stages=stages)
