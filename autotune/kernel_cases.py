"""What every kernel is launched for once: operators at shapes of the models, and parts of models that have kernels.

Importing it needs Triton.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from autotune import workloads
from autotune.workloads import Input, Workload, channels_last
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
    found = workloads.depthwise("OverLoCK-XT", batch, channels, (side, side), 3)
    return replace(found, part=lambda x, weight, bias: gelu_convolve(x, weight, bias, True)[0])


def expanded(batch: int, features: int, channels: int, side: int) -> Workload:
    """The same in inference, with the 1×1 convolution before it."""
    found, shift = gelu(batch, channels, side), Input((channels,))
    inputs = {"x": _map(batch, features, side), "expand": Input((channels, features)), "shift": shift}
    inputs |= {"weight": found.inputs["weight"], "bias": shift}

    def part(x: Any, expand: Any, shift: Any, weight: Any, bias: Any) -> Any:
        return expanded_convolve(x, expand, shift, weight, bias, True)[0]

    return replace(found, inputs=inputs, part=part, trained=False)


def residual(batch: int, channels: int, side: int, skipped: int) -> Workload:
    """The end of RedNet's block in inference, with a shortcut where other than 4·C channels are ``skipped``."""
    outputs, scale = 4 * channels, Input((channels,))
    inputs = {"x": _map(batch, channels, side), "scale": scale, "shift": scale, "weight": Input((outputs, channels))}
    inputs |= {"bias": Input((outputs,)), "skipped": _map(batch, skipped, side)}
    inputs |= {} if skipped == outputs else {"second": Input((outputs, skipped))}
    out, part = _map(batch, outputs, side).shape, lambda **given: residual_pointwise_conv2d(*given.values())
    return Workload("residual_pointwise_conv2d", "RedNet-50", f"{channels}@{side}²", inputs, out, {}, part, False)


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


def cases(dtype: torch.dtype = torch.bfloat16) -> dict[str, list[Workload]]:
    """What is built, by name: operators at shapes of the models at which, together, they launch every kernel that takes
    such tensors.

    An operator that no case here names is launched at the first of its shapes.
    """
    rednet = workloads.involution("RedNet-50", 128, 128, (28, 28), 7, 16)
    unfused = [workloads.neighborhood(name, "OverLoCK-T", 128, 8, 16, (14, 14), 13) for name in ("na2d_av", "na2d_qk")]
    fused = workloads.neighborhood("na2d_softmax_av", "", 128, 8, 16, (14, 14), 13)
    dilated = workloads.neighborhood("na2d_softmax_av", "", 128, 8, 16, (56, 56), 7)
    found: dict[str, list[Workload]] = {
        "involution 128@28 K=7, channels first": [rednet],
        "involution 128@28 K=7, channels last": [channels_last(rednet)],
        "involution, kernels generated, 128@28 K=7": [workloads.generation(channels_last(rednet))],
        "neighborhood 8x16@14 K=13": [fused, *unfused],
        "neighborhood 8x16@56 K=7 d=2": [replace(dilated, options={**dilated.options, "dilation": 2})],
        "depthwise 64@56 K=17": [channels_last(workloads.depthwise("OverLoCK-T", 128, 64, (56, 56), 17), False)],
        "depthwise 224@56 K=3, channels last": [workloads.depthwise("OverLoCK-XT", 128, 224, (56, 56), 3)],
        "depthwise 224@56 K=3, fused": [gelu(128, 224, 56)],
        "batch norm and GELU 56@56": [normed(128, 56, 56)],
        "depthwise 256@14 K=13, branches": [branches(128, 256, 14, (13, 3), (1, 2))],
        "depthwise 256@14 K=13, channels last": [workloads.depthwise("OverLoCK-T", 128, 256, (14, 14), 13)],
        "depthwise 512@7 K=7, channels last": [workloads.depthwise("OverLoCK-T", 128, 512, (7, 7), 7)],
        "contmix 8x16@14 K=5, 13": [workloads.contmix("OverLoCK-T", 128, 8, 16, (14, 14), (5, 13))],
        "contmix 8x16@56 K=5, 13": [workloads.contmix("OverLoCK-T", 8, 8, 16, (56, 56), (5, 13))],
        "contmix 32x8@7 K=5, 7": [workloads.contmix("OverLoCK-S", 128, 32, 8, (7, 7), (5, 7))],
    }
    if dtype.itemsize <= 2:
        found |= {
            "involution 128@28 K=7, the end of its block": [
                residual(batch, 128, 28, skipped) for batch, skipped in ((128, 512), (1, 512), (128, 128))
            ],
            "depthwise 224@56 K=3, expanded": [expanded(128, 56, 224, 56)],
            "images 3@224": [image(128, 28, 3, relu=True), image(128, 64, 7, relu=True)],
        }
    launched = {workload.operator for case in found.values() for workload in case}
    first = {workload.operator: workload for workload in reversed(workloads.operator_workloads(128))}
    return found | {case.name: [case] for operator, case in first.items() if operator not in launched}
