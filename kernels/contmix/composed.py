"""ContMix as a matrix product and neighbourhood attention, where outputs share no windows and no band fits these.

    logits[n,k] = Σ_c query[c,n] · projected[c,k] + bias[k],   then the kernels of ``na2d_softmax_av``

Logits and their gradients are stored, of some heads of some images at a time.
"""

import torch
from torch import Tensor

from kernels.contmix import eager
from kernels.contmix.arguments import Targets, Tensors
from kernels.contmix.parts import by_parts, part_of, parts_of
from kernels.neighborhood.configs import Weights
from kernels.neighborhood.passes import grad_rpb, mix, softmax_backward
from kernels.windows import Window


def _factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Query and a channel of ones, [B, G, Dq + 1, H·W], and projected keys and bias, [B, G, Dq + 1, K²]."""
    ones, keys = eager.factors(tensors.query, tensors.projected, tensors.bias)
    return ones.flatten(3).to(keys.dtype), keys


def _weights(tensors: Tensors, queries: Tensor, keys: Tensor) -> tuple[Weights, Window]:
    """What neighbourhood attention takes: logits [B, G, K, K, H, W], positions of a window adjacent in memory."""
    window = Window.neighborhood((tensors.kernel_size, tensors.kernel_size))
    logits = (queries.mT @ keys).unflatten(3, window.kernel_size).unflatten(2, tensors.value.shape[3:])
    return Weights(logits.permute(0, 1, 4, 5, 2, 3), tensors.rpb, tensors.out, tensors.statistics), window


def forward_composed(tensors: Tensors) -> None:
    """Fills ``out`` and ``statistics``."""
    for images, heads in parts_of(tensors, tensors.kernel_size**2):
        part = part_of(tensors, images, heads)
        mix(part.value, *_weights(part, *_factors(part)))


def _fill(tensors: Tensors, targets: Targets) -> None:
    assert tensors.grad is not None
    queries, keys = _factors(tensors)
    weights, window = _weights(tensors, queries, keys)
    grad_logits = torch.empty_like(weights.kernel)
    _, grad_value = softmax_backward(tensors.grad, tensors.value, weights, grad_logits, window)
    targets.value.copy_(grad_value)
    targets.rpb.copy_(grad_rpb(grad_logits, window, tensors.statistics.dtype))
    matrices = grad_logits.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(2, 3)
    grad_query = (keys[:, :, :-1] @ matrices.mT).view(targets.query.shape)
    targets.query.copy_(grad_query if targets.previous is None else grad_query + targets.previous)
    grad_keys = queries @ matrices
    targets.projected.copy_(grad_keys[:, :, :-1])
    targets.bias.copy_(grad_keys[:, :, -1].sum((0, 1)))


def backward_composed(tensors: Tensors, targets: Targets) -> None:
    """Fills the targets."""
    by_parts(tensors, targets, tensors.kernel_size**2, _fill)
