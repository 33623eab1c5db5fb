"""Everything that this repository measures on a GPU, within nine minutes; ``make gpu`` runs it.

Five phases, each a process of its own, so that none can take the others with it: environment and ceilings, the tests
(while compilers fill their caches in the background), tuning into a fresh store, operators, models. Every phase has a
share of the time; what one leaves over the next may use, and one that does not get done keeps what it has measured.

It leaves at most six files: environment.json, tests.json, <GPU>.json (tuned configs, for kernels/tuning/configs),
bench.json, models.json, and summary.md, which tells of all of them in words.

Exit code: 0 every phase ended well, 1 something failed, 2 there is no GPU, 130 interrupted.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autotune import results, timing
from autotune.cases import LOST
from autotune.tables import Table, number
from kernels.files import atomic_write, write_json
from kernels.tuning.choose import gpu_name
from kernels.tuning.store import Store, shipped_folder
from models.commands import types
from models.commands.arguments import make_folder
from models.commands.dispatch import CommandError, input_errors
from models.commands.progress import console as messages
from notebooks.results.folder import Folder

ROOT = Path(__file__).parents[2]
SECONDS = 515.0  # for everything: nine minutes, less what starting, ending and a slow disk may take
SECONDS_QUICK = 3600.0  # a smoke test is over when it is done, however busy the machine
GRACE = 12.0  # between the end of a phase's time and the end of its process
# What is compiled while the tests run, a process each.
FILLED_OPERATORS = ("involution*", "na2d*", "[!in]*")  # the last: all others
FILLED_MODELS = ("overlock_t", "rednet50", "overlock_xt", "volo_d1")
MODEL_TESTS = ("every_family", "layers", "overlock", "rednet", "volo", "inference", "pytorch_tools")
# What launches kernels; the other tests are as true on a CPU.
TESTS = (
    "tests/kernels",
    "--ignore=tests/kernels/test_store.py",
    *(f"tests/models/test_{name}.py" for name in MODEL_TESTS),
)
TEST_RESULTS = "tests"  # a file that is none of the store's
RESTARTS = 3  # of a phase whose process lost the GPU or crashed
MOST_LOG_LINES = 60
CORES_FOR_BACKGROUND, MEMORY_FOR_BACKGROUND = 8, 64e9


@dataclass(frozen=True)
class Phase:
    """A command and its share of the time.

    ``command(seconds, again)`` gives its arguments: the seconds it has, and whether an earlier process of it crashed.
    ``background`` commands run beside it and end with it; their outcome does not matter.
    """

    name: str
    command: Callable[[int, bool], list[str]]
    seconds: float
    background: tuple[list[str], ...] = ()
    finish: Callable[[bool], None] = lambda complete: None


def _start(command: Sequence[str], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Interrupt a process and all it started, as Ctrl-C would; kill what is left after ``seconds``."""
    stages = [(signal.SIGKILL, 10.0)]
    if process.poll() is None:
        stages.insert(0, (signal.SIGINT, seconds))
    for stage, patience in stages:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, stage)
            process.wait(patience)


