"""Tune kernels for what a model, or an operator at the models' shapes, launches on this GPU.

    python -m autotune tune --model overlock_t --batch 128 --size 224 --dtype bf16 --training
    python -m autotune tune --operator involution2d "contmix*"
    python -m autotune tune --all

What already has an entry in the user's store or the shipped files is passed over, so an interrupted command goes on
where it stopped; --force tunes it again. Every candidate must agree with the eager path before its time counts.

Exit code: 0 done, 1 a problem had no config that ran and agreed or could not be kept, 2 bad arguments, no GPU or
nowhere to write, 4 the GPU was lost, 130 interrupted; what was tuned by then is kept.
"""

import argparse
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import track

from autotune import networks, selection, timing, tuner, workloads
from autotune.cases import LOST, device_lost
from autotune.measure import one_line
from autotune.passes import Pass
from autotune.precompile import Build, builds, precompile
from autotune.tables import Table, settings_text, times
from autotune.tuner import Outcome
from kernels.backend import interpreting
from kernels.files import atomic_write
from kernels.launch import record_launches
from kernels.tuning.choose import Request, gpu_name, look_up
from kernels.tuning.store import Store, user_folder
from models.commands import types
from models.commands.dispatch import input_errors
from models.commands.progress import Bar
from models.commands.progress import console as messages
from models.registry import entry_point


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is tuned").add_mutually_exclusive_group(required=True).add_argument
    what("--model", metavar="NAME", help="what one pass of this model launches")
    what("--operator", nargs="+", metavar="PATTERN", help="operators at the models' own shapes, by name")
    what("--all", action="store_true", help="every operator at the models' own shapes")
    how = parser.add_argument_group("for which inputs").add_argument
    how("--batch", type=types.positive, metavar="B", help="(default: 128; 2 at 800x1280)")
    how("--size", type=types.image_size, metavar="HxW", help="(default: 224, for operators 800x1280 too)")
    how("--dtype", type=types.dtype, default=torch.bfloat16, metavar="NAME", help="(default: bf16)")
    how("--training", action="store_true", help="the model's backward pass too, as for operators always")
    how("--device", type=types.device, help="(default: the GPU)")
    effort = parser.add_argument_group("effort").add_argument
    effort("--force", action="store_true", help="tune again what is tuned")
    most = tuner.MOST_CANDIDATES
    effort("--candidates", type=types.positive, default=most, metavar="N", help="(default: %(default)s)")
    effort("--seconds", type=types.seconds, default=math.inf, metavar="S", help="begin none after that")
    effort("--quick", action="store_true", help="smoke test: tiny shapes, one per operator; any device")
    text = "note there what is being tuned; a problem noted before ended an earlier run, and is passed over"
    effort("--passing-over", type=Path, metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


class LostDeviceError(Exception):
    """A kernel left the process unable to use the GPU."""


@dataclass
class Tuning:
    """The problems that launches met, and what tuning made of each."""

    device: torch.device
    most: int = tuner.MOST_CANDIDATES
    force: bool = False
    time_call: tuner.Clock = tuner.median_milliseconds
    deadline: float = math.inf
    notes: Path | None = None
    fatal: Sequence[str] = ()
    found: dict[str, None] = field(default_factory=dict)
    work: dict[Build, None] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """Keys of the problems not tuned yet."""
        return [key for key in self.found if key not in self.rows]

    def collect(self, calls: Iterator[timing.Call]) -> None:
        """Find the problems that no file answers (all of them with ``force``), and what their candidates compile.

        Kernels are not run: from a model's later layers on the numbers are noise, but shapes are all that counts here.
        """

        def note(request: Request) -> None:
            known = not self.force and look_up(request.launcher, request.problem, gpu_name(self.device)).tuned
            if not known and request.key not in (*self.found, *self.fatal):
                self.found[request.key] = None
                self.work.update(dict.fromkeys(builds(request, self.most)))

        with record_launches():
            self._run(calls, note)

    def tune(self, calls: Iterator[timing.Call]) -> None:
        """Tune each where it is launched: later its tensors may be overwritten. Every result is stored at once."""
        with Bar(len(self.found), seconds=0) as bar:

            def tune_one(request: Request) -> None:
                key = request.key
                if key not in self.found or key in self.rows or time.monotonic() > self.deadline:
                    return
                bar.describe(key)
                self._note(key)
                row = self._tuned(request)
                if device_lost(self.device):
                    raise LostDeviceError(key)
                self.rows[key] = row
                best = row["milliseconds"]
                bar.advance(1, f"{key}: " + ("no config agreed" if best is None else f"{best:.4f} ms"))

            self._run(calls, tune_one, self.deadline)
        self._note()

    def _note(self, *attempted: str) -> None:
        if self.notes is not None:
            atomic_write(self.notes, "".join(f"{key}\n" for key in (*self.fatal, *attempted)))

    def _run(
        self, calls: Iterator[timing.Call], observer: Callable[[Request], None], deadline: float = math.inf
    ) -> None:
        with tuner.meeting(observer):
            for call in calls:
                if time.monotonic() > deadline:
                    return
                try:
                    call()
                except LostDeviceError:
                    raise
                except Exception as error:  # one operator less, most often for lack of memory
                    self.errors.append(one_line(error))

    def _tuned(self, request: Request) -> dict[str, Any]:
        """The row of one problem. A reference that does not fit in memory costs it alone."""
        outcomes, failure = list[Outcome](), None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # that no candidate agreed is what the row says
                outcomes = tuner.tune(request, self.time_call, self.most)
        except Exception as error:
            failure = one_line(error)
        heuristic = tuner.heuristic_milliseconds(request, outcomes)
        best = outcomes[0].milliseconds if outcomes else None
        return {
            "key": request.key,
            "heuristic_milliseconds": heuristic,
            "milliseconds": best,
            "gain": None if heuristic is None or best is None else heuristic / best,
            "config": None if best is None else dataclasses.asdict(outcomes[0].config),
            "tried": len(outcomes),
            "rejected": {str(o.config): o.rejected for o in outcomes if o.rejected},
            "failure": failure,
        }


def _launching(arguments: argparse.Namespace, device: torch.device) -> Iterator[timing.Call]:
    if arguments.model is not None:
        entry_point(arguments.model, "--model")  # an error that names the option
        small = arguments.quick
        batch, size = arguments.batch or (2 if small else 128), arguments.size or ((32, 32) if small else (224, 224))
        place: dict[str, Any] = {"device": device, "dtype": arguments.dtype, "memory_format": torch.channels_last}
        model = networks.settled_model(arguments.model, networks.random_images(2, (128, 128))).to(**place)
        images = networks.random_images(batch, size).to(**place)
        yield Pass(model.train(arguments.training), [images], backward=arguments.training, backend="triton")
        return
    found = workloads.benchmark_workloads(arguments.batch, arguments.size, quick=arguments.quick)
    patterns = ["*"] if arguments.all else arguments.operator
    for workload in selection.named(found, patterns):
        yield workload.call(arguments.dtype, device)


def _table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    cells = []
    for row in rows:
        if row["config"] is None:
            reason = row["failure"] or next(iter(row["rejected"].values()))
            cells.append([row["key"], f"none: {reason}"])
            continue
        found = (row[name] for name in ("heuristic_milliseconds", "milliseconds"))
        untimed = "rejected" if row["rejected"] else "–"  # the interpreter's heuristic is no candidate
        milliseconds = [untimed if value is None else f"{value:.4f}" for value in found]
        cells.append([row["key"], settings_text(row["config"]), *milliseconds, times(row["gain"])])
    return Table(["problem", "best config", "heuristic, ms", "best, ms", "gain"], cells, 2, title)


def run(arguments: argparse.Namespace) -> int:
    code = 0
    with input_errors():
        device = arguments.device or timing.best_device()
        if device.type != "cuda" and not (arguments.quick and interpreting()):
            raise ValueError(
                "tuning times kernels on a GPU, and there is none here (PyTorch sees no CUDA or ROCm device)"
            )
        tuning = Tuning(
            device,
            most=2 if arguments.quick else arguments.candidates,
            force=arguments.force,
            time_call=tuner.median_milliseconds if device.type == "cuda" else _interpreted_milliseconds,
            deadline=time.monotonic() + arguments.seconds,
            notes=(notes := arguments.passing_over),
            fatal=notes.read_text().splitlines() if notes is not None and notes.is_file() else (),
        )
        tuning.collect(_launching(arguments, device))
        store = Store(user_folder(), gpu_name(device))
        if tuning.found and not store.update({}):  # which warns of the reason; better now than after hours of tuning
            raise ValueError(f"cannot write tuned configs at {store.path}")
    try:
        if device.type == "cuda":
            compiled = precompile(list(tuning.work), arguments.seconds / 2)
            for _ in track(compiled, "Compiling", len(tuning.work), console=messages, transient=True):
                pass
        if tuning.found:
            tuning.tune(_launching(arguments, device))
    except LostDeviceError as lost:
        messages.print(f"[red]the GPU was lost[/] while tuning {escape(str(lost))}")
        code = LOST
    except KeyboardInterrupt:
        code = 130
    return _tell(tuning, store, code, as_json=arguments.json)


def _tell(tuning: Tuning, store: Store, code: int, *, as_json: bool) -> int:
    """Prints what was tuned, and on stderr what was not and why; the exit code."""
    rows = list(tuning.rows.values())
    best = {row["key"]: row["config"] for row in rows if row["config"] is not None}
    stored, gpu = store.read(), gpu_name(tuning.device)
    unwritten = [key for key, config in best.items() if stored.get(key, {}).get("config") != config]
    if as_json:
        record = {"gpu": gpu, "store": str(store.path), "tuned": rows, "left": tuning.left}
        record |= {"passed_over": tuning.fatal, "errors": tuning.errors, "unwritten": unwritten}
        print(json.dumps(record, indent=1))
    elif rows:
        _table(rows, f"Tuned on {gpu}").show()
    elif not tuning.errors and not tuning.left:
        print("Everything is tuned already; --force tunes it again.")
    if tuning.left and code != LOST:
        left = f"{len(tuning.left)} of {len(tuning.found)} problems are left"
        why = "interrupted" if code == 130 else "not all"
        messages.print(f"[yellow]{why}[/]: {left}; the same command goes on")
    for what, which in (
        *(("passed over[/], it ended an earlier run:", key) for key in tuning.fatal),
        *(("failed[/]", error) for error in dict.fromkeys(tuning.errors)),
        *((f"not written[/] to {escape(str(store.path))}:", key) for key in unwritten),
    ):
        messages.print(f"[red]{what} {escape(which)}")
    if len(unwritten) < len(best):
        messages.print(f"Wrote {escape(str(store.path))}")
    return code or int(bool(tuning.fatal or tuning.errors or unwritten or len(best) < len(rows)))


def _interpreted_milliseconds(call: timing.Call) -> float:
    """The interpreter's own time, which says nothing about a kernel: for smoke tests of the command."""
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)
