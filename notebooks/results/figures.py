"""Bring every number of the README and of the pages under notebooks/results in line with the committed results.

Tables stand between markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and are written from what the families
say that their papers say, and from files under notebooks/results: models.json (parameters and multiply-adds, counted;
--count counts them again), predicted/*.json (written by predicted/collect.py), <device>/profile.json, and what a GPU's
folder holds (folder.py says what). The tuned configs are those of kernels/tuning/configs. Figures are drawn again from
these.
"""

import argparse
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

import models
from autotune import plots, report
from autotune.tables import Table, microseconds, settings_text
from kernels.files import atomic_write, write_json
from kernels.tuning.store import shipped_folder
from models.registry import families
from notebooks.results import pages
from notebooks.results.folder import folders

RESULTS = Path(__file__).parent
ROOT = RESULTS.parents[1]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def published() -> dict[str, Any]:
    """Name -> entry point of the models of which papers say something, family by family; OverLoCK's, merged."""
    found = {build.__name__: build for variants in families().values() for build in variants}
    return {n: build for n, build in found.items() if build.published is not None and f"{n}_reparam" not in found}


def count_model(name: str) -> dict[str, float]:
    """Parameters (millions), but those for training only, and multiply-adds (G) of one 224x224 image, on meta."""
    with torch.device("meta"):
        model: Any = models.create_model(name).eval()
        image = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    unused = tuple(f"{module}." for module in model.training_only)
    counted = (p.numel() for key, p in model.named_parameters() if not key.startswith(unused))
    return {"parameters_m": sum(counted) / 1e6, "multiply_adds_g": counter.get_total_flops() / 2e9}


def _given(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _families_table() -> str:
    """A line per family: the variants side by side."""
    rows, every = [], published()
    for found in families().values():
        family, variants = found[0].family, {b.__name__: b.published for b in found if b.__name__ in every}
        if not variants:
            continue
        columns = [[f"`{name.removesuffix('_reparam')}`" for name in variants]]
        columns += [list(map(_given, numbers)) for numbers in zip(*variants.values(), strict=True)]
        size = "`img_size` (224), other sizes resized" if family.fixed_input_size else "any, from 32 pixels up"
        linked = f"[{family.__name__}](https://arxiv.org/abs/{family.paper})"
        rows.append([linked, *map(" · ".join, columns), size])
    headings = ["family", "variants", "parameters, M", "multiply-adds at 224², G", "ImageNet top-1, %", "input"]
    return Table(headings, rows, 6).markdown()


def _models_table(counted: dict[str, Any]) -> str:
    rows = []
    for name, build in published().items():
        counts = [
            text
            for field in ("parameters_m", "multiply_adds_g")
            for text in (_given(getattr(build.published, field)), f"{counted[name][field]:.2f}")
        ]
        rows.append([f"`{name}`", *counts, _given(build.published.top1)])
    headings = ["model", "parameters, M: published", "counted", "multiply-adds, G at 224²: published", "counted"]
    return Table([*headings, "top-1, %: published"], rows).markdown()


def _profile_table(record: dict[str, Any]) -> str:
    machine, settings = record["machine"], record["settings"]
    if failed := [f"{row['name']} {row['pass']}" for row in record["rows"] if row["status"] != "ok"]:
        raise ValueError(f"profile.json holds a failed line and cannot be published: {failed[0]}")
    table = report.table(record)
    return (
        f"{machine['device']}, torch {machine['torch']}, {settings['dtype']}, batch {settings['batch']}; "
        f"our path here: {settings['implementation']}. {' '.join(table.notes)}\n\n{table.markdown()}"
    )


def _tuned_table(record: dict[str, Any]) -> str:
    """The shipped configs of a GPU: what the heuristic's choice takes, and the tuned one."""
    problems = {key: dict(field.split("=") for field in key.split()[1:]) for key in record["entries"]}
    rows, ratios = [], []
    for key, entry in record["entries"].items():
        if not (heuristic := entry.get("heuristic_milliseconds")):
            continue
        kernel = key.split()[0]
        # What all of a kernel's problems share says nothing; of a single one everything is told.
        same = set.intersection(*(set(p.items()) for other, p in problems.items() if other.split()[0] == kernel))
        telling = {name: value for name, value in problems[key].items() if (name, value) not in same} or problems[key]
        ratios.append(heuristic / entry["milliseconds"])
        found = [microseconds(heuristic), microseconds(entry["milliseconds"]), f"{ratios[-1]:.2f}×"]
        rows.append([f"`{kernel}`", settings_text(telling), settings_text(entry["config"]), *found])
    headings = ["kernel", "problem", "tuned config", "heuristic, µs", "tuned, µs", "speed-up"]
    table = Table(headings, rows, 3).markdown()
    if not ratios:
        return table
    return (
        f"{record['gpu']}: {len(ratios)} problems; tuning gains {statistics.median(ratios):.2f}× in the median and "
        f"{max(ratios):.2f}× at most, and keeps the heuristic's config in {sum(r == 1 for r in ratios)}.\n\n{table}"
    )


def predictions() -> list[dict[str, Any]]:
    """What predicted/ holds, the newest Triton first."""
    records = map(load, (RESULTS / "predicted").glob("*.json"))
    return sorted(records, key=lambda record: [int(part) for part in record["triton"].split(".")], reverse=True)


def sections() -> dict[Path, dict[str, str]]:
    """Page -> section name -> its text, from the committed files alone."""
    gpus = folders(RESULTS)
    return {
        ROOT / "README.md": {"models": _families_table(), "gpu": pages.readme(gpus)},
        RESULTS / "README.md": {
            "models": _models_table(load(RESULTS / "models.json")),
            "profile": "\n\n".join(_profile_table(load(path)) for path in sorted(RESULTS.glob("*/profile.json"))),
            "tuned": "\n\n".join(_tuned_table(load(path)) for path in sorted(shipped_folder().glob("*.json"))),
            **pages.sections(gpus),
        },
        RESULTS / "predicted" / "README.md": pages.prediction_sections(gpus, predictions()),
    }


def drawings() -> Iterator[tuple[Path, Figure, str]]:
    """Every figure that shows numbers of committed files: its path, and the fingerprint of those numbers."""
    for path in sorted(RESULTS.glob("*/profile.json")):
        record = load(path)
        for file, figure in report.figures(record).items():
            yield path.parent / file, figure, report.fingerprint(record)
    for folder in folders(RESULTS):
        for file, (figure, source) in pages.figures(folder, predictions()).items():
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


def run(arguments: argparse.Namespace) -> int:
    console = Console()
    if arguments.count:
        names = track(list(published()), "Counting", console=console, transient=True)
        write_json(RESULTS / "models.json", {name: count_model(name) for name in names})
    texts = {page: (page.read_text(), content) for page, content in sections().items()}
    outdated = {page: wanted for page, (text, content) in texts.items() if (wanted := updated(text, content)) != text}
    for page, wanted in outdated.items():
        atomic_write(page, wanted)
        console.print(f"updated {page.relative_to(ROOT)}")
    for path, figure, source in drawings():
        plots.save(figure, path, source)
        console.print(f"drew {path.relative_to(ROOT)}")
    return 0
