"""Finds the state dict in a weight file, whatever a training script put around it and before its names."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from models.safe_load import read_safely, reason_of

PathLike = str | os.PathLike[str]

# Where training scripts put the state dict, in order of preference; then where they put averages of the weights.
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "params", "weights")
CONTAINERS += ("module", "student", "teacher", "shadow")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema", "average")
MOST_CONTAINERS = 100  # containers that are searched
# torch.compile, activation checkpointing and FSDP add a component to a name wherever they wrap a module.
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.")
# Attributes that hold the model in somebody else's: DistributedDataParallel's, OpenMMLab's, Lightning modules' own.
OUTER = {"module", "model", "net", "network", "backbone", "encoder", "student"}
AVERAGED = {"model_ema", "ema_model", "ema", "ema_net", "net_ema", "averaged_model", "average_model", "teacher_ema"}
BOOKKEEPING = ("total_ops", "total_params", "n_averaged", "num_batches_tracked")  # thop's, averages', batch norms'
LISTED_NAMES = 10


class Table(NamedTuple):
    """Tensors by name, on the CPU; ``average``: the key or prefix that says that they are averages, or ""."""

    average: str
    tensors: dict[str, Tensor]


def read_state_dict(path: PathLike) -> dict[str, Tensor]:
    """Entry name -> tensor (on the CPU) out of whatever container a training script used. Errors: ``read_tables``."""
    return read_tables(path)[0].tensors


def read_tables(path: PathLike) -> list[Table]:
    """The state dicts in the file, at least one, the preferred ones first.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds code, is damaged, or is not a weight file; the message says which.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"checkpoint: no file {path}")
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint: {path} is not a file")
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"checkpoint: {path} is empty")
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        raise ValueError(f"checkpoint: {path} is a web page (HTML), not a weight file")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"checkpoint: {path} is a Git LFS pointer, not the weight file itself")
    reader: Callable[[Path], Any] = safetensors.torch.load_file if is_safetensors(path) else read_safely
    try:
        content = reader(path)
    except Exception as error:  # a malformed file can make the readers fail in any way
        raise ValueError(f"checkpoint: {path} {reason_of(error)}") from error
    containers = list(_containers(content, "", set()))
    found = [
        Table(average, {name: t for name, t in each.items() if isinstance(name, str) and isinstance(t, Tensor)})
        for average, each in containers
    ]
    if not any(table.tensors for table in found):
        innermost = containers[0][1] if containers else content
        raise ValueError(f"checkpoint: {path} holds no state dict{_instead(innermost)}")
    return [table for table in found if table.tensors]


def is_safetensors(path: Path) -> bool:
    """Whether the file has that format, which begins with the length of a JSON header, whatever its name."""
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return path.suffix == ".safetensors" or (start[8:9] == b"{" and length <= path.stat().st_size - 8)


# ---- what is around a state dict


