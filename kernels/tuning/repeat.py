"""A launch made again: where shapes, strides and types are those of an earlier one, only its pointers are new.

What Python does for a launch (the problem, the config, thirty arguments, Triton's own look at each of them) took the
host of an H200 65 to 112 µs, longer than many a kernel runs. All of it follows from the tensors' shapes, strides, types
and alignment, so that the second time the finished arguments of the first are taken, with other tensors in their
places.

That holds for a launcher that allocates its outputs and launches one kernel; the first call is watched for it. One that
does more, such as copying a tensor or zeroing an output, runs as it is written every time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.launch import Launch, launch_again, watched_launches

# What may happen beside a launch, besides views: nothing that writes.
HARMLESS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}


def tensors_of(values: Sequence[Any], key: list[Any], tensors: list[Tensor]) -> None:
    """Append the tensors among nested values, and to ``key`` all that a launch can depend on."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            key.append((value.dtype, value.shape, value.stride(), value.data_ptr() & 15))
        elif isinstance(value, (tuple, list)):
            key.append((type(value), len(value)))
            tensors_of(value, key, tensors)
        else:
            key.append(value)


def key_of_call(name: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What tells calls of a launcher apart whose launches differ in more than pointers; and their tensors in order."""
    key: list[Any] = [name, *keywords]
    tensors: list[Tensor] = []
    tensors_of((*arguments, *keywords.values()), key, tensors)
    key.append(tensors[0].device)
    return tuple(key), tensors


class _Watch(TorchDispatchMode):
    """Whether a block only allocates and views."""

    def __init__(self) -> None:
        super().__init__()
        self.harmless = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.harmless = self.harmless and (func in HARMLESS or func.is_view)
        return func(*args, **(kwargs or {}))


class Empty(NamedTuple):
    """An output as it is allocated."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Repeat(NamedTuple):
    """The launch of an earlier call, for other tensors of the same shapes, strides, types and alignment.

    Tensors are numbered, inputs first, then outputs. ``places`` are (position among the kernel's arguments, number of
    the tensor, the view that it is in or None); ``results`` are the numbers of what the launcher returns.
    """

    launched: Launch  # without its arguments
    compiled: Any
    values: list[Any]  # of the kernel's arguments, those in ``places`` left out: a memory of tensors keeps none alive
    places: list[tuple[int, int, Any]]
    outputs: list[Empty]
    results: list[int | None]
    single: bool

    def __call__(self, tensors: list[Tensor]) -> Any:
        device = tensors[0].device
        for size, stride, dtype in self.outputs:
            tensors.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        values = self.values.copy()
        for place, number, view in self.places:
            values[place] = tensors[number] if view is None else view._replace(ptr=tensors[number])
        launch_again(self.launched, self.compiled, values, device)
        results = [None if number is None else tensors[number] for number in self.results]
        return results[0] if self.single else tuple(results)


def _number(tensor: Tensor, known: list[Tensor]) -> int | None:
    """Which known tensor begins where this one does, in the same type; None where none does, or several."""
    address = tensor.data_ptr()
    found = [i for i, other in enumerate(known) if other.data_ptr() == address and other.dtype == tensor.dtype]
    return found[0] if len(found) == 1 else None


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor is the whole of its memory, so that an allocation of its strides is like it."""
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def repeat_of(call: Callable[[], Any], inputs: list[Tensor]) -> tuple[Any, Repeat | None]:
    """What a call returns, and how to repeat it; None where it does more than one launch, or tensors begin together."""
    with watched_launches() as made, _Watch() as watch:
        returned = call()
    single = isinstance(returned, Tensor)
    if not watch.harmless or len(made) != 1 or not (single or type(returned) is tuple):
        return returned, None
    known, outputs = list(inputs), []
    results: list[int | None] = []
    for value in (returned,) if single else returned:
        if value is None:
            results.append(None)
            continue
        number = _number(value, known)
        if number is None:
            number = len(known)
            known.append(value)
            outputs.append(Empty(value.shape, value.stride(), value.dtype))
        if (value.shape, value.stride()) != (known[number].shape, known[number].stride()):
            return returned, None
        results.append(number)
    addresses = {tensor.data_ptr() for tensor in known}
    if 0 in addresses or len(addresses) < len(known) or not all(map(_dense, known[len(inputs) :])):
        return returned, None
    ((launched, compiled),) = made
    values = [launched.arguments[name] for name in launched.kernel.arg_names]
    places: list[tuple[int, int, Any]] = []
    for place, value in enumerate(values):
        view = value if hasattr(value, "ptr") else None
        tensor = value if view is None else view.ptr
        if isinstance(tensor, Tensor):
            number = _number(tensor, known)
            if number is None:
                return returned, None
            values[place] = None
            places.append((place, number, None if view is None else view._replace(ptr=None)))
        elif isinstance(value, tuple) and any(isinstance(part, Tensor) or hasattr(part, "ptr") for part in value):
            return returned, None
    return returned, Repeat(launched._replace(arguments={}), compiled, values, places, outputs, results, single)
