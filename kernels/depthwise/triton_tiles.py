"""Tiles of a depthwise convolution: the config space of its kernels, and the arguments they share."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.triton_kernels import stride_arguments
from kernels.backend import interpreting
from kernels.dtypes import precision
from kernels.launch import ceil_divide, next_power_of_2
from kernels.layout import channels_fastest

__all__ = [
    "CONFIGS",
    "LIBRARY",
    "SMALL",
    "Config",
    "Problem",
    "geometry",
    "heuristic",
    "problem_of",
    "tile_width",
]


def tile_width(kernel_size: int) -> int:
    """Outputs a tile is wide: as many as its halo, so that it and its halo fill a span of twice the width."""
    return max(8, next_power_of_2(kernel_size - 1))


class Problem(NamedTuple):
    """What the choice of a config depends on. Channels only repeat it, but where there are few."""

    images: int
    channels: int
    pixels: int
    kernel_size: int
    vector: int  # elements of a row that one load can take: 16 bytes at most, less where rows are not aligned to them
    dtype: torch.dtype
    weight_gradient: bool = False
    channels_last: bool = False  # these kernels reorder such tensors before and after; PyTorch's may not


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

    def tiles(self, height: int, width: int, kernel_size: int) -> tuple[int, int]:
        """Tiles that cover a map, along its height and its width."""
        return ceil_divide(height, self.tile_height), ceil_divide(width, tile_width(kernel_size))

    def product(self, problem: Problem) -> tuple[int, int, int]:
        """Rows and columns of a matrix product, and what it sums over."""
        tile, columns = self.tile_height * tile_width(problem.kernel_size), self.columns(problem)
        return (tile, columns, self.block_tiles) if problem.weight_gradient else (self.block_tiles, tile, columns)

    def columns(self, problem: Problem) -> int:
        """Input columns of all its rows that a step takes under one tile."""
        return self.block_rows * 2 * tile_width(problem.kernel_size)

    def valid(self, problem: Problem) -> bool:
        """Tiles of 64 to 128 outputs; 8 to 64 sums and at most 32 loads a thread; 32 KiB of operands a stage.

        Products run on CUDA cores in float32, whose operands take up registers: 16 sums and 16 KiB there.
        """
        if self.library:
            return True
        rows, columns, reduced = self.product(problem)
        threads = 32 * self.num_warps
        sums = self.block_channels * rows * columns / threads
        operands = self.block_channels * (rows + columns) * reduced
        tile = self.tile_height * tile_width(problem.kernel_size)
        half = problem.dtype.itemsize == 2
        return (
            64 <= tile <= 128
            and 32 <= self.columns(problem) <= 128
            and 8 <= sums <= (64 if half else 16)
            and operands / problem.vector / threads <= 32
            and operands * problem.dtype.itemsize <= (2**15 if half else 2**14)
            and self.block_tiles < 2 * max(problem.images * ceil_divide(problem.pixels, tile), 16)
            and self.block_channels < 2 * problem.channels
        )


LIBRARY = Config(1, 1, 1, library=True)
CONFIGS = (
    LIBRARY,
    *(
        Config(height, tiles, rows, num_warps=warps)
        for height in (2, 4, 8, 16)
        for tiles in (16, 32, 64, 128)
        for rows in (1, 2, 4, 8)
        for warps in (4, 8)
    ),
)
# Multiply-adds below which PyTorch's one launch is quicker than ours and those that make its band: as many as a thread
# per output, two loads each, needs 5 µs for on an H200's 132 processors of 32 loads a cycle. Predicted, not measured.
SMALL = 2**24


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned.

    PyTorch's for small problems in its layout, where a thread per output does it: for kernels of 7 and more it has
    nothing else. Otherwise tiles of 64 outputs. Forward, a product of 128 tiles and 64 columns (128 bytes in 16 bits: a
    row of shared memory without bank conflicts). The weight gradient sums twice as many columns over 64 tiles, to read
    gradients less often. Smaller blocks where loads are narrow or products run on CUDA cores: addresses and operands
    take up registers.
    """
    width = tile_width(problem.kernel_size)
    height = max(1, 64 // width)
    all_tiles = max(16, next_power_of_2(problem.images * ceil_divide(problem.pixels, height * width)))
    if interpreting():  # cost there is per block operation, whatever the size of the block
        channels = min(next_power_of_2(problem.channels), 64)
        return Config(height, min(all_tiles, max(16, 2**17 // (channels * width))), 4, channels)
    outputs = problem.images * problem.channels * problem.pixels
    if outputs * problem.kernel_size**2 < SMALL and not problem.channels_last:
        return LIBRARY
    if problem.dtype.itemsize > 2:
        tiles, columns = 32, 32
    elif problem.vector >= 4:
        tiles, columns = (64, 128) if problem.weight_gradient else (128, 64)
    elif problem.vector == 2:
        tiles, columns = 64, 64
    else:
        tiles, columns = (32, 64) if problem.weight_gradient else (64, 32)
    return Config(height, min(all_tiles, tiles), max(1, columns // (2 * width)))


def _row_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of [B, C, H, W] as the kernels read it: channels-last tensors are reordered first."""
    if not channels_fastest(tensor[:, None]):
        return tensor.stride()
    _, channels, height, width = tensor.shape
    return channels * height * width, height * width, width, 1


def _row_vector(*tensors: Tensor) -> int:
    """Elements of a row that one load takes: as many as divide every stride and the width, up to 16 bytes."""
    strides = [_row_strides(tensor) for tensor in tensors]
    if any(stride[3] != 1 for stride in strides):
        return 1
    outer = (length for stride in strides for length in stride[:3])
    return math.gcd(16 // tensors[0].element_size(), tensors[0].shape[3], *outer)


def problem_of(first: Tensor, second: Tensor, kernel_size: int, weight_gradient: bool) -> Problem:
    """The problem of a launch that reads or writes two tensors [B, C, H, W]."""
    batch, channels, height, width = first.shape
    vector = _row_vector(first, second)
    channels_last = channels_fastest(first[:, None]) or channels_fastest(second[:, None])
    return Problem(batch, channels, height * width, kernel_size, vector, first.dtype, weight_gradient, channels_last)


def geometry(tensors: dict[str, Tensor], kernel_size: int, config: Config) -> dict[str, object]:
    """Strides, sizes and constants that both kernels take."""
    height, width = next(iter(tensors.values())).shape[2:]
    vector = _row_vector(*tensors.values())
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        strides |= stride_arguments(name, tensor, "b c h w")
        strides |= {f"{name}_stride_{axis}": strides[f"{name}_stride_{axis}"] // vector for axis in "bch"}
    tiles_h, tiles_w = config.tiles(height, width, kernel_size)
    first_row, last_row = 0, config.tile_height + kernel_size - 1
    if tiles_h == 1:  # where one tile spans the map, the input rows inside it; otherwise all
        first_row, last_row = kernel_size // 2, kernel_size // 2 + height
    return {
        **strides,
        "height": height,
        "width": width // vector,
        "tiles_h": tiles_h,
        "tiles_w": tiles_w,
        "first_row": first_row,
        "last_row": last_row,
        "KERNEL": kernel_size,
        "VECTOR": vector,
        "WIDEN": interpreting(),  # its product of bfloat16 blocks is wrong
        **precision(*(t.transpose(0, 1)[None] for t in tensors.values())),
        "TILE_HEIGHT": config.tile_height,
        "TILE_WIDTH": tile_width(kernel_size),
        "BLOCK_TILES": config.block_tiles,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_CHANNELS": config.block_channels,
    }
