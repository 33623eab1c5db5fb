"""What every kernel is launched for once: operators at shapes of the models, and parts of models that have kernels."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autotune import workloads
from autotune.workloads import Workload, channels_last


class Fused(Workload):
    """A 3×3 depthwise convolution of GELU with all that its kernels can do beside it."""

    def run(self, inputs: Any, gradient: Any = None, *_: Any) -> list[Tensor]:
        from kernels.depthwise.sliding import gelu_convolve

        return super().run(inputs, gradient, lambda x, weight, bias: gelu_convolve(x, weight, bias, True)[0])


class Expanded(Workload):
    """The same in inference in 16 bits, with the 1×1 convolution before it."""

    def run(self, inputs: Any, *_: Any) -> list[Tensor]:
        from kernels.depthwise.expanded import expanded_convolve

        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        if x.itemsize > 2:
            return []
        entering = x[:, :56].contiguous(memory_format=torch.channels_last)
        return list(expanded_convolve(entering, x.new_empty(len(bias), 56), bias, weight, bias, True))


class Residual(Workload):
    """The end of RedNet's block as inference has it in 16 bits, after an involution; for one image; with a shortcut."""

    def run(self, inputs: Any, *_: Any) -> list[Tensor]:
        from kernels.pointwise import residual_pointwise_conv2d

        x, channels = inputs["x"], inputs["x"].shape[1]
        if x.itemsize > 2:
            return []
        scale, weight = x.new_empty(channels), x.new_empty(4 * channels, channels)
        bias, skipped = x.new_empty(4 * channels), x.repeat(1, 4, 1, 1)
        rest = scale, scale, weight, bias
        found = [residual_pointwise_conv2d(images, *rest, skipped[: len(images)]) for images in (x, x[:1])]
        return [*found, residual_pointwise_conv2d(x, *rest, x, weight)]


class Images(Workload):
    """The first convolutions of OverLoCK-XT and VOLO-D1, for images of four times a map's sides."""

    def run(self, inputs: Any, *_: Any) -> list[Tensor]:
        from kernels.images import image_conv2d

        x = inputs["x"][:, :3].repeat(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
        if x.itemsize > 2:
            return []
        bias = inputs["bias"]
        weights = x.new_empty(28, 3, 3, 3), x.new_empty(64, 3, 7, 7)
        return [image_conv2d(x, weight, bias[: len(weight)], 2, weight.shape[2] // 2, True) for weight in weights]


class Normed(Workload):
    """The backward pass of a batch norm and GELU, as compiled training has it."""

    def run(self, inputs: Any, *_: Any) -> list[Tensor]:
        from kernels.normed import normed_gelu_backward

        x, bias = inputs["x"], inputs["bias"].float()
        return normed_gelu_backward(x, x, inputs["bias"], bias, bias, bias, bias)


class Branches(Workload):
    """Depthwise branches with batch norms, in training: a workload's kernel, and a part of it dilated."""

    def run(self, inputs: Any, gradient: Any = None, *_: Any) -> list[Tensor]:
        from kernels.depthwise.op import normed_branches

        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            weights, shift = [weight, weight[:, :, :3, :3]], bias.float()
            return normed_branches(x, weights, (1, 2), torch.stack((shift, shift)), shift, 1e-5)[0]

        return super().run(inputs, gradient, run)


def cases() -> dict[str, list[Workload]]:
    """What is built, by name: operators at shapes of the models at which, together, they launch every kernel.

    An operator that no case here names is launched at the first of its shapes.
    """
    rednet = workloads.involution("RedNet-50", 128, 128, (28, 28), 7, 16)
    unfused = [workloads.neighborhood(name, "OverLoCK-T", 128, 8, 16, (14, 14), 13) for name in ("na2d_av", "na2d_qk")]
    fused = workloads.neighborhood("na2d_softmax_av", "", 128, 8, 16, (14, 14), 13)
    dilated = workloads.neighborhood("na2d_softmax_av", "", 128, 8, 16, (56, 56), 7)
    found: dict[str, list[Workload]] = {
        "involution 128@28 K=7, channels first": [rednet],
        "involution 128@28 K=7, channels last": [channels_last(rednet)],
        "involution 128@28 K=7, the end of its block": [Residual(**vars(channels_last(rednet)))],
        "involution, kernels generated, 128@28 K=7": [workloads.generation(channels_last(rednet))],
        "neighborhood 8x16@14 K=13": [fused, *unfused],
        "neighborhood 8x16@56 K=7 d=2": [replace(dilated, options={**dilated.options, "dilation": 2})],
        "depthwise 64@56 K=17": [channels_last(workloads.depthwise("OverLoCK-T", 128, 64, (56, 56), 17), False)],
        "depthwise 224@56 K=3, fused": [Fused(**vars(workloads.depthwise("OverLoCK-XT", 128, 224, (56, 56), 3)))],
        "depthwise 224@56 K=3, expanded": [Expanded(**vars(workloads.depthwise("OverLoCK-XT", 128, 224, (56, 56), 3)))],
        "depthwise 224@56 K=3, channels last": [workloads.depthwise("OverLoCK-XT", 128, 224, (56, 56), 3)],
        "images 3@224": [Images(**vars(workloads.depthwise("OverLoCK-XT", 128, 224, (56, 56), 3)))],
        "batch norm and GELU 56@56": [Normed(**vars(workloads.depthwise("OverLoCK-XT", 128, 56, (56, 56), 3)))],
        "depthwise 256@14 K=13, branches": [
            Branches(**vars(workloads.depthwise("OverLoCK-T", 128, 256, (14, 14), 13)))
        ],
        "depthwise 256@14 K=13, channels last": [workloads.depthwise("OverLoCK-T", 128, 256, (14, 14), 13)],
        "depthwise 512@7 K=7, channels last": [workloads.depthwise("OverLoCK-T", 128, 512, (7, 7), 7)],
        "contmix 8x16@14 K=5, 13": [workloads.contmix("OverLoCK-T", 128, 8, 16, (14, 14), (5, 13))],
        "contmix 8x16@56 K=5, 13": [workloads.contmix("OverLoCK-T", 8, 8, 16, (56, 56), (5, 13))],
        "contmix 32x8@7 K=5, 7": [workloads.contmix("OverLoCK-S", 128, 32, 8, (7, 7), (5, 7))],
    }
    launched = {workload.operator for case in found.values() for workload in case}
    first = {workload.operator: workload for workload in reversed(workloads.operator_workloads(128))}
    return found | {case.name: [case] for operator, case in first.items() if operator not in launched}
