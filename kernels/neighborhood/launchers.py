"""The launchers of neighbourhood kernels: dense products where outputs share windows, rows of outputs elsewhere.

mix                 Σ_k w[i,k] · value[nbr(i,k)], where w may be a softmax of logits + rpb
transpose           Σ_{(i,k) reaching j} w[i,k] · g[i]
correlate           Σ_c g[i,c] · value[nbr(i,k),c]
softmax_backward    the gradients of a softmax's logits, p · (correlate − δ), and of value, transpose
"""

from typing import Any

from torch import Tensor

from kernels.aggregation import eager as algebra
from kernels.dtypes import precision, upcast
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.neighborhood import eager
from kernels.neighborhood.configs import (
    OWN_CONFIGS,
    SHARED_CONFIGS,
    OwnConfig,
    SharedConfig,
    Weights,
    own_correlate_heuristic,
    own_heuristic,
    own_problem,
    shared_heuristic,
    shared_problem,
)
from kernels.neighborhood.own import correlate_kernel, sum_kernel
from kernels.neighborhood.shared import backward_kernel, mix_kernel
from kernels.tuning import tunable
from kernels.views import View, alignment, view
from kernels.window_parts import sum_parts
from kernels.windows import Window, windows_and_most

MOST_STEPS = 6  # of a shared window, held in registers at once


def _reference_backward(
    grad: Tensor, value: Tensor | None, weights: Weights | None, target: Tensor | None, window: Window
) -> Any:
    value = grad if value is None else value  # on which its own gradient does not depend
    if weights is None:
        return algebra.correlate(grad, value, window)
    logits, rpb, out, statistics = weights
    if not weights.softmax:
        return algebra.transpose(logits, grad, (grad.shape[3], grad.shape[4]), window)
    gradients = eager.softmax_aggregate_backward(grad, logits, value, rpb, out, statistics, window)[:2]
    return gradients[1] if target is None else gradients


def _reference_sum(source: Tensor, weights: Weights, window: Window, *, transposed: bool = False) -> Any:
    if transposed:
        return _reference_backward(source, None, weights, None, window)
    if weights.softmax:
        return eager.softmax_aggregate(weights.kernel, source, weights.rpb, window)
    return algebra.aggregate(weights.kernel, source, window)


def _reference_correlate(
    grad: Tensor, value: Tensor, weights: Weights | None, target: Tensor, window: Window
) -> Tensor:
    found = _reference_backward(grad, value, weights, target, window)
    return found if weights is None else found[0]


