"""Check every stored config again: run it in a launch of its kernel and compare with the eager path.

On a GPU the entries of that GPU are checked while operators run at the models' shapes, in bfloat16; in Triton's
interpreter (TRITON_INTERPRET=1, no GPU needed) those of every GPU at tiny shapes, in float16. A config is tried on the
problem it was tuned for where an operator meets that, else on the first of its kernel that it is valid for.

Exit code: 0 all agree, 1 one does not, 2 there is nothing here to run kernels on, 130 interrupted.
"""

import argparse
import json
from typing import Any

import torch

from autotune import timing
from autotune.measure import one_line
from autotune.tables import Table
from autotune.tunables import stored_entries
from autotune.tuner import disagreement, meeting
from autotune.workloads import Workload, benchmark_workloads, contmix, depthwise, involution, neighborhood
from kernels.backend import interpreting, triton_installed
from kernels.tuning.choose import Config, Request, gpu_name
from models.commands.dispatch import CommandError
from models.commands.progress import Bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", metavar="NAME", help="entries of this GPU (default: the one here; interpreted, all)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def workloads_of(device: torch.device) -> list[Workload]:
    """Operators that launch every kernel between them."""
    if device.type == "cuda":
        from autotune.kernel_cases import cases

        return [*benchmark_workloads(), *cases().values()]
    # Windows that outputs share, large ones of an output's own, one that is too large for rows to slide, and a
    # depthwise convolution of so large a map and kernel that the kernels for it have configs.
    shared = [neighborhood(name, "tiny", 1, 2, 16, (5, 5), 5) for name in ("na2d_av", "na2d_softmax_av")]
    mixes = [contmix("tiny", 1, 2, 16, size, sizes, context=9) for size, sizes in (((5, 5), (3, 5)), ((9, 17), (3, 7)))]
    others = [involution("tiny", 1, 16, (5, 5), 17, 16), depthwise("tiny", 1, 16, (9, 12), 5)]
    return [*benchmark_workloads(quick=True), *shared, *mixes, *others]


def check(request: Request, config: Config) -> dict[str, Any]:
    """The part of a row that says whether a config agrees in this launch."""
    try:
        with torch.no_grad():
            reason = disagreement(request.run(config), request.reference(), request.problem)
    except Exception as error:  # whatever a config does, the others are still to be checked
        reason = one_line(error)
    return {"status": "ok" if reason is None else "failed", "reason": reason}


def check_all(rows: list[dict[str, Any]], offered: dict[str, list[tuple[int, Config]]], device: torch.device) -> None:
    """Complete ``rows``, of which ``offered`` names those to check and their configs, by kernel."""
    tried: dict[int, bool] = {}  # number of the row -> whether on its own problem

    def observe(request: Request) -> None:
        for number, config in offered.get(request.launcher.name, []):
            own = rows[number]["key"] == request.key
            if (own and not tried.get(number)) or (number not in tried and config.valid(request.problem)):
                bar.describe(rows[number]["key"])
                rows[number] |= check(request, config)
                bar.advance(int(number not in tried), f"{rows[number]['key']}: {rows[number]['status']}")
                tried[number] = own

    with Bar(sum(map(len, offered.values())), seconds=0) as bar, meeting(observe):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # whose products the interpreter gets right
        for workload in workloads_of(device):
            workload.call(dtype, device)()


def run(arguments: argparse.Namespace) -> int:
    device = timing.best_device()
    if not triton_installed() or (device.type != "cuda" and not interpreting()):
        raise CommandError("kernels run on a GPU, or on a CPU in Triton's interpreter: set TRITON_INTERPRET=1")
    gpu = arguments.gpu or (gpu_name(device) if device.type == "cuda" else None)
    if device.type != "cuda":
        device = torch.device("cpu")
    code, rows, offered = 0, list[dict[str, Any]](), dict[str, list[tuple[int, Config]]]()
    for number, stored in enumerate(stored_entries(gpu)):
        reason = stored.found
        if not isinstance(reason, str):
            launcher, _, config = reason
            offered.setdefault(launcher.name, []).append((number, config))
            reason = "no operator's launch that is tried suits it"
        rows.append(stored.place | {"status": "unchecked", "reason": reason})
    try:
        if offered:
            check_all(rows, offered, device)
    except KeyboardInterrupt:
        code = 130
    if arguments.json:
        print(json.dumps({"device": timing.device_name(device), "entries": rows}, indent=1))
    elif rows:
        cells = []
        for row in rows:
            state = row["status"] if row["reason"] is None else f"{row['status']}: {row['reason']}"
            cells.append([row["gpu"], row["source"], row["key"], state])
        Table(["GPU", "from", "problem", "state"], cells, 4, "Stored configs against the eager path").show()
    else:
        print(f"Nothing is tuned{f' for {gpu}' if gpu else ''}, so there is nothing to verify.")
    return code or int(any(row["status"] == "failed" for row in rows))
