"""Which config a launch uses: tuned where somebody tuned it, a documented heuristic everywhere else.

Look-up order for a problem, which must be the very same at every step:

1. the user's store,
2. the configs shipped for this GPU in kernels/tuning/configs,
3. those shipped for a GPU with the same chip,
4. the kernel's heuristic, a function of the problem.

``@tunable`` makes a launcher that asks in this order when it is called without a config. Nothing is ever timed here:
``autotune.tuning()`` sets ``on_miss``, which is then asked for a config where nothing was tuned on this GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kernels.dtypes import at_least_float32
from kernels.launch import is_plain, noticed
from kernels.tuning.repeat import Repeat, key_of_call, repeat_of
from kernels.tuning.source import source_of, triton_version
from kernels.tuning.store import gpu_name, opened, shipped_folder, user_folder

Config = Any  # a frozen dataclass with ``valid(problem)``
Problem = Any  # a NamedTuple of what the choice depends on, with a field ``pixels``
Outputs = TypeVar("Outputs")


class Request(NamedTuple):
    """A launch that wants a config: everything that tuning it needs. Its tensors may be overwritten soon after."""

    launcher: Launcher
    problem: Problem
    device: torch.device
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def key(self) -> str:
        """That of an entry for it."""
        return key_of(self.launcher, self.problem)

    def run(self, config: Config) -> Any:
        """The launch with a config of the caller's."""
        return self.launcher.launch(*self.arguments, **self.keywords, config=config)

    def reference(self) -> Any:
        """What the launch must return, from the eager path on tensors in the types of their sums."""
        arguments, keywords = tree_map_only(Tensor, lambda t: at_least_float32(t)[0], (self.arguments, self.keywords))
        return self.launcher.reference(*arguments, **keywords)


class Choice(NamedTuple):
    config: Config
    source: str  # "store", "shipped", "same chip" or "heuristic"

    @property
    def tuned(self) -> bool:
        """Whether it was found on this very GPU."""
        return self.source in ("store", "shipped")


# One chip, and as many multiprocessors in use: memory sizes and speeds alone differ.
SAME_CHIP = dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA GH200 480GB"), "NVIDIA H200")


@dataclasses.dataclass(eq=False, repr=False)
class Launcher(Generic[Outputs]):
    """A function ``launch(*arguments, config)`` that, called without a config, looks one up; made by ``tunable``."""

    launch: Callable[..., Outputs]
    name: str
    configs: Sequence[Config]
    heuristic: Callable[[Any], Config]
    problem_of: Callable[..., Problem]
    reference: Callable[..., Any]

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.launch)

    def __call__(self, *arguments: Any, config: Config = None, **keywords: Any) -> Outputs:
        if config is not None:
            return self.launch(*arguments, **keywords, config=config)
        return _again(self.name, self._launch_chosen, *arguments, **keywords)

    def _launch_chosen(self, *arguments: Any, **keywords: Any) -> Outputs:
        return self.launch(*arguments, **keywords, config=self.choose(*arguments, **keywords))

    def choose(self, *arguments: Any, **keywords: Any) -> Config:
        """The config for a launch with these arguments: after the first time one dictionary look-up."""
        problem, device = self.problem_of(*arguments, **keywords), _device_of(arguments)
        place = self.name, problem, device
        config = _chosen.get(place)
        if config is not None:
            return config
        request = Request(self, problem, device, arguments, keywords)
        if _observer is not None:
            _observer(request)
        if device.type != "cuda":  # the interpreter, or meta tensors whose launch is recorded
            config = self.heuristic(problem)
        else:
            choice = look_up(self, problem, gpu_name(device))
            config = choice.config
            if on_miss is not None and not choice.tuned:
                # A capturing stream may not be synchronised, and timing does that: the next launch is asked again.
                if torch.cuda.is_current_stream_capturing():
                    return config
                config = on_miss(request)
        _chosen[place] = config
        return config

    @functools.cached_property
    def problem_type(self) -> type:
        """The NamedTuple type of its problems, by which keys are read back: the heuristic's parameter."""
        return typing.get_type_hints(self.heuristic)[next(iter(inspect.signature(self.heuristic).parameters))]

    @functools.cached_property
    def source(self) -> str:
        """Hash of the code that its times come from."""
        return source_of(self.launch.__module__)

    def candidates(self, problem: Problem, most: int | None = None) -> list[Config]:
        """What tuning times: the heuristic's choice, then the other valid configs."""
        valid = [config for config in self.configs if config.valid(problem)]
        first = self.heuristic(problem)
        if valid and not first.valid(problem):  # as in the interpreter: no look-up would accept it from a file
            return valid[:most]
        return [first, *(config for config in valid if config != first)][:most]


def tunable(
    configs: Sequence[Config],
    heuristic: Callable[[Any], Config],
    *,
    problem: Callable[..., Problem],
    reference: Callable[..., Any],
    name: str | None = None,
) -> Callable[[Callable[..., Outputs]], Launcher[Outputs]]:
    """Decorator for a launcher ``(*arguments, config)``: called without a config, it looks one up.

    Args:
        configs: about 16 at most; each says with ``valid(problem)`` whether it fits a problem.
        heuristic: problem -> config, its parameter annotated with the type of the problem.
        problem: the launcher's arguments -> problem.
        reference: the launcher's arguments, in float32 at least -> the right outputs.
        name: the first word of its keys, where the function's own name is not telling enough.
    """
    return lambda launch: Launcher(launch, name or launch.__name__, tuple(configs), heuristic, problem, reference)


