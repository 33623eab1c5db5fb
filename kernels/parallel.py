"""An eager call on several threads: each takes whole batch entries and groups, and runs PyTorch's operators alone.

Left to itself PyTorch splits every single operator over OpenMP threads, which spin at its end until the last is done.
An eager call is dozens to hundreds of short operators, so where another program holds one of the cores, each of them
waits for the scheduler's next time slice: a call then takes up to a hundred times as long. Here threads meet once per
call, and wait asleep.

``torch.set_num_threads`` (0.2 µs) acts on the calling thread alone, with one exception: a thread that calls PyTorch for
the first time while another thread's eager call runs gets one thread, and keeps it.
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# Multiply-adds that a thread should have to do: one to two milliseconds.
WORTH_A_THREAD = 2**22

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")


class Part(NamedTuple):
    """Some of the batch entries and groups of tensors [B, G, ...]."""

    batch: slice
    groups: slice


def _slices(length: int, count: int) -> list[slice]:
    return [slice(length * n // count, length * (n + 1) // count) for n in range(count)]


def _parts(batch: int, groups: int, count: int) -> list[Part]:
    """All batch entries and groups in at most ``count`` parts, by groups first."""
    by_group = max(1, min(groups, count))
    by_batch = max(1, min(batch, count // by_group))
    return [Part(b, g) for g in _slices(groups, by_group) for b in _slices(batch, by_batch)]


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,), thread_name_prefix="eager")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked process has none of its parent's threads

_call = threading.local()


def alone(function: Function) -> Function:
    """Decorator for an eager call: PyTorch's operators run on one thread each, and ``over_maps`` may share work out."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        threads = torch.get_num_threads()
        if threads == 1:  # or inside another such call
            return function(*arguments, **keywords)
        torch.set_num_threads(1)
        _call.threads = threads
        try:
            return function(*arguments, **keywords)
        finally:
            _call.threads = 1
            torch.set_num_threads(threads)

    return wrapper  # pyright: ignore[reportReturnType]


def over_maps(run: Callable[[Part], Result], like: Tensor, multiply_adds: int) -> list[tuple[Part, Result]]:
    """``run`` on parts of all maps of ``like`` [B, G, ...], side by side where it pays: what each part gave.

    Parts write to disjoint outputs; what is summed over them is summed afterwards, in their order.
    """
    threads = getattr(_call, "threads", 1) if like.device.type == "cpu" else 1
    first, *others = _parts(like.shape[0], like.shape[1], min(threads, multiply_adds // WORTH_A_THREAD))
    inference = torch.is_inference_mode_enabled()

    def work(part: Part) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return run(part)

    elsewhere = [(part, _workers().submit(work, part)) for part in others]
    return [(first, run(first)), *((part, result.result()) for part, result in elsewhere)]