def _launch(
    kernel: Any,
    programs: int,
    features: Tensor,
    weights: Weights | None,
    config: OwnConfig | SharedConfig,
    constants: dict[str, Any],
    /,
    **tensors: Tensor | None,
) -> None:
    """With a spare pointer for each tensor that there is none of."""
    if weights is not None:
        tensors |= {"rpb": weights.rpb, "statistics": weights.statistics}
    axes = {6: "b g c k h w", 5: "b g c h w", 4: "b g h w", 3: "g h w"}
    views = dict.fromkeys(("rpb", "statistics", *tensors), View(features))
    for name, tensor in tensors.items():
        if tensor is not None:
            views[name] = view(tensor, axes[tensor.dim()])
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    maps = [views[name] for name, tensor in given.items() if tensor.dim() == 5 and name != "parts"]
    arguments = {
        **views, **constants, "ALIGNED": alignment(features.shape[2], *maps), "sizes": tuple(features.shape),
        "SOFTMAX": weights is not None and weights.softmax, "HAS_RPB": "rpb" in given,
        **precision(features, *given.values()),
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(kernel, (programs,), features.device, arguments, **options)


def _own_constants(features: Tensor, window: Window, config: OwnConfig, block: int) -> tuple[dict[str, Any], int]:
    """What kernels of own windows take; and the number of programs, one per (block of channels, tile of rows, columns
    of all images and heads), fastest first."""
    batch, groups, channels, height, width = features.shape
    dilation = window.dilation[0]
    row_tiles = dilation * ceil_divide(ceil_divide(height, dilation), config.rows)
    constants = {
        "row_tiles": row_tiles,
        "WINDOW": window, "ROWS": config.rows, "COLUMNS": config.columns, "CHANNELS": block,
        "STEPS": next_power_of_2(window.kernel_size[1]),
    }  # fmt: skip
    column_tiles = ceil_divide(batch * groups * width, config.columns)
    return constants, ceil_divide(channels, block) * row_tiles * column_tiles


@tunable(OWN_CONFIGS, own_heuristic, problem=own_problem, reference=_reference_sum, name="own_windows.sum")
def own_sum(source: Tensor, weights: Weights, window: Window, *, transposed: bool = False, config: OwnConfig) -> Any:
    """mix, with its statistics if of a softmax; or transpose."""
    channels = source.shape[2]
    block = min(64, next_power_of_2(channels))
    constants, programs = _own_constants(source, window, config, block)
    constants |= {"channel_blocks": ceil_divide(channels, block), "TRANSPOSED": transposed}
    out = weights.out
    if out is None or transposed:
        out = empty_like_layout(source if out is None else out, source.shape)
    tensors = {"weight": weights.kernel, "source": source, "out": out}
    _launch(sum_kernel, programs, source, weights, config, constants, **tensors)
    return (out, weights.statistics) if weights.softmax and not transposed else out


@tunable(
    OWN_CONFIGS,
    own_correlate_heuristic,
    problem=lambda _grad, value, weights, _target, window: own_problem(value, weights, window),
    reference=_reference_correlate,
    name="own_windows.correlate",
)
def own_correlate(
    grad: Tensor, value: Tensor, weights: Weights | None, target: Tensor, window: Window, *, config: OwnConfig
) -> Tensor:
    """Fills ``target`` with correlate, or with the gradient of a softmax's logits."""
    constants, programs = _own_constants(value, window, config, next_power_of_2(value.shape[2]))
    logits, out = (None, None) if weights is None else (weights.kernel, weights.out)
    tensors = {"grad": grad, "value": value, "logits": logits, "out": out, "target": target}
    _launch(correlate_kernel, programs, value, weights, config, constants, **tensors)
    return target


def _shared_constants(features: Tensor, window: Window, config: SharedConfig) -> tuple[dict[str, Any], int]:
    """What kernels of shared windows take, and the number of programs, one per (tile of a window's outputs, window,
    group, batch entry)."""
    batch, groups, channels, height, width = features.shape
    windows, most = windows_and_most(window.kernel_size, height, width)
    tiles = ceil_divide(most, config.block_outputs)
    constants = {
        "tiles": tiles, "windows": windows,
        "KERNEL_H": window.kernel_size[0], "KERNEL_W": window.kernel_size[1], "UPCAST": upcast(features.dtype),
        "BLOCK_OUTPUTS": config.block_outputs, "BLOCK_STEPS": config.block_steps,
        "BLOCK_CHANNELS": max(16, next_power_of_2(channels)),
    }  # fmt: skip
    return constants, tiles * windows * groups * batch


@tunable(SHARED_CONFIGS, shared_heuristic, problem=shared_problem, reference=_reference_sum, name="shared_windows.mix")
def shared_mix(value: Tensor, weights: Weights, window: Window, *, config: SharedConfig) -> Any:
    """mix, with its statistics if of a softmax."""
    constants, programs = _shared_constants(value, window, config)
    steps = ceil_divide(window.kernel_size[0] * window.kernel_size[1], config.block_steps)
    constants["CHUNKS"] = chunks = ceil_divide(steps, MOST_STEPS)
    constants["UNROLL"] = ceil_divide(steps, chunks)
    out = empty_like_layout(value) if weights.out is None else weights.out
    tensors = {"weight": weights.kernel, "source": value, "out": out}
    _launch(mix_kernel, programs, value, weights, config, constants, **tensors)
    return (out, weights.statistics) if weights.softmax else out


@tunable(
    SHARED_CONFIGS,
    shared_heuristic,
    problem=lambda grad, _value, weights, target, window: shared_problem(grad, weights, window, target),
    reference=_reference_backward,
    name="shared_windows.backward",
)
def shared_backward(
    grad: Tensor,
    value: Tensor | None,
    weights: Weights | None,
    target: Tensor | None,
    window: Window,
    *,
    config: SharedConfig,
) -> Any:
    """Fills ``target``, if given, with correlate, and returns transpose, if given weights; with both, the gradients of
    a softmax's logits and of value."""
    constants, programs = _shared_constants(grad, window, config)
    constants |= {"CORRELATE": target is not None, "TRANSPOSE": weights is not None}
    batch, groups, channels, _, _ = grad.shape
    filled = ceil_divide(channels, 8) * 8  # channels of parts, for vectors of 16 bytes
    constants["FILLED"] = filled if filled > channels else 0
    tensors = {"grad": grad, "value": value, "target": target, "weight": None, "out": None, "parts": None}
    if weights is None:
        _launch(backward_kernel, programs, grad, weights, config, constants, **tensors)
        return target
    places, positions = constants["tiles"] * constants["windows"], window.kernel_size[0] * window.kernel_size[1]
    parts = grad.new_empty((batch, groups, places, positions, filled)).movedim(-1, 2)
    tensors |= {"weight": weights.kernel, "out": weights.out, "parts": parts}
    _launch(backward_kernel, programs, grad, weights, config, constants, **tensors)
    of_value = empty_like_layout(grad if weights.out is None else weights.out, grad.shape)
    sum_parts(parts, of_value, window.kernel_size, constants["tiles"])
    return of_value if target is None else (target, of_value)
