"""Notebook 05: every config of one kernel, what is known of each, and why one of them is chosen."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from autotune import plots
from autotune.notebooks.session import Session, Table, finish, grid
from autotune.notebooks.subject import SHAPE, SIDE, WINDOW, Candidate, Known, Landscape, subject, tensors
from autotune.tunables import stored_entries, why_unused
from autotune.tuner import measure_candidates
from kernels.backend import interpreting
from kernels.tuning.choose import Request, bucket, key_of

__all__ = [
    "SHAPE",
    "landscape_figure",
    "measured",
    "reasons",
    "resident_threads",
    "stored_times",
    "survey_in_processes",
    "tile_waste",
    "waste_figure",
]


def survey_in_processes(gpu: str, architecture: str | None = "sm_90", processes: int = 2) -> Landscape:
    """``subject.survey`` in processes that share the work, where Triton's interpreter is off; no GPU is needed.

    RuntimeError where a config does not build.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))

    def work(part: int) -> dict[str, Any]:
        arguments = [gpu, architecture or "", str(part), str(processes)]
        command = [sys.executable, "-m", "autotune.notebooks.subject", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"surveying the configs failed: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(work, range(processes)))
    interleaved = itertools.zip_longest(*(part["candidates"] for part in parts))
    found = [_candidate(**fields) for turn in interleaved for fields in turn if fields is not None]
    return Landscape(gpu, parts[0]["key"], parts[0]["source"], found)


def _candidate(config: dict[str, int], known: dict[str, int] | None, **fields: Any) -> Candidate:
    config_type = type(subject()[0].configs[0])
    return Candidate(config_type(**config), known=known and Known(**known), **fields)  # pyright: ignore


def measured(landscape: Landscape, session: Session) -> Landscape:
    """The landscape with times on this GPU, where every output was checked first; as it is elsewhere."""
    if session.device.type != "cuda" or interpreting():
        return landscape
    request = Request(*subject(), session.device, (*tensors(session.device), WINDOW), {})
    outcomes = {outcome.config: outcome for outcome in measure_candidates(request)}
    timed = []
    for candidate in landscape.candidates:
        outcome = outcomes.get(candidate.config)
        if outcome is not None:
            candidate = replace(candidate, milliseconds=outcome.milliseconds, rejected=outcome.rejected)
        timed.append(candidate)
    return replace(landscape, candidates=timed)


def stored_times() -> dict[str, tuple[Any, float, float | None]]:
    """Tuned entries for this very problem: GPU -> (config, its milliseconds, the heuristic's milliseconds)."""
    launcher, problem = subject()
    key = key_of(launcher, problem)
    return {
        stored.gpu: (
            stored.entry["config"],
            stored.entry["milliseconds"],
            stored.entry.get("heuristic_milliseconds"),
        )
        for stored in stored_entries()
        if stored.key == key and why_unused(key, stored.entry, {launcher.name: launcher}) is None
    }


def resident_threads(known: Known, num_warps: int) -> int:
    """Threads of this kernel that a streaming multiprocessor of compute capability 9.0 holds at once, at most 2048.

    It has 65,536 registers, handed out to a warp in units of 256, and 228 KB of shared memory, of which a block takes
    1 KB more than it asks for; 32 blocks and 64 warps are the most.
    """
    registers_a_warp = 256 * math.ceil(32 * known.registers / 256)
    limits = (
        32,
        64 // num_warps,
        65536 // registers_a_warp // num_warps,
        228 * 1024 // (known.shared_bytes + 1024),
    )
    return min(limits) * num_warps * 32


def _labels(found: Sequence[Candidate]) -> list[str]:
    """The fields in which candidates differ, with their values."""
    fields = [asdict(candidate.config) for candidate in found]
    varying = [name for name in fields[0] if len({config[name] for config in fields}) > 1]
    short = {name: name.removeprefix("block_").removeprefix("num_") for name in varying}
    return [", ".join(f"{short[name]} {config[name]}" for name in varying) for config in fields]


def landscape_figure(landscape: Landscape, session: Session, architecture: str = "sm_90") -> Figure:
    """A row for each config: the compiler's report, and measured times where there are any."""
    found = landscape.candidates
    panels: list[tuple[str, str, Sequence[float | None]]] = []
    if all(candidate.known for candidate in found):
        known = [candidate.known for candidate in found if candidate.known]
        threads = [resident_threads(k, c.config.num_warps) for k, c in zip(known, found, strict=True)]
        panels += [
            (f"compiled, {architecture}", "registers of a thread", [float(k.registers) for k in known]),
            (f"compiled, {architecture}", "shared memory of a block, KB", [k.shared_bytes / 1024 for k in known]),
            ("derived", "resident threads of a\nmultiprocessor (of 2048)", [float(count) for count in threads]),
        ]
    if any(candidate.milliseconds for candidate in found):
        panels.append(("measured", "time of a launch, ms", [candidate.milliseconds for candidate in found]))
    rows = range(len(found))
    with plots.style():
        figure, axes = grid(1, len(panels), 3 + 2.5 * len(panels), 2 + 0.3 * len(found), sharey=True)
        for axis, (kind, label, values) in zip(axes[0], panels, strict=True):
            for row, candidate, value in zip(rows, found, values, strict=True):
                name = "ours" if candidate.chosen else "floor"
                if value is None:
                    axis.plot(0.5, row, "x", color=plots.COLOURS["naive"], transform=axis.get_yaxis_transform())
                    continue
                axis.plot(value, row, "o", color=plots.COLOURS[name], markersize=9 if candidate.chosen else 6)
                if label.startswith("registers") and candidate.known and candidate.known.spilled_bytes:
                    axis.annotate("spills", (value, row), (7, 0), textcoords="offset points", va="center", fontsize=9)
            axis.set_title(kind)
            axis.set_xlabel(label)
            axis.grid(axis="x")
            for row in (row for row, candidate in zip(rows, found, strict=True) if candidate.chosen):
                axis.axhspan(row - 0.5, row + 0.5, color=plots.COLOURS["ours"], alpha=0.12, linewidth=0)
        axes[0][0].set_yticks(rows, _labels(found), fontsize=10)
        for text, candidate in zip(axes[0][0].get_yticklabels(), found, strict=True):
            text.set_fontweight("bold" if candidate.chosen else "normal")
        axes[0][0].set_ylim(len(found) - 0.5, -0.5)
        times = f"times: {session.device_name}" if panels[-1][0] == "measured" else "no time was measured: no GPU here"
        return finish(figure, "The configs of aggregate; blue is chosen", f"{SHAPE.partition(': ')[2]} · {times}")


def tile_waste(side: int, rows: int) -> float:
    """Share of a launch's pixels that lie past the map's last row."""
    return 1 - side / (math.ceil(side / rows) * rows)


def waste_figure(
    session: Session, sides: Sequence[int] = (7, 14, 28, 56), blocks: Sequence[int] = (4, 5, 7, 8)
) -> Figure:
    """Why the best tile of a small map is the map's own: how much of every launch is thrown away."""
    values = [[tile_waste(side, block) for block in blocks] for side in sides]
    with plots.style():
        figure, axes = grid(1, 1, 7.5, 3.8)
        axis = axes[0][0]
        image = axis.imshow(values, cmap="cividis", vmin=0, vmax=0.7, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "black" if value > 0.3 else "white"
                axis.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontweight="bold")
        axis.set_xticks(range(len(blocks)), [str(block) for block in blocks])
        axis.set_yticks(range(len(sides)), [f"{side}×{side}" for side in sides])
        axis.set(xlabel="rows of a tile", ylabel="map, pixels")
        axis.spines[:].set_visible(False)
        figure.colorbar(image, label="share of the work past the map's edge")
        return finish(figure, "Tile waste", "computed from the sizes alone, on any device")


def reasons(landscape: Landscape) -> Table:
    """The choice in words, every one of them looked up or counted."""
    found = landscape.candidates
    chosen = next(candidate for candidate in found if candidate.chosen)
    config = chosen.config
    origin = {
        "store": "measured on this machine, in the user's store",
        "shipped": "measured on such a GPU, shipped in kernels/tuning/configs",
        "heuristic": f"the heuristic: nobody tuned this for {landscape.gpu!r}",
    }[landscape.source]
    elements = config.rows * config.columns * config.channels / (32 * config.num_warps)
    best = min((c for c in found if c.milliseconds), key=lambda c: c.milliseconds or 0.0, default=None)
    rows = [
        ("looked up as", f"`{landscape.key}`"),
        ("comes from", origin),
        ("config", ", ".join(f"{name} = {value}" for name, value in asdict(config).items())),
        ("a tile", f"{config.rows} rows × {config.columns} columns × {config.channels} channels"),
        ("work of a thread", f"{elements:g} sums, held in registers while the rows of the input slide past"),
        (
            "waste",
            f"{tile_waste(SIDE, config.rows):.1%} of the pixels of a launch lie past the {SIDE}×{SIDE} map",
        ),
        ("shares its entry", f"with maps of up to {bucket(SIDE**2)} pixels, {SIDE**2} here"),
        ("tuning times", f"{len(found)} configs, the heuristic's first"),
    ]
    if chosen.known is not None:
        spills = f"{chosen.known.spilled_bytes} bytes spilled" if chosen.known.spilled_bytes else "none spilled"
        shared = f"{chosen.known.shared_bytes / 1024:g} KB of shared memory a block"
        rows.append(("compiled", f"{chosen.known.registers} registers a thread, {spills}, {shared}"))
    if best is not None:
        time = "rejected" if chosen.milliseconds is None else f"{chosen.milliseconds:.3f} ms"
        rows.append(("measured here", f"{time}; the fastest candidate takes {best.milliseconds:.3f} ms"))
    for name, (config_found, tuned, by_heuristic) in stored_times().items():
        against = "" if by_heuristic is None else f", the heuristic's config {by_heuristic:.3f} ms"
        rows.append((f"tuned on {name}", f"{tuned:.3f} ms with {config_found}{against}"))
    return Table(("", SHAPE), rows)
