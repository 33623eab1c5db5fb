"""Run every operator and each model family's smallest variant, on our path and on the naive unfold path.

The models see a real photograph, with random weights: what they compute is checked and timed, not what it means.
Operators run at the shapes RedNet-50, OverLoCK-T and VOLO-D1 give them. On every line both paths must agree before
either is timed; a line that disagrees or fails is reported, and the exit code is 1.

Prints a table and writes profile.json and plots (PNG).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement

import kernels
from autotune import plots, progress, report, timing, workloads
from autotune.arguments import device, dtype, image_size, matching, positive, threads
from autotune.comparison import DisagreementError, Settings, measure_model, measure_operator
from autotune.workloads import Size
from kernels.backend import BACKENDS, interpreting, resolve

__all__ = ["add_arguments", "run"]

# How long to look, before anything is timed, whether the machine is busy with something else.
LOOK_SECONDS = 0.3

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One line of the table: what is known beforehand, and the function that measures the rest."""

    facts: dict[str, Any]
    measure: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.facts['name']} {self.facts['pass']}"

    def run(self) -> dict[str, Any]:
        """The row for profile.json; what ``measure`` raises becomes part of it."""
        try:
            return self.facts | {"status": "ok"} | self.measure()
        except DisagreementError as error:
            return self.facts | {"status": "failed", "message": str(error)}
        except Exception as error:  # one line's failure must not cost the others
            message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            return self.facts | {"status": "failed", "message": message, "traceback": traceback.format_exc()}


def operator_cases(settings: Settings, passes: Sequence[str], bytes_per_second: Callable[[], float]) -> Iterator[Case]:
    """Every operator workload at the settings' batch; the copy's speed is asked for only when a line needs it."""
    for workload in workloads.operator_workloads(settings.batch):
        for name in passes:
            facts = {
                "kind": "operator",
                "name": workload.name,
                "operator": workload.operator,
                "model": workload.model,
                "shape": workload.shape,
                "pass": name,
            }

            def measure(workload: workloads.Workload = workload, backward: bool = name == PASSES[1]) -> dict[str, Any]:
                return measure_operator(workload, settings, backward=backward, bytes_per_second=bytes_per_second())

            yield Case(facts, measure)


def model_cases(settings: Settings, passes: Sequence[str], sizes: Sequence[Size], image: Path | None) -> Iterator[Case]:
    """Each family's smallest variant on the photograph at every size."""
    photo = workloads.photograph(image)
    for model, title in workloads.MODELS.items():
        for size in sizes:
            for name in passes:
                shape = f"{size[0]}×{size[1]}"
                facts = {"kind": "model", "name": f"{model} {shape}", "model": title, "shape": shape, "pass": name}
                measure = functools.partial(measure_model, model, size, photo, settings, training=name == PASSES[1])
                yield Case(facts, measure)


def _image(text: str) -> Path:
    try:
        workloads.photograph(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    where.add_argument(
        "--backend",
        choices=BACKENDS,
        default=kernels.get_backend(),
        help="our path; auto is Triton on a GPU, eager elsewhere (default: %(default)s)",
    )
    where.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    what = parser.add_argument_group("what it runs")
    what.add_argument("--image", type=_image, metavar="PATH", help="photograph for the models (default: matplotlib's)")
    what.add_argument(
        "--sizes",
        type=image_size,
        nargs="+",
        metavar="HxW",
        default=[(224, 224), (320, 256)],
        help="of the image (default: 224 320x256)",
    )
    what.add_argument(
        "--batch", type=positive, metavar="B", help="(default: 4; on a GPU 128, or 16 if it has less than 40 GB)"
    )
    what.add_argument("--dtype", type=dtype, metavar="TYPE", help="fp32, fp16 or bf16 (default: fp32; on a GPU bf16)")
    what.add_argument("--training", action="store_true", help="models forward and backward, as operators always are")
    what.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="lines whose name contains this (or matches it, with * or ?), as in: --only involution2d volo_d1",
    )
    what.add_argument("--quick", action="store_true", help="smoke test: batch 1, forward only, one size, two runs each")
    output = parser.add_argument_group("what it leaves")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the files (default: notebooks/results/DEVICE; build/results/DEVICE with --quick or --only, "
        "so that a part never replaces the whole)",
    )
    output.add_argument("--json", action="store_true", help="print the content of profile.json instead of the table")


