"""What every kernel is launched for once: operators at shapes of the models, and parts of models that have kernels.

Importing it needs Triton.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autotune.workloads import (
    Input,
    Workload,
    channels_last,
    contmix,
    depthwise,
    generation,
    involution,
    neighborhood,
    operator_workloads,
)
from kernels.depthwise.expanded import expanded_convolve
from kernels.depthwise.op import normed_branches
from kernels.depthwise.sliding import gelu_convolve
from kernels.images import image_conv2d
from kernels.normed import normed_gelu_backward
from kernels.pointwise import residual_pointwise_conv2d


def _map(batch: int, channels: int, side: int) -> Input:
    return Input((batch, channels, side, side), channels_last=True)


def gelu(batch: int, channels: int, side: int) -> Workload:
    """A 3×3 depthwise convolution of GELU with all that its kernels can do beside it."""
    found = depthwise("OverLoCK-XT", batch, channels, (side, side), 3)
    found = replace(found, operator="gelu_depthwise_conv2d")
    return replace(found, part=lambda x, weight, bias: gelu_convolve(x, weight, bias, True)[0])


def expanded(batch: int, features: int, channels: int, side: int) -> Workload:
    """The same in inference, with the 1×1 convolution before it."""
    found, shift = gelu(batch, channels, side), Input((channels,))
    inputs = {"x": _map(batch, features, side), "expand": Input((channels, features)), "shift": shift}
    inputs |= {"weight": found.inputs["weight"], "bias": shift}

    def part(x: Any, expand: Any, shift: Any, weight: Any, bias: Any) -> Any:
        return expanded_convolve(x, expand, shift, weight, bias, True)[0]

    return replace(found, operator="expanded_depthwise_conv2d", inputs=inputs, part=part, trained=False)


def residual(batch: int, channels: int, side: int, skipped: int) -> Workload:
    """The end of RedNet's block in inference, with a shortcut where other than 4·C channels are ``skipped``."""
    outputs, scale = 4 * channels, Input((channels,))
    inputs = {"x": _map(batch, channels, side), "scale": scale, "shift": scale, "weight": Input((outputs, channels))}
    inputs |= {"bias": Input((outputs,)), "skipped": _map(batch, skipped, side)}
    inputs |= {} if skipped == outputs else {"second": Input((outputs, skipped))}
    out, part = _map(batch, outputs, side).shape, lambda **given: residual_pointwise_conv2d(*given.values())
    return Workload(
        "residual_pointwise_conv2d", "RedNet-50", f"{channels}@{side}² + {skipped}", inputs, out, {}, part, False
    )


def image(batch: int, outputs: int, kernel_size: int, relu: bool = False) -> Workload:
    """The first convolution of a network, of 224² pixels; ``relu``: with a bias before that."""
    inputs = {"x": _map(batch, 3, 224), "weight": Input((outputs, 3, kernel_size, kernel_size), channels_last=True)}
    inputs |= {"bias": Input((outputs,))} if relu else {}

    def part(x: Any, weight: Any, bias: Any = None) -> Any:
        return image_conv2d(x, weight, bias, 2, kernel_size // 2, relu)

    out = _map(batch, outputs, 112).shape
    return Workload("image_conv2d", "", f"{outputs}@112² K={kernel_size}", inputs, out, {}, part, False)


def normed(batch: int, channels: int, side: int) -> Workload:
    """The backward pass of a batch norm and GELU, as compiled training has it."""
    names, x = ("weight", "scale", "shift", "mean", "rstd"), _map(batch, channels, side)
    inputs = {"grad": x, "x": x} | dict.fromkeys(names, Input((channels,)))

    def part(grad: Any, x: Any, weight: Any, **statistics: Any) -> Any:
        return normed_gelu_backward(grad, x, weight, *(value.float() for value in statistics.values()))

    return Workload("normed_gelu_backward", "OverLoCK-XT", f"{channels}@{side}²", inputs, x.shape, {}, part, False)


def branches(batch: int, channels: int, side: int, sizes: Sequence[int], dilations: Sequence[int]) -> Workload:
    """Depthwise branches with batch norms, in training."""
    inputs: dict[str, Any] = {"x": _map(batch, channels, side)}
    inputs["weights"] = tuple(Input((channels, 1, size, size)) for size in sizes)
    inputs |= {"scale": Input((len(sizes), channels)), "shift": Input((channels,))}

    def part(x: Any, weights: Any, scale: Any, shift: Any) -> Any:
        return normed_branches(x, weights, dilations, scale.float(), shift.float(), 1e-5)[0]

    return Workload("normed_branches", "OverLoCK-T", f"{channels}@{side}²", inputs, inputs["x"].shape, {}, part)


def cases(dtype: torch.dtype = torch.bfloat16) -> dict[str, Workload]:
    """What is built, by name: operators at shapes of the models at which, together, they launch every kernel that takes
    such tensors.

    An operator that is not here is launched at the first of its shapes.
    """
    rednet = involution("RedNet-50", 128, 128, (28, 28), 7, 16)
    dilated = neighborhood("na2d_softmax_av", "", 128, 8, 16, (56, 56), 7)
    found = [
        rednet,
        channels_last(rednet),
        generation(channels_last(rednet)),
        *(neighborhood(f"na2d_{name}", "OverLoCK-T", 128, 8, 16, (14, 14), 13) for name in ("softmax_av", "av", "qk")),
        replace(dilated, shape=f"{dilated.shape} d=2", options={**dilated.options, "dilation": 2}),
        channels_last(depthwise("OverLoCK-T", 128, 64, (56, 56), 17), False),
        *(depthwise("", 128, c, (side, side), k) for c, side, k in ((224, 56, 3), (256, 14, 13), (512, 7, 7))),
        gelu(128, 224, 56),
        normed(128, 56, 56),
        branches(128, 256, 14, (13, 3), (1, 2)),
        contmix("OverLoCK-T", 128, 8, 16, (14, 14), (5, 13)),
        contmix("OverLoCK-T", 8, 8, 16, (56, 56), (5, 13)),
        contmix("OverLoCK-S", 128, 32, 8, (7, 7), (5, 7)),
    ]
    if dtype.itemsize <= 2:
        found += [
            residual(128, 128, 28, 512),
            residual(1, 128, 28, 512),
            residual(128, 128, 28, 128),
            expanded(128, 56, 224, 56),
            image(128, 28, 3, relu=True),
            image(128, 64, 7, relu=True),
        ]
    launched = {workload.operator for workload in found}
    first = {workload.operator: workload for workload in reversed(operator_workloads(128))}
    found += [workload for operator, workload in first.items() if operator not in launched]
    layouts = (", channels last" * tree_leaves(workload.inputs)[0].channels_last for workload in found)
    return {f"{case.name}, batch {case.output[0]}{layout}": case for case, layout in zip(found, layouts, strict=True)}