def repeated(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Decorator for a pass of several launches, which is then repeated as a whole.

    What it allocates, views and launches must follow from its tensors' shapes, strides, types and alignment and from
    its other arguments. A pass that does anything else to a tensor runs as it is written.
    """
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)  # not a partial: PyTorch reads the code of functions to find the kernels they launch
    def again(*arguments: Any, **keywords: Any) -> Outputs:
        return _again(name, function, *arguments, **keywords)

    return again


def _again(name: str, call: Callable[..., Outputs], /, *arguments: Any, **keywords: Any) -> Outputs:
    """The result of a call, which is repeated where an equal one was made before, and watched where none was."""
    traced = isinstance(arguments[0], Tensor) and not is_plain(arguments[0])
    if traced or noticed() or _observer is not None or on_miss is not None:
        return call(*arguments, **keywords)
    key, tensors = key_of_call(name, arguments, keywords)
    repeat = _repeats.get(key)
    if repeat is not None:
        return repeat(tensors)
    if key in _repeats:
        return call(*arguments, **keywords)
    returned, repeat = repeat_of(lambda: call(*arguments, **keywords), tensors)
    if len(_repeats) >= MOST_REPEATS:
        _repeats.clear()
    _repeats[key] = repeat
    return returned


def _device_of(arguments: Sequence[Any]) -> torch.device:
    first = arguments[0]
    while not isinstance(first, Tensor):
        first = first[0]
    return first.device


def bucket(pixels: int) -> int:
    """Map sizes that share an entry: exact up to 256 pixels, then up to the next power of two.

    On the small maps (49, 196) a tile that does not divide the map wastes a large part of it, so the best tile is the
    size's own; beyond, waste is below an eighth and what counts is only how many tiles there are.
    """
    return pixels if pixels <= 256 else 1 << (pixels - 1).bit_length()


def key_of(launcher: Launcher, problem: Problem) -> str:
    """The exact key of an entry: every field of the problem by name, pixels by bucket."""
    fields = problem._asdict()
    fields["pixels"] = bucket(fields["pixels"])
    return " ".join([launcher.name, *(f"{name}={value}".replace("=torch.", "=") for name, value in fields.items())])


def stale(entry: dict[str, Any], launcher: Launcher) -> str | None:
    """Why an entry no longer holds, or None."""
    if entry.get("triton") != triton_version():
        return f"tuned with triton {entry.get('triton')}, this is {triton_version()}"
    if entry.get("source") != launcher.source:
        return "the kernel's code has changed since"
    return None


def config_of(entry: dict[str, Any], launcher: Launcher, problem: Problem) -> Config | None:
    """The entry's config, if tuning would try it: a hostile or outdated file cannot name any other."""
    offered = (*launcher.configs, launcher.heuristic(problem))
    return next((c for c in offered if dataclasses.asdict(c) == entry.get("config")), None)


def look_up(launcher: Launcher, problem: Problem, gpu: str) -> Choice:
    """The config of a problem by the order above."""
    key = key_of(launcher, problem)
    places = [("store", user_folder(), gpu), ("shipped", shipped_folder(), gpu)]
    if gpu in SAME_CHIP:
        places.append(("same chip", shipped_folder(), SAME_CHIP[gpu]))
    for name, folder, of_gpu in places:
        entry = opened(folder, of_gpu)[1].get(key)
        if entry is not None and stale(entry, launcher) is None:
            config = config_of(entry, launcher, problem)
            if config is not None and config.valid(problem):
                return Choice(config, name)
    return Choice(launcher.heuristic(problem), "heuristic")


def remember(key: str, entry: dict[str, Any], gpu: str) -> bool:
    """Write an entry to the user's store, and use it in this process from now on; False where it cannot be written."""
    store, entries = opened(user_folder(), gpu)
    entries[key] = entry
    return store.update({key: entry})


_chosen: dict[tuple[str, Problem, torch.device], Config] = {}
# How to repeat earlier calls; None for a call that does more than allocate, view and launch.
_repeats: dict[tuple[Any, ...], Repeat | None] = {}
MOST_REPEATS = 4096


def _choose_again() -> None:
    """Whatever was chosen before is chosen again when it is met."""
    _chosen.clear()
    _repeats.clear()


# This is asked for a config where nothing was tuned on this GPU.
on_miss: Callable[[Request], Config] | None = None
_observer: Callable[[Request], object] | None = None


@contextmanager
def asking(function: Callable[[Request], Config] | None) -> Iterator[None]:
    """Inside the block ``on_miss`` is ``function``, and what was chosen before is chosen again."""
    global on_miss
    previous, on_miss = on_miss, function
    _choose_again()
    try:
        yield
    finally:
        on_miss = previous


@contextmanager
def observing(observer: Callable[[Request], object]) -> Iterator[None]:
    """Inside the block, ``observer`` is told of every problem that a launch meets, before a config is chosen for it."""
    global _observer
    previous, _observer = _observer, observer
    _choose_again()  # the observer shall meet what was chosen before the block
    try:
        yield
    finally:
        _observer = previous
        _choose_again()  # and nothing that was chosen inside shall outlive it


def forget() -> None:
    """Drop what this process remembers, so that the files are read again."""
    _choose_again()
    opened.cache_clear()
