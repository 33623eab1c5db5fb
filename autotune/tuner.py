"""Which config a launch uses: tuned where somebody tuned it, a documented heuristic everywhere else.

Look-up order for a problem, exact at every step and never "close enough":

1. the user's store,
2. the configs shipped for this GPU in autotune/configs,
3. the kernel's heuristic, a function of the problem.

Timing candidates happens only when asked for: inside ``with tuning():``, with DYNAMIC_KERNELS_AUTOTUNE=1, or by
``python -m autotune tune``. A candidate's output is compared with the eager path's before its time counts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from autotune.store import Store, shipped_folder, user_folder

__all__ = [
    "Choice",
    "Outcome",
    "Request",
    "Trial",
    "Tunable",
    "bucket",
    "choose",
    "forget",
    "key_of",
    "look_up",
    "observing",
    "tune",
    "tuning",
]

MOST_CANDIDATES = 20
# ‖candidate − eager‖ / ‖eager‖ above which a candidate is wrong, whatever its speed: rounding of outputs and gradients.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Config = Any  # a frozen dataclass with ``valid(problem)``
ConfigType = TypeVar("ConfigType", bound=Any)
Problem = Any  # a NamedTuple of what the choice depends on
Outputs = Tensor | Sequence[Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Tunable(Generic[ConfigType]):
    """A kernel as the tuner sees it.

    Attributes:
        name: operator and direction, the first word of its keys.
        configs: all configs that are ever tried.
        heuristic: problem -> the config where nothing was tuned.
        cost: (problem, config) -> relative estimate of a launch, by which candidates are ranked.
        modules: modules whose source the kernel is made of; tuned entries lapse when it changes.
        problem: the NamedTuple type of its problems, by which keys are read back.
        example: "module:function", (problem, device) -> None: launches the kernel on random inputs of that problem.
    """

    name: str
    configs: tuple[ConfigType, ...]
    heuristic: Callable[[Any], ConfigType]
    cost: Callable[[Any, ConfigType], float]
    modules: tuple[str, ...]
    problem: type | None = None
    example: str | None = None

    @functools.cached_property
    def source(self) -> str:
        """Hash of the kernel's source files."""
        digest = hashlib.sha256()
        for name in self.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            digest.update(Path(spec.origin).read_bytes())
        return digest.hexdigest()[:16]

    def candidates(self, problem: Problem, most: int = MOST_CANDIDATES) -> list[ConfigType]:
        """What tuning times: the heuristic's choice, then the valid configs of least estimated cost."""
        valid = sorted((c for c in self.configs if c.valid(problem)), key=lambda c: self.cost(problem, c))
        first = self.heuristic(problem)
        if valid and not first.valid(problem):  # as in the interpreter: no look-up would accept it from a file
            return valid[:most]
        return [first, *(c for c in valid if c != first)][:most]


class Trial(NamedTuple):
    """How to run a problem at hand: with a config, and on the eager path in at least float32."""

    run: Callable[[Config], Outputs]
    reference: Callable[[], Outputs]


class Request(NamedTuple):
    """A problem met by a launch, with everything that tuning it needs."""

    tunable: Tunable
    problem: Problem
    device: torch.device
    trial: Trial


class Choice(NamedTuple):
    config: Config
    source: str  # "store", "shipped" or "heuristic"


class Outcome(NamedTuple):
    """One candidate: its median time in milliseconds, or why it was rejected."""

    config: Config
    milliseconds: float | None
    rejected: str | None = None


def bucket(pixels: int) -> int:
    """Map sizes that share an entry: exact up to 256 pixels, then up to the next power of two.

    On the small maps (49, 196) a tile that does not divide the map wastes a large part of it, so the best tile is the
    size's own; beyond, waste is below an eighth and what counts is only how many tiles there are.
    """
    return pixels if pixels <= 256 else 1 << (pixels - 1).bit_length()


def key_of(tunable: Tunable, problem: Problem) -> str:
    """The exact key of an entry: every field of the problem by name, pixels by bucket."""
    fields = problem._asdict()
    fields["pixels"] = bucket(fields["pixels"])
    return " ".join([tunable.name, *(f"{name}={value}".replace("=torch.", "=") for name, value in fields.items())])


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def gpu_name(device: torch.device) -> str:
    """Name under which configs of a device are kept; CPU tensors run in the interpreter, where nothing is timed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stale(entry: dict[str, Any], tunable: Tunable) -> str | None:
    """Why an entry no longer holds, or None."""
    if entry.get("triton") != triton_version():
        return f"tuned with triton {entry.get('triton')}, this is {triton_version()}"
    if entry.get("source") != tunable.source:
        return "the kernel's source has changed since"
    return None


def config_of(entry: dict[str, Any], tunable: Tunable, problem: Problem) -> Config | None:
    """The entry's config, if it is one that tuning tries: a hostile or outdated file can name no other."""
    offered = (*tunable.configs, tunable.heuristic(problem))
    return next((c for c in offered if dataclasses.asdict(c) == entry.get("config")), None)


@functools.cache
def _stores(gpu: str, user: Path) -> tuple[tuple[str, Store], ...]:
    return ("store", Store(user, gpu)), ("shipped", Store(shipped_folder(), gpu))


