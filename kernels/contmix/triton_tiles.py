"""How ContMix's kernels cut a map: tiles of outputs, steps over window positions, and the choice of a config.

Two formulations of everything, chosen by ``SHARED``:

*Shared windows.* Clamping makes outputs share windows: along an axis of length L there are only L − K + 1 starts, at
14x14 with K = 13 four windows for 196 outputs, at 7x7 with K = 7 one. A tile holds outputs of one window, and every
sum over window positions is a small matrix product.

*Own windows.* Elsewhere nearly every output has a window of its own. A tile holds R rows of 16 outputs, and a step
takes one row of the windows: 16 adjacent outputs see a span of 15 + K inputs, so that sums over it are R matrix
products whose weights are banded (``triton_blocks``).

The first is taken where a window serves at least 16 outputs on average, the least that fills a matrix product's rows.

Weighed for own windows by counting the instructions built for sm_90: cycles in which one processor issues them for an
output of a head with 16 channels on a 50x80 map; values gathered by every output and summed in registers, as before,
and banded products. Predicted, since no GPU was at hand: times in proportion, once the map fills the processors.

                            gathered    banded                             gathered    banded
    bf16    forward    K=5        40        23      float32    forward    K=5        48        66
                      K=13       215        66                            K=13       262       172
            grad_query K=5        49        31
                      K=13       267        99                 grad_query K=13       318       202
            grad_value K=5       408        88
                      K=13     2,082       274                 grad_value K=13     2,113       379

With 32 channels the forward pass takes 27 and 79 where gathering took 78 and 406. That 60 % of a product and more is
not band hardly matters on tensor cores: of the 326 instructions of a step at K = 13 five are products, the others
exponentials, gathers and changes of layout; in float32 half are. So banded products serve all own windows, though the
smallest lose in float32. Windows that are shared stay cheaper: 48 at 14x14, K = 13.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.aggregation.triton_kernels import stride_arguments
from kernels.backend import interpreting
from kernels.contmix.triton_blocks import TILE_WIDTH
from kernels.dtypes import precision, upcast
from kernels.launch import ceil_divide, next_power_of_2

__all__ = [
    "CONFIGS",
    "ONE_SIZE",
    "SIDE_BY_SIDE",
    "Config",
    "Problem",
    "Saved",
    "block_arguments",
    "heuristic",
    "problem_of",
    "shares_windows",
    "size_arguments",
    "tensor_arguments",
    "tile_arguments",
    "tiles_and_windows",
]

OUTPUTS_PER_WINDOW = 16


class Problem(NamedTuple):
    """What the choice of a config depends on."""

    channels: int
    query_channels: int
    pixels: int
    kernel_size: int
    shared: bool
    dtype: torch.dtype


def _product_block(size: int) -> int:
    """A block that holds ``size`` elements and is a side of a matrix product."""
    return max(16, next_power_of_2(size))


def _span(kernel_size: int) -> int:
    """A block that holds the inputs that adjacent outputs of a tile row see."""
    return _product_block(TILE_WIDTH.value + kernel_size - 1)


@dataclass(frozen=True)
class Config:
    """Pixels of a program, and window positions of a step where windows are shared; a step is one row of the windows
    otherwise, and ``block_steps`` always 16. Channels are never split."""

    block_pixels: int
    block_steps: int
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """Registers: of the widest block at most 32 elements a thread; half of a shared window's in float32, whose
        products keep both operands there."""
        channels = _product_block(problem.channels)
        if problem.shared:
            widest, most = self.block_pixels * max(self.block_steps, channels), 64 // problem.dtype.itemsize
            steps_fit = self.block_steps < 2 * max(problem.kernel_size**2, 16)
        else:
            span = _span(problem.kernel_size)
            widest, most = span * max(2 * self.block_pixels, self.block_pixels // TILE_WIDTH.value * channels), 32
            steps_fit = self.block_steps == 16
        pixels_fit = self.block_pixels < 2 * max(problem.pixels, 16)
        return steps_fit and pixels_fit and 4 <= widest / (32 * self.num_warps) <= min(most, 32)


CONFIGS = tuple(
    Config(pixels, steps, warps, stages)
    for pixels in (16, 32, 64, 128)
    for steps in (16, 32, 64)
    for warps in (4, 8)
    for stages in (2, 3)
)


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned: 64 outputs, of one window by 32 positions or 4 rows of 16; of a shared window
    fewer in float32, whose products keep their operands in registers."""
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return Config(128, 64) if problem.shared else Config(_rows_of(problem) * TILE_WIDTH.value, 16)
    config = Config(64, 16)
    if problem.shared:
        config = Config(64, 32) if problem.dtype.itemsize == 2 else Config(32, 16)
    if config.valid(problem):
        return config
    valid = [c for c in CONFIGS if c.block_pixels <= 64 and c.valid(problem)]
    return max(valid, key=lambda c: (c.block_pixels, -c.num_warps), default=Config(16, 16))


