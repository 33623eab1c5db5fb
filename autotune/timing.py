"""Measuring: alternating times, peak memory, copy bandwidth, and a description of the machine they belong to."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from kernels.backend import triton_installed

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call takes: 20th, 50th and 80th percentile over ``runs`` calls."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        p20, p50, p80 = np.percentile(milliseconds, (20, 50, 80)).tolist()
        return cls(p20, p50, p80, len(milliseconds))


def best_device() -> torch.device:
    """The GPU PyTorch sees, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float = 1.0, min_runs: int = 5, max_runs: int = 100
) -> dict[str, Timing]:
    """Time several calls that are to be compared with each other.

    The calls take turns, so that a machine that grows slower meanwhile slows them all alike, and compare by medians.
    On a GPU ``triton.testing.do_bench`` times them with device events and overwrites the L2 cache before every run;
    on a CPU one call runs after another, so each finds the caches as the others left them.

    Args:
        calls: name -> function without arguments; each runs once untimed beforehand.
        device: where they run.
        seconds: time to spend on all of them together.
        min_runs: runs of each that are made even where that takes longer.
        max_runs: runs of each after which to stop early (CPU).

    Returns:
        Name -> Timing.
    """
    for call in calls.values():
        call()
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    if device.type == "cuda" and triton_installed():
        from triton.testing import do_bench

        share = max(1, round(1000 * seconds / (min_runs * len(calls))))
        with torch.cuda.device(device):
            for _ in range(min_runs):
                for name, call in calls.items():
                    times = do_bench(call, warmup=share // 4, rep=share, return_mode="all")
                    samples[name] += times  # pyright: ignore[reportOperatorIssue]
        return {name: Timing.of(times) for name, times in samples.items()}

    deadline = time.perf_counter() + seconds
    for run in range(max(max_runs, min_runs)):
        if run >= min_runs and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            synchronize(device)
            samples[name].append(1000 * (time.perf_counter() - start))
    return {name: Timing.of(times) for name, times in samples.items()}


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Most bytes that were allocated at one moment of a call, beyond what was allocated before it.

    Inputs and weights are not counted, temporaries and the output are. None where the device cannot tell.

    On a CPU PyTorch's profiler reports every allocation and release of PyTorch's allocator, those inside an operator
    included; the peak of their running sum is the answer. Memory that a library takes from the system by itself
    (oneDNN's scratchpads, for one) is not seen.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    # The profiler's logger reads this at its first start and would write two lines into the terminal for every call.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profiler.profile(use_cpu=True, profile_memory=True) as recorded:
        call()
    events: Any = recorded.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def kernels_of(call: Call) -> list[tuple[str, float]]:
    """Name and microseconds of what a call runs on the GPU, in order, as PyTorch's profiler reads them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() or [] if event.device_type.name == "CUDA"]
    ordered = sorted(events, key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in ordered]


def busy_milliseconds(call: Call, device: torch.device) -> float | None:
    """The sum of what a call's kernels take on a GPU; None elsewhere.

    It is what the call would take if the host kept up with the GPU, and does not depend on how busy the host is.
    """
    return sum(time for _, time in kernels_of(call)) / 1000 if device.type == "cuda" else None


def copy_bandwidth(device: torch.device, *, size: int | None = None, seconds: float = 1.0) -> float:
    """Bytes per second that copying a large tensor reads and writes: the ceiling of every memory-bound kernel.

    Args:
        device: whose memory.
        size: bytes of the tensor; by default 1 GiB on a GPU and 256 MiB elsewhere, beyond any cache.
        seconds: time to spend.
    """
    size = size or (2**30 if device.type == "cuda" else 2**28)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    count = torch.get_num_threads() if device.type == "cpu" else 1
    parts = [functools.partial(t.copy_, s) for s, t in zip(source.chunk(count), target.chunk(count), strict=True)]
    return 2 * source.nbytes / ceiling_seconds(parts, device, seconds)


def copy_milliseconds(device: torch.device, moved: int, *, seconds: float) -> float:
    """Time in which a copy moves so many bytes: one of that size, since small tensors stay in caches."""
    return 1000 * moved / copy_bandwidth(device, size=max(4, moved // 2), seconds=seconds)


def ceiling_seconds(parts: Sequence[Call], device: torch.device, seconds: float) -> float:
    """Seconds in which the device does all parts of what a ceiling is made of: on a GPU the median.

    On a CPU it is the fastest run of three ways: PyTorch's threads at each part, one thread, and the parts side by side
    on a thread each, as the kernels run. Cores are shared, and a ceiling that another program's work had lowered would
    have measurements above it.
    """

    def one_by_one() -> None:
        for part in parts:
            part()

    if device.type != "cpu":
        return measure({"parts": one_by_one}, device, seconds=seconds)["parts"].p50_ms / 1000
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ways: list[tuple[int, Call]] = [(threads, one_by_one)]
        if threads > 1:
            ways += [(1, one_by_one), (1, lambda: list(pool.map(lambda part: part(), parts)))]
        timers = [Timer("way()", globals={"way": way}, num_threads=count) for count, way in ways]
        return min(min(timer.blocked_autorange(min_run_time=seconds / len(ways)).times) for timer in timers)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖ in float64: NaN where out has one, ‖out‖ where expected is 0."""
    if out.shape != expected.shape:
        raise ValueError(f"out must have the shape of expected, {tuple(expected.shape)}, got {tuple(out.shape)}")
    place = "cpu" if out.device.type == "mps" else out.device  # Apple's GPUs know no float64
    out, expected = (tensor.detach().to(place).double() for tensor in (out, expected))
    return ((out - expected).norm() / (expected.norm() or 1)).item()


def _cpu_name() -> str:
    name = _output("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else None
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found and found[1]
    name = name or platform.processor() or platform.machine() or "CPU"
    return " ".join(re.sub(r"\((R|TM|C)\)|\b(CPU|Processor)\b|@", " ", name, flags=re.IGNORECASE).split())


def device_name(device: torch.device) -> str:
    """What a figure calls the device: "NVIDIA H200", or "Intel Xeon 2.50GHz, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    cpu = f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    return cpu if device.type == "cpu" else f"{device.type.upper()} of {_cpu_name()}"


def precision(dtype: torch.dtype) -> str:
    """As people write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def label(device: torch.device, dtype: torch.dtype) -> str:
    """What a figure says of its origin: "NVIDIA H200 · bfloat16"."""
    return f"{device_name(device)} · {precision(dtype)}"


def usual_dtype(device: torch.device) -> torch.dtype:
    """In which things are measured unless something else is asked for."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def device_folder(device: torch.device) -> str:
    """A file name for the device's results: NVIDIA_H200, cpu_Intel_Xeon_2.50GHz."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}_{_cpu_name()}"
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.")


def repository_root() -> Path | None:
    """The checkout this package runs from; None where it is installed elsewhere."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").exists() else None


def results_folder(device: torch.device, *, scratch: bool) -> Path:
    """Where results of a device go by default; ``scratch`` is for what must not replace committed ones."""
    parent = "build" if scratch else "notebooks"
    return (repository_root() or Path.cwd()) / parent / "results" / device_folder(device)


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() or None if done.returncode == 0 else None


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date, without which a measurement means nothing."""
    root = repository_root()
    commit = root and _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    machine: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        machine |= {
            "driver": drivers.splitlines()[0] if drivers else None,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "device_memory_bytes": properties.total_memory,
        }
    return machine
