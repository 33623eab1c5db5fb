"""The dynamic kernels of a model, taken from the very calls it makes to ``kernels``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from autotune import timing
from autotune.notebooks.session import Model, Session, family, load
from kernels.checks import as_pair
from kernels.reference import rpb_logits
from kernels.windows import Window

__all__ = [
    "Call",
    "contmix_affinity",
    "contmix_error",
    "contmix_kernels",
    "covering_windows",
    "involution_kernels",
    "involution_window",
    "look_at",
    "outlook_kernel",
    "recorded_calls",
]

OPERATORS = ("involution2d", "involution2d_generate", "contmix2d", "outlook_attention2d")


@dataclass(frozen=True)
class Call:
    """One call of a public operator: its name, every argument by name, and what it returned."""

    operator: str
    arguments: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_calls(operators: Sequence[str] = OPERATORS) -> Iterator[list[Call]]:
    """Collect what models pass to ``kernels.<operator>`` inside the block, and what they get back, in order.

    Models call operators through the package ``kernels``, whose entries are replaced for the time of the block; not for
    use while other threads run models.
    """
    calls: list[Call] = []

    def recorder(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(function)

        def recording(*arguments: Any, **options: Any) -> Tensor:
            output = function(*arguments, **options)
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            calls.append(Call(name, dict(bound.arguments), output))
            return output

        return recording

    originals = {name: getattr(kernels, name) for name in operators}
    for name, function in originals.items():
        setattr(kernels, name, recorder(name, function))
    try:
        yield calls
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)


def look_at(
    checkpoints: Mapping[str, str | None], image: Tensor, session: Session
) -> dict[str, tuple[Model, list[Call]]]:
    """Run each model on the image: family (rednet, volo, overlock) -> the model, and its calls of dynamic kernels."""
    found = {}
    for name, checkpoint in checkpoints.items():
        model = load(name, checkpoint)
        model.module.to(session.device)
        with torch.no_grad(), recorded_calls() as calls:
            model.module(image.to(session.device))
        found[family(name)] = (model, calls)
    return found


def involution_kernels(call: Call) -> Tensor:
    """The kernels of an involution, [B, G, K, K, H', W'], generated here where the model generates them on the fly."""
    arguments = call.arguments
    if call.operator == "involution2d":
        return arguments["weight"]
    size = as_pair("kernel_size", arguments["kernel_size"], 1)
    flat = F.conv2d(arguments["features"], arguments["weight"][:, :, None, None], arguments["bias"])
    return flat.unflatten(1, (arguments["groups"], *size))


def involution_window(call: Call) -> Window:
    """The window of an involution with the padding by which its output has the size of x over its stride."""
    size = tuple(involution_kernels(call).shape[2:4])
    stride, dilation = (as_pair(name, call.arguments[name], 1) for name in ("stride", "dilation"))
    padding = call.arguments["padding"]
    if padding is None:
        padding = tuple((k - 1) * d // 2 for k, d in zip(size, dilation, strict=True))
    return Window((size[0], size[1]), stride, as_pair("padding", padding, 0), dilation)


def contmix_error(call: Call) -> float:
    """Relative difference between what the operator returned and its values mixed by ``contmix_kernels``."""
    mixed = [
        kernels.reference.na2d_av(kernel.flatten(-2), call.arguments["value"][:, m].movedim(2, -1), kernel.shape[-1])
        for m, kernel in enumerate(contmix_kernels(call))
    ]
    return timing.relative_error(torch.stack(mixed, 1).movedim(-1, 3), call.output)


def contmix_affinity(call: Call) -> Tensor:
    """Σ_c query[c, n] · key[c, l], every position's affinity to the regions of the context: [B, G, H, W, 7, 7]."""
    affinity = torch.einsum("bgchw,bgcl->bghwl", call.arguments["query"], call.arguments["key"])
    side = round(affinity.shape[-1] ** 0.5)
    return affinity.unflatten(-1, (side, side))


def contmix_kernels(call: Call) -> list[Tensor]:
    """The kernels that ContMix never stores, for each of its sizes: [B, G, H, W, K, K], each summing to 1."""
    arguments, sizes = call.arguments, call.arguments["kernel_sizes"]
    affinity = contmix_affinity(call).flatten(-2)
    logits = F.linear(affinity, arguments["proj_weight"], arguments["proj_bias"]).split([k * k for k in sizes], -1)
    height, width = affinity.shape[2:4]
    found = []
    for size, logit, rpb in zip(sizes, logits, arguments["rpb"], strict=True):
        bias = rpb_logits(rpb, height, width, Window.neighborhood((size, size)))
        found.append((logit + bias).softmax(-1).unflatten(-1, (size, size)))
    return found


def covering_windows(call: Call, row: int, column: int) -> list[tuple[int, int]]:
    """The windows (i, j) of an outlook attention that cover the token at (row, column)."""
    arguments = call.arguments
    size, stride, padding = (arguments[name] for name in ("kernel_size", "stride", "padding"))
    along = [
        [i for i in range(count) if 0 <= place - (i * stride - padding) < size]
        for place, count in ((row, arguments["logits"].shape[1]), (column, arguments["logits"].shape[2]))
    ]
    return [(i, j) for i in along[0] for j in along[1]]


def outlook_kernel(call: Call, row: int, column: int) -> Tensor:
    """What the output token at (row, column) takes of every value token, over all windows that cover it.

    [B, heads, H, W], of a sum that is the number of those windows (1, 2 or 4 for K = 3, stride 2), less where a window
    looks past the border.
    """
    arguments = call.arguments
    size, stride, padding = (arguments[name] for name in ("kernel_size", "stride", "padding"))
    height, width = arguments["value"].shape[1:3]
    attention = (arguments["logits"] * arguments["scale"]).softmax(-1)
    # With room around it for what lies outside, which is cut off at the end.
    out = attention.new_zeros(attention.shape[0], attention.shape[3], height + 2 * size, width + 2 * size)
    for i, j in covering_windows(call, row, column):
        top, left = i * stride - padding, j * stride - padding
        target = (row - top) * size + column - left
        rows, columns = (slice(first + size, first + 2 * size) for first in (top, left))
        out[:, :, rows, columns] += attention[:, i, j, :, target].unflatten(-1, (size, size))
    return out[:, :, size : size + height, size : size + width]