def _containers(content: Any, average: str, seen: set[int]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every dict that may hold tensors by name, the preferred ones first, and what ``Table.average`` says of them.

    A file may hold a container inside itself, or very many: each is searched once, up to ``MOST_CONTAINERS``.
    """
    if not isinstance(content, Mapping) or id(content) in seen or len(seen) >= MOST_CONTAINERS:
        return
    seen.add(id(content))
    for key in CONTAINERS + AVERAGES:
        # MMEngine exchanges the two as it saves: its state_dict is the average.
        if key != "ema_state_dict" or "message_hub" not in content:
            yield from _containers(content.get(key), average or key * (key in AVERAGES), seen)
    yield average, content


def _instead(content: Any) -> str:
    """What there is in place of a state dict, for a message."""
    if not isinstance(content, Mapping) or not content:
        return f" but {'' if content else 'an empty '}{type(content).__name__}"
    name, value = next(iter(content.items()))
    return f": expected tensors by name, got {name!r}: {type(value).__name__}"


# ---- what is around an entry's name


def entries_for(
    own: Set[str], parameters: Set[str], heads: Set[str], path: PathLike, use_ema: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's entries under the model's names, averaged or last, and notes for the user.

    Args:
        own: names of the model's entries, without wrappers.
        parameters: those that are trained.
        heads: first components of the classifiers' names.
        path: the file.
        use_ema: prefer the averaged weights.
    """
    tables = [part for table in read_tables(path) for part in _parts(table, own)]
    last = next((table.tensors for table in tables if not table.average), {})
    under, averaged = next((table for table in tables if table.average), ("", {}))
    state, prefix, left_out = _entries(last, own, heads, path)
    smoothed, _, _ = _entries(averaged, own, heads, path)
    notes = []
    if left_out:
        notes = [f"left out of {path}, since they are not behind {prefix!r}: {listed(left_out)}"]
    if not state or not smoothed:
        return state or smoothed, notes
    if not own & smoothed.keys():
        return state, [*notes, f"{path} holds averaged weights ({under!r}) under names that are not this model's"]
    if not use_ema:
        return state, notes
    # If only parameters were averaged, the buffers, running averages anyway, come from the last weights.
    buffers = {name: tensor for name, tensor in state.items() if name not in parameters}
    note = f"{path} holds averaged weights ({under!r}) beside the last ones: the averaged are taken"
    return buffers | smoothed, [*notes, f"{note} (use_ema=False: the last)"]


def unwrapped_name(name: str) -> str:
    """An entry's name without the components that wrappers around modules add."""
    return WRAPPER.sub("", name)


def is_bookkeeping(name: str) -> bool:
    """Whether this is a counter: a file may have more or fewer of them than a model."""
    return name.rpartition(".")[2] in BOOKKEEPING


def part_of(name: str) -> str:
    return name.partition(".")[0]


def listed(names: Iterable[str]) -> str:
    """The names for a message, the first ``LISTED_NAMES`` of them."""
    names = list(names)
    more = f", … and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


def _parts(table: Table, own: Set[str]) -> Iterator[Table]:
    """The table, or, where averages stand behind a prefix beside the last weights, the two by themselves."""
    state = {unwrapped_name(name): tensor for name, tensor in table.tensors.items()}
    prefixes = {prefix for name in state for prefix in _prefixes(name) if name[len(prefix) :] in own}
    averages = tuple(sorted(prefix for prefix in prefixes if AVERAGED & set(prefix.split("."))))
    if table.average or not averages:
        yield Table(table.average, state)
        return
    yield Table("", {name: tensor for name, tensor in state.items() if not name.startswith(averages)})
    yield Table(averages[0], {name: tensor for name, tensor in state.items() if name.startswith(averages)})


def _entries(
    state: Mapping[str, Tensor], own: Set[str], heads: Set[str], path: PathLike
) -> tuple[dict[str, Tensor], str, list[str]]:
    """``state`` under the model's names, the prefix that was before them, and the names that are left out.

    A prefix counts as a wrapper's if the model's names follow it. A head that stands beside the prefix, where OpenMMLab
    puts it, is taken, too.
    """
    fitting = Counter(prefix for name in state for prefix in _prefixes(name) if name[len(prefix) :] in own)
    (prefix, most), (other, second) = [*fitting.most_common(2), ("", 0), ("", 0)][:2]
    if most == second > 0:
        first, other = sorted((prefix, other))
        raise ValueError(f"checkpoint: {path} holds the model twice, behind {first!r} and behind {other!r}")
    taken = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    left_out = [name for name in state if not name.startswith(prefix)]
    outside, missing = prefix, heads - set(map(part_of, taken))
    while outside:
        outside = outside[: outside.rstrip(".").rfind(".") + 1]
        found = [n for n in left_out if n.startswith(outside) and part_of(n[len(outside) :]) in missing]
        taken.update((name[len(outside) :], state[name]) for name in found)
        left_out = [name for name in left_out if name not in found]
    if "backbone" in prefix.split("."):  # for a backbone nobody expects neck and heads
        return taken, prefix, []
    return taken, prefix, [name for name in left_out if not is_bookkeeping(name)]


def _prefixes(name: str) -> Iterable[str]:
    """ "", then as much of the beginning as may be wrappers: "a.", "a.b.", …"""
    end = 0
    yield ""
    while (component := name[end:].partition(".")[0]) in OUTER | AVERAGED and len(name) > end + len(component):
        end += len(component) + 1
        yield name[:end]
