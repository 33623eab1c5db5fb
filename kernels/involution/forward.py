"""Involution with its kernels generated inside: no [B, G, K, K, H', W'] tensor exists.

Per pixel and group of C channels a launch reads R features (shared by all groups) and C channels and writes C; the
unfused pair of span convolution and aggregate writes and reads K² kernel entries as well: at K = 7, C = 16 and RedNet's
reduction by 4 some 36 elements instead of 130. Multiply-adds: R·K² on tensor cores and C·K² on CUDA cores.

The kernel is aggregation's (``aggregation.rows``), forward and transposed.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels.aggregation import eager
from kernels.aggregation.configs import CONFIGS, Config, heuristic, problem_of
from kernels.aggregation.rows import weighted_sum, weighted_sum_kernel
from kernels.involution import generate
from kernels.layout import empty_like_layout
from kernels.reorder import in_channels_last, in_order_of
from kernels.tuning import tunable
from kernels.windows import Window

KERNEL = weighted_sum_kernel  # named here, because what is tuned is good for as long as this code stays


def whole_blocks(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, R, H', W'] and weight [G·K², R] with zeros up to a multiple of 16, a side of a matrix product, where
    there are more. Of a block that is partly empty each number is masked, for which there are not enough registers."""
    missing = -features.shape[1] % 16 if features.shape[1] > 16 else 0
    if missing:
        features, weight = F.pad(features, (0, 0, 0, 0, 0, missing)), F.pad(weight, (0, missing))
    return features, weight


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda x, features, _weight, _bias, window: problem_of(
        x, features.shape[2:], window, features=features.shape[1]
    ),
    reference=lambda x, features, weight, bias, window: generate.forward(x, features, weight, bias, window, eager),
)
def involution_generate(
    x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window, *, config: Config
) -> Tensor:
    """[B, G, C, H', W'] in the memory order of x [B, G, C, H, W]."""
    out = empty_like_layout(x, (*x.shape[:3], *features.shape[2:]))
    return weighted_sum(x, features, weight, bias, out, window, config, transposed=False)


def forward(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """As ``involution_generate``. Where pixels are adjacent its taps do not fit the registers: copies cost less."""
    last = in_channels_last(x)
    out = involution_generate(last, *whole_blocks(in_channels_last(features), weight), bias, window)
    return out if last is x else in_order_of(x, out)


def _transposed_reference(g: Tensor, x: Tensor, *inputs: Any) -> Tensor:
    features, weight, bias, window = inputs
    kernels = generate.kernels_of(features, weight, bias, g.shape[1], window)
    return eager.transpose(kernels, g, (x.shape[3], x.shape[4]), window)


@tunable(
    CONFIGS,
    heuristic,
    problem=lambda g, x, features, _weight, _bias, window: problem_of(
        g, x.shape[3:], window, features=features.shape[1], transposed=True
    ),
    reference=_transposed_reference,
)
def involution_generate_transpose(
    g: Tensor, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, window: Window, *, config: Config
) -> Tensor:
    """The gradient of x [B, G, C, H, W], in its memory order, from that of the output, g [B, G, C, H', W']."""
    out = empty_like_layout(x)
    return weighted_sum(g, features, weight, bias, out, window, config, transposed=True)
