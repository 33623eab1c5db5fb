"""Reading weight files: what training scripts put around a state dict, and around the names in it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from models.unpickling import read_safely, reason_of

__all__ = [
    "Weights",
    "entries_for",
    "is_bookkeeping",
    "is_safetensors",
    "listed",
    "part_of",
    "read_state_dict",
    "read_weights",
    "safetensors_torch",
    "unwrapped_name",
]

PathLike = str | os.PathLike[str]

# Where training scripts put the state dict, and where they put averages of the weights, each in order of preference.
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "params", "weights")
CONTAINERS += ("module", "student", "teacher", "shadow")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema", "average")
DEEPEST = 8  # containers inside containers
# torch.compile, activation checkpointing and FSDP add a component to a name wherever they wrap a module.
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.")
# Attributes that hold the model in somebody else's: DistributedDataParallel's, OpenMMLab's, Lightning modules' own.
OUTER = {"module", "model", "net", "network", "backbone", "encoder", "student"}
AVERAGED = {"model_ema", "ema_model", "ema", "ema_net", "net_ema", "averaged_model", "average_model", "teacher_ema"}
BOOKKEEPING = ("total_ops", "total_params", "n_averaged", "num_batches_tracked")  # thop's, averages', batch norms'
LISTED_NAMES = 10


class Weights(NamedTuple):
    """State dicts of a file, entry name -> tensor on the CPU: of the last step, and averaged (its key is ``under``)."""

    last: dict[str, Tensor] | None
    averaged: dict[str, Tensor] | None
    under: str = ""


def read_state_dict(path: PathLike, use_ema: bool = True) -> dict[str, Tensor]:
    """Entry name -> tensor (on the CPU) as the file has them, out of whatever container a training script used.

    Where the file has averaged weights beside the last ones, ``use_ema`` says which are returned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds code, is damaged, or is no weight file; the message says which.
    """
    last, averaged, _ = read_weights(path)
    return (averaged or last or {}) if use_ema else (last or averaged or {})


def read_weights(path: PathLike) -> Weights:
    """Every state dict in the file, at least one. Errors as for ``read_state_dict``."""
    path = Path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"checkpoint: no file {path}")
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint: {path} is not a file")
    with open(path, "rb") as file:
        start = file.read(512)
    if foreign := _foreign_content(start):
        raise ValueError(f"checkpoint: {path} is {foreign}")
    reader = safetensors_torch().load_file if is_safetensors(path, start) else read_safely
    try:
        content = reader(path)
    except Exception as error:  # a malformed file can make the readers fail in any way
        raise ValueError(f"checkpoint: {path} {reason_of(error)}") from error
    under, averaged = _averages(content)
    last = _state_dict(content)
    if not last and not averaged:
        raise ValueError(f"checkpoint: {path} holds no state dict{_instead(content)}")
    return Weights(last, averaged, under)


def entries_for(
    own: Set[str], parameters: Set[str], heads: Set[str], path: PathLike, use_ema: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's entries under the model's names, of the averaged weights or the last; and what is to be told.

    Args:
        own: names of the model's entries, without wrappers.
        parameters: those that are trained.
        heads: first components of the classifiers' names.
        path: the file.
        use_ema: prefer the averaged weights.
    """
    last, averaged, under = read_weights(path)
    notes: list[str] = []
    state = smoothed = None
    if last is not None:
        state, inside, notes = _entries(last, own, heads, path)
        if inside is not None:
            smoothed, under = inside
    if averaged is not None:
        smoothed = _entries(averaged, own, heads, path)[0]
    if not state or not smoothed:
        return state or smoothed or {}, notes
    if not own & smoothed.keys():
        return state, [*notes, f"{path} holds averaged weights ({under!r}) under names that are not this model's"]
    if not use_ema:
        return state, notes
    # Averages of parameters alone leave the buffers, which are running averages anyway, to the last weights.
    buffers = {name: tensor for name, tensor in state.items() if name not in parameters}
    note = f"{path} holds averaged weights ({under!r}) beside the last ones: the averaged are taken"
    return buffers | smoothed, [*notes, f"{note} (use_ema=False: the last)"]


def unwrapped_name(name: str) -> str:
    """An entry's name without what wrappers around modules add to it."""
    return WRAPPER.sub("", name)


def is_bookkeeping(name: str) -> bool:
    """Whether this is a counter, of which a file may have more or fewer than a model."""
    return name.rpartition(".")[2] in BOOKKEEPING


def part_of(name: str) -> str:
    return name.partition(".")[0]


