"""ContMix as a matrix product and neighbourhood attention, where outputs share no windows and no band fits these.

    logits[n,k] = Σ_c query[c,n] · projected[c,k] + bias[k],   then the kernels of ``na2d_softmax_av``

Logits and their gradients are stored, of some heads of some images at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.contmix import eager
from kernels.contmix.arguments import Targets, Tensors, part_of
from kernels.neighborhood.configs import Weights
from kernels.neighborhood.launchers import mix, softmax_backward
from kernels.neighborhood.passes import grad_rpb
from kernels.windows import Window

# Logits that are stored at a time: 64 MB of float32, or those of one head.
MOST_STORED = 1 << 24


def _parts(tensors: Tensors) -> Iterator[tuple[slice, slice]]:
    """Batch entries and groups that are computed together."""
    batch, groups, _, height, width = tensors.value.shape
    heads = max(1, MOST_STORED // (height * width * tensors.kernel_size**2))
    images, heads = max(1, heads // groups), min(heads, groups)
    for i_batch in range(0, batch, images):
        for i_group in range(0, groups, heads):
            yield slice(i_batch, i_batch + images), slice(i_group, i_group + heads)


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
    for images, heads in _parts(tensors):
        part = part_of(tensors, images, heads)
        mix(part.value, *_weights(part, *_factors(part)))


def backward_composed(tensors: Tensors, targets: Targets) -> None:
    """Fills the targets."""
    grad_bias, grad_table = (torch.zeros_like(of, dtype=tensors.statistics.dtype) for of in (tensors.bias, tensors.rpb))
    for images, heads in _parts(tensors):
        part, into = part_of(tensors, images, heads), part_of(targets, images, heads)
        assert part.grad is not None
        queries, keys = _factors(part)
        weights, window = _weights(part, queries, keys)
        grad_logits = torch.empty_like(weights.kernel)
        _, grad_value = softmax_backward(part.grad, part.value, weights, grad_logits, window)
        into.value.copy_(grad_value)
        grad_table[heads] += grad_rpb(grad_logits, window, grad_table.dtype)
        matrices = grad_logits.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(2, 3)
        grad_query = (keys[:, :, :-1] @ matrices.mT).view(into.query.shape)
        into.query.copy_(grad_query if into.previous is None else grad_query + into.previous)
        grad_keys = queries @ matrices
        into.projected.copy_(grad_keys[:, :, :-1])
        grad_bias += grad_keys[:, :, -1].sum((0, 1))
    targets.bias.copy_(grad_bias)
    targets.rpb.copy_(grad_table)
