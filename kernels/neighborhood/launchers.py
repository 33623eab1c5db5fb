"""The four launchers of either form of neighbourhood kernels: one signature, one reference, whatever computes it.

mix, softmax_mix    Σ_k w[i,k] · value[nbr(i,k)], where w may be a softmax of logits + rpb
transpose           Σ_{(i,k) reaching j} w[i,k] · g[i]
correlate           Σ_c g[i,c] · value[nbr(i,k),c]; or the gradient of a softmax's logits, p · (that − δ)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kernels.aggregation import eager as algebra
from kernels.dtypes import accumulator_dtype, at_least_float32, precision, upcast
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.neighborhood import eager
from kernels.neighborhood.configs import (
    OWN_CONFIGS,
    SHARED_CONFIGS,
    OwnConfig,
    OwnProblem,
    SharedConfig,
    SharedProblem,
    own_correlate_heuristic,
    own_heuristic,
    shared_gradient_heuristic,
    shared_heuristic,
    shared_transpose_heuristic,
    shares_windows,
    windows_and_most,
)
from kernels.neighborhood.own import correlate_kernel, sum_kernel
from kernels.neighborhood.shared import correlate_kernel as shared_correlate_kernel
from kernels.neighborhood.shared import mix_kernel, transpose_kernel
from kernels.neighborhood.tiles import Sizes, along_window
from kernels.tuning import tunable
from kernels.tuning.choose import Launcher
from kernels.views import View, view
from kernels.windows import Window

__all__ = ["OWN", "SHARED", "Launchers", "Softmax", "form_of"]

MOST_STEPS = 6  # of a shared window, held in registers at once


class Softmax(NamedTuple):
    """What the backward pass of a softmax reads besides gradient and value."""

    logits: Tensor  # [B, G, Kh, Kw, H, W]
    rpb: Tensor | None  # [G, 2Kh-1, 2Kw-1]
    out: Tensor  # [B, G, C, H, W]
    statistics: Tensor  # [B, G, H, W]: log Σ_k exp


def _reference_softmax_mix(logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window) -> tuple[Tensor, Tensor]:
    logits, value = at_least_float32(logits, value)
    return eager.softmax_aggregate(logits, value, None if rpb is None else at_least_float32(rpb)[0], window)


def _reference_mix(weight: Tensor, value: Tensor, window: Window) -> Tensor:
    weight, value = at_least_float32(weight, value)
    return algebra.aggregate(weight, value, window)


def _reference_gradients(grad: Tensor, value: Tensor, window: Window, softmax: Softmax) -> tuple[Tensor, Tensor]:
    grad, value, logits, out = at_least_float32(grad, value, softmax.logits, softmax.out)
    rpb = None if softmax.rpb is None else at_least_float32(softmax.rpb)[0]
    return eager.softmax_aggregate_backward(grad, logits, value, rpb, out, softmax.statistics, window)[:2]


def _reference_correlate(
    grad: Tensor, value: Tensor, _target: Tensor, window: Window, softmax: Softmax | None = None
) -> Tensor:
    if softmax is not None:
        return _reference_gradients(grad, value, window, softmax)[0]
    grad, value = at_least_float32(grad, value)
    return algebra.correlate(grad, value, window)


def _reference_transpose(weight: Tensor, grad: Tensor, window: Window, softmax: Softmax | None = None) -> Tensor:
    if softmax is not None:  # whose gradient of value does not depend on value
        return _reference_gradients(grad, grad, window, softmax)[1]
    weight, grad = at_least_float32(weight, grad)
    return algebra.transpose(weight, grad, (grad.shape[3], grad.shape[4]), window)


class Launchers(NamedTuple):
    mix: Launcher[Tensor]
    softmax_mix: Launcher[tuple[Tensor, Tensor]]
    transpose: Launcher[Tensor]
    correlate: Launcher[Tensor]


def _launchers(
    name: str,
    configs: Sequence[Any],
    heuristics: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    problem_of: Callable[[Tensor, Tensor, Window, bool], Any],
    launch_sum: Callable[[Tensor, Tensor, Window, Softmax | None, bool, Any], Tensor],
    launch_correlate: Callable[[Tensor, Tensor, Tensor, Window, Softmax | None, Any], Tensor],
) -> Launchers:
    """``heuristics`` of mix, transpose and correlate; ``launch_sum`` is mix, or transpose where its flag is set."""

    @tunable(
        configs,
        heuristics[0],
        problem=lambda weight, value, window: problem_of(weight, value, window, False),
        reference=_reference_mix,
        name=f"{name}.mix",
    )
    def mix(weight: Tensor, value: Tensor, window: Window, *, config: Any) -> Tensor:
        """Σ_k weight · value at nbr(i,k), like value."""
        return launch_sum(weight, value, window, None, False, config)

    @tunable(
        configs,
        heuristics[0],
        problem=lambda logits, value, _rpb, window: problem_of(logits, value, window, True),
        reference=_reference_softmax_mix,
        name=f"{name}.softmax_mix",
    )
    def softmax_mix(
        logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window, *, config: Any
    ) -> tuple[Tensor, Tensor]:
        """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), like value; log Σ_k exp [B,G,H,W])."""
        statistics = value.new_empty(value[:, :, 0].shape, dtype=accumulator_dtype(value.dtype))
        return launch_sum(logits, value, window, Softmax(logits, rpb, value, statistics), False, config), statistics

    @tunable(
        configs,
        heuristics[1],
        problem=lambda weight, grad, window, softmax=None: problem_of(weight, grad, window, softmax is not None),
        reference=_reference_transpose,
        name=f"{name}.transpose",
    )
    def transpose(
        weight: Tensor, grad: Tensor, window: Window, softmax: Softmax | None = None, *, config: Any
    ) -> Tensor:
        """Σ_{(i,k): nbr(i,k)=j} w[i,k] · grad[i], like grad; w = softmax(weight + rpb) where ``softmax`` is given, and
        then in the memory order of its output."""
        return launch_sum(weight, grad, window, softmax, True, config)

    @tunable(
        configs,
        heuristics[2],
        problem=lambda _grad, value, target, window, softmax=None: problem_of(
            target, value, window, softmax is not None
        ),
        reference=_reference_correlate,
        name=f"{name}.correlate",
    )
    def correlate(
        grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax | None = None, *, config: Any
    ) -> Tensor:
        """Fills ``target`` [B,G,Kh,Kw,H,W] with Σ_c grad · value at nbr(i,k); or with the gradient of ``softmax``'s
        logits, p · (that − δ)."""
        return launch_correlate(grad, value, target, window, softmax, config)

    return Launchers(mix, softmax_mix, transpose, correlate)


def _common(features: Tensor, softmax: Softmax | None, *tensors: Tensor) -> dict[str, Any]:
    """What all kernels take alike."""
    spare = View(features)
    return {
        "rpb": spare if softmax is None or softmax.rpb is None else view(softmax.rpb, "g h w"),
        "statistics": spare if softmax is None else view(softmax.statistics, "b g h w"),
        "sizes": Sizes(*features.shape),
        "SOFTMAX": softmax is not None,
        "HAS_RPB": softmax is not None and softmax.rpb is not None,
        **precision(features, *tensors),
    }


def _features(tensor: Tensor) -> View:
    return view(tensor, "b g c h w")


def _kernel(kernel: Tensor) -> View:
    """[B, G, Kh, Kw, H, W], Kh under ``c`` and Kw under ``k``."""
    return view(kernel, "b g c k h w")


def _own_problem(_kernel: Tensor, features: Tensor, window: Window, softmax: bool) -> OwnProblem:
    _, _, channels, height, width = features.shape
    strides = features.stride()
    aligned = strides[2] == 1 and all(stride % 16 == 0 for stride in (*strides[:2], *strides[3:]))
    aligned = aligned and features.data_ptr() % 16 == 0
    return OwnProblem(channels, height * width, *window.kernel_size, softmax, aligned, features.dtype)


def _own_tiles(features: Tensor, window: Window, config: OwnConfig) -> tuple[dict[str, Any], int]:
    """How the map is cut, and the number of tiles."""
    batch, groups, _, height, width = features.shape
    dilation = window.dilation[0]
    row_tiles = dilation * ceil_divide(ceil_divide(height, dilation), config.rows)
    steps = next_power_of_2(window.kernel_size[1])
    cut = {"row_tiles": row_tiles, "WINDOW": window, "ROWS": config.rows, "COLUMNS": config.columns, "STEPS": steps}
    return cut, row_tiles * ceil_divide(batch * groups * width, config.columns)


def _own_sum(
    weight: Tensor, source: Tensor, window: Window, softmax: Softmax | None, transposed: bool, config: OwnConfig
) -> Tensor:
    out = empty_like_layout(source if softmax is None else softmax.out, source.shape)
    block = min(64, next_power_of_2(source.shape[2]))
    channel_blocks = ceil_divide(source.shape[2], block)
    cut, tiles = _own_tiles(source, window, config)
    arguments = {
        **_common(source, softmax, weight, out),
        **cut,
        "weight": _kernel(weight),
        "source": _features(source),
        "out": _features(out),
        "channel_blocks": channel_blocks,
        "TRANSPOSED": transposed,
        "CHANNELS": block,
    }
    # One program per (channel block, tile of rows, columns of all images and heads), fastest first.
    launch(sum_kernel, (channel_blocks * tiles,), out.device, arguments, num_warps=config.num_warps, num_stages=1)
    return out


def _own_correlate(
    grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax | None, config: OwnConfig
) -> Tensor:
    cut, tiles = _own_tiles(value, window, config)
    arguments = {
        **_common(value, softmax, grad, target),
        **cut,
        "grad": _features(grad),
        "value": _features(value),
        "logits": View(value) if softmax is None else _kernel(softmax.logits),
        "out": View(value) if softmax is None else _features(softmax.out),
        "target": _kernel(target),
        "CHANNELS": next_power_of_2(value.shape[2]),
    }
    # One program per (tile of rows, columns of all images and heads), fastest first.
    launch(correlate_kernel, (tiles,), value.device, arguments, num_warps=config.num_warps, num_stages=1)
    return target


def _shared_problem(kernel: Tensor, features: Tensor, window: Window, softmax: bool) -> SharedProblem:
    _, _, channels, height, width = features.shape
    positions, most = window.kernel_size[0] * window.kernel_size[1], windows_and_most(window, height, width)[1]
    return SharedProblem(channels, height * width, positions, most, softmax, kernel.dtype)


def _shared_tiles(features: Tensor, window: Window, config: SharedConfig) -> tuple[dict[str, Any], int]:
    """How windows are cut, and the number of tiles of all of them."""
    batch, groups, channels, height, width = features.shape
    windows, most = windows_and_most(window, height, width)
    tiles = ceil_divide(most, config.block_outputs)
    cut = {
        "tiles": tiles,
        "windows": windows,
        "KERNEL_H": window.kernel_size[0],
        "KERNEL_W": window.kernel_size[1],
        "UPCAST": upcast(features.dtype),
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_STEPS": config.block_steps,
        "BLOCK_CHANNELS": max(16, next_power_of_2(channels)),
    }
    return cut, tiles * windows * groups * batch


def _shared_sum(
    weight: Tensor, source: Tensor, window: Window, softmax: Softmax | None, transposed: bool, config: SharedConfig
) -> Tensor:
    out = empty_like_layout(source if softmax is None else softmax.out, source.shape)
    batch, groups, _, height, width = source.shape
    cut, programs = _shared_tiles(source, window, config)
    arguments = {
        **_common(source, softmax, weight, out),
        **cut,
        "weight": along_window(weight),
        "source": _features(source),
        "out": _features(out),
    }
    if transposed:
        # One program per (block of inputs, group, batch entry).
        arguments["input_blocks"] = ceil_divide(height * width, config.block_steps)
        kernel, programs = transpose_kernel, arguments["input_blocks"] * groups * batch
    else:
        # One program per (tile of a window's outputs, window, group, batch entry).
        steps = ceil_divide(window.kernel_size[0] * window.kernel_size[1], config.block_steps)
        arguments["CHUNKS"] = ceil_divide(steps, MOST_STEPS)
        arguments["UNROLL"] = ceil_divide(steps, arguments["CHUNKS"])
        kernel = mix_kernel
    launch(kernel, (programs,), out.device, arguments, num_warps=config.num_warps, num_stages=config.num_stages)
    return out


def _shared_correlate(
    grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax | None, config: SharedConfig
) -> Tensor:
    cut, programs = _shared_tiles(value, window, config)
    arguments = {
        **_common(value, softmax, grad, target),
        **cut,
        "grad": _features(grad),
        "value": _features(value),
        "logits": View(value) if softmax is None else along_window(softmax.logits),
        "out": View(value) if softmax is None else _features(softmax.out),
        "target": along_window(target),
    }
    # One program per (tile of a window's outputs, window, group, batch entry).
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(shared_correlate_kernel, (programs,), value.device, arguments, **options)
    return target


OWN = own_mix, own_softmax_mix, own_transpose, own_correlate = _launchers(
    "own_windows", OWN_CONFIGS, (own_heuristic, own_heuristic, own_correlate_heuristic),
    _own_problem, _own_sum, _own_correlate,
)  # fmt: skip
SHARED = shared_mix, shared_softmax_mix, shared_transpose, shared_correlate = _launchers(
    "shared_windows", SHARED_CONFIGS, (shared_heuristic, shared_transpose_heuristic, shared_gradient_heuristic),
    _shared_problem, _shared_sum, _shared_correlate,
)  # fmt: skip


def form_of(kernel: Tensor, window: Window, features: Tensor) -> Launchers:
    """Dense matrix products where many outputs share a window, else rows of outputs with windows of their own."""
    return SHARED if shares_windows(kernel, window, features.shape[3], features.shape[4]) else OWN
