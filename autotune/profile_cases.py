"""What ``profile`` measures: all operators and each family's smallest model, or what a command line names."""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import models
from autotune import networks, workloads
from autotune.arguments import matching
from autotune.cases import Case
from autotune.measure import Settings
from autotune.networks import measure_model
from autotune.operators import operator_cases
from autotune.passes import PASSES
from autotune.workloads import Size, Workload

SMALLEST = {"overlock_xt": "OverLoCK-XT", "rednet26": "RedNet-26", "volo_d1": "VOLO-D1"}  # each family's


def ours_and_naive(found: dict[str, Any]) -> dict[str, Any]:
    """A row of profile.json: the two paths side by side. RuntimeError where the naive one could not be timed."""
    if "naive" in found["left_out"]:
        raise RuntimeError(f"the naive path: {found['left_out']['naive']}")
    paths, ratio = found.pop("contenders"), found.pop("speed_up")["naive"]
    images = [times.pop("images_per_second", None) for times in paths.values()]
    kept = {name: found[name] for name in ("relative_error", "tolerance", "floor") if name in found}
    return {**kept, **paths, "speed_up": ratio} | ({"images_per_second": images[0]} if images[0] else {})


def _model_cases(
    arguments: argparse.Namespace, settings: Settings, batch: int, sizes: Sequence[Size], passes: Sequence[str]
) -> Iterator[Case]:
    """Models on the photograph at every size, and a module of the user's on random inputs."""
    named = arguments.operator or arguments.model or arguments.module is not None
    chosen = {name: name for name in arguments.model} if named else SMALLEST

    def family(name: str, size: Size, training: bool) -> dict[str, Any]:
        photo = networks.photograph()
        model = networks.photograph_model(name, photo).to(settings.device)
        images = networks.image_batch(photo, size, batch, torch.float32, settings.device)
        return measure_model(model, images, settings, training=training)

    def own(shape: Sequence[int], training: bool) -> dict[str, Any]:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(settings.device)
        model = copy.deepcopy(arguments.module).to(settings.device).float()
        return measure_model(model, images, settings, training=training)

    measured = [(n, t, f"{s[0]}×{s[1]}", functools.partial(family, n, s)) for n, t in chosen.items() for s in sizes]
    if arguments.module is not None:
        title, shape = type(arguments.module).__name__, arguments.input or (batch, 3, *sizes[0])
        measured.append((title, title, "×".join(map(str, shape)), functools.partial(own, shape)))
    for name, title, shape, measure in measured:
        for kind in passes:
            facts = {"kind": "model", "name": f"{name} {shape}", "model": title, "shape": shape, "pass": kind}
            training = kind == PASSES[1]
            yield Case(facts, lambda measure=measure, training=training: ours_and_naive(measure(training=training)))


def chosen_cases(arguments: argparse.Namespace, settings: Settings, batch: int, sizes: Sequence[Size]) -> list[Case]:
    """Cases of what the command line names, or else of all operators and each family's smallest model.

    ValueError, naming the option, for what does not exist or fit together.
    """
    named = arguments.operator or arguments.model or arguments.module is not None
    both = PASSES if arguments.training else PASSES[:1]
    cases: list[Case] = []
    if arguments.operator or not named:
        passes = both if named else PASSES[:1] if arguments.quick else PASSES
        cases += operator_cases(_workloads(arguments, batch), settings, passes, ours_and_naive)
    if unknown := [name for name in arguments.model if name not in models.list_models()]:
        raise ValueError(f"--model must be a name that python -m models list shows, got {unknown[0]!r}")
    cases += _model_cases(arguments, settings, batch, sizes, both)
    return matching(cases, arguments.only, lambda case: case.name, "--only") if arguments.only else cases


def _workloads(arguments: argparse.Namespace, batch: int) -> list[Workload]:
    """The operators at the models' own shapes, or those that --operator names at --shape."""
    if arguments.shape is None:
        found = workloads.operator_workloads(batch)
        return matching(found, arguments.operator, lambda w: w.name, "--operator") if arguments.operator else found
    _, channels, *size = arguments.shape
    shape: dict[str, Any] = {"batch": batch, "channels": channels, "size": tuple(size)}
    shape["kernel_size"] = arguments.kernel_size or 7
    names = matching(list(workloads.OPERATORS), arguments.operator, str, "--operator")
    try:
        return [workloads.workload_of(name, **shape) for name in names]
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