def listed(names: Iterable[str]) -> str:
    """The names, or as many of them as a message can hold."""
    names = list(names)
    more = f", … and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def is_safetensors(path: Path, start: bytes) -> bool:
    """Whether the file is of that format, whatever it is called: the length of a JSON header, then the header."""
    length = int.from_bytes(start[:8], "little")
    return path.suffix == ".safetensors" or (start[8:9] == b"{" and length <= path.stat().st_size - 8)


def safetensors_torch() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("reading and writing .safetensors needs the safetensors package") from error
    return safetensors.torch


def _foreign_content(start: bytes) -> str | None:
    if not start:
        return "empty"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        return "a web page (HTML), not a weight file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weight file itself"
    return None


def _inner(content: Any, seen: set[int]) -> bool:
    """Whether this is a table not met before: a file may hold one inside itself."""
    if not isinstance(content, Mapping) or id(content) in seen or len(seen) > DEEPEST * len(CONTAINERS):
        return False
    seen.add(id(content))
    return True


def _state_dict(content: Any, seen: set[int] | None = None) -> dict[str, Tensor] | None:
    """The tensors by name in the first container that has any, else in ``content`` itself."""
    seen = set() if seen is None else seen
    if not _inner(content, seen):
        return None
    for key in CONTAINERS:
        if found := _state_dict(content.get(key), seen):
            return found
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return tensors or None


def _averages(content: Any, seen: set[int] | None = None) -> tuple[str, dict[str, Tensor] | None]:
    seen = set() if seen is None else seen
    if not _inner(content, seen):
        return "", None
    for key in AVERAGES:
        # MMEngine exchanges the two as it saves: its state_dict is the average.
        if key == "ema_state_dict" and "message_hub" in content:
            continue
        if found := _state_dict(content.get(key)):
            return key, found
    inside = (_averages(content.get(key), seen) for key in CONTAINERS)
    return next((found for found in inside if found[1]), ("", None))


def _instead(content: Any) -> str:
    """What is there in place of a state dict, for a message."""
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            return f" but {type(content).__name__}"
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not content:
        return f" but an empty {type(content).__name__}"
    name, value = next(iter(content.items()))
    return f": expected tensors by name, got {name!r}: {type(value).__name__}"


def _entries(
    state: Mapping[str, Tensor], own: Set[str], heads: Set[str], path: PathLike
) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], str] | None, list[str]]:
    """``state`` under the model's names; averaged weights in it and the prefix they have; and what was left out.

    A wrapper's prefix is taken for one where the model's names follow it. Behind "backbone." only a classifier's own
    head, which OpenMMLab puts beside it, is taken from outside.
    """
    state = {unwrapped_name(name): tensor for name, tensor in state.items()}
    fitting = Counter(prefix for name in state for prefix in _prefixes(name) if name[len(prefix) :] in own)
    averages = [prefix for prefix in fitting if AVERAGED & set(prefix.split("."))]
    plain = [prefix for prefix in fitting if prefix not in averages]
    prefix = _best(plain, fitting, path)
    taken = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    smoothed = None
    if averages:
        best = _best(averages, fitting, path)
        inside = {name: tensor for name, tensor in state.items() if name.startswith(best)}
        taken = {name: tensor for name, tensor in taken.items() if prefix + name not in inside}
        smoothed = {name.removeprefix(best): tensor for name, tensor in inside.items()}, best
    left_out = [name for name in state if not name.startswith((prefix, *averages))]
    outside, parts = prefix, {part_of(name) for name in taken}
    while outside:
        outside = outside[: outside.rstrip(".").rfind(".") + 1]
        found = [
            name for name in left_out if name.startswith(outside) and part_of(name[len(outside) :]) in heads - parts
        ]
        taken.update((name[len(outside) :], state[name]) for name in found)
        left_out = [name for name in left_out if name not in found]
    left_out = [name for name in left_out if not is_bookkeeping(name)]
    notes = []
    if left_out and "backbone" not in prefix.split("."):  # a backbone's neck and heads go without saying
        notes.append(f"left out of {path}, for being outside of {prefix!r}: {listed(left_out)}")
    return taken, smoothed, notes


def _prefixes(name: str) -> Iterable[str]:
    """ "", then as much of the beginning as may be wrappers: "a.", "a.b.", …"""
    end = 0
    yield ""
    while (component := name[end:].partition(".")[0]) in OUTER | AVERAGED and len(name) > end + len(component):
        end += len(component) + 1
        yield name[:end]


def _best(prefixes: list[str], fitting: Mapping[str, int], path: PathLike) -> str:
    """The prefix that most of the model's names follow; "" where none does."""
    ordered = sorted(prefixes, key=lambda prefix: (-fitting[prefix], len(prefix)))
    first, second = (*ordered, "", "")[:2]
    if second and fitting[first] == fitting[second]:
        raise ValueError(f"checkpoint: {path} holds the model twice, behind {first!r} and behind {second!r}")
    return first