def run_phase(phase: Phase, deadline: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run one phase up to ``deadline`` (monotonic), again where its process is lost, and say how it went."""
    began = time.monotonic()
    found: dict[str, Any] = {"name": phase.name, "status": "ok", "exit_code": 0, "restarts": 0}
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as unread, ExitStack() as helpers:
        for command in phase.background:
            helpers.callback(_end, _start(command, environment, unread), 2.0)
        for attempt in range(RESTARTS + 1):
            left = deadline - time.monotonic()
            if left < 1:
                found |= {"status": "out of time", "message": "there was no time left"}
                break
            command = phase.command(max(1, int(left)), attempt > 0)
            process = _start(command, environment, log)
            try:
                code = process.wait(left + GRACE)
            except subprocess.TimeoutExpired:
                found |= {"status": "out of time", "message": "it did not end by itself and was stopped"}
                break
            finally:
                _end(process, GRACE)  # with all it may have left running
            found |= {"exit_code": code, "restarts": attempt, "status": "ok" if code == 0 else "failed"}
            lost = code == LOST and "pytest" not in command  # which has a 4 of its own
            if code < 0:
                found["message"] = f"ended by {signal.Signals(-code).name}"
            elif lost:
                found["message"] = "lost the GPU"
            if not lost and code >= 0:
                break
        log.seek(0)
        text = log.read().decode(errors="replace")
    phase.finish(found["status"] != "out of time")
    if found["status"] != "ok":
        found["log"] = text.splitlines()[-MOST_LOG_LINES:]
    return found | {"seconds": round(time.monotonic() - began, 1)}


def run_phases(
    phases: Sequence[Phase], folder: Path, environment: dict[str, str], seconds: float
) -> list[dict[str, Any]]:
    """Run the phases within ``seconds``, shared out as they ask; ``folder`` gets its summary after each."""
    start, share, done = time.monotonic(), 0.0, []
    total = sum(phase.seconds for phase in phases)
    for phase in phases:
        share += phase.seconds / total
        deadline = start + seconds * share - GRACE * (phase is phases[-1])
        messages.print(f"[bold]{phase.name}[/]: until {deadline - start:.0f} s")
        done.append(run_phase(phase, deadline, environment))
        messages.print(f"{phase.name}: {done[-1]['status']}, {done[-1]['seconds']:.0f} s")
        for line in done[-1].get("log", [])[-12:]:
            messages.print(f"    {line}", markup=False)
        atomic_write(folder / "summary.md", summary(folder, done))
    return done


def _test_command(quick: bool) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "tests.device_guard"]
    if importlib.util.find_spec("xdist") is not None and not quick:
        command += ["-n", str(max(1, min(12, 3 * (os.cpu_count() or 2) // 4))), "--dist", "worksteal"]
    return [*command, *(["tests/kernels/test_store.py", "-k", "round_trip"] if quick else TESTS)]


def phases_of(folder: Path, device: torch.device, scratch: Path, *, quick: bool) -> list[Phase]:
    """What the suite runs; ``quick`` on tiny shapes, to try the whole way on any machine in a minute or two."""
    autotune = [sys.executable, "-m", "autotune"]
    where = ["--device", str(device), *(["--quick"] if quick else [])]
    out = ["--out", str(folder)]

    def bench(*what: str) -> Callable[[int, bool], list[str]]:
        def command(seconds: int, again: bool) -> list[str]:
            resume = ["--resume"] if again else []
            return [*autotune, "bench", *what, *where, *out, "--seconds", str(seconds), *resume]

        return command

    def tune(seconds: int, _again: bool) -> list[str]:
        which = ["--operator", "involution2d"] if quick else ["--all", "--candidates", "14"]
        noted = ["--passing-over", str(scratch / "attempts")]
        return [*autotune, "tune", *which, *where, *noted, "--seconds", str(seconds)]

    def keep_tests(complete: bool) -> None:
        record = {"schema": 1, "command": " ".join(_test_command(quick)[1:]), "complete": complete}
        found = {"counts": {}, "failures": []}
        with contextlib.suppress(OSError, ValueError):  # ended before the first test, or while it was written
            found = json.loads((scratch / TEST_RESULTS).read_text(encoding="utf-8"))
        write_json(folder / "tests.json", record | found)

    def keep_configs(_complete: bool) -> None:
        store = Store(scratch, gpu_name(device)).path
        if store.exists():
            shutil.copyfile(store, folder / store.name)

    # Compiling takes longer than all measuring: it is done while the tests run, where nothing is timed.
    background = []
    if not quick and device.type == "cuda" and _has_room(device):
        fill = [*where, "--out", str(scratch), "--compile-only"]
        background = [[*autotune, "bench", "--operator", names, *fill] for names in FILLED_OPERATORS]
        background += [[*autotune, "bench", "--model", name, *fill] for name in FILLED_MODELS]
    models = ["--model", *(["rednet26"] if quick else ["*"])]
    return [
        Phase("environment", bench("--environment"), 25),
        Phase("tests", lambda _seconds, _again: _test_command(quick), 115, tuple(background), keep_tests),
        Phase("tuning", tune, 105, finish=keep_configs),
        Phase("operators", bench("--operator", "*"), 110),
        Phase("models", bench(*models), 160),
    ]


def summary(folder: Path, phases: Sequence[dict[str, Any]]) -> str:
    """summary.md: the phases, the tests, everything measured, and all that failed, was skipped or left out."""
    found = Folder(folder)
    machine = found.environment.get("machine", {})
    versions = [f"{name} {machine[name]}" for name in ("torch", "triton", "python", "driver") if machine.get(name)]
    parts = [
        f"# {machine.get('device', 'unknown device')}",
        " · ".join([*versions, f"commit {machine.get('commit')}", str(machine.get("date"))]),
        "Medians. Every result was checked before it was timed."
        if machine.get("device_type") == "cuda"
        else "A trial of the command without a GPU: the numbers below say nothing.",
    ]
    if ceilings := found.environment.get("ceilings"):
        parts.append(f"Ceilings: {results.ceilings_told(ceilings)}")
    if launch := found.environment.get("launch_microseconds"):
        parts.append(f"A tuned launch takes the host {number(launch['added'])} µs more than Triton's own.")
    if done := [[p["name"], p["status"], f"{p['seconds']:.0f}", p.get("message", "")] for p in phases]:
        parts.append(Table(("phase", "state", "seconds", ""), done, 4).markdown())
    for run in found.test_runs:
        counts = ", ".join(f"{count} {name}" for name, count in run["counts"].items())
        at = f"{run['of']} at commit {run['commit'][:7]}" if "of" in run else "Tests"
        told = f"{at}: {counts or 'none ran'}{'' if run['complete'] else ' (cut short)'}."
        parts.append("\n".join([told, *(f"- {failure}" for failure in run["failures"])]))
    for table in results.tables(found.operators, found.models):
        parts += [f"{table.title}.", table.markdown()]
    told = [f"- {incident}" for incident in results.incidents([*found.operators, *found.models])]
    return "\n\n".join(filter(None, [*parts, "\n".join(told)])) + "\n"


def _has_room(device: torch.device) -> bool:
    memory = torch.cuda.get_device_properties(device).total_memory
    return (os.cpu_count() or 1) >= CORES_FOR_BACKGROUND and memory >= MEMORY_FOR_BACKGROUND


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=types.device, help="(default: the GPU)")
    parser.add_argument("--seconds", type=types.seconds, default=SECONDS, metavar="S", help="(default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny shapes, however long; any device")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: notebooks/results/GPU; --quick: build/...)")


def run(arguments: argparse.Namespace) -> int:
    device, quick = arguments.device or timing.best_device(), arguments.quick
    if device.type != "cuda" and not quick:
        raise CommandError("the suite measures a GPU; --quick tries it out on a CPU")
    folder = (arguments.out or timing.results_folder(device, scratch=quick)).resolve()
    with input_errors():
        make_folder(folder, "--out")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        # A fresh store, but what ships for this GPU need not be found again: entries that no longer hold are ignored.
        shipped = Store(shipped_folder(), gpu_name(device)).path
        if shipped.exists():
            shutil.copyfile(shipped, scratch / shipped.name)
        environment = dict(os.environ) | {"DYNAMIC_KERNELS_STORE": temporary, "PYTHONUNBUFFERED": "1"}
        environment["TEST_RESULTS"] = str(scratch / TEST_RESULTS)
        if device.type != "cuda":
            environment["TRITON_INTERPRET"] = "1"
        phases = phases_of(folder, device, scratch, quick=quick)
        done = run_phases(phases, folder, environment, SECONDS_QUICK if quick else arguments.seconds)
    path = folder / "environment.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": 1}
    write_json(path, record | {"phases": done})
    print((folder / "summary.md").read_text(encoding="utf-8"))
    return int(any(phase["status"] != "ok" for phase in done))
