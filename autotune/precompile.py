"""Compile what tuning is about to time, in parallel processes: their results meet in Triton's cache on disk.

Compiling takes a second, timing a twentieth of one. The launches of every candidate are recorded, sent to other
processes as data (tensors as element types), and compiled there exactly as a launch would, by ``JITFunction.warmup``.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
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


def _described(launch: Launch) -> Build:
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
        yield from map(_described, launches)


def build(described: Build) -> None:
    """Compile one launch into Triton's cache, for the current device."""
    kernel = getattr(importlib.import_module(described.module), described.name)
    kernel.warmup(grid=described.grid, **dict(described.arguments), **dict(described.options))


def precompile(work: list[Build], seconds: float, workers: int | None = None) -> Iterator[None]:
    """Compile in ``workers`` processes (all processors but one), yielding after each; give up after ``seconds``.

    A compilation that fails is left to the launch itself, which says why.
    """
    workers = min(workers or max(1, (os.cpu_count() or 2) - 1), len(work))
    if workers < 2:
        return  # no faster than compiling when the turn comes
    timeout = None if math.isinf(seconds) else seconds
    # Not forked: the parent has a CUDA context, which no child may inherit.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            futures = [pool.submit(build, described) for described in work]
            for _ in as_completed(futures, timeout=timeout):
                yield
        except (FutureTimeoutError, BrokenProcessPool):
            return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
