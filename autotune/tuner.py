"""Finding the config of a launch: every candidate is checked against the eager path, then timed, and the best is kept.

It happens only when asked for: inside ``with tuning():``, with DYNAMIC_KERNELS_AUTOTUNE=1 in a program that imports
``autotune``, or by ``python -m autotune tune``.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import kernels
from autotune import timing
from autotune.measure import one_line
from kernels import tolerances
from kernels.tuning import choose
from kernels.tuning.choose import Config, Problem, Request, gpu_name, observing, remember, triton_version

MOST_CANDIDATES = 20

Outputs = Tensor | Sequence[Tensor]
Clock = Callable[[timing.Call], float]  # milliseconds of a call


class Outcome(NamedTuple):
    """One candidate: its median time in milliseconds, or why it was rejected."""

    config: Config
    milliseconds: float | None
    rejected: str | None = None


@contextmanager
def tuning() -> Iterator[None]:
    """Inside the block, a problem without a tuned config is tuned at its first launch."""
    with choose.asking(lambda request: tune(request)[0].config):
        yield


@contextmanager
def meeting(observer: Callable[[Request], object]) -> Iterator[None]:
    """Inside the block kernels launch, and ``observer`` is told of every launch; also of a backward pass's, which runs
    on this thread: an interrupt or a lost device then ends it at once."""
    with (
        kernels.use_backend("triton"),
        observing(observer),
        torch.autograd.set_multithreading_enabled(False),  # pyright: ignore[reportPrivateImportUsage]
    ):
        yield


def disagreement(outputs: Outputs, reference: Outputs, problem: Problem = None) -> str | None:
    """Why a candidate is wrong, or None: relative norm against the reference, NaN never passes.

    The bound is that of the coarser of an output's and the problem's dtypes: a float32 gradient may be computed from a
    bfloat16 output.
    """
    coarsest = tolerances.GRADIENT[getattr(problem, "dtype", torch.float64)]
    for index, (out, expected) in enumerate(zip(tree_leaves(outputs), tree_leaves(reference), strict=True)):
        error = timing.relative_error(out, expected)
        if not error <= max(tolerances.GRADIENT[out.dtype], coarsest):
            return f"output {index} is off by {error:.1e} (relative norm)"
    return None


def median_milliseconds(call: timing.Call) -> float:
    """Device time of a call, in a CUDA graph: a short kernel's own time is less than what its launch takes the host."""
    from triton.testing import do_bench, do_bench_cudagraph

    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            # Ten replays of a graph that holds as many calls as take 4 ms.
            return do_bench_cudagraph(call, rep=4, return_mode="median")  # pyright: ignore[reportReturnType]
    except RuntimeError:  # what cannot be captured, such as a synchronising library call
        return do_bench(call, warmup=10, rep=50, return_mode="median")  # pyright: ignore[reportReturnType]


@torch.no_grad()  # as inside an operator: a request may be run when its launch is long over
def measure_candidates(
    request: Request, time_call: Clock = median_milliseconds, most: int = MOST_CANDIDATES
) -> list[Outcome]:
    """Every candidate, fastest first and rejected ones last. A config that fails or disagrees is never timed."""
    reference = request.reference()
    outcomes = []
    for config in request.launcher.candidates(request.problem, most):
        try:
            rejected = disagreement(request.run(config), reference, request.problem)
            time = None if rejected else time_call(lambda config=config: request.run(config))
            outcomes.append(Outcome(config, time, rejected))
        except Exception as error:  # out of shared memory, a compiler failure: one config less, not the end of tuning
            outcomes.append(Outcome(config, None, one_line(error)))
    return sorted(outcomes, key=lambda o: (o.milliseconds is None, o.milliseconds or 0.0))


def heuristic_milliseconds(request: Request, outcomes: Sequence[Outcome]) -> float | None:
    """What the heuristic's config takes, None where it was not timed."""
    by_default = request.launcher.heuristic(request.problem)
    return next((outcome.milliseconds for outcome in outcomes if outcome.config == by_default), None)


def tune(request: Request, time_call: Clock = median_milliseconds, most: int = MOST_CANDIDATES) -> list[Outcome]:
    """Measure the candidates, keep the best in the user's store, and return them all, best first.

    If every candidate is rejected nothing is stored, the heuristic's config leads the list, and a warning says so.
    """
    outcomes = measure_candidates(request, time_call, most)
    if outcomes[0].milliseconds is None:
        message = f"no config of {request.key} ran and agreed with the reference; first: {outcomes[0].rejected}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        by_default = request.launcher.heuristic(request.problem)
        return sorted(outcomes, key=lambda o: o.config != by_default)
    entry: dict[str, Any] = {
        "config": dataclasses.asdict(outcomes[0].config),
        "triton": triton_version(),
        "source": request.launcher.source,
        "milliseconds": outcomes[0].milliseconds,
        "heuristic_milliseconds": heuristic_milliseconds(request, outcomes),
        "candidates": len(outcomes),
    }
    remember(request.key, entry, gpu_name(request.device))
    return outcomes
