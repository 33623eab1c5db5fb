"""Measure operators and models: ours against naive unfold, the same compiled, peers, and what the hardware allows.

    python -m autotune bench --operator involution2d "contmix*" --out DIR
    python -m autotune bench --model overlock_t --out DIR
    python -m autotune bench --suite                    all of it, tests and tuning included, in under nine minutes

Without --operator, --model or --environment all three are run. Results are written after every row, so that whatever
happens, what was measured is kept: environment.json, bench.json (operators), models.json.

Exit code: 0 everything that was begun agrees and is timed, 1 something failed, 2 bad arguments, 4 the GPU was lost,
130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import kernels
from autotune import arguments as types
from autotune import timing
from autotune.cases import LOST, Case, compile_cases, read_record, run_cases, settled_rows, written
from kernels.backend import BACKENDS

__all__ = ["add_arguments", "results_folder", "run"]

LIBRARIES = ("torch", "triton", "torchvision", "timm", "numpy", "matplotlib", "pytest", "pytest-xdist")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument("--operator", nargs="+", metavar="PATTERN", help="operators at the models' shapes, by name")
    what.add_argument("--model", nargs="+", metavar="NAME", help="models, inference and training; '*': the suite's")
    what.add_argument("--environment", action="store_true", help="versions, ceilings, and the host's time for a launch")
    what.add_argument("--suite", action="store_true", help="everything, with the tests and tuning, within nine minutes")
    how = parser.add_argument_group("how")
    how.add_argument("--device", type=types.device, help="(default: a GPU if there is one)")
    how.add_argument("--backend", choices=BACKENDS, default=kernels.get_backend(), help="(default: %(default)s)")
    how.add_argument("--dtype", type=types.dtype, metavar="NAME", help="(default: bf16, on a CPU fp32)")
    how.add_argument("--batch", type=types.positive, metavar="B", help="(default: 128; operators at 800x1280: 2)")
    how.add_argument("--size", type=types.image_size, metavar="HxW", help="(default: 224, operators 800x1280 as well)")
    how.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes of things")
    how.add_argument("--seconds", type=types.seconds, default=math.inf, metavar="S", help="measure no longer than that")
    how.add_argument("--quick", action="store_true", help="smoke test: tiny shapes, two runs each; any device")
    how.add_argument("--compile-only", action="store_true", help="only fill torch.compile's caches on disk")
    how.add_argument("--resume", action="store_true", help="keep the rows that the files in --out hold already")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="(default: notebooks/results/DEVICE; --quick: build/...)"
    )


def _operator_cases(arguments: argparse.Namespace, settings: dict[str, Any], ceilings: dict[str, float]) -> list[Case]:
    from autotune.bench_operators import PASSES, OperatorBench, benchmark_workloads

    bench = OperatorBench(ceilings=ceilings, **settings)
    workloads = benchmark_workloads(arguments.batch, arguments.size, quick=arguments.quick)
    cases = []
    for workload in types.matching(workloads, arguments.operator or ["*"], lambda w: w.name, "--operator"):
        for name in PASSES:
            facts = {
                "name": workload.name,
                "operator": workload.operator,
                "model": workload.model,
                "shape": workload.shape,
                "batch": workload.output[0],
                "pass": name,
            }
            backward = name == PASSES[1]
            cases.append(
                Case(
                    facts,
                    functools.partial(bench.measure, workload, backward=backward),
                    functools.partial(bench.compile_only, workload, backward=backward),
                )
            )
    return cases


def _model_cases(arguments: argparse.Namespace, settings: dict[str, Any]) -> list[Case]:
    import models
    from autotune.bench_models import PLANS, ModelBench, Plan

    small = arguments.quick
    plans: list[Plan] = []
    for name in arguments.model or (["rednet26"] if small else []):
        known = [plan for plan in PLANS if name in (plan.model, "*") and not small]
        if not known and name not in models.list_models():
            raise ValueError(f"--model must be one of {', '.join(models.list_models())}; got {name!r}")
        plans += known or [
            *(Plan(name, training, compiled=not small) for training in (False, True)),
            *([] if small else [Plan(name, compiled=True, latency=True)]),
        ]
    batch, size = arguments.batch or (2 if small else 128), arguments.size or ((64, 64) if small else (224, 224))
    bench = ModelBench(batch=batch, size=size, **settings | {"seconds": 4 * settings["seconds"]})
    return [
        Case(
            {
                "name": plan.model,
                "model": plan.model,
                "peer": None if plan.peer is None else " ".join(plan.peer),
                "batch": bench.batch_of(plan),
                "size": list(size),
                "pass": plan.kind,
            },
            functools.partial(bench.measure, plan),
            functools.partial(bench.compile_only, plan),
        )
        for plan in plans or PLANS
    ]


def _environment(device: torch.device, *, quick: bool) -> dict[str, Any]:
    from autotune.ceilings import launch_overhead, measure_ceilings
    from kernels.backend import interpreting, triton_installed

    libraries: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            libraries[name] = None
    launchable = triton_installed() and (device.type == "cuda" or interpreting())
    return {
        "libraries": libraries,
        "ceilings": measure_ceilings(device, quick=quick),
        "launch_microseconds": launch_overhead(device, quick=quick) if launchable else None,
    }


def _known_ceilings(folder: Path, machine: dict[str, Any], device: torch.device, *, quick: bool) -> dict[str, float]:
    """Those of environment.json where it was written on this device, else measured."""
    from autotune.ceilings import measure_ceilings

    path = folder / "environment.json"
    if path.exists():
        found = read_record(path, "machine", "ceilings")
        if found["machine"]["device"] == machine["device"]:
            return found["ceilings"]
    return measure_ceilings(device, quick=quick)


def run(arguments: argparse.Namespace) -> int:
    if arguments.suite:
        from autotune import suite

        return suite.run(arguments)
    messages = Console(stderr=True, highlight=False)
    deadline = time.monotonic() + arguments.seconds
    quick, device = arguments.quick, arguments.device or timing.best_device()
    on_gpu = device.type == "cuda"
    compiler = None if arguments.no_compile else "eager" if quick and not on_gpu else "inductor"
    settings = {
        "device": device,
        "dtype": arguments.dtype or (torch.bfloat16 if on_gpu else torch.float32),
        "backend": arguments.backend,
        "compiler": compiler,
        "min_runs": 2 if quick else 3,
        "seconds": 0.01 if quick else 0.5,
    }
    everything = not (arguments.environment or arguments.operator or arguments.model)
    folder = arguments.out or results_folder(device, quick=quick)
    machine = timing.describe_machine(device)
    codes: list[int] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.environment or everything:
            record = {"schema": 1, "machine": machine, **_environment(device, quick=quick)}
            codes.append(int(not written(folder / "environment.json", record, "environment")))
        plans: list[tuple[str, list[Case], dict[str, Any]]] = []
        if arguments.operator or everything:
            ceilings = {} if arguments.compile_only else _known_ceilings(folder, machine, device, quick=quick)
            plans.append(("bench.json", _operator_cases(arguments, settings, ceilings), {"ceilings": ceilings}))
        if arguments.model or everything:
            plans.append(("models.json", _model_cases(arguments, settings), {}))
        for file, _, _ in plans if arguments.resume else ():
            settled_rows(folder / file)  # a damaged file is refused before anything is measured
    except (ValueError, OSError) as error:
        messages.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    try:
        for file, cases, facts in plans:
            if arguments.compile_only:
                codes.append(compile_cases(cases, deadline))
                continue
            stated = {name: str(value).removeprefix("torch.") for name, value in settings.items()}
            record = {"schema": 1, "complete": False, "machine": machine, "settings": stated, **facts}
            codes.append(run_cases(cases, folder / file, record, deadline=deadline, resume=arguments.resume))
            if codes[-1] == LOST:
                break
    except KeyboardInterrupt:
        messages.print("[yellow]interrupted[/]; what was done by then is kept")
        return 130
    if not arguments.compile_only:
        _print(folder)
    return max(codes, default=0)


def results_folder(device: torch.device, *, quick: bool) -> Path:
    parent = "build" if quick else "notebooks"
    return (timing.repository_root() or Path.cwd()) / parent / "results" / timing.device_folder(device)


def _print(folder: Path) -> None:
    from autotune.targets import tables

    console = Console(highlight=False)
    console.width = max(console.width, 130)
    try:
        for table in tables(folder):
            console.print(table)
    except ValueError as error:  # an earlier run's file
        console.print(f"[yellow]warning:[/] {escape(f'{folder} holds a damaged file: {error}')}", soft_wrap=True)
    console.print(f"Wrote {escape(str(folder))}", soft_wrap=True)
