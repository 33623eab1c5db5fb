"""Argument checks shared by the public functions: every error names the argument, what was expected and what came.

An argument is checked by its own name before it is used to judge another.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.backend import under_autocast
from kernels.windows import Pair

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Kernels count positions in 32 bits.
LIMIT = 2**31


def _is_int(value: object) -> bool:
    if type(value) is int:  # the question below takes a microsecond
        return True
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def as_int(name: str, value: Any, minimum: int) -> int:
    """An int, NumPy's too, from ``minimum`` to 2^31 − 1."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not minimum <= value < LIMIT:
        raise ValueError(f"{name} must be at least {minimum} and below 2^31, got {value!r}")
    return int(value)


def as_pair(name: str, value: Any, minimum: int) -> Pair:
    """An int for both axes, or (rows, columns), as a pair; every entry from ``minimum`` to 2^31 − 1."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not _is_int(pair[0]) or not _is_int(pair[1]):
        raise TypeError(f"{name} must be an int or a pair of ints (rows, columns), got {value!r}")
    if not all(minimum <= entry < LIMIT for entry in pair):
        raise ValueError(f"{name} must be at least {minimum} and below 2^31, got {value!r}")
    return int(pair[0]), int(pair[1])


def odd_pair(name: str, value: int | Sequence[int]) -> Pair:
    """``as_pair`` for kernel sizes whose rule needs a centre."""
    pair = as_pair(name, value, 1)
    if pair[0] % 2 == 0 or pair[1] % 2 == 0:
        raise ValueError(f"{name} must be odd (the window needs a centre), got {value!r}")
    return pair


def odd_int(name: str, value: Any) -> int:
    return odd_pair(name, as_int(name, value, 1))[0]


def check_tensors(optional: Sequence[str] = (), /, **tensors: Any) -> tuple[Any, ...]:
    """The tensors in their order, checked to be dense and floating, of one dtype and on one device.

    Those that ``optional`` names may be None and come back as None. Under autocast every tensor below float64 is cast
    to autocast's dtype first, as for a convolution; nothing else is ever cast.
    """
    given: dict[str, Any] = {
        name: tensor for name, tensor in tensors.items() if tensor is not None or name not in optional
    }
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            what = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor (layout torch.strided), got {what}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {tensor.device}")
        if tensor.dtype != first.dtype and not (
            under_autocast(first) and torch.float64 not in (tensor.dtype, first.dtype)
        ):
            exception = ", and autocast leaves float64 as it is" if under_autocast(first) else ""
            raise TypeError(
                f"{name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}{exception}"
            )
    if not under_autocast(first) or first.dtype == torch.float64:
        return tuple(tensors.values())
    common = torch.get_autocast_dtype(first.device.type)
    return tuple(None if tensor is None else tensor.to(common) for tensor in tensors.values())


def check_shapes(sizes: Mapping[str, int] | None = None, /, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Each tensor has one dimension per word of its axes; returns what the words stand for. None has no shape.

    A number is its own size, a word has the size that ``sizes`` or the first tensor with this word gives it: any, but
    not 0 (B alone may be 0).

    ``check_shapes(x=(x, "B C H W"), weight=(weight, "B G K K H' W'"))``, where x holds two images, reads: weight must
    be [B=2, G, K, K, H', W'].
    """
    known = dict(sizes or ())
    for name, (tensor, axes) in tensors.items():
        if tensor is None:
            continue
        words, found = axes.split(), dict(known)
        if not _fits(tensor.shape, words, found):
            expected = ", ".join(f"{word}={known[word]}" if word in known else word for word in words)
            raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")
        known = found
    return known


def _fits(shape: Sequence[int], words: list[str], sizes: dict[str, int]) -> bool:
    """Whether a shape is that of its words; adds those that have no size yet to ``sizes``."""
    if len(shape) != len(words):
        return False
    for word, size in zip(words, shape, strict=True):
        wanted = int(word) if word.isdigit() else sizes.get(word)
        if wanted is None:
            sizes[word] = size
            if not (size > 0 or word == "B"):
                return False
        # Two inequalities, because from an equation between sizes a compiler concludes that it may write one as the
        # other, an output's height as H + 2, and Inductor cannot order strides that are products of such sums.
        elif not (size <= wanted and size >= wanted):
            return False
    return True


def check_window_fits(kernel_size: Pair, dilation: Pair, height: int, width: int) -> None:
    """A clamped window needs kernel_size·dilation <= length on both axes."""
    for kernel, spread, length, what in zip(kernel_size, dilation, (height, width), ("height", "width"), strict=True):
        if kernel * spread > length:
            raise ValueError(
                f"kernel_size {kernel} with dilation {spread} needs a map of {what} at least {kernel * spread}, "
                f"got {length}"
            )
