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
from typing import Any, NamedTuple

from torch import Tensor

from autotune.tuner import Request
from kernels.launch import Launch, record_launches

__all__ = ["Build", "build", "builds", "precompile"]


class Build(NamedTuple):
    """A launch as data: the kernel by name, and of each tensor argument its element type."""

    module: str
    name: str
    grid: tuple[int, ...]
    arguments: tuple[tuple[str, Any], ...]
    pointers: frozenset[str]
    options: tuple[tuple[str, int], ...]


def _described(launch: Launch) -> Build:
    return Build(
        launch.kernel.__module__,
        launch.kernel.__name__,
        launch.grid,
        tuple((name, value.dtype if isinstance(value, Tensor) else value) for name, value in launch.arguments.items()),
        frozenset(name for name, value in launch.arguments.items() if isinstance(value, Tensor)),
        tuple(launch.options.items()),
    )


def builds(request: Request, most: int) -> Iterator[Build]:
    """The launches of a request's candidates."""
    for config in request.tunable.candidates(request.problem, most):
        # A config whose launcher fails is rejected, with its reason, when its turn to be timed comes.
        with record_launches() as launches, contextlib.suppress(Exception):
            request.trial.run(config)
        yield from map(_described, launches)


def build(described: Build) -> None:
    """Compile one launch into Triton's cache, for the current device."""
    from triton.runtime.jit import MockTensor

    kernel = getattr(importlib.import_module(described.module), described.name)
    arguments = {
        name: MockTensor(value) if name in described.pointers else value for name, value in described.arguments
    }
    kernel.warmup(grid=described.grid, **arguments, **dict(described.options))


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
