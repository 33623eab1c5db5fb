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
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import kernels
from autotune import plots, report, timing
from autotune.arguments import module, shape
from autotune.cases import run_cases, written
from autotune.lines import chosen_cases, given_batch
from autotune.measure import Settings
from autotune.workloads import Size
from kernels.backend import BACKENDS, interpreting, resolve
from models.commands.types import Number, device, dtype, image_size, positive, threads

# How long to look, before anything is timed, whether the machine is busy with something else.
LOOK_SECONDS = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where it runs").add_argument
    where("--device", type=device, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    text = "our path; auto is Triton on a GPU, eager elsewhere (default: %(default)s)"
    where("--backend", choices=BACKENDS, default=kernels.get_backend(), help=text)
    where("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    what = parser.add_argument_group("what it runs (default: all operators, each family's smallest model)").add_argument
    several: dict[str, Any] = {"nargs": "+", "default": []}
    what("--operator", metavar="PATTERN", help="operators by name, at the models' shapes or --shape", **several)
    what("--shape", type=shape, metavar="BxCxHxW", help="of --operator's map, as in: 8x64x56x56")
    what("--kernel-size", type=positive, metavar="K", help="of --operator at --shape (default: 7)")
    what("--model", metavar="NAME", help="models, as models list names them", **several)
    what("--module", type=module, metavar="MODULE:NAME", help="your own, as in: mypackage.nets:Net")
    what("--input", type=shape, metavar="BxCxHxW", help="of --module (default: from --batch and --size)")
    sizes: dict[str, Any] = {"dest": "sizes", "nargs": "+", "default": [(224, 224), (320, 256)]}
    what("--size", "--sizes", type=image_size, metavar="HxW", help="of the image (default: 224 320x256)", **sizes)
    text = "(default: 4; on a GPU 128, or 16 if it has less than 40 GB)"
    what("--batch", type=positive, metavar="B", help=text)
    what("--dtype", type=dtype, metavar="TYPE", help="fp32, fp16 or bf16 (default: fp32; on a GPU bf16)")
    text = "forward and backward as well, as all operators are where none is named"
    what("--training", "--backward", dest="training", action="store_true", help=text)
    text = "lines whose name contains this (or matches it, with * or ?), as in: --only involution2d volo_d1"
    what("--only", metavar="PATTERN", help=text, **several)
    what("--quick", action="store_true", help="smoke test: batch 1, forward only, one size, two runs each")
    leaves = parser.add_argument_group("what it leaves").add_argument
    text = "(default: notebooks/results/DEVICE; build/results/DEVICE for a part, which must not replace the whole)"
    leaves("--out", type=Path, metavar="DIR", help=text)
    text = "an earlier profile.json: say what became faster or slower; the exit code is 1 if anything became slower"
    leaves("--against", type=Path, metavar="RESULTS.json", help=text)
    text = "share of a time from which a change counts (default: %(default)s)"
    leaves("--threshold", type=Number(above=0), default=0.1, metavar="X", help=text)
    leaves("--json", action="store_true", help="print the content of profile.json instead of the table")


def _settings(arguments: argparse.Namespace) -> tuple[Settings, int]:
    """How everything is measured, and the batch."""
    chosen = arguments.device or timing.best_device()
    if _implementation(arguments.backend, chosen) == "triton" and interpreting():
        raise ValueError("TRITON_INTERPRET=1 runs kernels in Python, and timing that means nothing; unset it")
    on_gpu, quick = chosen.type == "cuda", arguments.quick
    batch = 4
    if on_gpu:
        batch = 128 if torch.cuda.get_device_properties(chosen).total_memory >= 40e9 else 16
    dtype = arguments.dtype or (torch.bfloat16 if on_gpu else torch.float32)
    settings = Settings(chosen, dtype, arguments.backend, 0 if quick else 1.5, 2 if quick else 3)
    return settings, given_batch(arguments) or (1 if quick else batch)


def _implementation(backend: str, where: torch.device) -> str:
    return resolve(backend, torch.empty(0, device=where))


def _out_folder(arguments: argparse.Namespace, where: torch.device) -> Path:
    part = arguments.quick or arguments.only or arguments.operator or arguments.model or arguments.module is not None
    return arguments.out or timing.results_folder(where, scratch=bool(part or arguments.against))


def _new_record(arguments: argparse.Namespace, settings: Settings, batch: int, sizes: Sequence[Size]) -> dict[str, Any]:
    image, weights = "matplotlib's portrait of Grace Hopper", "random"
    if arguments.module is not None:
        image, weights = "random inputs", "the module's own"
    return {
        "schema": 1,
        "complete": False,
        "seconds": 0.0,
        "machine": timing.describe_machine(settings.device),
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."),
            "batch": batch,
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
    4: the GPU was lost; 130: interrupted, and what was done by then is kept.
    """
    messages = Console(stderr=True, highlight=False)
    sizes = list(dict.fromkeys(arguments.sizes))[: 1 if arguments.quick else None]
    threads = torch.get_num_threads()
    try:
        settings, batch = _settings(arguments)
        cases = chosen_cases(arguments, settings, batch, sizes)
        torch.set_num_threads(arguments.threads or threads)
        record = _new_record(arguments, settings, batch, sizes)
        earlier = {}
        if arguments.against is not None:
            earlier = report.earlier_rows(arguments.against, record, (case.name for case in cases))
        folder = _out_folder(arguments, settings.device)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        torch.set_num_threads(threads)
        messages.print(f"[red]error:[/] {escape(str(error))}")
        return 2

    path, start, others = folder / "profile.json", time.monotonic(), report.OtherWork()
    time.sleep(LOOK_SECONDS)
    if (warning := report.busy(others.cores(), record["machine"]["cpu_count"])) is not None:
        messages.print(f"[yellow]warning:[/] {warning}; times will vary", soft_wrap=True)
    try:
        if any(case.facts["kind"] == "operator" for case in cases):
            speed = timing.copy_bandwidth(settings.device, seconds=settings.seconds)
            settings.ceilings["copy_bytes_per_second"], record["copy_gigabytes_per_second"] = speed, speed / 1e9
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 means float32, on both paths
            code = run_cases(cases, path, record)
    except KeyboardInterrupt:
        messages.print("[yellow]interrupted[/]; what was done by then is kept")
        code = 130
    finally:
        torch.set_num_threads(threads)
    record["seconds"], record["other_cores"] = round(time.monotonic() - start, 1), others.cores()
    changes = report.differences(record["rows"], earlier, arguments.threshold)
    if arguments.against is not None:
        record["against"] = {"file": arguments.against.name, "threshold": arguments.threshold, "rows": changes}
    if arguments.json:  # before anything is written: a full disk does not lose what was measured
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _print(record)
        if arguments.against is not None:
            source = str(arguments.against)
            report.against_table(changes, source, arguments.threshold).show(Console(highlight=False))
    source, files, on_disk = report.fingerprint(record), [path], written(path, record, "the whole record")
    for file, figure in report.figures(record).items():
        try:
            files.append(plots.save(figure, folder / file, source))
        except OSError as error:
            on_disk = False
            messages.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
    if not arguments.json and on_disk:
        names = ", ".join(map(str, files))
        Console(highlight=False).print(f"{record['seconds']:.0f} s. Wrote {escape(names)}", soft_wrap=True)
    return code or int(not on_disk or any(change["verdict"] == "slower" for change in changes))


def _print(record: dict[str, Any]) -> None:
    console = Console(highlight=False)
    report.table(record).show(console)
    for warning in report.warnings(record):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for row in record["rows"]:
        if row["status"] != "ok":
            console.print(
                f"[red]failed[/] {escape(row['name'])} {row['pass']}: {escape(row['message'])}", soft_wrap=True
            )
