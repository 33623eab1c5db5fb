"""What ``compile`` builds: operators at shapes of the models at which, together, they launch every kernel."""

from __future__ import annotations

from dataclasses import replace

from autotune.workloads import (
    Workload,
    channels_last,
    contmix,
    depthwise,
    generation,
    involution,
    neighborhood,
    outlook,
)


def cases() -> dict[str, list[Workload]]:
    """The workloads by name."""
    rednet = involution("RedNet-50", 128, 128, (28, 28), 7, 16)
    unfused = [neighborhood(name, "OverLoCK-T", 128, 8, 16, (14, 14), 13) for name in ("na2d_av", "na2d_qk")]
    fused, dilated = (neighborhood("na2d_softmax_av", "", 128, 8, 16, (n, n), k) for n, k in ((14, 13), (56, 7)))
    channels_first = depthwise("OverLoCK-T", 128, 64, (56, 56), 17)
    first = {name: replace(spec, channels_last=False) for name, spec in channels_first.inputs.items()}
    return {
        "involution 128@28 K=7, channels first": [rednet],
        "involution 128@28 K=7, channels last": [channels_last(rednet)],
        "involution 2x8x16@28 K=17": [involution("", 2, 128, (28, 28), 17, 16)],  # too large for rows to slide
        "involution, kernels generated, 128@28 K=7": [generation(channels_last(rednet))],
        "neighborhood 8x16@14 K=13": [fused, *unfused],
        "neighborhood 8x16@56 K=7 d=2": [replace(dilated, options={**dilated.options, "dilation": 2})],
        "outlook 6x32@28 K=3 s=2": [outlook("VOLO-D1", 128, 6, 32, (28, 28), 3, 2)],
        "depthwise 64@56 K=17": [replace(channels_first, inputs=first)],
        "depthwise 256@14 K=13, channels last": [depthwise("OverLoCK-T", 128, 256, (14, 14), 13)],
        "contmix 8x16@14 K=5, 13": [contmix("OverLoCK-T", 128, 8, 16, (14, 14), (5, 13))],
        "contmix 8x16@56 K=5, 13": [contmix("OverLoCK-T", 8, 8, 16, (56, 56), (5, 13))],
        "contmix 32x8@7 K=5, 7": [contmix("OverLoCK-S", 128, 32, 8, (7, 7), (5, 7))],
    }
