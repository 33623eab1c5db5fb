"""Repeating launches: a call whose shapes, strides and types equal an earlier one's differs from it in pointers only.

What Python does for a launch (the problem, the config, thirty arguments, Triton's own look at each of them) took the
host of an H200 65 to 112 µs, longer than many kernels run. All of it follows from the tensors' shapes, strides, types
and alignment, so the second time the finished arguments of the first are used, with other addresses in them.

That holds for a launcher, or a pass of several launches, that only allocates, views and launches; the first call is
watched to see whether it does. A call that does more, such as copying a tensor, runs every time as it is written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.launch import Launch, launch, watching_launches

aten = torch.ops.aten
ALLOCATING = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}
# What a call may do besides allocating, viewing and launching, and still be repeated.
HARMLESS: set[Any] = set()


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
    """A key that calls share if their launches differ in pointers only; and the call's tensors in their order."""
    key: list[Any] = [name, *keywords]
    tensors: list[Tensor] = []
    tensors_of((*arguments, *keywords.values()), key, tensors)
    key.append(tensors[0].device)
    return tuple(key), tensors


class Geometry(NamedTuple):
    """How a tensor lies in memory; ``offset`` in elements from the tensor that it is a view of."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0


class Place(NamedTuple):
    """An address among a kernel's arguments: ``offset`` bytes into a tensor, by its number."""

    position: int
    number: int
    offset: int
    view: Any  # that it is the pointer of, or None


class Step(NamedTuple):
    """A launch."""

    made: int  # how many tensors there are by then
    launched: Launch  # without its arguments
    compiled: Any
    values: list[Any]  # the kernel's arguments but those in ``places``: what is remembered keeps no tensor alive
    places: list[Place]
    released: list[int]  # tensors that no later launch needs


class Repeat(NamedTuple):
    """The launches of an earlier call, for other tensors of the same shapes, strides, types and alignment.

    Tensors are numbered: first those of the call, then those that it allocates. ``results`` are the numbers of what it
    returns, each with how it lies in that tensor, or None where it is that tensor.
    """

    steps: list[Step]
    geometries: list[Geometry]  # of the tensors
    results: list[tuple[int, Geometry | None] | None]
    single: bool

    def __call__(self, tensors: list[Tensor]) -> Any:
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(tensors)
        for made, launched, compiled, values, places, released in self.steps:
            for size, stride, dtype, _ in self.geometries[len(tensors) : made]:
                tensors.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
            values = values.copy()
            kernel, grid, _, options = launched
            # Not in the interpreter, where somebody wants to see the arguments, and in a Triton that may end otherwise.
            if compiled is not None and not kernel.pre_run_hooks and ends_as_known():
                for position, number, offset, view in places:
                    address = tensors[number].data_ptr() + offset
                    values[position] = address if view is None else (address, *view[1:])
                runtime, driver = _runtime()
                stream = driver.active.get_current_stream(device.index)
                # What Triton's own ``kernel[grid](...)`` ends with; it takes addresses for tensors, tuples for views.
                compiled.run(
                    *grid, *(1,) * (3 - len(grid)), stream, compiled.function, compiled.packed_metadata,
                    compiled.launch_metadata(grid, stream, *values),
                    runtime.launch_enter_hook, runtime.launch_exit_hook, *values,
                )  # fmt: skip
            else:
                for position, number, offset, view in places:
                    tensor = _part(tensors[number], offset)
                    values[position] = tensor if view is None else view._replace(ptr=tensor)
                launch(kernel, grid, device, dict(zip(kernel.arg_names, values, strict=True)), **options)
            for number in released:
                tensors[number] = tensors[0]
        results = [None if found is None else _lying(tensors[found[0]], found[1]) for found in self.results]
        return results[0] if self.single else tuple(results)


@functools.cache
def ends_as_known() -> bool:
    """Whether this version of Triton launches as ``Repeat`` does."""
    import triton

    return triton.__version__.startswith(("3.6.", "3.7."))


@functools.cache
def _runtime() -> tuple[Any, Any]:
    from triton import knobs
    from triton.runtime import driver

    return knobs.runtime, driver


