"""All kernels that can be tuned, found where they are defined, and what a stored key and entry mean to them."""

import functools
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from kernels.tuning.choose import SAME_CHIP, Config, Launcher, Problem, config_of, key_of, stale
from kernels.tuning.store import Store, shipped_folder, user_folder


@functools.cache
def find_tunables() -> dict[str, Launcher]:
    """Name -> launcher, of every one that a module of ``kernels`` holds.

    Raises:
        ImportError: triton is not installed.
        ValueError: two kernels share a name, and so would share their entries.
    """
    import kernels

    found: dict[str, Launcher] = {}
    for module_info in pkgutil.walk_packages(kernels.__path__, "kernels."):
        for value in vars(importlib.import_module(module_info.name)).values():
            if isinstance(value, Launcher) and found.setdefault(value.name, value) is not value:
                raise ValueError(f"two kernels are called {value.name!r}; the second is in {module_info.name}")
    return dict(sorted(found.items()))


READERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: {"True": True, "False": False}.__getitem__,
    torch.dtype: lambda text: getattr(torch, text),
}


def problem_of(launcher: Launcher, key: str) -> Problem:
    """The problem that a key was made from, its pixels those of the bucket. ValueError for a key made otherwise."""
    types = typing.get_type_hints(launcher.problem_type)
    texts = {name: text for name, _, text in (part.partition("=") for part in key.split()[1:])}
    try:
        problem = launcher.problem_type(**{name: READERS[types[name]](text) for name, text in texts.items()})
    except (KeyError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{key!r} does not name a problem of the kernel {launcher.name}") from None
    if key_of(launcher, problem) != key:
        raise ValueError(f"{key!r} is not how the kernel {launcher.name} writes this problem")
    return problem


class StoredEntry(NamedTuple):
    """An entry, where it lies (under which GPU's file name, in the user's store or shipped), and what a launch would
    use of it: launcher, problem and config, or why it would pass it over."""

    gpu: str
    source: str
    key: str
    entry: dict[str, Any]
    found: tuple[Launcher, Problem, Config] | str

    @property
    def place(self) -> dict[str, Any]:
        """The part of a row that says which entry it is."""
        return {"gpu": self.gpu, "source": self.source, "key": self.key, "config": self.entry.get("config")}


def stored_entries(gpu: str | None = None) -> Iterator[StoredEntry]:
    """Every entry of the user's store and the shipped files, of all GPUs or those that launches on one look up, in the
    same order; unreadable files cost a warning."""

    def file(name: str) -> str:
        return Store(shipped_folder(), name).path.name

    wanted = "*.json" if gpu is None else file(gpu)
    alike = [file(chip) for name, chip in SAME_CHIP.items() if file(name) == wanted]
    places = [("store", user_folder(), wanted), ("shipped", shipped_folder(), wanted)]
    for source, folder, names in (*places, *(("same chip", shipped_folder(), each) for each in alike)):
        for path in sorted(folder.glob(names)):
            for key, entry in Store(folder, path.stem).read().items():
                yield StoredEntry(path.stem, source, key, entry, _usable(key, entry))


def _usable(key: str, entry: dict[str, Any]) -> tuple[Launcher, Problem, Config] | str:
    try:
        launcher = find_tunables().get(key.partition(" ")[0])
    except ImportError:
        return "Triton is not installed here"
    if launcher is None:
        return "there is no such kernel"
    if (outdated := stale(entry, launcher)) is not None:
        return outdated
    try:
        problem = problem_of(launcher, key)
    except ValueError as error:
        return str(error)
    try:
        config = config_of(entry, launcher, problem)
        if config is None:
            return "the kernel offers no such config"
        return (launcher, problem, config) if config.valid(problem) else "the config is not valid for this problem"
    except Exception as error:  # no launch has zero channels or −5 pixels, so heuristics divide by them
        return f"no launch can meet this problem ({type(error).__name__}: {error})"
