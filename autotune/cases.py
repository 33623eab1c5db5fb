"""Rows of a measurement: one after another within a time limit, each written to disk before the next begins."""

import gc
import json
import math
import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.markup import escape

from autotune import timing
from autotune.measure import one_line
from kernels.files import write_json
from models.commands.progress import Bar, console

LOST = 4  # exit code: the process can use the GPU no more


def device_lost(device: torch.device) -> bool:
    """Whether an earlier error (an illegal address) has left the process unable to use the GPU."""
    try:
        timing.synchronize(device)
    except RuntimeError:
        return True
    return False


class TimeLimitError(BaseException):
    """A row took longer than there was time.

    No ``Exception``, so that the ``except Exception`` with which a contender is left out does not swallow it.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in the block at the first Python instruction after ``seconds``.

    It has no effect off the main thread and on systems without SIGALRM.
    """
    usable = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if not usable or math.isinf(seconds):
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeLimitError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def row_name(row: Mapping[str, Any]) -> str:
    return f"{row['name']} {row['pass']}"


@dataclass(frozen=True)
class Case:
    """One row: what is known beforehand, and the function that measures the rest."""

    facts: dict[str, Any]
    measure: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return row_name(self.facts)

    def run(self, deadline: float = math.inf) -> dict[str, Any]:
        """The finished row, with the seconds that it took; what ``measure`` raises becomes part of it."""
        began = time.monotonic()
        try:
            with time_limit(deadline - began):
                row = self.facts | {"status": "ok"} | self.measure()
            json.dumps(row, allow_nan=False)  # one number that JSON does not have would keep every row from the disk
        except TimeLimitError:
            row = self.facts | {"status": "skipped", "message": "there was no time left to finish it"}
        except Exception as error:  # one row's failure must not cost the others
            row = self.facts | {"status": "failed", "message": one_line(error), "traceback": traceback.format_exc()}
        return row | {"seconds": row.get("seconds", round(time.monotonic() - began, 2))}


def _in_processes(cases: Sequence[Case], deadline: float, jobs: int) -> Iterator[Case]:
    """The same cases, which wait for what processes measure, so many at a time; ``measure`` must be picklable.

    Each has a process of its own, whose end costs no other. None begins while others are timed, whom it would disturb.
    """
    spawning = multiprocessing.get_context("spawn")
    for batch in (cases[first : first + jobs] for first in range(0, len(cases), jobs)):
        if time.monotonic() > deadline:
            yield from batch
            continue
        with ExitStack() as pools:
            alone = [pools.enter_context(ProcessPoolExecutor(1, spawning)) for _ in batch]
            futures = [pool.submit(case.run, deadline) for pool, case in zip(alone, batch, strict=True)]
            yield from (Case(case.facts, future.result) for case, future in zip(batch, futures, strict=True))


def read_record(path: Path, *parts: str) -> dict[str, Any]:
    """What an earlier run wrote. ValueError that names the file where it is damaged or lacks one of ``parts``."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if missing := [part for part in parts if part not in record]:
            raise ValueError(f"it has no {missing[0]!r}")
        return record
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a result: {error}") from None


def settled_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run that need no second try; the one it ended in has failed. ValueError as above."""
    ended = {"status": "failed", "message": "the process ended while this was measured"}
    rows = read_record(path, "rows")["rows"] if path.exists() else []
    try:
        rows = {row_name(row): row | ended if row["status"] == "running" else row for row in rows}
    except (KeyError, TypeError):
        raise ValueError(f"{path} cannot be read as a result: it has no rows") from None
    return [row for row in rows.values() if row["status"] != "skipped"]


def written(what: str, write: Callable[..., Any], *arguments: Any) -> bool:
    """Whether ``write(*arguments)`` could: where it cannot (a full disk), a line says so, and measuring goes on."""
    try:
        write(*arguments)
    except OSError as error:
        console.print(f"[red]error:[/] {escape(f'{what}: {error}')}", soft_wrap=True)
        return False
    return True


def run_cases(
    cases: Sequence[Case],
    path: Path,
    record: dict[str, Any],
    *,
    deadline: float = math.inf,
    resume: bool = False,
    jobs: int = 1,
) -> int:
    """Measure the cases one by one into ``record["rows"]``, written to ``path`` before and after each; the exit code.

    Past ``deadline`` (monotonic) the rest are recorded as skipped. ``resume`` keeps what ``path`` holds already.
    ``jobs`` cases are begun at the same time, each in a process of its own, where that is more than one. An
    interrupt leaves no trace of the row it came in. A row that cannot be written is reported and costs the exit code,
    not the rows after it.
    """
    rows: list[dict[str, Any]] = record.setdefault("rows", [])
    if resume:
        rows.extend(settled_rows(path))
    done = set(map(row_name, rows))
    todo = [case for case in cases if case.name not in done]
    late = {"status": "skipped", "message": "there was no time left", "seconds": 0.0}
    code, on_disk = 0, True
    with Bar(len(todo), seconds=0) as bar:
        for case in todo if jobs == 1 else _in_processes(todo, deadline, jobs):
            began = time.monotonic() < deadline
            if began:
                bar.begin(case.name)
            rows.append(case.facts | {"status": "running"})
            with suppress(OSError):  # reported below, with what was measured
                write_json(path, record)
            try:
                rows[-1] = case.run(deadline) if began else case.facts | late
            except KeyboardInterrupt:
                rows.pop()
                written(case.name, write_json, path, record)
                raise
            on_disk &= written(case.name, write_json, path, record)
            bar.advance(1, f"{case.name}: {rows[-1]['status']}")
            release()
            if rows[-1]["status"] == "failed" and device_lost(torch.device(record["machine"]["device_type"])):
                code = LOST
                break
    record["complete"] = code == 0
    on_disk &= written("all rows", write_json, path, record)
    return code or int(not on_disk or any(row["status"] == "failed" for row in rows))


def release() -> None:
    """Give back what a row held: tensors, graphs, compiled code."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
