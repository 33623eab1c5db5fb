"""Check every stored config again: run it on random inputs of its problem and compare with the eager path.

On a GPU the entries of that GPU are run as they are. In Triton's interpreter (TRITON_INTERPRET=1, no GPU needed) those
of every GPU are run at reduced sizes (maps of at most 64 pixels) and bfloat16 as float32; that takes a second or so
each.

Exit code: 0 all agree, 1 one does not, 2 there is nothing here to run kernels on, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console

from autotune import timing
from autotune.measure import one_line
from autotune.tables import Table
from autotune.tunables import StoredEntry, find_tunables, stored_entries, usable
from autotune.tuner import disagreement
from kernels.backend import interpreting, triton_installed
from kernels.tuning.choose import Launcher, Problem, Request, gpu_name
from models.commands.dispatch import CommandError
from models.commands.progress import Bar

MOST_INTERPRETED = {"pixels": 64, "channels": 32, "images": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME", help="entries of this GPU (default: the one here; interpreted, all)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def _reduced(problem: Problem) -> Problem:
    """A problem the interpreter is done with soon. Its products of bfloat16 operands are wrong, float32 stands in."""
    changes: dict[str, Any] = {
        name: min(getattr(problem, name), most) for name, most in MOST_INTERPRETED.items() if name in problem._fields
    }
    if getattr(problem, "dtype", None) == torch.bfloat16:
        changes["dtype"] = torch.float32
    return problem._replace(**changes)


def check_entry(stored: StoredEntry, known: dict[str, Launcher], device: torch.device) -> dict[str, Any]:
    """Run one entry. Its row's ``status`` is ok, failed, or unchecked where launches would not use it either."""
    row = {"gpu": stored.gpu, "source": stored.source, "key": stored.key, "config": stored.entry.get("config")}
    used = usable(stored.key, stored.entry, known)
    if isinstance(used, str):
        return row | {"status": "unchecked", "reason": used}
    launcher, problem, config = used
    if launcher.make_example is None:
        return row | {"status": "unchecked", "reason": "the kernel offers no example to check it with"}
    try:
        tried = _reduced(problem) if device.type == "cpu" else problem
        with torch.no_grad():
            request = Request(launcher, tried, device, launcher.make_example(tried, device), {})
            reason = disagreement(request.run(config), request.reference(), tried)
    except Exception as error:  # whatever a config does, the others are still to be checked
        reason = one_line(error)
    return row | {"status": "ok" if reason is None else "failed", "reason": reason}


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False)
    device = timing.best_device()
    if not triton_installed() or (device.type != "cuda" and not interpreting()):
        raise CommandError("kernels run on a GPU, or on a CPU in Triton's interpreter: set TRITON_INTERPRET=1")
    gpu = arguments.gpu or (gpu_name(device) if device.type == "cuda" else None)
    if device.type != "cuda":
        device = torch.device("cpu")
    known, entries, code = find_tunables(), list(stored_entries(gpu)), 0
    rows: list[dict[str, Any]] = []
    try:
        with Bar(len(entries), seconds=0) as bar:
            for stored in entries:
                bar.describe(stored.key)
                rows.append(check_entry(stored, known, device))
                bar.advance(1, f"{stored.key}: {rows[-1]['status']}")
    except KeyboardInterrupt:
        code = 130
    if arguments.json:
        print(json.dumps({"device": timing.device_name(device), "entries": rows}, indent=1))
    elif rows:
        cells = []
        for row in rows:
            state = row["status"] if row["reason"] is None else f"{row['status']}: {row['reason']}"
            cells.append([row["gpu"], row["source"], row["key"], state])
        Table(["GPU", "from", "problem", "state"], cells, 4, "Stored configs against the eager path").show(console)
    else:
        console.print("Nothing is tuned, so there is nothing to verify.")
    return code or int(any(row["status"] == "failed" for row in rows))
