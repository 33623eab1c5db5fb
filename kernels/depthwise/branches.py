"""Depthwise branches of one map, each with a batch norm behind it, summed: a ``DilatedReparamBlock`` in training.

    out = Σ_n BatchNorm_n(w_n ∗ x)

x is copied into rows (``rows``) once instead of once per branch, and the branches stay in rows from one convolution to
the next: by themselves, seven convolutions of channels-last maps would be copied fourteen times forward and 28 times
backward. What the norms do stands in ``branch_norms``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.depthwise.backward import gradient_of_rows, weight_gradient
from kernels.depthwise.branch_norms import norm_gradients, normed_sum, statistics_of
from kernels.depthwise.configs import Config
from kernels.depthwise.forward import convolve, convolve_rows
from kernels.depthwise.rows import check_size, in_layout_of, new_rows, rows_of
from kernels.reorder import copy_rows
from kernels.tuning import repeated
from kernels.tuning.choose import Launcher


def _config(launcher: Launcher, *arguments: Any) -> Config:
    """That of the same convolution by itself, unless it is PyTorch's."""
    config = launcher.choose(*arguments)
    return launcher.heuristic(launcher.problem_of(*arguments)._replace(copied=True)) if config.library else config


@repeated
def forward(
    x: Tensor, weights: Sequence[Tensor], scale: Tensor, shift: Tensor, dilations: Sequence[int], epsilon: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """out like x; statistics [2, N, C], mean and biased variance; x in rows, None where x can be read as it is; u in
    rows [N, B, C, H, pitch]."""
    check_size(x)
    rows = rows_of(x)
    u = torch.empty((len(weights), *rows.shape), dtype=x.dtype, device=x.device)
    for n, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        config = _config(convolve, x, weight, None, False, dilation)
        convolve_rows(x, rows, u[n], weight, None, False, dilation, config=config)
    statistics = statistics_of(x, u)
    out = normed_sum(x, u, statistics, scale, shift, epsilon)
    return out, statistics, None if rows is x else rows, u


@repeated
def backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], scale: Tensor, dilations: Sequence[int], epsilon: float,
    statistics: Tensor, x_rows: Tensor, u: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradient of x; those of the scales and, last, of the shift, [N + 1, C]; then those of the weights."""
    grad_rows = new_rows(x)
    copy_rows(grad_rows, grad, to_rows=True)
    grads, sums = norm_gradients(x, grad_rows, u, statistics, scale, epsilon)
    out, grad_weights = new_rows(x), []
    for n, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        config = _config(convolve, x, weight, None, True, dilation)
        convolve_rows(x, grads[n], out, weight, None, True, dilation, config=config, add=n > 0)
        size = weight.shape[-1]
        config = _config(weight_gradient, grad, x, size, dilation)
        grad_weights.append(gradient_of_rows(x, grads[n], x_rows, size, dilation, config))
    return in_layout_of(x, out), sums, *grad_weights
