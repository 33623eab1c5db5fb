"""The kernel that notebook 05 looks at: its candidates, which is chosen, and what the compiler makes of each.

Run as a module, ``python -m autotune.notebooks.subject GPU ARCHITECTURE PART PARTS``, it prints a ``Landscape`` as
JSON, every PARTS-th candidate from PART on. That takes a process of its own wherever Triton's interpreter is switched
on, for which kernels choose other configs and nothing compiles. Triton keeps what it compiled in its own cache.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.launch import record_launches
from kernels.tuning.choose import Launcher, Problem, key_of, look_up
from kernels.windows import Window

__all__ = ["SHAPE", "SIDE", "WINDOW", "Candidate", "Known", "Landscape", "subject", "survey", "tensors"]

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


def subject() -> tuple[Launcher, Problem]:
    """The kernel as the tuner knows it, and the problem of that shape."""
    from kernels.aggregation.rows import aggregate

    return aggregate, aggregate.problem_of(*tensors("meta"), WINDOW)


@dataclass(frozen=True)
class Known:
    """What the compiler reports of a config."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Candidate:
    """A config, and what is known of it.

    ``milliseconds`` is a measured time, None where nobody measured; ``rejected`` says why a measured config does not
    count.
    """

    config: Any
    chosen: bool
    known: Known | None = None
    milliseconds: float | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Landscape:
    """What tuning would time, in its order; the chosen one is what a launch on that GPU uses now.

    ``key`` is what the config is looked up by, ``source`` where it was found: store, shipped or heuristic.
    """

    gpu: str
    key: str
    source: str
    candidates: list[Candidate]


def survey(gpu: str, architecture: str | None = None, part: int = 0, parts: int = 1) -> Landscape:
    """The candidates on that GPU, compiled for ``architecture`` where one is given; nothing is launched."""
    launcher, problem = subject()
    chosen = look_up(launcher, problem, gpu)
    found = []
    for config in list(dict.fromkeys([*launcher.candidates(problem), chosen.config]))[part::parts]:
        known = None if architecture is None else _compiled(config, architecture)
        found.append(Candidate(config, config == chosen.config, known))
    return Landscape(gpu, key_of(launcher, problem), chosen.source, found)


def _compiled(config: Any, architecture: str) -> Known:
    from autotune.compile import compile_launch
    from kernels.aggregation.rows import aggregate

    weight, x = tensors("meta")
    with record_launches() as launches:
        aggregate(weight, x, WINDOW, config=config)
    built = compile_launch("", launches[0], architecture)
    return Known(built.registers, built.spilled_bytes, built.shared_bytes)


if __name__ == "__main__":
    gpu, architecture, part, parts = sys.argv[1:]
    print(json.dumps(asdict(survey(gpu, architecture or None, int(part), int(parts)))))
