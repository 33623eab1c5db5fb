"""The lines that ``profile`` measures: all operators and each family's smallest model, or what a command line names."""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from autotune import workloads
from autotune.arguments import matching
from autotune.bench_operators import PASSES
from autotune.cases import Case
from autotune.comparison import Settings, measure_model, measure_module, measure_operator
from autotune.workloads import Size, Workload

__all__ = ["chosen_cases", "given_batch"]


def operator_cases(
    found: Sequence[Workload], settings: Settings, passes: Sequence[str], bytes_per_second: Callable[[], float]
) -> Iterator[Case]:
    """Operators at the shapes of their workloads; the copy's speed is asked for only when a line needs it."""
    for workload in found:
        for name in passes:
            facts = {
                "kind": "operator",
                "name": workload.name,
                "operator": workload.operator,
                "model": workload.model,
                "shape": workload.shape,
                "pass": name,
            }

            def measure(workload: Workload = workload, backward: bool = name == PASSES[1]) -> dict[str, Any]:
                return measure_operator(workload, settings, backward=backward, bytes_per_second=bytes_per_second())

            yield Case(facts, measure)


def model_cases(
    named: Mapping[str, str], settings: Settings, passes: Sequence[str], sizes: Sequence[Size], image: Path | None
) -> Iterator[Case]:
    """Models, name -> title, on the photograph at every size."""
    if not named:
        return
    photo = workloads.photograph(image)
    for model, title in named.items():
        for size in sizes:
            for name in passes:
                shape = f"{size[0]}×{size[1]}"
                facts = {"kind": "model", "name": f"{model} {shape}", "model": title, "shape": shape, "pass": name}
                measure = functools.partial(measure_model, model, size, photo, settings, training=name == PASSES[1])
                yield Case(facts, measure)


def module_case(model: nn.Module, images: tuple[int, ...], settings: Settings, name: str) -> Case:
    """A module of the user's on random inputs, in one of the two passes."""
    title, sizes = type(model).__name__, "×".join(map(str, images))

    def measure() -> dict[str, Any]:
        inputs = torch.randn(images, generator=torch.Generator().manual_seed(0)).to(settings.device)
        own = copy.deepcopy(model).to(settings.device).float()
        return measure_module(own, inputs, settings, training=name == PASSES[1])

    facts = {"kind": "model", "name": f"{title} {sizes}", "model": title, "shape": sizes, "pass": name}
    return Case(facts, measure)


def chosen_cases(
    arguments: argparse.Namespace, settings: Settings, sizes: Sequence[Size], bytes_per_second: Callable[[], float]
) -> list[Case]:
    """Of what the command line names, or else of all operators and each family's smallest model.

    ValueError, naming the option, for what does not exist or fit together.
    """
    named = arguments.operator or arguments.model or arguments.module is not None
    both = PASSES if arguments.training else PASSES[:1]
    cases: list[Case] = []
    if arguments.operator or not named:
        passes = both if named else PASSES[:1] if arguments.quick else PASSES
        cases += operator_cases(_workloads(arguments, settings.batch), settings, passes, bytes_per_second)
    if unknown := [name for name in arguments.model if name not in models.list_models()]:
        raise ValueError(f"--model must be one of those that python -m models list shows, {unknown[0]!r} is none")
    chosen = {name: name for name in arguments.model} if named else workloads.MODELS
    cases += model_cases(chosen, settings, both, sizes, arguments.image)
    if arguments.module is not None:
        images = arguments.input or (settings.batch, 3, *sizes[0])
        cases += [module_case(arguments.module, images, settings, name) for name in both]
    return matching(cases, arguments.only, lambda case: case.name, "--only") if arguments.only else cases


def _workloads(arguments: argparse.Namespace, batch: int) -> list[Workload]:
    """The operators at the models' own shapes, or those that --operator names at --shape."""
    if arguments.shape is None:
        found = workloads.operator_workloads(batch)
        return matching(found, arguments.operator, lambda w: w.name, "--operator") if arguments.operator else found
    _, channels, *size = arguments.shape
    known = list(workloads.OPERATORS)
    parts = [name for name in arguments.operator if name not in known]  # a whole name is no part of another one's
    names = [name for name in known if name in arguments.operator or name in matching(known, parts, str, "--operator")]
    try:
        return [
            workloads.workload_of(
                name, batch=batch, channels=channels, size=(size[0], size[1]), kernel_size=arguments.kernel_size or 7
            )
            for name in names
        ]
    except ValueError as error:
        raise ValueError(f"--shape and --kernel-size must suit the operator: {error}") from None


def given_batch(arguments: argparse.Namespace) -> int | None:
    """--batch, or the first number of --shape or --input, which must be the same."""
    if arguments.shape is not None and (not arguments.operator or len(arguments.shape) != 4):
        raise ValueError("--shape must be BATCHxCHANNELSxHEIGHTxWIDTH, of an --operator")
    if arguments.kernel_size is not None and arguments.shape is None:
        raise ValueError("--kernel-size must come with --shape")
    if arguments.input is not None and arguments.module is None:
        raise ValueError("--input must come with --module")
    given = {"--batch": arguments.batch, "--shape": (arguments.shape or [None])[0]}
    given["--input"] = (arguments.input or [None])[0]
    found = {option: batch for option, batch in given.items() if batch is not None}
    if len(set(found.values())) > 1:
        texts = ", ".join(f"{option} {batch}" for option, batch in found.items())
        raise ValueError(f"--batch, --shape and --input must have the same batch, got {texts}")
    return next(iter(found.values()), None)