def _part(tensor: Tensor, offset: int) -> Tensor:
    """What begins ``offset`` bytes into a tensor."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset // tensor.itemsize) if offset else tensor


def _lying(tensor: Tensor, geometry: Geometry | None) -> Tensor:
    if geometry is None:
        return tensor
    return tensor.as_strided(geometry.size, geometry.stride, tensor.storage_offset() + geometry.offset)


class _Watch(TorchDispatchMode):
    """Notes what a block does; ``whole`` is true as long as it only allocates, views and launches."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.whole, self.inputs = True, len(inputs)
        self.steps: list[Step] = []
        self.geometries: list[Geometry] = []
        # (number, address) of the tensors in a memory, by the memory's address.
        self.known: dict[int, list[tuple[int, int]]] = {}
        for tensor in inputs:
            self._know(tensor, self.known.setdefault(tensor.untyped_storage().data_ptr(), []))

    def _know(self, tensor: Tensor, beside: list[tuple[int, int]]) -> None:
        beside.append((len(self.geometries), tensor.data_ptr()))
        self.geometries.append(Geometry(tensor.shape, tensor.stride(), tensor.dtype))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in ALLOCATING:
            # What was at that address before is no longer there.
            beside = self.known[result.untyped_storage().data_ptr()] = []
            self._know(result, beside)
        elif not func.is_view and func not in HARMLESS:
            self.whole = False
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else PyTorch imports Dynamo at the first launch, for two seconds, to have it leave the method above alone."""
        return False

    def find(self, tensor: Tensor) -> tuple[int, int] | None:
        """(number, offset in bytes) of the known tensor in whose memory this one begins; None, and the call cannot be
        repeated, where none or more than one may be meant."""
        found = self.known.get(tensor.untyped_storage().data_ptr(), [])
        if len(found) > 1:
            found = [(number, address) for number, address in found if address == tensor.data_ptr()]
        if len(found) != 1 or not found[0][1] or self.geometries[found[0][0]].dtype != tensor.dtype:
            self.whole = False
            return None
        return found[0][0], tensor.data_ptr() - found[0][1]

    def launched(self, made: Launch, compiled: Any) -> None:
        values = [made.arguments[name] for name in made.kernel.arg_names]
        places = []
        for position, value in enumerate(values):
            view = value if hasattr(value, "ptr") else None
            tensor = value if view is None else view.ptr
            if isinstance(tensor, Tensor):
                found = self.find(tensor)
                if found is not None:
                    places.append(Place(position, *found, None if view is None else view._replace(ptr=None)))
                values[position] = None
            elif isinstance(value, tuple) and any(isinstance(part, Tensor) or hasattr(part, "ptr") for part in value):
                self.whole = False
        self.steps.append(Step(len(self.geometries), made._replace(arguments={}), compiled, values, places, []))

    def _result(self, tensor: Tensor | None) -> tuple[int, Geometry | None] | None:
        """A result by its number. Where it fills what was allocated for it, the allocation takes its strides."""
        found = None if tensor is None else self.find(tensor)
        if tensor is None or found is None:
            return None
        number, offset = found
        geometry = Geometry(tensor.shape, tensor.stride(), tensor.dtype, offset // tensor.itemsize)
        if number >= self.inputs and _dense(tensor):
            self.geometries[number] = geometry
        return number, None if geometry == self.geometries[number] else geometry

    def repeat(self, returned: Any) -> Repeat | None:
        single = isinstance(returned, Tensor)
        if not self.whole or not self.steps or not (single or type(returned) is tuple):
            return None
        results = [self._result(value) for value in ((returned,) if single else returned)]
        numbers = {result[0] for result in results if result is not None}
        if not self.whole or max(numbers, default=0) >= self.steps[-1].made:
            return None
        last = {place.number: step for step in self.steps for place in step.places}
        for number in range(self.inputs, self.steps[-1].made):
            if number in last and number not in numbers:
                last[number].released.append(number)
        return Repeat(self.steps, self.geometries, results, single)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor is the whole of its memory, so that an allocation of its strides is like it."""
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def repeat_of(call: Callable[[], Any], inputs: list[Tensor]) -> tuple[Any, Repeat | None]:
    """What a call returns, and how to repeat it; None where it does more than allocate, view and launch, or where
    it is unknown in which tensor an address lies."""
    watch = _Watch(inputs)
    with watching_launches(watch.launched), watch:
        returned = call()
    return returned, watch.repeat(returned)