@functools.cache
def _entries(gpu: str, user: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Both files, read once a process; tuning refreshes its own."""
    return {name: store.read() for name, store in _stores(gpu, user)}


def look_up(tunable: Tunable, problem: Problem, gpu: str) -> Choice:
    """The config of a problem by the order above."""
    key = key_of(tunable, problem)
    for name, entries in _entries(gpu, user_folder()).items():
        entry = entries.get(key)
        if entry is not None and stale(entry, tunable) is None:
            config = config_of(entry, tunable, problem)
            if config is not None and config.valid(problem):
                return Choice(config, name)
    return Choice(tunable.heuristic(problem), "heuristic")


_chosen: dict[tuple[str, Problem, torch.device], Config] = {}
_tuning = os.environ.get("DYNAMIC_KERNELS_AUTOTUNE") == "1"


@contextmanager
def tuning(enabled: bool = True) -> Iterator[None]:
    """Inside the block, a problem without a tuned config is tuned at its first launch."""
    global _tuning
    previous, _tuning = _tuning, enabled
    if enabled:
        _chosen.clear()  # heuristic choices made so far must not stand in the way
    try:
        yield
    finally:
        _tuning = previous


_observer: Callable[[Request], object] | None = None


@contextmanager
def observing(observer: Callable[[Request], object]) -> Iterator[None]:
    """Inside the block, ``observer`` is told of every problem that a launch meets, before a config is chosen for it.

    A request's trial is good for as long as the observer runs: later its tensors may have been overwritten.
    """
    global _observer
    previous, _observer = _observer, observer
    _chosen.clear()  # what was chosen before the block is to be met again
    try:
        yield
    finally:
        _observer = previous
        _chosen.clear()  # and what was chosen inside is not to outlive it


def forget() -> None:
    """Drop what this process remembers, so that the files are read again."""
    _chosen.clear()
    _entries.cache_clear()
    _stores.cache_clear()


def choose(tunable: Tunable[ConfigType], problem: Problem, device: torch.device, trial: Trial) -> ConfigType:
    """The config for a launch: after the first time one dictionary look-up."""
    key = (tunable.name, problem, device)
    config = _chosen.get(key)
    if config is None:
        config = _chosen[key] = _decide(tunable, problem, device, trial)
    return config


def _decide(tunable: Tunable, problem: Problem, device: torch.device, trial: Trial) -> Config:
    if _observer is not None:
        _observer(Request(tunable, problem, device, trial))
    if device.type != "cuda":  # the interpreter, or meta tensors whose launch is recorded
        return tunable.heuristic(problem)
    gpu = gpu_name(device)
    choice = look_up(tunable, problem, gpu)
    # A capturing stream may not be synchronised, and timing does that.
    if choice.source != "heuristic" or not _tuning or torch.cuda.is_current_stream_capturing():
        return choice.config
    return tune(tunable, problem, device, trial)[0].config


def _tensors(outputs: Outputs) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def disagreement(outputs: Outputs, reference: Outputs, problem: Problem = None) -> str | None:
    """Why a candidate is wrong, or None: relative norm against the reference, NaN never passes.

    The bound is that of the coarser of an output's and the problem's dtypes: a float32 gradient may be computed from a
    bfloat16 output.
    """
    coarsest = TOLERANCE[getattr(problem, "dtype", torch.float64)]
    for index, (out, expected) in enumerate(zip(_tensors(outputs), _tensors(reference), strict=True)):
        norm = expected.double().norm().item()
        error = (out.double() - expected.double()).norm().item() / (norm or 1.0)
        if not error <= max(TOLERANCE[out.dtype], coarsest):
            return f"output {index} is off by {error:.1e} (relative norm)"
    return None


def median_milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=50, return_mode="median")  # pyright: ignore[reportReturnType]


@torch.no_grad()  # as inside an operator: a trial may be run when its launch is long over
def measure_candidates(
    tunable: Tunable,
    problem: Problem,
    trial: Trial,
    time_call: Callable[[Callable[[], object]], float] = median_milliseconds,
    most: int = MOST_CANDIDATES,
) -> list[Outcome]:
    """Every candidate, fastest first and rejected ones last. A config that fails or disagrees is never timed."""
    reference = trial.reference()
    outcomes = []
    for config in tunable.candidates(problem, most):
        try:
            rejected = disagreement(trial.run(config), reference, problem)
            time = None if rejected else time_call(lambda config=config: trial.run(config))
            outcomes.append(Outcome(config, time, rejected))
        except Exception as error:  # out of shared memory, a compiler failure: one config less, not the end of tuning
            outcomes.append(Outcome(config, None, f"{type(error).__name__}: {error}".splitlines()[0]))
    return sorted(outcomes, key=lambda o: (o.milliseconds is None, o.milliseconds or 0.0))


def tune(
    tunable: Tunable,
    problem: Problem,
    device: torch.device,
    trial: Trial,
    time_call: Callable[[Callable[[], object]], float] = median_milliseconds,
    most: int = MOST_CANDIDATES,
) -> list[Outcome]:
    """Measure the candidates, keep the best in the user's store, and return them all, best first.

    If every candidate is rejected nothing is stored, the heuristic's config leads the list, and a warning says so.
    """
    outcomes = measure_candidates(tunable, problem, trial, time_call, most)
    if outcomes[0].milliseconds is None:
        warnings.warn(
            f"no config of {key_of(tunable, problem)} ran and agreed with the reference; first: {outcomes[0].rejected}",
            RuntimeWarning,
            stacklevel=2,
        )
        chosen = tunable.heuristic(problem)
        return sorted(outcomes, key=lambda o: o.config != chosen)
    gpu, folder = gpu_name(device), user_folder()
    chosen = tunable.heuristic(problem)
    entry = {
        "config": dataclasses.asdict(outcomes[0].config),
        "triton": triton_version(),
        "source": tunable.source,
        "milliseconds": outcomes[0].milliseconds,
        "heuristic_milliseconds": next((o.milliseconds for o in outcomes if o.config == chosen), None),
        "candidates": len(outcomes),
    }
    key = key_of(tunable, problem)
    (_, store), _ = _stores(gpu, folder)
    store.update({key: entry})
    _entries(gpu, folder)["store"][key] = entry
    return outcomes
