"""The kernel that notebook 05 looks at, and what the compiler makes of its configs.

Run as a module, ``python -m autotune.notebooks.subject ARCHITECTURE INDEX...`` with indices into the tuner's
candidates, it prints the latter as JSON. That needs a process of its own wherever Triton's interpreter is switched on; Triton
keeps what it compiled in its own cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from autotune.tuner import Problem, Tunable
from kernels.windows import Window

__all__ = ["SHAPE", "SIDE", "WINDOW", "Known", "compile_candidates", "subject", "tensors"]

SHAPE = "aggregate of RedNet-50's second stage: 128 channels in groups of 16, 28×28, K = 7, bfloat16, channels-last"
WINDOW = Window((7, 7), padding=(3, 3))
BATCH, GROUPS, CHANNELS, SIDE = 128, 8, 16, 28


def tensors(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The dynamic kernel [B, G, 7, 7, H, W] and the features [B, G, C, H, W], as the model lays them out."""

    def draw(channels: int) -> Tensor:
        shape = (BATCH, SIDE, SIDE, channels)
        draw = torch.empty if str(device) == "meta" else torch.randn
        return draw(shape, dtype=torch.bfloat16, device=device).permute(0, 3, 1, 2)

    return draw(GROUPS * 49).unflatten(1, (GROUPS, 7, 7)), draw(GROUPS * CHANNELS).unflatten(1, (GROUPS, CHANNELS))


def subject() -> tuple[Tunable, Problem]:
    """The kernel as the tuner knows it, and the problem of that shape."""
    from kernels.aggregation import triton_kernels

    weight, x = tensors("meta")
    return triton_kernels.AGGREGATE, triton_kernels.problem_of(weight, x, (SIDE, SIDE), 49)


@dataclass(frozen=True)
class Known:
    """What the compiler reports of a config."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_candidates(architecture: str, indices: Sequence[int]) -> list[Known]:
    """Registers, spills and shared memory of these of the tuner's candidates; nothing is launched."""
    from autotune.compile import compile_launch
    from kernels.aggregation import triton_kernels
    from kernels.launch import record_launches

    tunable, problem = subject()
    weight, x = tensors("meta")
    found = []
    for index in indices:
        with record_launches() as launches:
            triton_kernels.aggregate(weight, x, WINDOW, tunable.candidates(problem)[index])
        built = compile_launch("", launches[0], architecture)
        found.append(Known(built.registers, built.spilled_bytes, built.shared_bytes))
    return found


if __name__ == "__main__":
    reports = compile_candidates(sys.argv[1], [int(index) for index in sys.argv[2:]])
    print(json.dumps([asdict(report) for report in reports]))
