"""Run every operator and each model family's smallest variant, on our path and on the naive unfold path.

The models see a real photograph, with random weights: what they compute is checked and timed, not what it means.
Operators run at the shapes RedNet-50, OverLoCK-T and VOLO-D1 give them. On every line both paths must agree before
either is timed; a line that disagrees or fails is reported, and the exit code is 1.

``--operator``, ``--model`` and ``--module`` run what they name instead, at a shape of one's own:

    python -m autotune profile --operator involution2d --shape 8x64x56x56 --kernel-size 7 --dtype bf16 --backward
    python -m autotune profile --model overlock_t --size 320x256 --batch 8
    python -m autotune profile --module mypackage.nets:Net --input 8x3x224x224

Prints a table and writes profile.json and plots (PNG). With ``--against`` it also says what became faster or slower
than an earlier profile.json, and the exit code is 1 where anything became slower.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

import kernels
from autotune import against, plots, progress, report, timing, workloads
from autotune.arguments import Number, device, dtype, image_size, module, positive, shape, threads
from autotune.cases import Case, written
from autotune.comparison import Settings
from autotune.lines import chosen_cases, given_batch
from autotune.workloads import Size
from kernels.backend import BACKENDS, interpreting, resolve

__all__ = ["add_arguments", "run"]

# How long to look, before anything is timed, whether the machine is busy with something else.
LOOK_SECONDS = 0.3


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
    what = parser.add_argument_group("what it runs (default: every operator, and each family's smallest model)")
    what.add_argument(
        "--operator",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="operators by name, at the models' shapes or --shape",
    )
    what.add_argument("--shape", type=shape, metavar="BxCxHxW", help="of --operator's map, as in: 8x64x56x56")
    what.add_argument("--kernel-size", type=positive, metavar="K", help="of --operator at --shape (default: 7)")
    what.add_argument("--model", nargs="+", default=[], metavar="NAME", help="models, as models list names them")
    what.add_argument("--module", type=module, metavar="MODULE:NAME", help="your own, as in: mypackage.nets:Net")
    what.add_argument("--input", type=shape, metavar="BxCxHxW", help="of --module (default: from --batch and --size)")
    what.add_argument("--image", type=_image, metavar="PATH", help="photograph for the models (default: matplotlib's)")
    what.add_argument(
        "--size",
        "--sizes",
        dest="sizes",
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
    what.add_argument(
        "--training",
        "--backward",
        dest="training",
        action="store_true",
        help="forward and backward as well, as all operators are where none is named",
    )
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
        help="folder for the files (default: notebooks/results/DEVICE; build/results/DEVICE for a part, "
        "so that it never replaces the whole)",
    )
    output.add_argument(
        "--against",
        type=Path,
        metavar="RESULTS.json",
        help="an earlier profile.json: say what became faster or slower; 1 is the exit code if anything became slower",
    )
    output.add_argument(
        "--threshold",
        type=Number(above=0),
        default=0.1,
        metavar="X",
        help="share of a time from which a change counts (default: %(default)s)",
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
        batch=given_batch(arguments) or (1 if arguments.quick else batch),
        seconds=0 if arguments.quick else 1.5,
        min_runs=2 if arguments.quick else 3,
    )


def _implementation(backend: str, where: torch.device) -> str:
    return resolve(backend, torch.empty(0, device=where))


def _out_folder(arguments: argparse.Namespace, where: torch.device) -> Path:
    if arguments.out is not None:
        return arguments.out
    part = arguments.quick or arguments.only or arguments.operator or arguments.model or arguments.module is not None
    parent = "build" if part or arguments.against else "notebooks"
    return (timing.repository_root() or Path.cwd()) / parent / "results" / timing.device_folder(where)


def _new_record(arguments: argparse.Namespace, settings: Settings, sizes: Sequence[Size]) -> dict[str, Any]:
    image = arguments.image.name if arguments.image else "matplotlib's portrait of Grace Hopper"
    weights = "random"
    if arguments.module is not None:
        image, weights = "random inputs", "the module's own"
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
            "image": image,
            "weights": weights,
            "only": arguments.only,
            "seconds_per_line": settings.seconds,
            "min_runs": settings.min_runs,
        },
        "other_cores": None,
        "copy_gigabytes_per_second": None,
        "rows": [],
    }


def run(arguments: argparse.Namespace) -> int:
    """The exit code.

    0: all lines agree and are timed; 1: a line failed, became slower or could not be written; 2: bad arguments;
    130: interrupted, and what was done by then is kept.
    """
    messages = Console(stderr=True, highlight=False)
    quick = arguments.quick
    sizes = list(dict.fromkeys(arguments.sizes))[: 1 if quick else None]

    @functools.cache
    def bytes_per_second() -> float:
        speed = timing.copy_bandwidth(settings.device, seconds=settings.seconds)
        record["copy_gigabytes_per_second"] = speed / 1e9
        return speed

    threads = torch.get_num_threads()
    try:
        settings = _settings(arguments)
        cases = chosen_cases(arguments, settings, sizes, bytes_per_second)
        torch.set_num_threads(arguments.threads or threads)
        record = _new_record(arguments, settings, sizes)
        earlier = {}
        if arguments.against is not None:
            earlier = against.earlier_rows(arguments.against, record, (case.name for case in cases))
        folder = _out_folder(arguments, settings.device)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        torch.set_num_threads(threads)
        messages.print(f"[red]error:[/] {escape(str(error))}")
        return 2

    start, others, on_disk = time.monotonic(), timing.OtherWork(), True
    time.sleep(LOOK_SECONDS)
    if (warning := report.busy(others.cores(), record["machine"]["cpu_count"])) is not None:
        messages.print(f"[yellow]warning:[/] {warning}; times will vary", soft_wrap=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 means float32, on both paths
            for row in progress.each(cases, Case.run, lambda case: case.name, _told):
                record["rows"].append(row)
                record["seconds"], record["other_cores"] = round(time.monotonic() - start, 1), others.cores()
                on_disk &= written(folder / "profile.json", record, f"{row['name']} {row['pass']}")
        record["complete"] = True
    except KeyboardInterrupt:
        messages.print("[yellow]interrupted[/]; what was done by then is kept")
    finally:
        torch.set_num_threads(threads)
    changes = against.differences(record["rows"], earlier, arguments.threshold)
    if arguments.against is not None:
        record["against"] = {"file": arguments.against.name, "threshold": arguments.threshold, "rows": changes}
    if arguments.json:  # before anything is written: a full disk does not lose what was measured
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _print(record)
        if arguments.against is not None:
            _show(Console(highlight=False), against.table(changes, str(arguments.against), arguments.threshold))
    on_disk &= written(folder / "profile.json", record, "all rows")
    source, drawn = report.fingerprint(record), []
    for file, figure in report.figures(record).items():
        try:
            drawn.append(plots.save(figure, folder / file, source))
        except OSError as error:
            on_disk = False
            messages.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
    if not arguments.json and on_disk:
        names = ", ".join(str(file) for file in (folder / "profile.json", *drawn))
        Console(highlight=False).print(f"{record['seconds']:.0f} s. Wrote {escape(names)}", soft_wrap=True)
    if not record["complete"]:
        return 130
    slower = any(change["verdict"] == "slower" for change in changes)
    return int(slower or not on_disk or any(row["status"] != "ok" for row in record["rows"]))


def _told(row: dict[str, Any]) -> str:
    return f"{report.number(row['speed_up'])}×" if row["status"] == "ok" else f"failed, {row['message']}"


def _show(console: Console, table: Table) -> None:
    # Where the terminal is too narrow, wrapped lines lose less than columns cut short.
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table)


def _print(record: dict[str, Any]) -> None:
    console = Console(highlight=False)
    _show(console, report.table(record))
    for warning in report.warnings(record):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for row in record["rows"]:
        if row["status"] != "ok":
            console.print(
                f"[red]failed[/] {escape(row['name'])} {row['pass']}: {escape(row['message'])}", soft_wrap=True
            )
