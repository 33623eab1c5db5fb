"""Bring every number of the README and of notebooks/results/README.md in line with the committed results.

Tables stand between markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and are written from files under
notebooks/results: models.json (parameters and multiply-adds, counted; --count counts them again), compiled.json
(kernels built ahead of time; --compile builds them again), predicted/*.json (written by predicted/collect.py),
<device>/profile.json, and what a GPU's folder holds (autotune/pages.py says what). The tuned configs are those of
kernels/tuning/configs. Figures are drawn again from the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch.utils.flop_counter import FlopCounterMode

from autotune import pages, plots, report, timing
from autotune.results import microseconds
from autotune.tables import Table, number
from kernels.files import atomic_write, write_json
from kernels.tuning.store import shipped_folder

# Parameters in millions, multiply-adds in G at 224x224 (None: not published), as the papers state them. OverLoCK counts
# its reparameterised form without the auxiliary head.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "overlock_xt_reparam": (16, 2.6),
    "overlock_t_reparam": (33, 5.5),
    "overlock_s_reparam": (56, 9.7),
    "overlock_b_reparam": (95, 16.7),
    "rednet26": (9.23, 1.73),
    "rednet38": (12.39, 2.22),
    "rednet50": (15.54, 2.71),
    "rednet101": (25.65, 4.74),
    "rednet152": (33.98, 6.79),
    "volo_d1": (26.6, 6.8),
    "volo_d2": (58.7, None),
    "volo_d3": (86.3, None),
    "volo_d4": (193, None),
    "volo_d5": (295.5, None),
}


def count_model(name: str) -> dict[str, float]:
    """Parameters (millions) and multiply-adds (G) of one 224x224 image, counted on the meta device."""
    import models

    with torch.device("meta"):
        model = models.create_model(name).eval()
        image = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    parameters = sum(
        p.numel() for key, p in model.named_parameters() if not key.startswith("aux_head.") or "volo" in name
    )
    return {"parameters_m": parameters / 1e6, "multiply_adds_g": counter.get_total_flops() / 2e9}


def _published_table(top1: dict[str, float]) -> str:
    """A line per family: the variants side by side."""
    rows = []
    for family, paper, sizes in (
        ("OverLoCK", "2502.20087", "any, from 32 pixels up"),
        ("RedNet", "2103.06255", "any, from 32 pixels up"),
        ("VOLO", "2106.13112", "`img_size` (224), other sizes resized"),
    ):
        published = {name: numbers for name, numbers in PUBLISHED.items() if name.startswith(family.lower())}
        columns = [
            [f"`{name.removesuffix('_reparam')}`" for name in published],
            [f"{parameters:g}" for parameters, _ in published.values()],
            ["–" if operations is None else f"{operations:g}" for _, operations in published.values()],
            [f"{top1[name]:g}" for name in published],
        ]
        rows.append([f"[{family}](https://arxiv.org/abs/{paper})", *map(" · ".join, columns), sizes])
    headings = ["family", "variants", "parameters, M", "multiply-adds at 224², G", "ImageNet top-1, %", "input"]
    return Table(headings, rows, 6).markdown()


def _models_table(counted: dict[str, dict[str, float]], top1: dict[str, float]) -> str:
    rows = []
    for name, (parameters, operations) in PUBLISHED.items():
        ours, published = counted[name], "–" if operations is None else f"{operations:g}"
        counts = f"{ours['parameters_m']:.2f}", published, f"{ours['multiply_adds_g']:.2f}"
        rows.append([f"`{name}`", f"{parameters:g}", *counts, f"{top1[name]:g}"])
    headings = ["model", "parameters, M: published", "counted", "multiply-adds, G at 224²: published", "counted"]
    return Table([*headings, "top-1, %: published"], rows).markdown()


def _profile_table(record: dict[str, Any]) -> str:
    machine, settings = record["machine"], record["settings"]
    if failed := [f"{row['name']} {row['pass']}" for row in record["rows"] if row["status"] != "ok"]:
        raise ValueError(f"profile.json holds a failed line, {failed[0]}: it is no result to publish")
    table = report.table(record)
    return (
        f"{machine['device']}, torch {machine['torch']}, {settings['dtype']}, batch {settings['batch']}; "
        f"our path here: {settings['implementation']}. {' '.join(table.notes)}\n\n{table.markdown()}"
    )


def _compiled_table(record: dict[str, Any]) -> str:
    counted = ("registers", "spilled_bytes", "shared_bytes", "tensor_core", "fma")
    rows = [
        [row["case"], row["kernel"].removesuffix("_kernel"), *(str(row[name]) for name in counted),
         number(row["shuffles_per_output"]), number(row["bytes_per_output"])]
        for row in record["reports"]
    ]  # fmt: skip
    headings = ["shape", "kernel", "registers", "spilled, B", "shared, B", "tensor cores", "FMA", "shuffles/out"]
    table = Table([*headings, "bytes/out"], rows, 2).markdown()
    return f"triton {record['triton']}, {record['architecture']}, {record['dtype']}.\n\n{table}"


def _tuned_table(record: dict[str, Any]) -> str:
    """The shipped configs of a GPU: what the heuristic's choice takes, and the tuned one."""
    values: dict[str, dict[str, set[str]]] = {}
    for key in record["entries"]:
        kernel, *fields = key.split()
        for field in fields:
            values.setdefault(kernel, {}).setdefault(field.partition("=")[0], set()).add(field)
    rows, ratios = [], []
    for key, entry in record["entries"].items():
        kernel, *fields = key.split()
        # What all of a kernel's problems share says nothing; of a single one everything is told.
        telling = [field for field in fields if len(values[kernel][field.partition("=")[0]]) > 1] or fields
        config = " ".join(f"{name}={value}" for name, value in entry["config"].items())
        if heuristic := entry.get("heuristic_milliseconds"):
            tuned = entry["milliseconds"]
            ratios.append(heuristic / tuned)
            found = [microseconds(heuristic), microseconds(tuned), f"{ratios[-1]:.2f}×"]
            rows.append([f"`{kernel}`", " ".join(telling), config, *found])
    headings = ["kernel", "problem", "tuned config", "heuristic, µs", "tuned, µs", "speed-up"]
    table = Table(headings, rows, 3).markdown()
    if not ratios:
        return table
    return (
        f"{record['gpu']}: {len(ratios)} problems; tuning gains {statistics.median(ratios):.2f}× in the median and "
        f"{max(ratios):.2f}× at most, and keeps the heuristic's config in {sum(r == 1 for r in ratios)}.\n\n{table}"
    )


