"""Compile launches without making them, for this device or for a named architecture that is not here.

A recorded launch becomes data (tensors as element types), which ``JITFunction.warmup`` compiles exactly as the launch
would. Compiling takes a second, timing a twentieth of one: what tuning is about to time is compiled in parallel
processes, whose results meet in Triton's cache on disk.
"""

import contextlib
import importlib
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.launch import Launch, record_launches
from kernels.tuning.choose import Request


@dataclass(frozen=True)
class Pointer:
    """What stands in for a tensor: Triton compiles other code where its address is not a multiple of 16."""

    dtype: torch.dtype
    address: int  # modulo 16

    def data_ptr(self) -> int:
        return self.address


def absent_device(target: Any) -> Any:
    """What Triton asks its driver for, of a device that is not here; ``target`` is a GPUTarget."""
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )


class Build(NamedTuple):
    """A launch as data: the kernel by name, and a ``Pointer`` for each tensor among its arguments."""

    module: str
    name: str
    grid: tuple[int, ...]
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]


def _as_data(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Recorded on the device that it will run on, or on meta, where there is only the offset in its storage.
        address = value.storage_offset() * value.element_size() if value.is_meta else value.data_ptr()
        return Pointer(value.dtype, int(address) % 16)
    return type(value)(*map(_as_data, value)) if hasattr(value, "_fields") else value


def described(launch: Launch) -> Build:
    return Build(
        launch.kernel.__module__,
        launch.kernel.__name__,
        launch.grid,
        tuple((name, _as_data(value)) for name, value in launch.arguments.items()),
        tuple(launch.options.items()),
    )


def builds(request: Request, most: int) -> Iterator[Build]:
    """The launches of a request's candidates."""
    for config in request.launcher.candidates(request.problem, most):
        # A config whose launcher fails is rejected, with its reason, when its turn to be timed comes.
        with record_launches() as launches, contextlib.suppress(Exception):
            request.run(config)
        yield from map(described, launches)


def build(what: Build, target: Any = None) -> Any:
    """Compile one launch into Triton's cache, for ``target`` (a GPUTarget) or the current device; what was compiled."""
    from triton.runtime import driver

    kernel = getattr(importlib.import_module(what.module), what.name)
    if target is None:
        return kernel.warmup(grid=what.grid, **dict(what.arguments), **dict(what.options))
    previous: Any = driver._active
    try:
        if target.arch != 90:  # where heuristics limit no registers
            what = what._replace(options=tuple(option for option in what.options if option[0] != "maxnreg"))
        driver.set_active(absent_device(target))
        kernel.device_caches.clear()  # of the current device, and of other targets: they are kept by its number alone
        return build(what)
    finally:
        kernel.device_caches.clear()
        driver.set_active(previous)


def precompile(work: list[Build], seconds: float) -> Iterator[None]:
    """Compile on all processors but one, yielding after each; give up after ``seconds``."""
    workers = min((os.cpu_count() or 2) - 1, len(work))
    if workers < 2:
        return  # no faster than compiling when the turn comes
    # Not forked: the parent has a CUDA context, which no child may inherit.
    spawning = multiprocessing.get_context("spawn")
    with contextlib.suppress(FutureTimeoutError, BrokenProcessPool), ProcessPoolExecutor(workers, spawning) as pool:
        yield from pool.map(_built, work, timeout=None if math.isinf(seconds) else seconds)


def _built(what: Build) -> None:
    """One that fails is left to the launch itself, which says why; of the others the file in Triton's cache is all
    that is needed."""
    with contextlib.suppress(Exception):
        build(what)
