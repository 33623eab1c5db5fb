"""The launchers of either form of neighbourhood kernels: one signature, one reference, whatever computes it.

mix, softmax_mix    Σ_k w[i,k] · value[nbr(i,k)], where w may be a softmax of logits + rpb
transpose           Σ_{(i,k) reaching j} w[i,k] · g[i]
correlate           Σ_c g[i,c] · value[nbr(i,k),c]; or the gradient of a softmax's logits, p · (that − δ)
softmax_backward    the gradients of a softmax's logits and of value
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.aggregation import eager as algebra
from kernels.dtypes import accumulator_dtype, precision, upcast
from kernels.launch import ceil_divide, launch, next_power_of_2
from kernels.layout import empty_like_layout
from kernels.neighborhood import configs, eager
from kernels.neighborhood.own import correlate_kernel, sum_kernel
from kernels.neighborhood.shared import backward_kernel, mix_kernel
from kernels.tuning import tunable
from kernels.tuning.choose import Launcher
from kernels.views import View, alignment, view
from kernels.window_parts import sum_parts
from kernels.windows import Window, windows_and_most

MOST_STEPS = 6  # of a shared window, held in registers at once


class Softmax(NamedTuple):
    """What the backward pass of a softmax reads besides gradient and value."""

    logits: Tensor  # [B, G, Kh, Kw, H, W]
    rpb: Tensor | None  # [G, 2Kh-1, 2Kw-1]
    out: Tensor  # [B, G, C, H, W]
    statistics: Tensor  # [B, G, H, W]: log Σ_k exp


def _reference_gradients(grad: Tensor, value: Tensor, window: Window, softmax: Softmax) -> tuple[Tensor, Tensor]:
    logits, rpb, out, statistics = softmax
    return eager.softmax_aggregate_backward(grad, logits, value, rpb, out, statistics, window)[:2]


def _reference_correlate(
    grad: Tensor, value: Tensor, _target: Tensor, window: Window, softmax: Softmax | None = None
) -> Tensor:
    if softmax is None:
        return algebra.correlate(grad, value, window)
    return _reference_gradients(grad, value, window, softmax)[0]


def _reference_transpose(grad: Tensor, weight: Tensor | Softmax, window: Window) -> Tensor:
    if isinstance(weight, Softmax):  # whose gradient of value does not depend on value
        return _reference_gradients(grad, grad, window, weight)[1]
    return algebra.transpose(weight, grad, (grad.shape[3], grad.shape[4]), window)


class Launchers(NamedTuple):
    mix: Launcher[Tensor]
    softmax_mix: Launcher[tuple[Tensor, Tensor]]
    transpose: Launcher[Tensor]
    correlate: Launcher[Tensor]
    softmax_backward: Callable[[Tensor, Tensor, Tensor, Window, Softmax], tuple[Tensor, Tensor]]


def _launchers(
    name: str,
    candidates: Sequence[Any],
    heuristics: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    problem_of: Callable[[Tensor, Tensor, Window, bool], Any],
    launch_sum: Callable[[Tensor, Tensor, Window, Softmax | None, bool, Any], Tensor],
    launch_correlate: Callable[[Tensor, Tensor, Tensor, Window, Softmax | None, Any], Tensor],
    softmax_backward: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Launchers:
    """``heuristics`` of mix, transpose and correlate; ``launch_sum`` is mix, or transpose where its flag is set.
    Without a ``softmax_backward`` that does both, correlate and transpose follow each other."""

    @tunable(
        candidates,
        heuristics[0],
        problem=lambda weight, value, window: problem_of(weight, value, window, False),
        reference=algebra.aggregate,
        name=f"{name}.mix",
    )
    def mix(weight: Tensor, value: Tensor, window: Window, *, config: Any) -> Tensor:
        """Σ_k weight · value at nbr(i,k), like value."""
        return launch_sum(weight, value, window, None, False, config)

    @tunable(
        candidates,
        heuristics[0],
        problem=lambda logits, value, _rpb, window: problem_of(logits, value, window, True),
        reference=eager.softmax_aggregate,
        name=f"{name}.softmax_mix",
    )
    def softmax_mix(
        logits: Tensor, value: Tensor, rpb: Tensor | None, window: Window, *, config: Any
    ) -> tuple[Tensor, Tensor]:
        """(Σ_k softmax_k(logits + rpb) · value at nbr(i,k), like value; log Σ_k exp [B,G,H,W])."""
        shape = (*value.shape[:2], *value.shape[3:])
        statistics = torch.empty(shape, dtype=accumulator_dtype(value.dtype), device=value.device)
        return launch_sum(logits, value, window, Softmax(logits, rpb, value, statistics), False, config), statistics

    @tunable(
        candidates,
        heuristics[1],
        problem=lambda grad, weight, window: problem_of(
            *(weight.logits, grad, window, True) if isinstance(weight, Softmax) else (weight, grad, window, False)
        ),
        reference=_reference_transpose,
        name=f"{name}.transpose",
    )
    def transpose(grad: Tensor, weight: Tensor | Softmax, window: Window, *, config: Any) -> Tensor:
        """Σ_{(i,k): nbr(i,k)=j} w[i,k] · grad[i], like grad; or with a softmax's weights, and then like its output."""
        if isinstance(weight, Softmax):
            return launch_sum(weight.logits, grad, window, weight, True, config)
        return launch_sum(weight, grad, window, None, True, config)

    @tunable(
        candidates,
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

    def in_turn(grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax) -> tuple[Tensor, Tensor]:
        return correlate(grad, value, target, window, softmax), transpose(grad, softmax, window)

    return Launchers(mix, softmax_mix, transpose, correlate, softmax_backward or in_turn)


class Sizes(NamedTuple):
    """Of the features [B, G, C, H, W]."""

    batch: int
    groups: int
    channels: int
    height: int
    width: int


class Cut(NamedTuple):
    """How a kernel cuts the map: constants, number of programs, and how it sees a dynamic kernel."""

    constants: dict[str, Any]
    programs: int
    view: Callable[[Tensor], View]


def _launch(
    kernel: Any, cut: Cut, features: Tensor, softmax: Softmax | None, config: Any, **tensors: Tensor | None
) -> None:
    """With a spare pointer for each tensor that there is none of."""
    given = {"rpb": softmax and softmax.rpb, "statistics": softmax and softmax.statistics, **tensors}
    views = {5: _features, 6: cut.view, 4: lambda t: view(t, "b g h w"), 3: lambda t: view(t, "g h w")}
    maps = (_features(t) for name, t in given.items() if t is not None and t.dim() == 5 and name != "parts")
    arguments = {
        **{name: View(features) if t is None else views[t.dim()](t) for name, t in given.items()},
        **cut.constants,
        "ALIGNED": alignment(features.shape[2], *maps),
        "sizes": Sizes(*features.shape),
        "SOFTMAX": softmax is not None,
        "HAS_RPB": softmax is not None and softmax.rpb is not None,
        **precision(features, *(t for t in tensors.values() if t is not None)),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(kernel, (cut.programs,), features.device, arguments, **options)


def _features(tensor: Tensor) -> View:
    return view(tensor, "b g c h w")


def _kernel(kernel: Tensor) -> View:
    """[B, G, Kh, Kw, H, W], Kh under ``c`` and Kw under ``k``."""
    return view(kernel, "b g c k h w")


def along_window(kernel: Tensor) -> View:
    """[B, G, Kh, Kw, H, W] with one stride along its window positions, as [B, G, H, W, K²]."""
    stride_b, stride_g, stride_kh, stride_kw, stride_h, stride_w = kernel.stride()
    stride_k = stride_kw if kernel.shape[3] > 1 else stride_kh
    return View(kernel, b=stride_b, g=stride_g, h=stride_h, w=stride_w, k=stride_k)


def _own_cut(features: Tensor, window: Window, config: configs.OwnConfig, block: int) -> Cut:
    """One program per (block of channels, tile of rows, columns of all images and heads), fastest first."""
    batch, groups, channels, height, width = features.shape
    dilation = window.dilation[0]
    row_tiles = dilation * ceil_divide(ceil_divide(height, dilation), config.rows)
    constants = {
        "row_tiles": row_tiles,
        "WINDOW": window,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "CHANNELS": block,
        "STEPS": next_power_of_2(window.kernel_size[1]),
    }
    column_tiles = ceil_divide(batch * groups * width, config.columns)
    return Cut(constants, ceil_divide(channels, block) * row_tiles * column_tiles, _kernel)


def _own_sum(
    weight: Tensor, source: Tensor, window: Window, softmax: Softmax | None, transposed: bool, config: configs.OwnConfig
) -> Tensor:
    out = empty_like_layout(source if softmax is None else softmax.out, source.shape)
    block = min(64, next_power_of_2(source.shape[2]))
    cut = _own_cut(source, window, config, block)
    cut.constants["channel_blocks"] = ceil_divide(source.shape[2], block)
    cut.constants["TRANSPOSED"] = transposed
    _launch(sum_kernel, cut, source, softmax, config, weight=weight, source=source, out=out)
    return out


def _own_correlate(
    grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax | None, config: configs.OwnConfig
) -> Tensor:
    cut = _own_cut(value, window, config, next_power_of_2(value.shape[2]))
    given = {"logits": softmax and softmax.logits, "out": softmax and softmax.out}
    _launch(correlate_kernel, cut, value, softmax, config, grad=grad, value=value, target=target, **given)
    return target


def _shared_cut(features: Tensor, window: Window, config: configs.SharedConfig) -> Cut:
    """One program per (tile of a window's outputs, window, group, batch entry)."""
    batch, groups, channels, height, width = features.shape
    windows, most = windows_and_most(window.kernel_size, height, width)
    tiles = ceil_divide(most, config.block_outputs)
    constants = {
        "tiles": tiles,
        "windows": windows,
        "KERNEL_H": window.kernel_size[0],
        "KERNEL_W": window.kernel_size[1],
        "UPCAST": upcast(features.dtype),
        "BLOCK_OUTPUTS": config.block_outputs,
        "BLOCK_STEPS": config.block_steps,
        "BLOCK_CHANNELS": max(16, next_power_of_2(channels)),
    }
    return Cut(constants, tiles * windows * groups * batch, along_window)


def _shared_sum(
    weight: Tensor,
    source: Tensor,
    window: Window,
    softmax: Softmax | None,
    transposed: bool,
    config: configs.SharedConfig,
) -> Tensor:
    out = empty_like_layout(source, source.shape)
    if transposed:
        _shared_backward(source, None, weight, None, out, window, None, config)
        return out
    cut = _shared_cut(source, window, config)
    steps = ceil_divide(window.kernel_size[0] * window.kernel_size[1], config.block_steps)
    cut.constants["CHUNKS"] = chunks = ceil_divide(steps, MOST_STEPS)
    cut.constants["UNROLL"] = ceil_divide(steps, chunks)
    _launch(mix_kernel, cut, source, softmax, config, weight=weight, source=source, out=out)
    return out


def _shared_correlate(
    grad: Tensor, value: Tensor, target: Tensor, window: Window, _softmax: Any, config: configs.SharedConfig
) -> Tensor:
    _shared_backward(grad, value, None, target, None, window, None, config)
    return target


def _shared_backward(
    grad: Tensor,
    value: Tensor | None,
    weight: Tensor | None,
    target: Tensor | None,
    of_value: Tensor | None,
    window: Window,
    softmax: Softmax | None,
    config: configs.SharedConfig,
) -> None:
    """Fills ``target`` and the gradient of value, if there are such; the latter takes weights or logits."""
    cut = _shared_cut(grad, window, config)
    batch, groups, channels, _, _ = grad.shape
    tiles, parts = cut.constants["tiles"], None
    filled = ceil_divide(channels, 8) * 8  # channels of parts, for vectors of 16 bytes
    cut.constants.update(CORRELATE=target is not None, TRANSPOSE=of_value is not None)
    cut.constants["FILLED"] = filled if filled > channels else 0
    if of_value is not None:
        places, positions = tiles * cut.constants["windows"], window.kernel_size[0] * window.kernel_size[1]
        parts = grad.new_empty((batch, groups, places, positions, filled)).movedim(-1, 2)
    _launch(
        backward_kernel, cut, grad, softmax, config,
        grad=grad, value=value, weight=weight, out=softmax and softmax.out, target=target, parts=parts,
    )  # fmt: skip
    if of_value is not None and parts is not None:
        sum_parts(parts, of_value, window.kernel_size, tiles)


@tunable(
    configs.SHARED_CONFIGS,
    configs.shared_heuristic,
    problem=lambda _grad, value, target, window, _softmax: configs.shared_problem(target, value, window, True),
    reference=lambda grad, value, _target, window, softmax: _reference_gradients(grad, value, window, softmax),
    name="shared_windows.softmax_backward",
)
def _shared_softmax_backward(
    grad: Tensor, value: Tensor, target: Tensor, window: Window, softmax: Softmax, *, config: configs.SharedConfig
) -> tuple[Tensor, Tensor]:
    of_value = empty_like_layout(softmax.out, value.shape)
    _shared_backward(grad, value, softmax.logits, target, of_value, window, softmax, config)
    return target, of_value


# Launchers are names of their module, by which tuning finds them.
OWN = own_mix, own_softmax_mix, own_transpose, own_correlate, own_softmax_backward = _launchers(
    "own_windows", configs.OWN_CONFIGS,
    (configs.own_heuristic, configs.own_heuristic, configs.own_correlate_heuristic),
    configs.own_problem, _own_sum, _own_correlate,
)  # fmt: skip
SHARED = shared_mix, shared_softmax_mix, shared_transpose, shared_correlate, _ = _launchers(
    "shared_windows", configs.SHARED_CONFIGS,
    (configs.shared_heuristic, configs.shared_heuristic, configs.shared_heuristic),
    configs.shared_problem, _shared_sum, _shared_correlate, _shared_softmax_backward,
)  # fmt: skip


def form_of(kernel: Tensor, window: Window, features: Tensor) -> Launchers:
    """Dense matrix products where many outputs share a window, else rows of outputs with windows of their own."""
    return SHARED if configs.shares_windows(kernel, window, features.shape[3], features.shape[4]) else OWN
