"""Measure operators and models: ours against naive unfold, the same compiled, and what the hardware allows.

    python -m autotune bench --operator involution2d "contmix*" --out DIR
    python -m autotune bench --model overlock_t --out DIR

Without --operator, --model or --environment all three are run. Results are written after every row, so that whatever
happens, what was measured is kept: environment.json, bench.json (operators), models.json. Weights of models are random:
what is timed does not depend on them. Inference runs the form a trained model is deployed in. Compiling takes longer
than timing: with --jobs N it is done for N models at a time, each in a process; they are timed one after another when
all of them are compiled.

Exit code: 0 everything that was begun agrees and is timed, 1 something failed, 2 bad arguments, 4 the GPU was lost,
130 interrupted.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import kernels
import models
from autotune import networks, selection, timing, workloads
from autotune.cases import LOST, Case, read_record, release, run_cases, settled_rows, written
from autotune.ceilings import launch_overhead, measure_ceilings
from autotune.measure import Settings, beside_others, one_line
from autotune.operators import operator_cases
from autotune.passes import PASSES
from autotune.results import incidents, tables
from kernels.backend import BACKENDS, interpreting, triton_installed
from kernels.files import write_json
from models.commands import types
from models.commands.arguments import make_folder
from models.commands.dispatch import input_errors
from models.commands.progress import Bar, console
from models.registry import entry_point

LIBRARIES = ("torch", "triton", "torchvision", "timm", "numpy", "matplotlib", "pytest", "pytest-xdist")


class Plan(NamedTuple):
    """A model in one pass; ``compiled`` has what a compiler makes of it as well.

    ``latency`` is inference of a single image, compiled for that.
    """

    model: str
    kind: str = "inference"
    compiled: bool = False


PLANS = (  # the most telling first: where time is short, the last are skipped
    Plan("overlock_t"),
    Plan("overlock_t", "training"),
    *(Plan(name, "inference", compiled=True) for name in ("rednet50", "overlock_xt", "volo_d1")),
    *(Plan(name, "training", compiled=True) for name in ("overlock_xt", "rednet50", "volo_d1")),
    *(Plan(name, "latency", compiled=True) for name in ("overlock_t", "rednet50", "volo_d1")),
)
# What somebody would otherwise use: a network of as many operations, and VOLO's best known implementation.
PEERS = {
    "rednet50": ("torchvision", "resnet50"),
    "overlock_xt": ("torchvision", "convnext_tiny"),
    "volo_d1": ("timm", "volo_d1_224"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured").add_argument
    what("--operator", nargs="+", metavar="PATTERN", help="operators at the models' shapes, by name")
    what("--model", nargs="+", metavar="NAME", help="models, inference and training; '*': those of make gpu")
    what("--environment", action="store_true", help="versions, ceilings, and the host's time for a launch")
    how = parser.add_argument_group("how").add_argument
    how("--device", type=types.device, help="(default: a GPU if there is one)")
    how("--backend", choices=BACKENDS, default=kernels.get_backend(), help="(default: %(default)s)")
    how("--dtype", type=types.dtype, metavar="NAME", help="(default: bf16, on a CPU fp32)")
    how("--batch", type=types.positive, metavar="B", help="(default: 128; operators at 800x1280: 2)")
    how("--size", type=types.image_size, metavar="HxW", help="(default: 224, operators 800x1280 as well)")
    how(
        "--jobs", type=types.positive, default=1, metavar="N", help="models compiled at the same time, each timed alone"
    )
    how("--no-compile", action="store_true", help="leave out what torch.compile makes of things")
    how("--seconds", type=types.seconds, default=math.inf, metavar="S", help="measure no longer than that")
    how("--quick", action="store_true", help="smoke test: tiny shapes, two runs each; any device")
    how("--compile-only", action="store_true", help="only fill torch.compile's caches on disk")
    how("--resume", action="store_true", help="keep the rows that the files in --out hold already")
    text = "(default: notebooks/results/DEVICE; build/results/DEVICE for a part, which must not replace the whole)"
    how("--out", type=Path, metavar="DIR", help=text)


def _in_turns(found: Sequence[workloads.Workload]) -> list[workloads.Workload]:
    """Each operator's first shape, then each one's second, and so on; larger batches first.

    Where time is short, every operator has been measured.
    """
    seen = Counter[Any]()

    def place(workload: workloads.Workload) -> tuple[int, int]:
        seen[workload.output[0], workload.operator] += 1
        return -workload.output[0], seen[workload.output[0], workload.operator]

    return sorted(found, key=place)


def _model_cases(arguments: argparse.Namespace, settings: Settings) -> list[Case]:
    small, plans = arguments.quick, list[Plan]()
    for name in arguments.model or ["*"]:
        name = "rednet26" if small and name == "*" else name
        known = [plan for plan in PLANS if name in (plan.model, "*") and not small]
        if not known:
            entry_point(name, "--model")
        kinds = ("inference", "training", *(() if small else ("latency",)))
        plans += known or [Plan(name, kind, compiled=not small) for kind in kinds]
    batch, size = arguments.batch or (2 if small else 128), arguments.size or ((64, 64) if small else (224, 224))
    settings = dataclasses.replace(settings, seconds=4 * settings.seconds)
    cases = []
    for plan in dict.fromkeys(plans):
        count = 1 if plan.kind == "latency" else batch
        peer = PEERS.get(plan.model) if plan.compiled else None
        facts = {"name": plan.model, "model": plan.model, "batch": count, "size": list(size), "pass": plan.kind}
        facts |= {} if peer is None else {"peer": peer[1]}
        cases.append(Case(facts, functools.partial(_measure_plan, plan, peer, settings, count, size)))
    return cases


def _peer(library: str, name: str) -> nn.Module:
    """A network of torchvision or timm with random weights."""
    torch.manual_seed(0)
    if library == "timm":
        return importlib.import_module("timm").create_model(name, pretrained=False)
    return importlib.import_module("torchvision").models.get_model(name, weights=None)


def _measure_plan(
    plan: Plan, peer: tuple[str, str] | None, settings: Settings, batch: int, size: workloads.Size
) -> dict[str, Any]:
    """Ours with random weights, channels last, for inference in the form it is deployed in.

    Training drops no paths: a compiler draws other random numbers, and its results could not be compared.
    """
    training = plan.kind == "training"
    with torch.device("meta"):
        plain: Any = entry_point(plan.model)()
    options = {"drop_path_rate": 0.0, **plain.plain_options}
    place: dict[str, Any] = {"device": settings.device, "memory_format": torch.channels_last}
    how = {"training": training, "compiled": plan.compiled, "latency": plan.kind == "latency"}
    left_out, other = {}, None
    with beside_others(settings.lock) as alone:
        model = networks.settled_model(plan.model, networks.random_images(2, (128, 128)), **options).train(training)
        model = model if training else models.optimize_for_inference(model)
        model, images = model.to(**place), networks.random_images(batch, size).to(**place)
        if peer is not None:
            try:
                other = _peer(*peer).train(training).to(**place)
            except Exception as error:  # not installed, or beside another torch: ours is still worth its time
                left_out["peer"] = one_line(error)
        found = networks.measure_model(model, images, settings, **how, peer=other, alone=alone)
    return found | ({"left_out": found["left_out"] | left_out} if found else {})


def _environment(device: torch.device, *, quick: bool) -> dict[str, Any]:
    launchable = triton_installed() and (device.type == "cuda" or interpreting())
    console.print("Measuring the environment: ceilings, and the host's time for a launch")
    return {
        "libraries": {name: timing.version(name) for name in LIBRARIES},
        "ceilings": measure_ceilings(device, quick=quick),
        "launch_microseconds": launch_overhead(device, quick=quick) if launchable else None,
    }


def _known_ceilings(folder: Path, machine: dict[str, Any], device: torch.device, *, quick: bool) -> dict[str, float]:
    """Those of environment.json where it was written on this device, else measured."""
    path = folder / "environment.json"
    if path.exists():
        found = read_record(path, "machine", "ceilings")
        if found["machine"]["device"] == machine["device"]:
            return found["ceilings"]
    console.print("Measuring the ceilings: copies and matrix products")
    return measure_ceilings(device, quick=quick)


def run(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.seconds
    quick, device = arguments.quick, arguments.device or timing.best_device()
    settings = Settings(
        device,
        arguments.dtype or timing.usual_dtype(device),
        arguments.backend,
        seconds=0.01 if quick else 0.3,
        min_runs=2 if quick else 3,
        thorough=True,
        compiler=None if arguments.no_compile else "eager" if quick and device.type != "cuda" else "inductor",
        compile_only=arguments.compile_only,
        lock=tempfile.gettempdir() if arguments.jobs > 1 else None,
    )
    everything = not (arguments.environment or arguments.operator or arguments.model)
    folder = arguments.out or timing.results_folder(device, scratch=quick or not everything)
    machine = timing.describe_machine(device)
    names = ("device", "dtype", "backend", "compiler", "min_runs", "seconds")
    stated = {name: str(getattr(settings, name)).removeprefix("torch.") for name in names}
    codes: list[int] = []
    plans = dict[str, list[Case]]()  # file -> what is measured for it
    with input_errors():  # whatever is unknown or damaged is refused before anything is measured
        make_folder(folder, "--out")
        if arguments.operator or everything:
            found = workloads.benchmark_workloads(arguments.batch, arguments.size, quick=quick)
            found = selection.named(found, arguments.operator or ["*"])
            plans["bench.json"] = operator_cases(_in_turns(found), settings, PASSES)
        if arguments.model or everything:
            plans["models.json"] = _model_cases(arguments, settings)
        for file in plans if arguments.resume else ():
            settled_rows(folder / file)
        if arguments.environment or everything:
            environment = {"schema": 1, "machine": machine, **_environment(device, quick=quick)}
            codes.append(int(not written("environment", write_json, folder / "environment.json", environment)))
        if "bench.json" in plans and not arguments.compile_only:
            settings.ceilings.update(_known_ceilings(folder, machine, device, quick=quick))
    if arguments.compile_only:  # what fails here will say so when it is measured
        every = [case for cases in plans.values() for case in cases]
        with Bar(len(every), seconds=0) as bar:
            for case in every:
                bar.begin(case.name)
                bar.advance(1, f"{case.name}: {case.run(deadline)['status']}")
                release()
        return 0
    rows: dict[str, list[dict[str, Any]]] = {"bench.json": [], "models.json": []}
    for file, cases in plans.items():
        record = {"schema": 1, "complete": False, "machine": machine, "settings": stated}
        record |= {"ceilings": settings.ceilings} if file == "bench.json" else {}
        record["rows"] = rows[file]
        jobs = arguments.jobs if file == "models.json" else 1
        codes.append(run_cases(cases, folder / file, record, deadline=deadline, resume=arguments.resume, jobs=jobs))
        if codes[-1] == LOST:
            break
    for table in tables(*rows.values()):
        table.show()
    print(*incidents(itertools.chain(*rows.values())), f"Wrote {folder}", sep="\n")
    return max(codes, default=0)
