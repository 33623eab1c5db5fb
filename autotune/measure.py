"""Contenders that compute the same: each is checked before it is timed, then they take turns."""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autotune import timing
from autotune.timing import Timing

Call = Callable[[], list[Tensor]]
# (p80 − p20) / p50 from which a time is called unsteady, and the share of the cores that others may take unsaid.
WIDE_SPREAD = 0.2
BUSY_SHARE = 0.1


class DisagreementError(Exception):
    """Two contenders computed different things."""


def one_line(error: Exception) -> str:
    """The first line of an error, for a cell of a table; with its type, except for a disagreement."""
    text = str(error) if isinstance(error, DisagreementError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


@dataclass(frozen=True)
class Settings:
    """How everything in one run is measured.

    ``backend`` is our path's; ``seconds`` are spent on timing each case, but every contender runs ``min_runs`` times.
    ``thorough``: everything that can stand in for ours takes part, not only the naive path, and short calls are timed
    in CUDA graphs too. ``compiler`` is torch.compile's backend, None to leave compiling out. ``compile_only`` runs what
    is compiled once, which fills the caches on disk. ``ceilings`` are those of ``ceilings.measure_ceilings``, or the
    copy's alone. ``lock`` is the folder that processes which measure at the same time lock to be timed alone.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    seconds: float = 1.0
    min_runs: int = 5
    thorough: bool = False
    compiler: str | None = None
    compile_only: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)
    lock: str | None = None


@contextlib.contextmanager
def beside_others(folder: str | None) -> Iterator[Callable[[], None]]:
    """Processes that lock the same folder run side by side until they call what this yields: then one at a time, each
    to the end of its block, and alone. None: there are no others."""
    if folder is None:
        yield lambda: None
        return
    import fcntl  # which is not everywhere

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield lambda: fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)


def largest_error(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest ‖out − expected‖ / ‖expected‖ among pairs of tensors, NaN where one has a NaN."""
    errors = [timing.relative_error(out, want) for out, want in zip(outputs, expected, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error))


def check(error: float, tolerance: float, what: str) -> dict[str, float]:
    """The two numbers for the record; DisagreementError where the error is beyond its bound, or NaN."""
    if not error <= tolerance:
        raise DisagreementError(f"{what}: relative error {error:.1e}, allowed {tolerance:.1e}")
    return {"relative_error": error, "tolerance": tolerance}


@contextlib.contextmanager
def leaving_out(name: str, calls: dict[str, Any], left_out: dict[str, str]) -> Iterator[None]:
    """A contender that fails or disagrees inside the block leaves ``calls``; ``left_out`` has the reason."""
    try:
        yield
    except Exception as error:  # out of memory, a compiler that gives up, a function of somebody else's
        left_out[name] = one_line(error)
        calls.pop(name, None)


def time_and_memory(
    calls: Mapping[str, timing.Call], settings: Settings, measure: Callable[..., Any] = timing.measure
) -> dict[str, dict[str, Any]]:
    """Percentiles and runs of each call as ``measure`` takes them, and its ``peak_bytes``."""
    peaks = {name: timing.peak_memory(call, settings.device) for name, call in calls.items()}
    times = measure(calls, settings.device, seconds=settings.seconds, min_runs=settings.min_runs)
    return {name: asdict(found) | {"peak_bytes": peaks[name]} for name, found in times.items()}


def ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times as long as ours the others take."""
    return {name: times["p50_ms"] / found["ours"]["p50_ms"] for name, times in found.items() if name != "ours"}


def in_turns(
    calls: Mapping[str, timing.Call], device: torch.device, *, seconds: float, min_runs: int, idle: bool = False
) -> dict[str, Timing]:
    """As ``timing.measure``, for calls so long that what the L2 cache holds before them does not matter.

    On a GPU a run of each follows the other in the stream, between device events. The host then prepares a call while
    the device still computes the one before it, which hides the host's time for one contender and not for another where
    that is as long as the device's. With ``idle`` the device waits for every call: its time is all that somebody waits
    for who wants one result.
    """
    if device.type != "cuda":
        return timing.measure(calls, device, seconds=seconds, min_runs=min_runs)
    durations = [_event_milliseconds([call])[0] for call in calls.values()]
    runs = max(min_runs, min(50, int(1000 * seconds / sum(durations))))
    turns = [*calls.values()] * runs
    samples = [_event_milliseconds([call])[0] for call in turns] if idle else _event_milliseconds(turns)
    return {name: Timing.of(samples[index :: len(calls)]) for index, name in enumerate(calls)}


def _event_milliseconds(calls: Sequence[timing.Call]) -> list[float]:
    """Time between the ends of the calls, which run one after another on a device that is idle at first."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def graphs(calls: Mapping[str, Call]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each call as the replay of a CUDA graph; without those that cannot be captured."""
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # allocations and lazy set-up belong before a capture
                call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                call()
            yield name, graph.replay


# ---- what speaks against trusting the times


def _cpu_seconds() -> tuple[float, ...] | None:
    """Seconds: by the clock, of work on all cores of the machine, and of this process's own. None where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, fields)
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def other_work() -> Callable[[], float | None]:
    """How busy the machine is with something else from now on: a call of the result tells.

    It gives the cores that other processes (and other guests of a virtual machine's host) kept busy, on average.
    """
    start = _cpu_seconds()

    def cores() -> float | None:
        now = _cpu_seconds()
        if start is None or now is None:
            return None
        clock, work, own = (after - before for before, after in zip(start, now, strict=True))
        return max(0.0, (work - own) / clock) if clock > 0 else None

    return cores


def doubts(cores: float | None, cpu_count: int | None, lines: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Sentences where other processes keep more than a tenth of the cores busy, and where lines, each of some
    contenders' times, have one with a wide spread."""
    found = []
    if cores is not None and cpu_count and cores > BUSY_SHARE * cpu_count:
        found.append(f"the machine is busy: other processes take {cores:.1f} of its {cpu_count} cores")
    if wide := sum(any(t["p80_ms"] - t["p20_ms"] > WIDE_SPREAD * t["p50_ms"] for t in line) for line in lines):
        found.append(f"{wide} of {len(lines)} lines vary by more than {WIDE_SPREAD:.0%} of their median (p20 to p80)")
    return found
