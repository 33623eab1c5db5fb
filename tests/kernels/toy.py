"""A launcher whose configs are single numbers, for the tests of choosing, tuning and verifying configs."""

import dataclasses
from typing import NamedTuple

import torch

from kernels.tuning import tunable
from kernels.tuning.source import triton_version


@dataclasses.dataclass(frozen=True)
class Config:
    block: int

    def valid(self, problem):
        return self.block <= problem.pixels


class Problem(NamedTuple):
    pixels: int
    dtype: torch.dtype = torch.float32


BLOCKS = (8, 16, 32, 64, 128)


def _heuristic(problem: Problem) -> Config:
    return Config(16)


def toy(configs):
    """A launcher that returns ones, except that a config whose block is ``wrong`` or ``broken`` is wrong or fails."""

    @tunable(configs, _heuristic, problem=_problem, reference=lambda *_, **__: torch.ones(4), name="toy")
    def launch(x, wrong=(), broken=(), *, config):
        if config.block in broken:
            raise RuntimeError(f"out of resource: block {config.block}")
        return torch.full((4,), 2.0 if config.block in wrong else 1.0)

    return launch


def _problem(x, *_, **__):
    return Problem(x.numel())


TOY = toy(tuple(map(Config, BLOCKS)))
CPU = torch.device("cpu")
GPU = "cpu"  # the name configs of a CPU tensor are kept under


def entry_of(launcher, config, **changes):
    """An entry of a store that holds today."""
    found = {"config": dataclasses.asdict(config), "triton": triton_version(), "source": launcher.source}
    return found | {"milliseconds": 0.25, "heuristic_milliseconds": 0.5} | changes