def _compiled() -> dict[str, Any]:
    """What ``python -m autotune compile`` reports by default. RuntimeError where a kernel does not build."""
    from autotune.compile import reports_of
    from kernels.tuning.choose import triton_version

    reports, failures = reports_of(["sm_90"], ["bf16"], Console())
    if failures:
        raise RuntimeError("\n".join(failures))
    return {
        "triton": triton_version(),
        "architecture": "sm_90",
        "dtype": "bf16",
        "reports": [dataclasses.asdict(report) for report in reports],
    }


def _predicted(results: Path) -> list[dict[str, Any]]:
    """What predicted/ holds, the newest Triton first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (results / "predicted").glob("*.json")]
    return sorted(records, key=lambda record: [int(part) for part in record["triton"].split(".")], reverse=True)


def sections(results: Path) -> dict[Path, dict[str, str]]:
    """Page -> section name -> its text, from the committed files alone."""
    counted, compiled = (json.loads((results / name).read_text()) for name in ("models.json", "compiled.json"))
    top1 = json.loads((results.parents[1] / "models" / "data" / "imagenet_top1.json").read_text())
    shipped = [json.loads(path.read_text()) for path in sorted(shipped_folder().glob("*.json"))]
    profiles = [json.loads(path.read_text()) for path in sorted(results.glob("*/profile.json"))]
    gpus = pages.folders(results)
    return {
        results.parents[1] / "README.md": {"models": _published_table(top1), "gpu": pages.readme(gpus)},
        results / "README.md": {
            "models": _models_table(counted, top1),
            "profile": "\n\n".join(map(_profile_table, profiles)),
            "compiled": _compiled_table(compiled),
            "tuned": "\n\n".join(map(_tuned_table, shipped)),
            **pages.sections(gpus, _predicted(results)),
        },
    }


def drawings(results: Path) -> Iterator[tuple[Path, Figure, str]]:
    """Every figure that shows numbers of committed files: its path, and the fingerprint of those numbers."""
    for path in sorted(results.glob("*/profile.json")):
        record = json.loads(path.read_text())
        for file, figure in report.figures(record).items():
            yield path.parent / file, figure, report.fingerprint(record)
    for folder in pages.folders(results):
        for file, (figure, source) in pages.figures(folder, _predicted(results)).items():
            yield folder.path / file, figure, source


def updated(text: str, sections: dict[str, str]) -> str:
    """``text`` with each section between its markers replaced. ValueError where a marker is missing."""
    for name, content in sections.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"the page must hold the markers of section {name!r} once, found {count} times")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", action="store_true", help="count parameters and multiply-adds again (a minute)")
    parser.add_argument(
        "--compile", action="store_true", help="build every kernel for sm_90 in bf16 again (two minutes)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the README is out of date")


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    root = timing.repository_root()
    if root is None:
        raise SystemExit(
            "figures needs a checkout of the repository: its README and notebooks/results are not installed"
        )
    results = root / "notebooks" / "results"
    if arguments.count:
        counted = {name: count_model(name) for name in track(PUBLISHED, "Counting", console=console, transient=True)}
        write_json(results / "models.json", counted)
    if arguments.compile:
        write_json(results / "compiled.json", _compiled())
    outdated = {}
    for page, content in sections(results).items():
        text = page.read_text()
        if (wanted := updated(text, content)) != text:
            outdated[page] = wanted
    if arguments.check:
        return int(bool(outdated))
    for page, wanted in outdated.items():
        atomic_write(page, wanted)
        console.print(f"updated {page.relative_to(root)}")
    for path, figure, source in drawings(results):
        plots.save(figure, path, source)
        console.print(f"drew {path.relative_to(root)}")
    return 0
