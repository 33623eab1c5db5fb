"""The dynamic kernels of a model, taken from the very calls it makes to ``kernels``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.checks import as_pair
from kernels.reference import rpb_logits
from kernels.windows import Window

DYNAMIC = ("involution2d", "involution2d_generate", "contmix2d", "outlook_attention2d")
Function = Callable[..., Any]


@contextmanager
def around(wrap: Callable[[str, Function], Function], operators: Sequence[str] = DYNAMIC) -> Iterator[None]:
    """Inside the block models call ``wrap(name, operator)`` where they call ``kernels.<name>``; in one thread only."""
    originals = {name: getattr(kernels, name) for name in operators}
    for name, function in originals.items():
        setattr(kernels, name, wrap(name, function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)


@dataclass(frozen=True)
class Call:
    """One call of an operator: its name, every argument by name, and what it returned."""

    operator: str
    arguments: dict[str, Any]
    output: Tensor


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls of dynamic kernels that models make inside the block, in order."""
    calls: list[Call] = []

    def recording(name: str, function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Tensor:
            output = function(*arguments, **options)
            bound = inspect.signature(function).bind(*arguments, **options)
            bound.apply_defaults()
            calls.append(Call(name, dict(bound.arguments), output))
            return output

        return call

    with around(recording):
        yield calls


def involution_kernels(call: Call) -> Tensor:
    """The kernels of an involution, [B, G, K, K, H', W'], generated here where the operator generates them itself."""
    arguments = call.arguments
    if call.operator == "involution2d":
        return arguments["weight"]
    size = as_pair("kernel_size", arguments["kernel_size"], 1)
    flat = F.conv2d(arguments["features"], arguments["weight"][:, :, None, None], arguments["bias"])
    return flat.unflatten(1, (arguments["groups"], *size))


def contmix_kernels(call: Call) -> tuple[Tensor, list[Tensor]]:
    """The affinities to the context, [B, G, H, W, 49], and the kernels made from them that ContMix never stores.

    There is one [B, G, H, W, K, K] for each of its sizes; its K² weights sum to 1.
    """
    arguments, sizes = call.arguments, call.arguments["kernel_sizes"]
    affinity = torch.einsum("bgchw,bgcl->bghwl", arguments["query"], arguments["key"])
    logits = F.linear(affinity, arguments["proj_weight"], arguments["proj_bias"]).split([k * k for k in sizes], -1)
    found = []
    for size, logit, rpb in zip(sizes, logits, arguments["rpb"], strict=True):
        bias = rpb_logits(rpb, affinity.shape[2], affinity.shape[3], Window.neighborhood((size, size)))
        found.append((logit + bias).softmax(-1).unflatten(-1, (size, size)))
    return affinity, found


def outlook_kernel(call: Call, row: int, column: int) -> tuple[Tensor, int]:
    """What the output token at (row, column) takes of every value token, [B, heads, H, W], and over how many windows.

    It sums to the number of windows that cover the token (1, 2 or 4 for K = 3 and stride 2), less what a window takes
    from beyond the border.
    """
    logits, value = call.arguments["logits"], call.arguments["value"]
    size, stride, padding = (call.arguments[name] for name in ("kernel_size", "stride", "padding"))
    attention = (logits * call.arguments["scale"]).softmax(-1)
    tops, lefts = (
        [i for i in range(count) if 0 <= place - (i * stride - padding) < size]
        for place, count in zip((row, column), logits.shape[1:3], strict=True)
    )
    height, width = value.shape[1:3]
    # With room around it for what lies outside, which is cut off at the end.
    out = attention.new_zeros(attention.shape[0], attention.shape[3], height + 2 * size, width + 2 * size)
    for i in tops:
        for j in lefts:
            top, left = i * stride - padding, j * stride - padding
            target = (row - top) * size + column - left
            rows, columns = (slice(first + size, first + 2 * size) for first in (top, left))
            out[:, :, rows, columns] += attention[:, i, j, :, target].unflatten(-1, (size, size))
    return out[:, :, size : size + height, size : size + width], len(tops) * len(lefts)
