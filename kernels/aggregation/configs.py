"""Which tile a program of the rows kernels works on: the one place where it is decided."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kernels.backend import interpreting
from kernels.launch import ceil_divide, next_power_of_2
from kernels.windows import Window

__all__ = ["CONFIGS", "Config", "Problem", "correlate_heuristic", "heuristic", "slides"]

LARGEST_KERNEL, LARGEST_STRIDE, LARGEST_DILATION = 16, 4, 8


def slides(window: Window) -> bool:
    """Whether rows can slide over registers: a zero-padded window of a size and a stride that registers hold."""
    return (
        not window.clamped
        and max(window.kernel_size) <= LARGEST_KERNEL
        and max(window.stride) <= LARGEST_STRIDE
        and max(window.dilation) <= LARGEST_DILATION
    )


class Problem(NamedTuple):
    """What the choice depends on, "rows" being those that slide: of the map, or its columns. Batch only repeats it."""

    channels: int  # of a group
    groups: int
    pixels: int
    rows: int
    taps: int  # rows of the window
    multiple: int  # of which a tile's rows must be: the stride where transposed, else 1
    transposed: bool  # outputs are looked up by input
    features: int  # that generate the dynamic kernel; 0 where it is read
    channels_fastest: bool  # channels, not pixels, are adjacent in memory
    aligned: bool  # and each pixel's begin at 16 bytes
    dtype: torch.dtype


@dataclass(frozen=True)
class Config:
    """``rows`` by ``columns`` by ``channels``, of several groups where they fit; ``loads`` rows are loaded at once."""

    rows: int
    columns: int
    channels: int
    loads: int = 16
    num_warps: int = 2

    def block(self, groups: int, channels: int) -> tuple[int, int]:
        """Groups, and channels of each, in a program: several groups only where whole ones fill a power of two."""
        if channels == next_power_of_2(channels) <= self.channels:
            return min(self.channels // channels, next_power_of_2(groups)), channels
        return 1, min(next_power_of_2(channels), self.channels)

    def valid(self, problem: Problem) -> bool:
        """Rows that fit the stride, and taps that fit the registers of a thread."""
        slots, steps = next_power_of_2(self.rows), next_power_of_2(problem.taps)
        return (
            self.rows % problem.multiple == 0
            and (slots * steps <= 64 or self.rows == problem.multiple)
            and self.channels < 2 * next_power_of_2(problem.channels * problem.groups)
        )


CONFIGS = tuple(
    Config(rows, *tile)
    for rows in (8, 7, 4)
    for tile in ((8, 64), (16, 64, 16, 4), (8, 64, 8), (32, 16, 4), (32, 16, 1, 1))
)


def _rows(problem: Problem, most: int) -> int:
    """Rows of a tile that waste least at the map's edge, where a tile also loads the rows around it."""
    most = max(problem.multiple, min(most, 64 // next_power_of_2(problem.taps)))
    candidates = [n for n in range(most, 0, -1) if n % problem.multiple == 0]
    return min(candidates, key=lambda n: ceil_divide(problem.rows, n) * (n + problem.taps / 2))


@functools.lru_cache(maxsize=4096)
def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned.

    Lanes take 8 adjacent channels (16 bytes; 4 of 32 bits) where they are aligned, one otherwise: a lane has the taps
    of all its groups in registers. Pixels lie across lanes where they are adjacent, 32 at a time.
    """
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return Config(_rows(problem, 8), 64, 64)
    size = problem.dtype.itemsize
    if problem.features and problem.transposed:  # the operands of its products fill registers, float32's twice
        most = 5 if size == 2 else 2
    else:
        most = 4 if size > 4 else 8
    if not problem.channels_fastest:
        if problem.transposed and not problem.features:
            most = min(most, 6)
        channels = min(16, next_power_of_2(problem.channels))
        return Config(_rows(problem, most), 32, channels, 4, 2 if channels > 4 else 1)
    whole = problem.channels == next_power_of_2(problem.channels)
    channels = min(64, next_power_of_2(problem.channels * problem.groups if whole else problem.channels))
    lane = min(4 if size > 2 else 8, problem.channels) if problem.aligned and whole else 1
    return Config(_rows(problem, most), max(2, 64 * lane // channels), channels)


@functools.lru_cache(maxsize=4096)
def correlate_heuristic(problem: Problem) -> Config:
    """As above, with one warp where pixels lie across lanes: a sum over channels must not cross warps."""
    config = heuristic(problem)
    if interpreting():
        return config
    if problem.channels_fastest:
        return replace(config, rows=_rows(problem, 4 if problem.dtype.itemsize > 4 else 8), loads=8)
    return replace(config, rows=_rows(problem, 4 if problem.dtype.itemsize > 2 else 7), loads=1, num_warps=1)
