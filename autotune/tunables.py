"""All kernels that can be tuned, found where they are defined, and what a stored key and entry mean to them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autotune.store import Store, shipped_folder, user_folder
from autotune.tuner import Problem, Request, Trial, Tunable, config_of, key_of, observing, stale

__all__ = ["StoredEntry", "find_tunables", "problem_of", "stored_entries", "visit_example", "why_unused"]

Result = typing.TypeVar("Result")


@functools.cache
def find_tunables() -> dict[str, Tunable]:
    """Name -> Tunable, of every module-level ``Tunable`` in every module ``kernels.*.triton_*``.

    Raises:
        ImportError: triton is not installed.
        ValueError: two kernels share a name, and so would share their entries.
    """
    import kernels

    found: dict[str, Tunable] = {}
    for module_info in pkgutil.walk_packages(kernels.__path__, "kernels."):
        if not module_info.name.rpartition(".")[2].startswith("triton_"):
            continue
        for value in vars(importlib.import_module(module_info.name)).values():
            if isinstance(value, Tunable) and found.setdefault(value.name, value) is not value:
                raise ValueError(f"two kernels are called {value.name!r}; the second is in {module_info.name}")
    return dict(sorted(found.items()))


READERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: {"True": True, "False": False}.__getitem__,
    torch.dtype: lambda text: getattr(torch, text),
}


def problem_of(tunable: Tunable, key: str) -> Problem:
    """The problem that a key was made from, its pixels those of the bucket. ValueError for a key made otherwise."""
    if tunable.problem is None:
        raise ValueError(f"the kernel {tunable.name} does not say what its problems are")
    types = typing.get_type_hints(tunable.problem)
    texts = {name: text for name, _, text in (part.partition("=") for part in key.split()[1:])}
    try:
        problem = tunable.problem(**{name: READERS[types[name]](text) for name, text in texts.items()})
    except (KeyError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{key!r} is no problem of the kernel {tunable.name}") from None
    if key_of(tunable, problem) != key:
        raise ValueError(f"{key!r} is not how the kernel {tunable.name} writes this problem")
    return problem


class _VisitedError(Exception):
    """Ends an example's launch once its trial has been visited."""


def visit_example(tunable: Tunable, problem: Problem, device: torch.device, visit: Callable[[Trial], Result]) -> Result:
    """What ``visit`` makes of a trial of the kernel on random inputs of a problem, as its own launcher states it.

    Raises:
        ValueError: the kernel offers no example, or one that does not launch it.
    """
    if tunable.example is None:
        raise ValueError(f"the kernel {tunable.name} offers no example to check it with")
    results: list[Result] = []

    def observer(request: Request) -> None:
        if request.tunable is tunable:
            results.append(visit(request.trial))
            raise _VisitedError

    with torch.no_grad(), observing(observer), contextlib.suppress(_VisitedError):
        pkgutil.resolve_name(tunable.example)(problem, device)
    if not results:
        raise ValueError(f"the example {tunable.example} does not launch the kernel {tunable.name}")
    return results[0]


class StoredEntry(typing.NamedTuple):
    """An entry and where it lies: in which file, under which GPU's (file) name, in the user's store or shipped."""

    gpu: str
    source: str
    path: Path
    key: str
    entry: Mapping[str, Any]


def stored_entries(gpu: str | None = None) -> Iterator[StoredEntry]:
    """Every entry of the user's store and the shipped files, of one GPU or of all; unreadable files cost a warning."""
    for source, folder in (("store", user_folder()), ("shipped", shipped_folder())):
        wanted = "*.json" if gpu is None else Store(folder, gpu).path.name
        for path in sorted(folder.glob(wanted)):
            for key, entry in Store(folder, path.stem).read().items():
                yield StoredEntry(path.stem, source, path, key, entry)


def why_unused(key: str, entry: Mapping[str, Any], known: Mapping[str, Tunable]) -> str | None:
    """Why a launch would pass an entry over, or None where it would use it."""
    tunable = known.get(key.partition(" ")[0])
    if tunable is None:
        return "there is no such kernel"
    outdated = stale(dict(entry), tunable)
    if outdated is not None:
        return outdated
    if tunable.problem is None:
        return None
    try:
        problem = problem_of(tunable, key)
    except ValueError as error:
        return str(error)
    try:
        config = config_of(dict(entry), tunable, problem)
        if config is None:
            return "the kernel offers no such config"
        return None if config.valid(problem) else "the config is not valid for this problem"
    except Exception as error:  # no launch has zero channels or −5 pixels, so heuristics divide by them
        return f"no launch can meet this problem ({type(error).__name__}: {error})"
