"""Argument checks shared by the public functions: every error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.windows import Pair

__all__ = ["as_pair", "check_shape", "check_tensors", "check_window_fits", "odd_pair"]

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_pair(name: str, value: int | Sequence[int], minimum: int) -> Pair:
    """An int for both axes, or (rows, columns), as a pair; every entry at least ``minimum``."""
    pair = (value, value) if isinstance(value, int) else value
    if (
        isinstance(value, bool)
        or not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in pair)
    ):
        raise TypeError(f"{name} must be an int or a pair of ints (rows, columns), got {value!r}")
    if min(pair) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return pair[0], pair[1]


def odd_pair(name: str, value: int | Sequence[int]) -> Pair:
    """``as_pair`` for kernel sizes whose rule needs a centre."""
    pair = as_pair(name, value, 1)
    if pair[0] % 2 == 0 or pair[1] % 2 == 0:
        raise ValueError(f"{name} must be odd (the window needs a centre), got {value!r}")
    return pair


def check_tensors(**tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors that are not None, checked to be floating, of one dtype and on one device.

    Under autocast every tensor below float64 is cast to autocast's dtype first, as for a convolution; nothing else is
    ever cast.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {tensor.device}")
    device_type = first.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in given.values())
    for name, tensor in given.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}")
    return tuple(given.values())


def check_shape(name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    """``tensor`` has one dimension per word of ``axes``, those in ``sizes`` of that size, none of size 0 but B.

    ``check_shape("weight", weight, "B G K K H' W'", B=2)`` reads: weight must be [B=2, G, K, K, H', W'].
    """
    words = axes.split()
    wanted = [sizes.get(word) for word in words]
    shape = tuple(tensor.shape)
    if len(shape) == len(words) and all(
        (size > 0 or word == "B") if want is None else size == want
        for word, want, size in zip(words, wanted, shape, strict=True)
    ):
        return
    expected = ", ".join(word if want is None else f"{word}={want}" for word, want in zip(words, wanted, strict=True))
    raise ValueError(f"{name} must have shape [{expected}], got {list(shape)}")


def check_window_fits(kernel_size: Pair, dilation: Pair, height: int, width: int) -> None:
    """A clamped window needs kernel_size·dilation <= length on both axes."""
    for kernel, spread, length, what in zip(kernel_size, dilation, (height, width), ("height", "width"), strict=True):
        if kernel * spread > length:
            raise ValueError(
                f"kernel_size {kernel} with dilation {spread} needs a map of {what} at least {kernel * spread}, "
                f"got {length}"
            )
