"""Configs of outlook attention's kernels, and which one a problem gets where nothing was tuned."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.backend import interpreting
from kernels.launch import next_power_of_2


class Problem(NamedTuple):
    """What the choice of a config depends on. Batch and heads only repeat it."""

    channels: int
    pixels: int
    kernel_size: int
    stride: int
    dtype: torch.dtype
    grad_logits: bool = False

    @property
    def unrolled(self) -> bool:
        """Whether a program holds all weights of its windows in registers."""
        return self.kernel_size <= 3 and self.stride <= self.kernel_size


@dataclass(frozen=True)
class Config:
    """Tile of one program: windows times heads, how many of them heads, and channels of a head."""

    block_items: int
    block_heads: int
    block_channels: int
    num_warps: int
    num_stages: int = 2

    def valid(self, problem: Problem) -> bool:
        """At most 16 bytes of channels a thread; all channels of a head where its products stay in registers."""
        channels = max(problem.channels, 16)
        per_thread = self.block_items * self.block_channels / (32 * self.num_warps)
        holds_head = self.block_channels >= min(channels, 128) or not (problem.grad_logits and problem.unrolled)
        return per_thread <= 16 // problem.dtype.itemsize and self.block_channels < 2 * channels and holds_head


# Of eight, four and two channels a thread; neighbouring heads together fill lines of 128 bytes.
CONFIGS = (
    *(Config(256 * warps // c, max(1, 64 // c), c, warps) for c in (16, 32, 64) for warps in (1, 2, 4)),
    *(Config(128 * warps // c, max(1, 64 // c), c, warps) for c in (16, 32, 64) for warps in (1, 2)),
    Config(4, 4, 16, 1),
    Config(4, 1, 128, 2),
)


def heuristic(problem: Problem) -> Config:
    """The config where nothing was tuned: all channels of a head, and the fewest warps, which then wait for none.

    A lane has 16 bytes of channels, or two vectors where a head's channels do not divide by 4: each has its own mask.
    """
    channels = max(16, min(128, next_power_of_2(problem.channels)))
    if interpreting():  # cost there is per block operation, whatever the size of the block
        return Config(2**16 // channels, 1, channels, 4)
    per_thread = min(16 // problem.dtype.itemsize, 2 * math.gcd(problem.channels, 8))
    items = max(1, 32 * per_thread // channels)
    return Config(items, max(1, 64 // channels), channels, max(1, items * channels // (32 * per_thread)))