def _rows_of(problem: Problem) -> int:
    """A whole square map's, 64 at most."""
    return min(64, next_power_of_2(math.isqrt(problem.pixels)))


def shares_windows(height: int, width: int, kernel_size: int) -> bool:
    """Whether a clamped window serves at least 16 outputs on average."""
    return height * width >= OUTPUTS_PER_WINDOW * (height - kernel_size + 1) * (width - kernel_size + 1)


def tiles_and_windows(height: int, width: int, kernel_size: int, block_pixels: int) -> tuple[int, int]:
    """How many tiles a window's outputs fill, or the map where windows are not shared; and how many windows there are.

    At most K//2 + 1 outputs along an axis share a start, or all of them where the window is as long as the axis.
    """
    if not shares_windows(height, width, kernel_size):
        return ceil_divide(height, block_pixels // TILE_WIDTH.value) * ceil_divide(width, TILE_WIDTH.value), 1
    most = [length if length == kernel_size else kernel_size // 2 + 1 for length in (height, width)]
    return ceil_divide(most[0] * most[1], block_pixels), (height - kernel_size + 1) * (width - kernel_size + 1)


def problem_of(query: Tensor, kernel_size: int, value: Tensor) -> Problem:
    """The problem of one kernel size; value [..., C, H, W]."""
    channels, height, width = value.shape[-3:]
    shared = shares_windows(height, width, kernel_size)
    return Problem(channels, query.shape[2], height * width, kernel_size, shared, value.dtype)


ONE_SIZE = {  # axes of the tensors of one kernel size
    "query": "b g c h w",
    "projected": "b g c k",
    "bias": "k",
    "rpb": "g h w",
    "value": "b g c h w",
    "out": "b g c h w",
    "statistics": "b g h w",
    "grad": "b g c h w",
    "delta": "b g h w",
    "target": "b g c h w",
}
SIDE_BY_SIDE = {  # of those that hold all of them
    "query": "b g c h w",
    "projected": "b g c k",
    "bias": "k",
    "rpb": "g k",
    "value": "b m g c h w",
    "out": "b m g c h w",
    "statistics": "b m g h w",
}


def tensor_arguments(axes: dict[str, str], **tensors: Tensor) -> dict[str, Any]:
    """Pointers and strides of a kernel's tensors, under the names that all ContMix kernels give them."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        arguments[f"{name}_ptr"] = tensor
        arguments |= stride_arguments(name, tensor, axes[name])
    return arguments


class Saved(NamedTuple):
    """What the backward pass of one kernel size reads: the output's gradient, the inputs, and what forward left."""

    grad: Tensor  # [B, G, Dv, H, W]
    query: Tensor  # [B, G, Dq, H, W]
    projected: Tensor  # [B, G, Dq, K²]
    bias: Tensor  # [K²]
    rpb: Tensor  # [G, 2K-1, 2K-1]
    value: Tensor  # [B, G, Dv, H, W]
    out: Tensor  # [B, G, Dv, H, W]
    statistics: Tensor  # [B, G, H, W]: log Σ_k exp

    def problem(self) -> Problem:
        return problem_of(self.query, (self.rpb.shape[1] + 1) // 2, self.value)

    def but(self, *names: str) -> dict[str, Tensor]:
        """Its tensors by name, those called so left out."""
        return {name: tensor for name, tensor in self._asdict().items() if name not in names}


def block_arguments(problem: Problem, config: Config) -> dict[str, Any]:
    """The blocks that a config makes of a problem."""
    return {
        "SHARED": problem.shared,
        "KERNEL": problem.kernel_size,
        "STEPS": ceil_divide(problem.kernel_size**2, config.block_steps) if problem.shared else problem.kernel_size,
        "BLOCK_PIXELS": config.block_pixels,
        "BLOCK_STEPS": config.block_steps if problem.shared else _product_block(problem.kernel_size),
        "BLOCK_SPAN": _span(problem.kernel_size),
    }


def size_arguments(query: Tensor, value: Tensor, *others: Tensor) -> dict[str, Any]:
    """Sizes and types of features [..., C, H, W], which ContMix's kernels all take; all tensors decide the offsets'."""
    groups, query_channels = query.shape[1:3]
    channels, height, width = value.shape[-3:]
    return {
        "groups": groups,
        "channels": channels,
        "query_channels": query_channels,
        "height": height,
        "width": width,
        **precision(value, query, *others),
        "UPCAST": upcast(value.dtype),
        "BLOCK_CHANNELS": _product_block(channels),
        "BLOCK_QUERY": _product_block(query_channels),
    }


def tile_arguments(problem: Problem, config: Config, query: Tensor, value: Tensor, *others: Tensor) -> dict[str, Any]:
    """The arguments of every backward kernel but its tensors and their strides."""
    height, width = value.shape[3:]
    tiles, windows = tiles_and_windows(height, width, problem.kernel_size, config.block_pixels)
    sizes = size_arguments(query, value, *others)
    return {**sizes, "tiles": tiles, "windows": windows, **block_arguments(problem, config)}
