"""The one place where kernels are launched, so that a launch can also be recorded instead.

``record_launches`` collects what would have been launched: of operators on ``meta`` tensors, too, so that every kernel
can be compiled ahead, for any architecture, from the very arguments that its launcher computes.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from kernels.backend import interpreting


class Launch(NamedTuple):
    """A kernel with everything its launch needs. ``options`` holds num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_recorded: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; not for use while other threads launch."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


_thread = threading.local()


@contextmanager
def watching_launches(watch: Callable[[Launch, Any], object]) -> Iterator[None]:
    """Tell ``watch`` of this thread's launches as they are made, and what Triton compiled (None in the interpreter)."""
    previous = getattr(_thread, "watch", None)
    _thread.watch = watch
    try:
        yield
    finally:
        _thread.watch = previous


def recording() -> bool:
    """Whether launches are recorded instead of made."""
    return _recorded is not None


def noticed() -> bool:
    """The same, or whether somebody watches this thread's."""
    return _recorded is not None or getattr(_thread, "watch", None) is not None


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any], **options: int) -> None:
    """Run ``kernel`` over ``grid`` on ``device``; Triton itself would take the current device.

    The arguments come by name, so that a recorded launch can be read. ValueError for a grid that no GPU runs.
    """
    if grid[0] >= 2**31 or max(grid[1:], default=0) >= 2**16:
        raise ValueError(
            f"{kernel.__name__} would need a grid of {grid} programs, and a GPU takes fewer than 2^31 by 2^16 by 2^16: "
            "compute fewer images at a time"
        )
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
        return
    watch = getattr(_thread, "watch", None)
    if watch is None:
        _run(kernel, grid, device, arguments, options)
        return
    _thread.watch = None
    with _disable_current_modes():  # a watcher is not told what the interpreter does with tensors
        watch(Launch(kernel, grid, arguments, options), _run(kernel, grid, device, arguments, options))
    _thread.watch = watch


def is_plain(x: Any) -> bool:
    """Whether x holds numbers: PyTorch traces the body of a ``triton_op`` with tensors of other types."""
    return type(x) in (Tensor, nn.Parameter)


def is_launchable(*tensors: Tensor) -> bool:
    """Whether the kernel of a ``triton_op`` can run on these, be recorded or be traced by PyTorch."""
    if interpreting() and (torch.compiler.is_compiling() or not all(map(is_plain, tensors))):
        return False  # PyTorch traces no interpreted kernels
    return recording() or not any(is_plain(tensor) and tensor.is_meta for tensor in tensors)


def _run(kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: Any, options: dict[str, int]) -> Any:
    _mend_interpreter()
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return kernel[grid](**arguments, **options)
    with torch.cuda.device(device):
        return kernel[grid](**arguments, **options)


def ceil_divide(dividend: int, divisor: int) -> int:
    """⌈dividend / divisor⌉ on the host, where ``triton.cdiv`` costs microseconds of every launch."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, 1 for 0; on the host, as above."""
    return 1 << max(0, number - 1).bit_length()


def fits_int32(*tensors: Tensor) -> bool:
    """Whether offsets inside a batch entry and group, the first two axes, are below 2^31 elements in every tensor."""
    return all(_farthest(tensor.shape, tensor.stride()) < 2**31 for tensor in tensors)


@functools.lru_cache(maxsize=4096)  # launches repeat their shapes, and a launch has microseconds only
def _farthest(shape: torch.Size, strides: tuple[int, ...]) -> int:
    return sum((size - 1) * abs(stride) for size, stride in zip(shape[2:], strides[2:], strict=True))


@functools.cache
def _mend_interpreter() -> None:
    """Let loops with computed bounds run in Triton 3.6's interpreter beside NumPy 2.5.

    The bounds are arrays of one element there, and NumPy 2.5 does not turn those into integers.
    """
    if not interpreting():
        return
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index