def _settings(arguments: argparse.Namespace) -> Settings:
    chosen = arguments.device or timing.best_device()
    if _implementation(arguments.backend, chosen) == "triton" and interpreting():
        raise ValueError("TRITON_INTERPRET=1 runs kernels in Python, and timing that means nothing; unset it")
    on_gpu = chosen.type == "cuda"
    batch = 4
    if on_gpu:
        batch = 128 if torch.cuda.get_device_properties(chosen).total_memory >= 40e9 else 16
    return Settings(
        device=chosen,
        dtype=arguments.dtype or (torch.bfloat16 if on_gpu else torch.float32),
        backend=arguments.backend,
        batch=arguments.batch or (1 if arguments.quick else batch),
        seconds=0 if arguments.quick else 1.5,
        min_runs=2 if arguments.quick else 3,
    )


def _implementation(backend: str, where: torch.device) -> str:
    return resolve(backend, torch.empty(0, device=where))


def _out_folder(arguments: argparse.Namespace, where: torch.device) -> Path:
    if arguments.out is not None:
        return arguments.out
    parent = "build" if arguments.quick or arguments.only else "notebooks"
    return (timing.repository_root() or Path.cwd()) / parent / "results" / timing.device_folder(where)


def _new_record(arguments: argparse.Namespace, settings: Settings, sizes: Sequence[Size]) -> dict[str, Any]:
    return {
        "schema": 1,
        "complete": False,
        "seconds": 0.0,
        "machine": timing.describe_machine(settings.device),
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "batch": settings.batch,
            "backend": settings.backend,
            "implementation": _implementation(settings.backend, settings.device),
            "sizes": sizes,
            "image": arguments.image.name if arguments.image else "matplotlib's portrait of Grace Hopper",
            "weights": "random",
            "only": arguments.only,
            "seconds_per_line": settings.seconds,
            "min_runs": settings.min_runs,
        },
        "other_cores": None,
        "copy_gigabytes_per_second": None,
        "rows": [],
    }


def run(arguments: argparse.Namespace) -> int:
    """0: all lines agree and are timed; 1: a line failed; 2: bad arguments; 130: interrupted, what is done is kept."""
    messages = Console(stderr=True, highlight=False)
    quick = arguments.quick
    sizes = list(dict.fromkeys(arguments.sizes))[: 1 if quick else None]

    @functools.cache
    def bytes_per_second() -> float:
        speed = timing.copy_bandwidth(settings.device, seconds=settings.seconds)
        record["copy_gigabytes_per_second"] = speed / 1e9
        return speed

    try:
        settings = _settings(arguments)
        cases = [
            *operator_cases(settings, PASSES[:1] if quick else PASSES, bytes_per_second),
            *model_cases(settings, PASSES if arguments.training else PASSES[:1], sizes, arguments.image),
        ]
        if arguments.only:
            cases = matching(cases, arguments.only, lambda case: case.name, "--only")
        folder = _out_folder(arguments, settings.device)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        messages.print(f"[red]error:[/] {escape(str(error))}")
        return 2

    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or threads)
    record = _new_record(arguments, settings, sizes)
    start, others = time.monotonic(), timing.OtherWork()
    time.sleep(LOOK_SECONDS)
    if (warning := report.busy(others.cores(), record["machine"]["cpu_count"])) is not None:
        messages.print(f"[yellow]warning:[/] {warning}; times will vary", soft_wrap=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 means float32, on both paths
            for row in progress.each(cases, Case.run, lambda case: case.name, _told):
                record["rows"].append(row)
                record["seconds"], record["other_cores"] = round(time.monotonic() - start, 1), others.cores()
                timing.write_json(folder / "profile.json", record)
        record["complete"] = True
    except KeyboardInterrupt:
        messages.print("[yellow]interrupted[/]; what was done by then is kept")
    finally:
        torch.set_num_threads(threads)
    if arguments.json:  # before anything is written: a full disk does not lose what was measured
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _print(record)
    timing.write_json(folder / "profile.json", record)
    source = report.fingerprint(record)
    drawn = [plots.save(figure, folder / file, source) for file, figure in report.figures(record).items()]
    if not arguments.json:
        names = ", ".join(str(file) for file in (folder / "profile.json", *drawn))
        Console(highlight=False).print(f"{record['seconds']:.0f} s. Wrote {escape(names)}", soft_wrap=True)
    if not record["complete"]:
        return 130
    return int(any(row["status"] != "ok" for row in record["rows"]))


def _told(row: dict[str, Any]) -> str:
    return f"{report.number(row['speed_up'])}×" if row["status"] == "ok" else f"failed, {row['message']}"


def _print(record: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = report.table(record)
    # Where the terminal is too narrow, wrapped lines lose less than columns cut short.
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table)
    for warning in report.warnings(record):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for row in record["rows"]:
        if row["status"] != "ok":
            console.print(
                f"[red]failed[/] {escape(row['name'])} {row['pass']}: {escape(row['message'])}", soft_wrap=True
            )
