"""Which configs every kernel may take: rules over the table in ``operators``."""

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from autotune.tunables import find_tunables
from autotune.tuner import disagreement
from kernels.tuning.choose import Request, observing
from tests.kernels.rules import BY_NAME, first_cases, first_met, kind, pixels_first, requests, run
from tests.support import DEVICE


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Heuristics choose as on a GPU."""
    find_tunables()  # imports them all
    for name, module in sys.modules.items():
        if re.fullmatch(r"kernels\..*configs", name):
            monkeypatch.setattr(module, "interpreting", lambda: False, raising=False)


@pytest.mark.usefixtures("as_on_a_gpu")
@BY_NAME
def test_heuristic(operator):
    """Tuning would accept the heuristic's config for every problem, from one pixel to the models' largest maps."""
    met = set()
    for case in (*operator.cases.values(), *operator.scales):
        for dtype in (torch.bfloat16, torch.float32):
            for layout in (Tensor.detach, pixels_first):
                for request in requests(operator.at(case), dtype, layout):
                    met.add((request.launcher.name, request.problem))
                    config = request.launcher.heuristic(request.problem)
                    assert config.valid(request.problem), (request.launcher.name, config, request.problem)
    assert len(met) > 100, "the row's scales must reach more problems than that"


def test_a_kernel_has_at_most_thirty_parameters():
    """Tensors and sizes that belong together are one argument: more than that nobody reads."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(kernels.__path__, "kernels.")]
    functions = {value.fn for module in modules for value in vars(module).values() if hasattr(value, "fn")}
    parameters = {found.__name__: len(inspect.signature(found).parameters) for found in functions}
    assert len(parameters) > 100, "jit functions are not recognised any more"
    assert {name: count for name, count in parameters.items() if count > 30} == {}


def test_every_launcher_is_met():
    assert {kind[0] for kind in first_met()} == set(find_tunables())


@pytest.mark.slow
@BY_NAME
def test_every_config(operator):
    """Every config of the kernels that this operator is the first to launch is right wherever tuning may choose it."""
    mine = {kind: (id(case), dtype) for kind, (name, case, dtype) in first_met().items() if name == operator.name}
    checked = []

    def check_configs(request: Request) -> None:
        if mine.get(kind(request)) != (id(case), dtype) or kind(request) in checked:
            return
        checked.append(kind(request))
        reference = request.reference()
        for config in _tiles(request):
            try:
                found = request.run(config)
            except Exception as error:  # a GPU's shared memory may be too small for what is not valid here
                if config.valid(request.problem) or type(error).__name__ != "OutOfResources":
                    raise
                continue
            wrong = disagreement(found, reference, request.problem)
            assert wrong is None, f"{request.launcher.name}, {config}: {wrong}"

    for case, dtype in first_cases(operator):
        with observing(check_configs):
            run(operator.at(case), operator.at(case).tensors(2, dtype), "triton")
    assert set(checked) == set(mine)


def _tiles(request: Request) -> Iterable[Any]:
    """All configs; in the interpreter, which does not schedule, only one of those with the same blocks."""
    scheduling = {"num_warps", "num_stages", "loads"} if DEVICE == "cpu" else set()
    tiles = {}
    for config in request.launcher.configs:
        tiles.setdefault(tuple(value for name, value in asdict(config).items() if name not in scheduling), config)
    return tiles.values()
